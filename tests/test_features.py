"""Spectra and features: against torch and librosa, at the true length of every utterance."""
import copy
from functools import partial

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from helpers import TinyModel, close_grad, waves
from torch import nn

from speechloss.features import (
    Features, Frozen, randomized, EncoderFeatures, RandomFeatures, GammatoneFeatures, MelFeatures,
    STFTFeatures)
from speechloss.models import enhancer
from speechloss.signal import gammatone_filters, istft, mel_filters, stft
from speechloss.signal.auditory import BANDWIDTH, erb_centres, erb_width
from speechloss.signal.spectra import (
    compress, frame_count, frame_mask, hz_to_mel, magnitude, mel_to_hz, pad_reflect)

SETTINGS = [(512, 128, None), (400, 100, 400), (512, 50, 240), (512, 128, 321), (63, 16, 63)]
SETS = {
    'stft': partial(STFTFeatures, resolutions=((512, 128), (256, 100))),
    'stft-log': partial(STFTFeatures, kind='log'),
    'stft-complex': partial(STFTFeatures, kind='complex'),
    'mel': partial(MelFeatures, sample_rate=16000),
    'gammatone': partial(GammatoneFeatures, sample_rate=16000),
    'random': RandomFeatures,
    'bottleneck': lambda: EncoderFeatures(TinyModel()),
    'all': lambda: EncoderFeatures(TinyModel(), layers='all'),
    'small': lambda: EncoderFeatures(enhancer('small'), layers='all'),
}


# --- spectra ---

@pytest.mark.parametrize('n_fft, hop, win', SETTINGS)
def test_stft_against_torch(n_fft, hop, win):
    wave = waves()[0]
    window = torch.hann_window(win or n_fft)
    wanted = torch.stft(wave, n_fft, hop, win or n_fft, window, center=True, pad_mode='reflect',
                        return_complex=True).transpose(1, 2)
    found = stft(wave, n_fft, hop, win)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.shape[1] == frame_count(wave.shape[1], hop)


def test_stft_against_numpy():
    wave = waves(1, dtype=torch.float64)[0]
    padded = np.pad(wave[0].numpy(), 200, mode='reflect')
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::100]
    window = .5 - .5 * np.cos(2 * np.pi * np.arange(400) / 400)
    np.testing.assert_allclose(stft(wave, 400, 100)[0], np.fft.rfft(frames * window), atol=1e-10)


@pytest.mark.parametrize('n_fft, hop, win', [(512, 128, None), (400, 100, 400), (512, 64, 321)])
def test_istft_is_the_inverse(n_fft, hop, win):
    wave = waves(dtype=torch.float64)[0]
    back = istft(stft(wave, n_fft, hop, win), n_fft, hop, win, length=wave.shape[1])
    torch.testing.assert_close(back, wave)


def test_known_spectra():
    "A sine in the middle of a bin, DC, an impulse, and Parseval's sum"
    time = torch.arange(2048, dtype=torch.float64)
    sine = torch.cos(2 * torch.pi * 32 / 512 * time)[None]
    mag = magnitude(stft(sine))[0, 8]               # away from the ends
    assert mag.argmax() == 32 and mag[32].item() == pytest.approx(512 / 4, rel=1e-6)
    assert mag[[30, 34]].max() < 1e-3
    assert stft(torch.ones(1, 2048))[0, 8, 0].real.item() == pytest.approx(256, rel=1e-5)
    impulse = torch.zeros(1, 2048)
    impulse[0, 1024] = 1
    assert magnitude(stft(impulse))[0, 8].allclose(torch.ones(257))
    noise = torch.randn(1, 2048, dtype=torch.float64)
    frame = noise[0, 1024 - 256:1024 + 256] * torch.hann_window(512, dtype=torch.float64)
    spec = stft(noise)[0, 8]
    both = 2 * spec.abs().square().sum() - spec[[0, -1]].abs().square().sum()
    assert both.item() == pytest.approx(512 * frame.square().sum().item())


@given(lengths=st.lists(st.integers(40, 300), min_size=1, max_size=4), pad=st.integers(0, 39))
def test_pad_reflect(lengths, pad):
    wave = torch.randn(len(lengths), 300)
    padded = pad_reflect(wave, pad, torch.tensor(lengths))
    assert padded.shape == (len(lengths), 300 + 2 * pad)
    for found, w, n in zip(padded, wave, lengths):
        assert found[:n + 2 * pad].equal(torch.from_numpy(np.pad(w[:n].numpy(), pad, mode='reflect')))
        assert (found[n + 2 * pad:] == 0).all()


def test_ragged_gradient_of_pad_reflect():
    wave, lengths = torch.randn(2, 60, dtype=torch.float64), torch.tensor([60, 31])
    torch.autograd.gradcheck(lambda w: pad_reflect(w, 20, lengths), wave.requires_grad_())


def test_frame_mask():
    assert frame_mask(torch.tensor([0, 2, 3]), 3).int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_compress():
    spec = torch.randn(2, 5, dtype=torch.complex128)
    polar = torch.polar(spec.abs() ** .3, spec.angle())
    torch.testing.assert_close(torch.view_as_complex(compress(spec)), polar, rtol=1e-5, atol=1e-5)
    zero = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    (compress(zero).sum() + magnitude(zero).sum()).backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().min() > 0


@pytest.mark.parametrize('htk', [False, True])
@pytest.mark.parametrize('norm', ['slaney', None])
def test_mel_filters_against_librosa(htk, norm):
    for options in (dict(n_mels=80, n_fft=1024, sr=16000), dict(n_mels=40, n_fft=512, sr=8000),
                    dict(n_mels=128, n_fft=2048, sr=24000, fmin=50., fmax=9000.)):
        wanted = librosa.filters.mel(**options, htk=htk, norm=norm, dtype=np.float64)
        f = mel_filters(options['n_mels'], options['n_fft'], options['sr'],
                        f_min=options.get('fmin', 0.), f_max=options.get('fmax'),
                        scale='htk' if htk else 'slaney', norm=norm)
        np.testing.assert_allclose(f.T, wanted, atol=1e-10)


@given(hz=st.floats(0, 24000), scale=st.sampled_from(['slaney', 'htk']))
def test_mel_scale(hz, scale):
    mel = hz_to_mel(hz, scale)
    assert mel_to_hz(torch.tensor(mel, dtype=torch.float64), scale).item() == pytest.approx(hz, abs=1e-6)
    assert mel == pytest.approx(librosa.hz_to_mel(hz, htk=scale == 'htk'), abs=1e-9)


# --- features ---

@pytest.mark.parametrize('name', SETS)
def test_contract_of_features(name):
    features, wave = SETS[name](), waves()[0]
    out = features(wave)
    assert len(out) == len(features.names) == len(set(features.names))
    assert all(isinstance(n, str) for n in features.names)
    counts = features.frame_lengths(torch.tensor([wave.shape[1]] * 3))
    assert [o.shape[:2] for o in out] == [(3, n[0]) for n in counts]
    assert all(o.dtype == wave.dtype for o in out)
    assert all(o.dtype == torch.float64 for o in features(wave.double()))
    assert not features.state_dict() and not list(features.parameters())
    assert all(a.equal(b) for a, b in zip(out, copy.deepcopy(features)(wave)))


@pytest.mark.parametrize('name', SETS)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1100, 3001), min_size=3, max_size=3))
def test_features_are_those_of_the_utterance_alone(name, lengths):
    "Values and gradients; `frame_lengths` counts what the utterance has alone"
    features, wave = SETS[name](), waves()[0]
    for w, n in zip(wave, lengths): w[n:] = 0
    wave.requires_grad_()
    out, counts = features(wave, torch.tensor(lengths)), features.frame_lengths(torch.tensor(lengths))
    total = sum(o[i, :c[i]].square().mean() for o, c in zip(out, counts) for i in range(3))
    grad, = torch.autograd.grad(total, wave)
    for i, n in enumerate(lengths):
        leaf = wave[i:i + 1, :n].detach().requires_grad_()
        alone = features(leaf)
        for o, c, a in zip(out, counts, alone):
            assert c[i] == a.shape[1]
            torch.testing.assert_close(o[i, :c[i]], a[0], rtol=1e-4, atol=1e-4)
        wanted, = torch.autograd.grad(sum(a.square().mean() for a in alone), leaf)
        close_grad(grad[i, :n], wanted[0], 1e-3)


def test_mel_features_against_librosa():
    wave = waves(1, dtype=torch.float64)[0]
    mag = librosa.feature.melspectrogram(y=wave[0].numpy(), sr=16000, n_fft=1024, hop_length=256,
                                         n_mels=80, power=1., pad_mode='reflect')
    found = MelFeatures(sample_rate=16000)(wave)[0][0].T
    np.testing.assert_allclose(found, np.log(mag + 1e-5), atol=2e-3)


# --- the filters of the ear ---

def test_centres_lie_evenly_on_the_erb_scale():
    "At a fixed distance in ERBs, each ERB being what the next one is measured with"
    for n_bands, low, high in ((64, 50., 8000.), (8, 0., 4000.)):
        centres = erb_centres(n_bands, low, high).numpy()
        assert centres[0] == pytest.approx(low) and len(centres) == n_bands
        edges = np.append(centres, high)
        steps = [np.mean(1 / erb_width(np.linspace(a, b, 1001))) * (b - a)
                 for a, b in zip(edges[:-1], edges[1:])]
        np.testing.assert_allclose(steps, steps[0], rtol=1e-5)


@pytest.mark.parametrize('rate', [8000, 16000, 48000])
def test_gammatone_filters_against_their_closed_form(rate):
    "On a grid of 1 Hz: the peak, the width at -3 dB, and the equivalent rectangle"
    bank, centres = gammatone_filters(32, rate, rate), erb_centres(32, 50, rate / 2)
    power = bank.square()
    assert (bank.argmax(0) - centres).abs().max() <= .5 and bank.max() <= 1
    wide = (power >= .5).sum(0)
    assert (wide - 2 * (2 ** .25 - 1) ** .5 * BANDWIDTH * erb_width(centres)).abs().max() <= 1
    torch.testing.assert_close(power.sum(0)[:-1], erb_width(centres)[:-1], rtol=6e-3, atol=0)
    assert .95 < power.sum(0)[-1] / erb_width(centres[-1]) < 1    # a skirt is beyond the grid
    below = bank[:-1, 16].diff() > 0       # rises to its centre and falls from there
    assert (below[:int(centres[16])]).all() and not below[int(centres[16]) + 1:].any()


@pytest.mark.parametrize('band', [0, 5, 17, 26])
def test_gammatone_filters_against_a_filter_in_time(band):
    "Noise through the impulse response of a real gammatone, and the power that comes out"
    centre = float(erb_centres(32, 50, 8000)[band])
    time = np.arange(16384) / 16000
    envelope = time ** 3 * np.exp(-2 * np.pi * BANDWIDTH * erb_width(centre) * time)
    response = np.abs(np.fft.rfft(envelope * np.cos(2 * np.pi * centre * time), 2 ** 16))
    noise = np.random.default_rng(band).normal(size=2 ** 16)
    spectrum = np.fft.rfft(noise)
    truth = np.sum(np.abs(spectrum * response / response.max()) ** 2)
    found = np.sum(np.abs(spectrum * gammatone_filters(32, 2 ** 16, 16000)[:, band].numpy()) ** 2)
    assert 10 * np.log10(found / truth) == pytest.approx(0, abs=.1)


def test_gammatone_features_of_a_sine_and_of_noise():
    "A sine leads in the band it is the centre of; white noise rises with the bandwidth"
    features, centres = GammatoneFeatures(sample_rate=16000), erb_centres(64, 50, 8000)
    time = torch.arange(16000, dtype=torch.float64) / 16000
    for band in (20, 35, 50, 63):
        sine = torch.cos(2 * torch.pi * centres[band] * time)[None]
        level = features(sine)[0][0, 30]
        # the main lobe of the window lies within the band: amplitude 1 in a Hann window
        energy = (3 / 8 * 1024 * 1024 / 4) ** .5
        assert level.argmax() == band
        assert level[band].exp().item() == pytest.approx(energy, rel=.2 if band < 30 else .05)
    noise = torch.randn(1, 160_000, dtype=torch.float64)
    power = (2 * features(noise)[0][0, 4:-4]).exp().mean(0)
    wanted = 3 / 8 * 1024 * erb_width(centres) / (16000 / 1024)
    torch.testing.assert_close(power[2:-1] / wanted[2:-1], torch.ones(61).double(), rtol=.1, atol=0)


def test_wrong_gammatones():
    for options, said in ((dict(sample_rate=48000), 'n_fft is 1024.*lowest filter .30.1 Hz.*larger n_fft'),
                          (dict(sample_rate=16000, f_min=8000.), 'f_min is 8000 .*f_min < f_max <= 8000'),
                          (dict(sample_rate=16000, f_min=-1.), 'f_min is -1')):
        with pytest.raises(ValueError, match=said): GammatoneFeatures(**options)
    assert GammatoneFeatures(sample_rate=48000, n_fft=2048)(torch.randn(1, 4800))[0].shape == (1, 19, 64)


def test_random_features():
    wave = waves()[0]
    layers = ((4, 10, 5), (6, 4, 2))
    random = RandomFeatures(layers=layers, seed=5)
    assert random.reach == 10 + 3 * 5
    assert [o.shape for o in random(wave[:, :random.reach])] == [(3, 4, 4), (3, 1, 6)]
    for short in (dict(wave=wave[:, :24]), dict(wave=wave, lengths=torch.tensor([3001, 24, 99]))):
        with pytest.raises(ValueError, match='24 samples.*at least 25'): random(**short)
    state = torch.get_rng_state()
    again = RandomFeatures(layers=layers, seed=5)
    assert torch.get_rng_state().equal(state)      # the caller's randomness is his own
    assert again(wave)[1].equal(random(wave)[1])
    assert not RandomFeatures(layers=layers, seed=6)(wave)[1].equal(random(wave)[1])


def test_encoder_features():
    model, wave = TinyModel().train(), waves()[0]
    features = EncoderFeatures(model)
    assert features.names == ('bottleneck',) and features.sample_rate is None
    frozen = copy.deepcopy(model).eval()
    torch.testing.assert_close(features(wave)[0], frozen.encode(wave))
    assert EncoderFeatures(model, layers='all').names == ('layer0', 'layer1')
    last, first = EncoderFeatures(model, layers=[1, 0])(wave)
    assert last.shape[-1] == 6 and first.shape[-1] == 8
    assert model.training and all(p.requires_grad for p in model.parameters())
    model.sample_rate = 8000
    assert EncoderFeatures(model).sample_rate == 8000
    assert EncoderFeatures(model, sample_rate=16000).sample_rate == 16000
    with pytest.raises(TypeError, match='Linear, which has no method encode'):
        EncoderFeatures(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers 'deepest' is unknown"): EncoderFeatures(model, layers='deepest')


def test_an_encoder_keeps_its_precision():
    features, wave = EncoderFeatures(TinyModel()), waves()[0]
    single = features(wave.double())[0]
    assert single.dtype == torch.float64 and single.float().equal(features(wave)[0])
    exact = features.double()(wave.double())[0]
    torch.testing.assert_close(exact, single, rtol=1e-4, atol=1e-6)
    assert not exact.equal(single)
    assert features(wave)[0].dtype == torch.float32


def test_frozen():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(.5), nn.BatchNorm1d(2)).train()
    parent = nn.ModuleDict(dict(frozen=Frozen(net), own=nn.Linear(2, 2))).train()
    assert set(parent.state_dict()) == {'own.weight', 'own.bias'} == {n for n, _ in parent.named_parameters()}
    assert not any(m.training for m in net.modules())
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 2, requires_grad=True)
    parent['frozen'](x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    parent.double()
    assert net[0].weight.dtype == torch.float64 and not net[0].weight.requires_grad
    twin = copy.deepcopy(parent)
    assert twin['frozen'].net is not net


def test_frozen_recurrent_layers():
    "Ready for cuDNN, which runs backwards in training mode only, and the same numbers"
    net = nn.GRU(3, 4, num_layers=2, dropout=.9, batch_first=True)
    plain = copy.deepcopy(net).eval()
    x = torch.randn(2, 7, 3)
    frozen = Frozen(copy.deepcopy(net))
    assert frozen.net.training and frozen.net.dropout == 0 and net.dropout == .9
    torch.testing.assert_close(frozen(x)[0], plain(x)[0])
    assert frozen(x)[0].equal(frozen(x)[0])


def test_randomized():
    model = enhancer('small')
    state = torch.get_rng_state()
    fresh, again = randomized(model, seed=1), randomized(model, seed=1)
    assert torch.get_rng_state().equal(state)
    weights = dict(model.named_parameters())
    for (name, a), b in zip(fresh.named_parameters(), again.parameters()):
        assert a.equal(b)
        if a.ndim > 1: assert not a.equal(weights[name]), name
    wave = waves()[0]
    assert not EncoderFeatures(fresh)(wave)[0].equal(EncoderFeatures(model)(wave)[0])
    assert not any(a.equal(b) for a, b in zip(randomized(model, seed=2).parameters(), fresh.parameters())
                   if a.ndim > 1)


def test_wrong_options():
    with pytest.raises(ValueError, match="kind 'phase' is unknown.*log, magnitude, complex"): STFTFeatures(kind='phase')
    with pytest.raises(ValueError, match='window is .*triangle'): stft(waves()[0], window='triangle')
    with pytest.raises(ValueError, match=r'win_length is 600.*1\.\.n_fft \(512\)'): stft(waves()[0], win_length=600)
    with pytest.raises(ValueError, match='256 samples.*at least .* 257'): stft(torch.zeros(1, 256))
    with pytest.raises(ValueError, match='n_mels is 200.*filters without a bin'): mel_filters(200, 512, 16000)
    with pytest.raises(NotImplementedError, match='frame_lengths'): Features().frame_lengths(torch.ones(1))
