"""The loss that approximates PESQ, against the reference code of the standard."""
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.corpora import get
from speechloss.losses import PESQLoss
from speechloss.losses.functional import masking, pesq_distance
from speechloss.signal import load

RATE = 16_000


@pytest.fixture(scope='module')
def speech():
    return [load(item.path, sample_rate=RATE)[0][None, :48_000] for item in get('mini').speech()[:4]]


def noise(like, snr, seed=0):
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return 10 ** (-snr / 20) * like.norm() / drawn.norm() * drawn


def opinion(loss):
    "The mapping of P.862.2 on 4.5 less a loss"
    return .999 + 4 / (1 + (3.8224 - 1.3669 * (4.5 - loss)).exp())


def coloured(wave):
    "A wave without half of what is above 2 kHz"
    spectrum = torch.fft.rfft(wave)
    spectrum[:, spectrum.shape[1] // 4:] *= .5
    return torch.fft.irfft(spectrum, wave.shape[1])


def gated(wave):
    "A wave with 10 ms of silence in every 100"
    return wave * (torch.arange(wave.shape[1]) % 1600 >= 160)


def test_agrees_with_the_reference_code_of_the_standard(speech):
    reference = pytest.importorskip('pesq').pesq
    for number, clean in enumerate(speech):
        noisy = [clean + noise(clean, snr, number) for snr in (5, 20)]
        for enhanced in (*noisy, coloured(clean), gated(clean)):
            wanted = reference(RATE, clean[0].numpy(), enhanced[0].numpy(), 'wb')
            assert abs(opinion(PESQLoss()(enhanced, clean)) - wanted) < .15


def test_more_noise_costs_more_and_level_nothing(speech):
    clean = speech[0]
    values = [float(PESQLoss()(clean + noise(clean, snr), clean)) for snr in (40, 20, 10, 0, -10, -30)]
    assert values == sorted(values)
    assert abs(PESQLoss()(.1 * clean + .1 * noise(clean, 10), clean) - values[2]) < 1e-3


def test_gradient_is_the_slope_of_the_value(speech):
    clean = speech[1].double()
    enhanced = (clean + noise(clean, 10)).requires_grad_()
    way = noise(clean, 40, seed=1)
    grad, = torch.autograd.grad(PESQLoss()(enhanced, clean), enhanced)
    step = 1e-6
    with torch.no_grad():
        slope = (PESQLoss()(enhanced + step * way, clean) - PESQLoss()(enhanced - step * way, clean)) / (2 * step)
    assert float((grad * way).sum()) == pytest.approx(float(slope), rel=1e-3)


def test_a_frame_beyond_the_most_keeps_a_gradient():
    clean = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 1e-3
    loud = noise(clean, -60, seed=1).requires_grad_()
    PESQLoss()(loud, clean).backward()
    assert loud.grad.isfinite().all() and loud.grad.abs().max() > 0


@pytest.mark.parametrize('rate', [8_000, 24_000, 48_000])
def test_other_rates_are_resampled(rate, speech):
    from speechloss.features.base import resample_waves
    clean, noisy = speech[2], speech[2] + noise(speech[2], 15)
    up = [resample_waves(wave, RATE, rate) for wave in (noisy, clean)]
    lengths = torch.tensor([up[0].shape[1] - 999])
    loss = PESQLoss(sample_rate=rate)
    assert loss(*up, lengths=lengths) == pytest.approx(float(loss(*(wave[:, :-999] for wave in up))), rel=2e-3)
    if rate > RATE: assert loss(*up) == pytest.approx(float(PESQLoss()(noisy, clean)), abs=.1)


@pytest.mark.parametrize('function', [pesq_distance, masking])
def test_functions_ignore_autocast(function):
    draw = torch.Generator().manual_seed(0)
    clean, added = .1 * torch.randn(2, 1, 8000, generator=draw)
    with torch.autocast('cpu', torch.bfloat16): inside = function(clean + .1 * added, clean)
    assert inside.equal(function(clean + .1 * added, clean))


def test_holds_no_state_and_says_what_is_wanted():
    assert not PESQLoss().state_dict() and not list(PESQLoss().parameters())
    with pytest.raises(SpeechLossError, match='sample_rate is None: give the Hz'): PESQLoss(sample_rate=None)
