"""InfoNCE over rows: which key belongs to a query, among all the others; in one call.

The N x N similarities are never there: a tile of them at a time, with a running log-sum-exp.
The backward pass computes the tiles again, from four numbers kept for each row. Back ends:
see `speechloss.kernels.backends`.
"""
import math
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import check_floating, choose, working_dtype
from .workers import side_by_side

#: Added to the squared norm of a row: rows shorter than about 1e-6 count as silence
EPS = 1e-12
#: Rows and columns of a tile of the torch back end. On a CPU it should stay in the cache and
#: still be wide enough for the matrix product to dominate.
TILES = dict(cpu=(512, 256), cuda=(4096, 4096))
#: Rows of a CPU's work are cut into so many pieces: the result does not depend on the number of cores
#: unless they have fewer rows than are worth a thread
PIECES, FEW = 4, 256
#: Scores are kept in units of ln 2, since exp2 is cheaper than exp
LOG2E = 1 / math.log(2)
#: Least temperature: with a smaller one scores of ordinary rows overflow
LEAST = 1e-6
#: Finite stand-in for the largest score of no column at all
NONE_YET = -1e30


def info_nce(
    queries: Tensor,                          # (N, D), floating point
    keys: Tensor,                             # (N, D); key i belongs to query i
    *,
    temperature: float = 0.1,                 # at least 1e-6; scores are divided by it
    extra_negatives: Tensor | None = None,    # (M, D), further keys that belong to no query
    groups: Tensor | None = None,             # (N,) integers; pairs within a group are ignored
    normalize: bool = True,                   # cosine similarity instead of the inner product
    backend: str = 'auto',                    # see speechloss.kernels.backends
) -> Tensor:                                  # (N,) >= 0, nats
    """Cross-entropy of each query's own key among all keys, `(N,)`.

    `-ln(exp(s_ii) / sum_j exp(s_ij))` with `s = cos(queries, keys) / temperature`. The sum goes
    over all keys and extra negatives but for other members of the query's own group, such as
    the other frames of its utterance. Gradients reach queries, keys and extra negatives: detach
    what should not move. Numerics are float32 for shorter types, also under autocast; float64
    stays float64. Rows to normalize may be as long as 1e37, or 1e19 in Triton: longer ones count
    as silence. A second derivative needs `backend='reference'`. The temperature is a number: to
    learn one, scale the queries and pass `normalize=False, temperature=1.`. Raises
    ValueError and TypeError for what cannot be computed, before anything is.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.)
    tensor([0.3133, 0.3133])
    """
    _check(queries, keys, temperature, extra_negatives, groups)
    others = keys if extra_negatives is None else torch.cat([keys, extra_negatives])   # (N + M, D)
    chosen = choose(backend, queries, others)
    with torch.autocast(queries.device.type, enabled=False):
        if chosen == 'reference':
            return _reference(queries, others, groups, temperature, normalize)
        return _info_nce(queries, others, groups, float(temperature), normalize, chosen)[0]


def _reference(queries, keys, groups, temperature, normalize) -> Tensor:
    dtype = working_dtype(queries, keys)
    q, k = queries.to(dtype), keys.to(dtype)
    if normalize: q, k = _unit(q), _unit(k)
    scores, own = q @ k.T / temperature, torch.arange(len(q), device=q.device)     # (N, N + M)
    if groups is not None:
        mates = (groups[:, None] == groups) & (own[:, None] != own)
        scores = scores.masked_fill(F.pad(mates, (0, len(k) - len(q))), -torch.inf)
    return F.cross_entropy(scores, own, reduction='none')


def _unit(x: Tensor) -> Tensor:
    peak = x.detach().abs().amax(-1, keepdim=True).clamp_min(1)      # no square overflows
    x = x / peak
    return x * (x.square().sum(-1, keepdim=True) + EPS / peak.square()).rsqrt()


# ------------------------------------------------------------------------- the torch back end

def _spans(size: int, step: int, start: int = 0) -> list[slice]:
    return [slice(k, min(k + step, size)) for k in range(start, size, step)]


def _pieces(x: Tensor) -> list[slice]:
    "Rows of `x` for the cores of a CPU: the same pieces, whatever the number of cores"
    return _spans(len(x), _share(len(x)) if x.is_cpu else len(x))


def _share(count: int) -> int:
    "Rows of a piece. There are two at least: in a piece torch has one thread, and rounds in one way"
    return max(min(FEW, -(-count // 2)), -(-count // PIECES))


def _inverse_norms(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:   # (N,)
    inverse = torch.ones(len(x), dtype=dtype, device=x.device)

    def fill(rows):
        for few in _spans(rows.stop, FEW, rows.start):   # in float64 no square overflows
            norm = torch.linalg.vector_norm(x[few], dim=1, dtype=torch.float64)
            inverse[few] = norm.square_().add_(EPS).rsqrt_().to(dtype)

    if normalize: side_by_side(fill, _pieces(x), cpu=x.is_cpu)
    return inverse


def _scaled(x: Tensor, factor: Tensor) -> Tensor:   # (rows, D), (rows,)
    return x.to(factor.dtype) * factor[:, None]


def _bounded(temperature: float, normalize: bool) -> bool:
    "Whether every exp2 of a score, and their sum, is a normal number as it is"
    return normalize and 2 * LOG2E / temperature < 60


class _Tiles:
    "The scores of some rows, a tile at a time, in one buffer; `own` views a tile's diagonal"
    def __init__(self, queries: Tensor, keys: Tensor, groups: Tensor | None, dtype: torch.dtype):
        self.most, self.step = TILES.get(queries.device.type, TILES['cpu'])
        if queries.is_cpu: self.most = min(self.most, _share(len(queries)))
        self.dtype, self.groups, self.pairs = dtype, groups, len(queries)
        self.rows = _spans(len(queries), self.most)

    def buffer(self, keys: Tensor) -> Tensor:
        return torch.empty(self.most * min(self.step, len(keys)), dtype=self.dtype, device=keys.device)

    def cols(self, span: slice) -> list[slice]: return _spans(span.stop, self.step, span.start)

    def own(self, tile: Tensor, rows: slice, cols: slice) -> tuple[Tensor, slice] | None:
        "A view of the scores of queries with their own keys, and whose they are"
        first, last = max(rows.start, cols.start), min(rows.stop, cols.stop)
        if first >= last: return None
        return tile.diagonal(rows.start - cols.start), slice(first - rows.start, last - rows.start)

    def ignore(self, tile: Tensor, rows: slice, cols: slice, value: float) -> None:
        "Overwrite the scores within a group"
        if self.groups is None or cols.start >= self.pairs: return
        mates = self.groups[rows, None] == self.groups[cols]     # keys beyond the pairs have no group
        tile[:, :mates.shape[1]].masked_fill_(mates, value)


def _product(q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:   # (rows, D), (cols, D) -> (rows, cols)
    return torch.mm(q, k.T, out=buffer[:len(q) * len(k)].view(len(q), len(k)))


def _forward(queries, keys, groups, temperature, normalize):
    "Loss, log2-sum-exp2 of the scores and the inverse norms of queries and keys, each a number a row"
    dtype, bounded = working_dtype(queries, keys), _bounded(temperature, normalize)
    inverse_q, inverse_k = (_inverse_norms(x, dtype, normalize) for x in (queries, keys))
    loss, lse = torch.empty_like(inverse_q), torch.empty_like(inverse_q)
    tiles = _Tiles(queries, keys, groups, dtype)
    # the tiles of the backward pass, or huge scores would not be the same once more
    columns = [cols for span in _pieces(keys) for cols in tiles.cols(span)]

    def fill(rows):
        q, buffer = _scaled(queries[rows], inverse_q[rows] * (LOG2E / temperature)), tiles.buffer(keys)
        top = q.new_full((len(q),), 0. if bounded else NONE_YET)
        total, positive = q.new_zeros(len(q)), q.new_empty(len(q))
        for cols in columns:
            tile = _product(q, _scaled(keys[cols], inverse_k[cols]), buffer)
            if own := tiles.own(tile, rows, cols):
                positive[own[1]] = own[0]
                own[0].fill_(-torch.inf)
            tiles.ignore(tile, rows, cols, -torch.inf)
            if not bounded:
                higher = torch.maximum(top, tile.amax(1))
                tile.sub_(higher[:, None])
                total, top = total * torch.exp2(top - higher), higher
            total += tile.exp2_().sum(1)
        # the negatives alone are summed: a tiny loss keeps its digits, and none is below zero
        negative, zero = top + total.log2(), torch.zeros_like(positive)
        loss[rows] = torch.logaddexp2(negative - positive, zero) / LOG2E
        lse[rows] = torch.logaddexp2(negative, positive)     # at least every score, however large they are

    side_by_side(fill, tiles.rows, cpu=queries.is_cpu)
    return loss, lse, inverse_q, inverse_k


def _backward_tiles(grad, queries, keys, groups, saved, temperature, normalize, need):
    "Gradients of queries and keys, empty where not needed"
    loss, lse, inverse_q, inverse_k = saved
    tiles, bounded = _Tiles(queries, keys, groups, loss.dtype), _bounded(temperature, normalize)
    # the shares are exp2(score - lse): if bounded, the lse goes to the factors of the products
    weight, own_share = grad.to(loss.dtype) / temperature, torch.expm1(-loss)
    if bounded: weight, own_share = weight * torch.exp2(-lse), own_share * torch.exp2(lse)
    grad_q = torch.empty(queries.shape if need[0] else 0, dtype=queries.dtype, device=queries.device)
    sums_k = loss.new_zeros(keys.shape if need[1] else 0)

    def part(rows, span):
        "Adds to its own sums_k; returns the share of these keys in the gradient of the queries"
        q, buffer = _scaled(queries[rows], inverse_q[rows] * (LOG2E / temperature)), tiles.buffer(keys)
        pulled = _scaled(queries[rows], inverse_q[rows] * weight[rows]) if need[1] else q
        sums_q = torch.zeros_like(q) if need[0] else None
        for cols in tiles.cols(span):
            k = _scaled(keys[cols], inverse_k[cols])
            tile = _product(q, k, buffer)
            if not bounded: tile.sub_(lse[rows, None])
            tile.exp2_()                                  # shares; becomes d loss / d score
            tiles.ignore(tile, rows, cols, 0.)
            if own := tiles.own(tile, rows, cols):
                own[0].copy_(own_share[rows][own[1]])     # its share less 1
            if need[0]: sums_q.addmm_(tile, k)
            if need[1]: sums_k[cols].addmm_(tile.T, pulled)
        return sums_q

    def finish_q(rows, parts):
        total = parts[0]
        for more in parts[1:]: total += more
        grad_q[rows] = _through_norm(total.mul_(weight[rows, None]), queries[rows], inverse_q[rows], normalize)

    def finish_k(span):
        for cols in tiles.cols(span):
            sums_k[cols] = _through_norm(sums_k[cols], keys[cols], inverse_k[cols], normalize)

    for rows in tiles.rows:
        parts = side_by_side(partial(part, rows), _pieces(keys), cpu=keys.is_cpu)
        if need[0]: finish_q(rows, parts)
        del parts
    if need[1]: side_by_side(finish_k, _pieces(keys), cpu=keys.is_cpu)
    return grad_q, sums_k.to(keys.dtype)


def _through_norm(grad: Tensor, x: Tensor, inverse: Tensor, normalize: bool) -> Tensor:
    "The gradient with respect to rows `x` from that of the rows scaled to length one"
    if not normalize: return grad
    unit = _scaled(x, inverse)
    return (grad - unit * (unit * grad).sum(1, keepdim=True)) * inverse[:, None]


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::info_nce', mutates_args=())
def _info_nce(queries: Tensor, keys: Tensor, groups: Tensor | None, temperature: float, normalize: bool,
              backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "Loss (N,), and what the backward pass needs: log-sum-exp (N,), inverse norms (N,), (N + M,)"
    with torch.autocast(queries.device.type, enabled=False):
        if backend == 'triton':
            from .info_nce_triton import forward
            return forward(queries, keys, groups, temperature, normalize)
        return _forward(queries, keys, groups, temperature, normalize)


@_info_nce.register_fake
def _(queries, keys, groups, temperature, normalize, backend):
    new = queries.new_empty(len(queries), dtype=working_dtype(queries, keys))
    return new, torch.empty_like(new), torch.empty_like(new), new.new_empty(len(keys))


@torch.library.custom_op('speechloss::info_nce_backward', mutates_args=())
def _info_nce_backward(grad: Tensor, queries: Tensor, keys: Tensor, groups: Tensor | None, saved: list[Tensor],
                       temperature: float, normalize: bool, need: list[bool],
                       backend: str) -> tuple[Tensor, Tensor]:
    "Gradients of queries and keys, empty where not needed; they have no derivative of their own"
    with torch.autocast(queries.device.type, enabled=False):
        if backend == 'triton':
            from .info_nce_triton import backward
            return backward(grad, queries, keys, groups, saved, temperature, normalize, need)
        return _backward_tiles(grad, queries, keys, groups, saved, temperature, normalize, need)


@_info_nce_backward.register_fake
def _(grad, queries, keys, groups, saved, temperature, normalize, need, backend):
    return tuple(x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip((queries, keys), need))


def _keep(ctx, inputs, output):
    queries, keys, groups, *ctx.options = inputs
    ctx.save_for_backward(queries, keys, groups, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    if grad is None: return (None,) * 6
    queries, keys, groups, *saved = ctx.saved_tensors
    temperature, normalize, backend = ctx.options
    need = list(ctx.needs_input_grad[:2])
    grads = _info_nce_backward(grad, queries, keys, groups, saved, temperature, normalize, need, backend)
    return *(g if wanted else None for g, wanted in zip(grads, need)), None, None, None, None


_info_nce.register_autograd(_backward, setup_context=_keep)


# ---------------------------------------------------------------------------------- checks

def _check(queries, keys, temperature, extra_negatives, groups) -> None:
    named = dict(queries=queries, keys=keys)
    if extra_negatives is not None: named['extra_negatives'] = extra_negatives
    for name, x in named.items():
        check_floating(name, x)
        if x.ndim != 2 or not x.shape[1] or (not len(x) and name != 'extra_negatives'):
            raise ValueError(f'{name} has shape {tuple(x.shape)}: give (rows, dims), at least one of each')
        if x.device != queries.device:
            raise ValueError(f'{name} is on {x.device} and queries on {queries.device}: move them to one device')
        if x.shape[1] != queries.shape[1]:
            raise ValueError(f'{name} has {x.shape[1]} dims and queries have {queries.shape[1]}: '
                             'the two must be equal')
    if len(keys) != len(queries):
        raise ValueError(f'there are {len(keys)} keys and {len(queries)} queries: give one key for each query; '
                         'further ones go to extra_negatives')
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f'temperature is a {type(temperature).__name__}: give a number; to learn one, scale the '
                        'queries and pass normalize=False, temperature=1.')
    if not LEAST <= temperature < math.inf:
        raise ValueError(f'temperature is {temperature}: give a number of at least {LEAST}')
    if groups is None: return
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f'groups is {got}: give integers, one per query')
    if groups.shape != (len(queries),) or groups.device != queries.device:
        raise ValueError(f'groups has shape {tuple(groups.shape)} on {groups.device}: give {len(queries)} '
                         f'integers on {queries.device}, one per query')
