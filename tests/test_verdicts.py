"""Words for a difference: *tied* is shown, never assumed."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import SMALLEST_EFFECTS, difference, difference_verdict, paired_interval
from speechloss.metrics.cards import COLUMNS
from speechloss.metrics.verdicts import VERDICT_WORDS
from speechloss.reproduce.claims import Claim
from speechloss.reproduce.judging import holm, q_values, verdict_on
from speechloss.reproduce.results import INTERVAL


def test_every_opinion_and_ratio_has_a_smallest_effect():
    wanted = {name for name, card in COLUMNS.items() if card.unit in ('MOS', 'MOS-LQO', 'dB')}
    missing = wanted - SMALLEST_EFFECTS.keys()
    assert not missing and all(effect > 0 for effect in SMALLEST_EFFECTS.values())


def test_identical_systems_are_neither_better_nor_worse():
    same = paired_interval(np.full(100, .1) + .2, np.full(100, .3), cluster=np.repeat(range(10), 10))
    assert same.low == same.high == 0        # and not 5.6e-17, which is above zero
    assert difference_verdict((same.low, same.high)) == 'undecided'
    assert difference_verdict((same.low, same.high), None, .05) == 'tied'


def test_a_wide_interval_around_zero_is_no_tie():
    assert difference_verdict((-.17, .53), None, .1) == 'undecided'
    assert difference_verdict((-math.inf, math.inf), None, .1) == 'undecided'


@pytest.mark.parametrize('low, high', [(.01, .2), (-.2, -.01), (-.01, .02), (-.5, .5)])
def test_lower_is_better_mirrors_higher(low, high):
    mirrored = dict(zip(VERDICT_WORDS, ('worse', 'better', 'tied', 'undecided')))
    assert difference_verdict((low, high), None, .05, direction='lower') == mirrored[
        difference_verdict((low, high), None, .05)]


def test_a_smallest_effect_of_zero_is_refused():
    with pytest.raises(SpeechLossError, match='give a difference that matters'): difference_verdict((0, 1), None, 0.)


def test_corrections_are_those_of_the_textbook():
    "q-values by scipy; Holm as the closure of Bonferroni tests (Marcus, Peritz & Gabriel 1976)"
    control = pytest.importorskip('scipy.stats').false_discovery_control
    rng = np.random.default_rng(4)
    for count in (1, 2, 5):
        p = [*rng.uniform(size=count) ** 3, 0., 1.]
        assert q_values(p) == pytest.approx(list(control(p)))
        sets = [held for held in product((False, True), repeat=len(p)) if any(held)]
        closed = [max(min(1., sum(held) * min(x for x, inside in zip(p, held) if inside)) for held in sets if held[k])
                  for k in range(len(p))]
        assert holm(p) == pytest.approx(closed)


@pytest.mark.parametrize('truth, wrong', [(0., ('reproduced', 'not reproduced')), (.05, ('tied', 'not reproduced')),
                                          (-.05, ('tied', 'reproduced'))])
def test_a_verdict_is_wrong_one_time_in_twenty(truth, wrong):
    "Ten speakers, three seeds, a claim of a difference whose smallest effect is 0.05"
    rng, who, clips = np.random.default_rng(6), np.arange(50) % 10, [dict(speaker=str(k % 10)) for k in range(50)]
    claim = Claim(id='a', paper='p', section='s', claim='c', measure=('pesq/a-b',), scales=('laptop',), kind='open',
                  holds=dict(kind='interval_above', than=0.))
    said = Counter()
    for _ in range(300):
        gap = truth + .04 * rng.normal(size=10)[who] + .04 * rng.normal(size=50) + .01 * rng.normal(size=(3, 1))
        found = difference(gap + .02 * rng.normal(size=(3, 50)), 0., clips)
        number = dict(value=found.mean, **{k: getattr(found, k) for k in INTERVAL})
        said[verdict_on(claim, {'pesq/a-b': number}, 'laptop').verdict] += 1
    assert sum(said[word] for word in wrong) < 300 * .08, said     # 0.05, and twice the error of 300
    assert len(said) > 1, said
