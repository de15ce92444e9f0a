"""The papers on a corpus of real pairs: no mixing, a ratio that is measured, no separate noise."""
import os

import pytest

from speechloss.corpora import Manifest, Mixtures, Recording, get
from speechloss.reproduce import load_results
from speechloss.reproduce.runner import papers, run
from speechloss.reproduce.study import Study
from speechloss.signal import save

#: The quickest; with SPEECHLOSS_ALL_PAPERS=1 all of them, some minutes each
PAPERS = sorted(papers()) if os.environ.get('SPEECHLOSS_ALL_PAPERS') else ['vqscore']


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "A manifest of pairs, made of the mixtures of the small corpus"
    folder, rows = tmp_path_factory.mktemp('pairs'), []
    for split, count in dict(train=24, valid=8, test=12).items():
        grid = Mixtures.grid(get('mini'), split, seconds=3., limit=count)
        for k in range(len(grid)):
            item, name = grid[k], f'{split}{k}'
            for side in ('noisy', 'clean'): save(folder / f'{side}/{name}.wav', item[side], 16000)
            rows.append(Recording(name, str(folder / f'noisy/{name}.wav'), 'pair', split, item['speaker'],
                                  len(item['noisy']), 16000, name, clean_path=str(folder / f'clean/{name}.wav'),
                                  clean_sha256=name))
    return Manifest(tuple(rows), 'pairs').save(folder / 'pairs.jsonl')


@pytest.mark.slow
@pytest.mark.parametrize('paper', PAPERS)
def test_a_paper_runs_on_real_pairs(paper, pairs, tmp_path):
    results = load_results(run(Study(paper, scale='smoke', out=tmp_path, corpus=str(pairs), workers=1), progress=False))
    assert results['claims'] and not results['failures']
