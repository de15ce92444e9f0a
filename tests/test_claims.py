"""The registry of claims, and the verdicts over invented numbers."""
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechloss.metrics import Interval
from speechloss.reproduce import load_claims, Run, kept_results, load_results
from speechloss.reproduce.claims import (
    CLAIM_KINDS, CLAIM_RULES, SCALES, Claim, Verdicts, failures, verdict_on, verdicts_of, outcome_of, number_text)

CLAIMS = load_claims()
finite = st.floats(-10, 10)


def number(value, low=None, high=None, **more):
    return dict(value=value, low=low, high=high, **more)


def claim(**more):
    entry = dict(id='c', paper='p', section='Table 1', claim='It is better.', measure=('x',),
                 holds=dict(kind='interval_above', than=0.), scales=('laptop', 'paper'),
                 kind='expected')
    return Claim(**{**entry, **more})


# ------------------------------------------------------------------------- the registry itself

def ill_said(entry):
    "What is wrong with an entry of the registry: a sentence each"
    if not entry.claim.endswith('.') or len(entry.claim) >= 200: yield f'{entry.id}: a sentence below 200 characters'
    if entry.id != entry.id.lower() or ' ' in entry.id: yield f'{entry.id}: lower case, without spaces'
    if list(entry.scales) != [s for s in SCALES if s in entry.scales]: yield f'{entry.id}: scales in rising order'
    if entry.scales[-1] != 'paper': yield f'{entry.id}: what a small scale can ask, the large one can too'
    if entry.kind == 'expected tie' and entry.holds['kind'] != 'within': yield f'{entry.id}: a tie has a margin'


def test_entries_read_well():
    wrong = [fault for entry in CLAIMS for fault in ill_said(entry)]
    assert CLAIMS and not wrong, '\n'.join(wrong)
    assert len({c.id for c in CLAIMS}) == len(CLAIMS)


def test_kept_verdicts_are_what_the_registry_says_of_kept_numbers():
    for results in kept_results():
        said = verdicts_of(results['paper'], results['numbers'], results['scale']).rows()
        assert results['claims'] == said, results['paper']


def test_smoke_asks_only_what_two_minutes_can_answer():
    asked = [c for c in CLAIMS if 'smoke' in c.scales]
    assert asked and all(c.kind == 'must hold' and not c.holds['kind'].startswith('interval')
                         for c in asked)


# --------------------------------------------------------------------------------------- rules

@given(st.lists(finite, min_size=3, max_size=3))
def test_above_is_the_mirror_of_below(three):
    low, value, high = sorted(three)
    up = outcome_of(dict(kind='interval_above', than=0.), number(value, low, high))
    down = outcome_of(dict(kind='interval_below', than=0.), number(-value, -high, -low))
    assert up == down
    assert (up == 'open') == (low <= 0 <= high)


@given(st.lists(finite, min_size=3, max_size=3), st.floats(.01, 5))
def test_within_is_never_both(three, margin):
    low, value, high = sorted(three)
    said = outcome_of(dict(kind='within', margin=margin), number(value, low, high))
    assert (said == 'holds') == (-margin <= low and high <= margin)
    assert (said == 'fails') == (low > margin or high < -margin)


@given(st.lists(finite, min_size=3, max_size=3))
def test_a_wider_interval_decides_less(three):
    low, value, high = sorted(three)
    for rule in (dict(kind='interval_above', than=0.), dict(kind='within', margin=1.)):
        narrow, wide = (outcome_of(rule, number(value, low - w, high + w)) for w in (0, 2))
        assert wide in (narrow, 'open')


@pytest.mark.parametrize('kind', CLAIM_RULES)
@pytest.mark.parametrize('value', [None, math.nan, math.inf])
def test_what_is_not_a_number_is_missing(kind, value):
    rule = dict(kind=kind, than=0., margin=1.)
    assert outcome_of(rule, number(value, -1, 1)) == 'missing'


@pytest.mark.parametrize('kind', [k for k in CLAIM_RULES if k.startswith('interval') or k == 'within'])
@pytest.mark.parametrize('low, high', [(None, None), (math.nan, 1.), (None, 1.)])
def test_without_an_interval_nothing_is_decided(kind, low, high):
    assert outcome_of(dict(kind=kind, than=0., margin=9.), number(1., low, high)) == 'open'


# ------------------------------------------------------------------------------------ verdicts

WIN, DRAW, LOSS = number(1, .5, 2), number(.1, -.5, 1), number(-1, -2, -.5)


@pytest.mark.parametrize('numbers, wanted', [
    ([WIN, WIN], 'reproduced'), ([WIN, DRAW], 'tied'), ([DRAW, DRAW], 'tied'),
    ([WIN, LOSS], 'not reproduced'), ([WIN, None], 'not measured'), ([LOSS, None], 'not measured')])
def test_all_measures_decide(numbers, wanted):
    names = ('a', 'b')
    given = {k: v for k, v in zip(names, numbers, strict=True) if v}
    assert verdict_on(claim(measure=names), given, 'laptop').verdict == wanted


TIE = dict(holds=dict(kind='within', margin=.3), kind='expected tie')
NARROW, WIDE, OUTSIDE = number(.1, -.1, .2), number(.1, -.4, .6), number(.5, .4, .6)


@pytest.mark.parametrize('numbers, wanted', [
    ([NARROW, NARROW], 'reproduced'), ([NARROW, WIDE], 'undecided'), ([WIDE, WIDE], 'undecided'),
    ([WIDE, OUTSIDE], 'not reproduced'), ([WIDE, None], 'not measured'),
    ([NARROW, number(.1)], 'undecided')])
def test_a_tie_that_the_data_cannot_show_is_not_called_a_tie(numbers, wanted):
    names = ('a', 'b')
    given = {k: v for k, v in zip(names, numbers, strict=True) if v}
    assert verdict_on(claim(measure=names, **TIE), given, 'laptop').verdict == wanted


@given(st.sampled_from(list(CLAIM_RULES)), st.lists(finite, min_size=3, max_size=3))
def test_tied_and_undecided_are_answers_to_different_questions(rule, three):
    low, value, high = sorted(three)
    options = dict(margin=1.) if rule == 'within' else dict(than=0.)
    verdict = verdict_on(claim(holds=dict(kind=rule, **options)), dict(x=number(value, low, high)), 'laptop').verdict
    assert verdict in ('reproduced', 'undecided' if rule == 'within' else 'tied', 'not reproduced')


@pytest.mark.parametrize('scales, scale, wanted', [
    (('laptop', 'paper'), 'smoke', 'needs scale laptop'), (('paper',), 'smoke', 'needs scale paper'),
    (('paper',), 'laptop', 'needs scale paper'), (('smoke',), 'paper', 'needs scale smoke')])
def test_a_claim_is_not_judged_where_it_may_not_be(scales, scale, wanted):
    assert verdict_on(claim(scales=scales), dict(x=LOSS), scale).verdict == wanted


@pytest.mark.parametrize('kind', CLAIM_KINDS)
@pytest.mark.parametrize('value, verdict', [(WIN, 'reproduced'), (DRAW, 'tied'), (LOSS, 'not reproduced')])
def test_only_what_must_hold_fails_the_run(kind, value, verdict):
    shown = Verdicts([verdict_on(claim(kind=kind), dict(x=value), 'laptop')])
    assert shown[0].verdict == verdict
    assert bool(failures(dict(claims=shown.rows()))) == (kind == 'must hold' and verdict != 'reproduced')


@pytest.mark.parametrize('kind', CLAIM_KINDS)
def test_undecided_fails_only_what_must_hold(kind):
    shown = Verdicts([verdict_on(claim(**TIE | dict(kind=kind)), dict(x=WIDE), 'laptop')])
    assert bool(failures(dict(claims=shown.rows()))) == (kind == 'must hold')
    assert '**undecided**' in shown._repr_markdown_() and 'undecided' in str(shown)


def test_a_number_that_was_not_recorded_fails_the_run():
    shown = Verdicts([verdict_on(claim(kind='open'), {}, 'laptop')])
    assert 'not measured' in failures(dict(claims=shown.rows()))[0]


def test_shown_safely():
    shown = Verdicts([verdict_on(claim(claim='a < b | c'), dict(x=WIN), 'laptop')])
    assert 'a &lt; b | c' in shown._repr_html_() and 'a < b \\| c' in shown._repr_markdown_()
    assert 'reproduced' in str(shown) and json.dumps(shown.rows())


# ------------------------------------------------------- the whole registry over invented runs

def answer(entry, good: bool):
    "Numbers that confirm a claim, or refute it"
    rule = entry.holds
    if rule['kind'] == 'within':
        middle = rule.get('of', 0.) + (0. if good else 9 * rule['margin'])
        return number(middle, middle - .5 * rule['margin'], middle + .5 * rule['margin'])
    sign = 1 if rule['kind'] in ('interval_above', 'value_at_least') else -1
    middle = rule['than'] + sign * (1 if good else -1)
    return number(middle, middle - .5, middle + .5)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('good', [True, False])
def test_registry_over_a_run(scale, good, tmp_path):
    for paper in {c.paper for c in CLAIMS}:
        claims, asked = [c for c in CLAIMS if c.paper == paper], []
        for c in claims:    # one by one: two claims may ask the same number opposite questions
            verdict = verdict_on(c, {name: answer(c, good) for name in c.measure}, scale)
            if not verdict.verdict.startswith('needs'): asked.append(verdict)
        numbers = {name: answer(c, good) for c in claims for name in c.measure}
        assert verdicts_of(paper, numbers, scale) == Verdicts(verdict_on(c, numbers, scale) for c in claims)
        assert asked and {v.verdict for v in asked} == {'reproduced' if good else 'not reproduced'}
        assert bool(failures(dict(claims=Verdicts(asked).rows()))) == (not good)


def test_results_from_before_the_seeds_were_kept_read_as_they_did():
    old = number(.2, .1, .3, n=40, clusters=9, clustered_by='cluster', seeds=[0, 1, 2], unit='dB', note='')
    assert number_text('x', old) == number_text('x', old | dict(by_seed=None)) == 'x = +0.2 [+0.1, +0.3] dB, n = 40'
    assert verdict_on(claim(), dict(x=old), 'laptop').verdict == 'reproduced'
    assert number_text('x', old | dict(by_seed=[.1, None, .3])).endswith('n = 40, seeds +0.1 to +0.3')
    assert number_text('x', old | dict(by_seed=[.2])) == number_text('x', old)      # one seed has no spread


def test_results_hold_what_the_interval_held(tmp_path):
    run = Run('p', scale='laptop', seed=3, out=tmp_path, corpus='mini')
    run.record('x', Interval(1., .5, 2., 40, 9, 'cluster', 2, .9), seeds=[3, 4], unit='dB')
    run.record('nan', math.nan, low=-math.inf, note='silent')
    registry = tmp_path / 'claims.toml'
    registry.write_text('[[claim]]\nid="c"\npaper="p"\nsection="1"\nclaim="."\nmeasure=["x","nan"]\n'
                        'holds={kind="interval_above",than=0}\nscales=["laptop"]\nkind="open"\n')
    run.finish(registry)
    results = load_results(run.folder)
    assert results['numbers']['x'] == dict(
        value=1., low=.5, high=2., n=40, clusters=9, clustered_by='cluster', dropped=2, level=.9,
        by_seed=None, seeds=[3, 4], unit='dB', note='')
    assert results['numbers']['nan']['low'] is None
    assert results['claims'][0]['verdict'] == 'not measured' and len(results['failures']) == 1
    assert results['environment']['packages']['torch'] and results['seed'] == 3
