"""`folded` and `method_of`: tables of the folded DFT, and which algorithm serves which window.

A magnitude does not see where the origin of time lies. With the origin at the centre of the
window, whose two halves mirror each other, cosines need only the sums of sample pairs and sines
only their differences: half the products and half the table of a plain DFT.

    pairs i <-> win - i,  origin win / 2:  e = x[i] + x[win - i],  o = x[i] - x[win - i]
    re[k] = sum of e * w[i] * cos(2 pi k (i - win / 2) / n_fft),  im[k] with o and sin

Samples 0 and win / 2 have no partner: they are e and o themselves. Every window by name is
periodic, so all of them fold; sample 0 is left out where the window is zero there.
"""
import math
import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .framing import WINDOWS
from .stft_plan import Resolution

METHODS = ('fft', 'gemm')
#: The longest window, in samples, whose DFT is a matrix product, by compute capability; the FFT
#: serves the longer ones, and all on devices that are not here. Modelled, not measured: with
#: two looks at the cells (sums, then slopes) the times cross near 350 samples on an H200.
LONGEST = {80: 320, 86: 0, 89: 0, 90: 320, 100: 320, 120: 0}
#: Rows and columns of a table are padded to a multiple of this: no tile is larger
PAD = 128


def method_of(resolution: Resolution, filtered: bool, capability: int) -> str:
    """Return 'fft' or 'gemm' for a resolution on a compute capability (90 is 9.0).

    `SPEECHLOSS_STFT=fft` or `gemm` in the environment overrides the table, and ValueError is
    raised for another value. With a filter bank it is always the FFT.
    """
    if filtered: return 'fft'
    if wanted := os.environ.get('SPEECHLOSS_STFT'):
        if wanted not in METHODS:
            raise ValueError(f'SPEECHLOSS_STFT is {wanted!r}: choose one of {", ".join(METHODS)}')
        return wanted
    return 'gemm' if resolution.win_length <= LONGEST.get(capability, 0) else 'fft'


class Folded(NamedTuple):
    "Cosine and sine times window, each (samples, bins), high and low part; times 1 / `unit`"
    cos: Tensor
    cos_low: Tensor
    sin: Tensor
    sin_low: Tensor
    size: int      # samples that count; the table has rows up to a multiple of PAD
    skip: int      # sample of the frame in row 0: 1 where the window starts with zero
    unit: float    # power of two that the products are to be multiplied with


def exact(resolution: Resolution) -> tuple[Tensor, Tensor, int]:
    "Make cosine and sine tables (samples, bins) times the window in float64; return them and the first sample"
    n, size = resolution.n_fft, resolution.win_length
    window = resolution.gain * WINDOWS[resolution.window](size, dtype=torch.float64)
    skip = int(size > 1 and bool(window[0].abs() < 1e-12 * window.abs().max()))
    sample = torch.arange(skip, size // 2 + 1)[:, None]
    twice = (2 * sample - size) * torch.arange(resolution.bins)[None, :]       # k (2i - win)
    # the remainder first: the angle is then as exact as it can be
    angle = math.pi / n * (twice % (2 * n)).double()
    half = window[sample % size]
    return half * angle.cos(), half * angle.sin(), skip


@lru_cache(maxsize=64)
def folded(
    resolution: Resolution,
    split: str,              # 'fp16x3': float16 in two parts; else float32
    device: torch.device,
) -> Folded:
    "Return the tables of a resolution, made once for a device"
    tables, unit = exact(resolution), 1.
    skip = tables[2]
    if split == 'fp16x3':
        # up to 2^8, so that the low part stays clear of float16's smallest numbers
        top = max(float(table.abs().max()) for table in tables[:2])
        unit = 2. ** (math.frexp(top)[1] - 8) if top > 0 else 1.
    parts = []
    for table in tables[:2]:
        rows, columns = (-(-size // PAD) * PAD for size in table.shape)
        padded = torch.zeros(rows, columns, dtype=torch.float64)
        padded[:table.shape[0], :table.shape[1]] = table / unit
        dtype = torch.float16 if split == 'fp16x3' else torch.float32
        high = padded.to(dtype)
        parts += [high.to(device), (padded - high.double()).to(dtype).to(device)]
    cos, cos_low, sin, sin_low = parts
    return Folded(cos, cos_low, sin, sin_low, len(tables[0]), skip, unit)
