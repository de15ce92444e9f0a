"""`forward` and `backward`: the token loss in Triton.

Forward: a program holds BLOCK_N frames and goes over tiles of codes with a running log-sum-exp.
Backward: `facts_kernel` stores four numbers per frame. Then `frames_kernel` sums over codes and
`codes_kernel` over frames, each from tiles made anew, for WIDTH of the D dimensions; beyond 128
dimensions the tiles are made again for every 128. No atomics: the gradient of the codes is the
sum over fixed shares of the frames.
"""
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .frames_and_codes_triton import DEPTH, aligned, deep_of, products, read_frames
from .launch import Tile, on_device, share_of
from .resources import Variant, variant
from .token_loss_torch import METRICS

#: Places of the names in METRICS
EUCLIDEAN, SQUARED, COSINE = (tl.constexpr(k) for k in range(3))
_DEEP = DEPTH.value
#: The tile of frames and codes of the forward pass
FORWARD = Tile(64, 64, _DEEP, 4, 3)
#: Tiles of the backward pass by WIDTH, the dimensions of the gradient that a program holds: of the
#: gradient of frames, of that of codes
OF_FRAMES = {32: Tile(64, 32, _DEEP, 4, 1), 64: Tile(64, 32, _DEEP, 4, 2), 128: Tile(64, 32, _DEEP, 8, 2)}
OF_CODES = {32: Tile(32, 64, _DEEP, 8, 2), 64: Tile(32, 64, _DEEP, 8, 2), 128: Tile(32, 64, _DEEP, 8, 2)}
#: Frames of a program of `facts_kernel`
FACTS = 64
#: Most partial gradients of the codes
SHARES = 16
HUGE = tl.constexpr(3.4028235e38)


@triton.jit
def own_facts(x_ptr, shift_ptr, c_ptr, rows, target, deep, METRIC: tl.constexpr, BLOCK_N: tl.constexpr):
    "|x - shift|^2 of each frame and its distance from its own target, from differences"
    square, own = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for j in range(deep):
        depth = j * DEPTH + tl.arange(0, DEPTH)
        x = read_frames(x_ptr, shift_ptr, rows, target >= 0, depth, deep)
        c = tl.load(c_ptr + target[:, None] * (deep * DEPTH) + depth[None, :], mask=(target >= 0)[:, None], other=0.)
        square += tl.sum(x * x, 1)
        own += tl.sum(-2 * x * c if METRIC == COSINE else (x - c) * (x - c), 1)
    return square, tl.sqrt(own) if METRIC == EUCLIDEAN else own


@triton.jit
def distances(x_ptr, shift_ptr, c_ptr, norm_ptr, rows, square, target, columns, k, deep, METRIC: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    "Distances (BLOCK_N, BLOCK_K); infinite at targets and beyond k"
    dot = products(x_ptr, shift_ptr, c_ptr, rows, target >= 0, columns, k, deep, BLOCK_N, BLOCK_K)
    tile = tl.load(norm_ptr + columns, mask=columns < k, other=0.)[None, :] - 2 * dot
    if METRIC != COSINE:
        tile += square[:, None]
        tile = tl.where(tile < 0, 0., tile)  # which keeps NaN
    if METRIC == EUCLIDEAN:
        tile = tl.sqrt(tile)
    return tl.where((columns[None, :] == target[:, None]) | (columns >= k)[None, :], float('inf'), tile)


@triton.jit
def log1p_exp(z):
    "log(1 + exp(-|z|)), to the last digit where it is small"
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    return tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1., u - 1)))


@triton.jit
def slope(distance, scale, METRIC: tl.constexpr):
    "Derivative of `scale * distance` by the squared distance; 0 at 0"
    if METRIC == EUCLIDEAN:
        return tl.where(distance == 0, 0., .5 * scale / tl.where(distance == 0, 1., distance))
    else:
        return tl.where(distance == distance, scale, scale)


@triton.jit
def gradients(tile, columns, target, lse, at_target, grad, scale, METRIC: tl.constexpr):
    "`u` (BLOCK_N, BLOCK_K): the derivative by the squared distances, times grad"
    u = -tl.exp(-scale * tile - lse[:, None]) * slope(tile, scale, METRIC) * grad[:, None]
    return tl.where(columns[None, :] == target[:, None], at_target[:, None], u)


@triton.jit
def forward_kernel(x_ptr, shift_ptr, c_ptr, norm_ptr, target_ptr, loss_ptr, rest_ptr, n, k, deep, scale,
                   METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    "Loss and `rest` of BLOCK_N frames"
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < n, other=-1)
    square, own = own_facts(x_ptr, shift_ptr, c_ptr, rows, target, deep, METRIC, BLOCK_N)
    low, total = tl.full((BLOCK_N,), HUGE, tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        h = scale * distances(x_ptr, shift_ptr, c_ptr, norm_ptr, rows, square, target, columns, k, deep,
                              METRIC, BLOCK_N, BLOCK_K)
        least = tl.minimum(low, tl.min(h, 1))
        total = total * tl.exp(least - low) + tl.sum(tl.exp(least[:, None] - h), 1)
        low = least
    rest = tl.log(total) - low
    z = scale * own + rest
    loss = tl.where(z < 0, 0., z) + log1p_exp(z)
    tl.store(loss_ptr + rows, tl.where(target < 0, 0., loss), mask=rows < n)
    tl.store(rest_ptr + rows, rest, mask=rows < n)


@triton.jit
def facts_kernel(x_ptr, shift_ptr, c_ptr, target_ptr, rest_ptr, grad_ptr, facts_ptr, n, deep, scale,
                 METRIC: tl.constexpr, BLOCK_N: tl.constexpr):
    "facts (4, n): |x - shift|^2, log-sum-exp of all logits, `u` at the target, grad or 0"
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < n, other=-1)
    square, own = own_facts(x_ptr, shift_ptr, c_ptr, rows, target, deep, METRIC, BLOCK_N)
    rest = tl.load(rest_ptr + rows, mask=rows < n, other=0.)
    grad = tl.load(grad_ptr + rows, mask=target >= 0, other=0.)
    z = scale * own + rest
    both = log1p_exp(z)
    at_target = grad * tl.exp(tl.where(z > 0, 0., z) - both) * slope(own, scale, METRIC)
    lse = tl.where(z > 0, rest, -scale * own) + both
    tl.store(facts_ptr + rows, square, mask=rows < n)
    tl.store(facts_ptr + n + rows, lse, mask=rows < n)
    tl.store(facts_ptr + 2 * n + rows, at_target, mask=rows < n)
    tl.store(facts_ptr + 3 * n + rows, grad, mask=rows < n)


@triton.jit
def read_facts(facts_ptr, target_ptr, rows, n):
    target = tl.load(target_ptr + rows, mask=rows < n, other=-1)
    square = tl.load(facts_ptr + rows, mask=rows < n, other=0.)
    lse = tl.load(facts_ptr + n + rows, mask=rows < n, other=0.)
    at_target = tl.load(facts_ptr + 2 * n + rows, mask=rows < n, other=0.)
    grad = tl.load(facts_ptr + 3 * n + rows, mask=rows < n, other=0.)
    return target, square, lse, at_target, grad


@triton.jit
def frames_kernel(x_ptr, shift_ptr, c_ptr, norm_ptr, target_ptr, facts_ptr, out_ptr, n, k, deep, scale,
                  METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  WIDTH: tl.constexpr):
    "Gradient in BLOCK_N frames, WIDTH of their dimensions"
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    target, square, lse, at_target, grad = read_facts(facts_ptr, target_ptr, rows, n)
    total, sums = tl.zeros((BLOCK_N, WIDTH), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        tile = distances(x_ptr, shift_ptr, c_ptr, norm_ptr, rows, square, target, columns, k, deep,
                         METRIC, BLOCK_N, BLOCK_K)
        u = gradients(tile, columns, target, lse, at_target, grad, scale, METRIC)
        c = tl.load(c_ptr + columns[:, None] * (deep * DEPTH) + depth[None, :],
                    mask=(columns < k)[:, None] & (depth < deep * DEPTH)[None, :], other=0.)
        total = tl.dot(u, c, total, input_precision='tf32x3')
        sums += tl.sum(u, 1)
    if METRIC == EUCLIDEAN:  # of the others the sum is 0
        total -= sums[:, None] * read_frames(x_ptr, shift_ptr, rows, target >= 0, depth, deep)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * (deep * DEPTH) + depth[None, :], -2 * total,
             mask=(rows < n)[:, None] & (depth < deep * DEPTH)[None, :])


@triton.jit
def codes_kernel(x_ptr, shift_ptr, c_ptr, norm_ptr, target_ptr, facts_ptr, out_ptr, n, k, deep, share, scale,
                 METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 WIDTH: tl.constexpr):
    "Gradient in BLOCK_K codes, WIDTH of their dimensions, from one share of the frames"
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    depth = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.program_id(2) * share
    total, mass = tl.zeros((BLOCK_K, WIDTH), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for start in range(first, tl.minimum(first + share, n), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        target, square, lse, at_target, grad = read_facts(facts_ptr, target_ptr, rows, n)
        tile = distances(x_ptr, shift_ptr, c_ptr, norm_ptr, rows, square, target, columns, k, deep,
                         METRIC, BLOCK_N, BLOCK_K)
        u = gradients(tile, columns, target, lse, at_target, grad, scale, METRIC)
        x = read_frames(x_ptr, shift_ptr, rows, target >= 0, depth, deep)
        total = tl.dot(tl.trans(u), x, total, input_precision='tf32x3')
        mass += tl.sum(u, 0)
    keep = (columns < k)[:, None] & (depth < deep * DEPTH)[None, :]
    place = columns[:, None] * (deep * DEPTH) + depth[None, :]
    if METRIC != COSINE:
        total -= mass[:, None] * tl.load(c_ptr + place, mask=keep, other=0.)
    tl.store(out_ptr + tl.program_id(2).to(tl.int64) * k * (deep * DEPTH) + place, -2 * total, mask=keep)


# ------------------------------------------------------------------------------- launchers

def forward(
    frames: Tensor,    # (N, D), contiguous, as all tensors here
    codes: Tensor,     # (K, D), less the shift
    shift: Tensor,     # (D,) to take from the frames
    norms: Tensor,     # (K,) squared norms of the codes less the shift; zeros for 'cosine'
    targets: Tensor,   # (N,) tokens, or `token_loss_torch.LEFT_OUT`
    scale: float,      # logits are minus this times a distance
    metric: str,       # one of METRICS
) -> tuple[Tensor, Tensor]:   # (N,), (N,)
    "Compute the loss, and `rest`: the log-sum-exp of the logits of all codes but the target"
    n = len(frames)
    frames, codes, shift = aligned(frames), aligned(codes), aligned(shift)
    loss, rest = frames.new_empty(n), frames.new_empty(n)
    if n:
        with on_device(frames):
            forward_kernel[triton.cdiv(n, FORWARD.rows),](
                frames, shift, codes, norms, targets, loss, rest, n, len(codes), deep_of(codes), scale,
                METRIC=METRICS.index(metric), **_blocks(FORWARD), **FORWARD.options)
    return loss, rest


def backward(
    frames: Tensor,    # (N, D), contiguous, as all tensors here but grad
    codes: Tensor,     # (K, D), less the shift
    shift: Tensor,     # (D,) to take from the frames
    norms: Tensor,     # (K,) squared norms of the codes less the shift; zeros for 'cosine'
    targets: Tensor,   # (N,) tokens, or `token_loss_torch.LEFT_OUT`
    scale: float,      # logits are minus this times a distance
    metric: str,       # one of METRICS
    rest: Tensor,      # (N,), what `forward` returned
    grad: Tensor,      # (N,), of the loss
    need: list[bool],  # of frames, of codes
) -> tuple[Tensor, Tensor]:   # (N, D), (K, D), empty where not needed
    "Compute the gradients of frames and codes"
    of_frames, of_codes = need
    n, (k, d), kind = len(frames), codes.shape, METRICS.index(metric)
    if n == 0:
        return frames.new_empty(frames.shape if of_frames else 0), codes.new_zeros(codes.shape if of_codes else 0)
    frames, codes, shift = aligned(frames), aligned(codes), aligned(shift)
    width, sizes = _width_of(codes.shape[-1]), (n, k, deep_of(codes))
    parts = triton.cdiv(codes.shape[-1], width)
    facts, of_x, of_c = frames.new_empty(4, n), frames.new_empty(0), codes.new_empty(0)
    inputs = (frames, shift, codes, norms, targets, facts)
    with on_device(frames):
        facts_kernel[triton.cdiv(n, FACTS),](frames, shift, codes, targets, rest, grad.contiguous(), facts,
                                             n, deep_of(codes), scale, kind, FACTS)
        if of_frames:
            tile, of_x = OF_FRAMES[width], torch.empty_like(frames)
            frames_kernel[triton.cdiv(n, tile.rows), parts](
                *inputs, of_x, *sizes, scale, METRIC=kind, WIDTH=width, **_blocks(tile), **tile.options)
        if of_codes:
            tile = OF_CODES[width]
            blocks = triton.cdiv(k, tile.columns)
            share = share_of(triton.cdiv(n, tile.rows), blocks * parts, SHARES) * tile.rows
            of_c = codes.new_empty(triton.cdiv(n, share), *codes.shape)
            codes_kernel[blocks, parts, len(of_c)](
                *inputs, of_c, *sizes, share, scale, METRIC=kind, WIDTH=width, **_blocks(tile), **tile.options)
            of_c = of_c.sum(0)
    return of_x[..., :d].contiguous(), of_c[..., :d].contiguous()


def _blocks(tile: Tile) -> dict[str, Any]: return tile.blocks('BLOCK_N', 'BLOCK_K')


def _width_of(d: int) -> int:
    "Dimensions of the gradient that a program holds: the least width that is enough, or the largest"
    return next((width for width in OF_FRAMES if width >= d), max(OF_FRAMES))


# -------------------------------------------------------------------------------- resources

def _variants() -> list[Variant]:
    "What the launchers above compile"
    types, found = dict(target_ptr='*i64', scale='fp32'), []

    def add(name: str, kernel, constants: dict[str, Any], **options: Any):
        found.append(variant(f'token_loss {name}', kernel, constants, types, **options))

    for kind, metric in enumerate(METRICS):
        add(f'{metric} forward', forward_kernel, dict(METRIC=kind, **_blocks(FORWARD)), **FORWARD.options)
        add(f'{metric} facts', facts_kernel, dict(METRIC=kind, BLOCK_N=FACTS), num_stages=3)
        for name, kernel, table in ('frames', frames_kernel, OF_FRAMES), ('codes', codes_kernel, OF_CODES):
            for width, tile in table.items():
                add(f'{metric} {name} {width}', kernel, dict(METRIC=kind, WIDTH=width, **_blocks(tile)), **tile.options)
    return found


VARIANTS = _variants()
