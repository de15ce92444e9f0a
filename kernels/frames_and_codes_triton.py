"""What the Triton kernels of frames and codes share: `read_frames`, `products`, `aligned`, `deep_of`.

All of them read DEPTH dimensions at a time and take `deep = D / DEPTH`, after padding with
zeros: so the compiler knows that rows are aligned, and no dimension needs a mask.
"""
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

#: Dimensions that are read at a time
DEPTH = tl.constexpr(16)


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


def aligned(x: Tensor) -> Tensor:
    "Pad the last dimension with zeros up to a multiple of DEPTH; `x` itself if there is nothing to add"
    spare = -x.shape[-1] % DEPTH.value
    return F.pad(x, (0, spare)) if spare else x


def deep_of(codes: Tensor) -> int:
    "Return how many times DEPTH the dimensions of aligned codes are"
    return codes.shape[-1] // DEPTH.value
