"""The network that imitates MP3: what it may not do, what its skill says, and a training from nothing."""
import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.common.files import sha256
from speechloss.common.weights import SHIPPED, load_network, save_network
from speechloss.features import CodecFeatures
from speechloss.features.codec import (
    BANDS, POWER_FLOOR, CodecNet, layer_scales, log_power, skill, with_gain)
from speechloss.losses import CodecLoss, build

WIDTHS = (4, 6, 8)


def net(**options):
    torch.manual_seed(3)
    return CodecNet(widths=WIDTHS, **options)


CARD = dict(skill=dict(skill=.25), scale={name: 2. for name in net().names})


def test_log_power_of_a_tone():
    tone = torch.sin(2 * torch.pi * 1000 / 16_000 * torch.arange(16_000, dtype=torch.float64))[None]
    power = 10 ** log_power(tone)[0, 5:-5] - POWER_FLOOR
    assert power.sum(-1).sub(1).abs().max() < 1e-9 and log_power(0 * tone).eq(log_power(0 * tone)[0, 0, 0]).all()


def test_it_only_takes_away_and_sees_nothing_of_its_mates():
    torch.manual_seed(0)
    made, waves = net(), .1 * torch.randn(3, 6_000)
    with torch.no_grad():
        assert (made(waves) <= made.spectrum(waves) + 1e-5).all()
        alone = made.levels(waves[:1, :4_000])
        padded = waves.clone()
        padded[0, 4_000:] = torch.nan
        mates = made.levels(padded, torch.tensor([4_000, 6_000, 6_000]))
    for name, x in alone.items():
        frames = x.shape[-2]
        assert torch.allclose(mates[name][0, ..., :frames, :], x[0], atol=1e-6), name


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float64])
def test_convolutions_of_another_precision(kind):
    "Spectra stay in the precision of the wave: a floor of 1e-8 is nothing in half precision"
    made, x = net(), .1 * torch.randn(2, 4_000)
    plain, other = CodecLoss(made, card=CARD), CodecLoss(made, card=CARD).to(kind)
    enhanced = (x + .01 * torch.randn_like(x)).requires_grad_()
    assert torch.allclose(other(enhanced, x), plain(enhanced, x), rtol=.02)
    other(enhanced, x).backward()
    assert enhanced.grad.isfinite().all() and enhanced.grad.any() and other(x, x) == 0
    drawn = CodecFeatures(made.to(kind), card=CARD, random_seed=1)
    assert next(drawn.frozen.net.parameters()).dtype == kind


class Gain(CodecNet):
    "A codec network that knows one gain"
    def __init__(self, gain): super().__init__(widths=WIDTHS); self.value = gain
    def forward(self, wave, lengths=None): return self.spectrum(self.value * wave)


def test_skill_by_closed_form():
    torch.manual_seed(0)
    pairs = [(wave, .5 * wave) for wave in .1 * torch.randn(4, 8_000)]
    perfect, nothing, half_way, worse = (skill(Gain(g), pairs) for g in (.5, 1., .5 ** .5, 2.))
    assert perfect['skill'] == pytest.approx(1., abs=1e-4) and nothing['skill'] == 0.
    assert half_way['skill'] == pytest.approx(.5, abs=.01) and worse['skill'] == pytest.approx(-1., abs=.02)
    assert nothing['identity_db'] == pytest.approx(6.02, abs=.02)
    assert all(perfect[f'skill/{low:.0f}-{high:.0f}'] > .99 for low, high in BANDS)
    with pytest.raises(SpeechLossError, match='pairs is empty'): skill(net(), [])


def test_a_folder_and_what_can_be_wrong_with_it(tmp_path):
    made = net()
    save_network(made, tmp_path/'good', CARD, half=False)
    again, card = load_network(CodecNet, tmp_path/'good')
    x = .1 * torch.randn(2, 5_000)
    assert torch.equal(again(x), made(x)) and card['skill'] == CARD['skill'] and made.training
    for value in 0., -.2, None, float('nan'):
        save_network(made, tmp_path/'poor', dict(skill=dict(skill=value)))
        with pytest.raises(SpeechLossError, match='no better than the identity'): CodecLoss(tmp_path/'poor')
    (tmp_path/'good/card.json').rename(tmp_path/'good/codec.json')      # its name in earlier versions
    earlier, same_card = load_network(CodecNet, tmp_path/'good')
    assert torch.equal(earlier(x), made(x)) and same_card == card
    (tmp_path/'good/codec.json').rename(tmp_path/'good/card.json')
    (tmp_path/'good/model.safetensors').write_bytes(b'cut')
    with pytest.raises(SpeechLossError, match='train or fetch it again'): CodecLoss(tmp_path/'good')
    (tmp_path/'good/card.json').write_text(json.dumps(CARD))
    with pytest.raises(SpeechLossError, match='cannot be opened'): load_network(CodecNet, tmp_path/'good')
    with pytest.raises(SpeechLossError, match='holds no card.json'): CodecLoss(tmp_path)
    for card, words in ((None, 'card of the network is None: give'), (dict(skill=.3), 'card of the network is'),
                        (CARD | dict(scale=dict(down1=1.)), 'a number above 0 for each of down1, down2'),
                        (CARD | dict(scale=dict.fromkeys(made.names, 0.)), 'a number above 0'),
                        (dict(skill=dict(skill=float('nan'))), 'no better than the identity')):
        with pytest.raises(SpeechLossError, match=words): CodecLoss(made, card=card)
    with pytest.raises(ValueError, match='there must be a level'): CodecNet(widths=())


def test_layers_and_their_scales():
    made, x = net(), .1 * torch.randn(1, 4_000)
    every = CodecFeatures(made, card=CARD)
    assert made.training and all(p.requires_grad for p in made.parameters())     # the user's own stays as it was
    assert torch.equal(2 * every(x)[-1], made(x)) and every.names == made.names
    assert CodecFeatures(made, card=CARD, layers=['output', 'down1']).names == ('down1', 'output')
    drawn = CodecFeatures(made, card=CARD, random_seed=1)
    same = CodecFeatures(made, card=CARD, random_seed=1)
    assert not torch.equal(drawn(x)[0], every(x)[0]) and torch.equal(drawn(x)[0], same(x)[0])
    for wrong in 'deep', ['down1', 'down9'], [], None:
        with pytest.raises(SpeechLossError, match='choose all, inner, output'):
            CodecFeatures(made, card=CARD, layers=wrong)
    with pytest.raises(ValueError, match='above 0'): CodecLoss(made, card=CARD, weights=[0.] * len(made.names))


def test_weights_drawn_anew_have_scales_of_their_own():
    "Else the control would weigh its layers by what another network does"
    made, x = net(), .1 * torch.randn(1, 4_000)
    drawn = CodecFeatures(made, card=CARD, random_seed=1)
    again = CodecFeatures(made, card=CARD | dict(scale={name: 7. for name in made.names}), random_seed=1)
    assert drawn.scale == again.scale == layer_scales(drawn.frozen.net) and len(set(drawn.scale.values())) > 1
    assert torch.equal(drawn(x)[0], again(x)[0])
    assert CodecFeatures(made, card=dict(skill=CARD['skill'])).scale == layer_scales(made)
    apart = [(a - b).abs().mean() for a, b in zip(drawn(x), drawn(x + .01 * torch.randn_like(x)))]
    assert max(apart) < 30 * min(apart)


def test_an_imitation_has_the_magnitudes_of_the_network_and_the_phase_of_the_wave():
    made, wave = Gain(.5), .1 * torch.randn(2, 5_000)
    gap = made.imitate(wave) - .5 * wave        # the floor of -80 dB moves the gain of weak bins a little
    assert gap.norm() < .01 * wave.norm()
    power = torch.tensor([1., .01, 0.])
    shown = (power + POWER_FLOOR).log10()
    assert torch.allclose(with_gain(shown, torch.tensor(-1.)), (.1 * power + POWER_FLOOR).log10(), atol=1e-3)


def test_the_shipped_network_has_skill_its_card_and_few_bytes():
    folder = SHIPPED['mp3-16k']
    made, card = load_network(CodecNet, 'mp3-16k')
    assert sum(p.numel() for p in made.parameters()) == card['weights'] < 3e6
    assert (folder/'model.safetensors').stat().st_size < 10e6 and card['skill']['skill'] > 0
    text = (folder/'README.md').read_text(encoding='utf-8')
    assert sha256(folder/'model.safetensors') in text and 'CC BY 4.0' in text
    assert f'{card["skill"]["skill"]:.3f}' in text and all(f'{card["skill"][k]:.3f}' in text for k in card['skill']
                                                          if k.startswith('skill/'))


def test_without_safetensors_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(SpeechLossError, match=r"needs safetensors: pip install '.\[enhance\]'"): CodecLoss()


def test_the_default_is_the_shipped_network():
    torch.manual_seed(0)
    enhanced, clean = .05 * torch.randn(2, 2, 6_000)
    value = CodecLoss()(enhanced, clean)
    assert value == CodecLoss('mp3-16k')(enhanced, clean) == CodecLoss(SHIPPED['mp3-16k'])(enhanced, clean)
    assert value == build('codec')(enhanced, clean) != build(dict(name='codec', layers='inner'))(enhanced, clean)
    assert build(dict(name='feature_distance', features='codec'))(enhanced, clean) > 0


@pytest.mark.skipif(find_spec('lameenc') is None, reason='without lameenc')
def test_the_shipped_network_takes_off_what_the_codec_takes_off():
    "On a signal that it has never seen: noise in bursts, whose upper half does not fit into 16 kbit/s"
    from speechloss.corpora import Codec
    made, _ = load_network(CodecNet, 'mp3-16k')
    draw = torch.Generator().manual_seed(0)
    wave = .1 * torch.randn(48_000, generator=draw) * (torch.arange(48_000) % 8_000 < 4_000)
    assert skill(made, [(wave, Codec(16)(wave))])['skill/4000-8001'] > .3


@pytest.mark.slow
@pytest.mark.skipif(find_spec('lameenc') is None, reason='without lameenc')
def test_training_goes_on_where_it_was_stopped(tmp_path):
    from speechloss.corpora import get, Manifest
    from speechloss.training import CodecTraining, train_codec
    few = [r for split in ('train', 'valid', 'test') for r in get('mini').speech(split)[:12]]     # each is coded to MP3
    corpus = str(Manifest(few, 'few').save(tmp_path/'few.jsonl'))
    options = CodecTraining(corpus=corpus, steps=4, batch_size=2, seconds=.5, valid_size=3, warmup=1,
                            network=dict(widths=WIDTHS))

    class Stop(Exception): pass

    def stop(label, done, total):
        if done == 2: raise Stop

    with pytest.raises(Stop): train_codec(options, tmp_path/'a', progress=stop)
    assert not (tmp_path/'a/model').exists()
    first, second = (train_codec(options, tmp_path/name) for name in 'ab')
    assert (first/'model.safetensors').read_bytes() == (second/'model.safetensors').read_bytes()
    with pytest.raises(SpeechLossError, match='holds another run'):
        train_codec(replace(options, bit_rate=32), tmp_path/'a')
    card = json.loads((first/'card.json').read_text())
    assert card['speakers'] and card['weights'] == sum(p.numel() for p in CodecNet(widths=WIDTHS).parameters())
    assert all(v > 0 for v in card['scale'].values()) and card['seconds_of_speech'] > 10


@pytest.mark.skipif(find_spec('lameenc') is None, reason='without lameenc')
def test_a_corpus_of_pairs_is_coded_from_its_clean_side(tmp_path):
    from speechloss.corpora import CodecPairs, from_pairs
    from speechloss.signal import save
    from speechloss.training import CodecTraining, train_codec
    draw = torch.Generator().manual_seed(0)
    for who in 'abc':
        for side, level in dict(clean=.1, noisy=.3).items():
            (tmp_path/side/who).mkdir(parents=True)
            save(tmp_path/side/who/'1.wav', level * torch.randn(24_000, generator=draw), 16_000)
    manifest = from_pairs(tmp_path/'clean', tmp_path/'noisy', valid=.34, test=.34)
    assert {r.split for r in manifest.pairs()} == {'train', 'valid', 'test'} and not manifest.speech()
    options = CodecTraining(corpus=str(manifest.save(tmp_path/'corpus.jsonl')), steps=1, batch_size=1, seconds=.5,
                            valid_size=1, warmup=1, network=dict(widths=WIDTHS))
    train_codec(options, tmp_path/'run')
    assert abs(CodecPairs(tmp_path/'run/pairs', seconds=1.)[0]['clean'].std() - .1) < .01
