"""Every shipped Triton kernel compiles for 8.0, 9.0 and 10.0 without a spill; no GPU is needed."""
import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from speechloss.kernels.resources import FAMILIES, SHARED, Use, Variant, wrong

needs_triton = pytest.mark.skipif(find_spec('triton') is None, reason='triton is not installed')

COMPILE = '''
import json, sys
from speechloss.kernels.resources import CAPABILITIES, compiled, variants, wrong
found = variants((sys.argv[1],))
if len(sys.argv) > 2:     # one of them with other constants
    options = json.loads(sys.argv[2])
    found = [v._replace(constants=v.constants | options) for v in found if v.name == sys.argv[3]]
for v in found:
    for c in CAPABILITIES:
        use = compiled(v, c)
        print(json.dumps([v.name, c, *use, wrong(v, c, use)]))
'''


def table(*arguments: str) -> list:
    "Name, capability, registers, stack, shared memory and verdict, compiled with the interpreter off"
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', COMPILE, *arguments], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize('family', FAMILIES)
def test_no_kernel_spills(family):
    rows = table(family)
    assert rows and not [row for row in rows if row[-1]]


@needs_triton
def test_a_tile_that_is_too_large_is_seen():
    rows = table('info_nce_triton', json.dumps(dict(ROWS=128, COLS=128)), 'info_nce scores 64x64x16 fp32')
    assert len(rows) == 3 and all(row[-1] for row in rows)


def test_what_is_wrong():
    variant = Variant('some', None, {}, {})
    assert not wrong(variant, 90, Use(64, 0, SHARED[90]))
    assert wrong(variant, 90, Use(64, 8, 0)) and not wrong(variant._replace(spill=8), 90, Use(64, 8, 0))
    assert wrong(variant, 80, Use(64, 0, SHARED[90]))
    assert wrong(variant, 90, Use(4, 0, 0))               # compiled to nothing


def test_every_product_names_its_precision(root):
    "tl.dot of float32 is a single TF32 by default"
    files = {path.name: ast.parse(path.read_text()) for path in root.glob('kernels/*_triton*.py')}
    products = [(name, call) for name, tree in files.items() for call in ast.walk(tree)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == 'dot']
    assert products
    for name, call in products:
        assert 'input_precision' in [k.arg for k in call.keywords], f'{name}, line {call.lineno}'
