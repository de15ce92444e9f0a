"""The script that times the kernels on a GPU: dry, on a machine that has nothing but what it asks for."""
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip('triton')

#: What the script asks for, and what these four import themselves
BARE = ('torch', 'triton', 'numpy', 'pytest')
NEEDED = ('functorch', 'torchgen', 'typing_extensions', 'filelock', 'sympy', 'mpmath', 'networkx', 'jinja2',
          'markupsafe', 'fsspec', '_pytest', 'py', 'pluggy', 'iniconfig', 'packaging', 'pygments', 'numpy.libs',
          'setuptools')
PARTS = ('correctness', 'rates', 'stft', 'contrastive', 'info_nce', 'nearest_code', 'crossing', 'graph', 'training',
         'tests')


@pytest.fixture
def gpu_rows(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import gpu_rows
    return gpu_rows


@pytest.fixture(scope='module')
def bare_python(tmp_path_factory) -> Path:
    "A Python with torch, triton, numpy and pytest, and without speechloss, auraloss, soundfile and the rest"
    folder = tmp_path_factory.mktemp('bare')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    here = Path(find_spec('torch').submodule_search_locations[0]).parent
    there = next(folder.glob('lib/python*/site-packages'))
    for name in (*BARE, *NEEDED):
        for path in (here / name, here / f'{name}.py', *here.glob(f'{name.replace("-", "_")}-*.dist-info')):
            if path.exists(): (there / path.name).symlink_to(path)
    return folder / 'bin' / 'python'


def run(python: Path | str, root: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('PYTEST_', 'PYTHON'))}
    return subprocess.run([str(python), str(root / 'benchmarks' / 'gpu.py'), *options], capture_output=True, text=True,
                          env=environment | dict(OMP_NUM_THREADS='1'), timeout=600)


def number(text: str) -> float: return float(text or 'nan')


@pytest.mark.slow
def test_every_part_runs_dry_on_a_bare_machine(root, bare_python, tmp_path, gpu_rows):
    "And a part that raises leaves its row, and the others go on"
    table = tmp_path / 'rows.csv'
    done = run(bare_python, root, '--dry', '--out', str(table), '--raise', 'rates')
    rows = gpu_rows.read(table)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]      # for the part that raised
    told = [f"{row['part']} {row['status']} {row['config']} {row['provider']}: {row['note']}" for row in rows
            if row['status'] not in ('ok', 'skipped')]
    assert told == ['rates failed  : RuntimeError: raised because --raise asked for it']
    assert list(dict.fromkeys(row['part'] for row in rows)) == list(PARTS)
    for part in PARTS: assert part == 'rates' or any(r['part'] == part and r['status'] == 'ok' for r in rows), part
    checked = [row for row in rows if row['grad_tol']]
    assert {row['op'] for row in checked} == {'stft_distance', 'contrastive', 'info_nce', 'nearest_code', 'token_loss'}
    assert {row['dtype'] for row in checked} == {'float32', 'bfloat16', 'float16', 'float64'}
    for row in checked: assert number(row['grad_err']) <= number(row['grad_tol']), row
    for row in rows:
        if row['grad_err']: assert math.isfinite(number(row['grad_err'])) and number(row['grad_err']) < .02, row
    timed = [row for row in rows if row['ms_p50']]
    for part in PARTS[2:9]:
        providers = {row['provider'] for row in timed if row['part'] == part}
        assert any(name.startswith('speechloss') for name in providers), part
    for row in timed: assert number(row['ms_min']) <= number(row['ms_p50']) <= number(row['ms_max']), row
    full = [row for row in timed if row['part'] in PARTS[2:6] and row['mode'] == 'full']
    assert full and all(row['saved_mb'] and row['grad_err'] for row in full)
    assert any(row['status'] == 'skipped' and row['provider'] == 'auraloss' for row in rows)
    assert any('bare enhancer' in row['config'] for row in rows)
    assert gpu_rows.markdown(table) == gpu_rows.NO_ROWS           # the times of a CPU are not published
    assert table.with_suffix('.md').read_text(encoding='utf-8').strip() == gpu_rows.NO_ROWS


@pytest.mark.slow
def test_a_second_run_appends_and_takes_the_enhancer_that_is_there(root, tmp_path, gpu_rows):
    table = tmp_path / 'rows.csv'
    assert run(sys.executable, root, '--dry', '--out', str(table), '--parts', 'graph').returncode == 0
    first = table.read_text(encoding='utf-8')
    done = run(sys.executable, root, '--dry', '--out', str(table), '--parts', 'training')
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert table.read_text(encoding='utf-8').startswith(first)
    rows = gpu_rows.read(table)
    assert {row['part'] for row in rows} == {'graph', 'training'}
    assert any(row['config'] == 'speechloss enhancer tiny' and row['provider'] == 'speechloss compile' for row in rows)


@pytest.mark.slow
def test_a_part_without_time_is_cut_and_says_so(root, tmp_path, gpu_rows):
    table = tmp_path / 'rows.csv'
    run(sys.executable, root, '--dry', '--out', str(table), '--parts', 'correctness', '--minutes', '.05')
    assert [row['status'] for row in gpu_rows.read(table)][-1] == 'cut'


def test_without_a_gpu_one_sentence_says_so(root):
    import torch
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    done = run(sys.executable, root)
    assert done.returncode == 2 and done.stdout.count('\n') == 1 and 'There is no GPU here' in done.stdout
    assert "no part 'speed': choose from correctness, rates" in run(sys.executable, root, '--parts', 'speed').stderr


def test_table_and_picture_of_rows_of_a_gpu(tmp_path, gpu_rows):
    table = tmp_path / 'rows.csv'
    assert gpu_rows.markdown(table) == gpu_rows.NO_ROWS
    assert not gpu_rows.plot(table, tmp_path / 'picture.png')
    common = dict(part='stft', status='ok', op='stft_distance', config='mrstft', shape='16x64000', dtype='float32',
                  mode='full', gpu='NVIDIA Made-up', driver='1', torch='2', triton='3', ms_min=1., ms_max=3.,
                  versus='torch')
    gpu_rows.append(table, common | dict(provider='torch', ms_p50=9., faster=1.))
    for ms in 4., 2.:     # the later row of a point counts
        gpu_rows.append(table, common | dict(provider='speechloss', ms_p50=ms, faster=9. / ms, grad_err=1e-4))
    gpu_rows.append(table, common | dict(provider='compile', status='failed', note='no compiler'))
    for status in 'ok', 'wrong':
        gpu_rows.append(table, dict(part='correctness', status=status, gpu='NVIDIA Made-up', grad_tol=1e-4))
    text = gpu_rows.markdown(table)
    assert text.startswith('Timed on NVIDIA Made-up, driver 1, torch 2, triton 3. '
                           'Of 2 checks against float64, 1 kept their tolerance.')
    assert '| 2 (1 to 3) | torch x4.5 |' in text and '4 (1 to 3)' not in text and text.count('mrstft') == 2
    assert 'compile' not in text
    assert gpu_rows.plot(table, tmp_path / 'picture.png') and (tmp_path / 'picture.png').stat().st_size > 1000
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n', encoding='utf-8')
    with pytest.raises(ValueError, match='has other columns than the rows of this script: move it'):
        gpu_rows.append(tmp_path / 'other.csv', common)


def test_share_of_the_roofline(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.gpu_measure import Work, published
    rates = published('NVIDIA H200')
    assert rates[0] == 4.8e12 and published('NVIDIA H100 PCIe')[0] == 2e12 and published('NVIDIA L40S') is None
    row = Work(bytes=4.8e9).row(2., rates)         # a millisecond of copying in two
    assert row['roofline_pct'] == pytest.approx(50) and row['bound'] == 'memory'
    row = Work(bytes=1., flops=99e9, products='half').row(.2, rates)
    assert row['roofline_pct'] == pytest.approx(50) and row['bound'] == 'compute'
    assert 'roofline_pct' not in Work(bytes=1.).row(1., None)
