"""Tests marked `alone` in a process of their own: SPEECHLOSS_ALONE=1 pytest -m alone runs them by hand.

Judges bring native libraries (PocketSphinx among them) whose faults would show in other tests.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_alone():
    environment = os.environ | dict(SPEECHLOSS_ALONE='1', OMP_NUM_THREADS='1')
    for name in [name for name in environment if name.startswith('PYTEST_')]: del environment[name]
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=',
         '-m', 'alone', str(Path(__file__).parent / 'test_downstream.py')],
        env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
