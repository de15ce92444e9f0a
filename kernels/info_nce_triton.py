"""`forward` and `backward`: InfoNCE in Triton, a tile of similarities at a time.

Forward, a program holds some queries and goes over a share of the keys with a running
log-sum-exp. Backward, the slopes of a strip of keys are computed again, N times at most
STRIP[1] numbers, and multiplied with the keys and with the queries. (Programs that keep the
gradient of some rows would compute the slopes twice, and again for every 128 dims that fit
their registers.) Every row is one sum in one order: no atomics. Scores are in units of ln 2,
as in `info_nce_torch`.
"""
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .info_nce_torch import EPS, LOG2E, NONE_YET
from .launch import Tile, float32_product, on_device, pointer, share_of, tile_of
from .resources import Variant, variant

#: Rows of a program that multiplies no matrices, and dims that it reads at a time
ROWS, DEPTH = 16, 128
#: Keys of a strip, least and most; between them an eighth of the queries
STRIP = 64, 1024
#: From this many rows of the result on: the tile
TILES = {0: Tile(64, 64, 16, 8, 3), 4096: Tile(128, 64, 16, 8, 3)}


@triton.jit
def read_rows(ptr, rows, count, depth, dims):
    "Rows of a matrix (count, dims) as float32, 0 outside"
    keep = (rows < count)[:, None] & (depth < dims)[None, :]
    return tl.load(ptr + rows[:, None].to(tl.int64) * dims + depth[None, :], mask=keep, other=0.).to(tl.float32)


@triton.jit
def products(a_ptr, b_ptr, a_rows, b_rows, a_count, b_count, dims, ROWS: tl.constexpr, COLS: tl.constexpr,
             DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    "Inner products (ROWS, COLS)"
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, dims, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a, b = read_rows(a_ptr, a_rows, a_count, depth, dims), read_rows(b_ptr, b_rows, b_count, depth, dims)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def log1p(x):
    "ln(1 + x) for x in [0, 1] to float32, digits of a small x included: 2 artanh(x / (2 + x))"
    z = x / (2 + x)
    w = z * z
    return 2 * z * (1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w / 13))))))


@triton.jit
def norms_kernel(x_ptr, inverse_ptr, count, dims, EPS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    "Inverse norm of each row"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dims, DEPTH):
        x = read_rows(x_ptr, rows, count, start + tl.arange(0, DEPTH), dims)
        total += tl.sum(x * x, 1)
    tl.store(inverse_ptr + rows, 1 / tl.sqrt(total + EPS), mask=rows < count)


@triton.jit
def scores_kernel(q_ptr, k_ptr, inverse_q_ptr, inverse_k_ptr, groups_ptr, positive_ptr, negative_ptr, pairs, keys,
                  dims, share, scale, GROUPS: tl.constexpr, NONE_YET: tl.constexpr, ROWS: tl.constexpr,
                  COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    "Score of each query with its own key (N,), and log-sum-exp of those of a share of others (shares, N)"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, keys)
    factor = tl.load(inverse_q_ptr + rows, mask=rows < pairs, other=0.) * scale
    if GROUPS: group = tl.load(groups_ptr + rows, mask=rows < pairs, other=0)
    top = tl.full((ROWS,), NONE_YET, tl.float32)
    total, positive = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, COLS):
        cols = start + tl.arange(0, COLS)
        s = products(q_ptr, k_ptr, rows, cols, pairs, last, dims, ROWS, COLS, DEPTH, PRECISION)
        s *= factor[:, None] * tl.load(inverse_k_ptr + cols, mask=cols < last, other=0.)[None, :]
        own = rows[:, None] == cols[None, :]
        positive += tl.sum(tl.where(own, s, 0.), 1)
        drop = own | (cols >= last)[None, :]
        if GROUPS:
            theirs = tl.load(groups_ptr + cols, mask=cols < pairs, other=0)
            drop |= (group[:, None] == theirs[None, :]) & (cols < pairs)[None, :]
        s = tl.where(drop, -float('inf'), s)
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    tl.store(negative_ptr + tl.program_id(1) * pairs + rows, top + tl.log2(total), mask=rows < pairs)
    tl.store(positive_ptr + rows, positive, mask=(rows < pairs) & (rows >= first) & (rows < last))


@triton.jit
def loss_kernel(positive_ptr, negative_ptr, loss_ptr, lse_ptr, pairs, shares, LN2: tl.constexpr, ROWS: tl.constexpr):
    "Loss and log-sum-exp of each query; the shares are added in their order"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < pairs
    positive = tl.load(positive_ptr + rows, mask=live, other=0.)
    negative = tl.load(negative_ptr + rows, mask=live, other=0.)
    for share in range(1, shares):
        more = tl.load(negative_ptr + share * pairs + rows, mask=live, other=0.)
        high, low = tl.maximum(negative, more), tl.minimum(negative, more)
        gap = tl.where(low == high, 0., low - high)                  # two shares without any key: 0, not nan
        negative = high + log1p(tl.exp2(gap)) / LN2
    gap = negative - positive
    rest = log1p(tl.exp2(-tl.abs(gap))) / LN2
    tl.store(loss_ptr + rows, (tl.maximum(gap, 0.) + rest) * LN2, mask=live)
    tl.store(lse_ptr + rows, tl.maximum(negative, positive) + rest, mask=live)


@triton.jit
def slopes_kernel(q_ptr, k_ptr, inverse_q_ptr, inverse_k_ptr, groups_ptr, loss_ptr, lse_ptr, grad_ptr, slopes_ptr,
                  first, last, pairs, dims, scale, temperature, GROUPS: tl.constexpr, ROWS: tl.constexpr,
                  COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    "Derivatives with respect to the similarities of all queries and the keys first..last - 1, (N, last - first)"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = first + tl.program_id(1) * COLS + tl.arange(0, COLS)
    live, there = rows < pairs, cols < last
    s = products(q_ptr, k_ptr, rows, cols, pairs, last, dims, ROWS, COLS, DEPTH, PRECISION)
    factor = tl.load(inverse_q_ptr + rows, mask=live, other=0.) * scale
    s *= factor[:, None] * tl.load(inverse_k_ptr + cols, mask=there, other=0.)[None, :]
    slope = tl.exp2(s - tl.load(lse_ptr + rows, mask=live, other=0.)[:, None])
    if GROUPS:
        group = tl.load(groups_ptr + rows, mask=live, other=0)
        theirs = tl.load(groups_ptr + cols, mask=there & (cols < pairs), other=0)
        slope = tl.where((group[:, None] == theirs[None, :]) & (cols < pairs)[None, :], 0., slope)
    # of its own key a query has its share less 1, exp(-loss) - 1 with its digits
    loss = tl.load(loss_ptr + rows, mask=live, other=0.)
    small = -loss * (1 - loss * (1 / 2 - loss * (1 / 6 - loss / 24)))
    own = tl.where(loss < .02, small, tl.exp(-loss) - 1)
    slope = tl.where(rows[:, None] == cols[None, :], own[:, None], slope)
    slope *= (tl.load(grad_ptr + rows, mask=live, other=0.) / temperature)[:, None]
    place = slopes_ptr + rows[:, None].to(tl.int64) * (last - first) + (cols - first)[None, :]
    tl.store(place, slope, mask=live[:, None] & there[None, :])


@triton.jit
def product_kernel(slopes_ptr, x_ptr, inverse_ptr, out_ptr, height, width, dims, TRANSPOSED: tl.constexpr,
                   ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Slopes (height, width), or their transpose, times the rows of x scaled to length one.

    Into float32 `out`, (height, dims) or (width, dims), or added to what is there.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = tl.program_id(1) * COLS + tl.arange(0, COLS)
    count = width if TRANSPOSED else height
    length = height if TRANSPOSED else width
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, length, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        if TRANSPOSED: slopes = tl.trans(read_rows(slopes_ptr, depth, length, rows, count))
        else: slopes = read_rows(slopes_ptr, rows, count, depth, length)
        x = read_rows(x_ptr, depth, length, held, dims)
        x *= tl.load(inverse_ptr + depth, mask=depth < length, other=0.)[:, None]
        total = tl.dot(slopes, x, total, input_precision=PRECISION)
    place = out_ptr + rows[:, None].to(tl.int64) * dims + held[None, :]
    inside = (rows < count)[:, None] & (held < dims)[None, :]
    if ADD: total += tl.load(place, mask=inside, other=0.)
    tl.store(place, total, mask=inside)


@triton.jit
def across_kernel(grad_ptr, x_ptr, inverse_ptr, out_ptr, count, dims, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    "Gradient of rows x from that of the rows scaled to length one: only what is across a row turns it"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inverse = tl.load(inverse_ptr + rows, mask=rows < count, other=0.)
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dims, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        along += tl.sum(read_rows(grad_ptr, rows, count, depth, dims) * read_rows(x_ptr, rows, count, depth, dims), 1)
    along *= inverse * inverse
    for start in range(0, dims, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        grad = (read_rows(grad_ptr, rows, count, depth, dims)
                - along[:, None] * read_rows(x_ptr, rows, count, depth, dims))
        place = out_ptr + rows[:, None].to(tl.int64) * dims + depth[None, :]
        inside = (rows < count)[:, None] & (depth < dims)[None, :]
        tl.store(place, (grad * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------- launchers

def forward(
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D); key i belongs to query i
    groups: Tensor | None,    # (N,) integers
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:   # (N,), (N,), (N,), (N + M,)
    "Compute the loss, log2-sum-exp2 of the scores, and the inverse norms of queries and keys"
    q, k = queries.contiguous(), keys.contiguous()
    pairs, dims = q.shape
    tile = tile_of(TILES, pairs)
    loss, lse, positive = (q.new_empty(pairs, dtype=torch.float32) for _ in range(3))
    blocks = triton.cdiv(pairs, tile.rows)
    share = share_of(triton.cdiv(len(k), tile.columns), blocks) * tile.columns
    shares = triton.cdiv(len(k), share)
    negative = loss.new_empty(shares, pairs)
    with on_device(q):
        inverse_q, inverse_k = (_inverse_norms(x, normalize) for x in (q, k))
        scores_kernel[blocks, shares](
            q, k, inverse_q, inverse_k, pointer(groups, q), positive, negative, pairs, len(k), dims, share,
            LOG2E / temperature, GROUPS=groups is not None, NONE_YET=NONE_YET,
            PRECISION=_precision(q, k), **_blocks(tile), **tile.options)
        loss_kernel[triton.cdiv(pairs, ROWS),](positive, negative, loss, lse, pairs, shares, 1 / LOG2E, ROWS)
    return loss, lse, inverse_q, inverse_k


def backward(
    grad: Tensor,             # (N,), of the loss
    queries: Tensor,          # (N, D)
    keys: Tensor,             # (N + M, D); key i belongs to query i
    groups: Tensor | None,    # (N,) integers
    saved: list[Tensor],      # what `forward` returned
    temperature: float,
    normalize: bool,
    need: list[bool],         # of queries, of keys
) -> tuple[Tensor, Tensor]:   # (N, D), (N + M, D), empty where not needed
    "Compute the gradients of queries and keys"
    loss, lse, inverse_q, inverse_k = saved
    q, k, grad = queries.contiguous(), keys.contiguous(), grad.to(torch.float32).contiguous()
    pairs, dims = q.shape
    # a multiple of the least, so that what is cut off begins at an aligned address
    strip = min(triton.cdiv(pairs, 8 * STRIP[0]) * STRIP[0], STRIP[1])
    slopes = loss.new_empty(pairs * min(strip, len(k)))
    sums = [loss.new_empty(x.shape if wanted else 0) for x, wanted in zip((q, k), need)]
    with on_device(q):
        for first in range(0, len(k), strip):
            last = min(first + strip, len(k))
            part, width = slice(first, last), last - first
            tile = tile_of(TILES, pairs)
            slopes_kernel[triton.cdiv(pairs, tile.rows), triton.cdiv(width, tile.columns)](
                q, k, inverse_q, inverse_k, pointer(groups, q), loss, lse, grad, slopes, first, last, pairs, dims,
                LOG2E / temperature, temperature, GROUPS=groups is not None, PRECISION=_precision(q, k),
                **_blocks(tile), **tile.options)
            if need[0]: _multiply(slopes, k[part], inverse_k[part], sums[0], pairs, width, ADD=first > 0)
            if need[1]: _multiply(slopes, q, inverse_q, sums[1][part], pairs, width, TRANSPOSED=True)
        return (_through_norm(sums[0], q, inverse_q, normalize and need[0]),
                _through_norm(sums[1], k, inverse_k, normalize and need[1]))


def _multiply(slopes: Tensor, x: Tensor, inverse: Tensor, out: Tensor, height: int, width: int, *,
              TRANSPOSED: bool = False, ADD: bool = False) -> None:
    "Launch `product_kernel`"
    tile, dims = tile_of(TILES, len(out)), x.shape[1]
    product_kernel[triton.cdiv(len(out), tile.rows), triton.cdiv(dims, tile.columns)](
        slopes, x, inverse, out, height, width, dims, TRANSPOSED=TRANSPOSED, ADD=ADD,
        PRECISION=float32_product(x.device), **_blocks(tile), **tile.options)


def _inverse_norms(x: Tensor, normalize: bool) -> Tensor:   # (N,)
    inverse = x.new_ones(len(x), dtype=torch.float32)
    if normalize: norms_kernel[triton.cdiv(len(x), ROWS),](x, inverse, *x.shape, EPS, ROWS, DEPTH)
    return inverse


def _through_norm(grad: Tensor, x: Tensor, inverse: Tensor, normalize: bool) -> Tensor:
    if not normalize: return grad.to(x.dtype)
    out = torch.empty_like(x)
    across_kernel[triton.cdiv(len(x), ROWS),](grad, x, inverse, out, *x.shape, ROWS, DEPTH)
    return out


def _blocks(tile: Tile) -> dict[str, Any]: return tile.blocks('ROWS', 'COLS', 'DEPTH')


def _precision(*operands: Tensor) -> str:
    "The `input_precision` that keeps float32 in a product of these: a bfloat16 or float16 fits into one TF32"
    best = float32_product(operands[0].device)
    short = all(x.dtype in (torch.bfloat16, torch.float16) for x in operands)
    return 'tf32' if short and best == 'tf32x3' else best


# -------------------------------------------------------------------------------- resources

def _variants(kind: str, scores: str) -> list[Variant]:
    "What the launchers above compile for rows of a kind, with scores of a precision"
    found, rows = [], dict(ROWS=ROWS, DEPTH=DEPTH)
    types = dict(q_ptr=f'*{kind}', k_ptr=f'*{kind}', x_ptr=f'*{kind}', groups_ptr='*i64', scale='fp32',
                 temperature='fp32')

    def add(name: str, kernel, constants: dict, types: dict[str, str] = types, **options: Any):
        found.append(variant(f'info_nce {name}', kernel, constants, types, **options))

    for tile in TILES.values():
        name, blocks = f'{tile.rows}x{tile.columns}x{tile.depth} {kind}', _blocks(tile)
        scored = dict(blocks, GROUPS=True, PRECISION=scores)
        add(f'scores {name}', scores_kernel, dict(scored, NONE_YET=NONE_YET), **tile.options)
        add(f'slopes {name}', slopes_kernel, scored, **tile.options)
        for side in 'queries', 'keys':
            add(f'{side} {name}', product_kernel, dict(blocks, TRANSPOSED=side == 'keys', ADD=side == 'queries',
                                                       PRECISION='tf32x3'), **tile.options)
    add(f'norms {kind}', norms_kernel, dict(rows, EPS=EPS))
    add(f'across {kind}', across_kernel, rows, types | dict(out_ptr=f'*{kind}'))
    return found


VARIANTS = [*_variants('fp32', 'tf32x3'), *_variants('bf16', 'tf32'),
            variant('info_nce loss', loss_kernel, dict(LN2=1 / LOG2E, ROWS=ROWS))]
