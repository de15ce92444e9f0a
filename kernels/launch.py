"""What the launchers of Triton kernels share: `Tile`, `tile_of`, `share_of`, `on_device`, `pointer`, `float32_product`.

Needs torch alone.
"""
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Programs that a large GPU holds at once (two on each of its 132 multiprocessors)
BUSY = 264


class Tile(NamedTuple):
    "What a program multiplies at a time, (rows, depth) with (depth, columns), and how it is compiled"
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def blocks(self, rows: str, columns: str, depth: str = '') -> dict[str, Any]:
        "Return the sizes as constants of a kernel, under the names that it has for them"
        found = {rows: self.rows, columns: self.columns}
        return found | {depth: self.depth} if depth else found

    @property
    def options(self) -> dict[str, Any]:
        "Warps and stages, as a launch takes them"
        return dict(num_warps=self.warps, num_stages=self.stages)


def tile_of(
    tiles: dict[int, Tile],   # from so many rows on: the tile
    rows: int,
) -> Tile:
    "Return the tile for a result of so many rows"
    return tiles[max(least for least in tiles if least <= rows)]


def share_of(
    tiles: int,              # that are dealt out
    programs: int,           # that work on each share
    most: int | None = None,   # shares; None: as many as there are tiles
) -> int:
    "Return how many tiles go to one share, so that there are shares enough to fill a large GPU"
    shares = min(tiles, -(-BUSY // programs), tiles if most is None else most)
    return -(-tiles // shares)


def on_device(x: Tensor) -> AbstractContextManager:
    "Send launches to the GPU of a tensor; do nothing for a CPU, where the interpreter runs"
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def pointer(x: Tensor | None, like: Tensor) -> Tensor:
    "Return `x`, contiguous; or, where there is none, a tensor in its place that the kernel does not read"
    return like if x is None else x.contiguous()


def capability(device: torch.device) -> int:
    "Return the compute capability of a device, 90 for 9.0; 0 where it is not one of CUDA"
    if device.type != 'cuda' or torch.version.cuda is None: return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def float32_product(device: torch.device) -> str:
    "Return the `input_precision` of `tl.dot` that keeps float32 on a device: three products of TF32 if it has TF32"
    return 'tf32x3' if capability(device) >= 80 else 'ieee'
