"""The bootstrap against a plain one, its invariances, and its speed."""
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import Interval, compare, paired_bootstrap
from speechloss.metrics.stats import MIN_CLUSTERS


def plain(gap, cluster, draws, seed):
    "Speakers, then files within: as it is said, one draw at a time"
    rng, names = np.random.default_rng(seed), np.unique(cluster)
    means = []
    for _ in range(draws):
        drawn = [rng.choice(gap[cluster == c], (cluster == c).sum())
                 for c in rng.choice(names, len(names))]
        means.append(np.concatenate(drawn).mean())
    return np.array(means)


@pytest.mark.parametrize('sizes', [[6] * 10, [1, 2, 3, 5, 8, 13, 2, 2, 9], [40] + [1] * 12])
def test_agrees_with_the_plain_bootstrap(sizes):
    rng = np.random.default_rng(3)
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    gap = rng.normal(size=len(sizes))[cluster] + rng.normal(size=len(cluster))
    found = paired_bootstrap(gap, 0., cluster=cluster, draws=20_000)
    means = plain(gap, cluster, 4000, seed=1)
    assert found.clustered_by == 'cluster' and found.mean == pytest.approx(gap.mean())
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [.025, .975]),
                                                    abs=.08 * means.std() + .02)


def test_files_alone_give_the_textbook_width():
    gap = np.random.default_rng(0).normal(2, 1, 400)
    found = paired_bootstrap(gap, 0.)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * gap.std() / 20, rel=.04)
    wide, narrow = (paired_bootstrap(gap, 0., level=p) for p in (.99, .5))
    assert wide.low < found.low < narrow.low < narrow.high < found.high < wide.high


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 999))
def test_invariances(n, clusters, seed):
    rng = np.random.default_rng(seed)
    a, b, who = rng.normal(size=n), rng.normal(size=n), rng.integers(clusters, size=n)
    options = dict(cluster=who, draws=300, seed=seed)
    found = paired_bootstrap(a, b, **options)
    assert found == paired_bootstrap(a, b, **options)                      # the seed decides
    assert found.low <= found.high and found.n == n and found.clusters == len(set(who))
    moved = paired_bootstrap(a + 3, b + 1, **options)
    assert [moved.mean, moved.low, moved.high] == pytest.approx(
        [found.mean + 2, found.low + 2, found.high + 2])
    turned = paired_bootstrap(b, a, **options)
    assert [turned.low, turned.high] == pytest.approx([-found.high, -found.low])
    words = paired_bootstrap(a, b, cluster=[f'speaker {k:02}' for k in who], draws=300, seed=seed)
    assert words == found


def test_pairing_is_what_makes_it_sharp():
    rng = np.random.default_rng(1)
    hard, cluster = rng.normal(size=100), np.arange(100) // 10
    a, b = hard + .1 + .02 * rng.normal(size=100), hard + .02 * rng.normal(size=100)
    assert paired_bootstrap(a, b, cluster=cluster).excludes_zero
    assert not paired_bootstrap(a, rng.permutation(b), cluster=cluster).excludes_zero


def test_few_clusters_are_marked():
    x = np.random.default_rng(0).normal(size=40)
    for k in (1, 2, MIN_CLUSTERS - 1, MIN_CLUSTERS, 20):
        found = paired_bootstrap(x, 0., cluster=np.arange(40) % k)
        assert found.clusters == k
        assert found.clustered_by == ('file' if k < MIN_CLUSTERS else 'cluster')
    # NaN can leave too few
    x[np.arange(40) % 8 == 0] = math.nan
    found = paired_bootstrap(x, 0., cluster=np.arange(40) % 8)
    assert (found.clusters, found.clustered_by, found.dropped, found.n) == (7, 'file', 5, 35)


def test_seeds_are_no_files():
    rng = np.random.default_rng(0)
    files = rng.normal(size=30)
    seeds = files + .01 * rng.normal(size=(5, 30))
    assert paired_bootstrap(seeds, 0.).n == 30
    assert paired_bootstrap(seeds, files).mean == pytest.approx((seeds - files).mean())
    seeds[0, 3] = math.nan
    assert paired_bootstrap(seeds, files).dropped == 1


def test_large_sets_are_fast_and_bounded():
    x = np.random.default_rng(0).normal(size=200)
    start = time.perf_counter()
    paired_bootstrap(x, 0., cluster=np.arange(200) // 20)
    paired_bootstrap(x, 0.)
    assert time.perf_counter() - start < 3
    big = np.random.default_rng(0).normal(size=20_000)
    assert paired_bootstrap(big, 0., cluster=np.arange(20_000) // 2000, draws=200).n == 20_000


@pytest.mark.parametrize('call,words', [
    (lambda: paired_bootstrap([1, 2], [1, 2, 3]), 'a has 2 files and b has 3'),
    (lambda: paired_bootstrap(1., [1, 2]), 'same files'),
    (lambda: paired_bootstrap(np.zeros((1, 2, 3)), 0.), r'shape \(1, 2, 3\)'),
    (lambda: paired_bootstrap([], []), 'shape'),
    (lambda: paired_bootstrap([1, 2], 0., cluster=['x']), 'cluster has shape'),
    (lambda: paired_bootstrap([math.nan], 0.), 'nothing to compare'),
    (lambda: paired_bootstrap([1, 2], 0., draws=0), 'draws is 0'),
    (lambda: paired_bootstrap([1, 2], 0., level=95), 'level is 95'),
    (lambda: compare([], [], 'pesq'), 'no rows'),
    (lambda: compare([dict(id=1)], [], 'pesq'), "no 'pesq'"),
])
def test_errors_are_one_sentence(call, words):
    with pytest.raises(SpeechLossError, match=words) as error: call()
    assert '\n' not in str(error.value)


def test_compare_matches_by_identifier():
    rng = np.random.default_rng(0)
    rows = [dict(id=f'{k}', speaker=k % 9, pesq=float(rng.normal())) for k in range(36)]
    better = [{**r, 'pesq': r['pesq'] + .2} for r in rows]
    found = compare([better[k] for k in rng.permutation(36)], rows, 'pesq')
    assert found.mean == pytest.approx(.2) and found.clusters == 9
    assert found.excludes_zero and str(found).startswith('+0.2 [')
    assert compare(better, rows, 'pesq', cluster=None).clusters == 36
    better[0]['pesq'] = math.nan
    assert compare(better, rows, 'pesq').dropped == 1


def test_small_effects_are_visible():
    assert str(Interval(.000123, -.00004567, .3, 9, 9)).startswith('+0.000123 [-4.57e-05, +0.3]')
