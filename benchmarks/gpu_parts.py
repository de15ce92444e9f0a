"""The parts of `gpu.py` that time: kernels beside their rivals, the crossing of two methods, a graph, a whole step."""
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from speechloss.kernels import info_nce, nearest_code, stft_distance, token_cross_entropy
from speechloss.kernels.framing import frame_count
from speechloss.kernels.launch import capability
from speechloss.kernels.stft_distance import Plan, Resolution
from speechloss.kernels.stft_triton_tables import LONGEST, METHODS, method_of

from . import contrastive as layers
from . import info_nce as plain_of
from .common import DEVICE, ROOT, Contest, speechlike
from .gpu_checks import DEFAULTS, TINY
from .gpu_measure import (
    Run, Work, both_ways, captured, compiled, interleaved, race, relative, stft_method, synchronize,
    time_row, told, warmed)
from .nearest_code import by_cdist_argmin, by_cosine, by_product, cross_entropy, tokens, trained


#: The STFT kernel by one of METHODS
OURS = tuple(f'speechloss-{method}' for method in METHODS)


def short(dtype: torch.dtype) -> str: return str(dtype)[6:]


# ------------------------------------------------------------------- what the device can do

def rates(run: Run) -> None:
    "Measure what the models of the other parts assume: a copy of memory, and products of matrices"
    size, side = (1 << 20, 64) if run.dry else (1 << 31, 8192)
    _rate(run, 'copy', f'{size}', 'int8', _copy(size), Work(bytes=2. * size))
    for name, dtype, tf32 in (('bfloat16', torch.bfloat16, False), ('tf32', torch.float32, True),
                              ('float32', torch.float32, False)):
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        _rate(run, 'product', f'{side}x{side}x{side}', name, lambda a=a, b=b: a @ b,
              Work(flops=2. * side ** 3, products='half' if name == 'bfloat16' else name))
    torch.backends.cuda.matmul.allow_tf32 = False


def _copy(size: int) -> Callable:
    source = torch.randint(-9, 9, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _rate(run: Run, config: str, shape: str, dtype: str, step: Callable, work: Work) -> None:
    about = dict(op='device', config=config, shape=shape, dtype=dtype, provider='torch', mode='fwd')

    def measured():
        warmed(step)
        row = time_row(interleaved(run, {'torch': step}, .5)['torch'])
        each, unit = (work.bytes, 'TB/s') if work.bytes else (work.flops, 'TFLOP/s')
        run.write(**about, **row, **work.row(row['ms_p50'], run.rates),
                  note=f"{each / row['ms_p50'] / 1e9:.4g} {unit}")
    run.attempt(measured, **about)


# ------------------------------------------------------------------------------ STFT distance

def _frame_counts(resolutions: tuple[Resolution, ...], samples: int) -> list[tuple[Resolution, int]]:
    return [(r, frame_count(samples, r.hop_length, r.n_fft)) for r in resolutions]


def stft_work(resolutions: tuple[Resolution, ...], batch: int, samples: int, method: str | None,
              backward: bool) -> Work:
    """Return what the STFT kernel has to move and to multiply, with one output and terms sc and log_l1.

    By the FFT: frames of two waves written and read, spectra written and read, twice for a
    gradient, whose spectrum goes through three passes and its frames through two. As a product:
    two waves are looked at, twice for a gradient; its spectrum and its frames are written and
    read; each product of float32 is three of float16, of the half table that folding leaves.
    """
    moved, flops = 3. * 4 * batch * samples, 0.
    for r, frames in _frame_counts(resolutions, samples):
        chosen = method or method_of(r, False, capability(torch.device(DEVICE)))
        if chosen == 'fft':
            each = 16 * r.n_fft + 32 * r.bins + (64 * r.bins + 8 * r.n_fft if backward else 0)
        else:
            each = 16 * r.bins + 8 * r.win_length if backward else 0
            flops += 3. * (5 if backward else 2) * 2 * r.win_length * r.bins * frames * batch
        moved += float(each) * frames * batch
    return Work(moved, flops, 'half')


def _eager_work(resolutions: tuple[Resolution, ...], batch: int, samples: int, backward: bool) -> Work:
    "Bytes for each bin of each frame as counted on a CPU, operation by operation, with the settings of auraloss"
    cells = batch * sum(r.bins * frames for r, frames in _frame_counts(resolutions, samples))
    return Work((646. if backward else 247.) * cells)


def stft_loss(resolutions: tuple[Resolution, ...], backend: str, method: str | None = None) -> Callable:
    "Return the loss of two batches of waves by one back end"
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return stft_distance(x, y, resolutions, weights=[1., 1.], backend=backend).values.mean()

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        with stft_method(method): return loss(x, y)
    return chosen if method else loss   # a compiler cannot trace a change of the environment


def _auraloss(run: Run) -> dict[str, Callable]:
    try: import auraloss
    except ImportError as error:
        run.write('skipped', op='stft_distance', provider='auraloss', note=told(error))
        return {}
    sizes = [(64, 75), (16, 20), (64, 51)] if run.dry else [(1024, 2048, 512), (120, 240, 50), (600, 1200, 240)]
    peer = auraloss.freq.MultiResolutionSTFTLoss(*sizes).to(DEVICE)
    return dict(auraloss=lambda x, y: peer(x[:, None], y[:, None]))


def stft(run: Run) -> None:
    "The usual three resolutions at B = 16 and 64 in float32, then one utterance, then bfloat16"
    peers = _auraloss(run)
    for batch, dtype in [(1, torch.float32)] if run.dry else [
            (16, torch.float32), (64, torch.float32), (1, torch.float32), (16, torch.bfloat16)]:
        full = dtype == torch.float32
        _stft_point(run, batch, dtype, peers if full else {}, late=full and (run.dry or batch > 1))


def _stft_point(run: Run, batch: int, dtype: torch.dtype, peers: dict[str, Callable], late: bool) -> None:
    resolutions, samples = (TINY, 120) if run.dry else (DEFAULTS, 64000)
    plain, methods = stft_loss(resolutions, 'reference'), dict(zip(('speechloss', *OURS), (None, *METHODS)))
    ours = {name: stft_loss(resolutions, run.backend, method) for name, method in methods.items()}

    def work(backward: bool) -> dict[str, Work]:
        found = {name: stft_work(resolutions, batch, samples, method, backward) for name, method in methods.items()}
        return found | dict.fromkeys(('torch', 'auraloss'), _eager_work(resolutions, batch, samples, backward))
    contest = Contest(
        'stft_distance', 'mrstft', f'{batch}x{samples}', lambda: tuple(x.to(dtype) for x in speechlike(batch, samples)),
        {'torch': plain, **peers, **ours, 'speechloss-torch': stft_loss(resolutions, 'torch')}, plain,
        dtype=short(dtype), unlike=('auraloss',))
    both_ways(run, contest, work, {'compile': compiled(run, plain)} if late else {})


# ------------------------------------------------------------------- features and codebooks

def contrastive(run: Run) -> None:
    "The layers of a WavLM-base with two negatives"
    if run.dry: layers.LAYERS, layers.FRAMES, layers.DIM = 1, 5, 9
    for batch, distance, dtype in [(1, 'l1', torch.float32)] if run.dry else [
            *((batch, distance, torch.float32) for batch in (16, 64) for distance in layers.DISTANCES),
            (16, 'l1', torch.bfloat16)]:
        _contrastive_point(run, batch, distance, dtype)


def _contrastive_point(run: Run, batch: int, distance: str, dtype: torch.dtype) -> None:
    sizes, plain, width = (layers.LAYERS, layers.FRAMES, layers.DIM), layers.plain(distance), dtype.itemsize
    elements, counted = float(batch * math.prod(sizes)), distance == 'l1' and width == 4

    def work(backward: bool) -> dict[str, Work]:
        once = 2 + layers.NEGATIVES                               # enhanced, clean, negatives
        again = 2 / width + 1 if distance == 'l1' else once + 1   # signs there and back, or all; the gradient
        found = dict(speechloss=Work(width * elements * (once + (again if backward else 0))))
        # as counted on a CPU, operation by operation
        return found | (dict(torch=Work((180. if backward else 72.) * elements)) if counted else {})
    contest = Contest(
        'contrastive', f'{distance} K={layers.NEGATIVES}', 'x'.join(map(str, (batch, *sizes))),
        lambda: tuple(x.to(dtype) for x in layers.inputs(batch)),
        {'torch': plain, 'speechloss': layers.fused(distance, run.backend),
         'speechloss-torch': layers.fused(distance, 'torch')}, plain, gradients=sizes[0], dtype=short(dtype))
    both_ways(run, contest, work, {'compile': compiled(run, plain)} if counted else {})


def info_nce_part(run: Run) -> None:
    "Frames of a batch of 16 and of 64 utterances, then utterances"
    for N, D, dtype in [(9, 17, torch.float32), (9, 17, torch.bfloat16)] if run.dry else [
            (3184, 768, torch.float32), (12736, 768, torch.float32), (3184, 768, torch.bfloat16),
            (12736, 768, torch.bfloat16), (256, 256, torch.float32)]:
        _info_nce_point(run, N, D, dtype)


def _info_nce_point(run: Run, N: int, D: int, dtype: torch.dtype) -> None:
    width = dtype.itemsize

    def inputs() -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(N)
        q = torch.randn(N, D, generator=draw)
        return tuple(x.to(DEVICE, dtype) for x in (q, .5 * q + torch.randn(N, D, generator=draw)))

    def ours(backend: str) -> Callable:
        return lambda q, k: info_nce(q, k, temperature=plain_of.TEMPERATURE, backend=backend).mean()

    def work(backward: bool) -> dict[str, Work]:
        useful = 2. * N * N * D * (3 if backward else 1)   # what no formula can do without
        found = Work((6 if backward else 2) * width * float(N) * D, useful, 'half' if width == 2 else 'tf32')
        return dict.fromkeys(('torch', 'compile', 'speechloss', 'speechloss-torch'), found)
    plain = plain_of.plain
    contest = Contest(
        'info_nce', 'cosine', f'{N}x{D}', inputs,
        {'torch': plain, 'speechloss': ours(run.backend), 'speechloss-torch': ours('torch')}, plain, gradients=2,
        dtype=short(dtype))
    both_ways(run, contest, work, {'compile': compiled(run, plain)} if width == 4 else {})


def codes(run: Run) -> None:
    "Nearest code against cdist and argmin and against a product, then the cross-entropy of tokens"
    for sizes in [(17, 63, 31)] if run.dry else [(24000, 4096, 128), (24000, 2048, 32)]:
        for config, rivals, late, backward, gradients, products in _codes_points(run):
            n, k, d = sizes
            work = Work(4. * d * (n * (2 if backward else 1) + k), 2. * n * k * d * products)
            contest = Contest('nearest_code', config, f'{n}x{k}x{d}', partial(trained, *sizes), rivals,
                              next(iter(rivals.values())), backward, gradients=gradients)
            race(run, contest, dict.fromkeys([*rivals, *late], work), late)


def _codes_points(run: Run) -> Iterator[tuple]:
    "Config, providers, those to be compiled, whether backward, leaves, products of all frames and codes"
    def nearest(metric: str) -> Callable:
        return lambda x, c: nearest_code(x, c, metric=metric, backend=run.backend).distance.sum()

    def distilled(x: Tensor, c: Tensor) -> Tensor:
        return token_cross_entropy(x, c, tokens(x, c), backend=run.backend).sum()
    squared = {'cdist': by_cdist_argmin, 'product': by_product, 'speechloss': nearest('squared')}
    yield 'squared', squared, {'compile': compiled(run, by_product)}, False, 1, 1
    yield 'squared', squared, {}, True, 1, 1
    yield 'cosine', {'torch': by_cosine, 'speechloss': nearest('cosine')}, {}, False, 1, 1
    yield ('token cross-entropy', {'torch': cross_entropy, 'speechloss': distilled},
           {'compile': compiled(run, cross_entropy)}, True, 2, 3)


# ------------------------------------------------------------------------------- the crossing

def crossing(run: Run) -> None:
    "Each method of the STFT on one resolution, by window and batch; last what the table should say"
    grid = [(64, 16, 33), (64, 16, 64)] if run.dry else [
        (512, 50, 240), (256, 64, 256), (512, 80, 320), (512, 100, 400), (512, 128, 512), (1024, 120, 600),
        (1024, 64, 256), (2048, 240, 320), (1024, 256, 1024), (2048, 240, 1200)]
    here = capability(torch.device(DEVICE))
    for batch in (1,) if run.dry else (16, 64, 1):
        waves, won = speechlike(batch, 120 if run.dry else 64000), {}
        for sizes in grid:
            about = dict(op='stft_distance', config='/'.join(map(str, sizes)), shape=f'{batch}x{waves[0].shape[1]}',
                         dtype='float32', mode='full')
            better = run.attempt(partial(_crossed, run, Resolution(*sizes), waves, about), **about)
            if better is not None: won[sizes] = better
        run.write(op='stft_distance', config='rule of the two methods', shape=f'{batch}x{waves[0].shape[1]}',
                  note=f'gemm wins windows {_windows(won, True)} and loses {_windows(won, False)}; '
                       f'stft_triton_tables.LONGEST[{here}] is {LONGEST.get(here, 0)}')


def _windows(won: dict[tuple, bool], which: bool) -> str:
    return ' '.join(str(win) for win in sorted({sizes[2] for sizes, good in won.items() if good == which})) or 'none'


def _crossed(run: Run, resolution: Resolution, waves: tuple[Tensor, Tensor], about: dict) -> bool:
    "Write a row for each method, and return whether the product is faster"
    from speechloss.kernels import stft_triton   # here, since it needs triton
    plan, (batch, samples) = Plan((resolution,), ('sc', 'log_l1'), (1., 1.), filtered=(False,)), waves[0].shape
    steps = {method: partial(stft_triton.distance, *waves, None, [], plan, True, method) for method in METHODS}
    firsts = {method: warmed(step) for method, step in steps.items()}
    found = {method: step()[1] for method, step in steps.items()}
    times = interleaved(run, steps, 1.)
    for method, ms in times.items():
        row = time_row(ms, times['fft'], 'speechloss-fft')
        work = stft_work((resolution,), batch, samples, method, True)
        run.write(**about, provider=f'speechloss-{method}', compile_s=firsts[method], **row,
                  **work.row(row['ms_p50'], run.rates), note='difference of the gradients of the two methods '
                  f"{relative(found['gemm'], found['fft'].double()):.1e}")
    return float(np.median(times['gemm'])) < float(np.median(times['fft']))


# ------------------------------------------------------------------------------ a CUDA graph

def graph(run: Run) -> None:
    "Forward and backward of the STFT distance, called and replayed: what launches cost"
    resolutions, samples = (TINY, 120) if run.dry else (DEFAULTS, 64000)
    for batch in (1,) if run.dry else (1, 16, 64):
        waves = speechlike(batch, samples)
        waves[0].requires_grad_()
        about = dict(op='stft_distance', config='mrstft, CUDA graph', shape=f'{batch}x{samples}', dtype='float32',
                     mode='full')
        steps: dict[str, Callable] = {}
        notes, firsts = {}, {}
        for name, backend in {'torch': 'reference', 'speechloss': run.backend}.items():
            step = _gradient(stft_loss(resolutions, backend), *waves)
            first = run.attempt(partial(warmed, step), **about, provider=name)
            if first is None: continue
            steps[name], firsts[name] = step, first
            if DEVICE != 'cuda': run.write('skipped', **about, provider=f'{name} graph', note='a CPU has no graphs')
            elif replay := run.attempt(partial(_replayed, step), **about, provider=f'{name} graph'):
                steps[f'{name} graph'], notes[f'{name} graph'] = replay
        _turns(run, steps, firsts, about, notes)


def _gradient(loss: Callable, x: Tensor, y: Tensor) -> Callable: return lambda: torch.autograd.grad(loss(x, y), x)


def _replayed(step: Callable) -> tuple[Callable, str]:
    "A replay of a step, and whether it gives the same bits"
    called = [g.clone() for g in step()]
    replay, result = captured(step)
    for g in result: g.zero_()
    replay()
    synchronize()
    return replay, 'same bits as the call' if all(a.equal(b) for a, b in zip(called, result)) else 'other bits!'


def _turns(run: Run, steps: dict[str, Callable], firsts: dict[str, float], about: dict,
           notes: dict[str, str] | None = None, seconds: float = 2., only: Iterable[str] = ()) -> None:
    "Write the times of steps, or of some of them, that take turns, compared with the first"
    times = run.attempt(lambda: interleaved(run, steps, seconds), **about) if steps else None
    for name in (only or steps) if times else ():
        ms, base = times[name], next(iter(steps))
        note = (notes or {}).get(name, '')
        run.write('wrong' if 'other bits' in note else 'ok', **about, provider=name, compile_s=firsts.get(name, ''),
                  **time_row(ms, times[base], base), note=note)


# --------------------------------------------------------------------- a whole training step

class BareEnhancer(nn.Module):
    "A small enhancer of waves (B, T) in plain torch, for machines that lack what `speechloss.models` imports"
    def __init__(self, width: int = 64):
        super().__init__()
        self.encode = nn.Conv1d(1, width, 32, 16, padding=8)
        self.blocks = nn.ModuleList([nn.Conv1d(width, width, 3, padding=2 ** k, dilation=2 ** k) for k in range(6)])
        self.decode = nn.ConvTranspose1d(width, 1, 32, 16, padding=8)

    def forward(self, noisy: Tensor) -> Tensor:
        "Return the enhanced waves"
        coded = found = self.encode(noisy[:, None])
        for block in self.blocks: found = found + torch.relu(block(found))
        wave = self.decode(coded * torch.sigmoid(found))[:, 0, :noisy.shape[-1]]
        return nn.functional.pad(wave, (0, noisy.shape[-1] - wave.shape[-1]))


def _enhancer(dry: bool) -> tuple[Callable[[], nn.Module], str]:
    "What makes a model, and its name"
    try: from speechloss.models import enhancer
    except ImportError as error: return BareEnhancer, f'bare enhancer, as {told(error)}'
    preset = 'tiny' if dry else 'small'
    return lambda: enhancer(preset), f'speechloss enhancer {preset}'


class _Training:
    "A model, its optimiser and a batch: one call is a step, which returns the loss"
    def __init__(self, make: Callable[[], nn.Module], loss: Callable, batch: tuple[Tensor, Tensor],
                 compiled: Callable = lambda function: function):
        torch.manual_seed(0)
        self.model, self.batch = make().to(DEVICE).train(), batch
        self.optimiser = torch.optim.Adam(self.model.parameters(), 1e-3, capturable=DEVICE == 'cuda')
        self.forward = compiled(lambda noisy, clean: loss(self.model(noisy), clean))

    def __call__(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.forward(*self.batch)
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def training(run: Run) -> None:
    "Model, loss, backward and optimiser: with the loss in plain torch and ours; called, in a graph, compiled"
    make, name = _enhancer(run.dry)
    resolutions, batch, samples = (TINY[:1], 1, 600) if run.dry else (DEFAULTS, 16, 32000)
    clean = speechlike(batch, samples)[1]
    noisy = clean + .05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    about = dict(op='training step', config=name.split(',')[0], shape=f'{batch}x{samples}', dtype='float32',
                 mode='full')
    new = {kind: partial(_Training, make, stft_loss(resolutions, backend), (noisy, clean))
           for kind, backend in {'torch': 'reference', 'speechloss': run.backend}.items()}
    _curves(run, {kind: build() for kind, build in new.items()}, about, name)
    steps: dict[str, Callable] = {}
    firsts: dict[str, float] = {}

    def warm(kind: str, step: Callable) -> None:
        first = run.attempt(partial(warmed, step), **about, provider=kind)
        if first is not None: steps[kind], firsts[kind] = step, first
    for kind, build in new.items():
        warm(kind, build())
        if DEVICE != 'cuda': run.write('skipped', **about, provider=f'{kind} graph', note='a CPU has no graphs')
        elif replay := run.attempt(lambda build=build: captured(build())[0], **about, provider=f'{kind} graph'):
            steps[f'{kind} graph'] = replay
    _turns(run, steps, firsts, about, seconds=4.)
    for kind, build in new.items():
        steps.pop(f'{kind} graph', None)
        warm(f'{kind} compile', build(compiled=partial(compiled, run)))
    _turns(run, steps, firsts, about, seconds=4., only=[kind for kind in steps if kind not in new])


def _curves(run: Run, trainings: dict[str, _Training], about: dict, name: str) -> None:
    "Write how far apart the losses of the same steps are, and the peak memory of a step"
    found = {}
    count = 2 if run.dry else 100
    for kind, step in trainings.items():
        losses = run.attempt(lambda step=step: torch.stack([step() for _ in range(count)]).double().cpu(), **about,
                             provider=kind)
        if losses is None: return
        found[kind] = losses
        more = {}
        if DEVICE == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            more['peak_mb'] = (torch.cuda.max_memory_allocated() - before) / 1e6
        apart = relative(losses, found['torch'])
        run.write('ok' if apart < 1e-2 else 'wrong', **about | dict(config='loss curve'), provider=kind, **more,
                  loss_err=apart, loss_tol=1e-2,
                  note=f'{name}: loss {float(losses[0]):.4f} to {float(losses[-1]):.4f} in {count} steps')


# ------------------------------------------------------------------------------ pytest, last

class _Told:
    "What pytest would have from tests/conftest.py, which wants libraries that a bare machine lacks; a row a test"
    def __init__(self, run: Run): self.run, self.counts = run, dict(passed=0, failed=0, skipped=0)

    def pytest_configure(self, config) -> None:
        for marker in ('slow', 'cuda', 'interpreted'): config.addinivalue_line('markers', marker)

    def pytest_collection_modifyitems(self, items) -> None:
        import pytest
        for item in items:
            if DEVICE != 'cuda': item.add_marker(pytest.mark.skip(reason='no CUDA device'))

    def pytest_runtest_setup(self, item) -> None: torch.manual_seed(0)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != 'call' and report.outcome == 'passed': return
        self.counts[report.outcome] += 1
        if report.outcome == 'skipped': return
        self.run.write('ok' if report.outcome == 'passed' else 'failed', op='pytest', mode='',
                       config=report.nodeid.split('/')[-1], compile_s=float(report.duration),
                       note='' if report.outcome == 'passed' else ' '.join(str(report.longrepr).split())[-300:])


def tests(run: Run) -> None:
    "The tests that are marked for a GPU, in the time that is left"
    import pytest
    files = sorted((ROOT / 'tests').glob('test_kernel_*.py'))[:1 if run.dry else None]
    told_rows = _Told(run)
    with warnings.catch_warnings():
        pytest.main(['-q', '-m', 'cuda', '--noconftest', '-p', 'no:cacheprovider', '-o', 'addopts=', '--no-header',
                     '--tb=short', *map(str, files)], plugins=[told_rows])
    run.write(op='pytest', config='all', note=', '.join(f'{count} {name}' for name, count in told_rows.counts.items()))
