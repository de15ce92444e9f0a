"""Run benchmarks and append their rows to the table.

    python -m benchmarks.run [stft|contrastive|info_nce|nearest_code|ssl|codec|vq|ccr ...]
                             [--repeats N] [--threads N] [--dry | --own]

The table, `benchmarks/rows.csv`, is append-only, and pages are drawn from it; --dry prints and leaves it alone, --own
(`make bench`) appends to `benchmarks/own_rows.csv`, which git ignores.
"""
import argparse
import csv
import json
from importlib import import_module
from pathlib import Path

import torch

from .common import COLUMNS, ROOT, measure, own_peak

MODULES = ('stft', 'contrastive', 'info_nce', 'nearest_code', 'ssl', 'codec', 'vq', 'ccr')
TABLE = ROOT / 'benchmarks' / 'rows.csv'
OWN_TABLE = TABLE.with_name('own_rows.csv')   # of a user's machine, beside the pages' one


def append(rows: list[dict], table: Path = TABLE) -> None:
    new = not table.exists()
    with open(table, 'a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new: writer.writeheader()
        writer.writerows({k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def show(rows: list[dict]) -> None:
    first = {}
    for row in rows:
        base = first.setdefault((row['op'], row['config'], row['shape'], row['mode']), row)
        print(f"{row['op']:14} {row['config']:34} {row['shape']:22} {row['provider']:20} {row['mode']:5}"
              f"{row['ms_p50']:10.1f} ms  x{base['ms_p50'] / row['ms_p50']:<6.2f} peak {row['peak_mb']:8.1f} MB  "
              f"saved {row['saved_mb'] or 0:8.2f} MB  grad err {row['grad_err'] or float('nan'):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('modules', nargs='*', default=MODULES)
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--dry', action='store_true')
    parser.add_argument('--own', action='store_true')
    parser.add_argument('--peak', nargs=3, metavar=('MODULE', 'INDEX', 'PROVIDER'), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.modules) - set(MODULES):
        parser.error(f'no benchmark {min(unknown)!r}: choose from {", ".join(MODULES)}')
    if given.repeats < 1 or given.threads < 1: parser.error('--repeats and --threads must be 1 or more')
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.peak:
        module, index, provider = given.peak
        print(json.dumps(own_peak(import_module(f'benchmarks.{module}').contests()[int(index)], provider)))
        return
    for module in given.modules:
        rows = measure(module, given.repeats)
        show(rows)
        if not given.dry: append(rows, OWN_TABLE if given.own else TABLE)


if __name__ == '__main__':
    main()
