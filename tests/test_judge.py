"""`speechloss judge`: promises of a loss, its controls, the bench and the page; a loss from a file of five lines."""
import csv
import importlib.util
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from helpers import waves
from torch import nn
from typer.testing import CliRunner

from speechloss.cli.app import app
from speechloss.common.errors import SpeechLossError
from speechloss.losses import Loss, build
from speechloss.losses.base import mean_over
from speechloss.reproduce import bench
from speechloss.reproduce.bench import BENCH_GATES, bench_arms, bench_claims, bench_protocol, run_bench
from speechloss.reproduce.judging import judge_claims
from speechloss.reproduce.protocol import training_folder
from speechloss.trials import CANDIDATES, Judged, contract_rows, gradient_bands, optimise, wave_gradient, write_judged
from speechloss.trials.masks import BandMask
from speechloss.trials.page import add_rows, chosen_clips


class Sound(Loss):
    "Keeps every promise"
    def values(self, given):
        error = (given.enhanced - given.clean).square()
        return dict(error=mean_over(error[..., None], given.lengths))


class OverBatch(Sound):
    def values(self, given): return dict(error=super().values(given)['error'].mean().expand(len(given.enhanced)))


class Root(Sound):
    def values(self, given): return dict(error=super().values(given)['error'].sqrt())


class ForgetsPadding(Sound):
    def values(self, given): return super().values(given._replace(lengths=None))


class Random(Sound):
    def values(self, given):
        return dict(error=super().values(given)['error'] * (1 + torch.rand(())))


class Changes(Sound):
    def values(self, given):
        given.clean.data.mul_(1.)
        given.clean.data[..., 0] = 7.
        return super().values(given)


class Trains(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.gain = nn.Parameter(torch.ones(()))

    def values(self, given): return dict(error=self.gain * super().values(given)['error'])


class HidesNaN(Sound):
    def values(self, given): return dict(error=super().values(given)['error'].nan_to_num())


class Wrong(Sound):
    def values(self, given): return dict(error=-super().values(given)['error'])


class Asserts(Sound):
    def values(self, given):
        assert given.enhanced.isfinite().all()
        return super().values(given)


class Single(Sound):
    def values(self, given): return dict(error=super().values(given)['error'].float())


BREAKS = {OverBatch: 'utterances do not feel each other', Root: 'finite on silence, clipping and extremes',
          ForgetsPadding: 'padding does not count', Changes: 'the waves that it is given stay as they are',
          Trains: 'the gradient reaches the enhanced wave alone', HidesNaN: 'NaN shows, and only where it is',
          Single: 'float64 agrees with float32', Random: 'the same each time',
          Asserts: 'NaN shows, and only where it is'}


def test_contract_of_a_sound_loss():
    for loss in (Sound(), build('stft'), build('si_sdr')):
        assert {row['kept'] for row in contract_rows(loss)} == {'kept'}


@pytest.mark.parametrize('loss, promise', BREAKS.items(), ids=lambda value: getattr(value, '__name__', ''))
def test_contract_names_the_broken_promise(loss, promise):
    broken = {row['promise']: row['found'] for row in contract_rows(loss()) if row['kept'] == 'broken'}
    assert broken.get(promise)


def test_contract_lets_some_promises_be_declined():
    rows = {row['promise']: row['kept'] for row in contract_rows(Wrong())}
    assert rows['least at the clean wave'] == 'declined' and 'broken' not in rows.values()
    assert 'turn its sign' in next(row['found'] for row in contract_rows(Wrong()) if row['kept'] == 'declined')
    state = torch.get_rng_state()
    contract_rows(Random())
    assert torch.get_rng_state().equal(state)


def test_contract_stops_where_nothing_else_can_be_asked():
    class Nothing(Loss):
        "Has no values"
    row, = contract_rows(Nothing(), 'mine')
    assert row['kept'] == 'broken' and 'must define values' in row['found']


def test_one_bad_loss_does_not_end_the_others(tmp_path):
    bad = '{"name": "stft", "n_fft": 1048576}'
    done = CliRunner().invoke(app, ['judge', bad, 'wave_l1', '--parts', 'contract', '--out', str(tmp_path), '-q'])
    assert done.exception is None and 'wave_l1 keeps 14 of 14' in done.stderr and f'{bad} keeps 0 of 1' in done.stderr
    assert (tmp_path / 'report.html').is_file()


def test_a_loss_that_cannot_be_built_costs_no_clip(tmp_path, monkeypatch):
    monkeypatch.setattr('speechloss.corpora.get', lambda *_, **__: pytest.fail('a corpus was asked for'))
    done = CliRunner().invoke(app, ['judge', 'torch.nn:Identity', '--out', str(tmp_path)])
    assert done.exit_code == 1 and 'it is called with two waves' in done.stderr and 'SpeechLossError' not in done.stderr


@pytest.mark.parametrize('part, wanted', [('bench', '--train'), ('listeners', '--listeners')])
def test_a_part_without_its_option_is_refused(part, wanted, tmp_path):
    done = CliRunner().invoke(app, ['judge', 'wave_l1', '--parts', part, '--out', str(tmp_path)])
    assert done.exit_code != 0 and wanted in done.stderr + str(done.exception)


# --- masks and gradients ---

def test_level_blind_loss_begins_where_there_is_room():
    "SI-SDR has the same value at a quarter of the level, and from there twice the steps change little"
    _, clean, noisy = waves(2, 8000)
    mask, loss = BandMask(noisy), build('si_sdr')
    quiet = mask.render(mask.start(.25))
    torch.testing.assert_close(quiet, noisy / 4, atol=1e-5, rtol=0)
    assert CANDIDATES['si_sdr'].level == .25 and CANDIDATES['snr'].level == 1.
    assert CANDIDATES['si_sdr'].key() != replace(CANDIDATES['si_sdr'], level=1.).key()
    full, low = (optimise(loss, noisy, clean, steps=60, level=level) for level in (1., .25))
    torch.testing.assert_close(low.start, full.start, atol=1e-3, rtol=1e-3)
    assert (low.end < full.end).all()
    torch.testing.assert_close(low.waves.norm(dim=-1), clean.norm(dim=-1))      # which the loss left open
    torch.testing.assert_close(low.waves, mask.apply(low.gains), atol=1e-5, rtol=1e-4)
    with pytest.raises(SpeechLossError, match='level is 2'): mask.start(2.)


def test_bands_of_a_gradient_hold_all_of_it():
    "8 kHz included: a gradient that is nothing else"
    _, clean, _ = waves(2, 4000)
    turns = torch.ones(4000)
    turns[1::2] = -1
    gradient = wave_gradient(Sound(), clean + .1 * turns, clean)
    shares = {(row['low'], row['high']): row['share'] for row in gradient_bands(dict(sound=gradient))}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5) and shares[4000, 8000] > .99


# --- the bench ---

@pytest.fixture
def protocol(corpus, tmp_path, monkeypatch):
    "Trainings of two steps, with made-up scores: the loss adds half a point, and the base is good"
    monkeypatch.setenv('SPEECHLOSS_HOME', str(tmp_path / 'home'))
    def score_model(folder, clips, **_):
        if folder is None: return [dict(id=clip['id'], speaker=clip['speaker'], pesq=1. + k / 10, lsd=9.)
                                   for k, clip in enumerate(clips)]
        gain = .9 if 'wave_l1' in (folder.parent / 'recipe.json').read_text() else .4
        return [dict(id=clip['id'], speaker=clip['speaker'], pesq=1. + gain + k / 10 + k ** 2 / 1000, lsd=7.)
                for k, clip in enumerate(clips)]

    one_clip = bench.test_clips
    monkeypatch.setattr(bench, 'score_model', score_model)
    monkeypatch.setattr(bench, 'test_clips', lambda *given: [clip | dict(id=f'c{k}', speaker=f's{k}') for k in range(6)
                                                             for clip in one_clip(*given)])
    return replace(bench_protocol('smoke', corpus=corpus, seeds=2), model='tiny', stage1_steps=2, stage2_steps=2,
                   batch_size=2, seconds=.5, test_clips=6, metrics=('pesq', 'lsd'))


def test_bench_trains_each_arm_once_counts_what_is_left_and_judges_by_the_rules(protocol, tmp_path, monkeypatch):
    term, arms = dict(name='wave_l1'), bench_arms(dict(name='wave_l1'))
    assert bench._steps_left(protocol, arms) == (4, dict.fromkeys(arms, 4)) and bench.bench_hours(protocol, arms) > 0
    found = run_bench(term, protocol, out=tmp_path / 'bench')
    models = sorted((tmp_path / 'home/models').glob('*/final'))
    assert len(models) == 2 * (1 + 3)                  # a shared start, base, loss and plain for each seed
    said = {v.claim.id: v.verdict for v in found.verdicts}
    assert said['gain'] == said['own'] == 'reproduced' and said['lsd-base'] == 'tied'
    assert found.numbers['pesq/loss-base']['value'] == pytest.approx(.5) and found.numbers['pesq/base-noisy']['n'] == 6
    assert {row['arm'] for row in found.means} == {'noisy', 'base', 'loss', 'plain'}
    assert set(found.heard) == {'noisy', 'base', 'loss', 'clean'} and (tmp_path / 'bench/bench.json').is_file()
    with open(tmp_path / 'bench/bench_scores.csv', newline='') as file: assert len(list(csv.DictReader(file))) == 6 * 7

    def no_step(*_, **__): raise AssertionError('a step was taken')
    monkeypatch.setattr('speechloss.training.task.fit', no_step)
    assert run_bench(term, protocol).numbers == found.numbers      # all is there already
    assert bench.bench_hours(protocol, arms) == 0
    half = training_folder(bench.arm_recipe(protocol, 1, term))      # what a kill leaves: a checkpoint, no model
    shutil.rmtree(half / 'final')
    (there,) = (half / 'checkpoints').iterdir()
    there.rename(there.with_name('step-00000001'))
    assert bench._steps_left(protocol, arms) == (0, dict(base=0, loss=1, plain=0))


def test_bench_controls_have_the_same_share_of_the_gradient():
    arms = bench_arms(dict(name='ssl'), dict(name='ssl', random_seed=0))
    assert list(arms) == ['base', 'loss', 'plain', 'control'] and arms['base'] is None
    assert bench_arms(dict(name='multi_resolution_stft'))['plain']['name'] == 'mel'
    recipe = bench.arm_recipe(bench_protocol('smoke'), 0, arms['control'])
    assert recipe.objective['balance'] == 'grad' and recipe.objective['weights'] == dict(extra=1.)


@pytest.mark.parametrize('gain, base, word', [(.2, .5, 'reproduced'), (0., .5, 'tied'), (-.2, .5, 'not reproduced'),
                                              (.2, .1, 'inadequate')])
def test_bench_verdicts(gain, base, word):
    def number(value): return dict(value=value, low=value - .01, high=value + .01, se=.005, df=39, n=100, clusters=40,
                                   clustered_by='cluster', seeds=[0, 1, 2], level=.95)
    numbers = {'pesq/base-noisy': number(base), 'pesq/loss-base': number(gain), 'pesq/loss-plain': number(gain)}
    verdicts = judge_claims(bench_claims(['base', 'loss', 'plain'], ['pesq'], 'smoke'), numbers, 'smoke', BENCH_GATES)
    assert {v.verdict for v in verdicts} == {word}


# --- the page and the table ---

def test_page_escapes_names_and_says_what_was_not_asked(tmp_path):
    rows = [dict(loss=name, id=f'c{k}', speaker=f's{k}', pesq=1.5 + gain) for k in range(3)
            for name, gain in dict(noisy=0, ideal_ratio=.5).items()] + [
            dict(loss='<b>', id=f'c{k}', speaker=f's{k}', pesq=1.6 + k / 10) for k in range(3)]
    judged = Judged(contracts={'<b>': contract_rows(ForgetsPadding())}, rows=rows)
    page = write_judged(judged, tmp_path / 'page.html').read_text()
    assert '<b><' not in page and '&lt;b&gt;' in page and 'padding does not count' in page
    assert 'give --listeners' in page and 'give --train' in page and 'http' not in page
    assert chosen_clips(rows, '<b>') == dict(best='c2', median='c1', worst='c0')


def test_rows_of_the_leaderboard_are_replaced(tmp_path):
    table = tmp_path / 'board.csv'
    add_rows(table, [dict(loss='b', pesq=1.), dict(loss='a', pesq=2.)])
    add_rows(table, [dict(loss='b', pesq=3., scale='smoke')])
    assert table.read_text().split() == ['loss,pesq,scale', 'a,2.0,', 'b,3.0,smoke']


def test_leaderboard_of_the_repository_is_sound(root):
    with open(root / 'benchmarks/leaderboard.csv', newline='') as file: rows = list(csv.DictReader(file))
    names = [row['loss'] for row in rows]
    assert names == sorted(set(names)) and {'si_sdr', 'multi_resolution_stft', 'base'} <= set(names)
    for row in rows:
        assert 0 < int(row['kept']) <= int(row['promises']) and float(row['ms']) > 0
        if row['pesq']: assert float(row['pesq_low']) <= float(row['pesq_gain']) <= float(row['pesq_high'])


# --- a learned judge ---

def test_opinion_as_a_loss(root, monkeypatch):
    "The number of the metric, and a distance that is 0 at identity; the control hears otherwise"
    if importlib.util.find_spec('distillmos') is None: pytest.skip('distillmos is not installed')
    monkeypatch.setattr(sys, 'path', [str(root), *sys.path])
    from benchmarks.opinion import Opinion, OpinionDistance
    from speechloss.metrics.opinions import distillmos
    _, clean, noisy = waves(1, 8000)
    with torch.no_grad():
        assert 5 - float(Opinion()(noisy[0], clean[0])) == pytest.approx(distillmos(noisy[0], 16000), abs=1e-4)
        trained, control = OpinionDistance(), OpinionDistance(random_seed=0)
        assert trained(clean, clean) == 0 and trained(noisy, clean) > 0
        assert trained(noisy, clean) != control(noisy, clean)
    wave = noisy.clone().requires_grad_()      # short: what follows is exact silence
    gradient, = torch.autograd.grad(trained(wave, clean), wave)
    assert gradient.isfinite().all() and gradient.any()
