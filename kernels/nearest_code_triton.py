"""`search`: the nearest code in Triton.

A program holds BLOCK_N frames and goes over tiles of BLOCK_K codes, keeping the best score of
each frame and where it stood. To fill the GPU with few frames, the codes are dealt out to
several programs; their winners are compared in the order of the codes, which changes no bit.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .frames_and_codes_triton import DEPTH, aligned, deep_of, products
from .launch import Tile, on_device, share_of, tile_of
from .resources import variant

#: No index of a code: larger than each
FAR = tl.constexpr(2**31 - 1)
#: From this many frames on: the tile of frames and codes
TILES = {0: Tile(64, 64, DEPTH.value, 4, 3), 8192: Tile(128, 64, DEPTH.value, 8, 3)}


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
    "Find the code of the best score of each frame, the lowest index of equals"
    n, k = len(frames), len(codes)
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=frames.device)
    tile = tile_of(TILES, n)
    blocks = triton.cdiv(n, tile.rows)
    share = share_of(triton.cdiv(k, tile.columns), blocks) * tile.columns
    shares = triton.cdiv(k, share)
    best = frames.new_empty(shares, n)
    index = torch.empty(shares, n, dtype=torch.int32, device=frames.device)
    frames, shift, codes = aligned(frames), aligned(shift), aligned(codes)
    with on_device(frames):
        nearest_kernel[blocks, shares](frames, shift, codes, half, best, index, n, k, deep_of(codes), share,
                                       **tile.blocks('BLOCK_N', 'BLOCK_K'), **tile.options)
    if shares > 1:
        index = index.gather(0, best.argmax(0, keepdim=True))   # the first of equals
    return index[0].long()


VARIANTS = [
    variant(f'nearest_code {tile.rows}x{tile.columns}', nearest_kernel, tile.blocks('BLOCK_N', 'BLOCK_K'),
            dict(index_ptr='*i32'), **tile.options)
    for tile in TILES.values()
]
