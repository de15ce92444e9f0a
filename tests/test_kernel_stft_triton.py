"""STFT distance in Triton: both algorithms on every shape, and how short its numbers may be."""
import math
import re

import pytest
import torch

pytest.importorskip('triton')

from interpreted import run_interpreted
from speechloss.kernels import stft_torch, stft_triton_tables
from speechloss.kernels.framing import WINDOWS
from speechloss.kernels.stft_distance import TERMS, Plan, Resolution, stft_distance
from test_kernel_stft import DEFAULTS, FLOOR, apart, run

METHODS = stft_triton_tables.METHODS
# small, for the interpreter: each window, odd sizes, hops that do not divide
SMALL = (Resolution(64, 16), Resolution(128, 30, 100, window='hamming'), Resolution(96, 25, 75, window='kaiser'),
         Resolution(75, 20, 51, window='blackman', gain=75 ** -.5), Resolution(33, 11, window='bartlett', weight=.3))
ODD = (Resolution(512, 128), Resolution(256, 64), Resolution(400, 100), Resolution(96, 25, 75),
       Resolution(101, 30, window='blackman'), Resolution(64, 37, 33))
MRSTFT = ('sc', 'log_l1')


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    "One of the two algorithms, for every resolution"
    monkeypatch.setenv('SPEECHLOSS_STFT', request.param)
    return request.param


def pair(*shape, seed=0, dtype=torch.float32):
    "Enhanced and clean: a falling spectrum with a pause at -80 dBFS, and white noise left in it"
    clean, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = torch.fft.rfft(clean)
    spectrum /= 1 + torch.linspace(0, 40, spectrum.shape[-1]) ** 2
    clean = torch.fft.irfft(spectrum, shape[-1])
    clean *= .1 / clean.square().mean(-1, keepdim=True).sqrt()
    clean[..., shape[-1] // 3:shape[-1] // 2] *= 1e-3
    return (clean + 3e-3 * noise).to(dtype), clean.to(dtype)


def check(enhanced, clean, resolutions, terms, *, filters=None, **options):
    "The rule: the error of the gradient is at most twice that of plain torch in float32"
    double = dict(filters=filters and [f if f is None else f.double() for f in filters], backend='reference')
    values, grad = run(enhanced.double(), clean.double(), resolutions, terms, **double, **options)
    plain = run(enhanced, clean, resolutions, terms, backend='reference', filters=filters, **options)
    fast = run(enhanced, clean, resolutions, terms, backend='triton', filters=filters, **options)
    assert fast[1].shape == enhanced.shape and fast[1].dtype == torch.float32
    assert apart(fast[1], grad) <= 2 * apart(plain[1], grad) + FLOOR['grad']
    assert apart(fast[0], values) <= 2 * apart(plain[0], values) + FLOOR['value']


# ------------------------------------------------------------------------------ the tables

@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('n_fft,win',
                         [(512, 240), (600, 600), (101, 101), (96, 75), (75, 51), (64, 33), (8, 2), (5, 1)])
def test_folded_dft_has_the_magnitudes_of_the_dft(n_fft, win, window):
    cos, sin, skip = stft_triton_tables.exact(Resolution(n_fft, 1, win, window))
    frame = torch.randn(win, dtype=torch.float64)
    i = torch.arange(skip, win // 2 + 1)
    partner = torch.where((i > 0) & (2 * i < win), frame[(win - i) % win], 0)
    magnitude = torch.hypot((frame[i] + partner) @ cos, (frame[i] - partner) @ sin)
    weights = WINDOWS[window](win, dtype=torch.float64)
    torch.testing.assert_close(magnitude, torch.fft.rfft(frame * weights, n_fft).abs(), rtol=1e-10, atol=1e-12)
    assert len(cos) == win // 2 + 1 - skip
    assert skip == 0 or abs(float(weights[0])) < 1e-12


@pytest.mark.parametrize('gain', [1., 1024 ** -.5, 300.])
def test_split_tables_hold_what_float32_holds(gain):
    r = Resolution(512, 50, 240, gain=gain)
    table = stft_triton_tables.folded(r, 'fp16x3', torch.device('cpu'))
    cos, sin, _ = stft_triton_tables.exact(r)
    for high, low, right in (table.cos, table.cos_low, cos), (table.sin, table.sin_low, sin):
        assert high.dtype == low.dtype == torch.float16 and high.isfinite().all()
        assert all(size % stft_triton_tables.PAD == 0 for size in high.shape)
        got = (high.double() + low.double()) * table.unit
        assert float((got[:len(right), :right.shape[1]] - right).abs().max()) < gain * 2 ** -22
        assert not got[len(right):].any() and not got[:, right.shape[1]:].any()
    assert table.unit == 2. ** round(math.log2(table.unit))
    assert stft_triton_tables.folded(r, 'fp16x3', torch.device('cpu')) is table


def test_dispatch_is_a_table_with_one_override(monkeypatch):
    monkeypatch.delenv('SPEECHLOSS_STFT', raising=False)
    chosen = {r.win_length: stft_triton_tables.method_of(r, False, 90) for r in DEFAULTS}
    assert chosen == {600: 'fft', 1200: 'fft', 240: 'gemm'}
    assert stft_triton_tables.method_of(DEFAULTS[2], False, 75) == 'fft'      # no capability of the table
    assert stft_triton_tables.method_of(DEFAULTS[2], True, 90) == 'fft'       # a filter bank
    monkeypatch.setenv('SPEECHLOSS_STFT', 'gemm')
    assert {stft_triton_tables.method_of(r, False, 0) for r in DEFAULTS} == {'gemm'}
    monkeypatch.setenv('SPEECHLOSS_STFT', 'dft')
    with pytest.raises(ValueError, match="SPEECHLOSS_STFT is 'dft': choose one of fft, gemm"):
        stft_triton_tables.method_of(DEFAULTS[0], False, 90)


# -------------------------------------------------------------------------------- precision

@pytest.fixture
def precision(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import precision
    return precision


def test_the_rule_passes_split_products_and_fails_single_ones(precision):
    "A suite that looks at the loss alone would let single TF32 pass"
    short = ('tf32', 'fp16', 'bf16', 'bf16x2 signal split', 'fp16x2 signal split')
    modes = ('torch.stft float32', 'fp16x3 scaled', 'tf32x3', *short)
    rows = precision.rows(.5, modes=modes)
    for r in precision.RESOLUTIONS:
        found = {row['mode']: row for row in rows if row['n_fft'] == r.n_fft}
        allowed = 2 * found['torch.stft float32']['grad_err'] + FLOOR['grad']
        for mode in 'fp16x3 scaled', 'tf32x3':
            assert found[mode]['grad_err'] <= allowed, (mode, r)
        for mode in short:
            assert found[mode]['grad_err'] > max(allowed, .05), (mode, r)
        assert found['tf32']['loss_err'] < .02 * found['tf32']['grad_err']


def test_precision_rows_keep_their_columns(precision, tmp_path):
    row, = [row for row in precision.rows(.2, modes=('GEMM float32',)) if row['n_fft'] == 512]
    assert tuple(row) == precision.COLUMNS and row['mag_err'] < 1e-6


def test_every_product_names_its_precision_and_no_result_is_atomic(root):
    for path in (root / 'kernels').glob('*_triton*.py'):
        text = path.read_text(encoding='utf-8')
        calls = [call for call in re.findall(r'tl\.dot\(.*', text)]
        assert all('input_precision=' in call for call in calls), path.name
        assert not re.search(r'atomic_|make_block_ptr|libdevice|autotune\(', text), path.name


@pytest.mark.slow
def test_shipped_tiles_fit_a_gpu():
    "Compiled ahead of time: no spill, no more shared memory than there is, and not optimised away"
    from speechloss.kernels.resources import CAPABILITIES, SHARED, compiled, variants
    for variant in variants(['stft_triton']):
        for capability in CAPABILITIES:
            use = compiled(variant, capability)
            assert use.stack <= variant.spill and use.shared <= SHARED[capability], (variant.name, capability, use)
            assert use.registers >= 16, (variant.name, capability, use)


# ---------------------------------------------------------------------------- the interpreter

@pytest.mark.slow
def test_in_the_interpreter(): run_interpreted(__file__)


@pytest.mark.interpreted
@pytest.mark.parametrize('shape,terms', [((1, 600), MRSTFT), ((3, 397), MRSTFT), ((2, 65), tuple(TERMS))], ids=str)
def test_float32_gradient_is_as_good_as_plain_torch(shape, terms, method):
    check(*pair(*shape), SMALL if terms == MRSTFT else SMALL[2:], terms)


@pytest.mark.interpreted
@pytest.mark.parametrize('terms,mixed,options', [
    (('lin_l2',), False, {}),
    (('log_l2', 'lin_l1'), False, dict(floor='clamp', eps=1e-2)),
    (('log_l1', 'log_l2', 'lin_l2'), True, dict(offset=.01)),
    (('log_l1', 'lin_l1', 'sc'), False, dict(offset=.01, floor='clamp', eps=1e-2)),
    (('complex', 'compressed'), False, dict(power=.5)),
    (tuple(TERMS)[::-1], True, {}),
    (tuple(TERMS)[::-1], True, dict(floor='clamp', eps=1e-2, power=.5)),
], ids=str)
def test_terms_weights_and_floors(terms, mixed, options, method):
    "One look at the cells and two, one output and several, few terms and many"
    check(*pair(2, 200), SMALL[1:3], terms, lengths=torch.tensor([200, 151]), **options,
          weights=torch.arange(1., len(terms) + 1).tolist() if mixed else None)


@pytest.mark.interpreted
@pytest.mark.parametrize('terms', [('log_l1', 'lin_l1'), ('sc', 'log_l2', 'lin_l2', 'compressed')], ids=str)
@pytest.mark.parametrize('options', [dict(offset=1e-3), dict(weights=True, floor='clamp', eps=1e-2)], ids=str)
def test_filter_banks(terms, options):
    if options.get('weights'): options = options | dict(weights=[1.] * len(terms))
    banks = [torch.rand(65, 20), None, torch.rand(49, 70)]
    check(*pair(2, 500), [SMALL[1], SMALL[0], SMALL[2]], terms, filters=banks,
          lengths=torch.tensor([500, 333]), **options)


@pytest.mark.interpreted
def test_padding_batch_mates_and_chunks_do_not_matter(method, monkeypatch):
    from speechloss.kernels import stft_triton_fft, stft_triton_gemm
    enhanced, clean = pair(3, 230)
    lengths = torch.tensor([230, 107, 160])
    values, grad = run(enhanced, clean, SMALL[1:4], MRSTFT, backend='triton', lengths=lengths)
    # padding may hold anything
    worse = [wave.clone() for wave in (enhanced, clean)]
    for wave in worse: wave[1, 107:], wave[2, 160:] = math.nan, 1e9
    again = run(*worse, SMALL[1:4], MRSTFT, backend='triton', lengths=lengths)
    assert values.equal(again[0]) and grad.equal(again[1])
    assert not grad[1, 107:].any() and not grad[2, 160:].any()
    # an utterance alone, cut to its length: what the mix weighs it with is the only difference
    for b, n in enumerate(lengths.tolist()):
        x = enhanced[b:b + 1, :n].clone().requires_grad_()
        alone = stft_distance(x, clean[b:b + 1, :n], SMALL[1:4], MRSTFT, backend='triton').values
        torch.testing.assert_close(alone.detach()[0], values[b], rtol=1e-6, atol=0)
    for module in stft_triton_fft, stft_triton_gemm: monkeypatch.setattr(module, 'BUDGET', 1)
    chunked = run(enhanced, clean, SMALL[1:4], MRSTFT, backend='triton', lengths=lengths)
    assert values.equal(chunked[0]) and grad.equal(chunked[1])


@pytest.mark.interpreted
def test_same_bits_every_time_and_without_a_gradient(method):
    enhanced, clean = pair(2, 300)
    first, *rest = [run(enhanced, clean, SMALL[1:4], MRSTFT, backend='triton') for _ in range(3)]
    for again in rest: assert first[0].equal(again[0]) and first[1].equal(again[1])
    assert first[0].equal(stft_distance(enhanced, clean, SMALL[1:4], MRSTFT, backend='triton').values)


@pytest.mark.interpreted
def test_strides_and_offsets(method):
    enhanced, clean = pair(2, 300)
    wide = torch.zeros(301, 4)
    wide[1:, 1::2] = enhanced.T
    strided = wide[1:, 1::2].T
    want = run(enhanced, clean, SMALL[:2], MRSTFT, backend='triton')
    got = run(strided, clean, SMALL[:2], MRSTFT, backend='triton')
    assert want[0].equal(got[0]) and want[1].equal(got[1])
    one = stft_distance(enhanced, clean[:1].expand(2, -1), SMALL[:2], MRSTFT, backend='triton').values
    assert one[0].equal(want[0][0])


@pytest.mark.interpreted
def test_identity_silence_and_extremes(method):
    every = dict(resolutions=SMALL[1:3], terms=tuple(TERMS), weights=[1.] * len(TERMS), backend='triton')
    clean = pair(1, 180)[1]
    for wave in clean, torch.zeros(1, 180):
        x = wave.clone().requires_grad_()
        values = stft_distance(x, wave, **every).values
        assert not values.any()
        assert not torch.autograd.grad(values.sum(), x)[0].any()
    for scale in 1e-6, 32768.:          # -120 dBFS, int16
        x = (scale * torch.randn(1, 180)).requires_grad_()
        grad, = torch.autograd.grad(stft_distance(x, scale * clean, **every).values.sum(), x)
        assert grad.isfinite().all() and grad.all()
    impulse, constant = torch.zeros(1, 180), torch.ones(1, 180)
    impulse[0, 90] = 1
    check(impulse, .5 * constant, SMALL[1:3], ('lin_l2', 'compressed'))
    check(constant, impulse, SMALL[1:3], ('sc', 'lin_l2'))


@pytest.mark.interpreted
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_nan_shows_in_its_own_row_alone(bad, method):
    enhanced, clean = pair(2, 300)
    good = stft_distance(enhanced, clean, SMALL[:2], MRSTFT, backend='triton').values
    enhanced[1, 100] = bad
    values = stft_distance(enhanced, clean, SMALL[:2], MRSTFT, backend='triton').values
    assert not values[1].isfinite().any() and values[0].equal(good[0])


@pytest.mark.interpreted
def test_frames_of_very_different_level_keep_their_digits(method):
    "A power of two of its own for each frame: the quiet end is as exact as the loud one"
    enhanced, clean = pair(1, 600)
    quiet = 1e-4
    fade = torch.where(torch.arange(600) < 300, 1e3, quiet)
    check(enhanced * fade, clean * fade, SMALL[:1], ('log_l1', 'log_l2'), eps=1e-14)


@pytest.mark.interpreted
def test_split_that_lost_its_low_parts_is_not_trusted(monkeypatch):
    from speechloss.kernels import stft_triton, stft_triton_gemm
    device = torch.device('cpu')
    for mode in (*stft_triton_gemm.TILES, None):
        assert stft_triton.gradient_error(device, mode) < 1e-4, mode
    stft_triton.trusted_split.cache_clear()
    assert stft_triton.trusted_split(device) == 'fp16x3'

    def crippled(resolution, mode, device):
        table = stft_triton_tables.folded(resolution, mode, device)
        rough = [part.half().to(part.dtype) for part in table[:4]]
        return table._replace(cos=rough[0], cos_low=0 * rough[1], sin=rough[2], sin_low=0 * rough[3])
    monkeypatch.setattr(stft_triton_gemm, 'folded', crippled)
    stft_triton.trusted_split.cache_clear()
    with pytest.warns(UserWarning, match='fp16x3 products on cpu leave an error of .* in the gradient: not used'):
        assert stft_triton.trusted_split(device) is None
    stft_triton.trusted_split.cache_clear()


@pytest.mark.interpreted
def test_operator_with_the_triton_back_end(method):
    "Short types, autocast, and one wave kept for each output"
    enhanced, clean = pair(2, 300)
    want = run(enhanced.bfloat16(), clean.bfloat16(), SMALL[:2], MRSTFT, backend='triton')
    with torch.autocast('cpu', torch.bfloat16):
        got = run(enhanced.bfloat16(), clean.bfloat16(), SMALL[:2], MRSTFT, backend='triton')
    assert want[0].dtype == torch.float32 and want[1].dtype == torch.bfloat16
    assert want[0].equal(got[0]) and want[1].equal(got[1])
    plan = Plan(SMALL[:2], MRSTFT, filtered=(False, False))
    from speechloss.kernels.stft_triton import distance
    parts, waves = distance(enhanced, clean, None, [], plan, True)
    assert parts.shape == (2, 2, 2) and waves.shape == (2, 2, 300)
    right = stft_torch.distance(enhanced.double(), clean.double(), None, [], plan, True)
    assert apart(parts, right[0]) < 1e-5 and apart(waves, right[1]) < 1e-3
    assert distance(enhanced, clean, None, [], plan, False)[1].numel() == 0


@pytest.mark.interpreted
def test_operator_is_registered_as_torch_wants():
    enhanced, clean = pair(2, 200)
    text = Plan(SMALL[:1], MRSTFT, (1., 1.), filtered=(False,)).text()
    lengths = torch.tensor([200, 130])
    torch.library.opcheck(torch.ops.speechloss.stft_distance.default, (
        enhanced.clone().requires_grad_(), clean, lengths, [], text, 'triton', True))
    call = lambda x: stft_distance(x, clean, SMALL[:1], MRSTFT, backend='triton').values.square().sum()  # noqa: E731
    grads = []
    for function in call, torch.compile(call, fullgraph=True, backend='aot_eager'):
        x = enhanced.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x), x)[0])
    assert grads[0].equal(grads[1])


# ------------------------------------------------------------------------------------- a GPU

def on_gpu(*shape):
    return [wave.cuda() for wave in pair(*shape)]


@pytest.mark.cuda
@pytest.mark.parametrize('shape', [(1, 16000), (2, 16000), (3, 7919), (1, 1025)], ids=str)
@pytest.mark.parametrize('resolutions', [DEFAULTS, ODD], ids=['defaults', 'odd'])
@pytest.mark.parametrize('terms', [MRSTFT, tuple(TERMS)], ids=['mrstft', 'all'])
def test_gpu_gradient_is_as_good_as_plain_torch(shape, resolutions, terms, method):
    check(*on_gpu(*shape), resolutions, terms)


@pytest.mark.cuda
def test_gpu_filter_banks():
    banks = [torch.rand(r.bins, 80).cuda() for r in DEFAULTS]
    check(*on_gpu(2, 16000), DEFAULTS, ('log_l1', 'lin_l1'), filters=banks, offset=1e-5)


@pytest.mark.cuda
def test_gpu_splits_are_trusted_and_single_tf32_is_not(monkeypatch):
    from speechloss.kernels import stft_triton, stft_triton_gemm
    device = torch.device('cuda', torch.cuda.current_device())
    assert stft_triton.trusted_split(device) == 'fp16x3'
    for mode in stft_triton_gemm.TILES: assert stft_triton.gradient_error(device, mode) < stft_triton.TRUSTED
    monkeypatch.setitem(stft_triton_gemm.TILES, 'tf32', stft_triton_gemm.TILES['tf32x3'])
    assert stft_triton.gradient_error(device, 'tf32') > .01


@pytest.mark.cuda
def test_gpu_same_bits_every_time_and_in_any_batch(method):
    enhanced, clean = on_gpu(4, 7919)
    first, *rest = [run(enhanced, clean, DEFAULTS, MRSTFT, backend='triton') for _ in range(3)]
    for again in rest: assert first[0].equal(again[0]) and first[1].equal(again[1])
    order = [2, 0]
    values = stft_distance(enhanced[order], clean[order], DEFAULTS, MRSTFT, backend='triton').values
    if method == 'gemm': assert values.equal(first[0][order])
    else: torch.testing.assert_close(values, first[0][order], rtol=1e-6, atol=0)


@pytest.mark.cuda
def test_gpu_graph_capture(method):
    enhanced, clean = on_gpu(2, 7919)
    call = lambda: torch.ops.speechloss.stft_distance(   # noqa: E731
        enhanced, clean, None, [], Plan(DEFAULTS, MRSTFT, (1., 1.), filtered=(False,) * 3).text(), 'triton', True)
    want = [tensor.clone() for tensor in call()]          # compiles, and tests the precision
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream): call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): got = call()
    for wave in enhanced, clean: wave.mul_(.5)
    graph.replay()
    half = [tensor.clone() for tensor in got]
    for wave in enhanced, clean: wave.mul_(2)
    graph.replay()
    assert all(a.equal(b) for a, b in zip(want, got)) and not half[2].equal(want[2])


@pytest.mark.cuda
def test_gpu_compiles_into_one_graph(method):
    enhanced, clean = on_gpu(2, 7919)
    call = lambda x: stft_distance(x, clean, DEFAULTS, MRSTFT, weights=[1., 1.], backend='triton').values.sum()  # noqa: E731
    grads = []
    for function in call, torch.compile(call, fullgraph=True):
        x = enhanced.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x), x)[0])
    assert grads[0].equal(grads[1])


@pytest.mark.cuda
def test_gpu_memory_is_bounded_and_one_wave_is_kept(method):
    from speechloss.kernels.stft_triton_fft import BUDGET
    enhanced, clean = on_gpu(32, 64000)
    x = enhanced.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = stft_distance(x, clean, DEFAULTS, MRSTFT, weights=[1., 1.], backend='triton').values
    assert torch.cuda.memory_allocated() - before < 1.1 * x.nbytes
    assert torch.cuda.max_memory_allocated() - before < 1.5 * BUDGET + 8 * x.nbytes
    value.sum().backward()
