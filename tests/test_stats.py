"""Intervals against scipy and their textbook, their invariances and their coverage."""
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import Interval, bootstrap, compare, compare_tables, difference, paired_interval
from speechloss.metrics.stats import MIN_CLUSTERS
from speechloss.metrics.student_t import t_quantile, t_tail


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_no_difference_of_zero(bad):
    """Infinity less a number, held against infinity, once was taken for a difference that rounding made."""
    a, b = np.arange(9.) ** 2, np.arange(9.)
    want = paired_interval(a[1:], b[1:])
    for side in (a, b):
        whole, side[0] = side[0], bad
        found = paired_interval(a, b)
        assert (found.mean, found.low, found.n, found.dropped) == (want.mean, want.low, 8, 1)
        side[0] = whole


def test_t_is_that_of_scipy():
    t = pytest.importorskip('scipy.stats').t
    for df in (1, 2, 3.7, 9, 60):
        for x in (-4., -.3, 0., 1.5, 12.): assert t_tail(x, df) == pytest.approx(t.sf(x, df), abs=1e-12)
        assert t_quantile(.975, df) == pytest.approx(t.ppf(.975, df))


@pytest.mark.parametrize('sizes', [[6] * 10, [1, 2, 3, 5, 8, 13, 2, 2, 9], [40] + [1] * 12, [7, 8, 9]])
def test_one_seed_is_the_bias_reduced_estimator_over_speakers(sizes):
    "Bell & McCaffrey (2002), written out in matrices: residuals of a speaker by the inverse root of its block"
    rng, sizes = np.random.default_rng(3), np.array(sizes)
    cluster, files = np.repeat(np.arange(len(sizes)), sizes), sizes.sum()
    gap = rng.normal(size=len(sizes))[cluster] + rng.normal(size=files)
    found = paired_interval(gap, 0., cluster=cluster)
    residual, square, columns = np.eye(files) - 1 / files, 0., []
    for k in range(len(sizes)):
        own = np.flatnonzero(cluster == k)
        value, vector = np.linalg.eigh(residual[np.ix_(own, own)])
        ones = vector @ np.diag(value ** -.5) @ vector.T @ np.ones(len(own)) / files
        square += (ones @ residual[own] @ gap) ** 2
        columns.append(residual[own].T @ ones)
    assert found.clustered_by == 'cluster' and found.mean == pytest.approx(gap.mean())
    assert found.se == pytest.approx(math.sqrt(square))
    df, columns = [], np.stack(columns)
    for errors in (np.eye(files), np.equal.outer(cluster, cluster) * 1.):     # files alone differ, or speakers
        inner = columns @ errors @ columns.T
        df.append(np.trace(inner) ** 2 / (inner ** 2).sum())
    assert found.df == pytest.approx(max(min(df), 1))


def test_noises_are_a_factor_crossed_with_speakers():
    "Of one file a cell and no interaction: the mean squares of a two-way design"
    rng = np.random.default_rng(8)
    cells = rng.normal(size=(12, 1)) + rng.normal(size=5) + .1 * rng.normal(size=(12, 5))     # speakers, noises
    who, noise = np.divmod(np.arange(60), 5)
    found = paired_interval(cells.ravel(), 0., cluster=who, noise=noise)
    parts = np.array([cells.mean(1).var(ddof=1) / 12, cells.mean(0).var(ddof=1) / 5, cells.var(ddof=1) / 60])
    wanted = parts[0] + parts[1] - parts[2]
    assert found.se ** 2 == pytest.approx(wanted) and found.noises == 5 and found.n == 60
    assert found.df == pytest.approx(wanted ** 2 / (parts ** 2 / [11, 4, 59]).sum())
    assert found.df < paired_interval(cells.ravel(), 0., cluster=who).df
    alone = paired_interval(cells.ravel(), 0., cluster=who, noise=np.arange(60))              # one a file: no factor
    assert alone == paired_interval(cells.ravel(), 0., cluster=who)
    nested = paired_interval(cells.ravel(), 0., cluster=who, noise=noise // 3 + 2 * who)        # each of one speaker
    assert nested == paired_interval(cells.ravel(), 0., cluster=who) == alone
    with pytest.raises(SpeechLossError, match='noise has 2 names for 60'):
        paired_interval(cells.ravel(), 0., noise=[1, 2])
    clips = [dict(speaker=str(s), noise=f'n{k}') for s, k in zip(who, noise)]
    assert difference(cells.ravel(), 0., clips).se == pytest.approx(found.se)
    for gap in (None, '', np.nan):                            # a file whose noise nobody knows: noise is no factor
        assert paired_interval(cells.ravel(), 0., cluster=who, noise=[gap, *noise[1:]]) == alone
        clips[7]['noise'] = gap
        assert difference(cells.ravel(), 0., clips).se == pytest.approx(alone.se)


def test_seeds_and_speakers_are_the_mean_squares_of_a_crossed_design():
    rng = np.random.default_rng(5)
    cells = rng.normal(size=(3, 1)) + rng.normal(size=12) + rng.normal(size=(3, 12))   # seeds, speakers
    found = paired_interval(np.repeat(cells, 4, 1), 0., cluster=np.repeat(np.arange(12), 4))
    seed, speaker, grand = cells.mean(1), cells.mean(0), cells.mean()
    rest = cells - seed[:, None] - speaker + grand
    parts = np.array([12 * seed.var(ddof=1), 3 * speaker.var(ddof=1), (rest ** 2).sum() / 22]) / 36
    wanted = parts[0] + parts[1] - parts[2]
    assert found.se ** 2 == pytest.approx(wanted)
    assert found.df == pytest.approx(wanted ** 2 / (parts ** 2 / [2, 11, 22]).sum())


def test_files_alone_give_the_textbook_width():
    gap = np.random.default_rng(0).normal(2, 1, 400)
    found = paired_interval(gap, 0.)
    assert (found.high - found.low) / 2 == pytest.approx(1.966 * gap.std(ddof=1) / 20, rel=.01)
    wide, narrow = (paired_interval(gap, 0., level=p) for p in (.99, .5))
    assert wide.low < found.low < narrow.low < narrow.high < found.high < wide.high
    assert found.at(.5) == narrow


def test_identical_arms_are_tied_and_never_better():
    "A rounding cannot decide"
    who = np.repeat(range(10), 10)
    for a, b in ((np.full(100, .1) + .2, np.full(100, .3)), (np.full((3, 100), .3), np.full((3, 100), .1) + .2)):
        same = paired_interval(a, b, cluster=who)
        assert not same.excludes_zero and same.p_above() == 1. and same.p_within(.01) == 0.


def covers(count, icc, seed_sd, skewed, runs=500, level=.95, sizes=None, noise_sd=0.):
    rng, hits = np.random.default_rng(11), 0
    who = np.repeat(np.arange(count), sizes or 10)
    noise = np.arange(len(who)) % 4 if noise_sd else None
    normal = (lambda *size: rng.exponential(size=size) - 1) if skewed else (lambda *size: rng.normal(size=size))
    for _ in range(runs):
        x = math.sqrt(icc) * normal(count)[who] + math.sqrt(1 - icc) * normal(len(who))
        if noise_sd: x = x + noise_sd * rng.normal(size=4)[noise]
        found = paired_interval(x + seed_sd * rng.normal(size=(3, 1)) + .3 * rng.normal(size=(3, len(who))), 0.,
                                cluster=who, noise=noise, level=level)
        hits += found.low <= 0 <= found.high
    return hits / runs


@pytest.mark.parametrize('count, icc, seed_sd, skewed', [(10, 0., .1, False), (10, .9, 0., True), (10, .5, .3, False),
                                                         (15, .5, 0., True), (40, .2, .1, True)])
def test_a_nominal_95_covers_95(count, icc, seed_sd, skewed):
    assert .92 < covers(count, icc, seed_sd, skewed) < .98     # 500 runs: twice 0.01 beside 0.94 to 0.96


@pytest.mark.parametrize('count, more', [(3, {}), (5, {}), (10, dict(noise_sd=.5)),
                                         (10, dict(sizes=[5, 6, 7, 8, 9, 10, 11, 12, 13, 19]))])
def test_few_speakers_unequal_ones_and_noises_cover(count, more):
    assert .92 < covers(count, .5, 0., False, runs=400, **more) < .985


def test_a_speaker_with_most_of_the_files_is_not_ten():
    "Files as facts, or ten equal speakers, would hold the truth one time in five"
    assert covers(10, .5, 0., False, runs=200, sizes=[91] + [1] * 9) > .92


def test_seeds_that_disagree_decide_nothing():
    "Ten speakers who agree on each of three trainings are three facts"
    seeds = np.array([-.073, -.039, .008])[:, None] + .01 * np.random.default_rng(0).normal(size=(3, 50))
    gap = difference(seeds, 0., [dict(speaker=str(k % 10)) for k in range(50)])
    assert gap.low < 0 < gap.high and paired_interval(seeds.mean(0), 0., cluster=np.arange(50) % 10).high < 0


def test_the_jackknife_is_t_for_a_mean_and_wider_than_draws_for_a_correlation():
    rng = np.random.default_rng(2)
    who, (x, y) = np.arange(100) // 10, rng.multivariate_normal([0, 0], [[1, .7], [.7, 1]], size=100).T
    mean, t = bootstrap(lambda k: x[k].mean(), 100, cluster=who), paired_interval(x, 0., cluster=who)
    assert (mean.se, mean.df) == (pytest.approx(t.se), 9)
    few = bootstrap(lambda k: np.corrcoef(x[k], y[k])[0, 1], 100, cluster=who)
    many = bootstrap(lambda k: np.corrcoef(x[k], y[k])[0, 1], 100, cluster=np.arange(100) // 4, draws=400)
    assert few.low < .7 < few.high and few.df == 9 and many.df == 24 and many.clusters == 25
    for one in (few, many):      # what an interval says, its p-value says too
        assert one.p_above(one.low) == pytest.approx(.025) == one.p_below(one.high) and one.at(.95) == one
    assert math.isinf(bootstrap(lambda k: x[k].mean(), 1).high)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 999))
def test_invariances(n, clusters, seed):
    rng = np.random.default_rng(seed)
    a, b, who = rng.normal(size=n), rng.normal(size=n), rng.integers(clusters, size=n)
    options = dict(cluster=who)
    found = paired_interval(a, b, **options)
    assert found.low <= found.high and found.n == n and found.clusters == len(set(who))
    moved = paired_interval(a + 3, b + 1, **options)
    assert [moved.mean, moved.low, moved.high] == pytest.approx(
        [found.mean + 2, found.low + 2, found.high + 2])
    turned = paired_interval(b, a, **options)
    assert [turned.low, turned.high] == pytest.approx([-found.high, -found.low])
    words = paired_interval(a, b, cluster=[f'speaker {k:02}' for k in who])
    assert [words.low, words.high] == pytest.approx([found.low, found.high])


def test_pairing_is_what_makes_it_sharp():
    rng = np.random.default_rng(1)
    hard, cluster = rng.normal(size=100), np.arange(100) // 10
    a, b = hard + .1 + .02 * rng.normal(size=100), hard + .02 * rng.normal(size=100)
    assert paired_interval(a, b, cluster=cluster).excludes_zero
    assert not paired_interval(a, rng.permutation(b), cluster=cluster).excludes_zero


def test_few_clusters_are_marked():
    x = np.random.default_rng(0).normal(size=40)
    for k in (1, 2, MIN_CLUSTERS - 1, MIN_CLUSTERS, 20):
        found = paired_interval(x, 0., cluster=np.arange(40) % k)
        assert found.clusters == k
        assert found.clustered_by == ('file' if k < MIN_CLUSTERS else 'cluster')
    # NaN can leave too few
    x[np.arange(40) % 4 > 1] = math.nan
    found = paired_interval(x, 0., cluster=np.arange(40) % 4)
    assert (found.clusters, found.clustered_by, found.dropped, found.n) == (2, 'file', 20, 20)


def test_seeds_are_no_files():
    rng = np.random.default_rng(0)
    files = rng.normal(size=30)
    seeds = files + .01 * rng.normal(size=(5, 30))
    assert paired_interval(seeds, 0.).n == 30
    assert paired_interval(seeds, files).mean == pytest.approx((seeds - files).mean())
    seeds[0, 3] = math.nan
    assert paired_interval(seeds, files).dropped == 1


def test_large_sets_are_fast_and_bounded():
    x = np.random.default_rng(0).normal(size=200)
    start = time.perf_counter()
    paired_interval(x, 0., cluster=np.arange(200) // 20)
    paired_interval(x, 0.)
    assert time.perf_counter() - start < 3
    big = np.random.default_rng(0).normal(size=20_000)
    assert paired_interval(big, 0., cluster=np.arange(20_000) // 2000).n == 20_000


@pytest.mark.parametrize('call,words', [
    (lambda: paired_interval([1, 2], [1, 2, 3]), 'a has 2 files and b has 3'),
    (lambda: paired_interval(1., [1, 2]), 'same files'),
    (lambda: paired_interval(np.zeros((1, 2, 3)), 0.), r'shape \(1, 2, 3\)'),
    (lambda: paired_interval([], []), 'shape'),
    (lambda: paired_interval([1, 2], 0., cluster=['x']), 'cluster has shape'),
    (lambda: paired_interval([math.nan], 0.), 'nothing to compare'),
    (lambda: paired_interval([1, 2], 0.).at(0), 'level is 0'),
    (lambda: paired_interval([1, 2], 0., level=95), 'level is 95'),
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


def test_tables_are_paired_by_seed_by_mixture_and_count_their_noises():
    rng = np.random.default_rng(0)
    def row(k, seed, gain): return dict(id=f'f{k}', speaker=f's{k % 9}', noise=f'n{k % 4}', seed=seed,
                                        pesq=2 + k / 20 + seed / 3 + gain + float(rng.normal()) / 50)
    a, b = ([row(k, seed, gain) for k in range(36) for seed in range(3)] for gain in (.1, 0.))
    plain, mixed = (compare_tables(dict(b=b, a=rows)).of('a', 'pesq').interval
                    for rows in (a, [a[k] for k in rng.permutation(len(a))]))
    assert mixed == plain == compare(a, b, 'pesq') and plain.noises == 4 and plain.seeds == 3
    other = [r | dict(seed=r['seed'] + 3) for r in b]        # other trainings: what they differ by does not cancel
    assert compare_tables(dict(b=other, a=a)).of('a', 'pesq').interval.se > 5 * plain.se
    # one clean file behind four mixtures is four files, and no seeds
    of = [[dict(file=f'{name}/{k}_{snr}dB.wav', clean=f'clean/{k}.wav', pesq=k / 9 + snr / 10 + gain)
           for k in range(9) for snr in (0, 5, 10, 15)] for name, gain in (('noisy', 0.), ('out', .2))]
    found = compare_tables(dict(noisy=of[0], out=of[1])).of('out', 'pesq').interval
    assert (found.n, found.seeds) == (36, 1) and found.mean == pytest.approx(.2)


def test_files_named_by_seed_are_paired_by_clean():
    noisy = [dict(file=f'n/{k}.wav', clean=f'c/{k}.wav', pesq=1 + k / 9) for k in range(4)]
    named = [dict(file=f'o/{k}_{seed}.wav', clean=f'c/{k}.wav', seed=seed, pesq=2 + k / 9 + seed)
             for seed in (0, 1) for k in range(4)]
    found = compare_tables(dict(noisy=noisy, named=named)).comparisons[0].interval
    assert (found.n, found.seeds) == (4, 2) and found.mean == pytest.approx(1.5)


def test_small_effects_are_visible():
    assert str(Interval(.000123, -.00004567, .3, 9, 9)).startswith('+0.000123 [-4.57e-05, +0.3]')
