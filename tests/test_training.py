"""Training: the same bits however often it is killed, and errors in one sentence."""
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import stop_at, untimed, weights
from torch import nn

from speechloss.cli.train import overrides
from speechloss.common.errors import SpeechLossError, CheckpointError, TrainingError
from speechloss.common.weights import DATA
from speechloss.corpora import Manifest
from speechloss.features import STFTFeatures
from speechloss.losses import ContrastiveRegularization, Hooks, Objective, SISDRLoss, SNRLoss, SSLLoss, build_objective
from speechloss.losses.model_as_loss import feature_health
from speechloss.losses.registry import CARDS, FEATURES, default_options
from speechloss.models import enhancer, load_enhancer
from speechloss.training import enhancer as several
from speechloss.training import checkpoints, fit, loop, Recipe, read_log, train, train_many
from speechloss.training.enhancer import _pool, data_of, model_of
from speechloss.training.recipe import BASE, recipe_fields
from speechloss.training.run_folder import is_finished, write_recipe
from speechloss.training.state import PATIENCE, TrainingState


MAL = dict(terms=dict(base=dict(terms=dict(wave='si_sdr', spectrum='compressed_complex')),
                      extra=dict(name='model_as_loss', rule='dynamic')), balance='grad')

WORKER = '''
import json, sys
from speechloss.training import Recipe
from speechloss.training import train

def main():
    recipe, out = sys.argv[1:]
    progress = lambda label, done, total: print(done, flush=True)
    train(Recipe.from_dict(json.loads(recipe)), out, progress=progress)

main()
'''


def run_worker(recipe: Recipe, out: Path, kill_after: int | None = None) -> None:
    "Train in a process of its own; SIGKILL when it reports the step"
    with subprocess.Popen([sys.executable, '-c', WORKER, json.dumps(asdict(recipe)), str(out)],
                          stdout=subprocess.PIPE, text=True, env={
                              # on a busy machine a thread that waits must not spin
                              **os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}) as process:
        for line in process.stdout:
            if kill_after is not None and int(line) >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)


@pytest.mark.slow
def test_sigkill_at_three_random_steps(recipe, whole, tmp_path):
    "Model as Loss with a moving snapshot and gradient balance: all the state there is"
    recipe = replace(recipe, steps=60, steps_per_epoch=10, save_every=7, eval_every=11,
                     init=str(whole / 'final'), objective=MAL)
    train(recipe, tmp_path / 'undisturbed')
    kills = sorted(random.SystemRandom().sample(range(4, 50), 3))
    print('killed at', kills)
    for step in kills:
        run_worker(recipe, tmp_path / 'killed', kill_after=step)
    train(recipe, tmp_path / 'killed')
    for folder in ('final', 'best'):
        assert weights(tmp_path / 'killed' / folder) == weights(tmp_path / 'undisturbed' / folder), kills
    assert untimed(tmp_path / 'killed/log.jsonl') == untimed(tmp_path / 'undisturbed/log.jsonl')


@pytest.mark.parametrize('changes,stops', [
    (dict(), (2, 7, 11)), (dict(ema=0., schedule='constant'), (7,)), (dict(workers=1), (4,)),
    (dict(gain_db=(-6, 6), clean_fraction=.5, extra_noise=('babble', 'pink'), seconds=.3,
          augment=dict(noises=(1, 2), clip=.5, peak_db=(-35., 0.))), (5,))],
    ids=['plain', 'constant', 'worker', 'augmented'])
def test_stopped_and_resumed(recipe, whole, tmp_path, changes, stops):
    recipe = replace(recipe, **changes)
    if changes: train(recipe, whole := tmp_path / 'whole')
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / 'parts', progress=stop_at(step))
    train(recipe, tmp_path / 'parts')
    assert weights(tmp_path / 'parts/final') == weights(whole / 'final')
    assert weights(tmp_path / 'parts/best') == weights(whole / 'best')
    assert untimed(tmp_path / 'parts/log.jsonl') == untimed(whole / 'log.jsonl')


@pytest.mark.parametrize('cores, given, steps, wanted', [
    (2, None, 500, 1), (1, None, 500, 0), (2, None, 20, 0), (2, 0, 500, 0), (1, 3, 5, 3)])
def test_a_free_core_mixes_ahead(recipe, monkeypatch, cores, given, steps, wanted):
    monkeypatch.setattr(loop, 'available_cores', lambda: cores)
    monkeypatch.setattr(loop.multiprocessing, 'get_start_method', lambda: 'fork')
    data, _, _ = data_of(recipe)
    recipe = replace(recipe, workers=given, threads=1)
    assert loop._mixing_processes(recipe, data, steps) == wanted
    # items of a user may hold what does not survive in another process
    assert loop._mixing_processes(recipe, list(range(9)), steps) == (given or 0)
    monkeypatch.setattr(loop.multiprocessing, 'get_start_method', lambda: 'spawn')
    assert loop._mixing_processes(recipe, data, steps) == (given or 0)


def test_the_average_follows_every_kind_of_weight(recipe):
    "Buffers that are no numbers to average are copied"
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = TrainingState(model, SISDRLoss(), replace(recipe, ema=.5))
    before = {name: value.clone() for name, value in state.averaged.items()}
    state.step = 100
    with torch.no_grad():
        for value in model.state_dict().values(): value.add_(2)
    state.average()
    for name, value in state.averaged.items():
        torch.testing.assert_close(value, before[name] + (1 if value.is_floating_point() else 2))


@pytest.mark.slow
def test_two_threads(recipe, tmp_path):
    "Threads that share the work still add in one order"
    recipe = replace(recipe, threads=2, steps=6, seconds=1., batch_size=4)
    run_worker(recipe, tmp_path / 'whole')
    run_worker(recipe, tmp_path / 'parts', kill_after=4)
    train(recipe, tmp_path / 'parts')
    assert weights(tmp_path / 'parts/final') == weights(tmp_path / 'whole/final')


def test_health_is_logged_after_each_epoch(recipe, tmp_path, monkeypatch):
    "Once each, over stops too; it is of the model of that step, and changes nothing"
    recipe = replace(recipe, objective=MAL, log_every=5)
    for step in (5, 10):
        with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path / 'run', progress=stop_at(step))
    train(recipe, tmp_path / 'run')
    rows = {row['step']: row for row in read_log(tmp_path / 'run/log.jsonl')}
    assert list(rows) == [4, 5, 8, 10, 12]
    assert [step for step, row in rows.items() if 'health' in row] == [4, 8, 12]
    model = model_of(recipe).eval()
    model.load_state_dict({name.partition('/')[2]: value for name, value in checkpoints.latest(
        tmp_path / 'run/checkpoints')[1].items() if name.startswith('model/')})
    expected = feature_health(model.encode(data_of(recipe)[1][0]['clean'][None]).detach())
    assert rows[12]['health'] == pytest.approx(
        {f'extra.bottleneck.{name}': value for name, value in expected.items()}, rel=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(Objective, 'health', lambda *args, **kwargs: {})
        train(recipe, tmp_path / 'silent')
    assert weights(tmp_path / 'run/final') == weights(tmp_path / 'silent/final')
    assert not any('health' in row for row in read_log(tmp_path / 'silent/log.jsonl'))


class Dropped(nn.Module):
    "A user's model: dropout, an integer buffer, no save_pretrained"
    sample_rate = 16000

    def __init__(self):
        super().__init__()
        self.down, self.drop = nn.Conv1d(1, 8, 16, 8, padding=8), nn.Dropout(.5)
        self.up = nn.ConvTranspose1d(8, 1, 16, 8, padding=8)
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))

    def encode(self, wave): return self.drop(self.down(wave[:, None]).relu()).mT

    def forward(self, noisy):
        if self.training: self.seen += 1
        return noisy + self.up(self.encode(noisy).mT)[:, 0, :noisy.shape[-1]]


@pytest.mark.parametrize('freeze', [False, True])
def test_a_users_model(recipe, tmp_path, freeze):
    "Dropout draws the same after a stop; frozen, the encoder neither moves nor drops"
    recipe, ends = replace(recipe, freeze_encoder=freeze), []
    train_data, valid_data, _ = data_of(recipe)
    for stops in ((), (5, 8)):
        out = tmp_path / str(len(stops))
        for step in (*stops, None):
            torch.manual_seed(0)
            model = Dropped()
            before = model.down.weight.detach().clone()
            try:
                fit(model, build_objective(MAL, model=model), train_data, valid_data, recipe, out,
                    progress=stop_at(step))
            except KeyboardInterrupt:
                continue
        ends.append(weights(out / 'final'))
        assert model.down.weight.equal(before) == freeze and model.drop.training != freeze
        assert model.seen == recipe.steps
    assert ends[0] == ends[1]


def test_generators_and_threads_are_given_back(recipe, tmp_path):
    torch.set_num_threads(2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(recipe, tmp_path / 'run')
    assert torch.rand(1).equal(expected) and torch.get_num_threads() == 2


def test_progress_and_a_finished_run(recipe, tmp_path):
    "From the first word on there is something to see; a finished run takes no steps"
    calls = []
    for _ in range(2):
        train(replace(recipe, save_every=1), tmp_path / 'run', progress=lambda *event: calls.append(event))
    reading = ('reading the corpus', 0, None)
    assert calls[0] == calls[-1] == reading and calls.count(reading) == 2
    assert [done for _, done, _ in calls[1:-1]] == list(range(13))


def test_fields_of_a_recipe_are_told_as_they_are_given():
    rows = recipe_fields()
    assert [row['field'] for row in rows] == [f.name for f in fields(Recipe)]
    assert all(row['meaning'] for row in rows)
    given = overrides([part for row in rows for part in ('--' + row['field'], row['default'])])
    assert Recipe.from_dict(given) == Recipe()


def test_averaged_weights_are_the_result(recipe, tmp_path):
    "And with a decay of 0 they are the last weights themselves"
    train(replace(recipe, ema=0.), tmp_path / 'run')
    _, tensors, _ = checkpoints.latest(tmp_path / 'run/checkpoints')
    final = load_enhancer(tmp_path / 'run').state_dict()
    assert all(tensors[f'model/{name}'].equal(value) for name, value in final.items())


def test_best_is_best(recipe, tmp_path):
    train(replace(recipe, lr=.05), tmp_path / 'run')
    scores = {row['step']: row['valid']['si_sdr'] for row in read_log(tmp_path / 'run/log.jsonl') if 'valid' in row}
    best = json.loads((tmp_path / 'run/best/summary.json').read_text())
    assert list(scores) == [4, 8, 12] and best['valid']['si_sdr'] == max(scores.values())
    assert scores[best['step']] == max(scores.values())


def test_frozen_encoder(recipe, whole, tmp_path):
    start = whole / 'final'
    end = train(replace(recipe, init=str(start), freeze_encoder=True), tmp_path / 'end')
    one, other = (load_enhancer(folder).state_dict() for folder in (start, end))
    for name in one:
        assert one[name].equal(other[name]) == name.startswith('encoder.'), name


def test_start_is_that_of_init(recipe, whole):
    start = whole / 'final'
    again = replace(recipe, init=str(start), model='base')
    assert weights(start) and all(
        a.equal(b) for a, b in zip(model_of(again).state_dict().values(), load_enhancer(start).state_dict().values()))


# What goes wrong

def test_checkpoint_damaged_between(recipe, whole, tmp_path):
    "The newest is cut: the one before is used, and the end is the same. All cut: an error"
    out = tmp_path / 'parts'
    with pytest.raises(KeyboardInterrupt): train(recipe, out, progress=stop_at(10))
    folders = checkpoints.checkpoint_folders(out / 'checkpoints')
    cut(folders[-1] / checkpoints.TENSORS_FILE)
    with pytest.warns(UserWarning, match='going on from step-00000006'):
        with pytest.raises(KeyboardInterrupt): train(recipe, out, progress=stop_at(8))
    with pytest.warns(UserWarning): train(recipe, out)
    assert weights(out / 'final') == weights(whole / 'final')
    assert untimed(out / 'log.jsonl') == untimed(whole / 'log.jsonl')


def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def test_all_checkpoints_damaged(recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path, progress=stop_at(10))
    for folder in checkpoints.checkpoint_folders(tmp_path / 'checkpoints'): cut(folder / checkpoints.TENSORS_FILE)
    before = (tmp_path / 'log.jsonl').read_bytes()
    with pytest.raises(CheckpointError, match='no checkpoint in'):
        train(recipe, tmp_path)
    assert (tmp_path / 'log.jsonl').read_bytes() == before and not (tmp_path / 'final').exists()


def test_torn_log(recipe, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path / 'parts', progress=stop_at(10))
    log = tmp_path / 'parts/log.jsonl'
    log.write_bytes(log.read_bytes()[:-9])
    train(recipe, tmp_path / 'parts')
    assert untimed(log) == untimed(whole / 'log.jsonl')


def test_full_disk(recipe, whole, tmp_path, monkeypatch):
    "One sentence, the checkpoint before it intact, and room again lets it go on"
    real = checkpoints.save_tensors

    def full(tensors, path):
        if 'step-00000009' in str(path): raise OSError(28, 'No space left on device')
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, 'save_tensors', full)
        with pytest.raises(CheckpointError, match='No space left on device') as caught:
            train(recipe, tmp_path / 'full')
    assert '\n' not in str(caught.value)
    assert checkpoints.latest(tmp_path / 'full/checkpoints')[0] == 6
    train(recipe, tmp_path / 'full')
    assert weights(tmp_path / 'full/final') == weights(whole / 'final')


def test_a_run_goes_on_under_another_spelling(tmp_path, monkeypatch):
    """The same manifest by another path, and 1 for 1.0, are the same run; what differs in others is named."""
    monkeypatch.chdir(tmp_path)
    run, about = tmp_path / 'run', dict(corpus_hash='abc')
    first = Recipe(corpus='m.jsonl', lr=1., snr=(-5, 20))
    write_recipe(run, first, about)
    for same in (first, replace(first, corpus=f'{tmp_path}/m.jsonl', lr=1), replace(first, corpus='./m.jsonl'),
                 replace(first, snr=[-5., 20.]), replace(first, threads=2)):
        assert not is_finished(run, same, about)
    for other, field in ((replace(first, lr=.5), 'lr was 1.0 and is 0.5'), (replace(first, corpus='mini'), 'corpus'),
                         (replace(first, snr=(0, 20)), 'snr')):
        with pytest.raises(TrainingError, match=f'another run.*{field}'): is_finished(run, other, about)
    with pytest.raises(TrainingError): is_finished(run, replace(first, corpus='./m.jsonl'), dict(corpus_hash='other'))
    noisy = replace(first, noise_corpus='n.jsonl')
    write_recipe(run, noisy, about)
    assert not is_finished(run, replace(noisy, corpus='./m.jsonl', noise_corpus=f'{tmp_path}/n.jsonl'), about)
    for other in (first, replace(noisy, noise_corpus='mini')):
        with pytest.raises(TrainingError, match='another run.*noise_corpus'): is_finished(run, other, about)
    with pytest.raises(TrainingError, match="corpus 'm.jsonl' or 'n.jsonl'"):
        is_finished(run, noisy, dict(corpus_hash='other'))


def test_noise_of_another_corpus(recipe, corpus, tmp_path):
    "What the corpus holds itself stays out; a corpus of speech alone is validated with noise of the other"
    own = Manifest.load(corpus)
    mine = [replace(r, group='g-' + r.split, noise='hum-' + r.split) for r in own.noise()]

    def saved(name, *rows): return str(Manifest(rows, name).save(tmp_path / f'{name}.jsonl'))

    def take(id, split='train', **what): return replace(mine[0], id=id, split=split, sha256=id, **what)

    ours = saved('ours', *own.speech(), *mine)
    other = saved('other', take('new', group='x', noise='dog'), take('take', group='g-train', noise='hum-train'),
                  take('sound', group='g-test', noise='dog'), take('kind', group='y', noise='hum-valid'), mine[0],
                  take('later', 'valid', group='z', noise='rain'))
    heard = data_of(replace(recipe, corpus=ours, noise_corpus=other))[2]
    assert {r.id for r in heard} - {r.id for r in own} == {'other/new', 'other/take'}
    alone = data_of(replace(recipe, corpus=saved('talk', *own.speech()), noise_corpus=other))
    assert alone[1][0]['noise'] == 'other/later' and len(alone[2].noise('train')) == 5
    pair = replace(own.speech('train')[0], kind='pair', clean_path=own.speech('train')[0].path)
    for wrong, words in ((dict(noise_corpus=ours), 'that the corpus does not have itself'),
                         (dict(noise_corpus='mnii'), "noise_corpus: corpus 'mnii' is unknown: did you mean 'mini'"),
                         (dict(noise_corpus=None), "noise_corpus is None: give a corpus by name or manifest, or ''"),
                         (dict(corpus=saved('pairs', pair), noise_corpus=other), 'has real pairs')):
        with pytest.raises(SpeechLossError, match=words): data_of(replace(recipe, **dict(corpus=ours) | wrong))


def test_another_runs_folder(recipe, tmp_path):
    train(recipe, tmp_path / 'run')
    before = sorted(p.name for p in (tmp_path / 'run').rglob('*'))
    with pytest.raises(TrainingError, match='holds another run'):
        train(replace(recipe, seed=1), tmp_path / 'run')
    (tmp_path / 'run/recipe.json').write_text('{')
    with pytest.raises(TrainingError, match='holds another run'):
        train(recipe, tmp_path / 'run')
    (tmp_path / 'run/recipe.json').unlink()
    with pytest.raises(TrainingError, match='without recipe.json'):
        train(recipe, tmp_path / 'run')
    assert {*before} - {p.name for p in (tmp_path / 'run').rglob('*')} == {'recipe.json'}


class Sometimes(Hooks, nn.Module):
    "A loss that is not finite at some calls"
    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def terms(self, enhanced, clean, *, noisy=None, lengths=None):
        self.calls += 1
        error = (enhanced - clean).square().mean()
        return dict(error=error * (float('nan') if self.calls in self.bad else 1))


def test_steps_that_are_not_finite(recipe, tmp_path):
    "A few are left out and counted; a row of them ends the run"
    train_data, valid_data, _ = data_of(recipe)
    fit(enhancer('tiny'), Sometimes({2, 3, 7}), train_data, valid_data, recipe, tmp_path / 'few')
    rows = read_log(tmp_path / 'few/log.jsonl')
    assert rows[-1]['skipped'] == 3
    assert all(p.isfinite().all() for p in load_enhancer(tmp_path / 'few').parameters())
    with pytest.raises(TrainingError, match=f'not finite at step {PATIENCE} and'):
        fit(enhancer('tiny'), Sometimes(range(2, 99)), train_data, valid_data, recipe, tmp_path / 'many')


@pytest.mark.parametrize('wrong', [
    dict(model='huge'), dict(model=dict(channels=3)), dict(model=dict(depth=3)),
    dict(objective={}), dict(objective=dict(terms=dict(a='nothing'))),
    dict(objective=dict(terms=dict(a=dict(name='si_sdr', depth=1)))), dict(corpus='absent'),
    dict(corpus='absent.jsonl'), dict(init='/absent'), dict(device='tpu'), dict(steps=0),
    dict(batch_size=-1), dict(lr=0.), dict(decay=1.5), dict(schedule='linear'), dict(ema=1.), dict(precision='int4'),
    dict(snr='loud'), dict(steps='many'), dict(device='cuda'), dict(extra_noise=('drums',))], ids=str)
def test_wrong_recipes(recipe, tmp_path, wrong):
    "One sentence, and nothing is written"
    if wrong == dict(device='cuda') and torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(SpeechLossError) as caught:
        train({**asdict(recipe), **wrong}, tmp_path / 'run')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_out_is_a_file(recipe, tmp_path):
    (tmp_path / 'run').write_text('')
    with pytest.raises(CheckpointError, match='run cannot be written'):
        train(recipe, tmp_path / 'run')


def test_schedules():
    "Up over the warm-up; then a half wave of a cosine, or nothing, or nothing and a line down over the last fifth"
    recipe = Recipe(steps=100, warmup=10, lr=1.)
    rates = {name: [replace(recipe, schedule=name).rate(k) for k in range(100)]
             for name in ('cosine', 'constant', 'decay')}
    for each in rates.values(): assert each[0] == pytest.approx(.1, rel=1e-3) and each[9] > .97
    assert set(rates['constant'][9:]) == {1.} and set(rates['decay'][9:81]) == {1.}
    assert rates['decay'][81:] == pytest.approx([(100 - k) / 20 for k in range(81, 100)])
    assert rates['cosine'][55] == pytest.approx(.5 * (1 + math.cos(.55 * math.pi)))
    assert replace(recipe, schedule='decay', decay=0.).rate(99) == 1.


def test_key():
    "Where and how it runs is not part of the result"
    recipe = Recipe()
    same = dict(corpus_dir='/x', save_every=3, log_every=3, threads=2, workers=2, device='cpu')
    for name, value in same.items(): assert replace(recipe, **{name: value}).key == recipe.key
    other = dict(model='base', seed=1, lr=1e-3, snr=(0, 1), eval_every=3, init='owner/name',
                 augment=dict(clip=.1))
    assert len({replace(recipe, **{name: value}).key for name, value in other.items()} | {recipe.key}) == 8


def test_key_follows_the_content_of_init(recipe, whole, tmp_path):
    train(recipe, tmp_path / 'again')
    one, other = (replace(recipe, init=str(folder)).key for folder in (whole, tmp_path / 'again'))
    assert one == other == replace(recipe, init=str(whole / 'final')).key
    assert one != recipe.key


def test_tensorboard(recipe, tmp_path):
    recipe = replace(recipe, objective=MAL)
    with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path, tensorboard=True, progress=stop_at(8))
    train(recipe, tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(tmp_path / 'tensorboard'))
    board.Reload()
    assert {'loss', 'terms/base', 'valid/si_sdr', 'health/extra.bottleneck.effective_rank'} <= \
        set(board.Tags()['scalars'])
    assert [event.step for event in board.Scalars('loss')] == list(range(1, 13))


# Several processes

@pytest.mark.slow
def test_side_by_side(recipe, tmp_path):
    recipes = {f'seed {seed}': replace(recipe, seed=seed) for seed in (0, 1)}
    events = []
    ends = train_many(recipes, tmp_path / 'two', 2, progress=lambda *event: events.append(event))
    train(recipes['seed 1'], tmp_path / 'alone')
    assert weights(ends['seed 1']) == weights(tmp_path / 'alone/final')
    assert events[-1] == ('2 of 2 trained', 24, 24)
    recipes['bad'] = replace(recipe, model='huge')
    with pytest.raises(TrainingError, match="bad: model 'huge' is unknown"):
        train_many(recipes, tmp_path / 'two', 2)


def test_a_trunk_ends_where_a_run_of_its_own_would(recipe, tmp_path):
    "Six steps at a constant rate and six that decay, in two folders, are the twelve of one recipe, bit by bit"
    whole = replace(recipe, steps=12, schedule='decay', decay=.5, save_every=6)
    train(whole, tmp_path / 'whole')
    train(replace(whole, steps=6, schedule='constant'), tmp_path / 'trunk')
    late = replace(whole, trunk=str(tmp_path / 'trunk'))
    assert weights(train(late, tmp_path / 'late')) == weights(tmp_path / 'whole/final')
    assert [row['step'] for row in read_log(tmp_path / 'late/log.jsonl')][0] > 6
    assert late.key not in (whole.key, replace(late, trunk=str(tmp_path / 'whole')).key)
    assert late.key == replace(late, trunk=str(tmp_path / 'trunk/checkpoints/step-00000006')).key
    (tmp_path / 'trunk/final').rename(tmp_path / 'trunk/gone')             # as of a run that goes on
    with pytest.raises(CheckpointError, match='is not finished.* copy'): train(late, tmp_path / 'later')


@pytest.mark.parametrize('change, told', [(dict(steps=6), 'has 6 steps behind it'),
                                          (dict(trunk='absent'), 'no checkpoint'),
                                          (dict(schedule='cosine'), 'and not its lr'),
                                          (dict(freeze_encoder=True), 'other weights are trained there'),
                                          (dict(model=dict(preset='tiny', channels=8)), 'another model or objective')])
def test_a_trunk_that_does_not_fit_is_told(recipe, tmp_path, change, told):
    train(replace(recipe, steps=6, save_every=6), tmp_path / 'trunk')
    wrong = replace(recipe, **dict(steps=12, schedule='constant', trunk=str(tmp_path / 'trunk')) | change)
    with pytest.raises((TrainingError, CheckpointError), match=told) as caught: train(wrong, tmp_path / 'late')
    assert '\n' not in str(caught.value)


def test_side_by_side_each_process_sees_a_gpu_of_its_own():
    "The names of the GPUs are made up: a process that sees one of them sees no other, and no two see the same"
    context = multiprocessing.get_context('spawn')
    seen = "(__import__('os').getpid(), __import__('os').environ['CUDA_VISIBLE_DEVICES'], __import__('time').sleep(1))"
    with context.Manager() as manager, _pool(2, ['3', '5', '6'], manager, context) as pool:
        places = dict(job.result()[:2] for job in [pool.submit(eval, seen) for _ in range(6)])
    assert sorted(places.values()) == ['3', '5']


def test_on_gpus_there_are_no_more_processes_than_gpus(recipe, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(several, 'visible_gpus', lambda: ['0', '1', '2'])
    monkeypatch.setattr(several, '_side_by_side', lambda *given: found.append(given[2:4]))
    many = {str(seed): replace(recipe, device='auto', seed=seed) for seed in range(9)}
    train_many(many, tmp_path, workers=8)
    train_many({name: replace(one, device='cpu') for name, one in many.items()}, tmp_path, workers=8)
    assert found == [(3, ['0', '1', '2']), (8, [])]


def test_tasks_of_slurm_that_train_alone_are_told_so_once(recipe, monkeypatch, capsys):
    "Those of srun; a batch script that has been granted several tasks runs once"
    for name, process, told in (('SLURM_NTASKS', '0', 0), ('SLURM_STEP_NUM_TASKS', '0', 1),
                                ('SLURM_STEP_NUM_TASKS', '1', 0)):
        monkeypatch.setenv(name, '8')
        monkeypatch.setenv('SLURM_PROCID', process)
        loop._accelerator(recipe)
        assert capsys.readouterr().err.count('8 tasks') == told


DISTRIBUTED = '''
import json, sys
from speechloss.training import Recipe
from speechloss.training import train
train(Recipe.from_dict(json.loads(sys.argv[1])), sys.argv[2])
'''


@pytest.mark.slow
def test_two_processes_are_one(recipe, tmp_path):
    "Two processes with half the batch each give the weights of one with the whole batch"
    recipe = replace(recipe, steps=5, lr=1e-3)
    train(replace(recipe, batch_size=4), tmp_path / 'one')
    script = tmp_path / 'script.py'
    script.write_text(DISTRIBUTED)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                           str(script), json.dumps(asdict(recipe)), str(tmp_path / 'two')],
                          capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_enhancer(tmp_path / name).state_dict() for name in ('one', 'two'))
    for name in one: assert torch.allclose(one[name], two[name], atol=2e-4), name
    assert [row['step'] for row in read_log(tmp_path / 'two/log.jsonl')] == [1, 2, 3, 4, 5]


def test_state_is_complete(recipe):
    "What `save` gives, `load` takes, and after both the next step is the same"
    def fresh():
        model = model_of(recipe)
        return TrainingState(model, build_objective(MAL, model=model), recipe)

    state = fresh()
    for p in state.trained: p.grad = torch.ones_like(p)
    state.optimizer.step()
    state.average()
    state.objective.epoch_end(state.model)
    tensors, counters = state.save()
    other = fresh()
    other.load(1, tensors, json.loads(json.dumps(counters)))
    again, _ = other.save()
    assert set(again) == set(tensors) and all(again[name].equal(tensors[name]) for name in tensors)


def test_frozen_fe_insists_on_a_frozen_encoder(recipe, tmp_path):
    mal = dict(terms=dict(own=dict(name='model_as_loss', rule='frozen-fe')))
    with pytest.raises(TrainingError, match='set freeze_encoder = true'):
        train(replace(recipe, objective=mal), tmp_path / 'run')
    train(replace(recipe, objective=mal, steps=1, freeze_encoder=True), tmp_path / 'frozen')


def test_other_recordings_are_another_run(recipe, tmp_path):
    train(replace(recipe, steps=1), tmp_path / 'run')
    record = tmp_path / 'run' / 'recipe.json'
    there = json.loads(record.read_text())
    record.write_text(json.dumps(there | dict(corpus_hash='of other recordings')))
    with pytest.raises(TrainingError, match='other recordings'):
        train(replace(recipe, steps=1), tmp_path / 'run')


def test_key_follows_the_content_of_another_encoder(recipe, tmp_path):
    def key(encoder):
        return replace(recipe, objective=dict(terms=dict(
            other=dict(name='model_as_loss', encoder=str(encoder))))).key

    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        torch.manual_seed(seed)
        enhancer('tiny').save_pretrained(tmp_path / name)
    assert key(tmp_path / 'a') == key(tmp_path / 'b') != key(tmp_path / 'c')


def test_two_runs_in_one_folder_wait_for_each_other(recipe, whole, tmp_path):
    command = [sys.executable, '-c', WORKER, json.dumps(asdict(recipe)), str(tmp_path / 'run')]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert [row['step'] for row in read_log(tmp_path / 'run' / 'log.jsonl')] == list(range(1, 13))
    assert weights(tmp_path / 'run' / 'final') == weights(whole / 'final')


def test_key_follows_the_network_of_a_loss(recipe, tmp_path, monkeypatch):
    "Its weights count, also those of the default; where they are drawn anew its shape alone"
    from speechloss.common.weights import SHIPPED
    for name in 'abc':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text('{}' if name != 'c' else '{"depth": 2}')
        (tmp_path / name / 'model.safetensors').write_bytes(name.encode())

    def key(**options): return replace(recipe, objective=dict(terms=dict(a=dict(name='ssl') | options))).key

    places = [str(tmp_path / name) for name in 'abc']
    assert len({key(model=place) for place in places}) == 3
    drawn = [key(model=place, random_seed=1) for place in places]
    assert drawn[0] == drawn[1] != drawn[2]
    assert key() == key(model='small') == key(model=str(SHIPPED['small']))
    monkeypatch.setitem(SHIPPED, 'small', tmp_path / 'a')
    assert key() == key(model=places[0])
    monkeypatch.setenv('HOME', str(tmp_path))
    assert key(model='~/b') == key(model=places[1])
    cards = zip('defg', (.1, .2, .3, .4), ('card.json', 'card.json', 'codec.json', 'vqvae.json'))
    for name, skill, card in cards:       # a network of ours says its skill in its card, two as of earlier versions
        (tmp_path / name).mkdir()
        (tmp_path / name / card).write_text(json.dumps(dict(options=dict(widths=[4]), skill=skill)))
        (tmp_path / name / 'model.safetensors').write_bytes(name.encode())
    d, e = str(tmp_path / 'd'), str(tmp_path / 'e')
    assert key(name='codec', model=d) != key(name='codec', model=e)
    assert len({key(name='codec', model=str(tmp_path / name), random_seed=1) for name in 'defg'}) == 1
    assert key(name='codec') == key(name='codec', model='mp3-16k') == key(name='codec', model=str(SHIPPED['mp3-16k']))
    with pytest.raises(TrainingError, match='model .* holds no model.safetensors'):
        (tmp_path / 'empty').mkdir()
        key(model=str(tmp_path / 'empty'))


KEYS = {     # of recipes whose objective is one term, of key format 1; with others, cached models are trained again
    'si_sdr': '1cd234e8f92ff9366f6eab5f9de216e387fe710fc773d234345dd4a9c1933af4',
    'ssl': '32a32f99fe2ad414d9759c83a9076a85508758f1fb2f37367832be98d5f5c5bc',
    'snr': '12b900d55020a87d2e64ed7be9e7d305153a2edfd0c6bdbc433b6323d4577d31',
    'contrastive': '133289655090ffab9c939e86c7623a3efe379ea6fac4acb3659f4c2ef98d043c',
    'base': 'e5fa9d12fb30beeea7b99b7ce77ac444112d781b9f69f99c19bad0b6df1093da',
}


def one_term(name: str) -> Recipe:
    terms = {'si_sdr': 'si_sdr', 'ssl': dict(name='ssl', layers='later'), 'snr': dict(name='snr', max_db=20.),
             'contrastive': dict(name='contrastive', features='stft'), 'base': deepcopy(BASE)}
    return Recipe(objective=dict(terms=dict(a=terms[name])))


def test_keys_of_today():
    assert {name: one_term(name).key for name in KEYS} == KEYS


@pytest.mark.parametrize('made,option,value,changed', [
    (SISDRLoss, 'zero_mean', False, {'si_sdr'}), (SSLLoss, 'distance', 'l1', {'ssl'}),
    (SNRLoss, 'max_db', 30., {'base'}),                          # where it is given, the default says nothing
    (STFTFeatures, 'kind', 'log', {'contrastive'}), (ContrastiveRegularization, 'clamp', None, {'contrastive'}),
    (Objective, 'reduction', 'sum', set(KEYS))])
def test_a_changed_default_changes_the_key(made, option, value, changed, monkeypatch):
    monkeypatch.setitem(made.__init__.__kwdefaults__, option, value)
    assert {name for name in KEYS if one_term(name).key != KEYS[name]} == changed


def test_first_defaults_know_every_option():
    "A new option goes into the file with the value that leaves the loss as it was"
    first = json.loads((DATA / 'key_defaults.json').read_text())
    for kind, names in dict(losses=CARDS, features=FEATURES).items():
        for name in names: assert default_options(kind, name).keys() <= first[kind][name].keys(), name
    assert default_options('objective').keys() <= first['objective'].keys()
