"""The registry of claims, and the verdicts over invented numbers."""
import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import Interval, difference
from speechloss.reproduce import Run, count_verdicts, judge_anew, kept_results, load_claims, load_results, verdicts_of
from speechloss.reproduce.claims import (
    CLAIM_KINDS, CLAIM_RULES, SCALES, Claim, Gate, claims_hash, load_gates, papers_folder)
from speechloss.reproduce.judging import (
    Verdicts, failures, gate_reading, holm, interval_of, number_text, outcome_of, q_values, verdict_on)
from speechloss.reproduce.record import read_scores
from speechloss.reproduce.results import PAPER_ROLES, VERDICTS, changed_verdicts

CLAIMS, GATES = load_claims(), load_gates()
finite = st.floats(-10, 10)


def number(value, low=None, high=None, **more):
    "A number of ten speakers, as a run from before errors were recorded left it"
    return dict(value=value, low=low, high=high, n=100, clusters=10, clustered_by='cluster', level=.95) | more


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
    if entry.kind == 'must hold' and entry.role != 'check': yield f'{entry.id}: what must hold is a check'
    if entry.role in PAPER_ROLES and entry.section == 'ours': yield f'{entry.id}: ours, not the paper\'s'
    if entry.role == 'check' and entry.requires: yield f'{entry.id}: a check is asked whatever the study'


def test_entries_read_well():
    wrong = [fault for entry in CLAIMS for fault in ill_said(entry)]
    assert CLAIMS and not wrong, '\n'.join(wrong)
    assert len({c.id for c in CLAIMS}) == len(CLAIMS)


def test_every_paper_has_one_or_two_primary_claims():
    count = {paper: sum(c.role == 'primary' for c in CLAIMS if c.paper == paper) for paper in {c.paper for c in CLAIMS}}
    assert len(count) == 5 and set(count.values()) <= {1, 2}


def test_every_gate_is_used_and_says_a_sentence():
    assert {name for c in CLAIMS for name in c.requires} == set(GATES)
    assert all(g.says.endswith('.') and len(g.says) < 130 for g in GATES.values())


def test_the_kept_runs_are_judged_anew_and_stay_as_they_were():
    for path in papers_folder().glob('results/*/results.json'):
        before = path.read_bytes()
        kept, anew = load_results(path.parent), judge_anew(load_results(path.parent))
        assert path.read_bytes() == before and anew['claims_of_run'] == kept['claims']
        assert {c['id'] for c in anew['claims']} == {c['id'] for c in kept['claims']}
        assert all(anew['numbers'][k]['value'] == n['value'] for k, n in kept['numbers'].items())
        assert anew['claims'] == verdicts_of(kept['paper'], kept['numbers'], kept['scale']).rows()


def test_the_table_of_changes_is_what_the_rules_say():
    "The committed table, verdicts.csv, beside the kept runs"
    with open(papers_folder() / 'results/verdicts.csv', newline='', encoding='utf-8') as file:
        assert list(csv.DictReader(file)) == [row for run in kept_results() for row in changed_verdicts(run)]


def test_a_scoreboard_counts_claims_of_the_paper_alone():
    rows = [dict(verdict='reproduced', role=role) for role in ('primary', 'secondary', 'ours', 'check')]
    assert count_verdicts(dict(claims=rows))['reproduced'] == 2
    assert count_verdicts(dict(claims=[dict(verdict=v) for v in ('not measured', 'needs scale paper')])) == {
        **dict.fromkeys(VERDICTS, 0), 'not measured': 1, 'needs another scale': 1}


def test_smoke_asks_only_what_two_minutes_can_answer():
    asked = [c for c in CLAIMS if 'smoke' in c.scales]
    assert asked and all(c.role == 'check' and not c.holds['kind'].startswith('interval')
                         for c in asked)


# --------------------------------------------------------------------------------------- rules

@given(st.lists(finite, min_size=3, max_size=3))
def test_above_is_the_mirror_of_below(three):
    low, value, high = sorted(three)
    up = outcome_of(dict(kind='interval_above', than=0.), number(value, low, high))
    down = outcome_of(dict(kind='interval_below', than=0.), number(-value, -high, -low))
    assert up == down
    assert up != 'holds' or value > 0


@given(finite, st.floats(.01, 5), st.floats(.01, 5))
def test_within_is_never_both(value, half, margin):
    said = outcome_of(dict(kind='within', margin=margin), found := number(value, value - half, value + half))
    narrow, wide = interval_of(found).at(.9), interval_of(found).at(.95)
    assert (said == 'holds') == (-margin < narrow.low and narrow.high < margin)
    assert (said == 'fails') == (wide.low > margin or wide.high < -margin)


@given(st.lists(finite, min_size=3, max_size=3))
def test_a_wider_interval_decides_less(three):
    low, value, high = sorted(three)
    for rule in (dict(kind='interval_above', than=0.), dict(kind='within', margin=1.)):
        narrow, wide = (outcome_of(rule, number(value, low - w, high + w)) for w in (0, 2))
        assert wide in (narrow, 'open')
        assert outcome_of(rule, number(value, low, high, by_seed=[value - 1, value, value + 1])) in (narrow, 'open')


def test_nothing_in_zero_is_no_win():
    "A tie that was read as one: the interval of ten speakers holds zero and 0.5"
    wide = number(.187, -.171, .531)
    assert outcome_of(dict(kind='interval_above', than=0.), wide, .1) == 'open'
    assert outcome_of(dict(kind='interval_above', than=0.), number(.02, -.02, .05), .1) == 'tied'


def test_seeds_that_disagree_decide_nothing():
    rule = dict(kind='interval_above', than=0.)
    assert outcome_of(rule, number(-.035, -.0477, -.0213)) == 'fails'
    assert outcome_of(rule, number(-.035, -.0477, -.0213, by_seed=[-.0734, -.0391, .00774])) == 'open'


def test_a_rounding_decides_nothing():
    "Identical arms, as the old interval had them, and as a run records them"
    rule = dict(kind='interval_above', than=0.)
    assert outcome_of(rule, number(5.55e-17, 5.55e-17, 5.55e-17), .05) == 'tied'
    assert outcome_of(rule, number(.000544, 6.72e-18, .00108)) == 'open'
    a, b = np.full((3, 100), .1) + .2, np.full((3, 100), .3)
    same = difference(a, b, [dict(speaker=str(k % 10)) for k in range(100)])
    recorded = dict(value=same.mean, low=same.low, high=same.high, se=same.se, df=same.df)
    assert outcome_of(rule, recorded, .05) == 'tied' and outcome_of(rule, recorded) == 'open'


@pytest.mark.parametrize('kind', CLAIM_RULES)
@pytest.mark.parametrize('value', [None, math.nan, math.inf])
def test_what_is_not_a_number_is_missing(kind, value):
    rule = dict(kind=kind, than=0., margin=1.)
    assert outcome_of(rule, number(value, -1, 1)) == 'missing'


@pytest.mark.parametrize('kind', [k for k in CLAIM_RULES if k.startswith('interval') or k == 'within'])
@pytest.mark.parametrize('low, high', [(None, None), (math.nan, 1.), (None, 1.)])
def test_without_an_interval_nothing_is_decided(kind, low, high):
    assert outcome_of(dict(kind=kind, than=0., margin=9.), number(1., low, high)) == 'open'
    assert verdict_on(claim(), dict(x=number(1., low, high)), 'laptop').verdict == 'undecided'


# ------------------------------------------------------------------------------------ verdicts

WIN, DRAW, LOSS = number(1, .6, 1.4), number(.1, -.5, 1), number(-1, -1.4, -.6)
SMALL = number(.02, 0., .04)   # of an effect of 0.1


@pytest.mark.parametrize('numbers, wanted', [
    ([WIN, WIN], 'reproduced'), ([WIN, DRAW], 'undecided'), ([DRAW, DRAW], 'undecided'),
    ([SMALL, SMALL], 'tied'), ([SMALL, DRAW], 'undecided'), ([WIN, SMALL], 'undecided'),
    ([WIN, LOSS], 'not reproduced'), ([WIN, None], 'not measured'), ([LOSS, None], 'not measured')])
def test_all_measures_decide(numbers, wanted):
    names = ('a', 'b')
    given = {k: v for k, v in zip(names, numbers, strict=True) if v}
    assert verdict_on(claim(measure=names, sesoi=.1), given, 'laptop').verdict == wanted


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


def test_one_number_of_many_on_the_other_side_is_corrected_for_their_count():
    "By chance one of eight numbers lies beyond a 95 % interval in a fifth of all studies"
    against = number(-1, -1.8, -.2)      # p = 0.03 by itself
    names = [f'x{k}' for k in range(8)]
    numbers = dict.fromkeys(names, WIN) | dict(x0=against)
    alone, of_eight = (verdict_on(claim(measure=tuple(names[:k])), numbers, 'laptop') for k in (1, 8))
    assert alone.verdict == 'not reproduced' and of_eight.verdict == 'undecided'


def test_a_failed_gate_makes_it_inadequate_whatever_the_numbers_say():
    gate = Gate('g', 'The base gains 0.3 PESQ.', 'base', dict(kind='value_at_least', than=.3))
    asked = claim(requires=('g',))
    for n, word in ((WIN, 'reproduced'), (LOSS, 'not reproduced'), (DRAW, 'undecided')):
        found = verdict_on(asked, dict(x=n, base=number(.2)), 'laptop', dict(g=gate))
        assert (found.verdict, found.without_gates) == ('inadequate', word) and 'g: The base gains' in found.reason
        assert verdict_on(asked, dict(x=n, base=number(.31)), 'laptop', dict(g=gate)).verdict == word
    assert verdict_on(asked, dict(x=WIN), 'laptop', dict(g=gate)).verdict == 'not measured'
    assert gate_reading(Gate('d', 'From scratch.', designs=('paper',)), {}, 'paper')[0] == 'passes'
    with pytest.raises(SpeechLossError, match='both a number and a rule'): Gate('g', '.', 'x')


def test_primary_claims_pay_for_each_other_and_others_have_q_values(tmp_path):
    blocks = [f"[[claim]]\nid='{k}'\npaper='p'\nsection='1'\nclaim='.'\nmeasure=['{k}']\n"
              "holds={kind='interval_above',than=0}\nscales=['laptop']\nkind='open'\n" for k in 'abcd']
    path = tmp_path / 'claims.toml'
    path.write_text(blocks[0] + "role='primary'\n" + blocks[1] + "role='primary'\n" + blocks[2] + blocks[3])
    weak = number(1, .2, 1.8)            # p = 0.03
    one, two, three, four = verdicts_of('p', dict(a=weak, b=DRAW, c=weak, d=WIN), 'laptop', registry_file=path)
    assert one.corrected == pytest.approx(2 * one.p) and one.verdict == 'undecided' and 'after Holm' in one.reason
    assert three.corrected == pytest.approx(three.p) and three.verdict == four.verdict == 'reproduced'
    assert holm([.04, .001]) == [.04, .002] and q_values([.04, .001]) == [.04, .002]


def test_the_seal_is_over_what_decides_and_not_over_its_words(tmp_path):
    text = (papers_folder() / 'claims.toml').read_text()
    path = tmp_path / 'claims.toml'
    path.write_text(text)
    sealed = {paper: claims_hash(paper, path) for paper in ('model_as_loss', 'vqscore')}
    assert sealed['vqscore'] == claims_hash('vqscore')
    for old, new, changed in (("PESQ stays within 0.03", "PESQ keeps within 0.03", set()),
                              ('margin = 0.03', 'margin = 0.04', {'model_as_loss'}),
                              ("'enhanced/pesq/clean'", "'enhanced/pesq/noisy'", {'vqscore'})):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert {paper for paper in sealed if claims_hash(paper, path) != sealed[paper]} == changed


def test_a_run_says_that_its_claims_were_changed_after_it_began(tmp_path):
    started = Run('vqscore', out=tmp_path, corpus='mini')
    again = Run('vqscore', out=tmp_path, corpus='mini')          # stopped and started: the first seal counts
    assert again.sealed == started.sealed and started.sealed['hash'] == claims_hash('vqscore')
    other = tmp_path / 'claims.toml'
    other.write_text('')
    shown = again.finish(other)
    assert not load_results(again.folder)['sealed']['same'] and 'changed after' in str(shown) + shown._repr_html_()
    later = Run('vqscore', out=tmp_path, corpus='mini')
    later.finish()
    assert load_results(later.folder)['sealed']['same']


def test_scores_of_every_clip_and_seed_are_kept_and_give_the_interval_again(tmp_path):
    rng, run = np.random.default_rng(0), Run('p', out=tmp_path, corpus='mini')
    clips = [dict(id=f'clip {k}', speaker=f's{k % 10}', snr=2.5) for k in range(40)]
    arms = {arm: [[clip | dict(pesq=float(rng.normal(2)), note=None) for clip in clips] for _ in range(3)]
            for arm in 'ab'}
    run.scores('clips', arms)
    run.scores('clips', arms)                                     # a cell that runs twice
    run.finish()
    first = (run.folder / 'scores.csv.gz').read_bytes()
    rows = read_scores(run.folder / 'scores.csv.gz')
    assert len(rows) == 240 and list(rows[0]) == ['table', 'arm', 'seed', 'id', 'speaker', 'snr', 'pesq', 'note']
    of = lambda rows, arm: np.array([r['pesq'] for r in rows if r['arm'] == arm]).reshape(3, 40)
    again = difference(of(rows, 'a'), of(rows, 'b'), clips)
    flat = [dict(arm=arm, **row) for arm in 'ab' for seed in arms[arm] for row in seed]
    assert again.low == pytest.approx(difference(of(flat, 'a'), of(flat, 'b'), clips).low, abs=1e-4)
    run.finish()
    assert (run.folder / 'scores.csv.gz').read_bytes() == first


@pytest.mark.parametrize('scales, scale, wanted', [
    (('laptop', 'paper'), 'smoke', 'needs scale laptop'), (('paper',), 'smoke', 'needs scale paper'),
    (('paper',), 'laptop', 'needs scale paper'), (('smoke',), 'paper', 'needs scale smoke')])
def test_a_claim_is_not_judged_where_it_may_not_be(scales, scale, wanted):
    assert verdict_on(claim(scales=scales), dict(x=LOSS), scale).verdict == wanted


@pytest.mark.parametrize('kind', CLAIM_KINDS)
@pytest.mark.parametrize('value, verdict', [(WIN, 'reproduced'), (DRAW, 'undecided'), (LOSS, 'not reproduced')])
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
        return number(middle, middle - .1 * rule['margin'], middle + .1 * rule['margin'])
    sign = 1 if rule['kind'] in ('interval_above', 'value_at_least') else -1
    middle = rule['than'] + sign * (1 if good else -1)
    return number(middle, middle - .1, middle + .1)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('good', [True, False])
def test_registry_over_a_run(scale, good):
    for paper in {c.paper for c in CLAIMS}:
        claims, asked = [c for c in CLAIMS if c.paper == paper], []
        for c in claims:    # one by one: two claims may ask the same number opposite questions
            names = [name.split('|')[0] for name in c.measure]
            verdict = verdict_on(c, {name: answer(c, good) for name in names}, scale, {
                name: Gate(name, 'Met.', designs=SCALES) for name in c.requires})
            if not verdict.verdict.startswith('needs'): asked.append(verdict)
        words = {True: {'check': 'passes'}, False: {'check': 'fails'}}[good]
        assert asked and all(v.verdict == words.get(v.claim.role, 'reproduced' if good else 'not reproduced')
                             for v in asked)
        assert bool(failures(dict(claims=Verdicts(asked).rows()))) == (not good)


def test_results_from_before_the_seeds_were_kept_read_as_they_did():
    old = number(.2, .15, .25, n=40, clusters=9, seeds=[0, 1, 2], unit='dB', note='')
    assert number_text('x', old) == number_text('x', old | dict(by_seed=None)) == 'x = +0.2 [+0.15, +0.25] dB, n = 40'
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
        value=1., low=.5, high=2., n=40, clusters=9, clustered_by='cluster', noises=1, dropped=2, level=.9,
        se=None, df=None, skew=0., by_seed=None, seeds=[3, 4], unit='dB', note='')
    assert results['numbers']['nan']['low'] is None
    assert results['claims'][0]['verdict'] == 'not measured' and len(results['failures']) == 1
    assert results['environment']['packages']['torch'] and results['seed'] == 3


# --- what the pages may say, and what a design may ask ---

PAGES = ('model_as_loss', 'ssl_representation', 'codec_loss', 'vqscore', 'curricular_contrastive')


def page(paper: str, kind: str) -> str:
    "The text or the code of the chapter of a paper"
    cells = json.loads((papers_folder() / f'{paper}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == kind)


@pytest.mark.parametrize('paper, words', [
    ('model_as_loss', 'with these exceptions'), ('model_as_loss', 'encoder moves'),
    ('vqscore', 'with these exceptions'), ('vqscore', 'undecided, for every choice'),
    ('codec_loss', 'We had only the abstract'), ('ssl_representation', 'We had only the abstract'),
    ('curricular_contrastive', 'We had only the abstract')])
def test_pages_say_what_they_rest_on(paper, words):
    assert words in page(paper, 'markdown').replace('\n', ' ')


def test_pages_claim_no_more_than_their_numbers(root):
    "No interval is 'clear of zero', nothing is a tie because it is not shown to differ"
    forbidden = ('clear of zero', 'tie everywhere', 'The abstract is all', 'no result table is known', 'wins more',
                 'reproduce their papers')
    texts = {paper: page(paper, 'markdown') for paper in PAGES}
    texts |= {name: (root / name).read_text(encoding='utf-8') for name in ('README.md', 'CITATION.cff',
                                                                           'settings.ini')}
    texts |= {path.name: path.read_text(encoding='utf-8') for path in (root / 'nbs/guides').glob('*.ipynb')}
    flat = {name: text.replace('\n', ' ') for name, text in texts.items()}
    assert not [(name, words) for name, text in flat.items() for words in forbidden if words in text]


def test_no_paper_makes_an_interval_by_hand():
    "All are of `speechloss.metrics`, whose coverage is tested"
    made = [(paper, word) for paper in PAGES for word in (' Interval(', 'nanquantile(draws', 'rng.choice(groups')
            if word in page(paper, 'code')]
    assert not made


def test_what_a_small_design_cannot_ask_has_a_gate():
    gates = dict.fromkeys(('ccr-switch', 'ccr-behind'), 'ccr-start') | dict.fromkeys(
        ('vq-enhancer-low', 'vq-attack-codes'), 'codes') | {'mal-refresh': 'encoder-moves'}
    found = {claim.id: claim.requires for claim in load_claims()}
    assert all(gate in found[claim] for claim, gate in gates.items())
    kept = {row['id']: row['verdict'] for paper in PAGES
            for row in judge_anew(load_results(papers_folder() / 'results' / paper))['claims']}
    assert {kept[claim] for claim in gates if claim != 'mal-refresh'} == {'inadequate'}
    assert kept['mal-agreement-frozen-fe'] == kept['ssl-agreement'] == 'undecided'


def test_scale_paper_can_be_had_and_the_headline_is_asked_below_it():
    from speechloss.corpora.corpus import CORPORA
    from speechloss.reproduce.study import CORPUS_OF
    assert CORPUS_OF['paper'] in CORPORA
    assert 'laptop' in next(claim for claim in load_claims() if claim.id == 'mal-dnsmos').scales
