"""What a CUDA graph replays, beside what the same step gives without one."""
from collections.abc import Callable

import torch


def replayed(step: Callable) -> tuple:
    "(result of `step`, the same from a captured graph); the first calls compile and fill caches"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): expected = [step() for _ in range(2)][-1]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): found = step()
    graph.replay()
    return expected, found
