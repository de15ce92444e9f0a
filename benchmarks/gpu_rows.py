"""Append the rows of `gpu.py` to a table, and turn a table into Markdown or a picture: `append`, `markdown`, `plot`.

Needs Python alone (the picture needs matplotlib), so that the process that starts the others stays small.
"""
import csv
import os
from pathlib import Path

#: Of a row: what was done and how it went, where it was done; then the columns of rows.csv and more of their kind
COLUMNS = ('part', 'status', 'op', 'config', 'shape', 'dtype', 'provider', 'mode', 'ms_min', 'ms_p20', 'ms_p50',
           'ms_p80', 'ms_max', 'rounds', 'versus', 'faster', 'compile_s', 'peak_mb', 'saved_mb', 'bytes_modelled',
           'flops_modelled', 'roofline_pct', 'bound', 'grad_err', 'grad_tol', 'loss_err', 'loss_tol', 'note', 'gpu',
           'driver', 'torch', 'triton', 'speechloss', 'sha', 'date')
#: ok; an error above its tolerance; raised; no time was left; cannot be had on this machine
STATUSES = ('ok', 'wrong', 'failed', 'cut', 'skipped')
#: What a page says while no row of a GPU is committed
NO_ROWS = '**No GPU has timed them yet.**'


def append(path: Path, row: dict) -> None:
    "Write one row at the end of the table and see it to the disk; ValueError where the table has other columns"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    if not new and _header(path) != COLUMNS:
        raise ValueError(f'{path} has other columns than the rows of this script: move it, or name another with --out')
    with open(path, 'a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='')
        if new: writer.writeheader()
        writer.writerow({name: f'{value:.4g}' if isinstance(value, float) else value for name, value in row.items()})
        file.flush()
        os.fsync(file.fileno())


def _header(path: Path) -> tuple[str, ...]:
    with open(path, newline='', encoding='utf-8') as file: return tuple(next(csv.reader(file), ()))


def read(path: Path) -> list[dict]:
    "Return the rows of a table, each a dict of texts; none where there is no table"
    if not Path(path).exists(): return []
    with open(path, newline='', encoding='utf-8') as file: return list(csv.DictReader(file))


def line(row: dict) -> str:
    "Return a row as a line for people"
    def number(name, form): return format(float(row[name]), form) if row.get(name, '') != '' else '-'
    head = f"{row['part']:12} {row['status']:7} {row.get('op', ''):13} {row.get('config', ''):38} " \
           f"{row.get('shape', ''):16} {row.get('dtype', ''):8} {row.get('provider', ''):18} {row.get('mode', ''):4}"
    told = [f"grad err {number('grad_err', '.1e')} of {number('grad_tol', '.0e')}"] if row.get('grad_err', '') != '' \
        else []
    if row.get('ms_p50', '') != '':
        told.insert(0, f"{number('ms_p50', '.4g')} ms ({number('ms_min', '.4g')} to {number('ms_max', '.4g')}), "
                       f"x{number('faster', '.2f')}, {number('roofline_pct', '.0f')} % of the roofline, "
                       f"peak {number('peak_mb', '.1f')} MB, saved {number('saved_mb', '.2f')} MB")
    return ' '.join([head, ', '.join(told), row.get('note', '')]).rstrip()


# ------------------------------------------------------------------------ for the page on speed

def timed(path: Path) -> list[dict]:
    "Return the last good row of every point that a GPU timed"
    found = {}
    for row in read(path):
        if row['status'] == 'ok' and row['ms_p50'] and not row['gpu'].startswith('CPU'):
            found[tuple(row[name] for name in ('gpu', *COLUMNS[2:8]))] = row
    return list(found.values())


def markdown(path: Path) -> str:
    "Return the rows that a GPU timed as a table in Markdown, or `NO_ROWS`"
    if not (rows := timed(path)): return NO_ROWS
    columns = {
        'what': lambda r: f"{r['op']}: {r['config']}", 'shape': lambda r: r['shape'], 'type': lambda r: r['dtype'],
        'by': lambda r: r['provider'], 'mode': lambda r: r['mode'],
        'ms (least to most)': lambda r: f"{r['ms_p50']} ({r['ms_min']} to {r['ms_max']})",
        'faster than': lambda r: f"{r['versus']} x{r['faster']}" if r['versus'] else '',
        '% of roofline': lambda r: r['roofline_pct'], 'peak MB': lambda r: r['peak_mb'],
        'kept MB': lambda r: r['saved_mb'], 'gradient error': lambda r: r['grad_err'] or '-'}
    machines = sorted({f"{r['gpu']}, driver {r['driver']}, torch {r['torch']}, triton {r['triton']}" for r in rows})
    lines = [' | '.join(columns), ' | '.join('---' for _ in columns)]
    lines += [' | '.join(str(cell(row)) for cell in columns.values()) for row in rows]
    checks = [row['status'] for row in read(path) if row['grad_tol'] and not row['gpu'].startswith('CPU')]
    told = f"Timed on {'; '.join(machines)}. " \
           f"Of {len(checks)} checks against float64, {checks.count('ok')} kept their tolerance."
    return '\n'.join([told, '', *(f'| {each} |' for each in lines)])


def plot(path: Path, picture: Path) -> bool:
    "Draw how many times faster ours is than eager torch at each point; False without rows or without matplotlib"
    rows = [r for r in timed(path) if r['provider'].startswith('speechloss') and r['versus'] and r['mode'] != 'fwd']
    try: import matplotlib
    except ImportError: return False
    if not rows: return False
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(9, .28 * len(rows) + 1), layout='constrained')
    ratios = [float(r['faster']) for r in rows]
    names = [f"{r['op']}: {r['config']}, {r['shape']}, {r['dtype']} ({r['provider']} / {r['versus']})" for r in rows]
    bars = ax.barh(range(len(rows)), ratios, color=['C0' if ratio >= 1 else 'C3' for ratio in ratios])
    ax.bar_label(bars, [f'{ratio:.1f}x' for ratio in ratios], padding=3, fontsize=7)
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    ax.axvline(1, color='black', lw=.8)
    ax.invert_yaxis()
    ax.set(xscale='log', title=f"times faster, forward and backward, {rows[-1]['gpu']}")
    ax.margins(x=.15, y=.01)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return True
