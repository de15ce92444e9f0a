"""`distance`: the STFT distance in Triton, by the one of two algorithms that serves a resolution.

'gemm' computes the DFT as a matrix product and keeps spectra in registers; 'fft' uses the
library's FFT and one epilogue. Short windows take the first, by the table in `stft_triton_tables`.
"""
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from . import stft_triton_cells, stft_triton_fft, stft_triton_gemm, stft_triton_waves
from .launch import capability, on_device
from .stft_plan import Plan, Resolution
from .stft_torch import distance as torch_distance
from .stft_triton_tables import method_of
from .stft_triton_waves import Chunk, Job, sizes_of

VARIANTS = (stft_triton_cells.VARIANTS + stft_triton_waves.VARIANTS + stft_triton_fft.VARIANTS
            + stft_triton_gemm.VARIANTS)


def distance(
    enhanced: Tensor,            # (B, T) float32
    clean: Tensor,               # (B, T)
    lengths: Tensor | None,      # (B,) valid samples
    filters: list[Tensor],       # (bins, bands) of each filtered resolution
    plan: Plan,                  # with norm 'utterance'
    need_grad: bool,
    method: str | None = None,   # 'fft' or 'gemm' for all that have no filters; None: by the table
) -> tuple[Tensor, Tensor]:      # (B, resolutions, terms), (outputs, B, T) or empty
    "Compute the terms, and the gradient of each output in `enhanced`"
    x, y = enhanced.contiguous(), clean.contiguous()
    parts = x.new_empty(len(x), len(plan.resolutions), len(plan.terms))
    waves = x.new_zeros(plan.outputs, *x.shape) if need_grad else None
    job, banks = Job(x, y, sizes_of(lengths, x), plan, parts, waves), iter(filters)
    with on_device(x):
        for k, resolution in enumerate(plan.resolutions):
            filtered = plan.filtered[k]
            bank = next(banks) if filtered else None
            chosen = method if method and not filtered else method_of(resolution, filtered, capability(x.device))
            split = trusted_split(x.device) if chosen == 'gemm' else None
            _resolution(job, k, bank, split)
    return parts, x.new_empty(0) if waves is None else waves


def _resolution(job: Job, k: int, bank: Tensor | None, split: str | None) -> None:
    "Compute resolution `k`, some utterances at a time: as a product with that split, or without one by the FFT"
    step = (stft_triton_gemm if split else stft_triton_fft).utterances(job, job.plan.resolutions[k])
    for first in range(0, len(job.x), step):
        chunk = Chunk(job, k, first, min(step, len(job.x) - first))
        if split: stft_triton_gemm.run(chunk, split)
        else: stft_triton_fft.run(chunk, bank)


#: Relative error of the gradient above which a split is not trusted. Measured in emulation: 2e-4
#: for those that are offered, from 6e-3 for the next best.
TRUSTED = 1e-3


@lru_cache
def trusted_split(device: torch.device) -> str | None:
    """Return the first split of float32 whose gradient is right on this device; None if there is none.

    A test on the device, not on a version: compilers have lost the third product before.
    """
    for split in stft_triton_gemm.TILES:
        if (error := gradient_error(device, split)) <= TRUSTED: return split
        warnings.warn(f'{split} products on {device} leave an error of {error:.1e} in the gradient: not used')
    return None


def gradient_error(
    device: torch.device,
    split: str | None,     # of the products; None: by the FFT
) -> float:
    "Measure the relative error of the gradient of sc + log_l1 against float64, on white noise over tilted noise"
    resolution = Resolution(128, 32, 100)
    plan = Plan((resolution,), ('sc', 'log_l1'), (1., 1.), filtered=(False,))
    y, noise = torch.randn(2, 1, 1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.fft.irfft(torch.fft.rfft(y) / torch.arange(1, 802) ** 2, 1600)   # -12 dB an octave
    x, y = (y + 1e-3 * noise).float(), y.float()
    _, right = torch_distance(x.double(), y.double(), None, [], plan, True)
    x, y = x.to(device), y.to(device)
    waves = x.new_zeros(1, *x.shape)
    _resolution(Job(x, y, sizes_of(None, x), plan, x.new_empty(1, 1, 2), waves), 0, None, split)
    found = waves.double().cpu()
    return float((found - right).norm() / right.norm())
