"""`nearest_code`: the nearest code of every frame, how far away it is, and how often each code is nearest.

The matrix of frames x codes is never stored: the scores of a tile of frames against a tile of
codes are reduced to the best one while they lie in the cache. Which code is nearest is decided
by the score `x.c - |c|^2 / 2`, one matrix product. That score loses too many digits to give the
distance, so the distance to the winner is computed from the difference of the two vectors.
The gradient goes through that difference by plain autograd: the index has none.
Back ends: see `speechloss.kernels.backends`.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nearest_code_torch
from .backends import choose, working_dtype
from .frames_and_codes import anchor, check, counted_frames, flattened, unit

METRICS = ('squared', 'euclidean', 'cosine')


class Nearest(NamedTuple):
    "What `nearest_code` returns, for frames of shape (..., D) and K codes"
    # the name hides `tuple.index`, which is of no use here
    index: Tensor     # type: ignore[assignment]  # (...,) int64, the nearest code; -1 for a padded frame
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
    """Find the nearest code of each frame; among equally near ones, that with the lowest index.

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
    valid = counted_frames(frames, lengths, mask)
    x, c = flattened(frames, valid, codes), codes.to(working_dtype(codes, frames))
    chosen = choose(backend, x, c)
    if metric == 'cosine':
        x, c = unit(x), unit(c)
    if chosen == 'reference':
        index = nearest_code_torch.reference(x, c, metric)
    else:
        index = _nearest_index(x.detach(), c.detach(), metric != 'cosine', chosen)
    sound = (c.detach() * 0).sum()  # 0, or NaN
    index = torch.where(sound.isfinite() & x.detach().isfinite().all(-1), index, 0)
    distance = _distance(x, c, index, metric) + sound
    counts = torch.ones_like(index) if valid is None else valid.flatten().to(index.dtype)
    usage = torch.zeros(len(codes), dtype=torch.int64, device=index.device).scatter_add(0, index, counts)
    index, distance = index.view(frames.shape[:-1]), distance.view(frames.shape[:-1])
    if valid is not None:
        index, distance = index.masked_fill(~valid, -1), distance.masked_fill(~valid, 0)
    return Nearest(index, distance, usage)


def _distance(x: Tensor, c: Tensor, index: Tensor, metric: str) -> Tensor:
    "Distance (N,) of each frame from the code of its index, by differences, so that no digits cancel"
    chosen = F.embedding(index, c)                   # (N, D); its backward adds in a fixed order
    square = (x - chosen).square().sum(-1)
    if metric == 'squared':
        return square
    if metric == 'euclidean':                        # a bare root has a NaN for a gradient at 0
        return torch.where(square != 0, square, 1.).sqrt() * (square != 0)
    zero = ~(x.detach().any(-1) & chosen.detach().any(-1))
    return torch.where(zero, 1., square / 2)         # of unit vectors: |a - b|^2 / 2 = 1 - a.b


# ------------------------------------------------------------------------------- the operator

@torch.library.custom_op('speechloss::nearest_index', mutates_args=())
def _nearest_index(frames: Tensor, codes: Tensor, euclidean: bool, backend: str) -> Tensor:
    "Index (N,) of the highest `x.c`, less `|c|^2 / 2` if Euclidean; 0 where none is finite"
    with torch.autocast(frames.device.type, enabled=False):
        shift = anchor(codes) if euclidean else torch.zeros_like(codes[0])
        codes = (codes - shift).contiguous()
        half = codes.square().sum(-1) / 2 if euclidean else torch.zeros_like(codes[:, 0])
        if backend == 'triton':
            from . import nearest_code_triton   # here, since it needs triton
            return nearest_code_triton.search(frames.contiguous(), codes, half, shift)
        return nearest_code_torch.search(frames, codes, half, shift)


@_nearest_index.register_fake
def _(frames, codes, euclidean, backend):
    return frames.new_empty(len(frames), dtype=torch.int64)
