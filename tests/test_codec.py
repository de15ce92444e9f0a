"""The network that imitates MP3: what it may not do, what its skill says, and a training from nothing."""
import json
from importlib.util import find_spec

import pytest
import torch

from speechloss.audio import SpeechLossError
from speechloss.codec import BANDS, FLOOR, CodecFeatures, CodecNet, load_codec, log_power, save_codec, skill
from speechloss.losses import CodecLoss

WIDTHS = (4, 6, 8)


def net(**options):
    torch.manual_seed(3)
    return CodecNet(widths=WIDTHS, **options)


CARD = dict(skill=dict(skill=.25), scale={name: 2. for name in net().names})


def test_log_power_of_a_tone():
    tone = torch.sin(2 * torch.pi * 1000 / 16_000 * torch.arange(16_000, dtype=torch.float64))[None]
    power = 10 ** log_power(tone)[0, 5:-5] - FLOOR
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


def test_weights_are_few():
    assert sum(p.numel() for p in CodecNet().parameters()) < 3_000_000


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
    save_codec(made, tmp_path/'good', CARD, half=False)
    again, card = load_codec(tmp_path/'good')
    x = .1 * torch.randn(2, 5_000)
    assert torch.equal(again(x), made(x)) and card['skill'] == CARD['skill'] and made.training
    for value in 0., -.2, None, float('nan'):
        save_codec(made, tmp_path/'poor', dict(skill=dict(skill=value)))
        with pytest.raises(SpeechLossError, match='no better than the identity'): CodecLoss(tmp_path/'poor')
    (tmp_path/'good/model.safetensors').write_bytes(b'cut')
    with pytest.raises(SpeechLossError, match='train or fetch it again'): CodecLoss(tmp_path/'good')
    (tmp_path/'good/codec.json').write_text(json.dumps(CARD))
    with pytest.raises(SpeechLossError, match='cannot be opened'): load_codec(tmp_path/'good')
    with pytest.raises(SpeechLossError, match='holds no codec.json'): CodecLoss(tmp_path)
    with pytest.raises(SpeechLossError, match='has a skill of None'): CodecLoss(made)


def test_layers_and_their_scales():
    made, x = net(), .1 * torch.randn(1, 4_000)
    every = CodecFeatures(made, card=CARD)
    assert made.training and all(p.requires_grad for p in made.parameters())     # the user's own stays as it was
    assert torch.equal(2 * every(x)[-1], made(x)) and every.names == made.names
    assert CodecFeatures(made, card=CARD, layers=['output', 'down1']).names == ('down1', 'output')
    drawn = CodecFeatures(made, card=CARD, random_seed=1)
    same = CodecFeatures(made, card=CARD, random_seed=1)
    assert not torch.equal(drawn(x)[0], every(x)[0]) and torch.equal(drawn(x)[0], same(x)[0])
    for wrong in 'deep', ['down1', 'down9'], []:
        with pytest.raises(SpeechLossError, match='choose all, inner, output'):
            CodecFeatures(made, card=CARD, layers=wrong)
    with pytest.raises(ValueError, match='above 0'): CodecLoss(made, card=CARD, weights=[0.] * len(made.names))


@pytest.mark.slow
@pytest.mark.skipif(find_spec('lameenc') is None, reason='without lameenc')
def test_training_goes_on_where_it_was_stopped(tmp_path):
    from speechloss.codec_training import CodecTraining, train_codec
    options = CodecTraining(corpus='mini', steps=4, batch_size=2, seconds=.5, valid_size=3, warmup=1,
                            network=dict(widths=WIDTHS))

    class Stop(Exception): pass

    def stop(label, done, total):
        if done == 2: raise Stop

    with pytest.raises(Stop): train_codec(options, tmp_path/'a', progress=stop)
    assert not (tmp_path/'a/model').exists()
    first, second = (train_codec(options, tmp_path/name) for name in 'ab')
    assert (first/'model.safetensors').read_bytes() == (second/'model.safetensors').read_bytes()
    card = json.loads((first/'codec.json').read_text())
    assert card['weights'] == sum(p.numel() for p in CodecNet(widths=WIDTHS).parameters())
    assert all(v > 0 for v in card['scale'].values()) and card['seconds_of_speech'] > 10
