"""What every benchmark shares: contests between providers, timed side by side, and their memory.

A benchmark is a module with `contests()`, a list of `Contest`. Its providers take turns, so that
what else the machine does hits all of them; memory is that of a fresh process that runs one
provider once. A time stands beside the error of its gradient against float64.
"""
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes import CDLL
from ctypes.util import find_library
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import speechloss

COLUMNS = ('op', 'config', 'shape', 'dtype', 'provider', 'mode', 'ms_p20', 'ms_p50', 'ms_p80', 'compile_s',
           'peak_mb', 'saved_mb', 'bytes_modelled', 'roofline_pct', 'grad_err', 'loss_err', 'gpu', 'driver',
           'torch', 'triton', 'speechloss', 'sha', 'date')
ROOT = Path(__file__).resolve().parents[1]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def speechlike(batch: int, samples: int = 64000) -> tuple[torch.Tensor, torch.Tensor]:
    "Enhanced and clean: noise with a falling spectrum and pauses at -80 dBFS; the one 10 dB off the other"
    waves = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.fft.rfft(torch.randn(batch, samples, generator=generator))
        spectrum /= 1 + torch.arange(spectrum.shape[-1]) ** 2 * 1e-7
        wave = torch.fft.irfft(spectrum, samples)
        wave *= .1 / wave.square().mean(-1, keepdim=True).sqrt()
        wave[:, samples // 3:samples // 2] *= 1e-3
        waves.append(wave.to(DEVICE))
    return waves[0] + .3 * waves[1], waves[0]


def noisy_pair(batch: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Enhanced and clean, white, 14 dB apart"
    draw = torch.Generator().manual_seed(0)
    clean = .1 * torch.randn(batch, samples, generator=draw)
    return (clean + .02 * torch.randn(batch, samples, generator=draw)).to(DEVICE), clean.to(DEVICE)


@dataclass
class Contest:
    "One point of the table: the same work done by several providers"
    op: str
    config: str
    shape: str
    inputs: Callable[[], tuple]                  # tensors of the work, on DEVICE; the first gets the gradient
    providers: dict[str, Callable]               # name -> loss of the inputs, a scalar
    truth: Callable | dict | None = None         # the loss on float64 inputs, plain; by provider where they differ
    backward: bool = True
    dtype: str = 'float32'
    bytes_modelled: float = 0.                   # least traffic to main memory
    gradients: int = 1                           # how many of the inputs get one
    unlike: tuple = ()                           # providers of a formula other than the truth's: no error
    extra: dict = field(default_factory=dict)    # columns already known

    def step(self, name: str, inputs: tuple):
        "Forward, and backward where there is one: (loss, first gradient)"
        for x in inputs[:self.gradients]: x.grad = None
        loss = self.providers[name](*inputs)
        if self.backward: loss.backward()
        return loss, inputs[0].grad


def ready(contest: Contest) -> tuple:
    inputs = contest.inputs()
    if contest.backward:
        for x in inputs[:contest.gradients]: x.requires_grad_()
    return inputs


def now() -> float:
    if DEVICE == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def race(contest: Contest, repeats: int) -> dict[str, np.ndarray]:
    "Milliseconds of each provider, taking turns"
    inputs = ready(contest)
    times = {name: [] for name in contest.providers}
    for turn in range(repeats + 1):
        for name in contest.providers:
            start = now()
            contest.step(name, inputs)
            if turn: times[name].append((now() - start) * 1e3)   # the first turn warms up
    return {name: np.array(t) for name, t in times.items()}


def errors(contest: Contest) -> dict[str, dict]:
    "Relative errors of loss and gradient against float64 of the same rounded input"
    if contest.truth is None: return {name: {} for name in contest.providers}
    inputs = ready(contest)
    double = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)

    @cache
    def right(truth):
        loss = truth(*double)
        return loss.detach(), torch.autograd.grad(loss, double[0])[0] if contest.backward else None

    found = {}
    for name in contest.providers:
        if name in contest.unlike:
            found[name] = {}
            continue
        loss, grad = right(contest.truth[name] if isinstance(contest.truth, dict) else contest.truth)
        value, own = contest.step(name, inputs)
        found[name] = dict(loss_err=float((value.detach().double() - loss).norm() / loss.norm()))
        if grad is not None: found[name]['grad_err'] = float((own.double() - grad).norm() / grad.norm())
    return found


def saved_mb(contest: Contest, name: str) -> float:
    "What the forward pass keeps for the backward pass beside the inputs, MB"
    inputs, kept = ready(contest), {}
    held = {x.untyped_storage().data_ptr() for x in inputs}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held: kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = contest.providers[name](*inputs)
    del loss
    return sum(kept.values()) / 1e6


def _status(key: str) -> float:   # MB
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key): return int(line.split()[1]) / 1024
    return float('nan')


def own_peak(contest: Contest, name: str) -> float:
    "Peak memory of one step above the inputs, MB; in a process of its own"
    inputs = ready(contest)
    if DEVICE == 'cuda':
        contest.step(name, inputs)
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        contest.step(name, inputs)
        return (torch.cuda.max_memory_allocated() - start) / 1e6
    # the first step on a slice loads libraries; what it freed goes back to the system, or a provider
    # that works in small pieces would find its memory there; then the high-water mark is put back
    small = tuple(x[:1].detach().requires_grad_(x.requires_grad) if x.is_floating_point() and x.ndim > 1 else x
                  for x in inputs)
    try: contest.step(name, small)
    except (RuntimeError, ValueError): pass
    gc.collect()
    if (libc := find_library('c')) and hasattr(CDLL(libc), 'malloc_trim'): CDLL(libc).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    start = _status('VmRSS')
    contest.step(name, inputs)
    return _status('VmHWM') - start


def peak_mb(module: str, index: int, name: str) -> float:
    "`own_peak` of a provider, asked of a fresh process; NaN where that fails"
    run = subprocess.run([sys.executable, '-m', 'benchmarks.run', '--threads', str(torch.get_num_threads()),
                          '--peak', module, str(index), name], cwd=ROOT, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else float('nan')


def machine() -> dict:
    "Where the rows come from"
    def of(package):
        try: return version(package)
        except Exception: return ''
    sha = _told('git', 'rev-parse', '--short', 'HEAD')
    if DEVICE == 'cuda':
        name = torch.cuda.get_device_name()
        driver = _told('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').split('\n')[0]
    else:
        name, driver = f'CPU {_processor()}, {torch.get_num_threads()} threads', ''
    return dict(gpu=name, driver=driver, torch=torch.__version__, triton=of('triton'),
                speechloss=speechloss.__version__,
                sha=sha, date=date.today().isoformat())


def _told(*command: str) -> str:
    "What a command prints; nothing where it is not installed"
    try: return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError: return ''


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor()


def measure(module: str, repeats: int) -> list[dict]:
    "The rows of a benchmark module"
    rows, where = [], machine()
    for index, contest in enumerate(import_module(f'benchmarks.{module}').contests()):
        times, wrong = race(contest, repeats), errors(contest)
        for name in contest.providers:
            p20, p50, p80 = np.percentile(times[name], (20, 50, 80))
            row = dict(op=contest.op, config=contest.config, shape=contest.shape, dtype=contest.dtype, provider=name,
                       mode='full' if contest.backward else 'fwd', ms_p20=p20, ms_p50=p50, ms_p80=p80,
                       peak_mb=peak_mb(module, index, name),
                       saved_mb=saved_mb(contest, name) if contest.backward else 0.,
                       bytes_modelled=contest.bytes_modelled)
            rows.append({column: (row | wrong[name] | contest.extra | where).get(column, '') for column in COLUMNS})
    return rows
