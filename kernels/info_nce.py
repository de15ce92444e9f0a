"""InfoNCE over rows: which key belongs to a query, among all the others; in one call.

The N x N similarities are never there: a tile of them at a time, with a running log-sum-exp.
The backward pass computes the tiles again, from four numbers kept for each row. Back ends:
see `speechloss.kernels.backends`.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose

#: Added to the squared norm of a row: rows shorter than about 1e-6 count as silence
EPS = 1e-12
#: Rows and columns of a tile of the torch back end. On a CPU it should stay in the cache and
#: still be wide enough for the matrix product to dominate.
TILES = dict(cpu=(1024, 512), cuda=(4096, 4096))
#: Scores are kept in units of ln 2, since exp2 is cheaper than exp
LOG2E = 1 / math.log(2)
#: Finite stand-in for the largest score of no column at all
NONE_YET = -1e30


def info_nce(
    queries: Tensor,                          # (N, D), floating point
    keys: Tensor,                             # (N, D); key i belongs to query i
    *,
    temperature: float = 0.1,                 # > 0; scores are divided by it
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
    stays float64. A second derivative needs `backend='reference'`. The temperature is a number:
    to learn one, scale the queries and pass `normalize=False, temperature=1.`. Raises
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
    dtype = _working(queries, keys)
    q, k = queries.to(dtype), keys.to(dtype)
    if normalize:
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt() for x in (q, k))
    scores, own = q @ k.T / temperature, torch.arange(len(q), device=q.device)     # (N, N + M)
    if groups is not None:
        mates = (groups[:, None] == groups) & (own[:, None] != own)
        scores = scores.masked_fill(F.pad(mates, (0, len(k) - len(q))), -torch.inf)
    return F.cross_entropy(scores, own, reduction='none')


# ------------------------------------------------------------------------- the torch back end

def _working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _spans(size: int, step: int) -> list[slice]:
    return [slice(k, min(k + step, size)) for k in range(0, size, step)]


def _inverse_norms(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:   # (N,)
    if not normalize: return torch.ones(len(x), dtype=dtype, device=x.device)
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype).square_().add_(EPS).rsqrt_()


def _scaled(x: Tensor, factor: Tensor) -> Tensor:   # (rows, D), (rows,)
    return x.to(factor.dtype) * factor[:, None]


class _Tiles:
    "The scores of a call, a tile at a time, in one buffer; `own` views a tile's diagonal"
    def __init__(self, queries: Tensor, keys: Tensor, groups: Tensor | None, dtype: torch.dtype):
        rows, cols = TILES.get(queries.device.type, TILES['cpu'])
        self.rows, self.cols = _spans(len(queries), rows), _spans(len(keys), cols)
        self.buffer = torch.empty(min(rows, len(queries)) * min(cols, len(keys)), dtype=dtype, device=queries.device)
        self.groups, self.pairs = groups, len(queries)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:   # (rows, D), (cols, D) -> (rows, cols)
        return torch.mm(q, k.T, out=self.buffer[:len(q) * len(k)].view(len(q), len(k)))

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


def _forward(queries, keys, groups, temperature, normalize):
    "Loss, log2-sum-exp2 of the scores and the inverse norms of queries and keys, each a number a row"
    dtype = _working(queries, keys)
    inverse_q, inverse_k = (_inverse_norms(x, dtype, normalize) for x in (queries, keys))
    loss, lse = torch.empty_like(inverse_q), torch.empty_like(inverse_q)
    tiles = _Tiles(queries, keys, groups, dtype)
    for rows in tiles.rows:
        q = _scaled(queries[rows], inverse_q[rows] * (LOG2E / temperature))
        top, total, positive = q.new_full((len(q),), NONE_YET), q.new_zeros(len(q)), q.new_empty(len(q))
        for cols in tiles.cols:
            tile = tiles.scores(q, _scaled(keys[cols], inverse_k[cols]))
            if own := tiles.own(tile, rows, cols):
                positive[own[1]] = own[0]
                own[0].fill_(-torch.inf)
            tiles.ignore(tile, rows, cols, -torch.inf)
            higher = torch.maximum(top, tile.amax(1))
            total = total * torch.exp2(top - higher) + tile.sub_(higher[:, None]).exp2_().sum(1)
            top = higher
        # the negatives alone are summed: a tiny loss keeps its digits, and none is below zero
        negative, zero = top + total.log2(), torch.zeros_like(positive)
        loss[rows] = torch.logaddexp2(negative - positive, zero) / LOG2E
        lse[rows] = torch.logaddexp2(negative, positive)     # at least every score, however large they are
    return loss, lse, inverse_q, inverse_k


def _backward_tiles(grad, queries, keys, groups, saved, temperature, normalize, need):
    "Gradients of queries and keys, empty where not needed"
    loss, lse, inverse_q, inverse_k = saved
    tiles, grad = _Tiles(queries, keys, groups, loss.dtype), grad.to(loss.dtype) / temperature
    grad_q = torch.empty(queries.shape if need[0] else 0, dtype=queries.dtype, device=queries.device)
    sums_k = loss.new_zeros(keys.shape if need[1] else 0)
    for rows in tiles.rows:
        q = _scaled(queries[rows], inverse_q[rows] * (LOG2E / temperature))
        pulled = _scaled(queries[rows], inverse_q[rows] * grad[rows]) if need[1] else q
        sums_q = torch.zeros_like(q)
        for cols in tiles.cols:
            k = _scaled(keys[cols], inverse_k[cols])
            tile = tiles.scores(q, k).sub_(lse[rows, None]).exp2_()      # shares; becomes d loss / d score
            tiles.ignore(tile, rows, cols, 0.)
            if own := tiles.own(tile, rows, cols):
                own[0].copy_(torch.expm1(-loss[rows][own[1]]))           # its share less 1
            if need[0]: sums_q.addmm_(tile, k)
            if need[1]: sums_k[cols].addmm_(tile.T, pulled)
        if need[0]:
            sums_q *= grad[rows, None]
            grad_q[rows] = _through_norm(sums_q, queries[rows], inverse_q[rows], normalize)
    if need[1]:
        for cols in tiles.cols:
            sums_k[cols] = _through_norm(sums_k[cols], keys[cols], inverse_k[cols], normalize)
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
            from .triton_info_nce import forward
            return forward(queries, keys, groups, temperature, normalize)
        return _forward(queries, keys, groups, temperature, normalize)


@_info_nce.register_fake
def _(queries, keys, groups, temperature, normalize, backend):
    new = queries.new_empty(len(queries), dtype=_working(queries, keys))
    return new, torch.empty_like(new), torch.empty_like(new), new.new_empty(len(keys))


@torch.library.custom_op('speechloss::info_nce_backward', mutates_args=())
def _info_nce_backward(grad: Tensor, queries: Tensor, keys: Tensor, groups: Tensor | None, saved: list[Tensor],
                       temperature: float, normalize: bool, need: list[bool],
                       backend: str) -> tuple[Tensor, Tensor]:
    "Gradients of queries and keys, empty where not needed; they have no derivative of their own"
    with torch.autocast(queries.device.type, enabled=False):
        if backend == 'triton':
            from .triton_info_nce import backward
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
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f'{name} is {got}: give a real floating point tensor')
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
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f'temperature is a {type(temperature).__name__}: give a number; to learn one, scale the '
                        'queries and pass normalize=False, temperature=1.')
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature is {temperature}: give a number above 0')
    if groups is None: return
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f'groups is {got}: give integers, one per query')
    if groups.shape != (len(queries),) or groups.device != queries.device:
        raise ValueError(f'groups has shape {tuple(groups.shape)} on {groups.device}: give {len(queries)} '
                         f'integers on {queries.device}, one per query')
