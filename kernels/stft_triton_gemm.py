"""`run`: one resolution of the STFT distance with the DFT as a matrix product, in Triton.

Frames and spectra stay in registers.

One program holds a tile of frames and bins of both signals: it loads samples straight from the
waves, folds them about the centre of the window (`stft_triton_tables`), splits them into two float16
parts behind a power of two of their own for each frame, and multiplies them with the tables;
three products of float16 with one float32 sum are as accurate as float32. The gradient goes
back through the same tables, split the same way.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .framing import frame_count
from .launch import Tile
from .resources import Variant
from .stft_plan import Resolution
from .stft_triton_cells import (FUSION, PLAIN, SLOTS, floored, frames_of, load_pair, reflected, slots,
                                stft_variant, store_slopes, store_sums)
from .stft_triton_tables import Folded, folded
from .stft_triton_waves import Chunk, Job, finish, overlap, terms_of

#: Bytes of scratch in one chunk of utterances
BUDGET = 512 << 20
class Tiles(NamedTuple):
    "Tiles of the product with the epilogue (frames, bins, samples) and of its adjoint (frames, samples, bins)"
    product: Tile
    adjoint: Tile


#: By split: how float32 is put together from shorter numbers. A tile of 64 bins would halve the
#: folding, and spills on compute capability 8.0.
TILES = {
    'fp16x3': Tiles(Tile(64, 32, 16, warps=8, stages=2), Tile(64, 128, 16, warps=8, stages=2)),
    'tf32x3': Tiles(Tile(64, 32, 16, warps=8, stages=1), Tile(64, 64, 16, warps=8, stages=2)),
}
_BLOCKS = 'BLOCK_F', 'BLOCK_N', 'BLOCK_K'
#: Terms of which one launch may have sums and slopes, and several outputs, without spills
LIGHT, MOST = {'sc', 'log_l1', 'log_l2', 'lin_l1', 'lin_l2'}, 3
#: Tile of the program that looks for the powers of two
LOOK = dict(BLOCK_F=32, BLOCK_N=64)


@triton.jit
def power_of_two(exponent):
    "2 ** (exponent - 127), exactly"
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(largest):
    "The exponent of the largest number of a row, biased; not so small that its inverse is lost"
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 13)


@triton.jit
def split_dot(total, values, high, low, PRECISION: tl.constexpr):
    "total + values @ (high + low) to float32 accuracy; the small products come first"
    if PRECISION == 'fp16x3':
        top = values.to(tl.float16)
        rest = (values - top.to(tl.float32)).to(tl.float16)
        total = tl.dot(rest, high, total, input_precision='ieee')
        total = tl.dot(top, low, total, input_precision='ieee')
        return tl.dot(top, high, total, input_precision='ieee')
    else:
        return tl.dot(values, high, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=['first'])
def exponents_kernel(x_ptr, y_ptr, exponent_ptr, lengths_ptr, first, frames, size, start, hop, odd, samples,
                     BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr):
    "Biased exponents (2, b, frames) of the largest sample of each frame"
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + first + row)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    used = f < frames_of(length, hop, odd)
    x, y = tl.zeros([BLOCK_F, BLOCK_N], tl.float32), tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    for low in range(0, size, BLOCK_N):
        j = low + tl.arange(0, BLOCK_N)[None, :]
        inside = used[:, None] & (j < size)
        source = (first + row) * samples + reflected(f[:, None] * hop + start + j, length - 1)
        x = tl.maximum(x, tl.abs(tl.load(x_ptr + source, mask=inside, other=0.)))
        y = tl.maximum(y, tl.abs(tl.load(y_ptr + source, mask=inside, other=0.)))
    place = exponent_ptr + row * frames + f
    tl.store(place, exponent_of(tl.max(x, 1)), mask=f < frames)
    tl.store(place + tl.num_programs(1).to(tl.int64) * frames, exponent_of(tl.max(y, 1)), mask=f < frames)


@triton.jit
def load_folded(wave_ptr, left, right, inside, paired, scale):
    "Sums and differences of the pairs of a tile, times the scale of their frames"
    a = tl.load(wave_ptr + left, mask=inside, other=0.)
    c = tl.load(wave_ptr + right, mask=paired, other=0.)
    return (a + c) * scale, (a - c) * scale


@triton.jit(do_not_specialize=['first'])
def folded_kernel(x_ptr, y_ptr, exponent_ptr, cos_ptr, cos_low_ptr, sin_ptr, sin_low_ptr, partial_ptr, factor_ptr,
                  slope_ptr, lengths_ptr, first, frames, bins, columns, win, size, skip, start, hop, odd, samples,
                  tiles, stride, unit, eps, offset, power,
                  w_sc, w_log1, w_log2, w_lin1, w_lin2, w_pow, w_cplx,
                  SC: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, LIN1: tl.constexpr,
                  LIN2: tl.constexpr, POW: tl.constexpr, CPLX: tl.constexpr, COLUMNS: tl.constexpr,
                  MIXED: tl.constexpr, CLAMP: tl.constexpr, SUMS: tl.constexpr, SLOPES: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Terms of a tile of frames and bins: their sums, their slopes in the folded spectrum, or both.

    A grid of (tiles, b), bins first: neighbours share their samples. `size` samples count, of
    which the first is `skip`; the tables have `columns` columns.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + first + row)
    used, last = frames_of(length, hop, odd), length - 1
    across = tl.cdiv(bins, BLOCK_N)
    low = (tile // across) * BLOCK_F
    f = low + tl.arange(0, BLOCK_F)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    live = f < used
    exponent = exponent_ptr + row * frames + f
    e_up = tl.load(exponent, mask=live, other=127)[:, None]
    s_up = tl.load(exponent + tl.num_programs(1).to(tl.int64) * frames, mask=live, other=127)[:, None]
    x_ptr += (first + row) * samples
    y_ptr += (first + row) * samples
    e_re = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    e_im, s_re, s_im = tl.zeros_like(e_re), tl.zeros_like(e_re), tl.zeros_like(e_re)
    for k in range(0, tl.where(low < used, size, 0), BLOCK_K):
        j = k + tl.arange(0, BLOCK_K)
        at = j[:, None] * columns + n
        cos, sin = tl.load(cos_ptr + at), tl.load(sin_ptr + at)
        cos_low, sin_low = cos, sin
        if PRECISION == 'fp16x3': cos_low, sin_low = tl.load(cos_low_ptr + at), tl.load(sin_low_ptr + at)
        i = (j + skip)[None, :]
        begin = f[:, None] * hop + start
        left, right = reflected(begin + i, last), reflected(begin + win - i, last)
        inside = live[:, None] & (j < size)[None, :]
        paired = inside & (i > 0) & (2 * i < win)
        even, odds = load_folded(x_ptr, left, right, inside, paired, power_of_two(266 - e_up))
        e_re = split_dot(e_re, even, cos, cos_low, PRECISION)
        e_im = split_dot(e_im, odds, sin, sin_low, PRECISION)
        even, odds = load_folded(y_ptr, left, right, inside, paired, power_of_two(266 - s_up))
        s_re = split_dot(s_re, even, cos, cos_low, PRECISION)
        s_im = split_dot(s_im, odds, sin, sin_low, PRECISION)
    e_down, s_down = power_of_two(e_up - 12) * unit, power_of_two(s_up - 12) * unit
    e_re, e_im, s_re, s_im = e_re * e_down, e_im * e_down, s_re * s_down, s_im * s_down
    r_e, r_s = floored(e_re, e_im, eps, CLAMP), floored(s_re, s_im, eps, CLAMP)
    e, s = tl.sqrt(r_e), tl.sqrt(r_s)
    mask = live[:, None] & (n < bins)
    if SUMS:
        store_sums(partial_ptr + (row * tiles + tile) * COLUMNS, e, s, r_e, r_s, e_re, e_im, s_re, s_im,
                   mask, offset, power, SC, LOG1, LOG2, LIN1, LIN2, POW, CPLX, COLUMNS)
    if SLOPES:
        factor = 0.
        if SC >= 0: factor = tl.load(factor_ptr + row)
        # one far address, and short offsets: registers are what this kernel is short of
        at = 2 * (tl.arange(0, BLOCK_F)[:, None] * bins + n)
        store_slopes(slope_ptr + (row * frames + low) * bins * 2 + at, stride, e, s, r_e, r_s,
                     e_re, e_im, s_re, s_im, mask, 1., factor, (used * bins).to(tl.float32), eps, offset, power,
                     w_sc, w_log1, w_log2, w_lin1, w_lin2, w_pow, w_cplx,
                     SC, LOG1, LOG2, LIN1, LIN2, POW, CPLX, True, MIXED, CLAMP)


@triton.jit(do_not_specialize=['first', 'batch'])
def unfolded_kernel(slope_ptr, cos_ptr, cos_low_ptr, sin_ptr, sin_low_ptr, frames_ptr, lengths_ptr, first, batch,
                    frames, bins, columns, win, size, skip, hop, odd, unit, PRECISION: tl.constexpr,
                    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The adjoint: slopes (outputs * b, frames, bins, 2) to windowed frames (outputs * b, frames, win).

    A tile has BLOCK_N samples of the folded frame and runs over the bins.
    """
    row = tl.program_id(2).to(tl.int64)
    used = frames_of(tl.load(lengths_ptr + first + row % batch), hop, odd)
    low = tl.program_id(1) * BLOCK_F
    f = low + tl.arange(0, BLOCK_F)
    live, near = (f < used)[:, None], tl.arange(0, BLOCK_F)[:, None]
    slope_ptr += (row * frames + low) * bins * 2
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    end = tl.where(low < used, bins, 0)
    largest = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
    for k in range(0, end, BLOCK_K):
        n = k + tl.arange(0, BLOCK_K)[None, :]
        re, im = load_pair(slope_ptr + 2 * (near * bins + n), live & (n < bins))
        largest = tl.maximum(largest, tl.maximum(tl.abs(re), tl.abs(im)))
    up = exponent_of(tl.max(largest, 1))[:, None]
    even = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    odds = tl.zeros_like(even)
    for k in range(0, end, BLOCK_K):
        n = k + tl.arange(0, BLOCK_K)[None, :]
        at = j * columns + n                                                   # (samples, bins)
        cos, sin = tl.trans(tl.load(cos_ptr + at)), tl.trans(tl.load(sin_ptr + at))
        cos_low, sin_low = cos, sin
        if PRECISION == 'fp16x3':
            cos_low, sin_low = tl.trans(tl.load(cos_low_ptr + at)), tl.trans(tl.load(sin_low_ptr + at))
        re, im = load_pair(slope_ptr + 2 * (near * bins + n), live & (n < bins))
        scale = power_of_two(266 - up)
        even = split_dot(even, re * scale, cos, cos_low, PRECISION)
        odds = split_dot(odds, im * scale, sin, sin_low, PRECISION)
    down = power_of_two(up - 12) * unit
    even, odds = even * down, odds * down
    i = tl.trans(j) + skip
    inside = live & (i < size + skip)
    frames_ptr += (row * frames + low) * win
    tl.store(frames_ptr + near * win + i, even + odds, mask=inside)
    tl.store(frames_ptr + (near + 1) * win - i, even - odds, mask=inside & (i > 0) & (2 * i < win))


# ------------------------------------------------------------------------------- launchers

def utterances(job: Job, resolution: Resolution) -> int:
    "Return how many utterances go into one chunk"
    frame = 8 + (job.plan.outputs * (8 * resolution.bins + 4 * resolution.win_length) if job.waves is not None else 0)
    return max(1, BUDGET // (frame * frame_count(job.x.shape[1], resolution.hop_length, resolution.n_fft)))


def run(chunk: Chunk, split: str) -> None:
    "Write the terms of a chunk, and add its gradients to the waves"
    job, r = chunk.job, chunk.resolution
    table = folded(r, split, job.x.device)
    slopes = _forward(chunk, table, split)
    if slopes is None: return
    tile = TILES[split].adjoint
    frames = chunk.empty(*slopes.shape[:3], r.win_length)
    grid = (triton.cdiv(table.size, tile.columns), triton.cdiv(chunk.frames, tile.rows),
            len(slopes) * chunk.size)
    unfolded_kernel[grid](
        slopes, *table[:4], frames, job.lengths, chunk.first, chunk.size, chunk.frames, r.bins,
        table.cos.shape[1], r.win_length, table.size, table.skip, r.hop_length, r.n_fft % 2, table.unit,
        PRECISION=split, **tile.blocks(*_BLOCKS), **tile.options, **FUSION)
    overlap(chunk, frames, None, table.skip)


def _forward(chunk: Chunk, table: Folded, split: str) -> Tensor | None:
    "Write the terms; gradients (outputs, b, frames, bins, 2) in the folded spectrum"
    job, r, frames = chunk.job, chunk.resolution, chunk.frames
    exponents = _exponents(chunk)
    tile = TILES[split].product
    tiles = triton.cdiv(frames, tile.rows) * triton.cdiv(r.bins, tile.columns)
    partial = chunk.empty(chunk.size, tiles, len(job.plan.terms) + 1)
    slopes = None if job.waves is None else chunk.empty(job.plan.outputs, chunk.size, frames, r.bins, 2)

    stride = 0 if slopes is None else slopes.stride(0)

    def launch(factor: Tensor, out: Tensor | None, told: dict, sums: bool):
        folded_kernel[(tiles, chunk.size)](
            job.x, job.y, exponents, *table[:4], partial, factor, partial if out is None else out, job.lengths,
            chunk.first, frames, r.bins, table.cos.shape[1], r.win_length, table.size, table.skip, chunk.start,
            r.hop_length, r.n_fft % 2, job.x.shape[1], tiles, 0 if out is None else stride, table.unit,
            SUMS=sums, SLOPES=out is not None, PRECISION=split, **tile.blocks(*_BLOCKS), **tile.options, **told,
            **FUSION)

    told, names = terms_of(chunk), job.plan.terms
    light = len(names) <= MOST and LIGHT.issuperset(names)
    # convergence has its slope only when its sums are known: a second look is cheaper than memory
    once = light and 'sc' not in names
    launch(partial, slopes if once else None, told, True)
    factor = finish(chunk, partial, r.bins)
    if slopes is None or once: return slopes
    if light or told['MIXED']:
        launch(factor, slopes, told, False)
    else:
        for k, name in enumerate(names): launch(factor, slopes[k], told | slots(name) | dict(MIXED=True), False)
    return slopes


def _exponents(chunk: Chunk) -> Tensor:   # (2, b, frames)
    "Biased exponents of the largest sample of each frame of enhanced and clean"
    job, r, frames = chunk.job, chunk.resolution, chunk.frames
    found = torch.empty(2, chunk.size, frames, dtype=torch.int32, device=job.x.device)
    exponents_kernel[(triton.cdiv(frames, LOOK['BLOCK_F']), chunk.size)](
        job.x, job.y, found, job.lengths, chunk.first, frames, r.win_length, chunk.start, r.hop_length,
        r.n_fft % 2, job.x.shape[1], **LOOK, **PLAIN)
    return found


# -------------------------------------------------------------------------------- resources

def _variants() -> Iterator[Variant]:
    "What the launchers above compile"
    half = dict.fromkeys(('cos_ptr', 'cos_low_ptr', 'sin_ptr', 'sin_low_ptr'), '*fp16')
    rows = [('sc + log_l1, sums', ('sc', 'log_l1'), True, True, False),
            ('sc + log_l1, slopes', ('sc', 'log_l1'), True, False, True),
            ('log_l1 + lin_l1, both', ('log_l1', 'lin_l1'), True, True, True),
            ('sc, log_l1, lin_l1, slopes', ('sc', 'log_l1', 'lin_l1'), False, False, True),
            ('every term, sums', tuple(SLOTS), True, True, False),
            ('every term, slopes', tuple(SLOTS), True, False, True)]
    for split, (tile, adjoint) in TILES.items():
        types = dict(exponent_ptr='*i32') | (half if split == 'fp16x3' else {})
        # the fall-back has the same tile: its tightest entries stand for the others
        for name, terms, mixed, sums, slopes in rows if split == 'fp16x3' else rows[1:6:4]:
            constants = slots(*terms) | tile.blocks(*_BLOCKS) | dict(
                CLAMP=False, PRECISION=split, MIXED=mixed, SUMS=sums, SLOPES=slopes)
            yield stft_variant(f'stft gemm {split}, {name}', folded_kernel, constants, types, **tile.options)
        yield stft_variant(f'stft gemm {split}, adjoint', unfolded_kernel,
                           dict(PRECISION=split, **adjoint.blocks(*_BLOCKS)), types, **adjoint.options)
    yield stft_variant('stft gemm exponents', exponents_kernel, LOOK, dict(exponent_ptr='*i32'))


VARIANTS = list(_variants())
