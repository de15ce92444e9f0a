"""The contrastive ratio against the plain formula in float64; the gradient is judged first."""
import pytest
import torch
from cuda_graph import replayed
from interpreted import run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from speechloss.kernels import contrastive as module
from speechloss.kernels import contrastive_torch as blocks
from speechloss.kernels.contrastive import DISTANCES, contrastive_ratio, contrastive_terms

#: (B, T, D) of the first layer, layers, negatives
SHAPES = [((1, 1, 1), 1, 1), ((2, 41, 401), 2, 2), ((3, 199, 768), 1, 3), ((2, 13, 9), 13, 5)]
#: relative L2 floor of the gradient, floor of the value, factor on grad_output
DTYPES = {torch.float32: (1e-6, 1e-6, 1.), torch.bfloat16: (4e-3, 1e-6, 1.), torch.float16: (1e-3, 1e-6, 2. ** 12)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', 5000)


def example(shape, layers, negatives, *, dtype=torch.float32, lengths=False, seed=0, uneven=False, device='cpu'):
    "Layers of enhanced, clean and negatives, and the options of a call; frames and dims shrink with depth"
    draw = torch.Generator().manual_seed(seed)
    B, T, D = shape
    shapes = [(B, max(1, T - 3 * l), max(1, D - 2 * l)) for l in range(layers)]
    stacks = [[torch.randn(s, generator=draw) for s in shapes] for _ in range(1 + negatives)]
    enhanced = [c + .3 * torch.randn(s, generator=draw) for c, s in zip(stacks[0], shapes)]
    if uneven:     # frames of all sizes, some silent, some nearly equal
        for stack in (enhanced, *stacks):
            for x in stack: x *= 10. ** torch.randint(-4, 3, (*x.shape[:2], 1), generator=draw)
        for e, c in zip(enhanced, stacks[0]):
            c[:, ::5], e[:, 3::7] = 0., c[:, 3::7] * (1 + 1e-4 * torch.randn(c[:, 3::7].shape, generator=draw))
    options = dict(weights=torch.rand(B, negatives, generator=draw) + .1,
                   layer_weights=[2. ** -l for l in range(layers)])
    if lengths: options['frames'] = [torch.linspace(max(1, s[1] // 3), s[1], B).long() for s in shapes]
    if lengths: options['frames'] = [x.to(device) for x in options['frames']]
    options['weights'] = options['weights'].to(device)
    enhanced, *stacks = ([x.to(device, dtype) for x in layer] for layer in (enhanced, *stacks))
    return [e.requires_grad_() for e in enhanced], stacks[0], stacks[1:], options


def plain(enhanced, clean, negatives, *, weights, layer_weights, frames=None, distance='l1', eps=1e-3, squash=None):
    "The formula as one would write it, an utterance at a time, in the dtype of the tensors"
    def apart(a, b):
        if distance == 'l1': return (a - b).abs().mean()
        if distance == 'l2': return (a - b).pow(2).mean()
        a, b = (torch.cat([x, torch.full_like(x[:, :1], 1e-4)], -1) for x in (a, b))
        return (1 - torch.cosine_similarity(a, b, dim=-1)).mean()
    values = []
    for b in range(len(enhanced[0])):
        value = 0
        for l, w in enumerate(layer_weights):
            e, c, *n = (x[l][b, :None if frames is None else int(frames[l][b])] for x in (enhanced, clean, *negatives))
            size = 1 if distance == 'cosine' else apart(c, torch.zeros_like(c))
            push = sum(v * apart(e, x) for v, x in zip(weights[b].to(e.dtype), n))
            value = value + w * apart(e, c) / (push + eps * (size + 1e-8))
        values.append(value)
    return torch.stack(values)


def cast(stack, dtype): return [x.detach().to(dtype) for x in stack]


def error(a, b): return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def check_rule(shape, layers, negatives, distance, dtype, backend, lengths=False, device='cpu', uneven=False):
    e, c, n, options = example(shape, layers, negatives, dtype=dtype, lengths=lengths, device=device, uneven=uneven)
    floor, value_floor, factor = DTYPES[dtype]
    weight, results = factor * torch.linspace(.5, 1., shape[0], device=device), {}
    for kind, dt in dict(fast=dtype, plain=torch.float32, true=torch.float64).items():
        leaves = [x.requires_grad_() for x in cast(e, dt)]
        function, more = (contrastive_ratio, dict(backend=backend)) if kind == 'fast' else (plain, {})
        value = function(leaves, cast(c, dt), [cast(x, dt) for x in n], distance=distance, **options, **more)
        grads = torch.autograd.grad(value, leaves, weight.to(value.dtype))
        assert [g.dtype for g in grads] == [dt] * layers
        results[kind] = value.detach(), torch.cat([g.double().flatten() / factor for g in grads])
    (fast, fast_grad), (rough, rough_grad), (true, true_grad) = results.values()
    assert fast.dtype == torch.float32 and fast.shape == shape[:1]
    if true_grad.norm() > 1e-7: assert error(fast_grad, true_grad) <= 2 * error(rough_grad, true_grad) + floor
    else: assert fast_grad.norm() < 1e-6      # the cosine of a single dim hardly has a gradient
    assert (fast - true).abs().max() <= 2 * (rough - true).abs().max() + value_floor * (1 + true.abs().max())


@pytest.mark.parametrize('lengths', [False, True], ids=['whole', 'lengths'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('case', SHAPES, ids=str)
def test_gradient_error_is_at_most_twice_the_plain_one(case, distance, dtype, lengths):
    check_rule(*case, distance, dtype, 'torch', lengths)


@pytest.mark.parametrize('distance', DISTANCES)
def test_frames_of_all_sizes(distance):
    check_rule((2, 97, 130), 2, 2, distance, torch.float32, 'torch', uneven=True)


def test_values_computed_by_hand():
    e, c, n = [[torch.tensor(x)[None]] for x in ([[1., 1.], [1., 1.]], [[0., 1.], [2., 1.]], [[4., 1.], [1., 1.]])]
    both = contrastive_terms(e, c, [n, c], weights=torch.tensor([2., 1.]), layer_weights=[3.], eps=1e-6)
    # |e - c| is 1/2 on average, |e - n| 3/4
    torch.testing.assert_close(both.distances, torch.tensor([[[.5, .75, .5]]]))
    torch.testing.assert_close(both.denominators, torch.tensor([[2.]]))
    torch.testing.assert_close(both.values, torch.tensor([.75]))
    squares = contrastive_terms(e, c, [n], distance='l2', eps=1e-6)
    torch.testing.assert_close(squares.distances, torch.tensor([[[.5, 2.25]]]))
    corner = contrastive_terms([torch.tensor([[[1., 0.]]])], [torch.tensor([[[0., 2.]]])],
                               [[torch.tensor([[[-3., 0.]]])]], distance='cosine')
    torch.testing.assert_close(corner.distances, torch.tensor([[[1., 2.]]]))


def test_terms_are_the_parts_of_the_values():
    e, c, n, options = example((3, 20, 7), 3, 2)
    terms = contrastive_terms(e, c, n, **options)
    share = torch.tensor(options['layer_weights']) * terms.numerators / terms.denominators
    torch.testing.assert_close(terms.values, share.sum(1))
    assert terms.values.requires_grad and not any(x.requires_grad for x in terms[1:])
    assert torch.equal(terms.distances[..., 0], terms.numerators) and terms.distances.shape == (3, 3, 3)
    for x, y in zip(contrastive_terms(e, c, n, backend='reference', **options), terms):
        torch.testing.assert_close(x, y)


def test_weights_may_be_shared_by_utterances_or_left_out():
    e, c, n, options = example((3, 20, 7), 2, 2)
    one = contrastive_ratio(e, c, n, weights=torch.tensor([.3, .7]))
    each = dict(weights=torch.tensor([[.3, .7]] * 3), layer_weights=torch.ones(2))
    assert torch.equal(one, contrastive_ratio(e, c, n, **each))
    half = contrastive_ratio(e, c, n, weights=torch.tensor([.5, .5]))
    assert torch.equal(half, contrastive_ratio(e, c, n))


@pytest.mark.parametrize('distance', DISTANCES)
def test_derivatives_in_float64(distance):
    e, c, n, options = example((2, 4, 3), 2, 2, dtype=torch.float64, lengths=True)
    def call(backend):
        return lambda *x: contrastive_ratio(list(x), c, n, distance=distance, backend=backend, **options)
    assert torch.autograd.gradcheck(call('torch'), e)
    assert torch.autograd.gradcheck(call('reference'), e)
    assert torch.autograd.gradgradcheck(call('reference'), e)


@pytest.mark.parametrize('distance', DISTANCES)
def test_a_second_derivative_is_an_error_and_not_a_zero(distance):
    e, c, n, options = example((2, 4, 3), 1, 1)
    grad, = torch.autograd.grad(contrastive_ratio(e, c, n, distance=distance, **options).sum(), e, create_graph=True)
    with pytest.raises(RuntimeError, match='contrastive_backward'): grad.sum().backward()


def test_the_gradient_reaches_enhanced_alone():
    e, c, n, options = example((2, 9, 5), 2, 2)
    for x in (*c, *n[0], *n[1], options['weights']): x.requires_grad_()
    for backend in 'torch', 'reference':
        for distance in DISTANCES:
            contrastive_ratio(e, c, n, distance=distance, backend=backend, **options).sum().backward()
    assert all(x.grad is None for x in (*c, *n[0], *n[1], options['weights']))
    assert all(x.grad is not None for x in e)
    with torch.no_grad(): assert not contrastive_ratio(e, c, n, **options).requires_grad


@pytest.mark.parametrize('distance', DISTANCES)
def test_batch_mates_and_padding_do_not_matter(distance):
    e, c, n, options = example((3, 50, 33), 2, 4, lengths=True)
    def run(rows, e, c, n, **more):
        leaves = [x[rows].detach().requires_grad_() for x in e]
        values = contrastive_ratio(leaves, [x[rows] for x in c], [[x[rows] for x in s] for s in n],
                                   distance=distance, **more)
        return values, *torch.autograd.grad(values.sum(), leaves)
    def of(rows): return dict(options, weights=options['weights'][rows], frames=[f[rows] for f in options['frames']])
    whole = run(slice(None), e, c, n, **of(slice(None)))
    for _ in range(2):
        for a, b in zip(run(slice(None), e, c, n, **of(slice(None))), whole): assert torch.equal(a, b)
    for b in range(3):
        rows = slice(b, b + 1)
        for a, full in zip(run(rows, e, c, n, **of(rows)), whole): assert torch.equal(a, full[rows])
    order = [2, 0, 1]
    for a, full in zip(run(order, e, c, n, **of(order)), whole): assert torch.equal(a, full[order])
    for stack in (e, c, *n):     # whatever lies in the padding
        for layer, frames in zip(stack, options['frames']):
            for b, valid in enumerate(frames): layer.detach()[b, valid:] = torch.nan
    for backend in 'torch', 'reference':
        again = run(slice(None), e, c, n, backend=backend, **of(slice(None)))
        for a, full in zip(again, whole):
            torch.testing.assert_close(a, full)
            assert backend == 'reference' or torch.equal(a, full)
    for grad, frames in zip(again[1:], options['frames']):
        assert not any(grad[b, valid:].any() for b, valid in enumerate(frames))


@pytest.mark.parametrize('distance', DISTANCES)
def test_identity_silence_and_the_negative_itself(distance):
    e, c, n, _ = example((2, 9, 5), 2, 2)
    silence = [torch.zeros_like(x) for x in c]
    def run(e, c, n):
        leaves = [x.detach().requires_grad_() for x in e]
        values = contrastive_ratio(leaves, c, n, distance=distance)
        grads = torch.autograd.grad(values.sum(), leaves)
        assert values.isfinite().all() and all(g.isfinite().all() for g in grads)
        return values, grads
    assert torch.equal(run(c, c, n)[0], torch.zeros(2))          # identity is exactly 0
    at_negative, grads = run(n[0], c, n[:1])                     # bounded by 1 / eps, and it pushes or pulls
    assert (at_negative < 1.1e3 * 2 * 3).all() and all(g.any() for g in grads)
    run(e, silence, n); run(silence, c, n); run(silence, silence, [silence]); run(silence, silence, n)


def test_without_its_epsilon_the_ratio_would_explode():
    "What public ports do, an absolute 1e-7, against ours, at an enhanced wave next to the noisy one"
    e, c, n, _ = example((1, 20, 16), 1, 1)
    near = [n[0][0] + 1e-6 * torch.randn_like(e[0])]
    theirs = (near[0] - c[0]).abs().mean() / ((near[0] - n[0][0]).abs().mean() + 1e-7)
    ours = contrastive_ratio(near, c, n)
    assert theirs > 1e5 and ours < 2e3


def test_a_broken_utterance_hurts_itself_alone():
    for distance in DISTANCES:
        e, c, n, _ = example((3, 9, 5), 1, 2)
        with torch.no_grad(): e[0][1, 3] = torch.nan
        values = contrastive_ratio(e, c, n, distance=distance)
        grad, = torch.autograd.grad(values.sum(), e)
        assert values.isnan().tolist() == [False, True, False]
        assert grad[[0, 2]].isfinite().all() and grad[1].isnan().any()


def test_any_strides_offsets_and_grad_outputs():
    for distance in DISTANCES:
        e, c, n, options = example((3, 20, 8), 1, 2)
        options['distance'] = distance
        values = contrastive_ratio(e, c, n, **options)
        weight = torch.linspace(-1, 1, 3)
        expected, = torch.autograd.grad(values, e, weight)
        across = e[0].detach().mT.contiguous().mT.requires_grad_()              # channels first in memory
        sliced = torch.full((3, 41, 20), torch.nan)[:, 1::2, 5:13].copy_(c[0])
        spread = n[0][0].flip(1).contiguous().flip(1)
        again = contrastive_ratio([across], [sliced], [[spread], n[1]], **options)
        torch.testing.assert_close(again, values)
        strided = torch.stack([weight, weight], 1)[:, 0]
        torch.testing.assert_close(torch.autograd.grad(again, across, strided)[0], expected, rtol=1e-5, atol=1e-7)
        summed, = torch.autograd.grad(contrastive_ratio(e, c, n, **options).sum(), e)   # stride 0
        ones, = torch.autograd.grad(contrastive_ratio(e, c, n, **options), e, torch.ones(3))
        assert torch.equal(summed, ones)
        shared = c[0][:1].expand(3, -1, -1)
        assert torch.equal(contrastive_ratio(e, c, [[shared]]), contrastive_ratio(e, c, [[shared.clone()]]))


def test_inputs_and_weights_may_change_before_backward():
    e, c, n, options = example((2, 20, 8), 1, 2)
    expected, = torch.autograd.grad(contrastive_ratio(e, c, n, **options).sum(), e)
    values = contrastive_ratio(e, c, n, **options)
    with torch.no_grad():
        for x in (*e, *c, *n[0], options['weights']): x.zero_()
    assert torch.equal(torch.autograd.grad(values.sum(), e)[0], expected)     # l1 kept signs alone
    e, c, n, options = example((2, 20, 8), 1, 2)
    values = contrastive_ratio(e, c, n, distance='l2', **options)
    c[0].zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): values.sum().backward()


class Largest(TorchDispatchMode):
    "The largest tensor that any operation returns, in bytes"
    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x._base is None and not function.is_view:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('negatives', [1, 3, 4])
def test_memory_is_a_block_and_the_packed_signs(distance, negatives):
    e, c, n, options = example((4, 100, 200), 3, negatives)
    flat = [x for s in n for x in s]
    signs = sum(x.numel() for x in e) * -(-(1 + negatives) // 4) if distance == 'l1' else 0
    if distance == 'cosine': signs = 4 * 2 * (1 + negatives) * sum(x.shape[0] * x.shape[1] for x in e)
    with torch.no_grad(), Largest() as seen:     # the operator hides what happens inside it
        kept = blocks.sums(e, c, flat, None, distance, True, torch.float32)[2]
    assert kept.numel() * kept.element_size() == signs
    assert seen.nbytes <= max(signs, 4 * blocks.BLOCK + 4096)
    kept = {}
    def keep(x): kept[x.data_ptr()] = x.numel() * x.element_size(); return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): contrastive_ratio(e, c, n, distance=distance)
    inputs = 0 if distance == 'l1' else sum(4 * x.numel() for x in (*e, *c, *flat))
    assert sum(kept.values()) <= signs + inputs + 4096


@pytest.mark.parametrize('distance', DISTANCES)
def test_operators_pass_opcheck(distance):
    e, c, n, options = example((2, 7, 5), 2, 2, lengths=True)
    flat, frames = [x for s in n for x in s], torch.stack(options['frames'])
    for lengths in None, frames:
        torch.library.opcheck(module._contrastive, (e, c, flat, options['weights'], torch.ones(2), lengths,
                                                    distance, 1e-3, True, 'torch'))
    plain_e = [x.detach() for x in e]
    _, distances, sizes, codes = module._contrastive(plain_e, c, flat, options['weights'], torch.ones(2), frames,
                                                     distance, 1e-3, True, 'torch')
    torch.library.opcheck(module._contrastive_backward, (
        torch.ones(2), [] if distance == 'l1' else [*plain_e, *c, *flat], codes, [s for x in e for s in x.shape],
        distances, sizes, options['weights'], torch.ones(2), frames, distance, 1e-3, torch.float32, 'torch'))


@pytest.mark.parametrize('distance', DISTANCES)
def test_compiles_in_one_graph(distance):
    e, c, n, options = example((2, 20, 8), 2, 2, lengths=True)
    def loss(*x): return contrastive_ratio(list(x), c, n, distance=distance, **options).square().mean()
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    expected = loss(*e)
    torch.testing.assert_close(compiled(*e), expected)
    for a, b in zip(torch.autograd.grad(compiled(*e), e), torch.autograd.grad(expected, e)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_changes_nothing(backend):
    for distance in DISTANCES:
        e, c, n, options = example((2, 20, 8), 2, 2)
        expected = contrastive_ratio(e, c, n, distance=distance, backend=backend, **options)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            values = contrastive_ratio(e, c, n, distance=distance, backend=backend, **options)
            found = torch.autograd.grad(values.sum(), e)
        assert torch.equal(values, expected) and values.dtype == torch.float32
        for a, b in zip(found, torch.autograd.grad(expected.sum(), e)): assert torch.equal(a, b)


def test_shorter_clean_features_are_welcome():
    e, c, n, options = example((2, 20, 8), 2, 1)
    half = [x.bfloat16() for x in c]
    values = contrastive_ratio(e, half, n, **options)
    assert torch.equal(values, contrastive_ratio(e, [x.float() for x in half], n, **options))


# ------------------------------------------------------------------------------- Triton

DEVICES = [pytest.param('cpu', marks=pytest.mark.interpreted), pytest.param('cuda', marks=pytest.mark.cuda)]


@pytest.fixture
def small_tile(monkeypatch):
    "Tiles that an example spans several of"
    from speechloss.kernels import contrastive_triton as kernels
    monkeypatch.setattr(kernels, 'STRETCH', kernels.Stretch(block=128, turns=2, frames=8, dims=32))
    monkeypatch.setattr(kernels, 'PARTIALS', 4)


@pytest.fixture
def large_tile(monkeypatch, device):
    "The interpreter takes its time for each tile, whatever its size"
    if device != 'cpu': return
    from speechloss.kernels import contrastive_triton as kernels
    monkeypatch.setattr(kernels, 'STRETCH', kernels.Stretch(block=8192, turns=4, frames=64, dims=256))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, dtype, lengths', [*((case, torch.float32, k % 2 > 0) for k, case in enumerate(SHAPES)),
                                                  (SHAPES[1], torch.bfloat16, True), (SHAPES[1], torch.float16, False)])
@pytest.mark.parametrize('distance', DISTANCES)
def test_triton_gradient_error_is_at_most_twice_the_plain_one(case, distance, dtype, lengths, device, large_tile):
    check_rule(*case, distance, dtype, 'triton', lengths, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('distance', DISTANCES)
def test_triton_on_frames_of_all_sizes(distance, device, large_tile):
    check_rule((2, 97, 130), 2, 2, distance, torch.float32, 'triton', device=device, uneven=True)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('negatives', [1, 2, 4])
@pytest.mark.parametrize('distance', DISTANCES)
def test_triton_equals_torch_over_many_tiles(distance, negatives, device, small_tile):
    e, c, n, options = example((3, 19, 37), 2, negatives, lengths=negatives != 2, device=device)
    e[0] = e[0].detach().mT.contiguous().mT.requires_grad_()
    results = []
    for backend in 'torch', 'triton', 'triton':
        terms = contrastive_terms(e, c, n, distance=distance, backend=backend, **options)
        weight = torch.linspace(-1, 1, 3, device=device)
        results.append((*terms, *torch.autograd.grad(terms.values, e, weight)))
    for a, b, again in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)
        assert torch.equal(b, again)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('distance', DISTANCES)
def test_triton_batch_mates_and_padding_do_not_matter(distance, device, small_tile):
    e, c, n, options = example((3, 19, 37), 1, 2, lengths=True, device=device)
    def run(rows, cut):
        leaf = e[0][rows, :cut].detach().requires_grad_()
        own = dict(weights=options['weights'][rows], frames=options['frames'][0][rows], distance=distance)
        values = contrastive_ratio([leaf], [c[0][rows, :cut]], [[s[0][rows, :cut]] for s in n], backend='triton', **own)
        return values, torch.autograd.grad(values.sum(), leaf)[0]
    for b, valid in enumerate(options['frames'][0].tolist()):
        for stack in (e, c, *n): stack[0].detach()[b, valid:] = torch.nan
    values, grad = run(slice(0, 3), 19)
    for b, valid in enumerate(options['frames'][0].tolist()):
        value, own = run(slice(b, b + 1), valid)
        assert torch.equal(value[0], values[b]) and torch.equal(own[0], grad[b, :valid]) and not grad[b, valid:].any()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('distance', DISTANCES)
def test_triton_at_identity_silence_and_nan(distance, device, small_tile):
    e, c, n, _ = example((2, 9, 5), 1, 2, device=device)
    silence = [torch.zeros_like(x) for x in c]
    for a, b, others in (c, c, n), (n[0], c, n), (e, silence, n), (silence, silence, [silence]):
        leaf = a[0].detach().requires_grad_()
        value = contrastive_ratio([leaf], b, others, distance=distance, backend='triton')
        assert value.isfinite().all() and torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()
        assert b is not a or not value.any()
    with torch.no_grad(): e[0][1, 3, 2] = torch.nan
    value = contrastive_ratio(e, c, n, distance=distance, backend='triton')
    assert value.isnan().tolist() == [False, True]
    assert torch.autograd.grad(value.sum(), e)[0][0].isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize('distance', DISTANCES)
def test_a_cuda_graph_replays_the_same_bits(distance):
    e, c, n, options = example((3, 99, 64), 3, 2, lengths=True, device='cuda')
    options['layer_weights'] = torch.tensor(options['layer_weights'], device='cuda')
    def step(): return torch.autograd.grad(contrastive_ratio(e, c, n, distance=distance, **options).sum(), e)
    expected, found = replayed(step)
    for a, b in zip(found, expected): assert torch.equal(a, b)


@pytest.mark.slow
def test_in_the_interpreter(): run_interpreted(__file__)


X = [torch.zeros(2, 4, 3)]
BAD = {
    'enhanced is a Tensor: give a list of layers': (TypeError, lambda: contrastive_ratio(X[0], X, [X])),
    'enhanced has 0 layers': (ValueError, lambda: contrastive_ratio([], [], [[]])),
    'clean has 2 layers and enhanced has 1': (ValueError, lambda: contrastive_ratio(X, X + X, [X])),
    'negatives is empty': (ValueError, lambda: contrastive_ratio(X, X, [])),
    'negatives[0] is a Tensor: give a list of layers': (TypeError, lambda: contrastive_ratio(X, X, X)),
    'negatives[1][0] has shape (2, 4, 2) and enhanced[0] has (2, 4, 3)': (
        ValueError, lambda: contrastive_ratio(X, X, [X, [X[0][..., :2]]])),
    'clean[0] is torch.int64': (TypeError, lambda: contrastive_ratio(X, [X[0].long()], [X])),
    'enhanced[0] has shape (4, 3): give (B, frames, dim)': (
        ValueError, lambda: contrastive_ratio([X[0][0]], [X[0][0]], [[X[0][0]]])),
    'clean[0] is on meta': (ValueError, lambda: contrastive_ratio(X, [X[0].to('meta')], [X])),
    'enhanced[1] holds 1 utterances': (
        ValueError, lambda: contrastive_ratio(*[[X[0], X[0][:1]]] * 2, [[X[0], X[0][:1]]])),
    'weights has shape (2,) on cpu: give one weight for each negative, (1,) or (2, 1)': (
        ValueError, lambda: contrastive_ratio(X, X, [X], weights=torch.ones(2))),
    'weights is list': (TypeError, lambda: contrastive_ratio(X, X, [X], weights=[1.])),
    'layer_weights has 2 numbers and there are 1 layers': (
        ValueError, lambda: contrastive_ratio(X, X, [X], layer_weights=[1, 2])),
    "distance is 'l3': choose one of l1, l2, cosine": (ValueError, lambda: contrastive_ratio(X, X, [X], distance='l3')),
    'eps is 0': (ValueError, lambda: contrastive_ratio(X, X, [X], eps=0)),
    'frames go from 0 to 4: they must lie in 1..4': (
        ValueError, lambda: contrastive_ratio(X, X, [X], frames=torch.tensor([0, 4]))),
    'frames has 2 entries and there are 1 layers': (
        ValueError, lambda: contrastive_ratio(X, X, [X], frames=[torch.tensor([1, 4])] * 2)),
    'frames is torch.float32 of shape (2,)': (ValueError, lambda: contrastive_ratio(X, X, [X], frames=torch.ones(2))),
    "backend is 'gpu'": (ValueError, lambda: contrastive_ratio(X, X, [X], backend='gpu')),
}


@pytest.mark.parametrize('sentence', BAD)
def test_bad_input_is_one_sentence(sentence):
    wanted, attempt = BAD[sentence]
    with pytest.raises(wanted) as caught: attempt()
    assert sentence in str(caught.value) and '\n' not in str(caught.value)
