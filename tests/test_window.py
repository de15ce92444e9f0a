"""A window of a loss: equal parts, drawn alike for all waves, whose mean is the value of the whole utterance."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import Half, TinyModel, close_grad, stop_at, untimed, weights
from torch import Tensor, nn

from speechloss.features import CachedFeatures, Features, RandomFeatures, STFTFeatures
from speechloss.losses import (
    CodecLoss, CompressedComplexLoss, ContrastiveRegularization, FeatureDistance, ModelAsLoss, Objective, SSLLoss,
    VQLoss, build, build_objective, pull_and_push)
from speechloss.losses.base import prepare
from speechloss.losses.window import cut_waves
from speechloss.models import enhancer
from speechloss.training import fit, train

RATE = 16000
SECONDS = 4


def steady(waves: int = 2, samples: int = SECONDS * RATE, seed: int = 0, dtype=torch.float32) -> tuple:
    "Enhanced, clean and noisy: coloured noise that is alike in every second"
    draw = torch.Generator().manual_seed(seed)
    clean, rest, noise = .05 * torch.randn(3, waves, samples, generator=draw, dtype=torch.float64)
    clean = (clean + clean.roll(1, -1) + clean.roll(2, -1)) / 2
    return tuple(w.to(dtype) for w in (clean + .3 * rest, clean, clean + .8 * noise))


class Blocks(Features):
    "Spectra of blocks that neither overlap nor reach beyond the wave; counts the waves it was asked for"
    names, sample_rate, asked = ('block',), RATE, 0

    def forward(self, wave, lengths=None):
        self.asked += len(wave)
        return [torch.fft.rfft(wave.unfold(-1, 100, 100)).abs()]

    def frame_lengths(self, lengths): return [lengths // 100]


class Rated(RandomFeatures):
    sample_rate = RATE


class Encoder(TinyModel):
    sample_rate = RATE


def places(wave: Tensor, samples: int, **options) -> tuple[Tensor, object]:
    "First and last sample of each part that is drawn, and the cut waves"
    ramp = torch.arange(1., 1 + wave.shape[-1], dtype=torch.float64).expand_as(wave)
    found = cut_waves(prepare(ramp, ramp, **options), samples)
    ends = (found.lengths - 1)[:, None] if found.lengths is not None else \
        torch.full((len(found.enhanced), 1), found.enhanced.shape[-1] - 1)
    return torch.cat([found.enhanced[:, :1], found.enhanced.gather(1, ends)], 1).long() - 1, found


def every_draw(parts: int):
    "A stand-in for the generator that draws part 0 for all utterances, then part 1, and so on"
    turn = iter(range(10 ** 6))
    return lambda high, size: torch.full(size, (next(turn) % parts) * high // parts + high // (2 * parts))


# --- the draw ---

@pytest.mark.parametrize('size,samples', [(64000, 16000), (64000, 25000), (1003, 250), (7, 2), (9, 4), (100, 99)])
def test_parts_are_equal_and_hold_every_sample(size, samples, monkeypatch):
    parts = -(-size // samples)
    monkeypatch.setattr(torch, 'randint', every_draw(parts))
    seen, sizes = torch.zeros(size, dtype=torch.long), set()
    for part in range(parts):
        (first, last), = places(torch.zeros(1, size), samples)[0].tolist()
        seen[first:last + 1] += 1
        sizes.add(last + 1 - first)
        assert part or first == 0
    assert last == size - 1 and len(sizes) == 1 and sizes == {-(-size // parts)} and max(sizes) <= samples
    assert seen.min() == 1 and seen.max() <= 2 and (seen == 2).sum() < parts    # rounding alone


def test_the_draw_is_uniform():
    torch.manual_seed(3)
    starts = torch.cat([places(torch.zeros(100, 7000), 1000)[0][:, 0] for _ in range(70)]) // 1000
    counts = starts.bincount(minlength=7).double()
    assert len(counts) == 7 and counts.sum() == 7000
    assert ((counts - 1000).square() / 1000).sum() < 16.8     # chi-square, 6 degrees of freedom, p = .01


def test_lengths_bound_the_parts():
    "An utterance is cut within its own length, and one that is not longer than the window is whole"
    lengths, firsts = torch.tensor([1000, 901, 250, 30, 251]), set()
    for _ in range(200):
        found, waves = places(torch.zeros(5, 1000), 250, lengths=lengths)
        assert waves.lengths.tolist() == [250, 226, 250, 30, 126] and waves.enhanced.shape == (5, 250)
        assert (found[:, 1] < lengths).all() and (found[2:4, 0] == 0).all()
        for row, n in zip(waves.enhanced, waves.lengths): assert not row[n:].any() and row[:n].all()
        firsts.add(int(found[4, 0]))
    assert firsts == {0, 125}
    assert places(torch.zeros(2, 1000), 250, lengths=torch.tensor([1000, 500]))[1].lengths is None


def test_all_waves_and_channels_are_cut_alike():
    wave = torch.arange(6000.).reshape(3, 2, 1000).expand(3, 2, 1000)
    found = cut_waves(prepare(wave, wave + 1, noisy=wave + 2, negatives=dict(a=wave + 3, b=wave + 4)), 100)
    for k, other in enumerate((found.clean, found.noisy, *found.negatives.values()), 1):
        assert other.equal(found.enhanced + k)
    first = found.enhanced[:, 0] % 1000
    assert first[::2].equal(first[1::2]) and found.shape == (3, 2) and len(set(first.tolist())) > 1
    alone = cut_waves(prepare(wave[0, 0], wave[0, 0]), 100)
    assert alone.enhanced.shape == (1, 100) and alone.shape == ()


def test_a_seed_says_the_parts():
    loss, given = FeatureDistance(Blocks(), window=.01), steady(samples=8000)[:2]
    def value(seed):
        torch.manual_seed(seed)
        return float(loss(*given))
    assert value(1) == value(1) and len({value(seed) for seed in range(9)}) > 5


# --- the value ---

def mean_over_parts(loss, parts: int, monkeypatch, given) -> Tensor:
    enhanced, clean, noisy = given
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'randint', every_draw(parts))
        return torch.stack([loss.train()(enhanced, clean, noisy=noisy) for _ in range(parts)]).mean(0)


@pytest.mark.parametrize('distance', ['l1', 'l2', 'cosine'])
def test_the_mean_over_the_parts_is_the_whole(distance, monkeypatch):
    "Exactly, for blocks without overlap and parts of whole blocks"
    given = steady(samples=16000, dtype=torch.float64)
    whole, loss = (FeatureDistance(Blocks(), distance=distance, reduction='none', window=w) for w in (None, .1))
    torch.testing.assert_close(mean_over_parts(loss, 10, monkeypatch, given), whole(*given[:2]), rtol=1e-12, atol=0)


def own(**options) -> ModelAsLoss:
    torch.manual_seed(7)
    return ModelAsLoss(enhancer('small'), **options)


# how to make the loss, and how far it may be off: a transformer hears other context in a part
NETWORKS = dict(
    conv=(partial(SSLLoss, layers='conv'), .02), later=(SSLLoss, .2), codec=(CodecLoss, .03), vq=(VQLoss, .05),
    own=(own, .05),
    contrastive=(lambda **options: ContrastiveRegularization(SSLLoss(layers='conv').features, **options), .03))


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_hear_in_parts_what_they_hear_in_all(name, monkeypatch):
    "But for the frames at the seams, on waves that are alike in every second"
    make, tolerance = NETWORKS[name]
    given = steady()
    whole, loss = (make(reduction='none', window=w) for w in (None, 1.))
    wanted = whole(*given[:2], noisy=given[2]).detach()
    assert mean_over_parts(loss, 4, monkeypatch, given).detach() == pytest.approx(wanted, rel=tolerance)
    assert loss.eval()(*given[:2], noisy=given[2]).equal(wanted)        # eval mode hears all


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('lengths', [None, (RATE, 14000)])
def test_the_gradient_is_that_of_the_part(name, lengths):
    make, _ = NETWORKS[name]
    loss, (enhanced, clean, noisy) = make(reduction='sum', window=.25), steady(samples=RATE)
    enhanced.requires_grad_()
    lengths = None if lengths is None else torch.tensor(lengths)
    torch.manual_seed(5)
    loss(enhanced, clean, noisy=noisy, lengths=lengths).backward()
    torch.manual_seed(5)
    found, part = places(enhanced.detach(), RATE // 4, lengths=lengths)
    inner = torch.zeros_like(enhanced, dtype=torch.bool)
    for k, (first, last) in enumerate(found.tolist()):
        inner[k, first:last + 1] = True
        torch.manual_seed(0)
        e = enhanced[k, first:last + 1].detach().requires_grad_()
        loss.eval()(e, clean[k, first:last + 1], noisy=noisy[k, first:last + 1]).backward()
        close_grad(enhanced.grad[k, first:last + 1], e.grad)
    assert not enhanced.grad[~inner].any() and enhanced.grad[inner].any()


@pytest.mark.parametrize('balance', ['none', 'value', 'mean', 'grad'])
def test_every_balance(balance):
    loss, (enhanced, clean, _) = Objective(dict(
        base=CompressedComplexLoss(), extra=FeatureDistance(Rated(), window=.1, balance=balance)),
        balance=balance), steady(samples=8000)
    enhanced.requires_grad_()
    for _ in range(3): loss(enhanced, clean).backward()
    assert enhanced.grad.isfinite().all() and enhanced.grad.abs().min() > 0    # the base loss hears all


@pytest.mark.parametrize('options', [dict(offset=.2), dict(dither_db=-60.), dict(cache=8), dict(checkpoint=True),
                                     dict(balance='grad'), dict(sample_rate=8000)], ids=str)
def test_options_of_the_ssl_loss(options):
    loss, (enhanced, clean, _) = SSLLoss(layers='conv', window=.2, **options), steady(samples=8000)
    enhanced.requires_grad_()
    for _ in range(3):
        assert loss(clean, clean) == 0
        value = loss(enhanced, clean)
        value.backward()
        assert value > 0 and enhanced.grad.isfinite().all()


def test_it_compiles():
    loss, (enhanced, clean, _) = FeatureDistance(Rated(), window=.1), steady(samples=8000)
    torch.manual_seed(2)
    wanted = loss(enhanced, clean)
    torch.manual_seed(2)
    compiled = torch.compile(loss, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(enhanced, clean), wanted)


# --- the contrastive loss ---

def test_earlier_models_hear_the_whole_wave():
    heard = []

    class Hears(Half):
        def forward(self, wave):
            heard.append(wave.shape[-1])
            return super().forward(wave)

    loss, (enhanced, clean, noisy) = ContrastiveRegularization(
        Blocks(), earlier=Hears(), curriculum={}, window=.1, reduction='none'), steady(samples=8000)
    torch.manual_seed(1)
    value = loss(enhanced, clean, noisy=noisy)
    torch.manual_seed(1)
    (first, last), (other, end) = places(enhanced, 1600)[0].tolist()
    assert heard == [8000] and last + 1 - first == 1600
    made = Half()(noisy).detach()
    plain = ContrastiveRegularization(Blocks(), curriculum=dict(others=1), reduction='none')
    for k, (a, b) in enumerate(((first, last + 1), (other, end + 1))):
        wanted = plain(enhanced[k, a:b], clean[k, a:b], noisy=noisy[k, a:b], negatives=dict(earlier=made[k, a:b]))
        torch.testing.assert_close(value[k], wanted)


def test_pull_push_and_inspection_are_of_the_whole():
    loss, plain = (ContrastiveRegularization(Blocks(), window=w) for w in (.1, None))
    enhanced, clean, noisy = steady(samples=8000)
    for mine, its in zip(pull_and_push(loss, enhanced, clean, noisy=noisy),
                         pull_and_push(plain, enhanced, clean, noisy=noisy)): assert mine.equal(its)
    for name, column in loss.inspect(enhanced, clean, noisy=noisy).items():
        assert column.equal(plain.inspect(enhanced, clean, noisy=noisy)[name])
    assert loss.training


# --- what is kept ---

def asked(loss) -> int:
    "The waves without gradient that the features of a loss computed"
    kept = getattr(loss, 'clean_features', loss.features)
    count = [0]
    kept.features.register_forward_hook(lambda _, given, __: count.__setitem__(0, count[0] + len(given[0])
                                                                              * (not given[0].requires_grad)))
    return count


@pytest.mark.parametrize('name', NETWORKS)
def test_parts_are_found_again(name):
    "Two utterances of two parts each are four; then the clean side costs nothing, and the value is the same"
    make, _ = NETWORKS[name]
    enhanced, clean, noisy = steady(samples=RATE)
    enhanced.requires_grad_()
    loss, plain = make(window=.5, cache=8, reduction='none'), make(window=.5, reduction='none')
    count, kept = asked(loss), getattr(loss, 'clean_features', loss.features).kept
    for seed in range(12):
        torch.manual_seed(seed)
        value = loss(enhanced, clean, noisy=noisy)
        torch.manual_seed(seed)
        torch.testing.assert_close(value, plain(enhanced, clean, noisy=noisy), rtol=1e-4, atol=1e-6)
    assert len(kept) == 4
    if name != 'contrastive': assert count == [4]                        # which asks for the noisy wave too
    value.sum().backward()
    assert enhanced.grad.any() and not loss.state_dict()


@pytest.mark.parametrize('make', [FeatureDistance, ContrastiveRegularization])
def test_kept_features_fit_a_batch_with_padding(make):
    "All utterances are shorter than the batch, and spectra have frames of the padding"
    enhanced, clean, noisy = steady(samples=8000)
    enhanced.requires_grad_()
    given = dict(noisy=noisy, lengths=torch.tensor([5000, 4000]))
    wanted = make(STFTFeatures(), reduction='none')(enhanced, clean, **given)
    torch.testing.assert_close(make(STFTFeatures(), cache=4, reduction='none')(enhanced, clean, **given), wanted)


def test_only_frozen_features_are_kept():
    with pytest.raises(ValueError, match="cache is 4 and rule 'dynamic'.*take the rule 'frozen'"):
        ModelAsLoss(Encoder(), rule='dynamic', cache=4)
    class Learning(Blocks):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))
    for make in (FeatureDistance, ContrastiveRegularization):
        with pytest.raises(ValueError, match='Learning has weights that train'): make(Learning(), cache=4)


def test_a_copy_that_was_moved_forgets():
    given = steady(samples=4000)[:2]
    given[0].requires_grad_()
    loss = ModelAsLoss(Encoder(), cache=8)
    loss(*given)
    assert isinstance(loss.features, CachedFeatures) and len(loss.features.kept) == 2
    moved = Encoder()
    with torch.no_grad(): moved.conv.weight.mul_(2)
    for move in (lambda: loss.update(moved), lambda: loss.load_resume_state(ModelAsLoss(moved).resume_state())):
        loss(*given)
        move()
        assert not loss.features.kept
        torch.testing.assert_close(loss(*given), ModelAsLoss(moved)(*given))


# --- recipes and training ---

@pytest.mark.parametrize('spec', [
    dict(name='ssl', layers='conv'), dict(name='codec'), dict(name='vq'), dict(name='model_as_loss'),
    dict(name='contrastive', features='vq'),
    dict(name='feature_distance', features=dict(name='mel', sample_rate=RATE))],
    ids=lambda spec: spec['name'])
def test_by_name(spec):
    loss = build(spec | dict(window=.25, cache=4), model=enhancer('tiny'))
    assert loss.window == .25
    torch.manual_seed(0)
    enhanced, clean, noisy = steady(samples=RATE)
    assert len({float(loss(enhanced, clean, noisy=noisy)) for _ in range(8)}) > 1


@pytest.mark.parametrize('window', [0, -1., float('inf'), float('nan'), '1'])
def test_no_window(window):
    with pytest.raises(ValueError, match=f'window is {window!r}: give seconds above 0'):
        CodecLoss(window=window)


def test_who_tells_the_rate():
    for make in (partial(FeatureDistance, STFTFeatures()), partial(ContrastiveRegularization, RandomFeatures()),
                 partial(ModelAsLoss, TinyModel())):
        with pytest.raises(ValueError, match='nothing tells the rate.*attribute sample_rate in Hz'): make(window=1.)
    assert ModelAsLoss(Encoder(), window=1.).window == 1.
    features = STFTFeatures()
    features.sample_rate = 8000
    loss, wave = FeatureDistance(features, window=1.), torch.ones(1, 20000)
    heard = []
    features.register_forward_hook(lambda _, given, __: heard.append(given[0].shape[-1]))
    loss(wave, wave)
    assert heard == [6667, 6667]      # three parts of at most 8000


def test_too_short_a_window():
    "The features say it"
    loss, (enhanced, clean, _) = SSLLoss(layers='conv', window=.01), steady(samples=8000)
    with pytest.raises(ValueError, match='160 samples at 16000 Hz, too short for the network: give at least 400'):
        loss(enhanced, clean)


WINDOWED = dict(terms=dict(base='compressed_complex', codec=dict(name='codec', layers='output', window=.1),
                           own=dict(name='model_as_loss', window=.07, cache=64)),
                weights=dict(codec=.3), balance='grad')


def test_a_resumed_training_draws_the_same_parts(recipe, tmp_path):
    "Stopped after two and after seven of twelve steps, to the bit"
    recipe = replace(recipe, objective=WINDOWED)
    train(recipe, tmp_path / 'whole')
    for step in (2, 7):
        with pytest.raises(KeyboardInterrupt): train(recipe, tmp_path / 'parts', progress=stop_at(step))
    train(recipe, tmp_path / 'parts')
    for folder in ('final', 'best'): assert weights(tmp_path / 'parts' / folder) == weights(tmp_path / 'whole' / folder)
    assert untimed(tmp_path / 'parts/log.jsonl') == untimed(tmp_path / 'whole/log.jsonl')


def test_three_steps_and_three_are_six(recipe, tmp_path):
    "With a data set of the user's, and a contrastive loss"
    enhanced, clean, noisy = steady(6, 4000)
    items = [dict(clean=c, noisy=n) for c, n in zip(clean, noisy)]
    recipe = replace(recipe, model='tiny', steps=6, save_every=1, batch_size=2)
    terms = dict(base='compressed_complex', extra=dict(name='contrastive', features='vq', window=.1, cache=32))

    def go(folder, **options):
        torch.manual_seed(0)
        model = enhancer('tiny')
        fit(model, build_objective(dict(terms=terms), model=model), items, items[:1], recipe, folder, **options)

    go(tmp_path / 'whole')
    with pytest.raises(KeyboardInterrupt): go(tmp_path / 'parts', progress=stop_at(3))
    go(tmp_path / 'parts')
    assert weights(tmp_path / 'parts/final') == weights(tmp_path / 'whole/final')
