"""The Triton back end of `stft_distance`: which of its two algorithms serves each resolution.

'gemm' computes the DFT as a matrix product and keeps spectra in registers; 'fft' uses the
library's FFT and one epilogue. Short windows take the first, by the table in `stft_triton_tables`.
"""
import warnings
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from . import stft_triton_cells, stft_triton_fft, stft_triton_gemm, stft_triton_waves
from .stft_plan import Plan, Resolution
from .stft_torch import utterance_terms
from .stft_triton_tables import capability, method_of
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
    "Terms, and the gradient of each output in `enhanced`"
    x, y = enhanced.contiguous(), clean.contiguous()
    parts = x.new_empty(len(x), len(plan.resolutions), len(plan.terms))
    waves = x.new_zeros(plan.outputs, *x.shape) if need_grad else None
    job, banks = Job(x, y, sizes_of(lengths, x), plan, parts, waves), iter(filters)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for k, resolution in enumerate(plan.resolutions):
            filtered = plan.filtered[k]
            bank = next(banks) if filtered else None
            chosen = method if method and not filtered else method_of(resolution, filtered, capability(x.device))
            mode = precision(x.device) if chosen == 'gemm' else None
            _resolution(job, k, bank, mode)
    return parts, x.new_empty(0) if waves is None else waves


def _resolution(job: Job, k: int, bank: Tensor | None, mode: str | None) -> None:
    "One resolution, some utterances at a time; no mode: by the FFT"
    step = (stft_triton_gemm if mode else stft_triton_fft).utterances(job, job.plan.resolutions[k])
    for first in range(0, len(job.x), step):
        chunk = Chunk(job, k, first, min(step, len(job.x) - first))
        if mode: stft_triton_gemm.run(chunk, mode)
        else: stft_triton_fft.run(chunk, bank)


#: Relative error of the gradient above which a split is not trusted. Measured in emulation: 2e-4
#: for those that are offered, from 6e-3 for the next best.
TRUSTED = 1e-3


@lru_cache
def precision(device: torch.device) -> str | None:
    """The first split of float32 whose gradient is right on this device; None if there is none.

    A test on the device, not on a version: compilers have lost the third product before.
    """
    for mode in stft_triton_gemm.TILES:
        if (error := gradient_error(device, mode)) <= TRUSTED: return mode
        warnings.warn(f'{mode} products on {device} leave an error of {error:.1e} in the gradient: not used')
    return None


def gradient_error(device: torch.device, mode: str | None) -> float:
    "Relative error of the gradient of sc + log_l1 on white over tilted noise, against float64; no mode: by the FFT"
    resolution = Resolution(128, 32, 100)
    plan = Plan((resolution,), ('sc', 'log_l1'), (1., 1.), filtered=(False,))
    y, noise = torch.randn(2, 1, 1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.fft.irfft(torch.fft.rfft(y) / torch.arange(1, 802) ** 2, 1600)   # -12 dB an octave
    x, y = (y + 1e-3 * noise).float(), y.float()
    _, right = utterance_terms(x[0].double(), y[0].double(), resolution, None, plan, plan.mix(resolution), True)
    x, y = x.to(device), y.to(device)
    job = Job(x, y, sizes_of(None, x), plan, x.new_empty(1, 1, 2), x.new_zeros(1, *x.shape))
    _resolution(job, 0, None, mode)
    found = job.waves[0].double().cpu()
    return float((found - right).norm() / right.norm())
