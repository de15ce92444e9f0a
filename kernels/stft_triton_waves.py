"""`Job`, `Chunk`, `cut`, `cells`, `finish`, `overlap`: what both algorithms of the STFT distance launch.

Reflection is index arithmetic: nothing is padded. Overlap-add gathers, so that each sample is
one sum in one order: no atomics, the same bits every time.
"""
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .framing import frame_count
from .stft_plan import Plan, Resolution
from .stft_triton_cells import (PARTIALS, PLAIN, SLOPED, SLOTS, SUMMED, cells_kernel, finish_kernel,
                                frames_of, reflected, slots, stft_variant)

#: Samples of one program that adds frames, tile of one that cuts them
ADDED, CUT = 512, dict(BLOCK_F=4, BLOCK_N=256)


@triton.jit(do_not_specialize=['first'])
def frames_kernel(x_ptr, y_ptr, window_ptr, frames_ptr, lengths_ptr, first, frames, n_fft, size, start, hop,
                  odd, samples, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut windowed frames (2, b, frames, n_fft) of two waves, the window's `size` samples first.

    `start` is the place of the first of them in the wave for frame 0, negative within the
    reflected end. Frames behind the last of an utterance are zero.
    """
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + first + row)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    j = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (f < frames_of(length, hop, odd)) & (j < size)
    source = (first + row) * samples + reflected(f * hop + start + j, length - 1)
    window = tl.load(window_ptr + j, mask=j < size, other=0.)
    place = frames_ptr + (row * frames + f) * n_fft + j
    there = (f < frames) & (j < n_fft)
    tl.store(place, tl.load(x_ptr + source, mask=inside, other=0.) * window, mask=there)
    place += tl.num_programs(1).to(tl.int64) * frames * n_fft
    tl.store(place, tl.load(y_ptr + source, mask=inside, other=0.) * window, mask=there)


@triton.jit(do_not_specialize=['first', 'batch', 'total'])
def overlap_kernel(frames_ptr, window_ptr, wave_ptr, lengths_ptr, first, batch, total, count, frames, size,
                   row_size, start, pad, hop, odd, samples, skip, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Add to each sample of a wave what the frames that cover it, or its mirror images, hold of it.

    frames (outputs, batch, frames, row_size), of which the samples skip..size - 1 count and at
    most `count` cover one place; wave (outputs, total, samples). `start` as in `frames_kernel`.
    """
    row = tl.program_id(1).to(tl.int64)
    output, b = row // batch, first + row % batch
    length = tl.load(lengths_ptr + b)
    last, used = length - 1, frames_of(length, hop, odd)
    low = tl.program_id(0) * BLOCK
    t = low + tl.arange(0, BLOCK)
    wave = wave_ptr + (output * total + b) * samples + t
    inside = t < length
    found = tl.load(wave, mask=inside, other=0.)
    for image in tl.static_range(3):
        place, valid, times = t, inside, count                      # the sample itself
        if image == 1:                                              # its image before the start
            place, valid = -t, inside & (t > 0) & (t <= pad)
            times = tl.where(low <= pad, count, 0)
        if image == 2:                                              # its image after the end
            place, valid = 2 * last - t, (t < last) & (t >= last - pad)
            times = tl.where(low + BLOCK > last - pad, count, 0)
        place -= start                                              # at least 0
        latest = place // hop
        for back in range(0, times):
            f = latest - back
            j = place - f * hop
            mask = valid & (place >= 0) & (f >= 0) & (f < used) & (j >= skip) & (j < size)
            value = tl.load(frames_ptr + (row * frames + f) * row_size + j, mask=mask, other=0.)
            if WINDOW: value *= tl.load(window_ptr + j, mask=mask, other=0.)
            found += value
    tl.store(wave, found, mask=inside)


# ------------------------------------------------------------------------------- launchers

class Job(NamedTuple):
    "One call, as the back ends see it"
    x: Tensor               # (B, T) contiguous float32
    y: Tensor               # (B, T)
    lengths: Tensor         # (B,) int32
    plan: Plan
    parts: Tensor           # (B, resolutions, terms), to be written
    waves: Tensor | None    # (outputs, B, T), to be added to; None: no gradient


class Chunk(NamedTuple):
    "One resolution of some utterances of a job"
    job: Job
    k: int                  # which resolution
    first: int              # utterance
    size: int               # utterances

    @property
    def resolution(self) -> Resolution:
        "The resolution"
        return self.job.plan.resolutions[self.k]

    @property
    def frames(self) -> int:
        "Frames of the longest utterance"
        return frame_count(self.job.x.shape[1], self.resolution.hop_length, self.resolution.n_fft)

    @property
    def start(self) -> int:
        "Place in the wave of the first sample of frame 0 that the window does not make zero"
        r = self.resolution
        return (r.n_fft - r.win_length) // 2 - r.n_fft // 2

    def empty(self, *shape: int) -> Tensor:
        "Memory for results"
        return self.job.x.new_empty(shape)


def terms_of(chunk: Chunk) -> dict[str, Any]:
    "Return which terms there are and how much they count, as arguments of a kernel"
    plan = chunk.job.plan
    mix = plan.mix(chunk.resolution)
    weights = {name: mix[0][i] if plan.weights else mix[i][i] for i, name in enumerate(plan.terms)}
    short = dict(zip(SLOTS, ('w_sc', 'w_log1', 'w_log2', 'w_lin1', 'w_lin2', 'w_pow', 'w_cplx')))
    return (slots(*plan.terms) | {short[name]: float(weights.get(name, 0)) for name in SLOTS}
            | dict(MIXED=plan.weights is not None, CLAMP=plan.floor == 'clamp',
                   eps=float(plan.eps), offset=float(plan.offset), power=float(plan.power)))


def finish(chunk: Chunk, partial: Tensor, width: int) -> Tensor:
    "Write the terms of a chunk from partial sums (b, tiles, terms + 1); return the factors (b,) of convergence"
    job, r, factor = chunk.job, chunk.resolution, chunk.empty(chunk.size)
    count, columns = len(job.plan.terms), partial.shape[2]
    finish_kernel[(chunk.size,)](
        partial, job.parts, factor, job.lengths, chunk.first, width, r.hop_length, r.n_fft % 2, partial.shape[1],
        chunk.k * count, job.parts.stride(0), float(job.plan.sc_floor), TERMS=count,
        SC=slots(*job.plan.terms)['SC'], COLUMNS=columns, PADDED=triton.next_power_of_2(columns),
        BLOCK=PARTIALS, **PLAIN)
    return factor


def cells(chunk: Chunk, both: Tensor, pair: bool) -> Tensor | None:
    """Write the terms of a chunk; return their slopes (outputs, b, frames, width), or None without a gradient.

    both (2, b, frames, width): spectra (…, 2) with `pair`, else magnitudes. Convergence has its
    slope only when its sums are known, so it takes a second look at the cells.
    """
    job, r, frames, width = chunk.job, chunk.resolution, chunk.frames, both.shape[3]
    tiles = triton.cdiv(frames * width, SUMMED)
    partial = chunk.empty(chunk.size, tiles, len(job.plan.terms) + 1)
    shape = (job.plan.outputs, chunk.size, frames, width, *[2] * pair)
    slopes = None if job.waves is None else chunk.empty(*shape)
    factor = partial                                       # not looked at before it is there

    def launch(sums: bool, out: Tensor | None):
        block = SUMMED if sums else SLOPED
        cells_kernel[(triton.cdiv(frames * width, block), chunk.size)](
            both, partial, factor, partial if out is None else out, job.lengths, chunk.first, frames, width,
            r.hop_length, r.n_fft % 2, tiles, 0 if out is None else out.stride(0), PAIR=pair, SUMS=sums,
            SLOPES=out is not None, BLOCK=block, **terms_of(chunk), **PLAIN)

    twice = 'sc' in job.plan.terms and slopes is not None
    launch(True, None if twice else slopes)
    factor = finish(chunk, partial, width)
    if twice: launch(False, slopes)
    return slopes


def cut(chunk: Chunk, window: Tensor) -> Tensor:
    "Return windowed frames (2, b, frames, n_fft) of enhanced and clean"
    job, r, frames = chunk.job, chunk.resolution, chunk.frames
    found = chunk.empty(2, chunk.size, frames, r.n_fft)
    grid = triton.cdiv(frames, CUT['BLOCK_F']), chunk.size, triton.cdiv(r.n_fft, CUT['BLOCK_N'])
    frames_kernel[grid](
        job.x, job.y, window, found, job.lengths, chunk.first, frames, r.n_fft, r.win_length, chunk.start,
        r.hop_length, r.n_fft % 2, job.x.shape[1], **CUT, **PLAIN)
    return found


def overlap(chunk: Chunk, frames: Tensor, window: Tensor | None, skip: int = 0) -> None:
    "Add frames (outputs, b, frames, samples), times the window if there is one, to the waves of the job"
    job, r = chunk.job, chunk.resolution
    samples = job.x.shape[1]
    overlap_kernel[(triton.cdiv(samples, ADDED), job.plan.outputs * chunk.size)](
        frames, frames if window is None else window, job.waves, job.lengths, chunk.first, chunk.size,
        len(job.x), triton.cdiv(r.win_length, r.hop_length), chunk.frames, r.win_length, frames.shape[3],
        chunk.start, r.n_fft // 2, r.hop_length, r.n_fft % 2, samples, skip, WINDOW=window is not None,
        BLOCK=ADDED, **PLAIN)


def sizes_of(lengths: Tensor | None, x: Tensor) -> Tensor:
    "Return the lengths as the kernels read them, (B,) int32"
    if lengths is None: return torch.full((len(x),), x.shape[1], dtype=torch.int32, device=x.device)
    return lengths.to(x.device, torch.int32).contiguous()


VARIANTS = [
    stft_variant('stft frames', frames_kernel, CUT),
    stft_variant('stft overlap-add', overlap_kernel, dict(WINDOW=True, BLOCK=ADDED)),
]
