"""Trials of losses: they go on where they were stopped, clips do not feel each other, errors are sentences."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import waves

from speechloss.cli.app import app
from speechloss.common.errors import SpeechLossError
from speechloss.losses import Loss, build
from speechloss.metrics import paired_interval
from speechloss.trials import (
    CANDIDATES, Candidate, Scorer, optimise, phase_sensitive, run_trials, trial_clips, trial_table)
from speechloss.trials import experiment, listeners
from speechloss.trials.masks import BandMask
from speechloss.trials.optimise import convergence
from speechloss.trials.page import Judged, leaderboard_rows

FIVE_LINES = '''from speechloss.losses import Loss
class Loudness(Loss):
    "Compares levels"
    def values(self, waves):
        return dict(level=(waves.enhanced.square().mean(-1) - waves.clean.square().mean(-1)).square())
'''


def clips(count=3, samples=6000):
    "Clips as `trial_clips` makes them, of synthetic voices"
    _, clean, noisy = waves(count, samples)
    return [dict(id=f'c{k}', speaker=f's{k % 2}', snr=0., noisy=noisy[k], clean=clean[k]) for k in range(count)]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    "Ten steps in place of 200"
    monkeypatch.setattr(experiment, 'optimise', lambda *given, **options: optimise(*given, **dict(steps=10) | options))
    monkeypatch.setattr(experiment, 'convergence',
                        lambda *given, **options: convergence(*given, **dict(steps=10) | options))


def test_clips_do_not_feel_each_other():
    "Together, alone, and at a thousandth of the loss: the same gains"
    _, clean, noisy = waves(3, 4000)
    loss = build('compressed_complex')
    together = optimise(loss, noisy, clean, steps=10)
    alone = [optimise(loss, n[None], c[None], steps=10) for n, c in zip(noisy, clean)]
    torch.testing.assert_close(together.gains, torch.cat([a.gains for a in alone]), atol=2e-3, rtol=0)
    assert (together.end < together.start).all()


def test_mask_finds_the_gain_of_least_squares():
    "Where the optimum is known, the optimised mask comes near: SNR of the phase-sensitive mask"
    _, clean, noisy = waves(2, 12000)
    found, mask = optimise(build('wave_l2'), noisy, clean, steps=100), BandMask(noisy)
    error, oracle = ((w - clean).square().mean(-1) for w in (found.waves, mask.apply(phase_sensitive(mask, clean))))
    assert (error < 1.05 * oracle).all()


class Counted(Loss):
    "Squared error that counts its calls"
    calls = 0

    def values(self, given):
        Counted.calls += 1
        return dict(l2=(given.enhanced - given.clean).square().mean(-1))


def test_trials_go_on_where_they_were_stopped(tmp_path):
    scorer = Scorer(['si_sdr', 'lsd'])
    candidate = Candidate('counted', dict(name='test_trials:Counted'))
    there = clips()
    first = run_trials([candidate], there[:2], tmp_path, scorer=scorer)
    made = Counted.calls
    assert made > 30 and {row['loss'] for row in first} == {*experiment.REFERENCES, 'counted'}
    assert run_trials([candidate], there[:2], tmp_path, scorer=scorer) == first and Counted.calls == made
    journal = tmp_path / 'journal.jsonl'
    journal.write_bytes(journal.read_bytes()[:-30])          # a kill in the middle of a line
    again = run_trials([candidate], there[:2], tmp_path, scorer=scorer)
    assert Counted.calls > made and len(again) == len(first)
    made = Counted.calls
    more = run_trials([candidate], there[:2], tmp_path, scorer=Scorer(['si_sdr', 'lsd', 'estoi']))
    assert Counted.calls == made and all('estoi' in row for row in more)      # a further judge needs no optimisation
    assert len(run_trials([candidate], there, tmp_path, scorer=scorer)) == len(first) * 3 // 2
    with pytest.raises(SpeechLossError, match='another job'):
        run_trials([candidate], there, tmp_path, corpus_hash='other', scorer=scorer)


def test_table(tmp_path):
    rows = run_trials([Candidate('l2', dict(name='wave_l2'))], clips(), tmp_path, scorer=Scorer(['si_sdr']))
    table = {row['loss']: row for row in trial_table(rows)}
    assert table['noisy']['gain'] == 0 and table['clean']['mean'] == 100
    assert table['l2']['low'] <= table['l2']['gain'] <= table['l2']['high'] and table['l2']['gain'] > 0
    assert table['l2']['checked'] == 3 and 0 <= table['l2']['converged'] <= 1 and table['l2']['speakers'] == 2


def test_loss_that_fails_is_a_row(tmp_path):
    broken = Candidate('broken', dict(name='stft', n_fft=1 << 20))      # longer than a clip
    rows = run_trials([broken, CANDIDATES['wave_l1']], clips(2), tmp_path, scorer=Scorer(['si_sdr']), check=False)
    assert all('error' in row for row in rows if row['loss'] == 'broken')
    assert all('si_sdr' in row for row in rows if row['loss'] == 'wave_l1')


def test_command_on_a_loss_of_five_lines(tmp_path, monkeypatch):
    "A file outside the package, from the folder where it lies, on the small corpus"
    from typer.testing import CliRunner
    (tmp_path / 'five_lines.py').write_text(FIVE_LINES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('speechloss.trials.scores.Scorer._is_there', staticmethod(lambda name, _: name == 'lsd'))
    done = CliRunner().invoke(app, ['judge', 'five_lines:Loudness', '--corpus', 'mini', '--clips', '2', '--no-check',
                                    '--out', 'trials', '--json'])
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout[done.stdout.index('['):])
    assert {row['loss'] for row in table} == {*experiment.REFERENCES, 'five_lines:Loudness'}
    assert 'a minute of one core' in done.stderr and (tmp_path / 'trials/table.csv').is_file()


def test_clips_begin_with_the_fewer():
    from speechloss.corpora import get
    few, many = (trial_clips(get('mini'), n, seconds=1.) for n in (2, 4))
    assert [c['id'] for c in few] == [c['id'] for c in many][:2] and all(c['clean'].shape == (16000,) for c in many)


def test_listening_test(tmp_path, monkeypatch):
    "A folder of rated stimuli: louder noise, lower rating; a loss that is its size agrees with everybody"
    import soundfile
    lines, draw = ['signal,condition,ratings,participant_ids,file'], np.random.default_rng(0)
    for s in range(3):
        folder = tmp_path / f'stim_{s}'
        folder.mkdir()
        reference = draw.normal(size=4000) / 10
        soundfile.write(folder / 'ref.flac', reference, 16000)
        for c, db in enumerate((-30, -20, -10)):
            noise = 10 ** (db / 20) * draw.normal(size=4000) / 10
            soundfile.write(folder / f'c{c}.flac', reference + noise, 16000)
            lines.append(f'{s},c{c},"[{90 - 30 * c}, {80 - 30 * c}]","[1, 2]",stim_{s}/c{c}.wav')
        lines.append(f'{s},Reference,"[100, 100]","[1, 2]",stim_{s}/ref.wav')
    (tmp_path / 'ratings_formated_filtered.csv').write_text('\n'.join(lines))
    rows = listeners.compare_with_listeners(tmp_path, ['wave_l2', 'torch.nn:L1Loss'])
    assert all(row['by_stimulus'] > .9 and row['within_sentence'] == row['by_codec'] == 1 for row in rows)
    both = listeners.compare_with_listeners(tmp_path, ['si_sdr'], metrics=['si_sdr'])   # of one name
    assert sorted((row['name'], row['kind']) for row in both) == [('si_sdr', 'loss'), ('si_sdr', 'metric')]
    told = [dict(row, by_stimulus=.5 if row['kind'] == 'loss' else -1.) for row in both]
    (found,) = leaderboard_rows(Judged(costs=dict(si_sdr=dict(ms=1., mb=1.)), listeners=told))
    assert found['by_stimulus'] == .5
    with pytest.raises(SpeechLossError, match='holds no ratings'): listeners.rated_stimuli(tmp_path / 'stim_0')


def test_key_follows_the_enhancer_where_there_is_one():
    one = CANDIDATES['snr']
    through = replace(one, needs_model=True)
    assert one.key('a') == one.key('b') and through.key('a') != through.key('b')


def test_table_takes_noises_as_random_and_means_over_clips_that_both_have():
    rng = np.random.default_rng(0)
    noisy = [dict(loss='noisy', id=f'c{k}', speaker=f's{k % 12}', noise=f'n{k // 12}', snr=0, pesq=float(rng.normal()))
             for k in range(36)]
    own = [row | dict(loss='a', pesq=row['pesq'] + k // 12 + float(rng.normal()) / 9) for k, row in enumerate(noisy)]
    own[5] = {k: v for k, v in own[5].items() if k != 'pesq'}
    row = next(row for row in trial_table([*noisy, *own]) if row['loss'] == 'a')
    kept = [k for k in range(36) if k != 5]
    a, b = (np.array([rows[k]['pesq'] for k in kept]) for rows in (own, noisy))
    who, noise = ([noisy[k][name] for k in kept] for name in ('speaker', 'noise'))
    wanted, alone = paired_interval(a, b, cluster=who, noise=noise), paired_interval(a, b, cluster=who)
    assert row['mean'] == pytest.approx(a.mean()) and row['gain'] == pytest.approx((a - b).mean())
    assert row['low'] == pytest.approx(wanted.low) and wanted.high - wanted.low > 2 * (alone.high - alone.low)
