"""Run notebooks as `nbdev_test` does, and keep what they draw: one run is the test and the picture."""
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir

from pages import ROOT, notebooks

DRAWN = ROOT/'build/drawn'


def run(path):
    "The notebook with the outputs of this run; cells marked `eval: false`, slow or cuda are left out"
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    os.environ['IN_TEST'] = '1'
    flags = set(get_config().tst_flags.split())
    nb = NBProcessor(path, rm_directives=False).nb

    def left_out(cell):
        said = getattr(cell, 'directives_', None) or {}
        return 'false' in said.get('eval:', []) or flags & set(said)
    shell = CaptureShell(path, mpl_format='retina')
    with chdir(path.parent):
        shell.run_all(nb, exc_stop=True, preproc=left_out)
    return nb


def drawn(page):
    "Run a page into `build/drawn`: its seconds, and what went wrong"
    # what pytest.raises throws is no Exception, and no pool can send it
    from _pytest.outcomes import OutcomeException as Outcome
    from execnb.nbio import write_nb
    start, path = time.monotonic(), ROOT/page
    try:
        nb = run(path)
        (DRAWN/page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, DRAWN/page)
        (DRAWN/page).touch()    # what has not changed is not written
    except (Exception, Outcome) as error:
        return page, time.monotonic() - start, ''.join(traceback.format_exception(error))
    return page, time.monotonic() - start, ''


def stale(todo):
    "The pages that were drawn before they, or the package, were changed"
    def changed(path): return path.stat().st_mtime
    code = max(map(changed, [*(ROOT/'speechloss').rglob('*.py'), *(ROOT/'kernels').rglob('*.py')]))
    return [p for p in todo if not (DRAWN/p).exists() or changed(DRAWN/p) < max(code, changed(ROOT/p))]


def draw(every=True, workers=2):
    "Run the chapters and guides, all or those that changed; the first line of each failure is its page"
    todo, failed = [n for n in notebooks() if not n.startswith('nbs/papers/')], []
    if not every: todo = stale(todo)
    with ProcessPoolExecutor(workers) as pool:
        for page, seconds, wrong in pool.map(drawn, todo):
            print(f'{seconds:5.0f} s  {page}{"  FAILED" if wrong else ""}', flush=True)
            if wrong: failed.append(f'== {page}\n{wrong}')
    if failed: raise SystemExit('\n'.join(failed))
    print(f'{len(todo)} notebooks ran.')
