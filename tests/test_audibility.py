"""Six errors of one energy: what each is, and that the masked one hides."""
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.corpora import get
from speechloss.losses import MaskingLoss
from speechloss.signal import load, resample, MaskingModel
from speechloss.signal.audibility import NAMES, audible, errors_of

RATE = 16_000


@pytest.fixture(scope='module')
def clips():
    return [load(r.path, sample_rate=RATE)[0][RATE:3 * RATE] for r in get('mini').speech()[:3]]


@pytest.mark.parametrize('margin', [0., 3., 10.])
def test_one_energy_and_one_that_hides(clips, margin):
    for clean in clips:
        errors = errors_of(clean, margin_db=margin)
        energies = torch.stack([e.square().sum() for e in errors.values()])
        assert tuple(errors) == NAMES and (energies / energies[0] - 1).abs().max() < 1e-9
        assert audible(clean, errors['masked']) == pytest.approx(-margin, abs=1e-6)
        assert min(audible(clean, errors[name]) for name in NAMES[1:]) > 0


def test_each_error_is_what_it_says(clips):
    clean = clips[0].double()
    errors = errors_of(clips[0])
    clipped = clean + errors['clipped']
    most = clipped.abs().max()
    assert torch.allclose(clipped, clean.clamp(-most, most), atol=1e-9)      # nothing but clipping
    kept = torch.fft.rfft(clean + errors['band']).abs()
    whole = torch.fft.rfft(clean).abs()
    lost = (kept < .5 * whole) & (whole > 1e-3)
    first = int(lost.nonzero()[0])
    assert first > 500 and torch.allclose(kept[:first - 1], whole[:first - 1], rtol=1e-6, atol=1e-9)
    echo = errors['pre_echo'].nonzero().flatten()
    assert len(echo) == 320 and int(echo[-1] - echo[0]) == 319
    after, before = (clean[int(echo[-1]) + 1:][:320], clean[int(echo[0]):int(echo[-1]) + 1])
    assert after.square().mean() > 3 * before.square().mean()
    model = MaskingModel()
    white, valleys = ((model.power(errors[n][None])[0] * model.threshold(model.power(clean[None]))[0]).mean()
                      for n in ('white', 'valleys'))
    assert valleys < white


def test_the_masking_loss_ranks_the_masked_error_last(clips):
    loss = MaskingLoss()
    for clean in clips:
        values = {name: float(loss(clean + e.float(), clean)) for name, e in errors_of(clean).items()}
        assert min(values, key=values.get) == 'masked'


def test_seeds_and_rates(clips):
    a, b, other = errors_of(clips[0]), errors_of(clips[0]), errors_of(clips[0], seed=1)
    assert all(torch.equal(a[k], b[k]) for k in NAMES) and not torch.equal(a['masked'], other['masked'])
    model = MaskingModel(8_000, 256, 128)
    slow = resample(clips[0], RATE, 8_000)
    assert audible(slow, errors_of(slow, model=model)['masked'], model=model) == pytest.approx(-3., abs=1e-6)


@pytest.mark.parametrize('clean,said', [
    (torch.zeros(RATE), 'silent'), (torch.full((RATE,), torch.nan), 'holds NaN'),
    (torch.randn(100), 'a second or more'),
    (torch.randn(2, RATE), 'one channel'), (torch.ones(RATE, dtype=torch.int16), 'int16')])
def test_one_sentence(clean, said):
    with pytest.raises(SpeechLossError, match=said): errors_of(clean)
