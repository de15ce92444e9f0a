"""Running a notebook for real: complete, again, killed, failing, without room."""
import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest

from speechloss.common.errors import NotebookError, ReproduceError
from speechloss.reproduce import load_claims, load_results, papers, run, Study

HEAD = ("# parameters\nscale, seed, out = 'smoke', 0, 'runs'\ncorpus = corpus_dir = workers = None",
        'from speechloss.reproduce.runner import Run\n'
        "run = Run('toy', scale=scale, seed=seed, out=out, corpus=corpus, workers=workers)")
DRIVER = """
import sys
from speechloss.reproduce import run
from speechloss.reproduce import Study
run(Study('toy', out=sys.argv[1]), notebook=sys.argv[2], progress=False)
"""


def write(path: Path, *cells: str) -> Path:
    "A paper notebook"
    sources = (*HEAD, *cells)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]), path)
    return path


@contextlib.contextmanager
def started(out, notebook):
    "Run it in a process of its own, which does not outlive the test"
    # a script starts its background jobs deaf to SIGINT, and pytest may be one of them
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, '-c', DRIVER, str(out), str(notebook)],
                               stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(what: str, seconds: float, asked) -> Any:
    "What `asked` answers once it is true; how long that may take is the caller's to say"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := asked():
            return answer
        time.sleep(.1)
    raise AssertionError(f'{what}: not within {seconds:.0f} s')


def said(path: Path, process: subprocess.Popen) -> str:
    "What a file holds, empty while there is none; its writer must be alive"
    if path.exists() and (text := path.read_text()):
        return text
    assert process.poll() is None, process.stderr.read()
    return ''


def gone(pid: int) -> bool:
    "Whether a process has ended (a zombie has)"
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
    "A complete run, with everything that a paper leaves"
    root = tmp_path_factory.mktemp('a run')
    notebook = write(
        root / 'toy.ipynb',
        'import sys, os\nassert sys.executable == os.environ["WANTED"]',
        'import torch, matplotlib.pyplot as plt\nfig, axis = plt.subplots()\n_ = axis.plot([1, 2])',
        "run.figure(fig, 'line', alt='a line')",
        "run.players({'noisy': torch.zeros(1600), 'clean': torch.ones(1600) / 2}, 'first')",
        "for k in range(4):\n    run.progress('work', k + 1, 4)\nrun.record('answer', 42, unit='dB', n=3)",
        "run.data('abc')\nrun.table('arms', [dict(arm='base', pesq=2.)])",
        'run.finish()')
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WANTED', sys.executable)
        patch.setenv('JUPYTER_PATH', str(root / 'nothing'))  # whatever kernels the user has
        study = Study('toy', seed=5, out=root / 'runs', workers=1, corpus_dir=root / 'corpus')
        folder = run(study, notebook=notebook, progress=lambda *row: seen.append(row))
    return folder, notebook, seen


def test_what_a_run_leaves(complete):
    folder, _, seen = complete
    assert folder.name == 'toy-smoke-5' and seen[-1] == ('work', 4, 4)
    results = load_results(folder)
    assert results['numbers']['answer'] == dict(
        value=42., low=None, high=None, n=3, clusters=None, clustered_by=None, dropped=None, level=None,
        se=None, df=None, skew=None, by_seed=None, noises=None, seeds=[5], unit='dB', note='')
    assert results['tables'] == dict(arms=[dict(arm='base', pesq=2.)])
    assert results['data'] == dict(mini=dict(hash='abc')) and results['corpus'] == 'mini'
    for kind in ('figures', 'audio'):
        assert results[kind] and all((folder / x['path']).stat().st_size for x in results[kind].values())
    assert json.loads((folder / 'run.json').read_text())['seed'] == 5
    assert not [p for p in folder.rglob('*') if 'part' in p.name]


def test_executed_notebook_refers_to_files_beside_it(complete):
    folder, _, _ = complete
    text = (folder / 'notebook.ipynb').read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    shown = [o for c in notebook.cells if c.cell_type == 'code' for o in c.outputs]
    assert not [o for o in shown if o.output_type == 'error']
    injected = next(c for c in notebook.cells if 'injected-parameters' in c.metadata.get('tags', ()))
    found = {}
    exec(injected.source, found)
    assert str(folder.parent.parent) not in text and found['corpus_dir'] is None
    assert {k: found[k] for k in ('out', 'scale', 'seed', 'corpus')} == dict(
        out='runs', scale='smoke', seed=5, corpus='mini')
    html = ''.join(o.data.get('text/html', '') for o in shown if 'data' in o)
    assert html.count('<audio') == 2 and 'src="audio/first-noisy.flac"' in html
    assert 'base64' not in html
    pictures = [o for o in shown if 'data' in o and 'image/png' in o.data]
    assert len(pictures) == 1, 'a figure shows once'


def test_executed_notebook_has_no_traces_of_the_machine(complete):
    folder, _, _ = complete
    notebook = nbformat.read(folder / 'notebook.ipynb', as_version=4)
    assert notebook.metadata.kernelspec.name == 'python3' and 'papermill' not in notebook.metadata
    assert all(set(c.metadata) <= {'tags'} for c in notebook.cells)


def test_again_is_at_once(complete):
    folder, notebook, _ = complete
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    start = time.monotonic()
    assert run(Study('toy', seed=5, out=folder.parent), notebook=notebook) == folder
    assert time.monotonic() - start < 3
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_another_run_is_never_overwritten(complete, tmp_path):
    folder, notebook, _ = complete
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    edited = write(tmp_path / 'toy.ipynb', 'run.finish()')
    for corpus, given, what in (('laptop', notebook, 'corpus'), ('mini', edited, 'notebook')):
        with pytest.raises(ReproduceError, match=f'another run .its {what} differs'):
            run(Study('toy', seed=5, out=folder.parent, corpus=corpus), notebook=given)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(how, tmp_path):
    "The kernel goes with its parent, and the second run goes on after what the first one had done"
    notebook = write(
        tmp_path / 'toy.ipynb',
        "import os, time\nmark = run.folder / 'trained'\nfirst = not mark.exists()\n"
        "mark.write_text(str(os.getpid()))",
        'if first: time.sleep(36_000)',
        "run.record('first', first)\nrun.finish()")
    mark, begin = tmp_path / 'runs/toy-smoke-0/trained', time.monotonic()
    with started(tmp_path / 'runs', notebook) as process:
        kernel = int(until('the first cell', 900, lambda: said(mark, process)))
        # to end is less work than to start: on a busy machine both take longer
        patience = 30 + 5 * (time.monotonic() - begin)
        with pytest.raises(ReproduceError, match='by another process'):
            run(Study('toy', out=tmp_path / 'runs'), notebook=notebook, progress=False)
        process.send_signal(how)
        until('the end of the run', patience, lambda: process.poll() is not None)
        assert process.returncode != 0
        until('the end of its kernel', patience, lambda: gone(kernel))
    folder = run(Study('toy', out=tmp_path / 'runs'), notebook=notebook, progress=False)
    assert load_results(folder)['numbers']['first']['value'] == 0.


@pytest.mark.parametrize('cell, kind, said', [
    ('1 / 0', NotebookError, 'ZeroDivisionError: division by zero'),
    ("from speechloss.common.errors import CorpusError\nraise CorpusError('no corpus:\\nfetch it')",
     ReproduceError, 'no corpus: fetch it'),
    ("raise OSError(28, 'No space left on device')", ReproduceError, 'No space left'),
    ('import os; os._exit(1)', NotebookError, 'the kernel died'),
    ('pass', NotebookError, 'run.finish')])
def test_a_failing_cell_is_one_sentence(cell, kind, said, tmp_path):
    notebook = write(tmp_path / 'toy.ipynb', cell)
    with pytest.raises(kind, match=said) as caught:
        run(Study('toy', out=tmp_path / 'runs'), notebook=notebook, progress=False)
    assert type(caught.value) is kind and '\n' not in str(caught.value)
    folder = tmp_path / 'runs/toy-smoke-0'
    assert 'notebook.partial.ipynb' in str(caught.value)
    assert (folder / 'notebook.partial.ipynb').exists() and not (folder / 'notebook.ipynb').exists()


def test_a_mended_notebook_goes_on_in_its_folder(tmp_path):
    out = tmp_path / 'runs'
    with pytest.raises(NotebookError):
        run(Study('toy', out=out), notebook=write(tmp_path / 'toy.ipynb', '1 / 0'), progress=False)
    folder = run(Study('toy', out=out), notebook=write(tmp_path / 'toy.ipynb', 'run.finish()'), progress=False)
    assert not (folder / 'notebook.partial.ipynb').exists() and load_results(folder)['claims'] == []


def test_a_run_talks_through_files_and_says_nothing_stray(tmp_path):
    """Over TCP anyone on the machine could listen, and ipykernel would say so in the first line of every run."""
    notebook = write(tmp_path / 'toy.ipynb', 'from ipykernel.kernelapp import IPKernelApp\n'
                     "assert IPKernelApp.instance().transport == 'ipc'", 'run.finish()')
    (here := tmp_path / 'here').mkdir()      # and the folder for temporary files has a name too long for a socket
    done = subprocess.run([sys.executable, '-c', DRIVER, str(tmp_path / 'runs'), str(notebook)], cwd=here, text=True,
                          env=os.environ | dict(TMPDIR=str(here) + '/' * 60), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', ''), done.stderr
    assert not list(here.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path):
    notebook = write(tmp_path / 'toy.ipynb', "print('x' * 300_000)", 'run.finish()')
    limit = 100_000  # bytes a file, for this process and its kernel
    code = DRIVER.replace('run(', 'try: run(').rstrip() + '\nexcept ValueError as e: sys.exit(str(e))\n'
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'runs'), str(notebook)],
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                          capture_output=True, text=True)
    assert done.returncode == 1 and 'cannot be written' in done.stderr and 'make room' in done.stderr
    assert 'eavesdropping' not in done.stderr
    folder = tmp_path / 'runs/toy-smoke-0'
    assert not (folder / 'notebook.ipynb').exists() and not (folder / 'results.json').exists()


@pytest.mark.parametrize('more, said', [
    (dict(paper='model_as_los', notebook=None), "paper 'model_as_los' is unknown"),
    (dict(scale='smok'), "scale 'smok' is unknown: did you mean 'smoke'"),
    (dict(corpus='lapto'), "did you mean 'laptop'"),
    (dict(corpus='no/such.jsonl'), 'does not exist'),
    (dict(seed=-1), 'seed is -1'),
    (dict(workers=0), 'workers is 0'),
    (dict(notebook='no.ipynb'), 'does not exist')])
def test_wrong_arguments_leave_nothing(more, said, tmp_path):
    notebook = write(tmp_path / 'toy.ipynb', 'run.finish()')
    arguments = dict(paper='toy', out=tmp_path / 'runs', notebook=notebook) | more
    with pytest.raises(ReproduceError, match=said):
        given = arguments.pop('notebook')
        run(Study(**arguments), notebook=given)
    assert not (tmp_path / 'runs').exists()


def test_scale_paper_has_its_corpus():
    assert Study('toy', scale='paper').corpus == 'voicebank-demand'


@pytest.mark.parametrize('content, said', [('{', 'is not a notebook'), (None, 'no parameters cell')])
def test_what_is_not_a_paper(content, said, tmp_path):
    path = tmp_path / 'toy.ipynb'
    if content:
        path.write_text(content)
    else:
        nbformat.write(nbformat.v4.new_notebook(), path)
    with pytest.raises(ReproduceError, match=said):
        run(Study('toy', out=tmp_path / 'runs'), notebook=path)


def test_a_place_that_cannot_be_written(tmp_path):
    notebook = write(tmp_path / 'toy.ipynb', 'run.finish()')
    (tmp_path / 'file').touch()
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs/toy-smoke-0').touch()
    (tmp_path / 'thesis/toy-smoke-0').mkdir(parents=True)
    (tmp_path / 'thesis/toy-smoke-0/thesis.tex').touch()
    for out, said in ((tmp_path / 'file', 'cannot be written'), (tmp_path / 'runs', 'is a file'),
                      (tmp_path / 'thesis', 'thesis.tex'), (Path('/proc/nowhere'), 'cannot be written')):
        with pytest.raises(ReproduceError, match=said):
            run(Study('toy', out=out), notebook=notebook)
    assert os.listdir(tmp_path / 'thesis/toy-smoke-0') == ['thesis.tex']


def test_every_paper_has_claims_and_a_parameters_cell():
    from speechloss.reproduce.runner import read_notebook
    for name, path in papers().items():
        read_notebook(path)
        assert load_claims(name), f'{name} claims nothing'
