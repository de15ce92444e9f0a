"""The Triton back end of `stft_distance`: which of its two algorithms serves each resolution.

'gemm' computes the DFT as a matrix product and keeps spectra in registers; 'fft' uses the
library's FFT and one epilogue. Short windows take the first, by the table in `stft_tables`.
"""
from contextlib import nullcontext

import torch
from torch import Tensor

from . import triton_stft_cells, triton_stft_fft, triton_stft_gemm, triton_stft_waves
from .stft_tables import method_of
from .triton_stft_waves import Chunk, Job, sizes_of

VARIANTS = (triton_stft_cells.VARIANTS + triton_stft_waves.VARIANTS + triton_stft_fft.VARIANTS
            + triton_stft_gemm.VARIANTS)


def distance(
    enhanced: Tensor,            # (B, T) float32
    clean: Tensor,               # (B, T)
    lengths: Tensor | None,      # (B,) valid samples
    filters: list[Tensor],       # (bins, bands) of each filtered resolution
    plan,                        # stft_distance.Plan, norm 'utterance'
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
            step = (triton_stft_gemm if chosen == 'gemm' else triton_stft_fft).utterances(job, resolution)
            for first in range(0, len(x), step):
                chunk = Chunk(job, k, first, min(step, len(x) - first))
                if chosen == 'gemm': triton_stft_gemm.run(chunk)
                else: triton_stft_fft.run(chunk, bank)
    return parts, x.new_empty(0) if waves is None else waves


def capability(device: torch.device) -> int:
    "Compute capability, 90 for 9.0; 0 off CUDA"
    if device.type != 'cuda' or torch.version.cuda is None: return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
