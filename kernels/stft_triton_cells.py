"""`cells_kernel` and `finish_kernel`: terms of pairs of spectrogram cells in Triton, their sums and slopes.

Both back ends of the STFT distance end here: `stft_triton_fft` reads its spectra from memory,
`stft_triton_gemm` has them in registers. A term is either absent (-1) or has a slot: its column
in `parts`, and its output where each term has a wave of its own. Sums are fixed trees: float32
inside a program, float64 over programs. Products and sums are not contracted (`FUSION`), so
that equal waves have a distance of exactly zero.
"""
from typing import Any

import triton
import triton.language as tl

from .resources import Variant, variant

FUSION = dict(enable_fp_fusion=False)
#: How kernels without tiles of their own are launched
PLAIN = dict(num_warps=4, num_stages=2, **FUSION)
#: Terms in the order of the arguments of the kernels: the constant of each
SLOTS = dict(sc='SC', log_l1='LOG1', log_l2='LOG2', lin_l1='LIN1', lin_l2='LIN2',
             compressed='POW', complex='CPLX')
#: Cells of one program that adds them up, of one that stores slopes
SUMMED, SLOPED = 1024, 512
#: Types of the arguments of kernels that are not what `resources.variant` takes them for
TYPES = dict(lengths_ptr='*i32') | dict.fromkeys(
    ('eps', 'offset', 'power', 'sc_floor', 'unit', 'w_sc', 'w_log1', 'w_log2', 'w_lin1', 'w_lin2', 'w_pow', 'w_cplx'),
    'fp32')
#: Partial sums that are read at once; a power of two, fixed: it shapes the tree
PARTIALS = 128


# ------------------------------------------------------------------------------ in a program

@triton.jit
def frames_of(length, hop, odd):
    "Frames of a centred STFT; with an odd n_fft the padding is one sample short"
    return 1 + (length - odd) // hop


@triton.jit
def reflected(position, last):
    "The sample that lies at a position before 0 or after `last`"
    return last - tl.abs(last - tl.abs(position))


@triton.jit
def load_pair(ptr, mask):
    "Real and imaginary part, which lie side by side"
    both = tl.load(tl.expand_dims(ptr, -1) + tl.arange(0, 2), mask=tl.expand_dims(mask, -1), other=0.)
    return tl.split(both)


@triton.jit
def store_pair(ptr, re, im, mask):
    tl.store(tl.expand_dims(ptr, -1) + tl.arange(0, 2), tl.join(re, im), mask=tl.expand_dims(mask, -1))


@triton.jit
def floored(re, im, eps, CLAMP: tl.constexpr):
    "Power with its floor"
    power = re * re + im * im
    return tl.maximum(power, eps, propagate_nan=tl.PropagateNan.ALL) if CLAMP else power + eps


@triton.jit
def raised(value, power):
    return tl.exp2(power * tl.log2(value))


@triton.jit
def signed(value):
    return tl.where(value > 0, 1., 0.) - tl.where(value < 0, 1., 0.)


@triton.jit
def total(values, mask):
    return tl.sum(tl.where(mask, values, 0.))


@triton.jit
def store_sums(row_ptr, e, s, r_e, r_s, e_re, e_im, s_re, s_im, mask, offset, power,
               SC: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, LIN1: tl.constexpr,
               LIN2: tl.constexpr, POW: tl.constexpr, CPLX: tl.constexpr, COLUMNS: tl.constexpr):
    "Sums of the terms over these cells, to `row_ptr` + slot; the last column is |s|²"
    diff = e - s
    if SC >= 0:
        tl.store(row_ptr + SC, total(diff * diff, mask))
        tl.store(row_ptr + COLUMNS - 1, total(s * s, mask))
    if (LOG1 >= 0) or (LOG2 >= 0):
        ratio = tl.log((e + offset) / (s + offset))
        if LOG1 >= 0: tl.store(row_ptr + LOG1, total(tl.abs(ratio), mask))
        if LOG2 >= 0: tl.store(row_ptr + LOG2, total(ratio * ratio, mask))
    if LIN1 >= 0: tl.store(row_ptr + LIN1, total(tl.abs(diff), mask))
    if LIN2 >= 0: tl.store(row_ptr + LIN2, total(diff * diff, mask))
    if POW >= 0:
        gap = raised(e, power) - raised(s, power)
        tl.store(row_ptr + POW, total(gap * gap, mask))
    if CPLX >= 0:
        gain_e, gain_s = raised(r_e, (power - 1) * .5), raised(r_s, (power - 1) * .5)
        re, im = e_re * gain_e - s_re * gain_s, e_im * gain_e - s_im * gain_s
        tl.store(row_ptr + CPLX, total(re * re + im * im, mask))


@triton.jit
def emit(re, im, slope, along_re, along_im, ptr, mask, PAIR: tl.constexpr, MIXED: tl.constexpr):
    "Add a gradient to the mix, or store it where it is an output of its own"
    if MIXED:
        re += slope * along_re if PAIR else slope
        im += slope * along_im if PAIR else slope
    elif PAIR:
        store_pair(ptr, slope * along_re, slope * along_im, mask)
    else:
        tl.store(ptr, slope, mask=mask)
    return re, im


@triton.jit
def store_slopes(ptr, stride, e, s, r_e, r_s, e_re, e_im, s_re, s_im, mask, scale, factor, cells,
                 eps, offset, power, w_sc, w_log1, w_log2, w_lin1, w_lin2, w_pow, w_cplx,
                 SC: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, LIN1: tl.constexpr,
                 LIN2: tl.constexpr, POW: tl.constexpr, CPLX: tl.constexpr,
                 PAIR: tl.constexpr, MIXED: tl.constexpr, CLAMP: tl.constexpr):
    """Gradient of the terms in these cells, times `scale`: in E (PAIR) or in the magnitude.

    `ptr` addresses the cells of output 0, outputs are `stride` apart; `factor` is that of
    e - s in the gradient of spectral convergence.
    """
    diff = e - s
    along_re, along_im = e_re, e_im       # direction of the magnitude in the spectrum
    if PAIR:
        unit = scale / e
        if CLAMP: unit = tl.where(r_e > eps, unit, 0.)
        along_re, along_im = e_re * unit, e_im * unit
    re, im = tl.zeros_like(e), tl.zeros_like(e)
    if SC >= 0:
        slope = diff * (factor * w_sc)
        re, im = emit(re, im, slope, along_re, along_im, ptr + SC * stride, mask, PAIR, MIXED)
    if LOG1 >= 0:
        slope = signed(diff) / (e + offset) * (w_log1 / cells)
        re, im = emit(re, im, slope, along_re, along_im, ptr + LOG1 * stride, mask, PAIR, MIXED)
    if LOG2 >= 0:
        slope = tl.log((e + offset) / (s + offset)) / (e + offset) * (2 * w_log2 / cells)
        re, im = emit(re, im, slope, along_re, along_im, ptr + LOG2 * stride, mask, PAIR, MIXED)
    if LIN1 >= 0:
        slope = signed(diff) * (w_lin1 / cells)
        re, im = emit(re, im, slope, along_re, along_im, ptr + LIN1 * stride, mask, PAIR, MIXED)
    if LIN2 >= 0:
        slope = diff * (2 * w_lin2 / cells)
        re, im = emit(re, im, slope, along_re, along_im, ptr + LIN2 * stride, mask, PAIR, MIXED)
    if POW >= 0:
        gap = raised(e, power) - raised(s, power)
        slope = raised(e, power - 1) * gap * (2 * power * w_pow / cells)
        re, im = emit(re, im, slope, along_re, along_im, ptr + POW * stride, mask, PAIR, MIXED)
    if CPLX >= 0:
        gain_e, gain_s = raised(r_e, (power - 1) * .5), raised(r_s, (power - 1) * .5)
        gap_re, gap_im = e_re * gain_e - s_re * gain_s, e_im * gain_e - s_im * gain_s
        # the gain moves with the power, unless that lies under a clamp
        pull = (gap_re * e_re + gap_im * e_im) * (gain_e / r_e * (power - 1))
        if CLAMP: pull = tl.where(r_e > eps, pull, 0.)
        weight = scale * (2 * w_cplx / cells)
        re, im = emit(re, im, weight, gap_re * gain_e + e_re * pull, gap_im * gain_e + e_im * pull,
                      ptr + CPLX * stride, mask, PAIR, MIXED)
    if MIXED:
        if PAIR: store_pair(ptr, re, im, mask)
        else: tl.store(ptr, re, mask=mask)


# -------------------------------------------------------------------------------- kernels

@triton.jit(do_not_specialize=['first'])
def cells_kernel(both_ptr, partial_ptr, factor_ptr, slope_ptr, lengths_ptr,
                 first, frames, width, hop, odd, tiles, stride, eps, offset, power,
                 w_sc, w_log1, w_log2, w_lin1, w_lin2, w_pow, w_cplx,
                 SC: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, LIN1: tl.constexpr,
                 LIN2: tl.constexpr, POW: tl.constexpr, CPLX: tl.constexpr, COLUMNS: tl.constexpr,
                 PAIR: tl.constexpr, MIXED: tl.constexpr, CLAMP: tl.constexpr,
                 SUMS: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr):
    """Terms of one tile of cells: their sums, their slopes, or both.

    both (2, b, frames, width): spectra (PAIR), or magnitudes behind a filter bank. A grid of
    (tiles, b); a tile is a run of `BLOCK` cells in memory order.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    cell = tile * BLOCK + tl.arange(0, BLOCK)
    cells = frames_of(tl.load(lengths_ptr + first + row), hop, odd) * width
    mask = cell < cells                       # the frames of an utterance are the first in its row
    far = row * frames * width * (2 if PAIR else 1)
    e_ptr = both_ptr + far
    s_ptr = e_ptr + tl.num_programs(1).to(tl.int64) * frames * width * (2 if PAIR else 1)
    slope_ptr += far
    if PAIR:
        e_re, e_im = load_pair(e_ptr + 2 * cell, mask)
        s_re, s_im = load_pair(s_ptr + 2 * cell, mask)
        r_e, r_s = floored(e_re, e_im, eps, CLAMP), floored(s_re, s_im, eps, CLAMP)
        e, s = tl.sqrt(r_e), tl.sqrt(r_s)
    else:
        e, s = tl.load(e_ptr + cell, mask=mask, other=1.), tl.load(s_ptr + cell, mask=mask, other=1.)
        r_e, r_s, e_re, e_im, s_re, s_im = e, s, e, e, s, s        # not looked at
    if SUMS:
        store_sums(partial_ptr + (row * tiles + tile) * COLUMNS, e, s, r_e, r_s, e_re, e_im, s_re, s_im,
                   mask, offset, power, SC, LOG1, LOG2, LIN1, LIN2, POW, CPLX, COLUMNS)
    if SLOPES:
        factor = 0.
        if SC >= 0: factor = tl.load(factor_ptr + row)
        scale = 1.
        if PAIR:   # an inverse real transform counts the bins between its ends twice
            k = cell % width
            scale = tl.where((k == 0) | ((k == width - 1) & (odd == 0)), 1., .5)
        store_slopes(slope_ptr + (2 * cell if PAIR else cell), stride, e, s, r_e, r_s, e_re, e_im, s_re, s_im,
                     mask, scale, factor, cells.to(tl.float32), eps, offset, power,
                     w_sc, w_log1, w_log2, w_lin1, w_lin2, w_pow, w_cplx,
                     SC, LOG1, LOG2, LIN1, LIN2, POW, CPLX, PAIR, MIXED, CLAMP)


@triton.jit(do_not_specialize=['first'])
def finish_kernel(partial_ptr, parts_ptr, factor_ptr, lengths_ptr, first, width, hop, odd, tiles,
                  parts_at, parts_stride, sc_floor, TERMS: tl.constexpr, SC: tl.constexpr,
                  COLUMNS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    "Partial sums (b, tiles, COLUMNS) of an utterance to its terms, and the factor of its convergence"
    row = tl.program_id(0).to(tl.int64)
    column, lane = tl.arange(0, PADDED)[None, :], tl.arange(0, BLOCK)[:, None]
    sums = tl.zeros([BLOCK, PADDED], tl.float64)
    for tile in range(0, tiles, BLOCK):
        found = tl.load(partial_ptr + (row * tiles + tile + lane) * COLUMNS + column,
                        mask=(tile + lane < tiles) & (column < COLUMNS), other=0.)
        sums += found.to(tl.float64)
    sums = tl.sum(sums, 0)                                                      # (PADDED,)
    column = tl.arange(0, PADDED)
    cells = (frames_of(tl.load(lengths_ptr + first + row), hop, odd) * width).to(tl.float64)
    values = sums / cells
    if SC >= 0:
        over = tl.sqrt(tl.sum(tl.where(column == SC, sums, 0.)))
        under = tl.sqrt(tl.sum(tl.where(column == COLUMNS - 1, sums, 0.))) + sc_floor * tl.sqrt(cells)
        values = tl.where(column == SC, over / under, values)
        tl.store(factor_ptr + row, tl.where(over > 0, 1 / (over * under), 0.).to(tl.float32))
    tl.store(parts_ptr + (first + row) * parts_stride + parts_at + column, values.to(tl.float32),
             mask=column < TERMS)


# ----------------------------------------------------------------------------- tile table

def stft_variant(name: str, kernel: Any, constants: dict[str, Any], types: dict[str, str] | None = None,
                 **options: Any) -> Variant:
    "Make an entry of a tile table of this family: see `resources.variant`"
    return variant(name, kernel, constants, TYPES | (types or {}), fp_fusion=False, **options)


def slots(*terms: str) -> dict[str, int]:
    "Return the constants of a kernel that say which terms there are, and in which order"
    found = {constant: terms.index(name) if name in terms else -1 for name, constant in SLOTS.items()}
    return found | dict(COLUMNS=len(terms) + 1)


_pairs = dict(PAIR=True, MIXED=True, CLAMP=False)
_sums, _slopes = dict(SUMS=True, SLOPES=False, BLOCK=SUMMED), dict(SUMS=False, SLOPES=True, BLOCK=SLOPED)
VARIANTS = [
    stft_variant('stft cells, sc + log_l1, sums', cells_kernel, slots('sc', 'log_l1') | _pairs | _sums),
    stft_variant('stft cells, sc + log_l1, slopes', cells_kernel, slots('sc', 'log_l1') | _pairs | _slopes),
    stft_variant('stft cells, every term, sums', cells_kernel, slots(*SLOTS) | _pairs | _sums),
    stft_variant('stft cells, every term, slopes', cells_kernel, slots(*SLOTS) | _pairs | _slopes | dict(MIXED=False)),
    stft_variant('stft cells, mel, both', cells_kernel,
                 slots('log_l1', 'lin_l1') | _pairs | dict(PAIR=False, SUMS=True, SLOPES=True, BLOCK=SUMMED)),
    stft_variant('stft finish', finish_kernel, dict(TERMS=2, SC=0, COLUMNS=3, PADDED=4, BLOCK=PARTIALS)),
]
