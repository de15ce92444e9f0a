"""STFT distance: the gradient first, against a DFT written out in float64."""
import math
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from torch.utils._python_dispatch import TorchDispatchMode

from speechloss.kernels.stft_distance import EPS, TERMS, Plan, Resolution, _outputs, stft_distance
from speechloss.kernels.stft_plan import plan_of

MAGNITUDES = tuple(name for name in TERMS if name != 'complex')
DEFAULTS = (Resolution(1024, 120, 600), Resolution(2048, 240, 1200), Resolution(512, 50, 240))
ODD = (Resolution(512, 128), Resolution(256, 64, window='hamming'), Resolution(400, 100),
       Resolution(96, 25, 75), Resolution(101, 30, window='blackman'), Resolution(64, 37, 33))
SHAPES = ((1, 16000), (2, 16000), (3, 7919), (1, 1025))
# relative L2 of the gradient that float32 is forgiven beside twice the plain path's
FLOOR = dict(grad=1e-4, value=1e-5)


def speechlike(*shape, seed=0, dtype=torch.float64):
    "Noise with a falling spectrum and pauses at -80 dBFS"
    generator = torch.Generator().manual_seed(seed)
    spec = torch.fft.rfft(torch.randn(*shape, generator=generator, dtype=torch.float64))
    spec /= torch.arange(1, spec.shape[-1] + 1, dtype=torch.float64) ** 2 * 1e-5 + 1
    wave = torch.fft.irfft(spec, shape[-1])
    wave *= .1 / wave.square().mean(-1, keepdim=True).sqrt()
    wave[..., shape[-1] // 3:shape[-1] // 2] *= 1e-3
    return wave.to(dtype)


def pair(*shape, dtype=torch.float64):
    clean = speechlike(*shape)
    return (clean + .3 * speechlike(*shape, seed=1)).to(dtype), clean.to(dtype)


def dft(wave, r):
    "Spectrum (frames, bins) as two real tensors, every step spelled out"
    pad, size = r.n_fft // 2, len(wave)
    at = torch.arange(-pad, size + pad).abs()
    padded = wave[torch.where(at > size - 1, 2 * (size - 1) - at, at)]
    turn = 2 * math.pi / r.win_length * torch.arange(r.win_length, dtype=torch.float64)
    window = {'hann': .5 - .5 * turn.cos(), 'hamming': .54 - .46 * turn.cos(),
              'blackman': .42 - .5 * turn.cos() + .08 * (2 * turn).cos()}[r.window]
    first = (r.n_fft - r.win_length) // 2
    starts = range(0, len(padded) - r.n_fft + 1, r.hop_length)
    frames = torch.stack([padded[k + first:k + first + r.win_length] for k in starts]) * window * r.gain
    angle = 2 * math.pi / r.n_fft * torch.outer(torch.arange(r.win_length), torch.arange(r.bins)).double()
    return frames @ angle.cos(), -frames @ angle.sin()


def truth(enhanced, clean, r, *, eps=EPS, power=.3, sc_floor=1e-3, bank=None, offset=0.):
    "All terms of one utterance, {name: float64}"
    (a, b), (c, d) = dft(enhanced, r), dft(clean, r)
    r_e, r_s = a * a + b * b + eps, c * c + d * d + eps
    e, s = r_e.sqrt(), r_s.sqrt()
    if bank is not None: e, s = e @ bank, s @ bank
    log, lin, comp = ((e + offset) / (s + offset)).log(), e - s, e ** power - s ** power
    g, h = r_e ** ((power - 1) / 2), r_s ** ((power - 1) / 2)
    return dict(
        sc=lin.square().sum().sqrt() / (s.square().sum().sqrt() + sc_floor * s.numel() ** .5),
        log_l1=log.abs().mean(), log_l2=log.square().mean(),
        lin_l1=lin.abs().mean(), lin_l2=lin.square().mean(), compressed=comp.square().mean(),
        complex=((a * g - c * h).square() + (b * g - d * h).square()).mean())


def run(enhanced, clean, resolutions, terms, *, seed=3, **options):
    "(values, gradient of a random mix of them)"
    x = enhanced.clone().requires_grad_()
    values = stft_distance(x, clean, resolutions, terms, **options).values
    mix = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)).to(values)
    return values.detach(), torch.autograd.grad((values * mix).sum(), x)[0]


def apart(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('r', DEFAULTS + ODD, ids=str)
def test_values_and_gradient_are_those_of_a_dft_written_out(r, backend):
    enhanced, clean = pair(2, 2 * r.n_fft + 7)
    x = enhanced.clone().requires_grad_()
    want = torch.stack([torch.stack([*truth(a, b, r).values()]) for a, b in zip(x, clean)])
    got = stft_distance(enhanced, clean, [r], tuple(TERMS), backend=backend).values
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)
    for k, name in enumerate(TERMS):
        y = enhanced.clone().requires_grad_()
        grad, = torch.autograd.grad(stft_distance(y, clean, [r], [name], backend=backend).values.sum(), y)
        wanted, = torch.autograd.grad(want[:, k].sum(), x, retain_graph=True)
        assert apart(grad, wanted) < 1e-8, name


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_filter_bank_offset_gain_and_weight(backend):
    r = Resolution(256, 64, gain=256 ** -.5, weight=.7)
    enhanced, clean = pair(1, 1601)
    bank = torch.rand(129, 12, dtype=torch.float64)
    x = enhanced.clone().requires_grad_()
    want = truth(x[0], clean[0], r, bank=bank, offset=1e-3)
    got = stft_distance(enhanced, clean, [r, r], MAGNITUDES, filters=[bank, None], offset=1e-3, backend=backend)
    torch.testing.assert_close(got.parts[0, 0], torch.stack([want[n] for n in MAGNITUDES]).detach())
    y = enhanced.clone().requires_grad_()
    alone = stft_distance(y, clean, [r], MAGNITUDES, filters=[bank], offset=1e-3, weights=[1.] * 6, backend=backend)
    torch.testing.assert_close(alone.values[0], .7 * alone.parts.sum())
    grad, = torch.autograd.grad(alone.values.sum(), y)
    wanted, = torch.autograd.grad(.7 * sum(want[n] for n in MAGNITUDES), x)
    assert apart(grad, wanted) < 1e-8


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('terms', [('sc', 'log_l1'), tuple(TERMS)], ids=['mrstft', 'all'])
def test_float32_gradient_is_as_good_as_plain_torch(shape, terms):
    resolutions = DEFAULTS + ODD if shape[1] > 1025 else (DEFAULTS[0], *ODD)
    for lengths in (None, torch.arange(shape[0]) * -301 + shape[1]):
        enhanced, clean = pair(*shape, dtype=torch.float32)
        values, grad = run(enhanced.double(), clean.double(), resolutions, terms, backend='reference', lengths=lengths)
        plain_values, plain = run(enhanced, clean, resolutions, terms, backend='reference', lengths=lengths)
        fast_values, fast = run(enhanced, clean, resolutions, terms, backend='torch', lengths=lengths)
        assert fast.dtype == torch.float32
        assert apart(fast, grad) <= 2 * apart(plain, grad) + FLOOR['grad']
        assert apart(fast_values, values) <= 2 * apart(plain_values, values) + FLOOR['value']
        assert apart(fast, grad) < 1e-2          # and the plain path is no excuse


@pytest.mark.parametrize('dtype,slack', [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)], ids=str)
def test_short_types_are_computed_in_float32(dtype, slack):
    enhanced, clean = pair(2, 6000, dtype=dtype)
    values, grad = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'))
    want_values, want = run(enhanced.double(), clean.double(), DEFAULTS, ('sc', 'log_l1'), backend='reference')
    assert values.dtype == torch.float32 and grad.dtype == dtype
    assert apart(values, want_values) < 1e-5
    # float16 cannot hold a gradient as small as that of a mean: scale it, as mixed precision does
    x = enhanced.clone().requires_grad_()
    mix = torch.randn(want_values.shape, generator=torch.Generator().manual_seed(3))
    stft_distance(x, clean, DEFAULTS).values.backward(mix * 2 ** 6)
    assert apart(x.grad.double() / 2 ** 6, want) < 2e-4 + slack


@pytest.mark.parametrize('terms', [('sc', 'log_l2', 'lin_l2'), ('compressed', 'complex')], ids=str)
def test_gradcheck(terms):
    enhanced, clean = pair(1, 70)
    small = [Resolution(32, 10, 20), Resolution(25, 9)]
    x = enhanced.clone().requires_grad_()
    for backend in ('torch', 'reference'):
        assert torch.autograd.gradcheck(
            lambda w: stft_distance(w, clean, small, terms, backend=backend, eps=1e-4).values, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda w: stft_distance(w, clean, small, terms, backend='reference', eps=1e-4).values, x, fast_mode=True)


def test_second_derivative_is_an_error_not_a_zero():
    enhanced, clean = pair(1, 600)
    x = enhanced.requires_grad_()
    grad, = torch.autograd.grad(stft_distance(x, clean, [Resolution(64, 16)]).values.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula|autograd'):
        grad.square().sum().backward()


def test_padding_and_batch_mates_do_not_matter():
    lengths = torch.tensor([4000, 2600, 3301])
    enhanced, clean = pair(3, 4000)
    options = dict(resolutions=[Resolution(512, 50, 240), Resolution(256, 64)], terms=tuple(TERMS))
    for backend in ('torch', 'reference'):
        dirty = [torch.where(torch.arange(4000) < lengths[:, None], w, math.nan) for w in (enhanced, clean)]
        values, grad = run(*dirty, **options, lengths=lengths, backend=backend)
        for b, n in enumerate(lengths.tolist()):
            alone, own = run(enhanced[b:b + 1, :n], clean[b:b + 1, :n], **options, backend=backend)
            torch.testing.assert_close(values[b:b + 1], alone, rtol=1e-9, atol=0)
            # same mix: the gradient of one row, by a value that holds that row alone
            x = enhanced[b:b + 1, :n].clone().requires_grad_()
            one = stft_distance(x, clean[b:b + 1, :n], **options, backend=backend).values
            y = enhanced.clone().requires_grad_()
            many = stft_distance(y, clean, **options, lengths=lengths, backend=backend).values
            g1, = torch.autograd.grad(one.sum(), x)
            g2, = torch.autograd.grad(many[b].sum(), y)
            assert apart(g2[b, :n], g1[0]) < 1e-9
            assert g2[b, n:].count_nonzero() == 0 and g2[[k for k in range(3) if k != b]].count_nonzero() == 0


def test_forward_mode_is_an_error_not_a_zero():
    enhanced, clean = pair(1, 600)
    def f(backend):
        return lambda x: stft_distance(x, clean, [Resolution(64, 16)], weights=(1., 1.), backend=backend).values
    value, tangent = torch.func.jvp(f('reference'), (enhanced,), (clean,))
    x = enhanced.clone().requires_grad_()
    grad, = torch.autograd.grad(f('torch')(x).sum(), x)
    torch.testing.assert_close(tangent.sum(), (grad * clean).sum())
    for backend in ('auto', 'torch'):
        with pytest.raises(RuntimeError, match="no forward-mode derivative: use backend='reference'"):
            torch.func.jvp(f(backend), (enhanced,), (clean,))


def test_validation_first_and_training_after():
    "What is kept between calls must not be an inference tensor"
    enhanced, clean = pair(1, 600)
    for backend in ('torch', 'reference'):
        odd = Resolution(74, 17, gain=.123)          # used nowhere else
        with torch.inference_mode(): stft_distance(enhanced, clean, [odd], backend=backend)
        assert run(enhanced, clean, [odd], ['sc'], backend=backend)[1].isfinite().all()


def test_no_copy_to_the_device_and_no_wait_for_it():
    "In the operator and around it: numbers from the host would end a CUDA graph capture"
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    enhanced, clean = pair(2, 1200)
    parts = torch.rand(2, 1, 2, dtype=torch.float64)
    plan = Plan((Resolution(64, 16),), ('sc', 'log_l1'), (1., .3), filtered=(False,))
    names = []
    with Seen(): _outputs(parts, plan)
    assert names and not {n for n in names if n.startswith(('lift_fresh', '_local_scalar_dense', '_to_copy'))}


def test_frames_of_an_odd_transform():
    "Padded by a sample less than an even one, it has a frame less where hop_length divides the length"
    enhanced, clean = pair(1, 240)
    r = [Resolution(75, 20)]
    values = [stft_distance(enhanced, clean, r, backend=backend, lengths=lengths).values
              for backend in ('torch', 'reference') for lengths in (None, torch.tensor([240]))]
    for value in values[1:]: torch.testing.assert_close(value, values[0])


def test_same_bits_every_time_and_in_any_batch():
    enhanced, clean = pair(4, 7919, dtype=torch.float32)
    first = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1', 'complex'))
    for _ in range(2):
        again = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1', 'complex'))
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    x = enhanced[[2, 0]].clone().requires_grad_()
    values = stft_distance(x, clean[[2, 0]], DEFAULTS, ('sc', 'log_l1', 'complex')).values
    assert torch.equal(values, first[0][[2, 0]])


def test_strides_offsets_and_a_grad_output_without_memory():
    enhanced, clean = pair(3, 3000, dtype=torch.float32)
    r = [Resolution(256, 64)]
    want = run(enhanced, clean, r, ('sc', 'log_l1'))[0]
    wide = torch.zeros(3, 6001).index_copy_(1, torch.arange(1, 6001, 2), enhanced)
    assert torch.equal(stft_distance(wide[:, 1::2], clean, r).values, want)
    assert torch.equal(stft_distance(enhanced.T.contiguous().T, clean.T.contiguous().T, r).values, want)
    x = enhanced.clone().requires_grad_()
    stft_distance(x, clean, r).values.sum().backward()               # stride 0
    y = enhanced.clone().requires_grad_()
    both = torch.cat([stft_distance(y, clean, r).values, torch.zeros(3, 3)], 1)
    both.backward(torch.ones(5, 3).T)                                # transposed, sliced
    assert torch.equal(x.grad, y.grad)
    z = enhanced.clone().requires_grad_()
    loss = stft_distance(z * 1, clean, r).values.sum()
    clean_copy, clean[:] = clean.clone(), 0.                         # in place after the call
    loss.backward()
    clean[:] = clean_copy
    assert torch.equal(z.grad, x.grad)


def test_what_is_kept_is_one_wave_for_each_output():
    enhanced, clean = pair(2, 16000, dtype=torch.float32)
    for options, waves in (({}, 2), (dict(weights=(1., .5)), 1)):
        kept = []
        x = enhanced.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            values = stft_distance(x, clean, DEFAULTS, **options).values
        assert sum(t.numel() for t in kept) == waves * x.numel()
        assert values.shape == ((2,) if options else (2, 2))
    with torch.no_grad():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            stft_distance(x, clean, DEFAULTS)
    assert not kept


def test_weights_are_the_sum_of_the_terms():
    enhanced, clean = pair(2, 5000)
    terms = stft_distance(enhanced, clean, DEFAULTS).values
    total = stft_distance(enhanced, clean, DEFAULTS, weights=(2., .5)).values
    torch.testing.assert_close(total, terms @ torch.tensor([2., .5]).double())


def test_gradient_reaches_enhanced_alone():
    enhanced, clean = pair(1, 3000)
    clean.requires_grad_()
    for backend in ('torch', 'reference'):
        x = enhanced.clone().requires_grad_()
        result = stft_distance(x, clean, [Resolution(256, 64)], backend=backend)
        result.values.sum().backward()
        assert clean.grad is None and x.grad.isfinite().all() and not result.parts.requires_grad


# ------------------------------------------------------------------------------- hard inputs

@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_quiet_noise_has_a_gradient_and_silence_a_finite_one(backend):
    clean = speechlike(1, 4000)
    everything = dict(resolutions=[Resolution(512, 128), Resolution(512, 50, 240)], terms=tuple(TERMS), backend=backend)
    quiet = 1e-6 * torch.randn(1, 4000, dtype=torch.float64)             # -120 dBFS
    for name in TERMS:
        _, grad = run(quiet, clean, everything['resolutions'], [name], backend=backend)
        assert (grad != 0).double().mean() > .99, name
    for wave in (torch.zeros(1, 4000), torch.full((1, 4000), .5), torch.eye(1, 4000),
                 torch.sign(torch.randn(1, 4000)), 32767 * torch.rand(1, 4000)):
        for other in (clean.float(), torch.zeros(1, 4000), wave):
            values, grad = run(wave, other, **everything)
            assert values.isfinite().all() and grad.isfinite().all()
    silence = torch.zeros(1, 4000, dtype=torch.float64)
    _, grad = run(silence, clean, everything['resolutions'], ['complex'], backend=backend)
    assert (grad != 0).double().mean() > .99


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_identity_is_zero_with_a_finite_gradient(backend):
    clean = speechlike(2, 4000, dtype=torch.float32)
    values, grad = run(clean, clean, DEFAULTS, tuple(TERMS), backend=backend)
    assert values.count_nonzero() == 0 and grad.isfinite().all()


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_nan_shows_in_its_own_row_alone(bad):
    enhanced, clean = pair(2, 4000, dtype=torch.float32)
    enhanced[0, 100] = bad
    values = stft_distance(enhanced, clean, [Resolution(256, 64)]).values
    assert values[0].isnan().all() and values[1].isfinite().all()


# ---------------------------------------------------------------------- one norm for the batch

def test_norm_over_the_batch():
    enhanced, clean = pair(3, 4000)
    options = dict(norm='batch', floor='clamp', sc_floor=0.)
    plain_values, plain = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'), backend='reference', **options)
    values, grad = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'), backend='torch', **options)
    torch.testing.assert_close(values, plain_values)
    assert apart(grad, plain) < 1e-8
    assert torch.equal(values, values[:1].expand(3, 2))
    # by hand: every row is the value of the batch
    mags = [[(lambda z: (z[0] ** 2 + z[1] ** 2).clamp_min(EPS).sqrt())(dft(w, DEFAULTS[2])) for w in ws]
            for ws in (enhanced, clean)]
    e, s = (torch.stack(m) for m in mags)
    one = stft_distance(enhanced, clean, DEFAULTS[2:], ('sc', 'log_l1'), **options).values[0]
    torch.testing.assert_close(one[0], (e - s).norm() / s.norm())
    torch.testing.assert_close(one[1], (e.log() - s.log()).abs().mean())


# ---------------------------------------------------------------------------- compile, autocast

def test_operator_is_registered_as_torch_wants():
    enhanced, clean = pair(2, 900, dtype=torch.float32)
    text = Plan((Resolution(64, 16, 48), Resolution(100, 25)), ('sc', 'log_l1'), filtered=(True, False)).text()
    arguments = (enhanced.requires_grad_(), clean, torch.tensor([900, 700]), [torch.rand(33, 5)], text, 'torch', True)
    torch.library.opcheck(torch.ops.speechloss.stft_distance.default, arguments)


@pytest.mark.slow
def test_compiles_into_one_graph():
    enhanced, clean = pair(2, 3000, dtype=torch.float32)
    r = [Resolution(256, 64), Resolution(512, 50, 240)]

    def loss(x): return stft_distance(x.tanh(), clean, r, weights=(1., 1.)).values.mean()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        x = enhanced.clone().requires_grad_()
        f(x).backward()
        grads.append(x.grad)
    assert apart(grads[1], grads[0]) < 1e-6


@pytest.mark.slow
def test_training_goes_the_same_way():
    "200 steps of a filter that learns to undo another: the curves of both paths lie on each other"
    noisy, clean = pair(2, 4000, dtype=torch.float32)
    noisy = torch.nn.functional.conv1d(noisy[:, None], torch.tensor([[[.3, 1., -.4]]]), padding=1)[:, 0]
    curves = []
    for backend in ('torch', 'reference'):
        taps = torch.zeros(1, 1, 9).index_fill_(2, torch.tensor(4), 1.).requires_grad_()
        optimizer, curve = torch.optim.Adam([taps], 2e-3), []
        for _ in range(200):
            enhanced = torch.nn.functional.conv1d(noisy[:, None], taps, padding=4)[:, 0]
            loss = stft_distance(enhanced, clean, [Resolution(512, 50, 240), Resolution(256, 64)], weights=(1., 1.),
                                 backend=backend).values.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < .9 * curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)


def test_autocast_changes_nothing():
    enhanced, clean = pair(2, 3000, dtype=torch.float32)
    want = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'))
    with torch.autocast('cpu', torch.bfloat16):
        for backend in ('torch', 'reference'):
            got = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'), backend=backend)
            assert got[0].dtype == torch.float32
            assert apart(got[0], want[0]) < 1e-5 and apart(got[1], want[1]) < 1e-3


def test_plan_survives_its_text():
    plan = Plan((Resolution(64, 16, 48, 'hamming', .125, 1 / 3), Resolution(100, 25)), ('sc', 'complex'), (.1, 2.),
                1e-7, 'clamp', 1 / 3, 'batch', 0., 1e-5, (False, False))
    assert plan_of(plan.text()) == plan


# ----------------------------------------------------------------------------------- bad input

GOOD = torch.randn(2, 4000)


@pytest.mark.parametrize('arguments,error,says', [
    (dict(clean=GOOD[:1]), ValueError, r'clean has shape \(1, 4000\) and enhanced has \(2, 4000\)'),
    (dict(enhanced=GOOD[0], clean=GOOD[0]), ValueError, r'enhanced has shape \(4000,\): give \(B, T\)'),
    (dict(enhanced=GOOD.long()), TypeError, r'enhanced is torch.int64: give a real floating'),
    (dict(enhanced=GOOD.to(torch.complex64)), TypeError, 'enhanced is torch.complex64'),
    (dict(clean=GOOD.numpy()), TypeError, 'clean is ndarray'),
    (dict(clean=GOOD.to('meta')), ValueError, 'clean is on meta and enhanced on cpu'),
    (dict(enhanced=GOOD[:, :200], clean=GOOD[:, :200]), ValueError, r'200 samples and n_fft is 512: .* 257 samples'),
    (dict(lengths=torch.tensor([4000, 256])), ValueError, '256 samples and n_fft is 512'),
    (dict(lengths=torch.tensor([4000, 4001])), ValueError, r'go from 4000 to 4001: they must lie in 1..4000'),
    (dict(lengths=torch.tensor([4000.])), ValueError, 'give 2 integers'),
    (dict(lengths=[4000, 3000]), TypeError, 'lengths is list: give a tensor of 2 integers'),
    (dict(filters=[torch.zeros(257, 3)]), ValueError, 'a band without a bin'),
    (dict(filters=[-torch.rand(257, 3)]), ValueError, 'a negative weight'),
    (dict(filters=[3]), TypeError, 'a filter bank is int'),
    (dict(terms=('sc', 'phase')), ValueError, 'choose|give some of sc'),
    (dict(terms=()), ValueError, 'give some of'),
    (dict(weights=(1.,)), ValueError, 'weights has 1 numbers and terms 2'),
    (dict(resolutions=()), ValueError, 'give one Resolution'),
    (dict(resolutions=[(512, 128)]), ValueError, 'give one Resolution'),
    (dict(eps=0.), ValueError, 'eps is 0.0'),
    (dict(power=2.), ValueError, r'power is 2.0: it must lie in \(0, 1\]'),
    (dict(norm='frame'), ValueError, "norm is 'frame': choose one of utterance, batch"),
    (dict(floor='hard'), ValueError, "floor is 'hard'"),
    (dict(offset=-1.), ValueError, 'neither may be negative'),
    (dict(filters=[]), ValueError, 'filters has 0 entries'),
    (dict(filters=[torch.rand(9, 3)]), ValueError, r'shape \(9, 3\) on cpu: give \(257, bands\)'),
    (dict(filters=[torch.rand(257, 3)], terms=('complex',)), ValueError, 'compares complex spectra'),
    (dict(backend='cuda'), ValueError, "backend is 'cuda': choose one of auto, torch, triton, reference"),
])
def test_bad_input_is_one_sentence(arguments, error, says):
    given = dict(enhanced=GOOD, clean=GOOD, resolutions=[Resolution(512, 128)]) | arguments
    with pytest.raises(error, match=says):
        stft_distance(given.pop('enhanced'), given.pop('clean'), given.pop('resolutions'), **given)


@pytest.mark.parametrize('options,says', [
    (dict(n_fft=1), 'n_fft >= 2'), (dict(hop_length=0), 'hop_length >= 1'),
    (dict(n_fft=64, win_length=65), r'must lie in 1..n_fft \(64\)'), (dict(window='flat'), "window is 'flat'")])
def test_bad_resolution(options, says):
    with pytest.raises(ValueError, match=says):
        Resolution(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is present')
def test_triton_by_name_says_why_it_cannot_serve():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve: .*; use backend='auto'"):
        stft_distance(GOOD, GOOD, [Resolution(512, 128)], backend='triton')


# ------------------------------------------------------------------------- on several cores

def test_cores_change_neither_a_bit_nor_the_threads_of_torch():
    enhanced, clean = pair(5, 4000, dtype=torch.float32)
    alone = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'))
    batch = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'), norm='batch')
    torch.set_num_threads(3)                       # the fixture puts it back to 1
    for _ in range(3):
        both = run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'))
        assert all(torch.equal(a, b) for a, b in zip(alone, both))
    assert all(torch.equal(a, b) for a, b in zip(batch, run(enhanced, clean, DEFAULTS, ('sc', 'log_l1'), norm='batch')))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as other: assert other.submit(torch.get_num_threads).result() == 3
    enhanced[2, 5] = math.nan                      # an error or a NaN stays in its row
    assert stft_distance(enhanced, clean, DEFAULTS).values.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize('r', [Resolution(512, 128), Resolution(1024, 256)], ids=str)
def test_cores_change_no_bit_with_a_filter_bank_or_compressed_spectra(r):
    enhanced, clean = pair(2, 20000, dtype=torch.float32)
    bank = torch.rand(r.bins, 40, generator=torch.Generator().manual_seed(0))
    def both(): return run(enhanced, clean, [r], ('log_l1',), filters=[bank]), run(enhanced, clean, [r],
                                                                                   ('compressed', 'complex'))
    alone = both()
    for threads in 2, 3:
        torch.set_num_threads(threads)
        for one, more in zip(alone, both()): assert all(torch.equal(a, b) for a, b in zip(one, more))


def _in_a_fork(queue):
    queue.put(stft_distance(*pair(3, 4000, dtype=torch.float32), DEFAULTS[2:]).values.sum().item())


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_works_in_a_forked_data_worker():
    torch.set_num_threads(2)
    want = stft_distance(*pair(3, 4000, dtype=torch.float32), DEFAULTS[2:]).values.sum().item()
    torch.set_num_threads(1)                       # OpenMP itself does not survive a fork with more
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == want
    process.join()
