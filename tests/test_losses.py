"""The losses against independent truths: textbook formulas, other libraries, exact gradients."""
import copy
import inspect
import json
import math
import pickle
from functools import partial

import auraloss
import librosa
import numpy as np
import pytest
import torch
import two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from helpers import TinyModel, close_grad, waves
from torch import nn

from speechloss.common.errors import SpeechLossError
from speechloss.features import randomized, RandomFeatures, STFTFeatures
from speechloss.kernels import Resolution
from speechloss.losses import (
    CARDS, Balancer, CompressedComplexLoss, ConsistencyLoss, FeatureDistance, MelLoss, ModelAsLoss,
    MultiResolutionSTFTLoss, Objective, SISDRLoss, SNRLoss, STFTLoss, WaveL1Loss, WaveL2Loss, build,
    build_objective, cards, from_auraloss, functional, preset)
from speechloss.losses.functional import (
    compressed_complex, consistency, feature_distance, mel, multi_resolution_stft, si_sdr, snr,
    wave_l1, wave_l2)
from speechloss.losses.model_as_loss import feature_health
from speechloss.losses.spectral import RESOLUTIONS
from speechloss.models import enhancer
from speechloss.signal import stft

SMALL = ((64, 16, 64), (128, 40, 100))
CLOSED = {
    'wave_l1': wave_l1, 'wave_l2': wave_l2, 'snr': snr, 'snr-30': partial(snr, max_db=30.),
    'si_sdr': si_sdr, 'si_sdr-mean': partial(si_sdr, zero_mean=False, max_db=20.),
    'mr_stft': partial(multi_resolution_stft, resolutions=SMALL),
    'mr_stft-lin': partial(multi_resolution_stft, resolutions=SMALL[:1], terms=dict(lin_l1=1.)),
    'mel': partial(mel, sample_rate=8000, resolutions=[(128, 40, 128)], n_mels=10),
    'compressed_complex': partial(compressed_complex, n_fft=64, hop_length=16),
    'compressed_complex-1': partial(compressed_complex, n_fft=64, hop_length=30, power=1., share=1.),
}
RANDOM = dict(layers=((4, 10, 5), (6, 4, 2)))
DISTANCES = {
    'complex-l2': (STFTFeatures(resolutions=((64, 16),), kind='complex'), dict(distance='l2')),
    'log-l1': (STFTFeatures(resolutions=((64, 16), (32, 8)), kind='log'), {}),
    'random-cosine': (RandomFeatures(**RANDOM), dict(distance='cosine')),
    'random-standardized': (RandomFeatures(**RANDOM), dict(standardize=True, weights=[1., .3])),
}
ANY = {'feature_distance': dict(features='stft'), 'mel': dict(sample_rate=16000)}


def make(name: str, **options):
    "A loss by its name, with what it cannot do without"
    return build({'name': name, **ANY.get(name, {}), **options}, model=TinyModel())


def ladder(seed: int, levels=(40, 30, 20, 10, 0, -10)):
    "One clean wave, and it with noise, from little to much"
    _, clean, _ = waves(1, seed=seed)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noise *= clean.norm() / noise.norm()
    return clean.expand(len(levels), -1), torch.cat([clean + 10 ** (-d / 20) * noise for d in levels])


# --- exact gradients ---

@pytest.mark.parametrize('lengths', [None, (150, 91)], ids=['full', 'ragged'])
@pytest.mark.parametrize('name', CLOSED)
def test_gradcheck(name, lengths):
    enhanced, clean, _ = waves(2, 150, dtype=torch.float64)
    enhanced = enhanced + .01 * torch.randn(2, 150, dtype=torch.float64)   # away from |0|
    torch.autograd.gradcheck(lambda e: CLOSED[name](e, clean, lengths=lengths),
                             enhanced.requires_grad_(), eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('name', DISTANCES)
def test_gradcheck_of_distances(name):
    features, options = DISTANCES[name]
    loss = FeatureDistance(features, reduction='none', **options)
    enhanced, clean, _ = waves(2, 150, dtype=torch.float64)
    torch.autograd.gradcheck(lambda e: loss(e, clean, lengths=[150, 91]),
                             enhanced.requires_grad_(), eps=1e-7, atol=1e-4, rtol=1e-3)


def test_gradcheck_of_consistency():
    spec = torch.randn(2, 9, 17, dtype=torch.complex128, requires_grad=True)
    torch.autograd.gradcheck(partial(consistency, n_fft=32, hop_length=8), spec)


@pytest.mark.parametrize('name', ['wave_l2', 'snr', 'si_sdr', 'mr_stft', 'compressed_complex'])
def test_gradgradcheck(name):
    enhanced, clean, _ = waves(1, 150, dtype=torch.float64)
    enhanced = (enhanced + .05 * torch.randn(1, 150, dtype=torch.float64)).requires_grad_()
    # the kernels keep a gradient, not a graph: their plain path has the second derivative
    plain = dict(backend='reference') if name in ('mr_stft', 'compressed_complex') else {}
    torch.autograd.gradgradcheck(lambda e: CLOSED[name](e, clean, **plain), enhanced,
                                 eps=1e-7, atol=1e-3, rtol=1e-2, nondet_tol=1e-9)


# --- textbook and other libraries ---

def numpy_si_sdr(e, s):
    e, s = e - e.mean(), s - s.mean()
    target = (e @ s) / (s @ s) * s
    return 10 * np.log10((target @ target) / ((e - target) @ (e - target)))


@pytest.mark.parametrize('seed', range(3))
def test_ratios_against_numpy_and_auraloss(seed):
    clean, noisy = ladder(seed)
    ours = si_sdr(noisy.double(), clean.double())
    pairs = list(zip(noisy.double().numpy(), clean.double().numpy()))
    np.testing.assert_allclose(ours, [numpy_si_sdr(e, s) for e, s in pairs], atol=1e-4)
    theirs = auraloss.time.SISDRLoss(reduction='none')(noisy.double(), clean.double())
    np.testing.assert_allclose(ours, -theirs.flatten(), atol=2e-2)   # theirs has a floor of 1e-8
    np.testing.assert_allclose(snr(noisy, clean), [40, 30, 20, 10, 0, -10], atol=1e-3)


def test_si_sdr_is_bounded_on_both_sides():
    _, clean, _ = waves(1)
    assert si_sdr(clean, clean) == pytest.approx(100, abs=1)
    assert si_sdr(clean, 0 * clean) == pytest.approx(-100, abs=1)
    assert si_sdr(0 * clean, clean) == 0
    for quiet, least in ((1e-3, 95), (1e-5, 70)):      # a floor at -200 dBFS
        assert si_sdr(quiet * clean, clean) > least and si_sdr(clean, quiet * clean) > least


def test_turning_down_does_not_help_si_sdr():
    clean, noisy = ladder(0)
    value = si_sdr(noisy, clean)
    for gain in (1e-1, 1e-3, 1e-5):
        assert (si_sdr(gain * noisy, clean) <= value + 1e-2).all()


@pytest.mark.parametrize('seed', range(3))
def test_multi_resolution_stft_against_auraloss(seed):
    clean, noisy = ladder(seed)
    # loud, as the two have different floors
    clean, noisy = 30 * (clean + .01 * torch.randn(clean.shape)), 30 * noisy
    theirs = auraloss.freq.MultiResolutionSTFTLoss()     # one norm over the batch: one at a time
    wanted = [theirs(e[None, None], s[None, None]) for e, s in zip(noisy, clean)]
    torch.testing.assert_close(multi_resolution_stft(noisy, clean), torch.stack(wanted),
                               rtol=2e-4, atol=1e-5)


FREQ = auraloss.freq
PEERS = {
    'defaults': FREQ.MultiResolutionSTFTLoss,
    'every magnitude term': partial(FREQ.MultiResolutionSTFTLoss, w_sc=.5, w_log_mag=2., w_lin_mag=.3),
    'log alone, L2': partial(FREQ.MultiResolutionSTFTLoss, w_sc=0., mag_distance='L2', eps=1e-6),
    'Hamming': partial(FREQ.MultiResolutionSTFTLoss, [400, 256], [100, 70], [321, 256], window='hamming_window'),
    'Kaiser': partial(FREQ.STFTLoss, window='kaiser_window'),
    'one': partial(FREQ.STFTLoss, 512, 128, 400, w_lin_mag=1.),
    'mel': partial(FREQ.MelSTFTLoss, 16000, n_mels=40),
    'mel, several': partial(FREQ.MultiResolutionSTFTLoss, scale='mel', n_bins=32, sample_rate=16000),
}


@pytest.mark.parametrize('name', PEERS)
def test_from_auraloss_is_auraloss(name):
    try:
        torch.set_default_dtype(torch.float64)     # their window is made in it
        peer = PEERS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    ours = from_auraloss(peer)
    enhanced, clean, _ = (w[:, None].double() + .01 * torch.randn(3, 1, 3001).double() for w in waves())
    if hasattr(peer, 'fb'): peer.fb = peer.fb.double()
    for one in getattr(peer, 'stft_losses', ()):
        if hasattr(one, 'fb'): one.fb = one.fb.double()
    for batch in (slice(None), slice(1)):
        grads, values = [], []
        for loss in (peer, ours):
            x = enhanced[batch].clone().requires_grad_()
            values.append(loss(x, clean[batch]))
            grads.append(torch.autograd.grad(values[-1], x)[0])
        assert abs(values[1] / values[0] - 1) < 1e-5
        assert (grads[1] - grads[0]).norm() < 1e-6 * grads[0].norm()


@pytest.mark.parametrize('says, peer', [
    ('w_phs=1.0', partial(FREQ.STFTLoss, w_phs=1.)),
    ('scale_invariance=True', partial(FREQ.MultiResolutionSTFTLoss, scale_invariance=True)),
    ("output='full'", partial(FREQ.STFTLoss, output='full')),
    ("reduction='sum'", partial(FREQ.STFTLoss, reduction='sum'))])
def test_from_auraloss_says_what_it_has_not(says, peer):
    with pytest.raises(ValueError, match=f'the auraloss module has .*{says}.*give one without'):
        from_auraloss(peer())


def test_preset_of_the_audio_codec_against_its_formula():
    enhanced, clean, _ = (w.double() + .01 * torch.randn(3, 3001) for w in waves())
    wanted = 0
    for n_mels, size in zip((5, 10, 20, 40, 80, 160, 320), (32, 64, 128, 256, 512, 1024, 2048)):
        bank = torch.as_tensor(librosa.filters.mel(sr=16000, n_fft=size, n_mels=n_mels)).double()
        mels = [stft(w, size, size // 4).abs() @ bank.T for w in (enhanced, clean)]
        wanted += ((mels[0] + 1e-5).log10() - (mels[1] + 1e-5).log10()).abs().mean((1, 2))
    value = preset('dac-mel', sample_rate=16000, reduction='none')(enhanced, clean)
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=0)   # their floor is a clamp, ours smooth


def test_preset_of_deepfilternet_against_its_formula():
    enhanced, clean, _ = (w.double() + .01 * torch.randn(3, 3001) for w in waves())
    wanted = 0
    for size in (256, 512, 1024):
        E, S = (torch.stft(w, size, size // 4, window=torch.hann_window(size).double(), normalized=True,
                           pad_mode='reflect', return_complex=True) for w in (enhanced, clean))
        e, s = E.abs() ** .3, S.abs() ** .3
        wanted += 500 * (e - s).square().mean((1, 2))
        gap = torch.view_as_real(torch.polar(e, E.angle()) - torch.polar(s, S.angle()))
        wanted += 500 * gap.square().mean((1, 2, 3))
    value = preset('deepfilternet', reduction='none')(enhanced, clean)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)


def test_resolutions_may_be_resolutions():
    enhanced, clean, _ = waves()
    same = MultiResolutionSTFTLoss(resolutions=[Resolution(*r) for r in RESOLUTIONS])
    assert same(enhanced, clean) == MultiResolutionSTFTLoss()(enhanced, clean)
    with pytest.raises(ValueError, match='terms is {}'): MultiResolutionSTFTLoss(terms={})


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_banks_stay_float32(dtype):
    "A model that is cast with its loss inside still has the right gradient"
    enhanced, clean, _ = waves()
    loss = preset('dac-mel')
    want = loss(enhanced, clean)
    cast = copy.deepcopy(loss).to(dtype)
    assert cast(enhanced, clean) == want and not cast.state_dict()
    assert pickle.loads(pickle.dumps(cast))(enhanced, clean) == want


@pytest.mark.parametrize('says, peer', [
    ('peer is a L1Loss: give an auraloss STFTLoss', nn.L1Loss),
    ('draws its resolutions anew', FREQ.RandomResolutionSTFTLoss)])
def test_from_auraloss_of_something_else(says, peer):
    with pytest.raises(ValueError, match=says): from_auraloss(peer())


def test_presets_by_name():
    assert build('dac-mel').resolutions == preset('dac-mel').resolutions
    assert build({'name': 'parallel-wavegan', 'reduction': 'sum'}).options['eps'] == 1e-7
    with pytest.raises(ValueError, match="'dac' is unknown: did you mean 'dac-mel'"): preset('dac')


def test_mel_against_librosa():
    enhanced, clean, _ = (w.double() + .01 * torch.randn(3, 3001) for w in waves())
    def log_mel(wave):
        mag = librosa.feature.melspectrogram(y=wave.numpy(), sr=16000, n_fft=1024, hop_length=256,
                                             n_mels=80, power=1., pad_mode='reflect')
        return np.log(mag + 1e-5)
    wanted = np.abs(log_mel(enhanced) - log_mel(clean)).mean((1, 2))
    np.testing.assert_allclose(mel(enhanced, clean, sample_rate=16000), wanted, rtol=1e-4)


def test_compressed_complex_against_polar_form():
    enhanced, clean, _ = (w.double() + .01 * torch.randn(3, 3001) for w in waves())
    E, S = (stft(w, 512, 128) for w in (enhanced, clean))
    mag = (E.abs() ** .3 - S.abs() ** .3).square().mean((1, 2))
    polar = [torch.polar(X.abs() ** .3, X.angle()) for X in (E, S)]
    wanted = .7 * mag + .3 * (polar[0] - polar[1]).abs().square().mean((1, 2))
    torch.testing.assert_close(compressed_complex(enhanced, clean), wanted, rtol=1e-4, atol=0)


def test_stft_loss_is_one_resolution():
    enhanced, clean, _ = waves()
    terms = [STFTLoss(n_fft=r.n_fft, hop_length=r.hop_length, win_length=r.win_length)(enhanced, clean)
             for r in MultiResolutionSTFTLoss().resolutions]
    assert MultiResolutionSTFTLoss()(enhanced, clean).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_consistency():
    for length in (2944, 3001):
        spec = stft(waves()[0][:, :length], 512, 128)
        assert consistency(spec, length=length).max() < 1e-9
        turned = spec * torch.exp(2j * torch.pi * torch.rand(spec.shape))
        assert consistency(turned, length=length).min() > .01
    assert ConsistencyLoss()(stft(waves()[0][:, :2944])) < 1e-9
    assert ConsistencyLoss()(spec, length=3001).shape == ()
    with pytest.raises(ValueError, match='length is 4000, which has 32 frames.*spec has 24'):
        consistency(spec, length=4000)
    with pytest.raises(ValueError, match=r'spec is torch.float32 of shape \(3, 24, 257\)'):
        consistency(spec.real)


def test_feature_distance_by_hand():
    a, b = torch.tensor([[[3., 4.], [9., 9.]]]), torch.tensor([[[0., 4.], [1., 1.]]])
    one = torch.tensor([1])
    assert feature_distance(a, b, frames=one).item() == 1.5
    assert feature_distance(a, b, frames=one, distance='l2').item() == 4.5
    assert feature_distance(a, b, frames=one, distance='cosine').item() == pytest.approx(.2)
    assert feature_distance(a, b).item() == pytest.approx((3 + 16) / 4)
    clean = torch.randn(2, 50, 3) * torch.tensor([1., 10., 100.])
    moved = clean + clean.std(1, keepdim=True, correction=0)
    assert feature_distance(moved, clean, standardize=True).tolist() == pytest.approx([1., 1.], rel=1e-4)


# --- properties ---

@pytest.mark.parametrize('name', CARDS)
@settings(max_examples=10)
@given(seed=st.integers(0, 10 ** 6))
def test_more_noise_is_worse(name, seed):
    clean, noisy = ladder(seed)
    # a network may take a little noise for speech: 20 dB a step
    if name in ('model_as_loss', 'ssl', 'vq'): clean, noisy = clean[::2], noisy[::2]
    if name == 'pesq': clean, noisy = clean[:4], noisy[:4]     # in louder noise nothing else is heard, however loud
    if name == 'stoi': clean, noisy = clean[2:], noisy[2:]     # of little noise it sees the faintest bands alone
    options = dict(dither_db=-60.) if name == 'ssl' else {}               # its pauses are digital silence
    worst = noisy[-1:].expand_as(noisy)     # what a loss that pushes away pushes away from
    value = make(name, reduction='none', **options)(noisy, clean, noisy=worst)
    assert (value.diff() > 0).all(), value


@pytest.mark.parametrize('name', CARDS)
def test_cards_bound_their_values(name):
    "From the value at identity up to `largest`, whatever the enhanced wave is"
    _, clean, noisy = waves()
    card, loss = CARDS[name], make(name, reduction='none')
    low, high = ({'0': 0., '-max_db': -100., 'max_db': 100., 'clamp': 10., '2': 2., 'inf': math.inf}[bound]
                 for bound in (card.identity, card.largest))
    for enhanced in (noisy, -clean, 1e-3 * clean, 0 * clean, 1e3 * torch.randn_like(clean)):
        value = loss(enhanced, clean, noisy=noisy)
        assert (value >= low - 1e-4).all() and (value <= high).all(), value


@given(seed=st.integers(0, 10 ** 6), db=st.floats(-40, 40))
def test_gain(seed, db):
    "What a common gain, and one of the enhanced wave alone, does to each value"
    enhanced, clean, _ = waves(2, seed=seed)
    gain = 10 ** (db / 20)
    loud = gain * enhanced, gain * clean
    assert wave_l1(*loud).allclose(gain * wave_l1(enhanced, clean), rtol=1e-4)
    assert wave_l2(*loud).allclose(gain ** 2 * wave_l2(enhanced, clean), rtol=1e-4)
    for ratio in (snr, si_sdr):
        assert ratio(*loud).allclose(ratio(enhanced, clean), atol=1e-2)
    assert si_sdr(gain * enhanced, clean).allclose(si_sdr(enhanced, clean), atol=1e-2)


@pytest.mark.parametrize('name', CARDS)
@settings(max_examples=10)
@given(order=st.permutations(range(4)), pad=st.integers(1, 900), data=st.data())
def test_batches(name, order, pad, data):
    "The order of a batch, and padding of any length, change nothing"
    enhanced, clean, noisy = waves(4, 1600)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1100, 1600), min_size=4, max_size=4)))
    loss = make(name, reduction='none')
    value = loss(enhanced, clean, noisy=noisy, lengths=lengths)
    order = torch.tensor(order)
    *longer, noisy = (nn.functional.pad(w[order], (0, pad), value=7.) for w in (enhanced, clean, noisy))
    torch.testing.assert_close(loss(*longer, noisy=noisy, lengths=lengths[order]), value[order],
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', CARDS)
def test_descent(name):
    "Following the gradient of a loss lowers it"
    enhanced, clean, noisy = waves(2)
    loss, x = make(name), enhanced.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=1e-3)
    start = loss(x, clean, noisy=noisy).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss(x, clean, noisy=noisy).backward()
        optimizer.step()
    assert loss(x, clean, noisy=noisy).item() < start


@pytest.mark.parametrize('name', CARDS)
def test_cards_tell_the_truth(name):
    "Level and phase: a loss sees them if and only if its card says so"
    _, clean, noisy = waves()
    card, loss = CARDS[name], make(name, reduction='none')
    at_clean = loss(clean, clean, noisy=noisy)
    seen = {what: loss(wave, clean, noisy=noisy) for what, wave in dict(level=.5 * clean, phase=-clean).items()}
    for what, value in seen.items():
        assert getattr(card, what) in ('yes', 'no', 'depends')
        if getattr(card, what) == 'no':
            torch.testing.assert_close(value, at_clean, atol=.01 * abs(at_clean[0].item()) + 1e-5, rtol=0)
        # SI-SDR sees phase, but not a change of sign, which is a gain
        elif getattr(card, what) == 'yes' and (name, what) != ('si_sdr', 'phase'):
            assert (value > at_clean + 1e-4).all()


# --- functions and modules ---

TWINS = {wave_l1: WaveL1Loss, wave_l2: WaveL2Loss, snr: SNRLoss, si_sdr: SISDRLoss,
         multi_resolution_stft: MultiResolutionSTFTLoss, mel: MelLoss,
         compressed_complex: CompressedComplexLoss}


@pytest.mark.parametrize('function', TWINS, ids=lambda f: f.__name__)
def test_twins(function):
    "Function and module have the same options, defaults and numbers"
    def options(f, *without):
        return {n: p.default for n, p in inspect.signature(f).parameters.items() if n not in without}
    module = TWINS[function]
    own = options(function, 'enhanced', 'clean', 'lengths')
    assert own == options(module, 'reduction', *({'sample_rate'} - {*own}))
    needed = dict(sample_rate=16000) if function is mel else {}
    enhanced, clean, _ = waves()
    value = module(reduction='none', **needed)(enhanced, clean, lengths=[3001, 2000, 1100])
    sign = -1 if function in (snr, si_sdr) else 1
    assert value.equal(sign * function(enhanced, clean, lengths=[3001, 2000, 1100], **needed))
    stereo = function(enhanced.expand(2, 3, -1), clean.expand(2, 3, -1), **needed)
    assert stereo.shape == (2,) and function(enhanced[0], clean[0], **needed).shape == ()


@pytest.mark.parametrize('function', TWINS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings('ignore:Dynamo detected a call to a `functools.lru_cache`')
def test_functions_compile(function):
    torch._dynamo.reset()
    needed = dict(sample_rate=16000) if function is mel else {}
    enhanced, clean, _ = waves()
    compiled = torch.compile(function, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(enhanced, clean, **needed),
                               function(enhanced, clean, **needed), rtol=1e-4, atol=1e-6)


def test_every_function_is_exported():
    assert {f.__name__ for f in TWINS} < set(functional.__all__)


# --- what is too short, and other options out of range ---

@pytest.mark.parametrize('name, least', [
    ('stft', 513), ('multi_resolution_stft', 1025), ('mel', 513), ('compressed_complex', 257)])
def test_shortest_wave(name, least):
    loss, (enhanced, clean, _) = make(name), waves()
    assert loss(enhanced[:, :least], clean[:, :least]).isfinite()
    for options in ({}, dict(lengths=[least - 1] * 3)):
        size = least if options else least - 1
        with pytest.raises(ValueError, match=f'{least - 1} samples.*at least .* {least} samples'):
            loss(enhanced[:, :size], clean[:, :size], **options)


def test_wrong_options():
    for message, wrong in {
        'terms is .*phase': partial(STFTLoss, terms=dict(phase=1.)),
        'window is .*flat': partial(STFTLoss, window='flat'),
        'win_length is 2000': partial(STFTLoss, win_length=2000),
        'n_mels is 512': partial(MelLoss, sample_rate=16000, n_mels=512),
        'power is 0': partial(CompressedComplexLoss, power=0),
        'share is 2': partial(CompressedComplexLoss, share=2),
        "distance 'l3' is unknown": partial(FeatureDistance, STFTFeatures(), distance='l3'),
        'weights has 3 entries': partial(FeatureDistance, STFTFeatures(), weights=[1, 2, 3]),
        "rule 'thawed' is unknown": partial(ModelAsLoss, TinyModel(), rule='thawed'),
        "refresh 'hourly' is unknown": partial(ModelAsLoss, TinyModel(), refresh='hourly'),
        "balance 'auto' is unknown": partial(Objective, dict(a=WaveL1Loss()), balance='auto'),
        "weights of term 'b' is unknown": partial(Objective, dict(a=WaveL1Loss()), weights=dict(b=1.)),
        'losses is empty': partial(Objective, {}),
    }.items():
        with pytest.raises(ValueError, match=message): wrong()
    with pytest.raises(TypeError, match='no method encode'): ModelAsLoss(nn.Linear(2, 2))


# --- balance ---

def terms_of(e):
    "Two terms, one 1000 times the other"
    return dict(small=e.square().mean(-1), large=1000 * (e - 1).square().mean(-1))


def pull(terms, e):
    return {n: torch.autograd.grad(t.sum(), e, retain_graph=True)[0].norm(dim=-1).mean().item()
            for n, t in terms.items()}


@given(seed=st.integers(0, 10 ** 6), weight=st.floats(.01, 100))
def test_balance_in_the_first_step(seed, weight):
    "With momentum 1 or in the first step the statistic is that of the batch"
    e = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    names, options = ('small', 'large'), dict(weights=dict(large=weight))
    plain = terms_of(e)
    none = Balancer(names, **options)(terms_of, e)
    assert none['large'].allclose(weight * plain['large'])
    value = Balancer(names, mode='value', **options)(terms_of, e)
    assert value['small'].allclose(torch.ones(3).double())
    assert value['large'].allclose(torch.full((3,), weight).double())
    mean = Balancer(names, mode='mean', **options)(terms_of, e)
    assert mean['large'].allclose(weight * plain['large'] / plain['large'].mean())
    pulls = pull(Balancer(names, mode='grad', **options)(terms_of, e), e)
    assert pulls['small'] == pytest.approx(1) and pulls['large'] == pytest.approx(weight)
    for mode, measure in (('mean', lambda t: {n: v.mean().item() for n, v in t.items()}),
                          ('grad', lambda t: pull(t, e))):
        anchored = Balancer(names, mode=mode, anchor='large', **options)(terms_of, e)
        found, before = measure(anchored), measure(plain)
        assert found['large'] == pytest.approx(weight * before['large'])
        assert found['small'] == pytest.approx(before['large'])


@pytest.mark.parametrize('mode', ['mean', 'grad'])
def test_running_statistics(mode):
    "Follow with their momentum in training; in evaluation and after a bad batch they stand still"
    balancer, e = Balancer(('small', 'large'), mode=mode, momentum=.9), torch.randn(3, 20)
    balancer(terms_of, e.requires_grad_())
    first = balancer.running.clone()
    balancer(terms_of, 2 * e)
    assert not balancer.running.equal(first)
    fresh = Balancer(('small', 'large'), mode=mode)
    fresh(terms_of, 2 * e)
    old = dict(mean=.9, grad=.5)[mode]       # a plain mean while it is young, where it is of gradients
    assert balancer.running.allclose(old * first + (1 - old) * fresh.running)
    held = balancer.running.clone()
    balancer(terms_of, e * torch.nan)
    balancer.eval()
    balancer(terms_of, 3 * e)
    with torch.no_grad(): balancer(terms_of, 3 * e)
    assert balancer.running.equal(held) and balancer.steps == 2


def test_gradient_balance_forgets_the_luck_of_its_first_batch():
    "A first batch a hundred times as loud is one of twenty, and not four fifths of the mean; the log has the ratio"
    balancer, e = Balancer(('small', 'large'), mode='grad', anchor='small', weights=dict(large=.3)), torch.randn(3, 20)
    norms = []
    for step in range(20):
        wave = (e * (100 if step == 0 else 1)).requires_grad_()
        balancer(terms_of, wave)
        pulls = [torch.autograd.grad(t.sum(), wave)[0].norm(dim=-1).mean() for t in terms_of(wave).values()]
        norms.append(torch.stack(pulls))
    torch.testing.assert_close(balancer.running, torch.stack(norms).double().mean(0), rtol=1e-5, atol=0)
    seen = balancer.realised()
    assert set(seen) == {'large'} and seen['large'] > 0 and balancer.realised() == {}


def test_objective_logs_how_hard_its_losses_pull():
    "The realised ratio, over the steps since the last log, also when the training was stopped in between"
    enhanced, clean, _ = waves()
    losses = dict(l1=WaveL1Loss(), snr=SNRLoss())
    one, other = (Objective(losses, balance='grad', weights=dict(snr=.3)) for _ in range(2))
    one(enhanced.requires_grad_(), clean)
    assert Objective(losses).observed() == {}
    other.load_resume_state(one.resume_state())
    for objective in (one, other): assert objective.observed() == {'snr.pull': pytest.approx(.3)}
    assert one.observed() == {} == one.resume_state()


def test_gradient_balance_hands_over_the_weighted_gradient():
    balancer, x = Balancer(('small', 'large'), mode='grad'), torch.randn(2, 10, requires_grad=True)
    upstream = (x * 3).tanh()                      # a network before the loss
    sum(balancer(terms_of, upstream).values()).sum().backward()
    leaf = upstream.detach().requires_grad_()
    parts = [torch.autograd.grad(t.sum(), leaf)[0] for t in terms_of(leaf).values()]
    combined = sum(g / g.norm(dim=-1).mean() for g in parts)
    wanted = combined * 3 * (1 - upstream.detach() ** 2)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-6)


# --- objective ---

def test_objective():
    enhanced, clean, _ = waves()
    losses = dict(l1=WaveL1Loss(), cc=CompressedComplexLoss())
    total = Objective(losses, weights=dict(cc=.5))
    terms = total.terms(enhanced, clean)
    torch.testing.assert_close(terms['l1'], losses['l1'](enhanced, clean))
    torch.testing.assert_close(terms['cc'], .5 * losses['cc'](enhanced, clean))
    torch.testing.assert_close(total(enhanced, clean), terms['l1'] + terms['cc'])
    nested = Objective(dict(inner=total, snr=SNRLoss()), weights=dict(inner=2.))
    torch.testing.assert_close(nested(enhanced, clean),
                               2 * total(enhanced, clean) + SNRLoss()(enhanced, clean))


@pytest.mark.parametrize('balance', ['value', 'mean', 'grad'])
def test_objective_is_anchored_at_its_first_loss(balance):
    enhanced, clean, _ = waves()
    losses = dict(cc=CompressedComplexLoss(), snr=SNRLoss(), l2=WaveL2Loss())
    terms = Objective(losses, balance=balance, weights=dict(l2=.3)).terms(enhanced, clean)
    torch.testing.assert_close(terms['cc'], losses['cc'](enhanced, clean))
    if balance != 'grad':        # SI-SDR and the like are negative, and stay so
        assert terms['snr'].item() == pytest.approx(-terms['cc'].item(), rel=1e-4)
        assert terms['l2'].item() == pytest.approx(.3 * terms['cc'].item(), rel=1e-4)


def test_objective_passes_on_the_model_and_its_state():
    model = TinyModel()
    own = partial(ModelAsLoss, rule='dynamic')
    objective = Objective(dict(l1=WaveL1Loss(), step=own(model, refresh='batch'),
                               deep=Objective(dict(epoch=own(model)))))
    start = copy.deepcopy(objective.resume_state())
    assert {k.split('.')[0] for k in start} == {'step', 'deep'}
    with torch.no_grad(): model.conv.weight += 1
    objective.step_end(model)
    assert objective.losses.step.snapshot.conv.weight.equal(model.conv.weight)
    inner = objective.losses.deep.losses.epoch.snapshot
    assert not inner.conv.weight.equal(model.conv.weight)
    objective.epoch_end(model)
    assert inner.conv.weight.equal(model.conv.weight)
    objective.load_resume_state(start)
    torch.testing.assert_close(inner.conv.weight, model.conv.weight - 1, check_stride=False)
    assert all(v.equal(start[k]) for k, v in objective.resume_state().items())
    plain = Objective(dict(l1=WaveL1Loss()))
    plain.step_end(model), plain.epoch_end(model), plain.load_resume_state({})
    assert plain.resume_state() == {} == plain.health(waves()[1])


@pytest.mark.parametrize('layers', ['bottleneck', 'all'])
def test_health_is_of_the_copy_and_of_valid_frames(layers):
    "It moves neither weights nor generators, and says nothing of a copy that stays"
    model, (_, clean, _) = enhancer('tiny'), waves()
    loss = ModelAsLoss(model, rule='dynamic', layers=layers)
    with torch.no_grad():
        for weight in model.parameters(): weight.zero_()
    before = torch.get_rng_state(), loss.resume_state()
    health = Objective(dict(own=loss)).health(clean)
    assert torch.get_rng_state().equal(before[0])
    assert all(value.equal(before[1][name]) for name, value in loss.resume_state().items())
    names = [f'own.{layer}.{key}' for layer in loss.features.names for key in ('std', 'effective_rank')]
    assert list(health) == names and min(health.values()) > 0
    padded = torch.cat([clean, torch.full_like(clean, 9.)], 1)
    lengths = torch.full((len(clean),), clean.shape[1])
    assert Objective(dict(own=loss)).health(padded, lengths=lengths) == pytest.approx(health)
    loss.epoch_end(model)
    assert loss.health(clean)[f'{loss.features.names[-1]}.std'] == 0
    assert ModelAsLoss(model, layers=layers).health(clean) == {}


def test_health_of_features_that_are_not_finite_is_nan():
    health = feature_health(torch.tensor([[[1., 2.], [torch.inf, 0.]]]))
    assert list(health) == ['std', 'effective_rank'] and all(v != v for v in health.values())


# --- Model as Loss ---

MODELS = {'tiny': TinyModel, 'small': partial(enhancer, 'small')}


@pytest.mark.parametrize('name', MODELS)
def test_own_encoder_is_a_snapshot(name):
    model = MODELS[name]().train()
    before = copy.deepcopy(model.state_dict())
    loss, (enhanced, clean, _) = ModelAsLoss(model, reduction='none'), waves()
    value = loss(enhanced, clean)
    frozen = copy.deepcopy(model).eval()
    with torch.no_grad():
        e, s = ((o if torch.is_tensor(o) else o[-1]) for o in map(frozen.encode, (enhanced, clean)))
    torch.testing.assert_close(value, (e - s).abs().mean((1, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    if name == 'small':          # through the enhancer: it learns, the snapshot does not
        loss(model(enhanced), clean).sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    assert model.training
    assert loss(enhanced, clean).equal(value)
    assert all(v.equal(before[k]) for k, v in loss.snapshot.state_dict().items())
    parent = nn.ModuleDict(dict(model=model, loss=loss))
    assert {k.split('.')[0] for k in parent.state_dict()} == {'model'}
    assert len(list(parent.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize('rule, refresh, follows', [
    ('frozen', 'epoch', ()), ('frozen-fe', 'batch', ()), ('dynamic', 'epoch', ('epoch_end',)),
    ('dynamic', 'batch', ('step_end',)), ('dynamic', 'ema', ('step_end',))])
def test_update_rules(rule, refresh, follows):
    for event in ('step_end', 'epoch_end'):
        model = TinyModel()
        loss = ModelAsLoss(model, rule=rule, refresh=refresh, ema=.9)
        old = model.conv.weight.detach().clone()
        with torch.no_grad(): model.conv.weight += 1
        getattr(loss, event)(model)
        share = 0 if event not in follows else .1 if refresh == 'ema' else 1
        torch.testing.assert_close(loss.snapshot.conv.weight, old + share)
        assert not loss.snapshot.conv.weight.requires_grad


def test_layers_of_the_model():
    enhanced, clean, _ = waves()
    model = TinyModel()
    both = ModelAsLoss(model, layers='all').terms(enhanced, clean)
    assert list(both) == ['layer0', 'layer1']
    for i in range(2):
        one = ModelAsLoss(model, layers=[i]).terms(enhanced, clean)
        assert list(one.values())[0] == both[f'layer{i}']
    assert ModelAsLoss(model)(enhanced, clean) == both['layer1']
    other = ModelAsLoss(randomized(model, seed=3))(enhanced, clean)
    assert other != both['layer1']


@pytest.mark.cuda
def test_recurrent_snapshot_on_cuda():
    "cuDNN has no backward pass for a recurrent layer in eval mode"
    enhanced, clean, _ = (w.cuda() for w in waves())
    loss = ModelAsLoss(TinyModel()).cuda()
    loss(enhanced.requires_grad_(), clean).backward()
    exact = waves()[0].requires_grad_()
    loss.cpu()(exact, clean.cpu()).backward()
    close_grad(enhanced.grad.cpu(), exact.grad, 1e-2)


# --- by name ---

@pytest.mark.parametrize('name', CARDS)
def test_build(name):
    spec = json.loads(json.dumps({'name': name, **ANY.get(name, {}), 'reduction': 'sum'}))
    loss = build(spec, model=TinyModel())
    assert type(loss) is CARDS[name].loss and loss.reduction == 'sum'
    assert 'reduction' in spec       # left as it was
    json.dumps(cards())


def test_build_objective():
    spec = dict(terms=dict(a='wave_l1', b=dict(name='model_as_loss', encoder='random')),
                weights=dict(b=.3), balance='grad')
    model = TinyModel()
    objective = build_objective(json.loads(json.dumps(spec)), model=model)
    assert objective.balancer.weights == dict(a=1., b=.3)
    assert not objective.losses.b.snapshot.conv.weight.equal(model.conv.weight)
    loaded = build_objective(dict(terms=dict(a=dict(name='model_as_loss', encoder='stage1'))),
                             load=lambda which: {'stage1': model}[which])
    assert loaded.losses.a.snapshot.conv.weight.equal(model.conv.weight)


@pytest.mark.parametrize('spec, message', [
    ('si-sdr', 'si-sdr.*choose one of wave_l1'), ({'max_db': 3}, 'loss None'),
    ('stfft', "did you mean 'stft'.*auraloss"),
    ({'name': 'snr', 'max': 3}, 'SNRLoss cannot be built.*max'),
    ('model_as_loss', 'needs the enhancer'),
    ({'name': 'model_as_loss', 'encoder': 'x.pt'}, 'give load='),
    ({'name': 'feature_distance', 'features': 'melody'}, 'melody.*stft, mel, gammatone, random')])
def test_build_errors(spec, message):
    with pytest.raises(SpeechLossError, match=message) as caught: build(spec)
    assert '\n' not in str(caught.value)


# --- two processes ---

@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(two_processes.run, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path/f'{rank}.pt') for rank in range(2)]
    for balance in halves[0]:
        whole = two_processes.train_step(balance, slice(0, 4))
        for i, wanted in enumerate(whole):
            a, b = (half[balance][i] for half in halves)
            if i % 2: assert a.equal(b)      # the gradient is shared, the value is not
            torch.testing.assert_close((a + b) / 2, wanted, rtol=1e-4, atol=1e-6)


def test_logs_say_what_a_loss_is():
    assert 'rule=dynamic' in repr(ModelAsLoss(TinyModel(), rule='dynamic'))
    assert math.isfinite(float(WaveL1Loss()(*waves()[:2])))
