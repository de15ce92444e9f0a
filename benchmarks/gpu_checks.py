"""Compare every kernel on the device with torch in float64 on the CPU: `correctness`.

The rule is that of the tests: the error of value and gradient is at most twice that of plain torch
in float32 on the same device, plus a floor that the type of the numbers allows. Both errors are
against float64 of the same rounded input.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from speechloss.kernels import contrastive_ratio, info_nce, nearest_code, stft_distance, token_cross_entropy
from speechloss.kernels.contrastive import DISTANCES
from speechloss.kernels.nearest_code import METRICS
from speechloss.kernels.stft_distance import TERMS, Resolution

from .gpu_measure import DEVICE, Run, relative, stft_method

MRSTFT = ('sc', 'log_l1')
DEFAULTS = (Resolution(1024, 120, 600), Resolution(2048, 240, 1200), Resolution(512, 50, 240))
ODD = (Resolution(512, 128), Resolution(256, 64, window='hamming'), Resolution(400, 100), Resolution(96, 25, 75),
       Resolution(101, 30, window='blackman'), Resolution(64, 37, 33))
TINY = (Resolution(64, 16), Resolution(75, 20, 51, window='hamming'))   # for the interpreter
#: Relative L2 error that is forgiven beside twice that of float32: of the gradient, of the value
FLOORS = dict(stft_distance=(1e-4, 1e-5), contrastive=(1e-6, 1e-6), info_nce=(1e-6, 1e-6), nearest_code=(1e-5, 1e-6),
              token_loss=(1e-5, 1e-6))
#: Rounding of a gradient that is returned in a short type, and the factor that keeps it from underflow
ROUNDING = {torch.float64: (0., 1.), torch.float32: (0., 1.), torch.bfloat16: (4e-3, 1.),
            torch.float16: (1e-3, 2. ** 12)}
SHORT = torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Check:
    "A call of a kernel on drawn input"
    op: str
    config: str
    shape: str
    inputs: Callable[[], list[Tensor]]             # on the CPU, float32 and integers; drawn anew
    call: Callable[[list[Tensor], str], Tensor]    # (tensors, back end) -> values, one an item
    leaves: int = 1                                # how many of the inputs get a gradient
    dtype: torch.dtype = torch.float32
    method: str = ''                               # of the STFT: fft or gemm

    @property
    def about(self) -> dict:
        return dict(op=self.op, config=self.config, shape=self.shape, dtype=str(self.dtype)[6:], mode='full',
                    provider=f'speechloss-{self.method}' if self.method else 'speechloss')


def draw(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ the families

def _waves(*shape: int, seed: int = 0) -> list[Tensor]:
    "Enhanced and clean: noise with a falling spectrum and a pause at -80 dBFS, and white noise left in it"
    clean, noise = torch.randn(2, *shape, generator=draw(seed))
    spectrum = torch.fft.rfft(clean)
    clean = torch.fft.irfft(spectrum / (1 + torch.linspace(0, 40, spectrum.shape[-1]) ** 2), shape[-1])
    clean = .1 * clean / clean.square().mean(-1, keepdim=True).sqrt()
    clean[..., shape[-1] // 3:shape[-1] // 2] *= 1e-3
    return [clean + 3e-3 * noise, clean]


def stft_checks(dry: bool) -> Iterator[Check]:
    "Both methods; terms, lengths, a filter bank, channels, short types, the shortest wave"
    sets = dict(tiny=TINY) if dry else dict(defaults=DEFAULTS, odd=ODD)
    shapes = [(1, 150), (2, 97)] if dry else [(2, 16000), (3, 7919), (1, 1025)]

    def check(name, shape, terms=MRSTFT, method='', **options):
        def call(tensors, backend):
            lengths = dict(lengths=tensors[2]) if len(tensors) > 2 else {}
            x, y = (t.flatten(0, -2) for t in tensors[:2])
            return stft_distance(x, y, sets[name], terms, backend=backend, **lengths, **options).values
        text = f"{name}, {'all terms' if len(terms) > 2 else '+'.join(terms)}"
        return Check('stft_distance', text, 'x'.join(map(str, shape)), lambda: _waves(*shape), call, method=method)

    def with_lengths(base):
        size = int(base.shape.split('x')[-1])
        return replace(base, config=f'{base.config}, lengths', inputs=lambda: [
            *base.inputs(), torch.tensor([size, 2 * size // 3, size // 2 + 1][:int(base.shape.split('x')[0])])])
    name = next(iter(sets))
    for method in ('fft', 'gemm'): yield check(name, shapes[0], method=method)
    yield check(name, shapes[0])
    for dtype in SHORT: yield replace(check(name, shapes[0]), dtype=dtype)
    for method in ('fft', 'gemm'): yield with_lengths(check(name, shapes[1], method=method))
    for each in sets:
        for method in ('fft', 'gemm'): yield check(each, shapes[1], tuple(TERMS), method)
    yield check(name, (2, 3, shapes[1][1]) if not dry else (1, 2, 97))                                       # channels
    yield _filtered(next(iter(sets.values())), shapes[1])
    if dry: return
    for method in ('fft', 'gemm'):
        yield check('odd', shapes[1], method=method)
        yield check('defaults', shapes[2], method=method)
        yield replace(check('defaults', shapes[1], method=method), dtype=torch.bfloat16)


def _filtered(resolutions: tuple[Resolution, ...], shape: tuple[int, int]) -> Check:
    banks = [torch.rand(r.bins, 20, generator=draw(1)) for r in resolutions]

    def call(tensors, backend):
        x, y = tensors
        return stft_distance(x, y, resolutions, ('log_l1', 'lin_l1'), filters=[b.to(x) for b in banks], offset=1e-3,
                             backend=backend).values
    return Check('stft_distance', 'filter banks', 'x'.join(map(str, shape)), lambda: _waves(*shape), call)


def contrastive_checks(dry: bool) -> Iterator[Check]:
    "Each distance; layers that shrink, negatives, valid frames, short types"
    def check(distance, shape, layers, negatives, frames=False):
        shapes = [(shape[0], max(1, shape[1] - 3 * l), max(1, shape[2] - 2 * l)) for l in range(layers)]

        def inputs():
            g = draw()
            stacks = [[torch.randn(s, generator=g) for s in shapes] for _ in range(1 + negatives)]
            enhanced = [c + .3 * torch.randn(s, generator=g) for c, s in zip(stacks[0], shapes)]
            valid = [torch.linspace(max(1, s[1] // 3), s[1], s[0]).long() for s in shapes] if frames else []
            return [*enhanced, *(x for stack in stacks for x in stack), *valid]

        def call(tensors, backend):
            stacks = [tensors[k:k + layers] for k in range(0, layers * (2 + negatives), layers)]
            return contrastive_ratio(stacks[0], stacks[1], stacks[2:], distance=distance, backend=backend,
                                     frames=tensors[layers * (2 + negatives):] if frames else None)
        text = f"{distance} K={negatives}{', frames' if frames else ''}"
        return Check('contrastive', text, f"{shape[0]}x{layers}x{shape[1]}x{shape[2]}", inputs, call, layers)
    middle = (1, 7, 11) if dry else (2, 41, 401)
    for distance in DISTANCES: yield check(distance, middle, 2, 2)
    for dtype in SHORT:
        for distance in DISTANCES[:1] if dry else DISTANCES:
            yield replace(check(distance, middle, 2, 2, True), dtype=dtype)
    for distance in DISTANCES:
        yield check(distance, (1, 1, 3), 1, 1)
        yield check(distance, (2, 5, 9) if dry else (2, 13, 9), 2 if dry else 13, 5, True)
        if not dry: yield check(distance, (3, 199, 768), 1, 3)


def info_nce_checks(dry: bool) -> Iterator[Check]:
    "Cosine and product, groups, extra negatives, short types, sizes that no tile divides"
    def check(N, D, config='cosine', extra=0, groups=False, **options):
        def inputs():
            g = draw()
            q = torch.randn(N, D, generator=g)
            more = [2 * torch.randn(extra, D, generator=g)] if extra else []
            return [q, .5 * q + torch.randn(N, D, generator=g), *more,
                    *([torch.randint(0, 1 + N // 3, (N,), generator=g)] if groups else [])]

        def call(tensors, backend):
            more = dict(extra_negatives=tensors[2]) if extra else {}
            if groups: more['groups'] = tensors[-1]
            return info_nce(tensors[0], tensors[1], backend=backend, **options, **more)
        return Check('info_nce', config, f'{N}x{D}', inputs, call, 3 if extra else 2)
    shapes = [(7, 33), (1, 1)] if dry else [(129, 768), (1000, 65), (7, 33), (1, 1)]
    yield check(*shapes[0])
    yield check(*shapes[0], 'all options', 13, True, normalize=False, temperature=20.)
    for dtype in SHORT: yield replace(check(*shapes[0]), dtype=dtype)
    yield check(*shapes[0], 'groups', groups=True, temperature=.07)
    for shape in shapes[1:]: yield check(*shape)


def _codebook(n: int, k: int, d: int) -> list[Tensor]:
    "Frames near codes, the codes, and a token for each frame"
    g = draw()
    codes = torch.randn(k, d, generator=g)
    tokens = torch.randint(k, (n,), generator=g)
    return [codes[tokens] + .3 * torch.randn(n, d, generator=g), codes, torch.where(torch.arange(n) % 3 > 0, tokens, 0)]


def code_checks(dry: bool) -> Iterator[Check]:
    "Nearest code by each metric: the distance, and through it the index"
    shapes = [(17, 63, 31), (1, 1, 1)] if dry else [(1001, 2048, 32), (300, 2049, 9), (17, 63, 31), (1, 1, 1)]

    def check(metric, shape):
        return Check('nearest_code', metric, 'x'.join(map(str, shape)), lambda: _codebook(*shape),
                     lambda t, backend: nearest_code(t[0], t[1], metric=metric, backend=backend).distance, 2)
    for metric in METRICS: yield check(metric, shapes[0])
    for dtype in SHORT: yield replace(check('squared', shapes[0]), dtype=dtype)
    for shape in shapes[1:]:
        for metric in METRICS: yield check(metric, shape)


def token_checks(dry: bool) -> Iterator[Check]:
    "Cross-entropy of tokens by each metric"
    shapes = [(17, 63, 31)] if dry else [(301, 2049, 32), (300, 4500, 9), (17, 63, 31)]

    def check(metric, shape):
        temperature = dict(euclidean=.2 * shape[2] ** .5, squared=.4 * shape[2], cosine=.1)[metric]
        return Check('token_loss', metric, 'x'.join(map(str, shape)), lambda: _codebook(*shape),
                     lambda t, backend: token_cross_entropy(t[0], t[1], t[2], temperature=temperature, metric=metric,
                                                            backend=backend), 2)
    for metric in ('euclidean', 'squared', 'cosine'): yield check(metric, shapes[0])
    for dtype in SHORT: yield replace(check('euclidean', shapes[0]), dtype=dtype)
    for shape in shapes[1:]: yield check('euclidean', shape)


FAMILIES = stft_checks, contrastive_checks, info_nce_checks, code_checks, token_checks


# ---------------------------------------------------------------------------------- a check

def values_and_gradient(check: Check, tensors: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    "Return the values, and the gradient of a weighted sum of them in all leaves, end to end"
    factor = ROUNDING[check.dtype][1] if tensors[0].dtype == check.dtype else 1.
    leaves = [x.requires_grad_() for x in tensors[:check.leaves]]
    with stft_method(check.method):
        values = check.call(tensors, backend)
        weight = factor * torch.linspace(.5, 1., values.numel(), device=values.device).view(values.shape)
        grads = torch.autograd.grad(values, leaves, weight.to(values.dtype))
    return values.detach(), torch.cat([g.double().flatten() / factor for g in grads])


def moved(tensors: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    "Return copies on a device, the floating ones in a type"
    return [x.detach().to(device, dtype if x.is_floating_point() else x.dtype, copy=True) for x in tensors]


def backend_of(check: Check) -> str: return 'torch' if check.dtype == torch.float64 else 'triton'


def compare(run: Run, check: Check) -> None:
    "Write the row of a check"
    drawn = moved(check.inputs(), 'cpu', check.dtype)
    right = values_and_gradient(check, moved(drawn, 'cpu', torch.float64), 'reference')
    plain = values_and_gradient(check, moved(drawn, DEVICE, torch.float64 if check.dtype == torch.float64
                                             else torch.float32), 'reference')
    fast = values_and_gradient(check, moved(drawn, DEVICE, check.dtype), backend_of(check))
    (loss, grad), (rough_loss, rough_grad) = ([relative(a.double().cpu(), b) for a, b in zip(each, right)]
                                              for each in (fast, plain))
    if float(right[1].norm()) < 1e-7: grad = rough_grad = float(fast[1].norm())   # of one dim: a cosine without slope
    floor, value_floor = FLOORS[check.op]
    row = dict(grad_err=grad, grad_tol=2 * rough_grad + floor + ROUNDING[check.dtype][0],
               loss_err=loss, loss_tol=2 * rough_loss + value_floor, note=f'by {backend_of(check)}')
    good = row['grad_err'] <= row['grad_tol'] and row['loss_err'] <= row['loss_tol']   # NaN is neither
    run.write('ok' if good else 'wrong', **check.about | row)


def _strided(x: Tensor) -> Tensor:
    "The same numbers, every other of a wider tensor"
    return torch.stack([x, x], -1)[..., 1]


def properties(run: Run, check: Check) -> None:
    "Write rows of what must not change a result: runs, streams, strides, and what lay in memory before"
    about = check.about
    make = lambda: moved(check.inputs(), DEVICE, check.dtype)   # noqa: E731
    once = lambda tensors: values_and_gradient(check, tensors, backend_of(check))   # noqa: E731
    first = run.attempt(lambda: once(make()), **about)
    if first is None: return
    kinds = {
        'second and third run': lambda: [once(make()) for _ in range(2)],
        'strided input': lambda: [once([_strided(x) if x.is_floating_point() else x for x in make()])],
        'memory full of NaN': lambda: [_poisoned(lambda: once(make()))],   # torch may take other algorithms then
        'a stream of its own': lambda: [_on_a_stream(lambda: once(make()))],
    }
    for kind, work in kinds.items():
        about['config'] = f'same result: {kind}'
        if 'stream' in kind and DEVICE != 'cuda':
            run.write('skipped', **about, note='a CPU has no streams')
        elif (again := run.attempt(work, **about)) is not None:
            allowed = 1e-5 if 'NaN' in kind else 0.
            loss_err, grad_err = (max(relative(each[k], first[k].double()) for each in again) for k in (0, 1))
            run.write('ok' if loss_err <= allowed and grad_err <= allowed else 'wrong', **about, grad_err=grad_err,
                      loss_err=loss_err, grad_tol=allowed, loss_tol=allowed)


def _poisoned(work: Callable) -> tuple[Tensor, Tensor]:
    "Run while torch fills memory that it hands out with NaN: what no kernel writes would show"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try: return work()
    finally: torch.use_deterministic_algorithms(False)


def _on_a_stream(work: Callable) -> tuple[Tensor, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream): found = work()
    torch.cuda.current_stream().wait_stream(stream)
    return found


def splits(run: Run) -> None:
    "Write how exact products of split float32 are on this device, and what is trusted"
    from speechloss.kernels import stft_triton, stft_triton_gemm
    device = torch.device(DEVICE, torch.cuda.current_device()) if DEVICE == 'cuda' else torch.device('cpu')
    for split in (*stft_triton_gemm.TILES, None):
        about = dict(op='stft_distance', config='self-test of products', dtype='float32', provider=split or 'fft')
        error = run.attempt(lambda split=split: stft_triton.gradient_error(device, split), **about)
        if error is not None:
            run.write('ok' if error <= stft_triton.TRUSTED else 'wrong', grad_err=error, grad_tol=stft_triton.TRUSTED,
                      **about)


def correctness(run: Run) -> None:
    "Two checks of each family, what must not change a bit, then all the others in turn"
    families = [list(family(run.dry)) for family in FAMILIES]
    for checks in families:
        for check in checks[:2]: run.attempt(lambda check=check: compare(run, check), **check.about)
    splits(run)
    for checks in families: run.attempt(lambda checks=checks: properties(run, checks[0]), **checks[0].about)
    properties(run, families[0][1])   # the other method of the STFT
    for turn in zip_longest(*(checks[2:] for checks in families)):
        for check in filter(None, turn): run.attempt(lambda check=check: compare(run, check), **check.about)
