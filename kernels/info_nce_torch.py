"""`reference`, `forward` and `backward`: InfoNCE in plain torch, and with its gradient.

A small matrix of scores stays in memory, as in plain torch, and becomes its own derivative. A large one is
worked on in tiles, and twice; there scores are in units of ln 2, since exp2 is cheaper than exp.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import working_dtype
from .workers import side_by_side

#: Added to the squared norm of a row: rows shorter than about 1e-6 count as silence
EPS = 1e-12
#: The length that this is: `hypot` adds it to a norm
SILENT = torch.tensor(EPS ** .5, dtype=torch.float64, device='cpu')
#: Below this share of the own key its loss is not taken from the share, which may be rounded to zero
LEAST_SHARE = 1e-30
#: Scores times this are in units of ln 2
LOG2E = 1 / math.log(2)
#: Finite stand-in for the largest score before any column was looked at
NONE_YET = -1e30
#: Rows and columns of a tile. On a CPU it should stay in the cache and still be wide enough for
#: the matrix product to dominate.
TILES = dict(cpu=(512, 256), cuda=(4096, 4096))
#: On a CPU the rows are cut into PIECES, but into no piece of fewer than FEW rows, which would not
#: be worth a thread. The pieces, and so the result, do not depend on the number of cores.
PIECES, FEW = 4, 256
#: Most bytes of a matrix of scores that is kept: 4096 x 4096 in float32. In benchmarks/info_nce.csv that is
#: faster than tiles up to there; above, tiles are faster than plain torch too, and their memory does not grow
#: with the square.
MATRIX = 2 ** 26
#: A product has the same bits on any number of threads where its columns are multiples of BLOCK, or fewer. So
#: dims are padded to that, and what is over of the columns of scores is a product of its own
BLOCK = 16
#: Most numbers of queries and keys together whose rows of length one are kept, too
UNITS = 2 ** 17


# ------------------------------------------------------------------------------ the reference

def reference(
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D); key i belongs to query i
    groups: Tensor | None,    # (N,) integers
    temperature: float,
    normalize: bool,
) -> Tensor:                  # (N,), nats
    "Compute the loss of each query with the matrix of scores in memory"
    dtype = working_dtype(queries, keys)
    q, k = queries.to(dtype), keys.to(dtype)
    if normalize: q, k = _unit(q), _unit(k)
    scores, own = q @ k.T / temperature, torch.arange(len(q), device=q.device)     # (N, N + M)
    if groups is not None:
        mates = (groups[:, None] == groups) & (own[:, None] != own)
        scores = scores.masked_fill(F.pad(mates, (0, len(k) - len(q))), -torch.inf)
    return F.cross_entropy(scores, own, reduction='none')


def _unit(x: Tensor) -> Tensor:
    "Rows scaled to length one"
    peak = x.detach().abs().amax(-1, keepdim=True).clamp_min(1)      # no square overflows
    x = x / peak
    return x * (x.square().sum(-1, keepdim=True) + EPS / peak.square()).rsqrt()


# ------------------------------------------------------------------------- with the gradient

def fits(pairs: int, keys: int, itemsize: int) -> bool:
    "Return whether the matrix of scores is small enough to be kept until the backward pass"
    return pairs * keys * itemsize <= MATRIX


def forward(
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D); key i belongs to query i
    groups: Tensor | None,    # (N,) integers
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:   # (N,), and see below
    """Compute the loss, and what its gradient needs: three tensors, whose meaning is that of the way taken.

    That is `whole_forward` where the matrix of scores `fits`, else `_tiled_forward`.
    """
    small = fits(len(queries), len(keys), working_dtype(queries, keys).itemsize)
    return (whole_forward if small else _tiled_forward)(queries, keys, groups, temperature, normalize)


def backward(
    grad: Tensor,             # (N,), of the loss
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D)
    groups: Tensor | None,    # (N,) integers
    saved: list[Tensor],      # what `forward` returned
    temperature: float,
    normalize: bool,
    need: list[bool],         # of queries, of keys
) -> tuple[Tensor, Tensor]:   # (N, D), (N + M, D), empty where not needed
    "Compute the gradients of queries and keys"
    if saved[1].ndim == 2: return _whole_backward(grad, queries, keys, saved, temperature, normalize, need)
    return _tiled_backward(grad, queries, keys, groups, saved, temperature, normalize, need)


# ------------------------------------------------------------------- with the matrix in memory

def whole_shapes(pairs: int, keys: int, dims: int, dtype: torch.dtype,
                 normalize: bool) -> tuple[tuple[int, ...], ...]:
    "Return the shapes of what `whole_forward` keeps: the matrix, the lengths of rows, and rows of length one"
    side = _side(dtype)
    rows, columns, dims = pairs + -pairs % side, keys + -keys % side, dims + -dims % BLOCK
    both = rows + columns, dims
    return (rows, columns), (both[0], 1) if normalize else (0,), both if math.prod(both) <= UNITS else (0,)


def whole_forward(queries: Tensor, keys: Tensor, groups: Tensor | None, temperature: float,
                  normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `forward`, with the matrix of `whole_shapes`, the derivative of the loss in the scores.

    So the backward pass is two products, and no pass over the matrix. With few rows an operation costs more than
    its numbers: there are few operations, and softmax overwrites its input, which is faster than exp alone.
    """
    pairs, count = queries.shape[0], keys.shape[0]
    both = _both(queries, keys)
    side = _side(both.dtype)
    rows = pairs + -pairs % side
    if normalize:      # in float64 no square overflows
        lengths = torch.linalg.vector_norm(both, dim=1, keepdim=True, dtype=torch.float64).hypot_(SILENT)
        if both.dtype == torch.float32: lengths = lengths.float()
        both.div_(lengths)
    else: lengths = both.new_empty(0)
    q, k = both[:rows], both[rows:]
    scores = _scores(q, k, 1 / temperature)
    own = scores.diagonal()
    if count % side: scores.narrow(1, count, -count % side).fill_(-torch.inf)
    if groups is not None:
        mates = groups[:, None] == groups
        scores[:pairs, :pairs].masked_fill_(mates.fill_diagonal_(False), -torch.inf)
    bounded = _bounded(temperature, normalize)
    if not bounded: gap = scores.amax(1).sub_(own)
    torch.softmax(scores, 1, out=scores)
    if not bounded: gap.sub_(scores.amax(1).log_())
    # the shares of the negatives alone are summed: a tiny loss keeps its digits, and none is below zero
    share = own.clone()
    own.zero_()
    others = scores.sum(1)
    torch.neg(others, out=own)                   # the share of the own key less 1
    loss = others.div_(share).log1p_()
    if not bounded: loss = torch.where(share > LEAST_SHARE, loss, gap)
    if pairs != rows: loss = loss[:pairs]
    return loss, scores, lengths, both if both.numel() <= UNITS else both.new_empty(0)


def _whole_backward(grad: Tensor, queries: Tensor, keys: Tensor, saved: list[Tensor], temperature: float,
                    normalize: bool, need: list[bool]) -> tuple[Tensor, Tensor]:
    "As `backward`, from what `whole_forward` returned; small gradients may share their memory"
    _, scores, lengths, both = saved
    pairs, rows = queries.shape[0], scores.shape[0]
    if not both.numel():
        both = _both(queries, keys)
        if normalize: both.div_(lengths)
    q, k = both[:rows], both[rows:]
    weight = grad.div(temperature).unsqueeze(1)
    if pairs != rows: weight = torch.constant_pad_nd(weight, (0, 0, 0, rows - pairs))
    if need[0] and need[1] and both.numel() <= UNITS:     # in one go
        grads = torch.empty_like(both)
        grad_q, grad_k = grads[:rows], grads[rows:]
        torch.mm(scores, k, out=grad_q).mul_(weight)
        torch.mm(scores.T, q * weight, out=grad_k)
        if normalize: _through_length(grads, both, lengths)
        return _cut(grad_q, queries), _cut(grad_k, keys)
    grad_q, grad_k = (x.new_empty(0) for x in (queries, keys))
    if need[0]:
        found = torch.mm(scores, k).mul_(weight)
        if normalize: _through_length(found, q, lengths[:rows])
        grad_q = _cut(found, queries)
    if need[1]:
        found = torch.mm(scores.T, q * weight)
        if normalize: _through_length(found, k, lengths[rows:])
        grad_k = _cut(found, keys)
    return grad_q, grad_k


def _side(dtype: torch.dtype) -> int:
    "What rows of queries and of keys are padded to multiples of, for the same bits on any number of threads"
    return BLOCK if dtype == torch.float64 else 4


def _both(queries: Tensor, keys: Tensor) -> Tensor:
    "Queries and keys under one another, each with zeros up to multiples of `_side`, in a new tensor"
    (pairs, dims), count = queries.shape, keys.shape[0]
    side = _side(working_dtype(queries, keys))
    if pairs % side or count % side:
        zeros = queries.new_zeros(side, dims)
        both = torch.cat((queries, zeros[:-pairs % side], keys, zeros[:-count % side]))
    else: both = torch.cat((queries, keys))
    if dims % BLOCK: both = torch.constant_pad_nd(both, (0, -dims % BLOCK))
    return both if both.dtype in (torch.float32, torch.float64) else both.float()


def _scores(q: Tensor, k: Tensor, factor: float) -> Tensor:   # (rows, D), (columns, D) -> (rows, columns)
    "The products of all rows times a factor"
    scores, over = q.new_empty(q.shape[0], k.shape[0]), k.shape[0] % BLOCK
    if not over: return scores.addmm_(q, k.T, beta=0, alpha=factor)
    last = k.shape[0] - over
    if last: scores[:, :last].addmm_(q, k[:last].T, beta=0, alpha=factor)
    scores[:, last:].addmm_(q, k[last:].T, beta=0, alpha=factor)
    return scores


def _through_length(grad: Tensor, unit: Tensor, lengths: Tensor) -> None:
    "`_through_norm` from the rows scaled to length one; overwrites the gradient"
    grad.addcmul_(unit, (unit * grad).sum(1, keepdim=True), value=-1).div_(lengths)


def _cut(grad: Tensor, x: Tensor) -> Tensor:
    "The rows and dims of a padded gradient that belong to `x`, in its dtype"
    if grad.shape[0] != x.shape[0]: grad = grad[:x.shape[0]]
    if grad.shape[1] != x.shape[1]: grad = grad[:, :x.shape[1]].contiguous()
    return grad if grad.dtype == x.dtype else grad.to(x.dtype)


# ------------------------------------------------------------------------------------ in tiles

def _tiled_forward(
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D); key i belongs to query i
    groups: Tensor | None,    # (N,) integers
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:   # (N,), (N,), (N,), (N + M,)
    "Compute the loss, log2-sum-exp2 of the scores, and the inverse norms of queries and keys"
    dtype, bounded = working_dtype(queries, keys), _bounded(temperature, normalize)
    inverse_q, inverse_k = (_inverse_norms(x, dtype, normalize) for x in (queries, keys))
    loss, lse = torch.empty_like(inverse_q), torch.empty_like(inverse_q)
    tiles = _Tiles(queries, groups, dtype)
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


def _tiled_backward(
    grad: Tensor,             # (N,), of the loss
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D)
    groups: Tensor | None,    # (N,) integers
    saved: list[Tensor],      # what `forward` returned
    temperature: float,
    normalize: bool,
    need: list[bool],         # of queries, of keys
) -> tuple[Tensor, Tensor]:   # (N, D), (N + M, D), empty where not needed
    "Compute the gradients of queries and keys"
    loss, lse, inverse_q, inverse_k = saved
    tiles, bounded = _Tiles(queries, groups, loss.dtype), _bounded(temperature, normalize)
    # the shares are exp2(score - lse): if bounded, the lse goes to the factors of the products
    weight, own_share = grad.to(loss.dtype) / temperature, torch.expm1(-loss)
    if bounded: weight, own_share = weight * torch.exp2(-lse), own_share * torch.exp2(lse)
    grad_q = torch.empty(queries.shape if need[0] else 0, dtype=queries.dtype, device=queries.device)
    sums_k = loss.new_zeros(keys.shape if need[1] else 0)

    def part(rows, span):
        "Adds to its own sums_k; returns the share of these keys in the gradient of the queries"
        q, buffer = _scaled(queries[rows], inverse_q[rows] * (LOG2E / temperature)), tiles.buffer(keys)
        pulled = _scaled(queries[rows], inverse_q[rows] * weight[rows]) if need[1] else q
        sums_q = torch.zeros_like(q) if need[0] else q.new_empty(0)
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


class _Tiles:
    "How rows and columns are cut into tiles, and which scores of a tile are special"
    def __init__(self, queries: Tensor, groups: Tensor | None, dtype: torch.dtype):
        self.most, self.step = TILES.get(queries.device.type, TILES['cpu'])
        if queries.is_cpu: self.most = min(self.most, _share(len(queries)))
        self.dtype, self.groups, self.pairs = dtype, groups, len(queries)
        self.rows = _spans(len(queries), self.most)

    def buffer(self, keys: Tensor) -> Tensor:
        "Memory for the largest tile"
        return torch.empty(self.most * min(self.step, len(keys)), dtype=self.dtype, device=keys.device)

    def cols(self, span: slice) -> list[slice]:
        "Columns of the tiles of a span of keys"
        return _spans(span.stop, self.step, span.start)

    def own(self, tile: Tensor, rows: slice, cols: slice) -> tuple[Tensor, slice] | None:
        "A view of the scores of queries with their own keys, and the rows of those queries; None if there are none"
        first, last = max(rows.start, cols.start), min(rows.stop, cols.stop)
        if first >= last: return None
        return tile.diagonal(rows.start - cols.start), slice(first - rows.start, last - rows.start)

    def ignore(self, tile: Tensor, rows: slice, cols: slice, value: float) -> None:
        "Overwrite the scores of pairs of one group"
        if self.groups is None or cols.start >= self.pairs: return
        mates = self.groups[rows, None] == self.groups[cols]     # keys beyond the pairs have no group
        tile[:, :mates.shape[1]].masked_fill_(mates, value)


def _spans(size: int, step: int, start: int = 0) -> list[slice]:
    return [slice(k, min(k + step, size)) for k in range(start, size, step)]


def _pieces(x: Tensor) -> list[slice]:
    "Rows of `x` for the cores of a CPU: the same pieces, whatever the number of cores"
    return _spans(len(x), _share(len(x)) if x.is_cpu else len(x))


def _share(count: int) -> int:
    "Rows of a piece; two pieces at least, since torch has one thread in each and so rounds in one way"
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


def _product(q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:   # (rows, D), (cols, D) -> (rows, cols)
    return torch.mm(q, k.T, out=buffer[:len(q) * len(k)].view(len(q), len(k)))


def _through_norm(grad: Tensor, x: Tensor, inverse: Tensor, normalize: bool) -> Tensor:
    "The gradient with respect to rows `x` from that of the rows scaled to length one"
    if not normalize: return grad
    unit = _scaled(x, inverse)
    return (grad - unit * (unit * grad).sum(1, keepdim=True)) * inverse[:, None]
