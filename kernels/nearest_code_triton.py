"""The search for the nearest code, in Triton.

A program holds BLOCK_N frames and goes over tiles of BLOCK_K codes, keeping the best score of
each frame and where it stood. To fill the GPU with few frames, the codes are dealt out to
several programs; their winners are compared in the order of the codes, which changes no bit.

All kernels of codes read DEPTH dimensions at a time and take `deep = D / DEPTH`, after padding
with zeros: so the compiler knows that rows are aligned, and no dimension needs a mask.
"""
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .resources import Variant

#: Programs that a large GPU holds at once: with fewer, the codes are split
BUSY = 264
DEPTH = tl.constexpr(16)
FAR = tl.constexpr(2**31 - 1)


class Tile(NamedTuple):
    "Frames and codes that a program multiplies at a time, and how"
    n: int
    k: int
    warps: int
    stages: int


#: From this many frames on: the tile
TILES = {0: Tile(64, 64, 4, 3), 8192: Tile(128, 64, 8, 3)}


@triton.jit
def read_frames(x_ptr, shift_ptr, rows, live, depth, deep):
    "x - shift, (rows, depth); 0 for rows that are not live and beyond the last dimension"
    keep = live[:, None] & (depth < deep * DEPTH)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * (deep * DEPTH) + depth[None, :], mask=keep, other=0.)
    shift = tl.load(shift_ptr + depth, mask=depth < deep * DEPTH, other=0.)
    return tl.where(keep, x - shift[None, :], 0.)


@triton.jit
def products(x_ptr, shift_ptr, c_ptr, rows, live, columns, k, deep, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    "Scalar products (BLOCK_N, BLOCK_K) of frames and codes, to float32"
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    here = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * (deep * DEPTH) + here[None, :]
    c_ptrs = c_ptr + columns[None, :] * (deep * DEPTH) + here[:, None]
    for j in range(deep):
        x = tl.load(x_ptrs + j * DEPTH, mask=live[:, None], other=0.)
        x = tl.where(live[:, None], x - tl.load(shift_ptr + here + j * DEPTH)[None, :], 0.)
        c = tl.load(c_ptrs + j * DEPTH, mask=(columns < k)[None, :], other=0.)
        total = tl.dot(x, c, total, input_precision='tf32x3')
    return total


@triton.jit
def nearest_kernel(x_ptr, shift_ptr, c_ptr, half_ptr, best_ptr, index_ptr, n, k, deep, share,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    "The best of `share` codes, from the share of this program on: best and index, (shares, n)"
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * share
    best = tl.full((BLOCK_N,), -float('inf'), tl.float32)
    found = tl.zeros((BLOCK_N,), tl.int32) + first
    for start in range(first, tl.minimum(first + share, k), BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        score = products(x_ptr, shift_ptr, c_ptr, rows, rows < n, columns, k, deep, BLOCK_N, BLOCK_K)
        score -= tl.load(half_ptr + columns, mask=columns < k, other=float('inf'))[None, :]
        high = tl.max(score, 1)
        at = tl.min(tl.where(score == high[:, None], columns[None, :], FAR), 1)  # the first of equals
        better = high > best                                                     # and it stays
        best, found = tl.where(better, high, best), tl.where(better, at, found)
    place = tl.program_id(1).to(tl.int64) * n + rows
    tl.store(best_ptr + place, best, mask=rows < n)
    tl.store(index_ptr + place, found, mask=rows < n)


def search(
    frames: Tensor,  # (N, D) float32, contiguous
    codes: Tensor,   # (K, D) less the shift, contiguous
    half: Tensor,    # (K,) to take from the products
    shift: Tensor,   # (D,) to take from the frames
) -> Tensor:         # (N,) int64
    "Index of the best score of each frame, the lowest of equals"
    n, k = len(frames), len(codes)
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=frames.device)
    tile = tile_of(n)
    blocks, tiles = triton.cdiv(n, tile.n), triton.cdiv(k, tile.k)
    share = triton.cdiv(tiles, min(tiles, triton.cdiv(BUSY, blocks))) * tile.k
    shares = triton.cdiv(k, share)
    best = frames.new_empty(shares, n)
    index = torch.empty(shares, n, dtype=torch.int32, device=frames.device)
    frames, shift, codes = aligned(frames), aligned(shift), aligned(codes)
    with on_device(frames):
        nearest_kernel[blocks, shares](frames, shift, codes, half, best, index, n, k, deep_of(codes), share,
                                       tile.n, tile.k, num_warps=tile.warps, num_stages=tile.stages)
    if shares > 1:
        index = index.gather(0, best.argmax(0, keepdim=True))   # the first of equals
    return index[0].long()


def tile_of(n: int) -> Tile:
    "The tile for n frames"
    return TILES[max(start for start in TILES if start <= n)]


def aligned(x: Tensor) -> Tensor:
    "x with zeros in its last dimension up to a multiple of DEPTH; x itself if there are none to add"
    spare = -x.shape[-1] % DEPTH.value
    return F.pad(x, (0, spare)) if spare else x


def deep_of(codes: Tensor) -> int:
    "The dimensions of aligned codes, in DEPTH"
    return codes.shape[-1] // DEPTH.value


def on_device(x: Tensor):
    "Launches go to the GPU of the tensor; in the interpreter there is none"
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


FLOATS, INTS, BLOCKS = '*fp32', 'i32', ('BLOCK_N', 'BLOCK_K')
VARIANTS = [
    Variant(f'nearest_code {tile.n}x{tile.k}', nearest_kernel,
            dict(x_ptr=FLOATS, shift_ptr=FLOATS, c_ptr=FLOATS, half_ptr=FLOATS, best_ptr=FLOATS, index_ptr='*i32',
                 n=INTS, k=INTS, deep=INTS, share=INTS) | dict.fromkeys(BLOCKS, 'constexpr'),
            dict(zip(BLOCKS, tile[:2])), num_warps=tile.warps, num_stages=tile.stages)
    for tile in TILES.values()
]
