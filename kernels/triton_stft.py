"""The Triton back end of `stft_distance`: which of its two algorithms serves each resolution."""
from contextlib import nullcontext

import torch
from torch import Tensor

from . import triton_stft_cells, triton_stft_fft, triton_stft_waves
from .triton_stft_waves import Chunk, Job, sizes_of

VARIANTS = triton_stft_cells.VARIANTS + triton_stft_waves.VARIANTS + triton_stft_fft.VARIANTS


def distance(
    enhanced: Tensor,          # (B, T) float32
    clean: Tensor,             # (B, T)
    lengths: Tensor | None,    # (B,) valid samples
    filters: list[Tensor],     # (bins, bands) of each filtered resolution
    plan,                      # stft_distance.Plan, norm 'utterance'
    need_grad: bool,
) -> tuple[Tensor, Tensor]:    # (B, resolutions, terms), (outputs, B, T) or empty
    "Terms, and the gradient of each output in `enhanced`"
    x, y = enhanced.contiguous(), clean.contiguous()
    parts = x.new_empty(len(x), len(plan.resolutions), len(plan.terms))
    waves = x.new_zeros(plan.outputs, *x.shape) if need_grad else None
    job, banks = Job(x, y, sizes_of(lengths, x), plan, parts, waves), iter(filters)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for k, resolution in enumerate(plan.resolutions):
            bank = next(banks) if plan.filtered[k] else None
            step = triton_stft_fft.utterances(job, resolution)
            for first in range(0, len(x), step):
                triton_stft_fft.run(Chunk(job, k, first, min(step, len(x) - first)), bank)
    return parts, x.new_empty(0) if waves is None else waves
