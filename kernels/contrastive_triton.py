"""`sums` and `gradients`: the contrastive ratio in Triton.

A launch works on one layer of all utterances and on up to PACKED comparisons; pointers are plain
arguments, so that a CUDA graph can hold the call. A program adds up one stretch of an utterance,
and a last kernel adds the stretches, in their order; so no sum depends on the rest of the batch.
"""
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_torch import EPS, PACKED, Shape, kept_dtype, regions, shape_of
from .launch import on_device, pointer
from .resources import Variant, variant


class Stretch(NamedTuple):
    "What one program reads, and how it is compiled"
    block: int = 1024   # elements at a time, for l1 and l2
    turns: int = 8      # how often
    frames: int = 4     # at a time, for the gradient of l2 and for cosine
    dims: int = 256
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        "Warps and stages, as a launch takes them"
        return dict(num_warps=self.warps, num_stages=self.stages)


STRETCH = Stretch()
#: Partial sums that the last kernel adds at a time
PARTIALS = 128


@triton.jit
def read_float(ptr, place, mask): return tl.load(ptr + place, mask=mask, other=0.).to(tl.float32)


@triton.jit
def size_of(x, SQUARE: tl.constexpr): return x * x if SQUARE else tl.abs(x)


@triton.jit
def sign_of(x, PLACE: tl.constexpr):
    "Two bits, 0 for - and 2 for +"
    return tl.where(x > 0, 2, tl.where(x < 0, 0, 1)) << 2 * PLACE


@triton.jit
def frames_of(lengths_ptr, b, T, LENGTHS: tl.constexpr):
    "Valid frames of an utterance"
    if LENGTHS: return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 1), T).to(tl.int32)
    else: return T


@triton.jit
def sums_kernel(e_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr, codes_ptr, partial_ptr, lengths_ptr, T, D, tiles, columns,
                column, layer, layers, COUNT: tl.constexpr, SQUARE: tl.constexpr, KEEP: tl.constexpr,
                SIZE: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """Partial means of |e - x| or its square, and the signs of e - x, over a stretch of an utterance.

    partial (B, layers, columns, tiles): comparisons from `column` on, and the size of x0 in the
    last column with SIZE.
    """
    tile, b = tl.program_id(0), tl.program_id(1)
    valid = frames_of(lengths_ptr, b, T, LENGTHS) * D
    start = b.to(tl.int64) * T * D
    zero = tl.zeros((BLOCK,), tl.float32)
    s0, s1, s2, s3, size = zero, zero, zero, zero, zero
    for turn in range(TURNS):
        inside = (tile * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        live, place = inside < valid, start + inside
        e, x = read_float(e_ptr, place, live), read_float(x0_ptr, place, live)
        if SIZE: size += size_of(x, SQUARE)
        s0 += size_of(e - x, SQUARE)
        code = sign_of(e - x, 0)
        if COUNT > 1:
            gap = e - read_float(x1_ptr, place, live)
            s1 += size_of(gap, SQUARE)
            code |= sign_of(gap, 1)
        if COUNT > 2:
            gap = e - read_float(x2_ptr, place, live)
            s2 += size_of(gap, SQUARE)
            code |= sign_of(gap, 2)
        if COUNT > 3:
            gap = e - read_float(x3_ptr, place, live)
            s3 += size_of(gap, SQUARE)
            code |= sign_of(gap, 3)
        if KEEP: tl.store(codes_ptr + place, code.to(tl.uint8), mask=inside < T * D)
    out = partial_ptr + ((b.to(tl.int64) * layers + layer) * columns) * tiles + tile
    tl.store(out + column * tiles, tl.sum(s0) / valid)
    if COUNT > 1: tl.store(out + (column + 1) * tiles, tl.sum(s1) / valid)
    if COUNT > 2: tl.store(out + (column + 2) * tiles, tl.sum(s2) / valid)
    if COUNT > 3: tl.store(out + (column + 3) * tiles, tl.sum(s3) / valid)
    if SIZE: tl.store(out + (columns - 1) * tiles, tl.sum(size) / valid)


@triton.jit
def cosine(e_ptr, x_ptr, slopes_ptr, t, live, rows, frames, D, KEEP: tl.constexpr, EPS: tl.constexpr,
           FRAMES: tl.constexpr, DIMS: tl.constexpr):
    "1 - cos of some frames, and its gradient into slopes (2, frames): see `contrastive_torch`"
    apart, along = tl.zeros((FRAMES, DIMS), tl.float32), tl.zeros((FRAMES, DIMS), tl.float32)
    ee, xx = tl.zeros((FRAMES, DIMS), tl.float32), tl.zeros((FRAMES, DIMS), tl.float32)
    ex = tl.zeros((FRAMES, DIMS), tl.float32)
    for start in range(0, D, DIMS):
        dims = start + tl.arange(0, DIMS)
        mask = live[:, None] & (dims < D)[None, :]
        e, x = (read_float(e_ptr, rows[:, None] + dims[None, :], mask),
                read_float(x_ptr, rows[:, None] + dims[None, :], mask))
        gap = e - x
        apart += gap * gap
        along += gap * e
        ee += e * e
        xx += x * x
        ex += e * x
    e_norm, x_norm = tl.sqrt(tl.sum(ee, 1) + EPS), tl.sqrt(tl.sum(xx, 1) + EPS)
    apart = tl.sum(apart, 1)
    slope = 1 / (e_norm * x_norm)
    close = apart < e_norm * x_norm
    longer = (2 * tl.sum(along, 1) - apart) / (e_norm + x_norm)
    cos = (tl.sum(ex, 1) + EPS) * slope
    away = tl.where(close, (apart - longer * longer) * slope / 2, 1 - cos)
    away = tl.where(away < 0, 0., away)                                # and a nan stays one
    if KEEP:
        turn = tl.where(close, -longer / x_norm - away, cos) / (e_norm * e_norm)
        tl.store(slopes_ptr + t, tl.where(close, slope, -slope), mask=live)
        tl.store(slopes_ptr + frames + t, turn, mask=live)
    return tl.sum(away)


@triton.jit
def cosine_sums_kernel(e_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr, slopes_ptr, partial_ptr, lengths_ptr, T, D, tiles,
                       columns, column, layer, layers, COUNT: tl.constexpr, KEEP: tl.constexpr,
                       LENGTHS: tl.constexpr, EPS: tl.constexpr, FRAMES: tl.constexpr, DIMS: tl.constexpr):
    "Partial means of 1 - cos over some frames of an utterance, as `sums_kernel`; slopes (COUNT, 2, B, T)"
    tile, b = tl.program_id(0), tl.program_id(1)
    valid = frames_of(lengths_ptr, b, T, LENGTHS)
    t = tile * FRAMES + tl.arange(0, FRAMES)
    frame, frames = b * T + t, tl.num_programs(1) * T
    live, rows = t < valid, frame.to(tl.int64) * D
    out = partial_ptr + ((b.to(tl.int64) * layers + layer) * columns + column) * tiles + tile
    tl.store(out, cosine(e_ptr, x0_ptr, slopes_ptr, frame, live, rows, frames, D, KEEP, EPS, FRAMES, DIMS) / valid)
    if COUNT > 1:
        slopes_ptr += 2 * frames
        away = cosine(e_ptr, x1_ptr, slopes_ptr, frame, live, rows, frames, D, KEEP, EPS, FRAMES, DIMS)
        tl.store(out + tiles, away / valid)
    if COUNT > 2:
        slopes_ptr += 2 * frames
        away = cosine(e_ptr, x2_ptr, slopes_ptr, frame, live, rows, frames, D, KEEP, EPS, FRAMES, DIMS)
        tl.store(out + 2 * tiles, away / valid)
    if COUNT > 3:
        slopes_ptr += 2 * frames
        away = cosine(e_ptr, x3_ptr, slopes_ptr, frame, live, rows, frames, D, KEEP, EPS, FRAMES, DIMS)
        tl.store(out + 3 * tiles, away / valid)


@triton.jit
def finish_kernel(partial_ptr, out_ptr, tiles, BLOCK: tl.constexpr):
    "Add the partial means of one utterance, layer and comparison, in their order"
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + tl.program_id(0).to(tl.int64) * tiles + tile, mask=tile < tiles, other=0.)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def signs_kernel(codes_ptr, factors_ptr, out_ptr, lengths_ptr, T, D, size, count, row, BLOCK: tl.constexpr,
                 TURNS: tl.constexpr, PACKED: tl.constexpr, LENGTHS: tl.constexpr):
    "Gradient of l1 from packed signs, `size` bytes a group, and the factors of `count` comparisons"
    b = tl.program_id(1).to(tl.int64)
    valid = frames_of(lengths_ptr, b, T, LENGTHS) * D
    for turn in range(TURNS):
        inside = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        place = b * T * D + inside
        total, group = tl.zeros((BLOCK,), tl.float32), codes_ptr + place
        for first in range(0, count, PACKED):
            code = tl.load(group, mask=inside < valid, other=0)
            group += size
            for k in tl.static_range(PACKED):
                factor = tl.load(factors_ptr + b * row + first + k, mask=first + k < count, other=0.) / valid
                total += factor * (((code >> 2 * k) & 3).to(tl.float32) - 1)
        total = tl.where(inside < valid, total, 0.)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside < T * D)


@triton.jit
def slope_of(slopes_ptr, factors_ptr, frame, live, frames, valid, D, M: tl.constexpr, COSINE: tl.constexpr):
    """The gradient of comparison M as `slope (close e - x) + turn e` of its frames, times its factor.

    For l2 it is `2 (e - x)`, the mean of which goes over dims, too.
    """
    factor = tl.load(factors_ptr + M) / valid
    if COSINE:
        slope = tl.load(slopes_ptr + 2 * M * frames + frame, mask=live, other=0.)
        turn = tl.load(slopes_ptr + (2 * M + 1) * frames + frame, mask=live, other=0.)
        return factor * tl.abs(slope), (slope > 0).to(tl.float32), factor * turn
    else:
        return tl.where(live, 2 * factor / D, 0.), tl.where(live, 1., 0.), tl.where(live, 0., 0.)


@triton.jit
def gradient_kernel(e_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr, slopes_ptr, factors_ptr, out_ptr, lengths_ptr, T, D, row,
                    COUNT: tl.constexpr, COSINE: tl.constexpr, ADD: tl.constexpr, LENGTHS: tl.constexpr,
                    FRAMES: tl.constexpr, DIMS: tl.constexpr):
    "Gradient of l2 or cosine from the features and a factor for each comparison; ADD: to what is there"
    b = tl.program_id(1)
    valid = frames_of(lengths_ptr, b, T, LENGTHS)
    t = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    frame, frames = b * T + t, tl.num_programs(1) * T
    live, rows = t < valid, frame.to(tl.int64) * D
    factors_ptr += b.to(tl.int64) * row
    slope0, close0, turns = slope_of(slopes_ptr, factors_ptr, frame, live, frames, valid, D, 0, COSINE)
    if COUNT > 1:
        slope1, close1, turn = slope_of(slopes_ptr, factors_ptr, frame, live, frames, valid, D, 1, COSINE)
        turns += turn
    if COUNT > 2:
        slope2, close2, turn = slope_of(slopes_ptr, factors_ptr, frame, live, frames, valid, D, 2, COSINE)
        turns += turn
    if COUNT > 3:
        slope3, close3, turn = slope_of(slopes_ptr, factors_ptr, frame, live, frames, valid, D, 3, COSINE)
        turns += turn
    for start in range(0, D, DIMS):
        dims = start + tl.arange(0, DIMS)
        place = rows[:, None] + dims[None, :]
        mask, there = live[:, None] & (dims < D)[None, :], (t < T)[:, None] & (dims < D)[None, :]
        e = read_float(e_ptr, place, mask)
        total = slope0[:, None] * (close0[:, None] * e - read_float(x0_ptr, place, mask))
        if COUNT > 1: total += slope1[:, None] * (close1[:, None] * e - read_float(x1_ptr, place, mask))
        if COUNT > 2: total += slope2[:, None] * (close2[:, None] * e - read_float(x2_ptr, place, mask))
        if COUNT > 3: total += slope3[:, None] * (close3[:, None] * e - read_float(x3_ptr, place, mask))
        if COSINE: total += turns[:, None] * e
        total = tl.where(live[:, None], total, 0.)
        if ADD: total += tl.load(out_ptr + place, mask=there, other=0.)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=there)


# ------------------------------------------------------------------------------- launchers

def sums(
    enhanced: list[Tensor],    # layers (B, frames, dim)
    clean: list[Tensor],       # the same layers
    negatives: list[Tensor],   # the layers of all negatives, end to end
    frames: Tensor | None,     # (layers, B) valid frames
    distance: str,             # one of `contrastive.DISTANCES`
    keep: bool,                # for a backward pass
) -> tuple[Tensor, Tensor, Tensor]:   # (B, layers, 1 + K), (B, layers), see `contrastive_torch.regions`
    "Compute the distances to clean and to each negative, the size of clean, and what is to be kept"
    layers, B = len(enhanced), len(enhanced[0])
    count = 1 + len(negatives) // layers
    cosine, shapes = distance == 'cosine', [shape_of(e) for e in enhanced]
    tiles = max(_grid_of(shape, cosine)[0] for shape in shapes)
    partial = enhanced[0].new_zeros(B, layers, count + 1, tiles, dtype=torch.float32)
    places = regions(shapes, count, distance)
    kept = partial.new_empty(places[-1].stop if keep else 0, dtype=kept_dtype(distance))
    with on_device(partial):
        for l, (_, T, D) in enumerate(shapes):
            e, own = enhanced[l].contiguous(), kept[places[l]] if keep else kept
            lengths = pointer(None if frames is None else frames[l], e)
            for first, others in _groups([clean[l], *negatives[l::layers]]):
                part = own[_group_of(first, shapes[l], distance):]
                where = partial, lengths, T, D, tiles, count + 1, first, l, layers
                options = dict(COUNT=min(PACKED, count - first), LENGTHS=frames is not None, num_warps=STRETCH.warps)
                if cosine:
                    cosine_sums_kernel[_grid_of(shapes[l], True)](
                        e, *others, part, *where, KEEP=keep, EPS=EPS, FRAMES=STRETCH.frames, DIMS=STRETCH.dims,
                        num_stages=STRETCH.stages, **options)
                else:
                    sums_kernel[_grid_of(shapes[l], False)](
                        e, *others, part, *where, SQUARE=distance == 'l2', KEEP=keep and distance == 'l1',
                        SIZE=first == 0, BLOCK=STRETCH.block, TURNS=STRETCH.turns, **options)
        found = partial.new_empty(B, layers, count + 1)
        finish_kernel[found.numel(),](partial, found, tiles, PARTIALS)
    sizes = torch.ones_like(found[..., -1]) if cosine else found[..., -1].clone()
    return found[..., :-1].clone(memory_format=torch.contiguous_format), sizes.contiguous(), kept


def gradients(
    features: list[Tensor],    # layers of enhanced, clean and all negatives, end to end; none for l1
    kept: Tensor,              # by `sums`
    shapes: list[Shape],       # of the layers
    coefficients: Tensor,      # (B, layers, 1 + K), derivative of the loss in each distance
    frames: Tensor | None,     # (layers, B) valid frames
    distance: str,             # one of `contrastive.DISTANCES`
    dtype: torch.dtype,        # of the gradients
) -> list[Tensor]:
    "Compute the gradients of the enhanced layers"
    layers, count, found = len(shapes), coefficients.shape[2], []
    coefficients, places = coefficients.contiguous(), regions(shapes, count, distance)
    with on_device(coefficients):
        for l, (B, T, D) in enumerate(shapes):
            own, part = coefficients[:, l], kept[places[l]]
            lengths = pointer(None if frames is None else frames[l], coefficients)
            # several groups are summed in float32
            out = torch.empty(B, T, D, device=own.device, dtype=dtype if count <= PACKED else torch.float32)
            options = dict(LENGTHS=frames is not None, num_warps=STRETCH.warps)
            if distance == 'l1':
                signs_kernel[_grid_of((B, T, D), False)](
                    part, own, out, lengths, T, D, out.numel(), count, own.stride(0), BLOCK=STRETCH.block,
                    TURNS=STRETCH.turns, PACKED=PACKED, **options)
            else:
                e, *others = features[l::layers]
                for first, some in _groups(others):
                    slopes = part[_group_of(first, shapes[l], distance):]
                    gradient_kernel[_grid_of(shapes[l], True)](
                        e.contiguous(), *some, slopes, own[:, first:], out, lengths, T, D, own.stride(0),
                        COUNT=min(PACKED, count - first), COSINE=distance == 'cosine', ADD=first > 0,
                        FRAMES=STRETCH.frames, DIMS=STRETCH.dims, num_stages=STRETCH.stages, **options)
            found.append(out.to(dtype))
    return found


def _group_of(first: int, shape: Shape, distance: str) -> int:
    "Where the comparisons from `first` on begin in what a layer keeps"
    return first and regions([shape], first, distance)[0].stop


def _groups(others: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    "Give PACKED layers at a time, and the place of the first; where there are fewer, the last one again"
    for first in range(0, len(others), PACKED):
        some = [x.contiguous() for x in others[first:first + PACKED]]
        yield first, some + some[-1:] * (PACKED - len(some))


def _grid_of(shape: Shape, by_frames: bool) -> tuple[int, int]:
    "The grid of a launch: stretches of an utterance, and utterances"
    B, T, D = shape
    return (triton.cdiv(T, STRETCH.frames) if by_frames else triton.cdiv(T * D, STRETCH.block * STRETCH.turns)), B


# -------------------------------------------------------------------------------- resources

def _variants(kind: str, counts: tuple[int, ...]) -> list[Variant]:
    "What the launchers above compile for features of a kind and so many comparisons"
    found = []
    features = dict.fromkeys(('e_ptr', 'x0_ptr', 'x1_ptr', 'x2_ptr', 'x3_ptr', 'out_ptr'), f'*{kind}')
    types = features | dict(codes_ptr='*u8', lengths_ptr='*i64')
    flat = dict(LENGTHS=True, BLOCK=STRETCH.block, TURNS=STRETCH.turns)
    framed = dict(LENGTHS=True, FRAMES=STRETCH.frames, DIMS=STRETCH.dims)

    def add(name: str, kernel, constants: dict[str, Any], types: dict[str, str] = types):
        found.append(variant(f'contrastive {name} {kind}', kernel, constants, types, **STRETCH.options))

    for count in counts:
        # l2 keeps no codes: its pointer is that of the partial sums
        add(f'l1 sums {count}', sums_kernel, dict(flat, COUNT=count, SQUARE=False, KEEP=True, SIZE=True))
        add(f'l2 sums {count}', sums_kernel, dict(flat, COUNT=count, SQUARE=True, KEEP=False, SIZE=True),
            types | dict(codes_ptr='*fp32'))
        add(f'cosine sums {count}', cosine_sums_kernel, dict(framed, COUNT=count, KEEP=True, EPS=EPS))
        add(f'l2 gradient {count}', gradient_kernel, dict(framed, COUNT=count, COSINE=False, ADD=False))
        add(f'cosine gradient {count}', gradient_kernel, dict(framed, COUNT=count, COSINE=True, ADD=False))
    add('l1 gradient', signs_kernel, dict(flat, PACKED=PACKED))
    return found


#: One negative, two, three; of short types the usual two
VARIANTS = [*_variants('fp32', (2, 3, PACKED)), *_variants('bf16', (3,)),
            variant('contrastive finish', finish_kernel, dict(BLOCK=PARTIALS), **STRETCH.options)]
