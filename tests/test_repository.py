"""The repository itself: notebooks and package in step, wheel, imports, set-up."""
import ast
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pages
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Packages from the ground up; what stands on one floor does not import its neighbours.
FLOORS = dict(common=1, signal=2, corpora=3, features=3, losses=4, models=4, metrics=4, training=5, judges=5,
              reproduce=6, trials=6, cli=7)
NOTEBOOKS = pages.notebooks()
BIN = Path(sys.executable).parent


def command(*args, cwd=ROOT, check=True, **env):
    "Run a command, with its output as text"
    environment = {**os.environ, 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}', **env}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def python(code, cwd, executable=sys.executable, **env):
    return command(executable, '-c', code, cwd=cwd, **env).stdout.strip()


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A copy of the sources, to be written on"
    return pages.copy(tmp_path_factory.mktemp('clone with spaces')/'speechloss')


# --- notebooks and package ---

def test_export_is_in_sync(clone):
    command(BIN/'nbdev_export', cwd=clone)
    for path in sorted((clone/'speechloss').rglob('*.py')):
        name = path.relative_to(clone)
        assert (ROOT/name).exists(), f'{name} is not exported: run `make export`'
        assert path.read_text() == (ROOT/name).read_text(), f'{name} is stale: run `make export`'


def test_every_module_says_in_a_sentence_what_one_does_with_it():
    "nbdev takes the first line of the quote under the title, and cuts a sentence that goes on"
    cut = {}
    for path in (ROOT / 'speechloss').rglob('*.py'):
        said = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
        made = path.name == '_modidx.py' or path.parent.name in ('common', 'cli') and path.name == '__init__.py'
        first = said.partition('\n')[0]
        if not made and not first.endswith('.'): cut[path.relative_to(ROOT).as_posix()] = first
    assert not cut


def test_no_export_cell_is_longer_than_a_screen():
    "80 lines: what is said about a function stands beside it"
    long = {}
    for path in (ROOT / 'nbs').rglob('*.ipynb'):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            lines = ''.join(cell['source']).splitlines()
            if cell['cell_type'] == 'code' and lines and lines[0].startswith('#| export') and len(lines) > 80:
                long[f'{path.relative_to(ROOT).as_posix()} {cell["id"]}'] = len(lines)
    assert not long


def test_every_module_comes_from_a_notebook():
    hand_written = {'speechloss/__init__.py', 'speechloss/_modidx.py'}
    for path in sorted((ROOT/'speechloss').rglob('*.py')):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        if name in hand_written or not text.strip(): continue
        source = re.search(r'File to edit: (\S+\.ipynb)', text)
        assert source, f'{name} names no notebook'
        assert (path.parent/source[1]).resolve().exists(), f'{name} comes from a lost notebook'


def untidy(name, cleaned):
    "What is wrong with a notebook: a sentence each"
    text = (ROOT/name).read_text()
    nb = nbformat.reads(text, as_version=4)
    try: nbformat.validate(nb)
    except nbformat.ValidationError as error: yield f'{name} is no notebook: {error.message}'
    if cleaned != text: yield f'{name} is not clean: run `make export`'
    if name != pages.INDEX and '/results/' not in name:    # the site draws the others
        if any(cell.get('outputs') for cell in nb.cells): yield f'{name} has outputs'
    if 'data:audio' in json.dumps([c.get('outputs') for c in nb.cells]): yield f'{name} has audio in it'
    if not nb.cells[0].source.startswith('# '): yield f'{name} does not open with its title'
    if trace := re.search(r'/home/\w|/Users/\w|/root/|/tmp/\w|[A-Z]:\\\\Users', text):
        yield f'{name} tells of its machine: {trace[0]}'


def test_notebooks_are_clean(clone):
    "Valid, as `nbdev_clean` leaves them, with a title, no outputs, and nothing of the machine they ran on"
    command(BIN/'nbdev_clean', cwd=clone)
    wrong = [fault for name in NOTEBOOKS for fault in untidy(name, (clone/name).read_text())]
    assert NOTEBOOKS and not wrong, '\n'.join(wrong)


# --- the package ---

@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    command(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', out, clone,
            cwd=out)
    return next(out.glob('speechloss-*.whl'))


def test_kernels_of_a_checkout_are_there_once():
    "transformers imports whatever is called `kernels`; from the root of a checkout that was a second copy of ours"
    code = ('import importlib, torch; from speechloss.kernels import contrastive_ratio;'
            'x = [torch.ones(1, 3, 2)]; call = lambda: contrastive_ratio(x, x, [x], distance="l1").tolist();'
            'before = call(); shell = importlib.import_module("kernels");'
            'assert shell.__file__.endswith("kernels/__init__.py") and not hasattr(shell, "contrastive_ratio");'
            'importlib.import_module("transformers.activations"); assert call() == before; print("once")')
    assert python(code, ROOT) == 'once'


@pytest.mark.slow
def test_wheel_installs_and_imports_outside_the_clone(wheel, tmp_path):
    "A new environment sees only the dependencies of this one"
    command(sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv')
    here = tmp_path/'venv/bin/python'
    site = Path(python('import site; print(site.getsitepackages()[0])', tmp_path, here))
    dependencies = Path(metadata.distribution('torch').locate_file(''))
    command(sys.executable, '-m', 'pip', '--python', here, 'install', '--no-deps', '--no-index',
            wheel, cwd=tmp_path)
    (site/'dependencies.pth').write_text(f'{dependencies}\n')
    modules = [p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
               for p in sorted((ROOT/'speechloss').rglob('*.py')) if p.stem[0] != '_']
    python(f'import importlib\nfor name in {modules}: importlib.import_module(name)', tmp_path, here)
    where = python('import speechloss; print(speechloss.__file__)', tmp_path, here)
    assert Path(where).is_relative_to(site)
    have = {p.relative_to(site).as_posix() for p in (site/'speechloss').rglob('*') if p.is_file()}
    want = {f'speechloss/papers/{p.name}' for p in (ROOT/'nbs/papers').iterdir() if p.is_file()}
    data = ROOT/'speechloss/data'
    want |= {f'speechloss/data/{p.relative_to(data).as_posix()}' for p in data.rglob('*') if p.is_file()}
    want |= {f'speechloss/kernels/{p.name}' for p in (ROOT/'kernels').glob('*.py')}
    assert want <= have, f'the wheel lacks {sorted(want - have)}'
    assert (tmp_path/'venv/bin/speechloss').exists()


def requirements(name, extra=''):
    "The distributions that a distribution needs, their own needs included"
    todo, found = [(name, extra)], set()
    while todo:
        name, extra = todo.pop()
        try: lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError: lines = []  # of an extra that is not installed
        for line in lines:
            need = Requirement(line)
            if need.marker and not need.marker.evaluate({'extra': extra}): continue
            key = canonicalize_name(need.name)
            if key in found: continue
            found.add(key)
            todo += [(key, e) for e in (need.extras or {''})]
    return found


def exported():
    "Module name -> (file, folder of its notebook) for every exported module"
    for path in sorted((ROOT/'speechloss').rglob('*.py')):
        if source := re.search(r'File to edit: \S*nbs/(\w+)/\S+', path.read_text()):
            parts = path.relative_to(ROOT).with_suffix('').parts
            yield '.'.join(p for p in parts if p != '__init__'), path, source[1]


def imported(path, name):
    "Every module that a file imports, lazily or not, by its absolute name"
    package = name.split('.') if path.name == '__init__.py' else name.split('.')[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join([*above, *(node.module or '').split('.')]).strip('.')
            yield module
            yield from (f'{module}.{alias.name}' for alias in node.names)


def test_imports_go_down_only():
    package = {name: folder for name, path, folder in exported()}
    for name, path, folder in exported():
        for other in imported(path, name):
            to = package.get(other, folder)
            assert to == folder or FLOORS[to] < FLOORS[folder], (
                f'{name} (floor {FLOORS[folder]}) imports {other} (floor {FLOORS[to]}): imports go down only')


def test_every_import_is_declared():
    "What the package imports comes with the core or with an extra that is not for developers"
    extras = ('metrics', 'reproduce', 'ssl', 'downstream', 'codec')
    declared = {'speechloss'}.union(*(requirements('speechloss', e) for e in ('', *extras)))
    owners = metadata.packages_distributions()
    for name, path, _ in exported():
        for top in {module.split('.')[0] for module in imported(path, name)}:
            dists = {canonicalize_name(d) for d in owners.get(top, ())}
            assert top in sys.stdlib_module_names or not dists or dists & declared, (
                f'{name} imports {top}: no extra of setup.py brings it')


CORE_ALONE = '''
import importlib, sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in absent: raise ModuleNotFoundError(f'{name} is not in the core')
for name in [n for n in sys.modules if n.split('.')[0] in absent]: del sys.modules[name]
sys.meta_path.insert(0, Absent())
for name in wanted: importlib.import_module(name)
'''


def test_up_to_the_losses_everything_imports_with_the_core_alone():
    core = requirements('speechloss') | {'speechloss'}
    absent = {top for top, dists in metadata.packages_distributions().items()
              if not core & {canonicalize_name(d) for d in dists}} - set(sys.stdlib_module_names)
    wanted = [name for name, _, folder in exported() if FLOORS[folder] <= 3 or folder == 'losses']
    wanted.append('speechloss.metrics.vqscore')
    python(f'absent, wanted = {absent}, {wanted}\n{CORE_ALONE}', ROOT)


def test_core_adds_at_most_three_packages():
    base = requirements('torch') | requirements('numpy') | {'torch', 'numpy'}
    assert len(added := requirements('speechloss') - base) <= 3, sorted(added)


def test_import_takes_less_than_a_second():
    code = ('import time, torch; start = time.perf_counter(); import speechloss, speechloss.losses;'
            'print(time.perf_counter() - start)')
    seconds = min(float(python(code, ROOT)) for _ in range(3))
    assert seconds < 1, f'import speechloss.losses adds {seconds:.2f} s to import torch'


def test_losses_import_only_the_core():
    code = ('import sys, torch; before = set(sys.modules); import speechloss.losses;'
            'print(*{m.split(".")[0] for m in set(sys.modules) - before})')
    allowed = {'torch', 'numpy', 'soundfile', '_soundfile', '_soundfile_data', 'cffi', '_cffi_backend',
               'speechloss', *sys.stdlib_module_names}
    added = {name for name in python(code, ROOT).split() if not name.startswith('__editable__')}
    assert added <= allowed, f'import speechloss.losses also loads {sorted(added - allowed)}'


def test_extras_name_what_the_readme_names():
    extras = set(metadata.metadata('speechloss').get_all('Provides-Extra'))
    assert {'metrics', 'reproduce', 'ssl', 'downstream', 'codec', 'docs', 'dev'} <= extras
    named = re.findall(r"speechloss\[([a-z,]+)\]", (ROOT/'README.md').read_text())
    assert {e for group in named for e in group.split(',')} <= extras


# --- set-up ---

def make(*args, **env):
    return command('make', *args, check=False, **env)


def shim(folder, name, text):
    "A program that stands in the way of the real one"
    (folder/name).write_text(f'#!/bin/sh\n{text}\n')
    (folder/name).chmod(0o755)
    return folder/name


def test_make_alone_lists_the_commands():
    shown = make().stdout
    for name in ('reproduce', 'test', 'docs', 'lab', 'clean'): assert f'make {name} ' in shown


@pytest.mark.parametrize('given, wanted', [
    (['PAPER=model_as_loss'], '"model_as_loss" --scale "smoke" --seed "0" --out "runs"'),
    (['PAPER=all', 'SCALE=laptop', 'SEED=2', 'OUT=my runs', 'CORPUS=laptop', 'CORPUS_DIR=a b'],
     '"all" --scale "laptop" --seed "2" --out "my runs"'),
    (['CORPUS=laptop', 'CORPUS_DIR=a b'], '--corpus "laptop" --corpus-dir "a b"')])
def test_make_reproduce_passes_its_variables(given, wanted):
    assert wanted in re.sub(r'\s*\\\n\s*', ' ', make('-n', 'reproduce', *given).stdout)


def test_set_up_says_what_the_machine_lacks(tmp_path):
    venv = f'VENV={tmp_path/"venv"}'
    old = shim(tmp_path, 'python-old', '[ "$1" = -V ] && echo "Python 3.8.1"; exit 1')
    for python, reason in [('no-such-python', 'install Python 3.11 or newer'),
                           (old, 'needs Python 3.11 or newer, this is Python 3.8.1')]:
        done = make('setup', venv, f'PYTHON={python}')
        assert done.returncode == 2 and reason in done.stdout
        assert len(done.stdout.splitlines()) == 1 and not (tmp_path/'venv').exists()


def test_set_up_asks_for_a_compiler(tmp_path):
    "On a PATH with nothing but what make itself needs"
    tools = tmp_path/'bin'
    tools.mkdir()
    for name in ('bash', 'sh', 'cat', 'make'):
        (tools/name).symlink_to(shutil.which(name))
    done = make('setup', f'VENV={tmp_path/"venv"}', f'PYTHON={sys.executable}', PATH=str(tools))
    assert done.returncode == 2 and 'install gcc' in done.stdout


def test_ci_needs_no_arguments_and_no_terminal():
    text = (ROOT/'.ci/run').read_text()
    assert os.access(ROOT/'.ci/run', os.X_OK) and 'make test </dev/null' in text
    command('bash', '-n', ROOT/'.ci/run')


def test_citation_and_version_agree():
    import speechloss
    cff = (ROOT/'CITATION.cff').read_text()
    version = re.search(r'^version: (\S+)', cff, re.M)[1]
    assert version == speechloss.__version__ == metadata.version('speechloss')
    assert f'## {version}' in (ROOT/'CHANGELOG.md').read_text()


def test_rows_of_a_users_machine_go_to_a_table_that_git_ignores(tmp_path, monkeypatch):
    """The pages are drawn from the committed table: whoever times a machine must be able to run the tests after."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import run as benchmark
    assert command('git', 'check-ignore', benchmark.OWN_TABLE).stdout and '--own' in (ROOT/'Makefile').read_text()
    row = dict.fromkeys(benchmark.COLUMNS, 1.)
    monkeypatch.setattr(benchmark, 'measure', lambda module, repeats: [row])
    for name in ('TABLE', 'OWN_TABLE'): monkeypatch.setattr(benchmark, name, tmp_path/f'{name}.csv')
    monkeypatch.setattr(sys, 'argv', ['run', 'stft', '--own'])
    benchmark.main()
    assert [p.name for p in tmp_path.iterdir()] == ['OWN_TABLE.csv']
    assert len((tmp_path/'OWN_TABLE.csv').read_text().splitlines()) == 2
