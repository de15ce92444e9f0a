"""Tables of the guide about what losses want, from trials that are there, and from gradients and a listening test.

    python -m benchmarks.wants [--judged FOLDER] [--gradients CORPUS] [--listeners FOLDER] [--pleased CORPUS]
        [--model FOLDER]

--judged: folder of `speechloss judge --all --out FOLDER`; its rows become benchmarks/wants.csv (means and gains) and
    benchmarks/wants_clips.csv.gz (each loss and clip).
--gradients: cosines between the gradients of all losses at the noisy clips of a corpus, in benchmarks/gradients.csv,
    and the shares of their energy by frequency in benchmarks/gradient_bands.csv.
--listeners: rank correlations of losses and metrics with a listening test, in benchmarks/listeners.csv.
--pleased: what masks become that please DistillMOS on two clips of a corpus, in forty steps, in
    benchmarks/opinion_masks.csv; half an hour of one core at most.
--model: a trained enhancer, for losses that look through one.

One thread. What is not asked for stays as it is.
"""
import os

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(name, '1')      # before numpy is imported

import argparse
import gzip
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from speechloss.common.errors import SpeechLossError
from speechloss.common.tables import write_table
from speechloss.corpora import get
from speechloss.models import load_enhancer
from speechloss.trials import (
    CANDIDATES, JUDGES, Candidate, Scorer, compare_with_listeners, gradient_bands, gradient_cosines, optimise,
    trial_clips, trial_table, wave_gradient)
from speechloss.trials.experiment import rows_of

from .common import ROOT

FOLDER = ROOT / 'benchmarks'
CLIPS = 20    # on which gradients are compared
OUTSIDE = [Candidate('envelope', dict(name='benchmarks.envelope:Envelope')),      # compared with listeners too
           Candidate('envelope, floor 1e-3', dict(name='benchmarks.envelope:Envelope', floor=1e-3))]
OPINIONS = [Candidate(f'{label}{mark}', dict(name=f'benchmarks.opinion:{kind}', **seed))    # with DistillMOS
            for label, kind in (('opinion', 'Opinion'), ('opinion distance', 'OpinionDistance'))
            for mark, seed in (('', {}), (', random', dict(random_seed=0)))]


def short(row: dict) -> dict:
    "Round what is not exact anyway"
    return {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()}


def write_judged(folder: Path) -> None:
    rows = rows_of(folder)
    write_table([short(row) for row in trial_table(rows)], FOLDER / 'wants.csv')
    table = write_table([short(row) for row in rows], FOLDER / 'wants_clips.csv')
    with open(table, 'rb') as file, open(f'{table}.gz', 'wb') as packed:
        with gzip.GzipFile('', 'wb', fileobj=packed, mtime=0) as out: out.write(file.read())    # without a date
    table.unlink()


def write_gradients(corpus: str, model) -> None:
    clips = trial_clips(get(corpus), CLIPS)
    noisy, clean = (torch.stack([clip[name] for clip in clips]) for name in ('noisy', 'clean'))
    gradients = {}
    for name, one in CANDIDATES.items():
        if one.earlier: continue      # the step of `contrastive` from this very point
        try: gradients[name] = wave_gradient(one.make(model), noisy, clean)
        except SpeechLossError as error: print(f'{name} is left out: {error}', file=sys.stderr)
        else: print(name, flush=True)
    write_table([short(row) for row in gradient_cosines(gradients, [clip['snr'] for clip in clips])],
                FOLDER / 'gradients.csv')
    write_table([short(row) for row in gradient_bands(gradients)], FOLDER / 'gradient_bands.csv')


def write_pleased(corpus: str) -> None:
    clips = trial_clips(get(corpus), 2)
    noisy, clean = (torch.stack([clip[name] for clip in clips]) for name in ('noisy', 'clean'))
    masked = optimise(OPINIONS[0].make(), noisy, clean, steps=40).waves
    scorer = Scorer([name for name in JUDGES if name != 'wer'])
    heard = dict(noisy=noisy, clean=clean, opinion=masked)
    write_table([dict(wave=name, id=clip['id']) | short(row) for name, waves in heard.items()
                 for clip, row in zip(clips, scorer(waves, clean, scorer.names))], FOLDER / 'opinion_masks.csv')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--judged', type=Path, metavar='FOLDER')
    parser.add_argument('--gradients', metavar='CORPUS')
    parser.add_argument('--listeners', type=Path, metavar='FOLDER')
    parser.add_argument('--pleased', metavar='CORPUS')
    parser.add_argument('--model', type=Path, metavar='FOLDER')
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_enhancer(given.model).eval() if given.model else None
    try:
        if given.judged: write_judged(given.judged)
        if given.gradients: write_gradients(given.gradients, model)
        if given.pleased: write_pleased(given.pleased)
        if given.listeners:
            rows = compare_with_listeners(given.listeners, model=model,
                                          progress=lambda name, done, total: print(name, flush=True))
            rows += compare_with_listeners(given.listeners, OUTSIDE + (OPINIONS if find_spec('distillmos') else []))
            rows.sort(key=lambda row: -row['by_stimulus'])
            write_table([short(row) for row in rows], FOLDER / 'listeners.csv')
    except SpeechLossError as error:
        raise SystemExit(f'wants: {error}') from None


if __name__ == '__main__':
    main()
