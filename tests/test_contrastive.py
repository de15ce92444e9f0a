"""Contrastive regularisation: the formula, the curriculum, and what goes wrong elsewhere."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Half, close_grad, stop_at, untimed, waves, weights
from torch import nn

from speechloss.features import Features, RandomFeatures, STFTFeatures
from speechloss.kernels import contrastive as kernel
from speechloss.losses import (
    ContrastiveRegularization, Curriculum, CompressedComplexLoss, Objective, build,
    curriculum_weights, plot_curriculum, pull_and_push)
from speechloss.losses.contrastive import frame_info_nce
from speechloss.losses.earlier import Earlier
from speechloss.models import enhancer, load_enhancer
from speechloss.training import fit, train, read_log


class Frames(Features):
    "The wave cut into frames of 4 and of 2 samples: features that one can compute by hand"
    names = ('fours', 'twos')
    def forward(self, wave, lengths=None): return [wave.unfold(-1, n, n) for n in (4, 2)]
    def frame_lengths(self, lengths): return [lengths // 4, lengths // 2]


def ccr(features=RandomFeatures, **options):
    return ContrastiveRegularization(features(), reduction='none', **options)


def gradient(loss, enhanced, clean, noisy, **options):
    leaf = enhanced.detach().clone().requires_grad_()
    value = loss(leaf, clean, noisy=noisy, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


# --- the formula ---

@pytest.mark.parametrize('distance', ['l1', 'l2', 'cosine'])
@pytest.mark.parametrize('negatives', [1, 2, 3, 6])
def test_ratio_against_numpy(distance, negatives):
    "Layer by layer, utterance by utterance, in float64 without a line of ours"
    draw = np.random.default_rng(negatives)
    e, s, x, *more = draw.normal(size=(2 + negatives, 3, 40))
    apart = dict(
        l1=lambda a, b: np.abs(a - b).mean(), l2=lambda a, b: ((a - b) ** 2).mean(),
        cosine=lambda a, b: np.mean([1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(a, b)])
    )[distance]
    # without a curriculum the noisy wave counts as much as all others together
    shares = np.array([max(len(more), 1), *np.ones(len(more))]) / (max(len(more), 1) + len(more))
    layer_weights, eps, clamp = {4: 1 / 3, 2: 2 / 3}, .05, 2.
    wanted = []
    for b in range(3):
        ratio = 0
        for size, weight in layer_weights.items():
            cut = [w[b].reshape(-1, size) for w in (e, s, x, *more)]
            far = sum(w * apart(cut[0], n) for w, n in zip(shares, cut[2:]))
            scale = 1 if distance == 'cosine' else apart(cut[1], np.zeros_like(cut[1]))
            ratio += weight * apart(cut[0], cut[1]) / (far + eps * scale)
        wanted.append(ratio / (1 + ratio / clamp))
    loss = ccr(Frames, distance=distance, eps=eps, clamp=clamp)
    given = {f'n{k}': torch.from_numpy(w) for k, w in enumerate(more)}
    found = loss(*map(torch.from_numpy, (e, s)), noisy=torch.from_numpy(x), negatives=given)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_loss_equals_the_reference_of_the_kernel():
    enhanced, clean, noisy = waves(dtype=torch.float64)
    loss = ccr(earlier=Half(), clamp=None, eps=.01).double()
    leaf = enhanced.clone().requires_grad_()
    views = [loss.features(w) for w in (leaf, clean, noisy, loss.earlier['earlier'](noisy))]
    wanted = kernel.contrastive_ratio(views[0], views[1], views[2:], layer_weights=loss.weights, eps=.01,
                                      backend='reference')
    value, grad = gradient(loss, enhanced, clean, noisy)
    torch.testing.assert_close(value, wanted)
    close_grad(grad, torch.autograd.grad(wanted.sum(), leaf)[0], 1e-10)


def test_layer_weights_double_with_depth_and_add_up_to_one():
    assert ccr().weights.tolist() == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert ccr(weights=dict(conv3=3., conv0=1.)).weights.tolist() == [.25, 0, 0, .75]
    for wrong in ([1.], [0.] * 4, [math.inf, 1., 1., 1.], [-1., 1., 1., 1.], dict(conv9=1.)):
        with pytest.raises(ValueError, match='weights .*conv0'): ccr(weights=wrong)


def test_info_nce_is_cross_entropy():
    "torch's own cross-entropy of the right answer among 1 + K, for equal weights"
    e, s, x, n = torch.randn(4, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    def entropy(e):
        scores = torch.stack([nn.functional.cosine_similarity(e, o, dim=-1) for o in (s, x, n)], -1) / .2
        return nn.functional.cross_entropy(scores.flatten(0, 1), torch.zeros(10, dtype=torch.long),
                                           reduction='none').reshape(2, 5)
    even = torch.full((2, 2), .5, dtype=torch.float64)
    found = frame_info_nce(e, s, [x, n], even, temperature=.2)
    torch.testing.assert_close(found, (entropy(e) - entropy(s)).mean(1), rtol=1e-6, atol=1e-8)
    ragged = frame_info_nce(e, s, [x, n], even, temperature=.2, frames=torch.tensor([5, 2]))
    torch.testing.assert_close(ragged[1], (entropy(e) - entropy(s))[1, :2].mean(), rtol=1e-6, atol=1e-8)


# --- the curriculum ---

@pytest.mark.parametrize('scores', [[17.], [17., 19., 31., 32., 36., 40.]], ids=['one negative', 'six negatives'])
@pytest.mark.parametrize('best', [10., 18., 31.5, 36., 50.])
def test_two_states_are_those_of_the_ancestor(scores, best):
    "C2PNet: 1 + g for a negative that scores less than the best validation, 1 - g else; the input gets their number"
    raw = [len(scores), *(1.25 if best > score else .75 for score in scores)]
    found = curriculum_weights(best - torch.tensor(scores, dtype=torch.float64))
    assert found.tolist() == pytest.approx([w / sum(raw) for w in raw])


def test_published_weights():
    assert curriculum_weights(torch.tensor([-1.])).tolist() == pytest.approx([.571, .429], abs=5e-4)
    assert curriculum_weights(torch.tensor([1.])).tolist() == pytest.approx([.444, .556], abs=5e-4)
    assert curriculum_weights(-torch.ones(6))[0] == pytest.approx(.571, abs=5e-4)
    assert curriculum_weights(torch.ones(6))[0] == pytest.approx(.444, abs=5e-4)


def test_smooth_rule_becomes_the_two_states_and_never_jumps():
    margins = torch.linspace(-1, 1, 401)[:, None]
    smooth = curriculum_weights(margins, softness=.1)
    torch.testing.assert_close(smooth[[0, -1]], curriculum_weights(margins[[0, -1]]), rtol=1e-5, atol=0)
    assert (smooth[1:, 1] > smooth[:-1, 1] - 1e-6).all() and (smooth[1:] - smooth[:-1]).abs().max() < .01
    assert (smooth.sum(-1) - 1).abs().max() < 1e-6 and (smooth > 0).all()


def test_each_utterance_switches_when_it_overtakes():
    "The enhanced wave walks from noisy to clean, past the earlier output at half-way"
    _, clean, noisy = waves(1)
    walk = torch.linspace(0, .9, 10)[:, None]
    enhanced, earlier = noisy + walk * (clean - noisy), noisy + .5 * (clean - noisy)
    loss = ccr(curriculum={}, distance='l2')
    loss.curriculum = Spy(loss.curriculum)
    loss(enhanced, clean.expand(10, -1), noisy=noisy.expand(10, -1), negatives=dict(earlier=earlier.expand(10, -1)))
    margins, shares = loss.curriculum.seen
    assert (margins[1:] > margins[:-1]).all()
    assert margins[5].abs() < 1e-4      # at the earlier output itself
    assert shares[:5, 1].tolist() == pytest.approx([3 / 7] * 5) and shares[6:, 1].tolist() == pytest.approx([5 / 9] * 4)


class Spy(nn.Module):
    "Another module, and what last went in and out of it"
    def __init__(self, inner): super().__init__(); self.inner = inner
    def forward(self, x):
        self.seen = x, self.inner(x)
        return self.seen[1]


def test_margins_are_free_of_the_scale_of_layers():
    class Louder(RandomFeatures):
        def forward(self, wave, lengths=None):
            return [1000 ** k * f for k, f in enumerate(super().forward(wave, lengths))]

    given = waves()
    found = []
    for features in (RandomFeatures, Louder):
        loss = ccr(features, earlier=Half(), curriculum=dict(rule='smooth'))
        loss.curriculum = Spy(loss.curriculum)
        loss(given[0], given[1], noisy=given[2])
        found.append(loss.curriculum.seen[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_state_of_the_data_set_survives_and_eval_does_not_move_it():
    loss, given = ccr(earlier=Half(), curriculum=dict(level='dataset', momentum=.5)), waves()
    for seed in range(3):
        e, s, x = waves(seed=seed)
        loss(e, s, noisy=x)
    state = loss.state_dict()
    assert set(state) == {'curriculum.margins', 'curriculum.steps'} and state['curriculum.steps'] == 3
    other = ccr(earlier=Half(), curriculum=dict(level='dataset', momentum=.5))
    other.load_state_dict(state)
    for each in (loss, other): each.eval()
    assert other(given[0], given[1], noisy=given[2]).equal(loss(given[0], given[1], noisy=given[2]))
    assert all(other.state_dict()[name].equal(state[name]) for name in state)


# --- gradients ---

@pytest.mark.parametrize('form', ['ratio', 'info_nce'])
@pytest.mark.parametrize('curriculum', [None, {}, dict(rule='smooth'), dict(level='dataset')],
                         ids=['fixed', 'two-state', 'smooth', 'data set'])
@pytest.mark.parametrize('at', ['noisy', 'clean', 'earlier', 'all equal'])
def test_gradient_is_finite_at(form, curriculum, at):
    _, clean, noisy = waves()
    loss = ccr(earlier=Half(), form=form, curriculum=curriculum)
    if at == 'all equal': noisy = clean
    enhanced = dict(noisy=noisy, clean=clean, earlier=loss.earlier['earlier'](noisy)).get(at, clean)
    value, grad = gradient(loss, enhanced, clean, noisy)
    assert value.isfinite().all() and grad.isfinite().all()
    if at == 'clean': assert not value.any()
    if form == 'ratio': assert (value < loss.clamp).all()


def test_no_gradient_to_clean_noisy_negatives_or_models():
    enhanced, clean, noisy = (w.requires_grad_() for w in waves())
    other = (.3 * clean).detach().requires_grad_()
    model = Half()
    for form in ('ratio', 'info_nce'):
        loss = ccr(earlier=model, form=form, curriculum=dict(level='dataset', others=2))
        loss(enhanced, clean, noisy=noisy, negatives=dict(other=other)).sum().backward()
    assert enhanced.grad.abs().sum() > 0
    assert all(w.grad is None for w in (clean, noisy, other, model.taps))


def test_it_explodes_without_the_clamp_and_not_with_it():
    "On the way from clean to noisy, with the epsilon of the public ports: 1e-7, not relative to anything"
    _, clean, noisy = waves()
    features = RandomFeatures()

    def public(e, s, noisy):
        views = zip(*map(features, (e, s, noisy)))
        return sum((a - b).abs().mean((1, 2)) / ((a - c).abs().mean((1, 2)) + 1e-7) for a, b, c in views)

    def steepest(loss, walk):
        return max(float(gradient(loss, clean + at * (noisy - clean), clean, noisy)[1].norm()) for at in walk)
    walk = (.5, .9, .99, .999, .9999, 1.)
    assert steepest(public, walk) > 1e5 * steepest(public, [.5])
    assert steepest(ccr(), walk) < 1e-3 * steepest(public, walk)
    # nor does it where clean speech is its own noisy wave, as in pairs without noise
    for r in (.1, 1e-3, 1e-4, 1e-5, 0.):
        for loss in (ccr(), ccr(STFTFeatures), ccr(form='info_nce')):
            value, grad = gradient(loss, clean + r * (noisy - clean), clean, clean)
            assert not value.any() and not grad.any()


def test_a_negative_that_is_clean_has_no_weight():
    enhanced, clean, noisy = waves()
    other = clean + .5 * (noisy - clean)
    loss = ccr(curriculum=dict(rule='smooth'))
    weights = loss.inspect(enhanced, clean, noisy=clean, negatives=dict(other=other))
    assert weights['weight.noisy'].tolist() == [0.] * 3 and weights['weight.other'].tolist() == [1.] * 3
    found = loss(enhanced, clean, noisy=clean, negatives=dict(other=other))
    torch.testing.assert_close(found, ccr()(enhanced, clean, noisy=other))
    # one of a batch alone: its mates keep theirs
    mixed = torch.cat([clean[:1], noisy[1:]])
    found = loss(enhanced, clean, noisy=mixed)
    assert found[0] == 0 and found[1:].equal(loss(enhanced, clean, noisy=noisy)[1:])


def test_without_push_negatives_weigh_and_stand_still():
    enhanced, clean, noisy = waves()
    for options in (dict(), dict(earlier=Half(), curriculum={}), dict(clamp=None, distance='cosine')):
        held, free = ccr(push=False, **options), ccr(**options)
        (value, grad), (wanted, whole) = (gradient(loss, enhanced, clean, noisy) for loss in (held, free))
        torch.testing.assert_close(value, wanted)
        close_grad(pull_and_push(free, enhanced, clean, noisy=noisy)[0], grad, 1e-6)
        assert (whole - grad).norm() > .01 * whole.norm()


# --- the bugs of public ports ---

def ported(a, b):
    "What two ports to speech call the distance of two batches: that between the rows of their difference"
    return torch.pdist((a - b).flatten(1), p=1).mean()


def test_the_ported_distance_fails_where_ours_holds():
    enhanced, clean, noisy = waves()
    ratio = lambda e, s, x: ported(e, s) / (ported(e, x) + 1e-7)    # noqa: E731
    mate = torch.cat([enhanced[:1], 5 * enhanced[1:]])
    # ours: an utterance has its value, whoever is beside it
    ours = ccr()
    assert torch.allclose(ours(enhanced, clean, noisy=noisy)[0], ours(mate, clean, noisy=noisy)[0])
    assert torch.allclose(ours(enhanced, clean, noisy=noisy)[:1], ours(enhanced[:1], clean[:1], noisy=noisy[:1]))
    # theirs: no value alone, no distance for an error that all share, and the mates decide the gradient
    assert ratio(enhanced[:1], clean[:1], noisy[:1]).isnan()
    offset = torch.linspace(0, 1, clean.shape[1])
    assert ported(clean + offset, clean) < 1e-4 and (ours(clean + offset, clean, noisy=noisy) > .1).all()
    def grad(batch):
        leaf = batch.clone().requires_grad_()
        return torch.autograd.grad(ratio(leaf, clean, noisy), leaf)[0][0]
    assert (grad(enhanced) - grad(mate)).norm() > .1 * grad(enhanced).norm()


def test_a_ratio_of_batch_means_is_not_ours():
    "The ancestors divide means over the batch: one utterance far from clean drowns the others"
    enhanced, clean, noisy = waves()
    enhanced = torch.cat([enhanced[:1], 50 * enhanced[1:]])
    def batch_mean(rows):
        leaf = enhanced[rows].clone().requires_grad_()
        d = [(leaf - o[rows]).abs().mean() for o in (clean, noisy)]
        return torch.autograd.grad(d[0] / d[1], leaf)[0][0]
    alone, among = batch_mean(slice(0, 1)), batch_mean(slice(0, 3))
    assert among.norm() < .1 * alone.norm()
    ours = [gradient(ccr(), enhanced[rows], clean[rows], noisy[rows])[1][0] for rows in (slice(0, 1), slice(0, 3))]
    close_grad(ours[1], ours[0])


# --- pull and push ---

@pytest.mark.parametrize('options', [dict(), dict(earlier=Half(), curriculum={}, distance='l2', clamp=1.),
                                     dict(distance='cosine', clamp=None)], ids=['l1', 'l2', 'cosine'])
@pytest.mark.parametrize('lengths', [None, [3001, 1877, 2500]])
def test_pull_and_push_add_up_to_the_gradient(options, lengths):
    given, loss = waves(), ccr(**options)
    pull, push = pull_and_push(loss, given[0], given[1], noisy=given[2], lengths=lengths)
    assert loss.training and pull.norm() > 0 and push.norm() > 0 and not loss.observed()
    close_grad(pull + push, gradient(loss, *given, lengths=lengths)[1], 1e-5)
    # a denominator that hardly depends on the negatives leaves the pull alone
    far = ccr(eps=1e6, clamp=None, distance=loss.distance)
    pull, push = pull_and_push(far, given[0], given[1], noisy=given[2])
    assert push.norm() < 1e-4 * pull.norm()
    with pytest.raises(ValueError, match='form ratio'):
        pull_and_push(ccr(form='info_nce'), given[0], given[1], noisy=given[2])


# --- the earlier model ---

def test_kept_outputs_are_those_computed_anew():
    class Counts(Half):
        asked = 0
        def forward(self, wave):
            Counts.asked += len(wave)
            return super().forward(wave)

    _, _, noisy = waves()
    fresh, kept = Earlier(Counts()), Earlier(Counts(), cache=4)
    wanted = fresh(noisy)
    assert Counts.asked == 3
    for _ in range(2): torch.testing.assert_close(kept(noisy), wanted)
    assert Counts.asked == 6 and kept(noisy[:1]).equal(kept(noisy)[:1])
    cut = torch.tensor([2000, 900, 1500])     # other cuts are other utterances, and what lies behind does not count
    for model in (fresh, kept):
        found = model(noisy, cut)
        assert found.shape == noisy.shape
        for row, n, wave in zip(found, cut, noisy):
            torch.testing.assert_close(row[:n], fresh(wave[None, :n])[0])
            assert not row[n:].any()
    assert not kept.state_dict() and not list(kept.parameters())


def test_the_model_may_train_on():
    "A negative is what the model was when the loss was made, and in eval mode"
    model = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 1, 3, padding=1), nn.Dropout(.5), nn.Flatten())
    loss, (enhanced, clean, noisy) = ccr(earlier=model), waves()
    before = loss(enhanced, clean, noisy=noisy)
    with torch.no_grad(): model[1].weight.fill_(3.)
    assert loss.train()(enhanced, clean, noisy=noisy).equal(before)


def test_a_data_set_that_comes_again_asks_each_clip_once(recipe, tmp_path):
    class Counts(Half):
        asked = 0
        def forward(self, wave):
            Counts.asked += len(wave)
            return super().forward(wave)

    e, s, x = waves(6, 1600)
    items = [dict(clean=c, noisy=n) for c, n in zip(s, x)]
    recipe = replace(recipe, model='tiny', steps=9, batch_size=2, log_every=9)
    for cache, asked in ((16, 6), (0, 18)):     # 6 items, 9 steps of 2
        Counts.asked = 0
        loss = Objective(dict(base=CompressedComplexLoss(), extra=ContrastiveRegularization(
            RandomFeatures(), earlier=Counts(), cache=cache)))
        fit(enhancer('tiny'), loss, items, items[:1], recipe, tmp_path / str(cache))
        assert Counts.asked == asked


def test_several_models_by_name():
    loss, (enhanced, clean, noisy) = ccr(earlier=dict(a=Half(), b=nn.Identity()), curriculum={}), waves()
    loss(enhanced, clean, noisy=noisy)
    assert [n for n in loss.observed() if n.startswith('weight.')] == ['weight.noisy', 'weight.a', 'weight.b']


@pytest.mark.parametrize('model,got', [(nn.AvgPool1d(2, 1), r'\(3, 3000\)'), (nn.GRU(3001, 4), 'tuple')])
def test_a_model_of_another_kind(model, got):
    enhanced, clean, noisy = waves()
    with pytest.raises(ValueError, match=f'earlier gives {got}.*shape of its input'):
        ccr(earlier=model)(enhanced, clean, noisy=noisy)


@pytest.mark.parametrize('options,error,sentence', [
    (dict(earlier=[Half()]), TypeError, 'earlier is list'),
    (dict(earlier=nn.ModuleList([Half()])), TypeError, 'ModuleList'),
    (dict(earlier=dict(noisy=Half())), ValueError, "earlier has 'noisy'"),
    (dict(earlier=dict(clean=Half())), ValueError, "earlier has 'clean'"),
    (dict(earlier={'v1.0': Half()}), ValueError, "earlier has 'v1.0'"),
    (dict(earlier=dict(keys=Half())), ValueError, "earlier has 'keys'"),
    (dict(curriculum='smooth'), TypeError, "curriculum is 'smooth'"),
    (dict(earlier=dict(a=Half(), b=Half()), curriculum=Curriculum(level='dataset')), ValueError, 'others=2'),
    (dict(form='info_nce', distance='l2'), ValueError, 'distance is .*info_nce'),
    (dict(form='info_nce', push=False), ValueError, 'push is False'),
    (dict(temperature=.2), ValueError, 'temperature is 0.2.*ratio')])
def test_wrong_options(options, error, sentence):
    with pytest.raises(error, match=sentence) as caught: ccr(**options)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('negatives,error,sentence', [
    (dict(noisy=0), ValueError, "negatives has 'noisy'"), (dict(clean=0), ValueError, "negatives has 'clean'"),
    (dict(earlier=0), ValueError, "negatives has 'earlier'"), ([0], TypeError, 'negatives is a list')])
def test_wrong_negatives(negatives, error, sentence):
    enhanced, clean, noisy = waves()
    negatives = {name: noisy for name in negatives} if isinstance(negatives, dict) else [noisy]
    with pytest.raises(error, match=sentence): ccr(earlier=Half())(enhanced, clean, noisy=noisy, negatives=negatives)


def test_further_negatives_pass_through_an_objective_and_keep_their_names():
    enhanced, clean, noisy = waves()
    more = dict(b=clean + .3 * (noisy - clean), a=-noisy)
    loss = ccr(curriculum=dict(level='dataset', others=2))
    objective = Objective(dict(base=CompressedComplexLoss(), extra=loss), reduction='none')
    parts = objective.terms(enhanced, clean, noisy=noisy, negatives=more)
    assert loss.eval()(enhanced, clean, noisy=noisy, negatives=more).equal(parts['extra'])
    # in another order they are the same negatives
    turned = dict(reversed(more.items()))
    assert loss(enhanced, clean, noisy=noisy, negatives=turned).equal(parts['extra'])
    seen, again = (loss.inspect(enhanced, clean, noisy=noisy, negatives=each) for each in (more, turned))
    assert all(again[name].equal(value) for name, value in seen.items()) and seen['weight.a'][0] != seen['weight.b'][0]


def test_one_clip_at_clean_does_not_move_the_data_set():
    curriculum = Curriculum(level='dataset')
    loss, (enhanced, clean, noisy) = ccr(earlier=Half(), curriculum=curriculum), waves()
    loss(torch.cat([clean[:1], enhanced[1:]]), clean, noisy=noisy)
    alone = ccr(earlier=Half(), curriculum={}).inspect(enhanced, clean, noisy=noisy)['margin.earlier']
    assert curriculum.margins[0] <= (3. + alone[1:].sum()) / 3 + 1e-4


def test_the_running_mean_is_a_plain_mean_at_first():
    curriculum = Curriculum(level='dataset', momentum=.99)
    for margin in (0., .2, .4, .6): curriculum(torch.full((2, 1), margin))
    assert curriculum.margins.item() == pytest.approx(.3)
    both = Curriculum(level='dataset', momentum=.5, others=2)
    both(torch.tensor([[math.nan, .5]]))
    both(torch.tensor([[1., -.5]]))
    assert both.margins.tolist() == pytest.approx([1., 0.]) and both.steps.tolist() == [1, 2]


def test_looking_changes_no_mode():
    loss, (enhanced, clean, noisy) = ccr(earlier=Half(), curriculum={}), waves()
    loss.curriculum.eval()
    modes = [part.training for part in loss.modules()]
    loss.inspect(enhanced, clean, noisy=noisy)
    pull_and_push(loss, enhanced, clean, noisy=noisy)
    assert [part.training for part in loss.modules()] == modes and not loss.observed() and loss.push


def test_pull_and_push_are_those_of_the_loss_wherever_they_are_asked():
    loss, (enhanced, clean, noisy) = ccr(), waves(4)
    wanted = gradient(loss, enhanced, clean, noisy)[1]
    for where in (torch.autocast('cpu', torch.bfloat16), torch.no_grad()):
        with where: close_grad(sum(pull_and_push(loss, enhanced, clean, noisy=noisy)), wanted)
    stereo = [w.reshape(2, 2, -1) for w in (enhanced, clean, noisy)]
    pull, push = pull_and_push(loss, *stereo[:2], noisy=stereo[2])
    close_grad((pull + push).flatten(0, 1), wanted / 2)


# --- in a training ---

def objective(first, **options):
    term = dict(name='contrastive', features='random', earlier=str(first)) | options
    return dict(terms=dict(base='compressed_complex', extra=term), weights=dict(extra=.3), balance='grad')


@pytest.fixture(scope='module')
def first(recipe, tmp_path_factory):
    "The model of stage 1, which makes the second negative"
    return train(replace(recipe, seed=3), tmp_path_factory.mktemp('first') / 'run')


@pytest.mark.parametrize('options', [
    dict(curriculum=dict(level='dataset', rule='smooth')), dict(curriculum={}, cache=8), dict(form='info_nce')],
    ids=['data set', 'kept outputs', 'info_nce'])
def test_stopped_and_resumed(recipe, first, tmp_path, options):
    recipe = replace(recipe, objective=objective(first, **options), init=str(first), log_every=2)
    train(recipe, tmp_path / 'whole')
    for step in (2, 5, 10):
        with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path / 'parts', progress=stop_at(step))
    train(recipe, tmp_path / 'parts')
    assert weights(tmp_path / 'parts/final') == weights(tmp_path / 'whole/final')
    assert untimed(tmp_path / 'parts/log.jsonl') == untimed(tmp_path / 'whole/log.jsonl')


def test_log_and_plot(recipe, first, tmp_path):
    recipe = replace(recipe, objective=objective(first, curriculum={}), init=str(first), clean_fraction=0.)
    train(recipe, tmp_path / 'run')
    rows = read_log(tmp_path / 'run/log.jsonl')
    assert len(rows) == 12 and all(list(row['observed']) == [
        'extra.margin.earlier', 'extra.weight.noisy', 'extra.weight.earlier', 'extra.distance.clean',
        'extra.distance.noisy', 'extra.distance.earlier', 'extra.pull'] for row in rows)
    seen = rows[0]['observed']
    # the training goes on from the model that makes the negative: no distance, no margin, not overtaken
    assert seen['extra.distance.earlier'] < 1e-6 and abs(seen['extra.margin.earlier']) < 1e-5
    assert seen['extra.weight.earlier'] == pytest.approx(3 / 7)
    assert rows[-1]['observed']['extra.distance.earlier'] > 0
    figure = plot_curriculum(rows, 'extra')
    assert [ax.get_title() for ax in figure.axes] == ['distance in feature space', 'margin over', 'weight of']
    figure.savefig(tmp_path / 'curriculum.png')
    with pytest.raises(ValueError, match="'base'"): plot_curriculum(rows, 'base')


def test_key_follows_the_earlier_model_and_the_default_features(recipe, first, tmp_path, monkeypatch):
    from speechloss.common.weights import SHIPPED
    second = train(replace(recipe, seed=4), tmp_path / 'second')
    def key(**options): return replace(recipe, objective=dict(terms=dict(a=dict(name='contrastive') | options))).key

    assert len({key(earlier=str(first)), key(earlier=str(second)), key()}) == 3
    assert key(earlier=dict(a=str(first))) != key(earlier=dict(a=str(second)))
    assert key() == key(features=dict(name='ssl', model='small', layers='conv')) != key(features='stft')
    assert key(features='ssl') == key(features=dict(name='ssl', model='small')) != key()
    # a term may have the name of the option
    odd = dict(terms=dict(base='snr', earlier='wave_l1'), weights=dict(earlier=.3))
    assert replace(recipe, objective=odd).key != replace(recipe, objective=odd | dict(weights=dict(earlier=.4))).key
    before = key()
    monkeypatch.setitem(SHIPPED, 'small', first)
    assert key() != before


def test_built_from_plain_data(first):
    spec = dict(name='contrastive', features='stft', earlier=str(first), curriculum=dict(rule='smooth', softness=.2))
    loss, (enhanced, clean, noisy) = build(spec, load=load_enhancer), waves()
    same = ContrastiveRegularization(STFTFeatures(), earlier=load_enhancer(first),
                                     curriculum=Curriculum(rule='smooth', softness=.2))
    assert loss(enhanced, clean, noisy=noisy) == same(enhanced, clean, noisy=noisy)


def test_without_reconstruction_quality_collapses():
    "From noisy speech on, the ratio alone trades the wave away; beside a reconstruction loss it does not"
    _, clean, noisy = waves(2, 6000)
    def climb(objective):
        leaf = noisy.clone().requires_grad_()
        optimizer = torch.optim.Adam([leaf], lr=2e-3)
        for _ in range(150):
            optimizer.zero_grad()
            objective(leaf, clean, noisy=noisy).backward()
            optimizer.step()
        return (CompressedComplexLoss()(leaf, clean) / CompressedComplexLoss()(noisy, clean)).item()

    def extra(): return ContrastiveRegularization(STFTFeatures(kind='log'))
    alone = climb(extra())
    beside = climb(Objective(dict(base=CompressedComplexLoss(), extra=extra()), weights=dict(extra=.3), balance='grad'))
    assert alone > 2 * beside


# --- two processes ---

MARGINS = torch.linspace(-1, 1.5, 12).reshape(3, 4, 1)


def curriculum_of(rank: int, folder: str):
    torch.set_num_threads(1)
    # a store in a file: ports can be taken between their choice and their use
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    curriculum = Curriculum(level='dataset', momentum=.9)
    found = [curriculum(step[2 * rank:2 * rank + 2]) for step in MARGINS]
    torch.save([found, curriculum.state_dict()], f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_one_curriculum(tmp_path):
    torch.multiprocessing.spawn(curriculum_of, (str(tmp_path),), 2)
    (found, state), (others, other_state) = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    whole = Curriculum(level='dataset', momentum=.9)
    wanted = [whole(step) for step in MARGINS]
    for mine, yours, both in zip(found, others, wanted):
        assert mine.equal(yours)
        torch.testing.assert_close(mine, both[:2])
    assert state['margins'].equal(other_state['margins']) and state['steps'] == 3
    assert math.isclose(state['margins'], whole.margins, rel_tol=1e-6)
