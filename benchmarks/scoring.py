"""How fast each metric scores files, and what ten minutes of audio take.

    python -m benchmarks.scoring [METRIC ...] [--files N] [--long]

One process, one thread. Speed: `score` on N real pairs of 4 s (the small corpus, read from wav files), after a first
pair that loads what a metric needs, as CPU time; written to `benchmarks/scoring.csv`. --long: one pair of ten minutes,
each metric in a process of its own, its CPU time and the highest memory that was resident, to
`benchmarks/scoring_long.csv`; DNSMOS takes some minutes of it. Rows of metrics that are not named stay.
"""
import os

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ[name] = '1'                # before numpy is imported

import argparse
import csv
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from speechloss.corpora import Mixtures, get
from speechloss.metrics import METRICS, score, score_one
from speechloss.signal import load, save

from .common import ROOT, machine

SECONDS, LONG, RATE = 4., 600, 16_000
ENOUGH = 5.           # s of CPU time after which no more files are scored, if there were four
SPEED = ('metric', 'files', 'seconds', 'ms_p50', 'files_per_s', 'times_real_time')
MEMORY = ('metric', 'seconds', 'cpu_s', 'peak_mb', 'start_mb', 'refused')
WHERE = ('machine', 'torch', 'speechloss', 'sha', 'date')


def pairs(folder: Path, files: int) -> list[dict]:
    "Write real pairs of 4 s at three SNRs, and return their paths"
    clips = Mixtures.grid(get('mini'), 'train', snr=(0., 5., 10.), seconds=SECONDS, limit=files)
    items = [clips[k] for k in range(min(files, len(clips)))]
    return [dict(enhanced=save(folder / f'{k}-noisy.wav', item['noisy'], RATE),
                 clean=save(folder / f'{k}-clean.wav', item['clean'], RATE)) for k, item in enumerate(items)]


def speed(metric: str, files: list[dict]) -> dict:
    "CPU time of a metric on files that are read, a row of the table"
    score(files[:1], metric, workers=1)
    times = []
    for item in files:
        start = time.process_time()
        row, = score([item], metric, workers=1)
        times.append(time.process_time() - start)
        if row['reasons']: raise SystemExit(f'{metric}: {row["reasons"]}')
        if sum(times) > ENOUGH and len(times) >= 4: break
    rate = len(times) / sum(times)
    return dict(metric=metric, files=len(times), seconds=SECONDS, ms_p50=1e3 * float(np.median(times)),
                files_per_s=rate, times_real_time=rate * SECONDS)


def ten_minutes() -> tuple[torch.Tensor, torch.Tensor]:
    "Enhanced and clean (T,): all speech of the small corpus in a row, from the start again where it ends; babble on it"
    clean = torch.cat([load(recording.path)[0] for recording in get('mini').speech()])
    clean = clean.repeat(-(-LONG * RATE // len(clean)))[:LONG * RATE]
    return clean + .3 * clean.roll(7 * RATE), clean


def peak_mb() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(metric: str) -> dict:
    "CPU time and highest resident memory of ten minutes in this process, a row of the table"
    enhanced, clean = ten_minutes()
    score_one(enhanced[:2 * RATE], clean[:2 * RATE], metric)     # what it loads
    loaded, start = peak_mb(), time.process_time()
    _, reasons = score_one(enhanced, clean, metric)
    return dict(metric=metric, seconds=LONG, cpu_s=time.process_time() - start, peak_mb=peak_mb(), start_mb=loaded,
                refused='; '.join(set(reasons.values())))


def asked(metric: str) -> dict:
    "Return `memory` of a metric from a process of its own"
    run = subprocess.run([sys.executable, '-m', 'benchmarks.scoring', '--memory', metric], cwd=ROOT,
                         capture_output=True, text=True)
    if run.returncode: return dict(metric=metric, seconds=LONG, refused=f'ended with {run.returncode}')
    return json.loads(run.stdout.splitlines()[-1])


def text(value) -> str: return f'{value:.4g}' if isinstance(value, float) else str(value)


def write(table: Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    "Write rows in the order of the metrics, with those of the other metrics that are there"
    where = {name: machine()[old] for name, old in zip(WHERE, ('gpu', *WHERE[1:]))}
    known = {}
    if table.exists():
        with open(table, newline='', encoding='utf-8') as file: known = {r['metric']: r for r in csv.DictReader(file)}
    known |= {row['metric']: row | where for row in rows}
    with open(table, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, (*columns, *WHERE), lineterminator='\n')
        writer.writeheader()
        writer.writerows({c: text(v) for c, v in known[m].items()} for m in METRICS if m in known)


def main() -> None:
    there = [m for m, card in METRICS.items() if all(map(importlib.util.find_spec, card.needs)) and not card.check]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('metrics', nargs='*', default=there)
    parser.add_argument('--files', type=int, default=40)
    parser.add_argument('--long', action='store_true', help='ten minutes in place of many files')
    parser.add_argument('--memory', metavar='METRIC', help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        print(json.dumps(memory(given.memory)))
        return
    if unknown := set(given.metrics) - set(there):
        parser.error(f'no metric {min(unknown)!r} here: choose from {", ".join(there)}')
    if given.files < 1: parser.error('--files must be 1 or more')
    rows, columns = [], MEMORY if given.long else SPEED
    with tempfile.TemporaryDirectory() as folder:
        files = [] if given.long else pairs(Path(folder), given.files)
        for metric in given.metrics:
            rows.append(asked(metric) if given.long else speed(metric, files))
            print('  '.join(f'{name} {text(value)}' for name, value in rows[-1].items()), flush=True)
    write(ROOT / 'benchmarks' / ('scoring_long.csv' if given.long else 'scoring.csv'), rows, columns)


if __name__ == '__main__':
    main()
