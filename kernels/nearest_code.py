"""Nearest code of every frame, how far away it is, and how often each code was it.

The matrix of frames x codes is never stored: the scores of a tile of frames against a tile of
codes are reduced to the best one while they lie in the cache. Which code is nearest is settled
by the expanded score `x.c - |c|^2 / 2`, one matrix product; it cancels too badly to measure a
distance by, so the distance to the winner is computed from the difference of the two vectors.
That is also where the gradient runs, through plain autograd: the index has none.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose, working_dtype
from .workers import PIECES, side_by_side

METRICS = ('squared', 'euclidean', 'cosine')
#: Frames and codes of a tile: its scores, 2 MB in float32, stay in the cache
ROWS, COLUMNS = 256, 2048
#: Codes whose best score is found first: a maximum is fast where an arg-max is not
GROUP = 64
#: A tile has a multiple of so many frames, or the BLAS rounds a row by how many mates it has
MATES = 16


class Nearest(NamedTuple):
    "What `nearest_code` returns, for frames of shape (..., D) and K codes"
    index: Tensor     # (...,) int64, the nearest code; -1 for a padded frame
    distance: Tensor  # (...,) >= 0, by the metric; 0 for a padded frame
    usage: Tensor     # (K,) int64, how many frames each code is nearest to


def nearest_code(
    frames: Tensor,                 # (N, D) or (B, F, D), any float dtype
    codes: Tensor,                  # (K, D)
    *,
    metric: str = 'squared',        # Euclidean; or 'euclidean', its root, or 'cosine'
    lengths: Tensor | None = None,  # (B,) frames that count, of (B, F, D)
    mask: Tensor | None = None,     # frames.shape[:-1], bool: True counts
    backend: str = 'auto',          # 'auto', 'torch', 'triton' or 'reference'
) -> Nearest:
    """The nearest code of each frame; of equally near ones that with the lowest index.

    'squared' is the squared Euclidean distance, 'euclidean' its root, whose gradient on the code
    itself is 0, and 'cosine' 1 - cosine in [0, 2], where a frame or a code of zeros is at 1 from
    everything and gets no gradient. Computed in float32 (float64 if an
    input is), inside autocast too. Differentiable in frames and codes, twice if need be.
    A frame that is not finite has index 0, and its distance is NaN or infinite; a code that is
    not finite spoils all distances. Raises ValueError or TypeError where shapes, dtypes,
    devices or options do not fit.

    >>> nearest_code(torch.tensor([[0., 1.], [3., 3.]]), torch.tensor([[3., 4.], [0., 0.]]))
    Nearest(index=tensor([1, 0]), distance=tensor([1., 1.]), usage=tensor([1, 1]))
    """
    if metric not in METRICS:
        raise ValueError(f'metric is {metric!r}: choose one of {", ".join(METRICS)}')
    check(frames, codes)
    valid = counted(frames, lengths, mask)
    x, c = flat(frames, valid, codes), working(codes, frames)
    serve = choose(backend, x, c)
    if metric == 'cosine':
        x, c = unit(x), unit(c)
    if serve == 'reference':
        index = matrix(x, c, metric).argmin(-1)
    else:
        index = nearest_index(x.detach(), c.detach(), metric != 'cosine', serve == 'triton')
    sound = (c.detach() * 0).sum()  # 0, or NaN
    index = torch.where(sound.isfinite() & x.detach().isfinite().all(-1), index, 0)
    distance = away(x, c, index, metric) + sound
    counts = torch.ones_like(index) if valid is None else valid.flatten().to(index.dtype)
    usage = torch.zeros(len(codes), dtype=torch.int64, device=index.device).scatter_add(0, index, counts)
    index, distance = index.view(frames.shape[:-1]), distance.view(frames.shape[:-1])
    if valid is not None:
        index, distance = index.masked_fill(~valid, -1), distance.masked_fill(~valid, 0)
    return Nearest(index, distance, usage)


def matrix(x: Tensor, c: Tensor, metric: str) -> Tensor:
    "Every distance, (N, K): what nobody should store, and the oracle of the tests"
    product = x @ c.T
    if metric == 'cosine':  # of unit vectors
        return 1 - product
    return (x.square().sum(-1, keepdim=True) - 2 * product + c.square().sum(-1)).clamp_min(0)   # of either


def away(x: Tensor, c: Tensor, index: Tensor, metric: str) -> Tensor:
    "Distance (N,) of each frame from the code of its index, with nothing that cancels"
    chosen = F.embedding(index, c)                   # (N, D); its backward adds in a fixed order
    square = (x - chosen).square().sum(-1)
    if metric == 'squared':
        return square
    if metric == 'euclidean':                        # a bare root has a NaN for a gradient at 0
        return torch.where(square != 0, square, 1.).sqrt() * (square != 0)
    zero = ~(x.detach().any(-1) & chosen.detach().any(-1))
    return torch.where(zero, 1., square / 2)         # of unit vectors: |a - b|^2 / 2 = 1 - a.b


def unit(x: Tensor) -> Tensor:
    "Vectors of length 1, whatever their scale; zeros stay zeros, without a gradient"
    peak = x.detach().abs().amax(-1, keepdim=True)
    zero = peak == 0
    y = x / peak.masked_fill(zero, 1)                # no square under- or overflows
    return (y / (y.square().sum(-1, keepdim=True) + zero).sqrt()).masked_fill(zero, 0)


# ---- the search

@torch.library.custom_op('speechloss::nearest_index', mutates_args=())
def nearest_index(frames: Tensor, codes: Tensor, euclidean: bool, triton: bool) -> Tensor:
    "Index (N,) of the highest `x.c`, less `|c|^2 / 2` if Euclidean; 0 where none is finite"
    with torch.autocast(frames.device.type, enabled=False):
        shift = anchor(codes) if euclidean else torch.zeros_like(codes[0])
        codes = (codes - shift).contiguous()
        half = codes.square().sum(-1) / 2 if euclidean else torch.zeros_like(codes[:, 0])
        if triton:
            from .nearest_code_triton import search as fast
            return fast(frames.contiguous(), codes, half, shift)
        index, first = search(frames, codes, half, shift), first_copies(codes)
        return index if first is None else first[index]


@nearest_index.register_fake
def _(frames, codes, euclidean, triton):
    return frames.new_empty(len(frames), dtype=torch.int64)


def search(frames: Tensor, codes: Tensor, half: Tensor, shift: Tensor) -> Tensor:
    "The same in tiles of ROWS frames x COLUMNS codes, some frames on each core"
    spare = -len(codes) % GROUP
    codes, half = F.pad(codes, (0, 0, 0, spare)), F.pad(half, (0, spare), value=torch.inf)
    pieces = frames.split(-(-len(frames) // (ROWS * PIECES)) * ROWS or 1)
    return torch.cat(side_by_side(lambda x: search_rows(x, codes, half, shift), pieces, cpu=frames.is_cpu))


def search_rows(frames: Tensor, codes: Tensor, half: Tensor, shift: Tensor) -> Tensor:
    "The same for frames of one core"
    index = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
    scores = codes.new_empty(ROWS * min(COLUMNS, len(codes)))
    for k in range(0, len(frames), ROWS):
        x = frames[k:k + ROWS] - shift
        rows = len(x)
        x = F.pad(x, (0, 0, 0, -rows % MATES))
        best, found = x.new_full((len(x),), -torch.inf), index.new_zeros(len(x))
        for j in range(0, len(codes), COLUMNS):
            c = codes[j:j + COLUMNS]
            tile = scores[:len(x) * len(c)].view(len(x), len(c))
            torch.addmm(half[j:j + COLUMNS], x, c.T, beta=-1, out=tile)
            high, at = first_highest(tile)
            better = high > best                     # not >=: a tie stays with the lower index
            best, found = torch.where(better, high, best), torch.where(better, at + j, found)
        index[k:k + ROWS] = found[:rows]
    return index


def first_highest(tile: Tensor) -> tuple[Tensor, Tensor]:
    "Highest value of each row and where it first stands: the first such group, then in the group"
    groups = tile.view(len(tile), -1, GROUP)
    high, group = groups.amax(-1).max(-1)
    members = groups.gather(1, group[:, None, None].expand(-1, 1, GROUP)).squeeze(1)
    return high, members.argmax(-1) + group * GROUP


def anchor(codes: Tensor) -> Tensor:
    """A point (D,) amid the codes to measure from, so that an offset they share does not cancel.

    Rounded to about their spread: 0 for codes around 0, and whole numbers stay whole.
    """
    middle = codes.mean(0)
    coarse = 1.5 * (codes - middle).abs().amax() / torch.finfo(codes.dtype).eps
    return (middle + coarse) - coarse


def first_copies(codes: Tensor) -> Tensor | None:
    """Where each code (K, D) first stands, (K,); None if no two are equal.

    Equal codes may score differently by one rounding, by where they lie in the tile: that is
    how the BLAS of a CPU is for float64. On a GPU they do not.
    """
    if not codes.is_cpu: return None
    # a number for each code, which two different ones hardly share: comparing all of them whole would cost more than
    # the search itself
    weights = torch.arange(1, codes.shape[1] + 1, dtype=torch.float64).sqrt()
    _, group, count = (codes.double() * weights).sum(-1).unique(return_inverse=True, return_counts=True)
    alike = (count[group] > 1).nonzero()[:, 0]
    if not len(alike): return None
    copies = torch.unique(codes[alike], dim=0, return_inverse=True)[1]
    first = torch.full_like(alike, len(codes)).scatter_reduce(0, copies, alike, 'amin')[copies]
    return torch.arange(len(codes)).index_copy(0, alike, first)


# ---- arguments

def check(frames: Tensor, codes: Tensor) -> None:
    "Raise where frames and codes do not go together"
    for name, value in dict(frames=frames, codes=codes).items():
        if not isinstance(value, Tensor):
            raise TypeError(f'{name} is {type(value).__name__}: give a tensor')
        if not value.is_floating_point():
            raise TypeError(f'{name} is {value.dtype}: give a floating-point tensor')
    if frames.ndim not in (2, 3):
        raise ValueError(f'frames has shape {tuple(frames.shape)}: give (N, D) or (B, F, D)')
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f'codes has shape {tuple(codes.shape)}: give (K, D) with at least one code')
    if frames.shape[-1] != codes.shape[-1]:
        raise ValueError(f'frames has shape {tuple(frames.shape)} and codes {tuple(codes.shape)}: '
                         'their last dimensions must be equal')
    if frames.device != codes.device:
        raise ValueError(f'frames is on {frames.device} and codes on {codes.device}: move one of them')


def counted(frames: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    "Which frames count, bool of shape frames.shape[:-1]; None if all do"
    valid = None
    if lengths is not None:
        if frames.ndim != 3 or not isinstance(lengths, Tensor) or lengths.shape != frames.shape[:1]:
            raise ValueError(f'lengths is {described(lengths)} for frames of shape {tuple(frames.shape)}: '
                             'give (B,) frame counts for frames of shape (B, F, D)')
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f'lengths is {lengths.dtype}: give integers, counts of frames')
        if lengths.is_cpu and not torch.compiler.is_compiling() and len(lengths):
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > frames.shape[1]:
                raise ValueError(f'lengths runs from {low} to {high}: '
                                 f'there are {frames.shape[1]} frames, so give 0 to {frames.shape[1]}')
        valid = torch.arange(frames.shape[1], device=frames.device) < lengths.to(frames.device)[:, None]
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != frames.shape[:-1] or mask.dtype != torch.bool:
            raise ValueError(f'mask is {described(mask)}: give booleans of shape {tuple(frames.shape[:-1])}, '
                             'True where a frame counts')
        mask = mask.to(frames.device)
        valid = mask if valid is None else valid & mask
    return valid


def described(value) -> str:
    "A wrong argument in a few words"
    return f'{value.dtype} of shape {tuple(value.shape)}' if isinstance(value, Tensor) else type(value).__name__


def working(x: Tensor, *mates: Tensor) -> Tensor:
    "x in float32, or in float64 if it or a mate is"
    return x.to(working_dtype(x, *mates))


def flat(frames: Tensor, valid: Tensor | None, *mates: Tensor) -> Tensor:
    "Frames as (N, D) in the working precision; those that do not count are zeros"
    x = working(frames, *mates)
    if valid is not None:
        x = x.masked_fill(~valid[..., None], 0)
    return x.reshape(-1, x.shape[-1])
