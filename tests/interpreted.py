"""Triton kernels without a GPU: tests that run in Triton's interpreter, in a process of their own.

The interpreter has to be on before Triton is imported, so a file marks its kernel tests with

    @pytest.mark.interpreted
    def test_kernel_equals_torch(...): ...          # skipped, unless TRITON_INTERPRET=1

    def test_in_the_interpreter(): run_interpreted(__file__)

and the last one runs the marked ones of its file. Both forms work by hand, too:

    TRITON_INTERPRET=1 pytest -m interpreted tests/test_kernel_NAME.py
"""
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


def run_interpreted(path: str, timeout: float = 600.) -> None:
    "Run the tests of a file that are marked `interpreted`; one process, one thread"
    if find_spec('triton') is None: pytest.skip('triton is not installed')
    environment = os.environ | dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    for name in [name for name in environment if name.startswith('PYTEST_')]: del environment[name]
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=',
         '-m', 'interpreted', path], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
