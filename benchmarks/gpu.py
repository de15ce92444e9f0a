"""Check and time the kernels on the GPU of this machine, most wanted first, in ten minutes.

    python benchmarks/gpu.py [--minutes 10] [--out build/gpu/rows.csv] [--parts correctness,stft,...] [--dry]

A checkout and a Python with torch 2.11 or newer, triton 3.6 or newer, numpy and pytest are all that
is needed, and the C compiler that Triton wants: nothing has to be installed, and `make gpu` does the
same in the environment of the checkout. What else is there is used: auraloss as a rival, the rest of
`speechloss` for the training step, matplotlib for the picture.

    correctness    every kernel against float64 on the CPU: value, gradient, types, odd shapes, equal runs
    rates          what the device copies and multiplies in a second
    stft           the STFT distance beside plain torch, torch.compile and auraloss
    contrastive, info_nce, nearest_code    the other kernels beside plain torch and torch.compile
    crossing       the two methods of the STFT kernel, by window and batch
    graph          its forward and backward pass in a CUDA graph
    training       a whole training step, called, in a graph, compiled
    tests          the tests marked `cuda`, in the time that is left

Every part is a process of its own, since a fault of a kernel takes everything of its process with
it, and has its share of the time; what a part leaves over goes to the next ones. A row is on the
disk before the next is measured: see `gpu_rows.COLUMNS`. `status` is ok, wrong (an error above its
tolerance), failed (raised), cut (no time) or skipped (not on this machine). Times are medians of at
least 20 rounds, in which all providers take turns forth and back with the cache emptied before each;
`faster` compares with the provider `versus` in the same rounds. `roofline_pct` is the time that the
modelled bytes or products would take at the published rate, over the time that was measured.

`--dry` runs all of it with tiny shapes on the CPU, the kernels in Triton's interpreter: a test of this
script, whose times mean nothing. (The interpreter of Triton 3.6 wants a numpy older than 2.4.) At the
end the table is written beside the rows in Markdown, with a picture; to publish them, append the rows
to `benchmarks/gpu.csv`. The exit status is 1 if a row is wrong or failed, and 2 if there is no GPU.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# This folder holds `ssl.py` and would hide the one of Python, were it where modules are looked for first.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or '.').resolve() not in (ROOT, ROOT / 'benchmarks'))]

import argparse
import signal
import subprocess
import time
import warnings
from importlib.util import find_spec

from benchmarks import gpu_rows

#: Seconds of ten minutes, and how a part is called: module and function
PARTS = {
    'correctness': (160, 'gpu_checks', 'correctness'),
    'rates': (12, 'gpu_parts', 'rates'),
    'stft': (115, 'gpu_parts', 'stft'),
    'contrastive': (60, 'gpu_parts', 'contrastive'),
    'info_nce': (60, 'gpu_parts', 'info_nce_part'),
    'nearest_code': (45, 'gpu_parts', 'codes'),
    'crossing': (45, 'gpu_parts', 'crossing'),
    'graph': (28, 'gpu_parts', 'graph'),
    'training': (60, 'gpu_parts', 'training'),
    'tests': (10, 'gpu_parts', 'tests'),
}
#: A part that is not done so many seconds after its time is ended
GRACE = 5
#: Exit status of a part: rows that are wrong or failed; the part raised and wrote so
WRONG, RAISED = 3, 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10., help='for everything (10)')
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'gpu' / 'rows.csv', help='the table to append to')
    parser.add_argument('--parts', default=','.join(PARTS), help='which, in the order in which they run')
    parser.add_argument('--dry', action='store_true', help='tiny shapes on the CPU, in the interpreter')
    parser.add_argument('--raise', dest='broken', default='', help=argparse.SUPPRESS)      # a part that is to fail
    parser.add_argument('--child', type=float, default=0., help=argparse.SUPPRESS)         # its deadline
    given = parser.parse_args()
    given.out, given.parts = given.out.absolute(), [part for part in given.parts.split(',') if part]
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f'no part {unknown[0]!r}: choose from {", ".join(PARTS)}')
    if not given.minutes > 0: parser.error('--minutes must be above 0')
    return given


def lacking() -> str:
    "Return why nothing can be timed here, in a sentence; empty where there is a GPU"
    for package in ('torch', 'triton'):
        if not find_spec(package): return f'There is no {package} in {sys.executable}: install it.'
    import torch
    if torch.cuda.is_available(): return ''
    return 'There is no GPU here that torch sees, so there is nothing to time; --dry tests the script on the CPU.'


# ---------------------------------------------------------------------- the process of a part

def child(given: argparse.Namespace) -> int:
    "Run one part until its deadline; return the exit status"
    part, = given.parts
    from importlib import import_module

    from benchmarks.gpu_measure import Run, told
    for module in ('torch._dynamo', 'triton.runtime.interpreter'): warnings.filterwarnings('ignore', module=module)
    run = Run(part, given.out, given.child, given.dry)
    try:
        if part == given.broken: raise RuntimeError('raised because --raise asked for it')
        getattr(import_module(f'benchmarks.{PARTS[part][1]}'), PARTS[part][2])(run)
        run.close()
    except Exception as error:
        run.write('failed', note=told(error))
        return RAISED
    return WRONG if run.failed else 0


# ------------------------------------------------------------------------- the one that starts

def environment(dry: bool) -> dict[str, str]:
    "Return the environment of a part: the interpreter on one thread, or the GPU with all threads"
    found = {name: value for name, value in os.environ.items() if name not in ('OMP_NUM_THREADS', 'TRITON_INTERPRET')}
    # the folder of the script is kept from the children, too, see above
    return found | (dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') if dry else {})


def start(part: str, deadline: float, given: argparse.Namespace) -> int:
    "Run a part in a process of its own, end it when its time is over, and write a row if it could not"
    command = [sys.executable, '-m', 'benchmarks.gpu', '--parts', part, '--out', str(given.out),
               '--child', str(deadline), '--raise', given.broken, *(['--dry'] if given.dry else [])]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(given.dry), start_new_session=True)
    try: status = process.wait(max(1., deadline + GRACE - time.time()))
    except subprocess.TimeoutExpired: status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)   # it leads a group of its own, which compilers are in, too
            process.wait()
    if status is None: lost(given.out, part, 'cut', 'the part was not done when its time was over, and was ended')
    elif status not in (0, WRONG, RAISED): lost(given.out, part, 'failed', f'the process ended with status {status}')
    return status or 0


def lost(table: Path, part: str, status: str, note: str) -> None:
    "Write the row of a part that could not write it"
    row = dict(part=part, status=status, note=note)
    gpu_rows.append(table, row)
    print(gpu_rows.line(row), flush=True)


def main() -> int:
    given = arguments()
    if given.child: return child(given)
    if not given.dry and (why := lacking()):
        print(why)
        return 2
    begin, shares = time.time(), sum(PARTS[part][0] for part in given.parts)
    seconds = max(10., 60 * given.minutes - 2 * GRACE)
    statuses, done = [], 0.
    for part in given.parts:
        done += PARTS[part][0] / shares
        statuses.append(start(part, begin + seconds * done, given))
    print(f'{time.time() - begin:.0f} s, rows in {given.out}')
    given.out.with_suffix('.md').write_text(gpu_rows.markdown(given.out) + '\n', encoding='utf-8')
    gpu_rows.plot(given.out, given.out.with_suffix('.png'))
    return int(any(statuses))


if __name__ == '__main__':
    sys.exit(main())
