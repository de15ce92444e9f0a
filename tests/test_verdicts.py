"""Words for a difference: *tied* is shown, never assumed."""

import math

import numpy as np
import pytest

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import SMALLEST_EFFECTS, difference_verdict, paired_interval
from speechloss.metrics.cards import COLUMNS
from speechloss.metrics.verdicts import VERDICT_WORDS


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
