"""The loss from short-time objective intelligibility, against the package pystoi."""
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.corpora import get
from speechloss.features.base import resample_waves
from speechloss.losses import STOILoss, build, build_objective
from speechloss.losses.functional import stoi_distance
from speechloss.signal import load

RATE, OWN = 16_000, 10_000
FORMS = pytest.mark.parametrize('extended', [False, True], ids=['stoi', 'estoi'])


def noise(like, snr, seed=0):
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (10 ** (-snr / 20) * like.norm() / drawn.norm() * drawn).to(like)


@pytest.fixture(scope='module')
def pairs():
    "Ten clips at 16 kHz in noise, `(1, T)` each, float64, of different length, level and noise; one with a gap"
    found = []
    for k, item in enumerate(get('mini').speech()[:10]):
        clean = load(item.path, sample_rate=RATE)[0][None, :RATE + 5001 * k].double() * 10 ** (-k / 4)
        enhanced = clean + noise(clean, 3 * k - 8, seed=k)
        if k == 3: enhanced[:, 4000:9000] = 0
        found.append((enhanced, clean))
    return found


@pytest.fixture(scope='module')
def measure(): return pytest.importorskip('pystoi').stoi


@FORMS
def test_agrees_with_the_package_at_its_own_rate(extended, pairs, measure):
    for pair in pairs:
        enhanced, clean = (resample_waves(wave, RATE, OWN) for wave in pair)
        wanted = measure(clean[0].numpy(), enhanced[0].numpy(), OWN, extended=extended)
        loss = STOILoss(sample_rate=OWN, extended=extended)
        assert abs(1 - loss(enhanced, clean) - wanted) < 1e-5
        assert abs(1 - loss(enhanced.float(), clean.float()) - wanted) < 1e-4


@FORMS
def test_agrees_with_the_package_where_both_resample(extended, pairs, measure):
    "Another filter: a frame near the limit of silence may count here and not there"
    for enhanced, clean in pairs:
        wanted = measure(clean[0].numpy(), enhanced[0].numpy(), RATE, extended=extended)
        assert abs(1 - STOILoss(extended=extended)(enhanced, clean) - wanted) < 2e-3


@FORMS
def test_agrees_with_the_package_where_silence_counts(extended, pairs, measure, monkeypatch):
    monkeypatch.setattr('pystoi.utils.remove_silent_frames', lambda clean, other, *rest: (clean, other))
    loss = STOILoss(sample_rate=OWN, extended=extended, remove_silence=False)
    for pair in pairs[:4]:
        enhanced, clean = (resample_waves(wave, RATE, OWN) for wave in pair)
        wanted = measure(clean[0].numpy(), enhanced[0].numpy(), OWN, extended=extended)
        assert abs(1 - loss(enhanced, clean) - wanted) < 1e-5


def test_a_batch_gives_what_its_clips_give(pairs):
    size = max(clean.shape[1] for _, clean in pairs)
    lengths = [clean.shape[1] for _, clean in pairs]
    batch = [torch.cat([torch.nn.functional.pad(pair[which], (0, size - n), value=torch.nan)
                        for pair, n in zip(pairs, lengths)]) for which in (0, 1)]
    found = stoi_distance(*batch, lengths=torch.tensor(lengths))
    torch.testing.assert_close(found, torch.cat([stoi_distance(*pair) for pair in pairs]), rtol=0, atol=1e-9)


@pytest.mark.parametrize('remove_silence', [True, False])
@FORMS
def test_gradient_is_the_slope_of_the_value(extended, remove_silence):
    time = torch.arange(5000, dtype=torch.float64)
    clean = torch.stack([(time / 150).sin() + 1.02, (time < 3000) + .003]) * noise(torch.ones(2, 5000).double(), 0)
    enhanced = clean + noise(clean, 3, seed=1)
    enhanced[:, ::9] *= 20 * torch.rand(enhanced[:, ::9].shape, dtype=torch.float64)     # some is clipped
    torch.autograd.gradcheck(
        lambda wave: stoi_distance(wave, clean, lengths=torch.tensor([5000, 4111]), sample_rate=OWN,
                                   extended=extended, remove_silence=remove_silence),
        enhanced.requires_grad_(), fast_mode=True, eps=1e-6, atol=1e-6, rtol=1e-4)


@FORMS
def test_more_noise_costs_more_and_level_nothing(extended, pairs):
    clean, loss = pairs[4][1].float(), STOILoss(extended=extended)
    values = [float(loss(clean + noise(clean, snr), clean)) for snr in (30, 20, 10, 0, -10)]
    assert values == sorted(values)
    assert abs(loss(1e-3 * clean + 1e-3 * noise(clean, 10), clean) - values[2]) < 1e-4


def test_noise_alone_and_8_khz(pairs, measure):
    "What its docstring and chapter say of both"
    for k in (0, 4, 9):
        clean = pairs[k][1].float()
        hiss = noise(torch.ones_like(clean), 0, seed=k)
        assert .4 < STOILoss()(hiss, clean) < .95 and .9 < STOILoss(extended=True)(hiss, clean) < 1.1
        enhanced, clean = (resample_waves(wave, RATE, 8000) for wave in pairs[k])
        wanted = measure(clean[0].numpy(), enhanced[0].numpy(), 8000)
        assert abs(1 - STOILoss(sample_rate=8000)(enhanced, clean) - wanted) < .01


@FORMS
def test_identity_and_silence(extended):
    "Finite in float32, alone and beside speech; the value of silence is that of no error, or of nothing heard"
    zero, sound = torch.zeros(1, RATE), noise(torch.ones(1, RATE), 20)
    for enhanced, clean, wanted in ((sound, sound, 0), (zero, zero, 0), (sound, zero, 0), (zero, sound, 1)):
        wave = torch.cat([enhanced, sound]).requires_grad_()
        values = stoi_distance(wave, torch.cat([clean, sound + .1]), extended=extended)
        values.sum().backward()
        assert values[0].item() == pytest.approx(wanted, abs=1e-5) and wave.grad.isfinite().all()
        assert wanted and not wave.grad[0].any() or wave.grad[0].abs().max() < 1e-6


def test_a_short_clip_is_repeated(pairs):
    "To the 31 frames that a segment needs, alone and in a batch with a long one; nothing is too short"
    enhanced, clean = (resample_waves(wave, RATE, OWN)[:, 6000:8560] for wave in pairs[8])     # 18 frames
    enhanced = enhanced.clone().requires_grad_()
    value = stoi_distance(enhanced, clean, sample_rate=OWN, remove_silence=False)
    value.sum().backward()
    assert 0 < value < 2 and enhanced.grad.abs().max() > 0
    twice = (wave[:, :19 * 128].repeat(1, 2)[:, :31 * 128 + 1] for wave in (enhanced.detach(), clean))
    assert value.item() == pytest.approx(float(stoi_distance(*twice, sample_rate=OWN, remove_silence=False)), abs=1e-9)
    batch = (torch.nn.functional.pad(wave.detach(), (0, 5000)).repeat(2, 1) for wave in (enhanced, clean))
    both = stoi_distance(*batch, lengths=[7560, 2560], sample_rate=OWN, remove_silence=False)
    assert both[1].item() == pytest.approx(value.item(), abs=1e-9)
    for size in (1, 100, 257): assert stoi_distance(enhanced[:, :size], clean[:, :size], sample_rate=OWN).isfinite()


def test_silence_is_left_out(pairs):
    enhanced, clean = pairs[6]
    quiet = torch.zeros(1, 2 * RATE).double()
    spoilt = [torch.cat([wave[:, :20_000], gap, wave[:, 20_000:]], 1)
              for wave, gap in ((enhanced, noise(quiet + 1, 80)), (clean, quiet))]
    found, whole = stoi_distance(*spoilt), stoi_distance(*spoilt, remove_silence=False)
    assert found.item() == pytest.approx(float(stoi_distance(enhanced, clean)), abs=.01)
    assert (whole - found).abs() > .05


@FORMS
def test_a_clean_band_of_rounding_does_not_count(extended):
    spectrum = torch.fft.rfft(noise(torch.ones(1, OWN), 0) * torch.linspace(0, 7, OWN).sin())
    low = torch.fft.irfft(spectrum * (torch.arange(spectrum.shape[1]) < 1000), OWN)
    assert stoi_distance(low + 1e-5 * noise(low, 0), low, sample_rate=OWN, extended=extended) < .05


@pytest.mark.parametrize('rate', [8_000, 24_000, 48_000])
def test_other_rates_are_resampled(rate, pairs):
    up = [resample_waves(wave.float(), RATE, rate) for wave in pairs[7]]
    lengths = torch.tensor([up[0].shape[1] - 999])
    loss = STOILoss(sample_rate=rate)
    assert loss(*up, lengths=lengths) == pytest.approx(float(loss(*(wave[:, :-999] for wave in up))), rel=1e-4)
    if rate > RATE: assert loss(*up) == pytest.approx(float(STOILoss()(*pairs[7])), abs=.01)


def test_function_ignores_autocast(pairs):
    enhanced, clean = (wave.float() for wave in pairs[0])
    with torch.autocast('cpu', torch.bfloat16): inside = stoi_distance(enhanced, clean)
    assert inside.equal(stoi_distance(enhanced, clean))


@FORMS
def test_keeps_no_segments(extended, pairs):
    "What waits for the backward pass is spectra and one gradient of the envelope"
    enhanced, clean = (wave.float() for wave in pairs[9])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().nbytes()) or t,
                                                  lambda t: t):
        STOILoss(extended=extended)(enhanced.clone().requires_grad_(), clean)
    frames = enhanced.shape[1] * OWN // RATE // 128
    assert sum(kept) < 4 * frames * (257 * 2 + 256 + 40 * 15)      # a segment a frame would be 450 numbers each
    grad, = torch.autograd.grad(STOILoss()(wave := enhanced.clone().requires_grad_(), clean), wave, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): grad.sum().backward()


def test_a_recipe_takes_it_by_name(pairs):
    pair = [wave.float() for wave in pairs[1]]
    assert build(dict(name='stoi', extended=True))(*pair).equal(STOILoss(extended=True)(*pair))
    both = build_objective(dict(terms=dict(a='stoi', b='wave_l1'), weights=dict(a=.3), sample_rate=RATE))
    assert both(*pair).isfinite() and list(STOILoss().terms(*pair)) == ['stoi']


def test_holds_no_state_and_says_what_is_wanted():
    assert not STOILoss().state_dict() and not list(STOILoss().parameters())
    with pytest.raises(SpeechLossError, match='sample_rate is None: give the Hz'): STOILoss(sample_rate=None)
    with pytest.raises(SpeechLossError, match='is 8000.5: give whole Hz above 0$'): STOILoss(sample_rate=8000.5)
