"""Rates of waves: every loss and feature takes one, a network hears its own, and a sum holds its losses to one."""
import inspect

import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.common.libraries import torchaudio_module
from speechloss.features.base import resample_waves
from speechloss.losses import CARDS, Objective, build, build_objective
from speechloss.losses.registry import FEATURES


def harmonics(rate, more=0.):
    "A second of a voice-like tone, with some of a fourth partial"
    time = torch.arange(rate, dtype=torch.float64) / rate
    partials = {200: .1, 500: .1, 1100: .1, 3000: more}
    return sum(level * (2 * torch.pi * hertz * time).sin() for hertz, level in partials.items()).float()


@pytest.mark.parametrize('cls', [card.loss for card in CARDS.values()] + list(FEATURES.values()) + [Objective],
                         ids=lambda cls: cls.__name__)
def test_everything_takes_a_rate(cls):
    assert 'sample_rate' in inspect.signature(cls).parameters


@pytest.mark.parametrize('orig', [8000, 22050, 44100, 48000])
def test_resampling_is_that_of_torchaudio(orig):
    wave = torch.randn(2, 5001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try: right = torchaudio_module().functional.resample(wave, orig, 16000, lowpass_filter_width=16, rolloff=.945)
    except SpeechLossError: pytest.skip('needs torchaudio')
    torch.testing.assert_close(resample_waves(wave, orig, 16000), right, rtol=0, atol=1e-5)


def test_resampling_has_a_gradient():
    wave = torch.randn(1, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample_waves(x, 48000, 16000), wave)


@pytest.mark.parametrize('name', ['vq', 'codec', 'ssl'])
def test_a_network_hears_its_own_rate(name):
    right = build(name)(harmonics(16000, .02), harmonics(16000))
    enhanced = harmonics(48000, .02).requires_grad_()
    found = build(dict(name=name, sample_rate=48000))(enhanced, harmonics(48000))
    found.backward()
    torch.testing.assert_close(found, right, rtol=.1, atol=0)
    assert enhanced.grad.isfinite().all() and enhanced.grad.any()


@pytest.mark.parametrize('name', ['vq', 'codec', 'ssl'])
def test_lengths_at_another_rate(name):
    loss, waves = build(dict(name=name, sample_rate=48000, reduction='none')), torch.randn(2, 2, 24000) * .1
    both = loss(*waves, lengths=[24000, 15000])
    torch.testing.assert_close(both[1], loss(waves[0, 1:, :15000], waves[1, 1:, :15000])[0], rtol=1e-3, atol=1e-5)


def test_one_rate_for_a_sum():
    spec = dict(a='snr', m='mel', v='vq', c=dict(name='contrastive', features='mel'))
    whole = build_objective(dict(terms=spec, sample_rate=48000))
    assert whole.sample_rate == 48000 and {loss.sample_rate for loss in whole.losses.values()} <= {48000, None}
    assert whole.losses['v'].sample_rate == whole.losses['m'].sample_rate == 48000
    assert build_objective(dict(terms=dict(a='snr'))).sample_rate is None
    assert build_objective(dict(terms=dict(a='snr', m='mel'))).sample_rate == 16000
    with pytest.raises(SpeechLossError, match="'v' is for waves of 16000 Hz"):
        build_objective(dict(terms=dict(m=dict(name='mel', sample_rate=8000), v='vq')))
    with pytest.raises(SpeechLossError, match='features hear 16000'):
        build(dict(name='feature_distance', features='mel', sample_rate=48000))


@pytest.mark.parametrize('rate', [0, -1, 1.5, True, '16000'])
def test_rates_that_are_none(rate):
    for name in ('snr', 'vq', 'stft'):
        with pytest.raises(SpeechLossError, match='sample_rate'): build(dict(name=name, sample_rate=rate))


def test_the_mel_loss_builds_from_its_name():
    assert build('mel')(harmonics(16000), harmonics(16000)) == 0
