"""Scoring against everything that goes wrong in a batch."""
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import METRICS, files, jobs_of, score, scoring
from speechloss.metrics.cards import Metric
from speechloss.signal import save

RATE = 16_000
RNG = np.random.default_rng(0)
CLEAN = .1 * RNG.standard_normal(2 * RATE) * np.sin(np.arange(2 * RATE) / 2500) ** 2
NOISY = CLEAN + .03 * RNG.standard_normal(2 * RATE)


def pair(**more): return dict(enhanced=NOISY, clean=CLEAN, sample_rate=RATE, **more)


class Bomb:
    "Kills the process that unpickles it, as the system does when memory runs out"
    def __reduce__(self): return signal.raise_signal, (signal.SIGKILL,)


def test_a_pool_gives_ordered_rows_and_survives_its_killers(tmp_path):
    for name, wave in (('e', NOISY), ('c', CLEAN)):
        save(tmp_path / f'{name}.wav', torch.from_numpy(wave).float(), RATE)
    (tmp_path / 'cut.wav').write_bytes((tmp_path / 'e.wav').read_bytes()[:20])
    items = [pair(id=0, speaker='a', noisy=torch.zeros(3)),
             dict(id=1, enhanced=torch.from_numpy(NOISY), clean=torch.from_numpy(CLEAN)),
             dict(id=2, enhanced=tmp_path / 'e.wav', clean=str(tmp_path / 'c.wav')),
             dict(id=3, enhanced=tmp_path / 'cut.wav', clean=CLEAN, sample_rate=RATE),
             dict(id=4, enhanced=Bomb(), clean=CLEAN, sample_rate=RATE),
             dict(id=5, enhanced=NOISY, clean=CLEAN, sample_rate=lambda: 0),   # does not pickle
             *(pair(id=k) for k in range(6, 16))]
    seen, threads = [], os.environ.get('OMP_NUM_THREADS')
    rows = score(iter(items), ['si_sdr', 'lsd'], workers=2, progress=lambda *event: seen.append(event))
    assert [r['id'] for r in rows] == list(range(16))
    assert seen == [('scoring', k + 1, None) for k in range(16)]
    assert os.environ.get('OMP_NUM_THREADS') == threads
    bad = {3: 'cut.wav', 4: 'died', 5: 'ickle'}
    for row in rows:
        if row['id'] in bad:
            assert math.isnan(row['lsd']) and bad[row['id']] in row['reasons']['lsd'], row
        else:
            assert row['reasons'] == {}
            assert row['si_sdr'] == pytest.approx(rows[0]['si_sdr'], abs=1e-2)
    assert set(rows[0]) == {'id', 'speaker', 'sample_rate', 'si_sdr', 'lsd', 'reasons'}


def test_a_handful_is_no_worse_off_for_one_of_its_items():
    "Cheap items go to a process many at once; what kills it or cannot be handed over is still one row"
    wrong = {120: dict(enhanced=Bomb(), clean=CLEAN, sample_rate=RATE),
             150: dict(enhanced=NOISY, clean=CLEAN, sample_rate=lambda: 0),
             155: dict(enhanced=NOISY * math.nan, clean=CLEAN, sample_rate=RATE)}
    rows = score([wrong.get(k) or pair() for k in range(200)], 'si_sdr', workers=2)
    assert [k for k, row in enumerate(rows) if row['reasons']] == [*wrong]
    assert {row['si_sdr'] for row in rows if not row['reasons']} == {score([pair()], 'si_sdr')[0]['si_sdr']}
    for k, words in (120, 'died'), (150, 'ickle'), (155, 'NaN'): assert words in rows[k]['reasons']['si_sdr']


def crash(enhanced, sample_rate: int) -> float:
    "End the process that this runs in, as a fault in a library does, where a wave begins with 1"
    if float(enhanced[0]) == 1: os.kill(os.getpid(), signal.SIGSEGV)
    return 1.


def test_a_crash_costs_the_row_the_metric_that_crashed_alone(tmp_path, monkeypatch):
    """Of any metric that runs code of others, whatever the number of files; the process that asks lives on."""
    monkeypatch.setitem(METRICS, 'crash', Metric('crash', ('crash',), crash, (0, 1), 'higher', '', 'here',
                                                 reference=False, needs=('json',)))
    for name, first in (('a', 0.), ('b', 1.)):
        wave = torch.from_numpy(NOISY).float()
        wave[0] = first
        save(tmp_path / f'e/{name}.wav', wave, RATE, subtype='FLOAT')
        save(tmp_path / f'c/{name}.wav', torch.from_numpy(CLEAN).float(), RATE)
    good, bad = files.score_files(jobs_of([tmp_path / 'e'], tmp_path / 'c'), ['lsd', 'crash', 'si_sdr'], apart=True)
    assert good['error'] is None and good['crash'] == 1 and bad['crash'] is None
    assert bad['lsd'] == pytest.approx(good['lsd'], abs=.1) and bad['si_sdr'] is not None
    assert bad['error'].startswith('crash: crash ended the process that scored this item') and 'in json' in bad['error']


def test_slow_items_go_one_by_one_and_cheap_ones_by_handfuls():
    class Pool:
        def __init__(self, seconds): self.seconds, self.handed = seconds, []
        def submit(self, work, parcels, names):
            self.handed.append(len(parcels))
            (future := Future()).set_result(([({}, {})] * len(parcels), self.seconds * len(parcels)))
            return future

    for seconds, most in (1., 1), (.02, 2), (.001, 16):
        pool, waiting = Pool(seconds), {}
        found = [*scoring._run_until_broken(pool, enumerate([{}] * 100), waiting, ['lsd'], [], 8)]
        assert sorted(k for k, _ in found) == [*range(100)] and not waiting
        assert max(pool.handed) == most and pool.handed[:8] == [1] * 8 and sum(pool.handed) == 100


def test_one_process_is_one_thread_but_for_what_makes_the_pairs(monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(scoring, '_score_parcel', lambda *a: seen.append(torch.get_num_threads()) or ({'lsd': 0.}, {}))
    torch.set_num_threads(2)
    try:
        def pairs():
            for _ in range(3):
                seen.append(torch.get_num_threads())
                yield pair()
        score(pairs(), 'lsd', workers=1)
        assert seen == [2, 1] * 3 and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_the_largest_files_come_first_and_rows_stay_in_order(tmp_path, monkeypatch):
    sizes, asked = (1000, 3000, 2000, 3000), []
    for k, size in enumerate(sizes): save(tmp_path / f'{k}.wav', torch.from_numpy(NOISY[:size + RATE]).float(), RATE)
    whole = files.iterate_scores
    monkeypatch.setattr(files, 'iterate_scores', lambda pairs, *a, **o: asked.extend(pairs) or whole(pairs, *a, **o))
    rows = files.score_files(jobs_of([tmp_path]), ['vqscore'], workers=1)
    assert [pair['enhanced'].stem for pair in asked] == ['1', '3', '2', '0']
    assert [row['seconds'] for row in rows] == [round((size + RATE) / RATE, 3) for size in sizes]


def test_a_script_without_a_main_guard_still_gets_its_rows(tmp_path):
    script = tmp_path / 'plain.py'
    script.write_text('import numpy as np\n'
                      'from speechloss.metrics.scoring import score\n'
                      'w = np.random.default_rng(0).standard_normal(16000)\n'
                      'pair = dict(enhanced=w, clean=w, sample_rate=16000)\n'
                      'rows = score([pair] * 3, "lsd", workers=2)\n'
                      'print("rows", len(rows), rows[2]["lsd"])\n')
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == 'rows 3 0.0\n', done.stderr
    assert "__name__ == '__main__'" in done.stderr


def test_nothing_and_nonsense():
    assert score([], 'lsd') == []
    with pytest.raises(SpeechLossError, match='workers is 0'): score([pair()], 'lsd', workers=0)
    with pytest.raises(SpeechLossError, match="'psq' is unknown"): score([pair()], 'psq')
    rows = score([dict(clean=CLEAN), dict(enhanced=NOISY, clean=CLEAN, sample_rate='16k')], 'lsd')
    assert "no 'enhanced'" in rows[0]['reasons']['lsd']
    assert "'16k'" in rows[1]['reasons']['lsd']


def test_rates_that_disagree(tmp_path):
    save(tmp_path / 'e.wav', torch.from_numpy(NOISY).float(), 8000)
    row, = score([dict(enhanced=tmp_path / 'e.wav', clean=CLEAN, sample_rate=RATE)], 'lsd')
    assert '[8000, 16000] Hz' in row['reasons']['lsd']
