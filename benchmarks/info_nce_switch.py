"""Where InfoNCE keeps the matrix of scores, and where it works in tiles: the table behind the rule in the code.

    python -m benchmarks.info_nce_switch THREADS [THREADS ...] [--rows N ...]

Writes `benchmarks/info_nce.csv` anew for these numbers of threads and rows: milliseconds forward and backward,
by rows and dims, of plain torch and of both ways, which take turns, and the errors of their gradients. Points of
more than FLOPS are left out.
"""
import argparse
import csv
import time

import numpy as np
import torch

from speechloss.kernels import info_nce_torch

from .common import ROOT, Contest, errors, machine, ready
from .info_nce import inputs, plain, tiled

ROWS, DIMS = (32, 64, 100, 128, 256, 512, 1024, 2048, 4096, 8192), (16, 64, 128, 256, 512, 768)
#: Most operations of a step of plain torch, and seconds of a contest
FLOPS, SECONDS = 2.1e11, .4
TABLE = ROOT / 'benchmarks' / 'info_nce.csv'


def forced(most: float):
    "InfoNCE with another size of the switch, bytes"
    def loss(q, k):
        kept, info_nce_torch.MATRIX = info_nce_torch.MATRIX, most
        try: return tiled(q, k)
        finally: info_nce_torch.MATRIX = kept
    return loss


PROVIDERS = dict(torch=plain, whole=forced(float('inf')), tiles=forced(0))


def point(rows: int, dims: int) -> dict:
    "The medians of a contest, and the errors of the gradients"
    contest = Contest('info_nce', 'cosine', f'{rows}x{dims}', lambda: inputs(rows, dims), PROVIDERS, plain, gradients=2)
    given, times = ready(contest), {name: [] for name in PROVIDERS}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times['torch']) < 3:
        for name in PROVIDERS:
            start = time.perf_counter()
            contest.step(name, given)
            times[name].append((time.perf_counter() - start) * 1e3)
    row = dict(threads=torch.get_num_threads(), rows=rows, dims=dims, megabytes=4e-6 * rows * rows)
    row |= {f'{name}_ms': float(np.median(each[1:])) for name, each in times.items()}
    wrong = errors(contest) if rows < 4096 else {name: {'grad_err': ''} for name in PROVIDERS}
    row |= {f'{name}_error': wrong[name]['grad_err'] for name in PROVIDERS}
    where = machine()
    return row | dict(machine=where['gpu'], torch=where['torch'], sha=where['sha'], date=where['date'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('threads', nargs='+', type=int)
    parser.add_argument('--rows', nargs='+', type=int, default=ROWS)
    given = parser.parse_args()
    kept = []
    if TABLE.exists():
        with open(TABLE, newline='', encoding='utf-8') as file:
            kept = [row for row in csv.DictReader(file)
                    if int(row['threads']) not in given.threads or int(row['rows']) not in given.rows]
    for threads in given.threads:
        torch.set_num_threads(threads)
        kept += [{k: f'{v:.4g}' if isinstance(v, float) else v for k, v in point(rows, dims).items()}
                 for rows in given.rows for dims in DIMS if 6. * rows * rows * dims <= FLOPS]
    with open(TABLE, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(kept[0]))
        writer.writeheader()
        writer.writerows(sorted(kept, key=lambda row: [int(row[key]) for key in ('threads', 'rows', 'dims')]))


if __name__ == '__main__':
    main()
