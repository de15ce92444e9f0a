"""Losses and models that are not of this package: by class path, by entry point, in recipes and their keys."""
import importlib
import json
import sys

import pytest
import torch
from helpers import waves

from speechloss.cli.app import app
from speechloss.common.errors import CheckpointError, SpeechLossError
from speechloss.losses import Loss, OutsideLoss, build, build_objective
from speechloss.losses.functional import si_sdr
from speechloss.models import catalogue, enhancer, load_enhancer
from speechloss.training import Recipe, train

LOSS = '''from speechloss.losses import Loss
class Power(Loss):
    "Compares powers"
    def __init__(self, exponent=2., *, features=None, **options):
        super().__init__(**options)
        self.exponent, self.features = exponent, features
    def values(self, waves):
        return dict(power=(waves.enhanced - waves.clean).abs().pow(self.exponent).mean(-1))
'''
NET = '''import torch
class Gain(torch.nn.Module):
    sample_rate = 16000
    def __init__(self, start=.5):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(start))
    def forward(self, noisy, lengths=None): return self.gain * noisy
    def encode(self, wave): return (self.gain * wave)[..., None]
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A working folder with a loss and a network, and a package that announces the loss"
    (tmp_path / 'my_outside.py').write_text(LOSS + NET)
    info = tmp_path / 'my_outside-1.2.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: my-outside\nVersion: 1.2\n')
    (info / 'entry_points.txt').write_text('[speechloss.losses]\npower = my_outside:Power\n')
    (info / 'top_level.txt').write_text('my_outside\n')
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop('my_outside', None)


def test_build_by_path_and_by_entry_point(folder):
    enhanced, clean, noisy = waves()
    loss = build(dict(name='my_outside:Power', exponent=1., reduction='none', features='stft'))
    assert isinstance(loss, Loss) and loss(enhanced, clean).shape == (3,)
    assert type(loss.features).__name__ == 'STFTFeatures'
    sys.path.insert(0, str(folder))
    assert build('power')(enhanced, clean) == build('my_outside:Power')(enhanced, clean)
    objective = build_objective(dict(terms=dict(a='snr', b=dict(name='my_outside:Power'), c='torch.nn:L1Loss'),
                                     balance='grad'))
    assert set(objective.terms(enhanced, clean, noisy=noisy)) == {'a', 'b', 'c'}


def test_command_lists_what_is_announced(folder):
    from typer.testing import CliRunner
    sys.path.insert(0, str(folder))
    done = CliRunner().invoke(app, ['losses', '--json'])
    assert [row['loss'] for row in json.loads(done.stdout) if row['name'] == 'power'] == ['my_outside:Power']


def test_wrapped_module_keeps_utterances_apart():
    "The value of an utterance is what the module gives it alone, cut to its length; padding has no gradient"
    auraloss = pytest.importorskip('auraloss')
    enhanced, clean, _ = waves(3, 4000)
    lengths = torch.tensor([4000, 3000, 3500])
    loss = build(dict(name='auraloss.freq:STFTLoss', fft_size=256, hop_size=64, win_length=256, reduction='none'))
    peer = auraloss.freq.STFTLoss(256, 64, 256)
    leaf = enhanced.clone().requires_grad_()
    values = loss(leaf, clean, lengths=lengths)
    for value, e, c, n in zip(values, enhanced, clean, lengths):
        torch.testing.assert_close(value, peer(e[None, None, :n], c[None, None, :n]))
    values.sum().backward()
    assert all(not row[n:].any() for row, n in zip(leaf.grad, lengths))


class Noisy(torch.nn.Module):
    "Compares with the noisy wave"
    def forward(self, enhanced, clean, noisy):
        return (enhanced - noisy).square().mean() - si_sdr(enhanced, clean).mean()


def test_wrapped_module_gets_the_noisy_wave():
    enhanced, clean, noisy = waves()
    assert OutsideLoss(Noisy())(enhanced, clean, noisy=noisy).isfinite()


@pytest.mark.parametrize('name, message', [
    ('my_absent:Loss', 'there is no module my_absent: install it, or start in the folder'),
    ('my_outside:Powers', "did you mean 'Power'"),
    ('my_outside:NOTE', 'NOTE'), ('my_outside:Gain', 'takes .noisy, lengths=None.: it is called with two waves'),
    ('json:dumps', 'cannot be built from'), ('collections:Counter', 'makes a Counter: name a torch module'),
    (dict(name='my_outside:Power', depth=3), 'cannot be built from .*depth'), ('my_outsider', 'or module:Class')])
def test_errors_of_losses(folder, name, message):
    with pytest.raises(SpeechLossError, match=message) as caught: build(name)
    assert '\n' not in str(caught.value)


def test_key_holds_the_code(folder):
    "Of a loss and of a model: path, options, source and version"
    def key(**options): return Recipe(objective=dict(terms=dict(a=dict(name='my_outside:Power', **options)))).key

    def fresh():
        sys.modules.pop('my_outside', None)
        importlib.invalidate_caches()
        return key(), key(exponent=1.), Recipe(model='my_outside:Gain').key, Recipe(model='tiny').key

    before = fresh()
    assert len(set(before)) == 4 and fresh() == before
    assert Recipe(model='my_outside:Gain').key == Recipe(model={'kind': 'my_outside:Gain'}).key
    (folder / 'my_outside.py').write_text(LOSS.replace('.mean(-1)', '.mean(-1) * 2') + NET)
    after = fresh()
    assert [a == b for a, b in zip(before, after)] == [False, False, False, True]


def test_training_of_a_model_from_elsewhere(folder):
    "Three steps, and the model opens again from what they leave"
    recipe = Recipe(model={'kind': 'my_outside:Gain', 'start': .25}, seconds=.5, steps=3, batch_size=2, eval_every=3,
                    valid_size=2, workers=0,
                    objective=dict(terms=dict(a='my_outside:Power', b=dict(name='model_as_loss')), balance='grad'))
    final = train(recipe, folder / 'run')
    assert json.loads((final / 'config.json').read_text()) == {'kind': 'my_outside:Gain', 'start': .25}
    net = load_enhancer(folder / 'run')
    assert type(net).__name__ == 'Gain' and net.gain != .25
    (final / 'config.json').write_text('{"kind": "os:system", "command": "touch harm"}')
    with pytest.raises(CheckpointError, match='does not describe an enhancer'): load_enhancer(final)
    assert not (folder / 'harm').exists()


def test_hub_runs_no_code(folder, monkeypatch):
    "A model from the hub that names a class is not built"
    (folder / 'config.json').write_text('{"kind": "my_outside:Gain"}')
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda *_, **__: str(folder))
    with pytest.raises(CheckpointError, match='code of its own'): load_enhancer('somebody/model')


@pytest.mark.parametrize('change, message', [
    (('sample_rate = 16000', ''), 'no sample_rate'), (('lengths=None', ''), 'takes no lengths'),
    (('torch.nn.Parameter(torch.tensor(start))', 'start'), 'no weights'),
    (('return self.gain * noisy', 'return (self.gain * noisy)[:, ::2]'), r'makes \(2, 2000\)'),
    (('self.gain * noisy', 'self.loss * noisy'), 'fails on noise')])
def test_errors_of_models(folder, change, message):
    (folder / 'my_outside.py').write_text(NET.replace(*change))
    with pytest.raises(SpeechLossError, match=message) as caught: enhancer('my_outside:Gain')
    assert '\n' not in str(caught.value)
    assert catalogue.MODEL_KINDS.keys() == {'enhancer', 'band_split', 'autoencoder', 'vq'}      # it is not among them


FOREIGN = '''import torch
class Swapped(torch.nn.Module):
    def forward(self, clean, enhanced): return ((enhanced - clean) / (1 + clean)).square().mean()
class Samples(torch.nn.Module):
    def forward(self, enhanced, clean): return (enhanced - clean).abs()
class Words(torch.nn.Module):
    def forward(self, enhanced, clean): return dict(loss=(enhanced - clean).abs().mean())
class One(torch.nn.Module):
    def forward(self, x): return x.mean()
class Numbers(torch.nn.Module):
    def forward(self, enhanced, clean): return torch.tensor(float((enhanced - clean).detach().std()))
class Weighted(torch.nn.Module):
    def __init__(self, alpha, *, beta=1.): super().__init__()
    def forward(self, enhanced, clean): return (enhanced - clean).abs().mean()
def plain(enhanced, clean, power=1.): return (enhanced - clean).abs().pow(power).mean()
'''


@pytest.mark.parametrize('name, words', [
    ('Samples', r'Samples gives the shape \(1, 1, 16000\) for an utterance: return one number'),
    ('Words', 'Words gives a dict for an utterance'), ('One', r'One takes \(x\): it is called with two waves'),
    ('Numbers', 'gives the enhanced wave no gradient: compute it in torch'),
    ('Weighted', r'it needs alpha, give {"name": "my_foreign:Weighted", "alpha": ...}')])
def test_a_first_attempt_gets_one_sentence_with_the_cure(name, words, tmp_path, monkeypatch):
    (tmp_path / 'my_foreign.py').write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpeechLossError, match=words) as caught: build(f'my_foreign:{name}')
    assert '\n' not in str(caught.value)
    enhanced, clean, _ = waves()
    wanted = torch.stack([((e - c) / (1 + c)).square().mean() for e, c in zip(enhanced, clean)]).mean()
    torch.testing.assert_close(build('my_foreign:Swapped')(enhanced, clean), wanted)     # by name, not by place
    twice = build(dict(name='my_foreign:plain', power=2., reduction='sum'))       # a function will do
    torch.testing.assert_close(twice(enhanced, clean), (enhanced - clean).square().mean(-1).sum())
    with pytest.raises(SpeechLossError, match='give my_foreign:plain, and start'): build('my_foreign.py:plain')
    sys.modules.pop('my_foreign')
