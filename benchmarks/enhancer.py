"""The enhancer that comes with the package: scores of each test mixture, and how it learnt.

    python -m benchmarks.enhancer scores [--model FOLDER]      test mixtures of desk -> benchmarks/enhancer.csv
    python -m benchmarks.enhancer conditions [--model FOLDER]  babble, rooms -> benchmarks/enhancer_conditions.csv
    python -m benchmarks.enhancer curve RUN [RUN ...]          logs of its trainings -> benchmarks/enhancer_curve.csv
    python -m benchmarks.enhancer recordings FOLDER            DNSMOS of noisy files -> .../enhancer_recordings.csv

The mixtures are those of `benchmarks.yardsticks`. Babble is 48 mixtures at 0 to 15 dB of one half of the test speakers
with three to six of the other half; rooms are 48 in the measured rooms of the test split, with its noises at 5 to 20 dB
and the speech with its early reflections as the clean one. One process, one thread. Means and intervals are drawn from
the rows where they are shown (`nbs/guides/default_enhancer.ipynb`).
"""
import argparse
import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from speechloss.corpora import Manifest, Mixtures, get
from speechloss.metrics import score
from speechloss.models import load_enhancer
from speechloss.signal import load, scan
from speechloss.training import read_log

from .common import ROOT
from .yardsticks import evaluation_set

METRICS = ('pesq', 'estoi', 'stoi', 'si_sdr', 'dnsmos_fast_ovrl')
SCORES, CONDITIONS, CURVE, RECORDINGS = (ROOT / 'benchmarks' / f'enhancer{what}.csv'
                                         for what in ('', '_conditions', '_curve', '_recordings'))
HARDER = 48   # mixtures of each condition


def score_rows(items: list[dict], model: str) -> list[dict]:
    "Return a row for each mixture: what it is, and its scores before and after"
    net, waves = load_enhancer(model), {'noisy': [item['noisy'] for item in items]}
    with torch.inference_mode(): waves['enhanced'] = [net(noisy) for noisy in waves['noisy']]
    pairs = {what: [dict(enhanced=wave, clean=item['clean'], sample_rate=16000) for wave, item in zip(which, items)]
             for what, which in waves.items()}
    names = [metric.removesuffix('_ovrl') for metric in METRICS]
    found = {what: score(which, names, workers=1) for what, which in pairs.items()}
    return [dict(id=item['id'], speaker=item['speaker'], noise=item['noise'], snr=f"{item['snr']:g}")
            | {f'{metric}_{what}': f'{rows[k][metric]:.4f}' for what, rows in found.items() for metric in METRICS}
            for k, item in enumerate(items)]


def condition_rows(model: str) -> Iterator[dict]:
    "Yield a row for each mixture with babble and each in a room"
    manifest = get('desk')
    speech = manifest.speech('test')
    talkers = sorted({r.speaker for r in speech})[::2]    # heard behind the others, not in front
    halves = Manifest([replace(r, split='train') if r.speaker in talkers else r for r in speech])
    babble = Mixtures.grid(halves, 'test', snr=(0, 5, 10, 15), limit=HARDER, extra_noise=['babble'])
    rooms = Mixtures(Manifest([*speech, *manifest.noise('test'), *manifest.rooms('test')]), 'test', seconds=None,
                     snr=[5., 10., 15., 20.], reverb=1., size=HARDER)
    for name, clips in dict(babble=babble, rooms=rooms).items():
        for row in score_rows([clips[k] for k in range(len(clips))], model): yield dict(condition=name) | row


def curve_rows(runs: list[Path]) -> list[dict]:
    "Return a row for each validation of the trainings, in their order; steps count on from one to the next"
    rows, last = [], 0
    for run in runs:
        log = read_log(run / 'log.jsonl')
        # what goes on from a trunk counts its steps already
        before = 0 if json.loads((run / 'recipe.json').read_text(encoding='utf-8'))['recipe'].get('trunk') else last
        rows += [dict(training=run.name, step=before + row['step'], lr=f"{row['lr']:.2g}",
                      si_sdr=f"{row['valid']['si_sdr']:.3f}", gain=f"{row['valid']['gain']:.3f}")
                 for row in log if 'valid' in row]
        last = before + log[-1]['step']
    return rows


def recording_rows(folder: Path, model: str) -> Iterator[dict]:
    "Yield a row for each noisy file: DNSMOS of its first 9 s before and after; there is no clean one"
    net = load_enhancer(model)
    for path in scan(folder):
        wave = load(path, sample_rate=net.sample_rate)[0]
        with torch.inference_mode(): waves = wave, net(wave)
        found = score([dict(enhanced=one, sample_rate=net.sample_rate) for one in waves], ['dnsmos_fast'], workers=1)
        before, after = (row['dnsmos_fast_ovrl'] for row in found)
        yield dict(file=path.name, dnsmos_fast_ovrl_noisy=f'{before:.4f}', dnsmos_fast_ovrl_enhanced=f'{after:.4f}')


def write(path: Path, made: Iterable[dict]) -> None:
    rows = list(made)
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('scores', 'conditions', 'curve', 'recordings'))
    parser.add_argument('runs', nargs='*', type=Path)
    parser.add_argument('--model', default='default')
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == 'scores': write(SCORES, score_rows(evaluation_set('desk')[2], given.model))
    elif given.what == 'conditions': write(CONDITIONS, condition_rows(given.model))
    elif not given.runs: parser.error('name the folders of its trainings, or that of the recordings')
    elif given.what == 'curve': write(CURVE, curve_rows(given.runs))
    else: write(RECORDINGS, recording_rows(given.runs[0], given.model))


if __name__ == '__main__': main()
