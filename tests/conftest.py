"""What every test shares: one thread a process, one seed, the markers."""
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')   # no test may wait for a hub

import pytest
import torch
from hypothesis import settings
from interpreted import ordered_dots

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile('speechloss', max_examples=25, deadline=None, derandomize=True)
settings.load_profile('speechloss')

if os.environ.get('TRITON_INTERPRET') == '1': ordered_dots()


def pytest_collection_modifyitems(items):
    "Slow tests first, so that two processes end together; without CUDA its tests are left out"
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)
    for item in items:
        if item.get_closest_marker('interpreted') and os.environ.get('TRITON_INTERPRET') != '1':
            item.add_marker(pytest.mark.skip(reason='runs in a process of its own, see interpreted.py'))
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('cuda'):
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def root() -> Path:
    "The root of the repository"
    return ROOT
