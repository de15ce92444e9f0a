"""`reference`, `forward` and `backward`: the token loss in plain torch, and in tiles with its gradient."""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ('euclidean', 'squared', 'cosine')
#: Frames and codes of a tile
ROWS, COLUMNS = 256, 2048
#: The frames of a tile are a multiple of this, or the BLAS rounds a row by how many rows there are
MATES = 16
#: The token of a frame that does not count: no loss, no gradient, whatever the frame holds
LEFT_OUT = -1
#: A tile of distances, infinite at targets: its slice of the codes, the distances (rows, codes), and for
#: each frame a column of the tile (rows, 1) and whether its target lies there (rows, 1)
_Tile = tuple[slice, Tensor, tuple[Tensor, Tensor]]


def reference(
    frames: Tensor,    # (N, D)
    codes: Tensor,     # (K, D)
    targets: Tensor,   # (N,) tokens, or LEFT_OUT
    scale: float,      # logits are minus this times a distance
    metric: str,       # one of METRICS
) -> Tensor:           # (N,)
    "Compute the loss with the matrix of all distances in memory, which is large"
    return F.cross_entropy(-_distances(frames, codes, metric) * scale, targets, reduction='none',
                           ignore_index=LEFT_OUT)


def _distances(x: Tensor, c: Tensor, metric: str) -> Tensor:   # (N, K)
    "The squared distances, or their roots, or -2 x.c of unit vectors"
    product = -2 * (x @ c.T)
    if metric == 'cosine':
        return product
    square = (x.square().sum(-1, keepdim=True) + product + c.square().sum(-1)).clamp_min(0)
    return square if metric == 'squared' else torch.where(square > 0, square, 1.).sqrt() * (square > 0)


# ------------------------------------------------------------------------- with the gradient

def forward(
    frames: Tensor,    # (N, D)
    codes: Tensor,     # (K, D), less the shift
    shift: Tensor,     # (D,) to take from the frames
    norms: Tensor,     # (K,) squared norms of the codes less the shift; zeros for 'cosine'
    targets: Tensor,   # (N,) tokens, or LEFT_OUT
    scale: float,      # logits are minus this times a distance
    metric: str,       # one of METRICS
) -> tuple[Tensor, Tensor]:   # (N,), (N,)
    "Compute the loss, and `rest`: the log-sum-exp of the logits of all codes but the target"
    own = _own_distances(frames, codes, shift, targets, metric)
    rest = torch.empty_like(own)
    for rows, x, tiles in _walk(frames, codes, shift, norms, targets, metric):
        low = x.new_full((len(x), 1), torch.finfo(x.dtype).max)          # least h so far
        total = torch.zeros_like(low)                                    # sum of exp(low - h)
        for _, tile, _ in tiles:
            logit = tile.mul_(-scale)
            least = torch.minimum(low, -logit.amax(-1, keepdim=True))
            total = total * (least - low).exp() + logit.add_(least).exp_().sum(-1, keepdim=True)
            low = least
        rest[rows] = (total.log() - low)[:rows.stop - rows.start, 0]
    z = own * scale + rest
    return (z.clamp_min(0) + (-z.abs()).exp().log1p()).masked_fill(targets < 0, 0), rest


def backward(
    frames: Tensor,    # (N, D)
    codes: Tensor,     # (K, D), less the shift
    shift: Tensor,     # (D,) to take from the frames
    norms: Tensor,     # (K,) squared norms of the codes less the shift; zeros for 'cosine'
    targets: Tensor,   # (N,) tokens, or LEFT_OUT
    scale: float,      # logits are minus this times a distance
    metric: str,       # one of METRICS
    rest: Tensor,      # (N,), what `forward` returned
    grad: Tensor,      # (N,), of the loss
    need: list[bool],  # of frames, of codes
) -> tuple[Tensor, Tensor]:   # (N, D), (K, D), empty where not needed
    "Compute the gradients of frames and codes from the same tiles, made anew"
    of_frames, of_codes = need
    own = _own_distances(frames, codes, shift, targets, metric)
    euclidean = metric == 'euclidean'
    lse, at_target, grad = _shares(own, rest, targets, scale, metric, grad)
    grad_frames = torch.empty_like(frames) if of_frames else frames.new_empty(0)
    grad_codes = torch.zeros_like(codes) if of_codes else codes.new_empty(0)
    mass = torch.zeros_like(norms)                                       # (K,) sum of u over frames
    for rows, x, tiles in _walk(frames, codes, shift, norms, targets, metric):
        count = rows.stop - rows.start
        log, weight, mine = (F.pad(t[rows, None], (0, 0, 0, len(x) - count)) for t in (lse, grad, at_target))
        sums, product = x.new_zeros(len(x), 1), x.new_zeros(x.shape)
        for columns, tile, (place, here) in tiles:
            flank = _slope(tile, scale) if euclidean else scale
            u = tile.mul_(-scale).sub_(log).exp_().mul_(-weight).mul_(flank)
            u.scatter_add_(1, place, mine * here)                        # it was 0 there
            if of_frames:
                product.addmm_(u, codes[columns])
                sums += u.sum(-1, keepdim=True)
            if of_codes:
                grad_codes[columns].addmm_(u.T, x, alpha=-2)
                mass[columns] += u.sum(0)
        if of_frames:
            grad_frames[rows] = (2 * x * sums - 2 * product if euclidean else -2 * product)[:count]
    if of_codes and metric != 'cosine':
        grad_codes.addcmul_(codes, mass[:, None], value=2)
    return grad_frames, grad_codes


def _own_distances(frames: Tensor, codes: Tensor, shift: Tensor, targets: Tensor, metric: str) -> Tensor:
    "Distance (N,) of frames from their targets, by differences, so that no digits cancel; 0 for the left out"
    parts = [frames.new_empty(0)]
    for x, t in zip(frames.split(ROWS), targets.split(ROWS)):
        x, c = x - shift, codes[t.clamp_min(0)]
        parts.append(-2 * (x * c).sum(-1) if metric == 'cosine' else (x - c).square().sum(-1))
    own = torch.cat(parts).masked_fill(targets < 0, 0)
    return own.sqrt() if metric == 'euclidean' else own


def _shares(own: Tensor, rest: Tensor, targets: Tensor, scale: float, metric: str,
            grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    "Per frame: log-sum-exp of all logits, the gradient `u` at the target, and grad, 0 for the left out"
    z, grad = own * scale + rest, grad.masked_fill(targets < 0, 0)
    both = (-z.abs()).exp().log1p()  # of exp and log1p alone: torch rounds its sigmoid by where a value lies
    at_target = grad * (z.clamp_max(0) - both).exp()
    at_target = at_target * (_slope(own, scale) if metric == 'euclidean' else scale)
    return torch.maximum(rest, -own * scale) + both, at_target, grad


def _slope(distance: Tensor, scale: float) -> Tensor:
    "Derivative of `scale * distance` by the square of the distance; 0 at 0"
    return torch.where(distance > 0, .5 * scale / distance, 0.)


def _walk(frames: Tensor, codes: Tensor, shift: Tensor, norms: Tensor, targets: Tensor,
          metric: str) -> Iterator[tuple[slice, Tensor, Iterator[_Tile]]]:
    "Give, for ROWS frames at a time, their slice, the frames less the shift, and an iterator over their tiles"
    buffer = codes.new_empty(ROWS * min(COLUMNS, len(codes)))
    for k in range(0, len(frames), ROWS):
        rows = slice(k, min(k + ROWS, len(frames)))
        spare = (0, -(rows.stop - k) % MATES)
        x = (frames[rows] - shift).masked_fill(targets[rows, None] < 0, 0)
        x, target = F.pad(x, (0, 0, *spare)), F.pad(targets[rows], spare)
        yield rows, x, _tiled(x, codes, norms, target[:, None], metric, buffer)


def _tiled(x: Tensor, codes: Tensor, norms: Tensor, target: Tensor, metric: str, buffer: Tensor) -> Iterator[_Tile]:
    "Give the distances of some frames to all codes, a tile after the other, all in the memory of `buffer`"
    square = x.square().sum(-1, keepdim=True)
    for j in range(0, len(codes), COLUMNS):
        columns = slice(j, min(j + COLUMNS, len(codes)))
        width = columns.stop - j
        tile = buffer[:len(x) * width].view(len(x), width)
        torch.addmm(norms[columns], x, codes[columns].T, alpha=-2, out=tile)
        if metric != 'cosine':
            tile.add_(square).clamp_min_(0)
        place, here = (target - j).clamp(0, width - 1), (target >= j) & (target < j + width)
        tile.scatter_(1, place, torch.where(here, torch.inf, tile.gather(1, place)))
        yield columns, tile.sqrt_() if metric == 'euclidean' else tile, (place, here)
