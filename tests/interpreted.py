"""Triton kernels without a GPU: tests that run in Triton's interpreter, in a process of their own.

The interpreter has to be on before Triton is imported, so a file marks its kernel tests with

    @pytest.mark.interpreted
    def test_kernel_equals_torch(...): ...          # skipped, unless TRITON_INTERPRET=1

    def test_in_the_interpreter(): run_interpreted(__file__)

and the last one runs the marked ones of its file. Both forms work by hand, too:

    TRITON_INTERPRET=1 pytest -m interpreted tests/test_kernel_NAME.py

A GPU adds up each element of a product of matrices in the same order, wherever it stands in its
tile. NumPy's libraries do not on every processor, so the interpreter gets a product that does.
"""
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest


def ordered_dots() -> None:
    "Let the interpreter add up products of matrices one term after the other"
    from triton.runtime import interpreter
    interpreter.InterpreterBuilder.create_dot = _ordered_dot


def _ordered_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    from triton.runtime.interpreter import TensorHandle
    total = np.zeros_like(d.data)
    rows, columns = a.data.astype(total.dtype), b.data.astype(total.dtype)
    for k in range(rows.shape[-1]): total += rows[..., :, k, None] * columns[..., k, None, :]
    return TensorHandle(total + d.data, d.dtype.scalar)


def run_interpreted(path: str, timeout: float = 600.) -> None:
    "Run the tests of a file that are marked `interpreted`; one process, one thread"
    if find_spec('triton') is None: pytest.skip('triton is not installed')
    environment = os.environ | dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    for name in [name for name in environment if name.startswith('PYTEST_')]: del environment[name]
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=',
         '-m', 'interpreted', path], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
