"""What every test shares: one thread a process, one seed, the markers, a small corpus and a recipe.

What is tested where: a cell of a notebook shows what a reader should see, and stands beside the code it is
about; `tests/` hold what nobody wants to read in a chapter: properties (against independent truths and over
drawn input), kernels, kills and resumption, and the contracts that every loss and every command keeps.
What is wrong with one of many of a kind (notebooks, claims) is one test that lists every offender. A process
is started only for what is a matter of processes.
"""
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')   # no test may wait for a hub

import numpy as np
import pytest
import torch
from hypothesis import settings
from interpreted import ordered_dots

pytest.register_assert_rewrite('loss_contract', 'helpers')     # so that a failure shows its values

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


def _recording(folder, name, kind, split, wave):
    import soundfile

    from speechloss.common.files import sha256
    from speechloss.corpora import Recording
    path = folder / f'{name}.wav'
    soundfile.write(path, wave, 16000)
    return Recording(id=name, path=str(path), kind=kind, split=split, frames=len(wave), sample_rate=16000,
                     speaker=name if kind == 'speech' else '', sha256=sha256(path),
                     licence='none', source='the tests')


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> str:
    "A manifest of buzzes that come and go, and of noise"
    from speechloss.corpora import Manifest
    folder, rng = tmp_path_factory.mktemp('corpus'), np.random.default_rng(0)
    t, made = np.arange(32000) / 16000, []
    for k, split in enumerate(('train',) * 4 + ('valid', 'test')):
        buzz = sum(np.sin(2 * np.pi * n * (100 + 20 * k) * t) / n for n in range(1, 12))
        made.append(_recording(folder, f's{k}', 'speech', split, .1 * buzz * np.sin(7 * t).clip(0)))
    for split in ('train', 'valid', 'test'):
        made.append(_recording(folder, f'n-{split}', 'noise', split, rng.normal(size=32000) / 20))
    return str(Manifest(tuple(made), name='buzz').save(folder / 'buzz.jsonl'))


@pytest.fixture(scope='session')
def recipe(corpus):
    "Twelve steps of a tiny enhancer"
    from speechloss.training import Recipe
    return Recipe(model='tiny', corpus=corpus, steps=12, steps_per_epoch=4, batch_size=2, seconds=.25,
                  lr=5e-3, warmup=3, eval_every=4, save_every=3, log_every=1, valid_size=1, device='cpu')


@pytest.fixture(scope='session')
def whole(recipe, tmp_path_factory) -> Path:
    "The folder of an undisturbed run of that recipe, trained once: to be read, not to be written into"
    from speechloss.training import train
    torch.set_num_threads(1)
    train(recipe, folder := tmp_path_factory.mktemp('whole') / 'run')
    return folder
