"""`run`: one resolution of the STFT distance by the FFT of torch, with the rest in Triton.

Cut frames, rfft, terms and slopes of the cells, irfft, overlap-add.

A few utterances at a time, so that what is in memory at once is bounded. Behind a filter bank
neither magnitudes nor their slopes are stored for the bins, only for the bands.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .framing import frame_count, kept_window
from .launch import Tile, float32_product
from .stft_plan import Resolution
from .stft_triton_cells import FUSION, floored, load_pair, stft_variant, store_pair
from .stft_triton_waves import Chunk, Job, cells, cut, overlap

#: Bytes of scratch in one chunk of utterances
BUDGET = 512 << 20
#: Of the product with a filter bank
BANK_TILE = Tile(64, 64, 32, warps=8, stages=2)
_BLOCKS = 'BLOCK_F', 'BLOCK_N', 'BLOCK_K'


@triton.jit
def bank_kernel(spectrum_ptr, bank_ptr, mag_ptr, rows, bins, bands, eps, CLAMP: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    "Magnitudes behind a filter bank: |spectrum| (rows, bins) @ bank (bins, bands) to (rows, bands)"
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mag = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    for start in range(0, bins, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        re, im = load_pair(spectrum_ptr + 2 * (f * bins + k[None, :]), (f < rows) & (k < bins)[None, :])
        bank = tl.load(bank_ptr + k[:, None] * bands + n, mask=(k < bins)[:, None] & (n < bands), other=0.)
        mag = tl.dot(tl.sqrt(floored(re, im, eps, CLAMP)), bank, mag, input_precision=PRECISION)
    tl.store(mag_ptr + f * bands + n, mag, mask=(f < rows) & (n < bands))


@triton.jit
def unbank_kernel(slope_ptr, bank_ptr, spectrum_ptr, out_ptr, rows, per_output, bins, bands, odd, eps,
                  CLAMP: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """The adjoint: slopes (rows, bands) of magnitudes to gradients (rows, bins) in the spectrum.

    The rows of the spectrum repeat every `per_output`: outputs share it.
    """
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    slope = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    for start in range(0, bands, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        part = tl.load(slope_ptr + f * bands + k[None, :], mask=(f < rows) & (k < bands)[None, :], other=0.)
        bank = tl.load(bank_ptr + n * bands + k[:, None], mask=(k < bands)[:, None] & (n < bins), other=0.)
        slope = tl.dot(part, bank, slope, input_precision=PRECISION)
    mask = (f < rows) & (n < bins)
    re, im = load_pair(spectrum_ptr + 2 * ((f % per_output) * bins + n), mask)
    power = floored(re, im, eps, CLAMP)
    if CLAMP: slope = tl.where(power > eps, slope, 0.)
    slope = slope / tl.sqrt(power) * tl.where((n == 0) | ((n == bins - 1) & (odd == 0)), 1., .5)
    store_pair(out_ptr + 2 * (f * bins + n), re * slope, im * slope, mask)


def utterances(job: Job, resolution: Resolution) -> int:
    "Return how many utterances go into one chunk"
    n, bins, outputs = resolution.n_fft, resolution.bins, job.plan.outputs
    frame = 8 * n + 16 * bins                       # both frames, both spectra
    # gradient, the copy that the library's inverse makes of it, frames again
    if job.waves is not None: frame += outputs * (16 * bins + 4 * n)
    return max(1, BUDGET // (frame * frame_count(job.x.shape[1], resolution.hop_length, resolution.n_fft)))


def run(chunk: Chunk, bank: Tensor | None) -> None:
    "Write the terms of a chunk, and add its gradients to the waves"
    job, r = chunk.job, chunk.resolution
    window = kept_window(r.window, r.win_length, r.gain, torch.float32, job.x.device)
    spectra = torch.view_as_real(torch.fft.rfft(cut(chunk, window)).contiguous())   # (2, b, frames, bins, 2)
    if bank is None:
        slopes = cells(chunk, spectra, pair=True)
    else:
        bank = bank.to(torch.float32).contiguous()
        slopes = cells(chunk, _project(chunk, spectra, bank), pair=False)
        if slopes is not None: slopes = _unproject(chunk, slopes, bank, spectra[0])
    if slopes is None: return
    frames = torch.fft.irfft(torch.view_as_complex(slopes), r.n_fft, norm='forward')
    overlap(chunk, frames.contiguous(), window)


def _project(chunk: Chunk, spectra: Tensor, bank: Tensor) -> Tensor:   # (2, b, frames, bands)
    "Magnitudes behind the bank"
    plan, (bins, bands) = chunk.job.plan, bank.shape
    mags = chunk.empty(*spectra.shape[:3], bands)
    rows = mags.numel() // bands
    bank_kernel[(triton.cdiv(rows, BANK_TILE.rows), triton.cdiv(bands, BANK_TILE.columns))](
        spectra, bank, mags, rows, bins, bands, plan.eps, CLAMP=plan.floor == 'clamp',
        PRECISION=float32_product(bank.device), **BANK_TILE.blocks(*_BLOCKS), **BANK_TILE.options, **FUSION)
    return mags


def _unproject(chunk: Chunk, slopes: Tensor, bank: Tensor, spectrum: Tensor) -> Tensor:
    "Slopes (outputs, b, frames, bands) to gradients (outputs, b, frames, bins, 2) in the spectrum"
    plan, (bins, bands) = chunk.job.plan, bank.shape
    found = chunk.empty(*slopes.shape[:3], bins, 2)
    rows = slopes.numel() // bands
    unbank_kernel[(triton.cdiv(rows, BANK_TILE.rows), triton.cdiv(bins, BANK_TILE.columns))](
        slopes, bank, spectrum, found, rows, rows // len(slopes), bins, bands, chunk.resolution.n_fft % 2,
        plan.eps, CLAMP=plan.floor == 'clamp', PRECISION=float32_product(bank.device),
        **BANK_TILE.blocks(*_BLOCKS), **BANK_TILE.options, **FUSION)
    return found


_bank = dict(CLAMP=False, PRECISION='tf32x3', **BANK_TILE.blocks(*_BLOCKS))
VARIANTS = [
    stft_variant('stft filter bank', bank_kernel, _bank, **BANK_TILE.options),
    stft_variant('stft filter bank, adjoint', unbank_kernel, _bank, **BANK_TILE.options),
]
