"""Time steps side by side with events of the device, and write what came out: `Run`, `interleaved`, `race`.

Imports torch, and makes `speechloss.kernels` importable where the package is not installed.
"""
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from . import common, gpu_rows
from .common import DEVICE, ROOT, Contest, own_peak, ready, saved_mb


def provide_kernels() -> None:
    """Make `speechloss.kernels` importable from a checkout in which nothing is installed.

    The kernels live in the folder `kernels/` and an installation puts them inside the package.
    They need torch and Triton alone, while most of `speechloss` wants libraries for sound files
    that a bare machine with a GPU may lack. So the folder is registered under its full name.
    """
    import speechloss
    name = 'speechloss.kernels'
    if name in sys.modules or importlib.util.find_spec(name): return
    folder = ROOT / 'kernels'
    spec = importlib.util.spec_from_file_location(name, folder / '__init__.py',
                                                  submodule_search_locations=[str(folder)])
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    speechloss.kernels = module


provide_kernels()

#: Of products: in TF32, in float16 or bfloat16, and in float32 without tensor cores
KINDS = 'tf32', 'half', 'float32'
#: By name of the device, the first that is contained: bytes a second, then dense products a second of
#: each of KINDS; published by NVIDIA
PUBLISHED = {
    'H200': (4.8e12, 495e12, 990e12, 67e12),
    'H100 PCIe': (2.0e12, 378e12, 756e12, 51e12),
    'H100 NVL': (3.9e12, 418e12, 835e12, 60e12),
    'H100': (3.35e12, 495e12, 990e12, 67e12),
    'A100-SXM4-40GB': (1.555e12, 156e12, 312e12, 19.5e12),
    'A100-PCIE-40GB': (1.555e12, 156e12, 312e12, 19.5e12),
    'A100 80GB PCIe': (1.935e12, 156e12, 312e12, 19.5e12),
    'A100': (2.039e12, 156e12, 312e12, 19.5e12),
    'L4': (.3e12, 60e12, 121e12, 30.3e12),
    'RTX 4090': (1.008e12, 82.6e12, 165.2e12, 82.6e12),
}


def published(device: str) -> tuple[float, float, float, float] | None:
    "Return the published rates of a device, None for one that is not in the table"
    # L40 and L4 differ: a name is compared word by word where it is one word
    words = device.replace('-', ' ').split()
    for name, rates in PUBLISHED.items():
        if name in device if ' ' in name or '-' in name else name in words: return rates
    return None


@dataclass(frozen=True)
class Work:
    "What a step has to do at least: the model behind `roofline_pct`"
    bytes: float = 0.
    flops: float = 0.     # of products; with three products for one, all three
    products: str = 'tf32'   # one of KINDS

    def row(self, ms: float, rates: tuple | None) -> dict:
        "Return the columns about the roofline"
        found = dict(bytes_modelled=self.bytes or '', flops_modelled=self.flops or '')
        if rates is None or not (self.bytes or self.flops): return found
        memory, products = self.bytes / rates[0], self.flops / rates[1 + KINDS.index(self.products)]
        return found | dict(roofline_pct=100e3 * max(memory, products) / ms,
                            bound='memory' if memory >= products else 'compute')


@dataclass
class Run:
    "One part of the script: its table, its time, and the machine"
    part: str
    table: Path
    deadline: float                 # of `time.time`
    dry: bool = False
    machine: dict = field(default_factory=common.machine)
    cut: int = 0                    # pieces of work that found no time
    failed: int = 0                 # that raised, or were wrong

    @property
    def rates(self) -> tuple | None: return published(self.machine['gpu'])

    @property
    def backend(self) -> str: return 'triton'   # on a GPU, and in the interpreter of the dry run

    def left(self) -> float: return self.deadline - time.time()

    def write(self, status: str = 'ok', **row) -> None:
        "Append a row and print it"
        row = dict(part=self.part, status=status) | row | self.machine
        self.failed += status in ('failed', 'wrong')
        gpu_rows.append(self.table, row)
        print(gpu_rows.line(row), flush=True)

    def attempt(self, work: Callable, needs: float = 1., **row):
        "Do a piece of work and return its result; what it raises becomes a row, and the result is None"
        if self.left() < needs:
            self.cut += 1
            return None
        try: return work()
        except Exception as error:
            self.write('failed', note=told(error), **row)
            if 'CUDA error' in str(error): raise   # nothing works in this process any more
            if DEVICE == 'cuda': torch.cuda.empty_cache()
            return None

    def close(self) -> None:
        "Say how much there was no time for"
        if self.cut: self.write('cut', note=f'no time was left for {self.cut} pieces of work')


def told(error: BaseException) -> str:
    "Return an error in one line"
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


@contextmanager
def stft_method(method: str | None) -> Iterator[None]:
    "Let the STFT kernel take one of its two methods for every resolution; None: as its table says"
    before = os.environ.pop('SPEECHLOSS_STFT', None)
    if method: os.environ['SPEECHLOSS_STFT'] = method
    try: yield
    finally:
        os.environ.pop('SPEECHLOSS_STFT', None)
        if before is not None: os.environ['SPEECHLOSS_STFT'] = before


# ------------------------------------------------------------------------------------ timing

def synchronize() -> None:
    if DEVICE == 'cuda': torch.cuda.synchronize()


@cache
def _scratch() -> torch.Tensor:
    "Twice the cache of the GPU: what is written there pushes everything else out"
    size = getattr(torch.cuda.get_device_properties(0), 'L2_cache_size', 0)
    return torch.empty(max(2 * size, 64 << 20), dtype=torch.int8, device=DEVICE)


class _Stopwatch:
    "Milliseconds of steps: events of the device, with its cache emptied before each; a clock on a CPU"
    def __init__(self): self.events = []

    def time(self, step: Callable) -> None:
        if DEVICE != 'cuda':
            start = time.perf_counter()
            step()
            self.events.append((start, time.perf_counter()))
            return
        _scratch().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        self.events.append((start, end))

    def read(self) -> np.ndarray:
        synchronize()
        if DEVICE != 'cuda': return np.array([1e3 * (end - start) for start, end in self.events])
        return np.array([start.elapsed_time(end) for start, end in self.events])


def interleaved(run: Run, steps: dict[str, Callable], seconds: float = 2.) -> dict[str, np.ndarray]:
    """Return milliseconds of steps that take turns, forth and back, so that a drift of the clock cancels.

    They are warm already. At least 20 rounds, up to 100 while `seconds` last; TimeoutError where
    not even the 20 fit into the time of the part. One round in the dry run.
    """
    least, most = (1, 1) if run.dry else (20, 100)
    synchronize()
    start = time.perf_counter()
    for step in () if run.dry else steps.values(): step()
    synchronize()
    one = time.perf_counter() - start
    if least * one > run.left():
        raise TimeoutError(f'{least} rounds would take {least * one:.0f} s and {run.left():.0f} s are left')
    watches = {name: _Stopwatch() for name in steps}
    for turn in range(int(min(most, max(least, seconds / max(one, 1e-6))))):
        for name in list(steps)[::1 if turn % 2 == 0 else -1]: watches[name].time(steps[name])
    return {name: watch.read() for name, watch in watches.items()}


def time_row(ms: np.ndarray, base: np.ndarray | None = None, versus: str = '') -> dict:
    "Return the columns about time; `base` are those of the rival `versus` in the same rounds"
    p20, p50, p80 = (float(x) for x in np.percentile(ms, (20, 50, 80)))
    row = dict(ms_min=float(ms.min()), ms_p20=p20, ms_p50=p50, ms_p80=p80, ms_max=float(ms.max()), rounds=len(ms))
    return row if base is None else row | dict(versus=versus, faster=float(np.median(base)) / p50)


def warmed(step: Callable) -> float:
    "Run a step, and on a GPU twice more; return the seconds of the first, which compiles"
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - start
    for _ in range(2 if DEVICE == 'cuda' else 0): step()
    synchronize()
    return first


def captured(step: Callable) -> tuple[Callable, object]:
    "Capture a step in a CUDA graph; return what replays it, and its result, which a replay writes anew"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): result = step()

    def replay(held=(step, result)):   # a graph does not keep alive the tensors that it reads
        graph.replay()
    return replay, result


def compiled(run: Run, function: Callable) -> Callable:
    "`torch.compile`; the dry run stops before the compiler of machine code, which takes minutes there"
    return torch.compile(function, backend='eager') if run.dry else torch.compile(function, dynamic=False)


# ----------------------------------------------------------------------------------- a contest

def race(run: Run, contest: Contest, work: dict[str, Work], late: dict[str, Callable] | None = None) -> None:
    """Write the rows of a contest: time, memory, share of the roofline, error of each provider.

    The first provider is the rival whom the others are compared with. Those in `late` take long
    to compile: the others' rows are written first, then each runs against the first provider.
    """
    about = dict(op=contest.op, config=contest.config, shape=contest.shape, dtype=contest.dtype,
                 mode='full' if contest.backward else 'fwd')
    contest.providers = dict(contest.providers)
    inputs = run.attempt(lambda: ready(contest), **about)
    if inputs is None: return
    truth = run.attempt(lambda: _truth(contest, inputs), provider='float64', **about)
    base = next(iter(contest.providers))
    firsts = _warm(run, contest, list(contest.providers), inputs, about)
    _compared(run, contest, firsts, base, inputs, truth, work, about)
    for name, provider in (late or {}).items():
        contest.providers[name] = provider
        first = _warm(run, contest, [name], inputs, about)
        if first and base in firsts:
            _compared(run, contest, {base: firsts[base]} | first, base, inputs, truth, work, about, only=name)


def _warm(run: Run, contest: Contest, names: list[str], inputs: tuple, about: dict) -> dict[str, float]:
    "Seconds of the first call of the providers that work"
    firsts = {name: run.attempt(lambda name=name: warmed(lambda: contest.step(name, inputs)), provider=name, **about)
              for name in names}
    return {name: first for name, first in firsts.items() if first is not None}


def _compared(run: Run, contest: Contest, firsts: dict[str, float], base: str, inputs: tuple, truth: tuple | None,
              work: dict[str, Work], about: dict, only: str = '') -> None:
    if not firsts: return
    times = run.attempt(lambda: interleaved(run, {name: lambda name=name: contest.step(name, inputs)
                                                  for name in firsts}), provider=only or 'all', **about)
    for name in [only] if only else firsts:
        if times is None: return
        row = about | dict(provider=name, compile_s=firsts[name])
        row |= time_row(times[name], times.get(base), base)
        row |= work.get(name, Work()).row(row['ms_p50'], run.rates)
        more = run.attempt(lambda name=name: _errors(contest, name, inputs, truth) | _memory(contest, name), needs=0,
                           **about, provider=name)
        run.write(**row, **(more or {}))


def _truth(contest: Contest, inputs: tuple) -> tuple | None:
    "Loss and gradient of the same rounded inputs in float64"
    if contest.truth is None: return None
    assert callable(contest.truth)
    double = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    loss = contest.truth(*double)
    grad = torch.autograd.grad(loss, double[0])[0] if contest.backward else None
    return loss.detach(), grad


def _errors(contest: Contest, name: str, inputs: tuple, truth: tuple | None) -> dict:
    if truth is None or name in contest.unlike: return {}
    value, own = contest.step(name, inputs)
    found = dict(loss_err=relative(value.detach(), truth[0]))
    return found if truth[1] is None else found | dict(grad_err=relative(own, truth[1]))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    "Return the relative L2 error"
    return float((found.double() - right).norm() / right.norm().clamp_min(1e-30))


def _memory(contest: Contest, name: str) -> dict:
    "Peak above the inputs, on a GPU alone, and what is kept for the backward pass"
    found = dict(peak_mb=own_peak(contest, name)) if DEVICE == 'cuda' else {}
    return found | (dict(saved_mb=saved_mb(contest, name)) if contest.backward else {})


def both_ways(run: Run, contest: Contest, work: Callable[[bool], dict[str, Work]],
              late: dict[str, Callable] | None = None) -> None:
    "Race with the backward pass, then without; `late` ones, which would compile twice, with it alone"
    race(run, replace(contest, backward=True), work(True), late)
    race(run, replace(contest, backward=False), work(False))
