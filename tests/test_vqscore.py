"""VQScore against its formula, what must not change it, the shipped network, and the metric object on two processes."""
import copy
import hashlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from speechloss.common.errors import SpeechLossError
from speechloss.common.weights import SHIPPED, load_network, save_network
from speechloss.corpora import get
from speechloss.features import VQFeatures
from speechloss.features.vqvae import VQVAE
from speechloss.metrics import score_one, VQScore, vq_score
from speechloss.signal import load, resample, mix

RATE = 16_000


@pytest.fixture(scope='module')
def score(): return VQScore()


@pytest.fixture(scope='module')
def speech():
    "Three seconds of each of four speakers of the embedded corpus"
    long = {r.speaker: r for r in get('mini').speech('test') if r.frames > 60_000}
    return torch.stack([load(long[name].path)[0][8_000:56_000] for name in sorted(long)[:4]])


def small(**options):
    torch.manual_seed(0)
    net = VQVAE(widths=(16, 8), size=32, **options).train()
    net(.1 * torch.randn(4, 8_000))
    return net.eval()


# ---- the formula

def test_by_hand():
    net, wave = small(), .1 * torch.randn(1, 9_000)
    found = VQScore(net, level=None).details(wave)
    z = net.encode(*net.spectrum(wave))[0].detach().double().numpy()
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    codes = net.codebook.codes.double().numpy()
    nearest = codes[(z @ codes.T).argmax(-1)]
    want = (z * nearest).sum(-1) / ((np.linalg.norm(z, axis=-1) + 1e-5) * (np.linalg.norm(nearest, axis=-1) + 1e-5))
    assert np.allclose(found.frames[0].detach().numpy(), want, atol=1e-5)
    assert found.score.item() == pytest.approx(want.mean(), abs=1e-6)
    assert VQScore(net, level=None, distance='l2')(wave).item() == pytest.approx(
        -(np.square(z - nearest).sum(-1) / np.square(z).sum(-1)).mean(), abs=1e-5)


def test_in_signal_space_by_hand():
    net, wave = small(), .1 * torch.randn(1, 9_000)
    found = net(wave)
    x, y = (t[0].detach().double() for t in (found.spectrum, found.decoded))
    cosine = (x * y).sum(-1) / ((x.norm(dim=-1) + 1e-5) * (y.norm(dim=-1) + 1e-5))
    assert VQScore(net, space='signal', level=None)(wave).item() == pytest.approx(cosine.mean().item(), abs=1e-5)
    error = (x - y).square().sum(-1) / x.square().sum(-1)
    assert VQScore(net, space='signal', distance='l2', level=None)(wave).item() == pytest.approx(
        -error.mean().item(), rel=1e-4)


# ---- what must not change it

@pytest.mark.parametrize('gain', [1e-4, .03, 7., 3e4])
@pytest.mark.parametrize('space', ['code', 'signal'])
def test_any_gain_scores_alike(speech, gain, space):
    score = VQScore(space=space)
    with torch.no_grad(): assert torch.allclose(score(gain * speech), score(speech), atol=2e-5)


def test_padding_mates_and_channels_do_not_count(score, speech):
    lengths = torch.tensor([48_000, 20_000, 31_111, 257])
    padded = speech.clone()
    for k, n in enumerate(lengths): padded[k, n:] = math.nan if k % 2 else 9.
    with torch.no_grad():
        together = score(padded, lengths)
        alone = torch.stack([score(w[:n]) for w, n in zip(speech, lengths)])
        assert torch.allclose(together, alone, atol=1e-5)
        assert torch.allclose(score(speech.view(2, 2, -1)), score(speech).view(2, 2).mean(-1))
        assert torch.allclose(score(speech.double()).float(), score(speech), atol=1e-5)
        assert torch.allclose(score(speech.half()).float(), score(speech), atol=2e-3)


def test_frames_tell_where(score, speech):
    wave = speech.clone()
    wave[:, 16_000:32_000] += .05 * torch.randn(4, 16_000)
    with torch.no_grad(): found = score.details(wave)
    assert found.frames.shape == (4, 1 + 48_000 // 256) and torch.allclose(found.frames.mean(-1), found.score)
    noisy = found.frames[:, 68:120].mean(-1)
    rest = torch.cat([found.frames[:, :57], found.frames[:, 132:]], -1).mean(-1)
    assert (noisy < rest).all()


def test_any_rate_and_length(speech):
    wave = speech[0]
    want = vq_score(wave)
    for rate in (8_000, 22_050, 48_000):
        assert vq_score(resample(wave, RATE, rate), rate) == pytest.approx(want, abs=.01 if rate > RATE else .1)
    assert vq_score(wave.numpy()) == vq_score(wave[None]) == want
    long = wave.repeat(8)                                # 24 s, in pieces of at most 10 s: three of eight
    pieces = [vq_score(long[k * 128_000:(k + 1) * 128_000]) for k in range(3)]
    assert vq_score(long, seconds=10.) == pytest.approx(np.mean(pieces), abs=1e-6)
    gap = torch.cat([long[:128_000], torch.zeros(128_000), long[256_000:]])
    assert vq_score(gap, seconds=10.) == pytest.approx((pieces[0] + pieces[2]) / 2, abs=1e-5)   # silence has no score


def test_silence_is_flagged(score, speech):
    wave = torch.stack([speech[0], torch.zeros(48_000), 1e-8 * torch.randn(48_000)]).requires_grad_()
    found = score.details(wave)
    assert found.silent.tolist() == [False, True, True] and found.score[1:].tolist() == [0, 0]
    found.score.sum().backward()
    assert wave.grad.isfinite().all() and wave.grad[0].any() and not wave.grad[1:].any()


@pytest.mark.parametrize('wave,rate,words', [
    (torch.zeros(RATE), RATE, 'silent'), (torch.randn(1), RATE, 'give at least 0.25 s'),
    (torch.randn(0), RATE, '0.25 s'), (torch.randn(RATE), 0, 'sample_rate'), (torch.randn(RATE), 16e3, 'sample_rate'),
    (torch.full((RATE,), math.nan), RATE, 'NaN'), (torch.ones(RATE, dtype=torch.int16), RATE, 'int16'),
    (torch.randn(1, 1, RATE), RATE, 'shape')])
def test_what_cannot_be_scored_is_one_sentence(wave, rate, words):
    with pytest.raises(SpeechLossError, match=words) as error: vq_score(wave, rate)
    assert '\n' not in str(error.value)


def test_mistakes_are_named(score, tmp_path):
    for options, words in ((dict(space='time'), "space 'time' is unknown: choose one of code, signal"),
                           (dict(distance='l1'), "distance 'l1' is unknown"),
                           (dict(model=tmp_path), 'holds no card.json'), (dict(model=small_without()), 'no codebook')):
        with pytest.raises(SpeechLossError, match=words): VQScore(**options)
    with pytest.raises(ValueError, match='shape'): score(torch.randn(1, 1, 1, 4000))
    with pytest.raises(TypeError, match='int64'): score(torch.ones(4000, dtype=torch.int64))
    with pytest.raises(ValueError, match='at least'): score(torch.randn(2, 200))


def small_without(): return VQVAE(widths=(16, 8), size=0)


# ---- as a loss

def test_its_gradient_leads_up(score, speech):
    wave = (speech + .02 * torch.randn(4, 48_000)).requires_grad_()
    before = score.train()(wave)
    before.sum().backward()
    with torch.no_grad():
        after = score(wave + 1e-3 * wave.norm() * wave.grad / wave.grad.norm())
    assert (after > before).all()
    assert not score.state_dict() and not list(score.parameters()) and not score.frozen.net.training
    codes = score.frozen.net.codebook.codes.clone()
    score(wave)
    assert torch.equal(codes, score.frozen.net.codebook.codes)     # scoring teaches it nothing
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(score(wave), before)


# ---- the network that comes along

def test_the_shipped_network_is_what_its_card_says():
    folder = SHIPPED['vq-speech']
    card = (folder/'README.md').read_text()
    weights = (folder/'model.safetensors').read_bytes()
    assert hashlib.sha256(weights).hexdigest() in card and len(weights) < 10_000_000
    net, found = load_network(VQVAE, 'vq-speech')
    assert sum(p.numel() for p in net.parameters()) == 906_081 == found['weights']
    assert len(found['speakers']) == 231 and f'{found["steps"]} steps' in card


def test_within_a_clip_the_score_falls_with_every_step_of_noise(speech):
    draw = torch.Generator().manual_seed(0)
    for wave in speech:
        noise = torch.randn(len(wave), generator=draw)
        ladder = [vq_score(mix(wave, noise, snr, sample_rate=RATE)[0]) for snr in range(-5, 30, 5)]
        assert spearmanr(ladder, range(7)).statistic > .9, ladder


def test_the_metric_is_the_function(speech):
    values, reasons = score_one(speech[0].numpy(), None, 'vqscore')
    assert values == {'vqscore': vq_score(speech[0])} and not reasons
    values, reasons = score_one(np.zeros(RATE), None, 'vqscore')
    assert math.isnan(values['vqscore']) and 'silent' in reasons['vqscore']


# ---- on disk, as features

def test_a_folder_gives_back_what_it_was_given(tmp_path):
    net, wave = small(), .1 * torch.randn(2, 8_000)
    save_network(net, tmp_path/'whole', {}, half=False)
    save_network(net, tmp_path/'half', dict(note='kept'))
    whole, half = load_network(VQVAE, tmp_path/'whole')[0], load_network(VQVAE, tmp_path/'half')
    assert half[1]['note'] == 'kept' and half[1]['options'] == json.loads(json.dumps(net.options))
    with torch.no_grad():
        assert torch.allclose(VQScore(whole)(wave), VQScore(net)(wave), atol=1e-6)
        assert torch.allclose(VQScore(half[0])(wave), VQScore(net)(wave), atol=2e-3)
    (tmp_path/'half/card.json').rename(tmp_path/'half/vqvae.json')       # its name in earlier versions
    earlier, card = load_network(VQVAE, tmp_path/'half')
    assert card == half[1] and all(torch.equal(a, b) for a, b in zip(earlier.state_dict().values(),
                                                                     half[0].state_dict().values(), strict=True))
    plain = small_without()
    assert load_network(VQVAE, save_network(plain, tmp_path/'plain', {}))[0].codebook is None
    (tmp_path/'half/model.safetensors').write_bytes(b'no')
    with pytest.raises(SpeechLossError, match='cannot be opened'): load_network(VQVAE, tmp_path/'half')


def test_features_are_the_layers_of_the_encoder():
    for net in (small(), small(recipe='enhance', blocks=2)):
        features, wave = VQFeatures(net), .1 * torch.randn(2, 6_000)
        assert features.names == (('pair1', 'vectors') if net.recipe == 'quality' else ('pair1', 'pair2', 'vectors'))
        *inner, vectors = features(wave)
        level = .05 / wave.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(vectors, net.encode(*net.spectrum(level * wave)), atol=1e-5)
        assert all(len(f[0]) == len(vectors[0]) for f in inner)
        only, = VQFeatures(net, layers='vectors')(wave, torch.tensor([6_000, 3_000]))
        n = int(VQFeatures(net).frame_lengths(torch.tensor([3_000]))[0])
        assert torch.allclose(only[1, :n], VQFeatures(net, layers=['vectors'])(wave[1:, :3_000])[0][0], atol=1e-4)
    other = VQFeatures(net, random_seed=1)(wave)[-1]
    assert not torch.allclose(other, vectors) and torch.equal(other, VQFeatures(net, random_seed=1)(wave)[-1])
    with pytest.raises(SpeechLossError, match="layers has 'deep'"): VQFeatures(net, layers='deep')


# ---- the metric object

def metric_of(rank: int, folder: str):
    from speechloss.metrics import MeanVQScore
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    metric = MeanVQScore(small())
    waves = metric_waves()
    metric.update(waves[:3] if rank == 0 else waves[3:])
    torch.save([metric.compute(), metric.count], f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def metric_waves():
    waves = .1 * torch.randn(8, 6_000, generator=torch.Generator().manual_seed(3))
    waves[5] = 0
    return waves


def test_two_processes_mean_as_one(tmp_path):
    metrics = pytest.importorskip('speechloss.metrics.mean_vqscore')
    torch.multiprocessing.spawn(metric_of, (str(tmp_path),), 2)
    one = metrics.MeanVQScore(small())
    one.update(metric_waves())
    for rank in range(2):
        value, _ = torch.load(tmp_path/f'{rank}.pt')
        assert torch.allclose(value, one.compute(), atol=1e-6)
    assert one.count == 7 and one.silent == 1


def test_the_metric_object_lives_like_others(tmp_path):
    torchmetrics = pytest.importorskip('torchmetrics')
    from speechloss.metrics import MeanVQScore
    metric, waves = MeanVQScore(small()), metric_waves()
    together = torchmetrics.MetricCollection(dict(vq=metric))
    together.update(waves)
    value = together.compute()['vq']
    assert pickle.loads(pickle.dumps(metric)).compute() == copy.deepcopy(metric).compute() == value
    with pytest.raises(SpeechLossError, match='NaN'): metric.update(waves * math.nan)
    assert metric.compute() == value
    batch = metric(waves[:1])
    assert batch == pytest.approx(float(VQScore(small())(waves[0])), abs=1e-6)
    metric.reset()
    assert metric.compute().isnan() and metric.count == 0
    up = MeanVQScore(small(), sample_rate=48_000)
    up.update(resample(waves[:2], RATE, 48_000))
    low = MeanVQScore(small())
    low.update(waves[:2])
    assert torch.allclose(up.compute(), low.compute(), atol=.03)
    with pytest.raises(SpeechLossError, match='lengths'): up.update(waves[:2], torch.tensor([6_000, 5_000]))
