"""The shared protocol: what is shared is shared, what is cached is computed once."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.corpora import Manifest, Recording
from speechloss.metrics import difference
from speechloss.metrics.stats import score_array
from speechloss.models import enhancer
from speechloss.reproduce import protocol
from speechloss.reproduce import (
    iterate_model, score_model, arm_recipe, protocol_of, shared_recipe, Run, load_results)
from speechloss.reproduce.judging import number_text
from speechloss.reproduce.evaluation import compute_once, iterate, read_cache
from speechloss.reproduce.protocol import model_folder
from speechloss.signal import save
from speechloss.training import Recipe


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SPEECHLOSS_HOME', str(tmp_path))
    return tmp_path


@pytest.fixture
def clips():
    torch.manual_seed(0)
    tone = .3 * torch.sin(torch.arange(16000) * .2)
    return [dict(noisy=tone + s * torch.randn(16000), clean=tone, speaker=str(k), id=str(k), snr=0.,
                 noise='n', index=k) for k, s in enumerate((.01, .1, .3))]


def saved(recipe: Recipe):
    "A model in the place of a trained one"
    folder = model_folder(recipe)
    enhancer('small').save_pretrained(folder)
    return folder


def test_a_reader_of_the_cache_writes_nothing(cache):
    with pytest.raises(SpeechLossError, match='is gone'): read_cache('judged', 'key')
    assert not list(cache.rglob('*'))
    assert compute_once('judged', 'key', lambda: [1]) == [1] == read_cache('judged', 'key')[0:1]


def test_stage_one_is_one_for_all(cache):
    here, there = (protocol_of('laptop', corpus_dir=d) for d in ('a', 'b'))
    assert shared_recipe(here, 0).key == shared_recipe(there, 0).key
    assert shared_recipe(here, 0).key != shared_recipe(here, 1).key


def test_arms_start_from_stage_one_and_differ_in_the_loss_alone(cache):
    protocol = protocol_of('laptop')
    start = saved(shared_recipe(protocol, 0))
    base, more = arm_recipe(protocol, 0), arm_recipe(protocol, 0, 'mel', ratio=.3)
    changed = {f for f in base.__dataclass_fields__ if getattr(base, f) != getattr(more, f)}
    assert changed == {'objective'} and base.init == str(start)
    assert more.objective['weights'] == {'extra': .3} and more.objective['balance'] == 'grad'
    assert base.steps_per_epoch * protocol.epochs == base.steps
    assert len({arm_recipe(protocol, 0, t).key for t in (None, 'mel', 'snr')}) == 3
    assert arm_recipe(protocol, 0, 'mel', alone=True).objective == {'terms': {'extra': 'mel'}}


def test_trainings_in_the_cache_count_in_what_a_study_took(cache, monkeypatch):
    monkeypatch.setattr(protocol, 'train_many', lambda *a, **k: None)
    monkeypatch.setattr(protocol, '_asked', {})
    recipes = {str(s): shared_recipe(protocol_of('smoke'), s) for s in (0, 1)}
    for recipe, clock in zip(recipes.values(), ([1, 5, 2, 3], [7])):     # stopped after 5 s and started again; whole
        folder = protocol.training_folder(recipe)
        folder.mkdir(parents=True)
        rows = [json.dumps(dict(step=k, seconds=s)) for k, s in enumerate(clock)]
        (folder / 'log.jsonl').write_text("\n".join(rows))
    protocol.train_all(recipes)
    protocol.train_all(recipes)
    assert protocol.training_seconds() == 5 + 3 + 7


def test_unknown_scale_names_the_choices():
    with pytest.raises(SpeechLossError, match='smoke, laptop, paper'):
        protocol_of('enormous')


def test_cache_computes_once_and_survives_a_failure(cache):
    calls = []

    def compute():
        calls.append(1)
        if len(calls) == 1: raise RuntimeError('power cut')
        return [dict(a=1.)]

    with pytest.raises(RuntimeError): compute_once('kind', 'key', compute)
    assert [compute_once('kind', 'key', compute) for _ in range(3)] == [[dict(a=1.)]] * 3
    assert len(calls) == 2 and not list((cache / 'kind').glob('*.json.*'))


def test_scores_are_those_of_the_clips(cache, clips):
    rows = score_model(None, clips, metrics=('si_sdr', 'lsd'))
    expected = [10 * np.log10((c['clean'] ** 2).sum() / ((c['noisy'] - c['clean']) ** 2).sum()) for c in clips]
    assert np.allclose([r['si_sdr'] for r in rows], expected, atol=.2)
    assert [r['speaker'] for r in rows] == ['0', '1', '2']
    file, = (cache / 'scores').glob('*.json')
    assert json.loads(file.read_text()) == rows
    other = [c | dict(noisy=c['noisy'] / 2) for c in clips]
    score_model(None, other, metrics=('si_sdr', 'lsd'))
    assert len(list((cache / 'scores').glob('*.json'))) == 2


def test_iteration_is_the_model_applied_again(cache, clips):
    model = enhancer('small').eval()
    noisy = torch.stack([c['noisy'] for c in clips])
    with torch.no_grad():
        once = model(noisy); twice = model(once)
    kept = iterate(model, noisy, (1, 2))
    assert torch.equal(kept[1][0], once) and torch.equal(kept[2][0], twice)
    assert kept[1][1].allclose((twice - once).norm(dim=-1) / once.norm(dim=-1))


def test_iterated_rows_know_their_pass(cache, clips):
    folder = saved(Recipe())
    rows = iterate_model(folder, clips, (1, 3))
    assert [(r['pass'], r['id']) for r in rows] == [(k, str(i)) for k in (1, 3) for i in range(3)]
    assert {'si_sdr', 'estoi', 'lsd', 'drift', 'speech_kept'} <= set(rows[0])


def test_difference_is_paired(clips):
    a = np.array([[1., 2., 3.], [3., 4., 5.]])
    gap = difference(a + 1, a, clips)
    assert (gap.mean, gap.low, gap.high, gap.n) == (1, 1, 1, 3)


@given(st.lists(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=6, max_size=6), min_size=1, max_size=4),
       st.sampled_from(['number', 'noisy', 'each']))
def test_the_interval_is_over_the_mean_of_the_seeds(values, against):
    a = np.array(values)
    a[:, 0] = 1.                # one clip that counts
    b = dict(number=.5, noisy=np.arange(6.)[None], each=a[::-1] / 2 + .1)[against]
    gap = difference(a, b, [dict(speaker=str(k // 2)) for k in range(6)])
    assert len(gap.by_seed) == len(a) and np.mean(gap.by_seed) == pytest.approx(gap.mean)
    counted = ~np.isnan(a - b).any(0)
    assert gap.n == counted.sum() and gap.dropped == 6 - gap.n
    assert gap.by_seed == pytest.approx((a - b)[:, counted].mean(1))


def test_a_number_recorded_from_seeds_keeps_them(tmp_path):
    "From (seeds, clips) to results.json and to the sentence that people read"
    clips = [dict(speaker=str(k)) for k in range(5)]
    a = np.arange(15.).reshape(3, 5)
    run = Run('p', scale='laptop', out=tmp_path, corpus='mini')
    run.record('a-b', difference(a, np.zeros(5), clips), seeds=range(3), unit='dB')
    run.record('a-other', difference(a, a[:2], clips), seeds=range(3))
    run.table('arms', [dict(arm='a', gap=difference(a, 0., clips))])
    run.finish()
    results = load_results(run.folder)
    assert results['numbers']['a-b']['by_seed'] == [2., 7., 12.]
    assert results['numbers']['a-other']['by_seed'] == []
    assert results['tables']['arms'][0]['gap']['by_seed'] == [2., 7., 12.]
    assert number_text('a-b', results['numbers']['a-b']).endswith('dB, n = 5, seeds +2 to +12')
    assert 'seeds' not in number_text('a-other', results['numbers']['a-other'])


def test_a_metric_that_failed_is_nan():
    runs = [[dict(pesq=1.), dict(pesq=None)]]
    assert np.isnan(score_array(runs, 'pesq')[0, 1])


@pytest.mark.parametrize('ratios', [(2., 7., 12.5, 30.), (0., 0., 0., 0.)])
def test_clips_of_real_pairs_stand_for_one_level_each(tmp_path, ratios):
    """Papers ask level by level, and by nominal ratios; a pair has the one that it has."""
    draw, rows = torch.Generator().manual_seed(0), []
    for k, ratio in enumerate(ratios):
        clean, noise = torch.randn(2, 16000, generator=draw) * .05
        noise = noise * (clean.square().mean() / noise.square().mean()).sqrt() * 10 ** (-ratio / 20)
        save(tmp_path / f'c{k}.wav', clean, 16000, subtype='FLOAT')
        save(tmp_path / f'n{k}.wav', clean + noise, 16000, subtype='FLOAT')
        rows.append(Recording(f'{k}', str(tmp_path / f'n{k}.wav'), 'pair', 'test', f's{k}', 16000, 16000, f'{k}',
                              clean_path=str(tmp_path / f'c{k}.wav')))
    shared, corpus = protocol_of('smoke'), Manifest(rows)
    whole = protocol.test_clips(shared, corpus)
    by_level = [c for snr in shared.test_snr for c in protocol.test_clips(replace(shared, test_snr=(snr,)), corpus)]
    assert sorted(c['id'] for c in whole) == sorted(c['id'] for c in by_level) == ['0', '1', '2', '3']
    assert {c['snr'] for c in whole} <= {*shared.test_snr}
    measured = {c['id']: c['measured_snr'] for c in whole}
    assert all(abs(measured[str(k)] - ratio) < .1 for k, ratio in enumerate(ratios))
