"""InfoNCE in tiles against the plain formula in float64; the gradient is judged first."""
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_graph import replayed
from interpreted import run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from speechloss.kernels import info_nce_torch, launch
from speechloss.kernels.info_nce import info_nce

module = sys.modules['speechloss.kernels.info_nce']   # the package has the function by this name
SHAPES = [(1, 1), (7, 33), (129, 768), (1000, 65)]   # N, D
#: relative L2 floor of the gradient, floor of the loss, factor on grad_output
DTYPES = {torch.float32: (1e-6, 1e-6, 1.), torch.bfloat16: (4e-3, 1e-6, 1.), torch.float16: (1e-3, 1e-6, 2. ** 12)}
OPTIONS = {
    'cosine': {},
    'product': dict(normalize=False, temperature=8.),
    'groups': dict(groups=True, temperature=.07),
    'extra': dict(extra=13, temperature=.2),
    'all': dict(groups=True, extra=1, normalize=False, temperature=20.),
}


@pytest.fixture(autouse=True, params=['tiles', 'whole'])
def side(request, monkeypatch):
    "Both sides of the switch: small tiles, and the matrix in memory"
    monkeypatch.setattr(info_nce_torch, 'TILES', dict(cpu=(96, 56)))
    monkeypatch.setattr(info_nce_torch, 'MATRIX', 2 ** 26 if request.param == 'whole' else 0)
    return request.param


def example(N, D, *, groups=False, extra=0, dtype=torch.float32, seed=0, device='cpu', **options):
    "Tensors [queries, keys, extra negatives] and the options of a call; keys resemble their queries"
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(N, D, generator=draw)
    tensors = [q, .5 * q + torch.randn(N, D, generator=draw)]
    if extra: tensors.append(2 * torch.randn(extra, D, generator=draw))
    if groups: options['groups'] = torch.randint(0, 1 + N // 8, (N,), generator=draw).to(device)
    return [x.to(device, dtype).requires_grad_() for x in tensors], options


def call(tensors, options, backend='torch'):
    extra = tensors[2] if len(tensors) > 2 else None
    return info_nce(tensors[0], tensors[1], extra_negatives=extra, backend=backend, **options)


def plain(tensors, *, groups=None, normalize=True, temperature=.1):
    "The formula as one would write it, in the dtype of the tensors"
    q, *k = (F.normalize(x, dim=1) if normalize else x for x in tensors)
    scores = q @ torch.cat(k).T / temperature
    if groups is not None:
        mates = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)
        scores[:, :len(q)] = scores[:, :len(q)].masked_fill(mates, -torch.inf)
    return scores.logsumexp(1) - scores.diagonal()


def cast(tensors, dtype): return [x.detach().to(dtype).requires_grad_() for x in tensors]


def grads(loss, tensors, weight):
    "Of all tensors, end to end"
    return torch.cat([g.double().flatten() / weight.abs().max().double()
                      for g in torch.autograd.grad(loss, tensors, weight.to(loss.dtype))])


def distance(a, b): return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def check_rule(shape, name, dtype, backend, device='cpu'):
    tensors, options = example(*shape, dtype=dtype, device=device, **OPTIONS[name])
    floor, loss_floor, factor = DTYPES[dtype]
    weight = factor * torch.linspace(.5, 1., shape[0], device=device)
    results = {}
    copies = dict(fast=tensors, plain=cast(tensors, torch.float32), true=cast(tensors, torch.float64))
    for kind, values in copies.items():
        loss = call(values, options, backend) if kind == 'fast' else plain(values, **options)
        results[kind] = loss.detach(), grads(loss, values, weight)
    (fast, fast_grad), (rough, rough_grad), (true, true_grad) = results.values()
    assert fast.dtype == torch.float32 and fast.shape == shape[:1]
    if true_grad.norm() > 1e-9:
        assert distance(fast_grad, true_grad) <= 2 * distance(rough_grad, true_grad) + floor
    else:     # a query without negatives has no gradient, nor has one of a single dim
        assert fast_grad.norm() <= 2 * rough_grad.norm() + 1e-5
    assert (fast - true).abs().max() <= 2 * (rough - true).abs().max() + loss_floor * (1 + true.abs().max())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_gradient_error_is_at_most_twice_the_plain_one(shape, name, dtype):
    check_rule(shape, name, dtype, 'torch')


def test_the_rule_sees_operands_of_single_tf32():
    def rounded(x): return (x.view(torch.int32) + 0x1000 & ~0x1fff).view(torch.float32)
    tensors, _ = example(129, 768)
    weight = torch.ones(129)
    true = [x for x in cast(tensors, torch.float64)]
    true_grad = grads(plain(true), true, weight)
    rough_grad = grads(plain(tensors), tensors, weight)
    tf32 = [rounded(F.normalize(x, dim=1).detach()).requires_grad_() for x in tensors]
    unit = [F.normalize(x, dim=1).detach().double().requires_grad_() for x in tensors]
    coarse = distance(*(grads(plain(x, normalize=False), x, weight) for x in (tf32, unit)))
    assert coarse > 10 * (2 * distance(rough_grad, true_grad) + DTYPES[torch.float32][0])


@pytest.mark.parametrize('name', OPTIONS)
def test_derivatives_in_float64(name):
    tensors, options = example(7, 3, dtype=torch.float64, **OPTIONS[name])
    assert torch.autograd.gradcheck(lambda *x: call(x, options, 'torch'), tensors)
    assert torch.autograd.gradcheck(lambda *x: call(x, options, 'reference'), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: call(x, options, 'reference'), tensors)
    with torch.no_grad():
        for backend in 'torch', 'reference':
            torch.testing.assert_close(call(tensors, options, backend), plain(tensors, **options))


def test_a_second_derivative_is_an_error_and_not_a_zero():
    tensors, options = example(5, 3)
    grad, = torch.autograd.grad(call(tensors, options).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match='info_nce_backward'):
        grad.sum().backward()


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_gradients_go_where_they_are_wanted(wanted):
    tensors, options = example(101, 9, **OPTIONS['extra'])
    all_of_them = torch.autograd.grad(call(tensors, options).sum(), tensors)
    some = [x.detach().requires_grad_(k in wanted) for k, x in enumerate(tensors)]
    loss = call(some, options).sum()
    assert loss.requires_grad == bool(wanted)
    if wanted: loss.backward()
    for k, (x, g) in enumerate(zip(some, all_of_them)):
        assert x.grad is None if k not in wanted else torch.equal(x.grad, g)


def test_any_strides_offsets_and_grad_outputs():
    tensors, options = example(101, 34, **OPTIONS['all'])
    weight = torch.linspace(-1, 1, 101)
    loss = call(tensors, options)
    expected = torch.autograd.grad(loss, tensors, weight)
    odd = []
    for x, layout in zip(tensors, ('transposed', 'sliced', 'offset')):
        rows, dims = x.shape
        base = torch.full((dims, rows) if layout == 'transposed' else (2 * rows + 1, dims + 3), torch.nan)
        view = base.T if layout == 'transposed' else base[1::2, 2:2 + dims]
        odd.append(view.copy_(x.detach()).detach().requires_grad_())
    assert not odd[0].is_contiguous() and odd[1].storage_offset()
    again = call(odd, options)
    torch.testing.assert_close(again, loss)
    strided = torch.stack([weight, weight], 1)[:, 0]
    for a, b in zip(torch.autograd.grad(again, odd, strided), expected): torch.testing.assert_close(a, b)
    summed = torch.autograd.grad(call(tensors, options).sum(), tensors)     # a grad_output of stride 0
    ones = torch.autograd.grad(call(tensors, options), tensors, torch.ones(101))
    for a, b in zip(summed, ones): assert torch.equal(a, b)


def test_changing_an_input_in_place_before_backward_is_an_error():
    tensors, options = example(9, 5)
    loss = call(tensors, options).sum()
    with torch.no_grad(): tensors[0].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


def test_three_runs_are_bit_equal_and_the_order_of_rows_does_not_matter():
    tensors, options = example(300, 33, **OPTIONS['groups'])
    runs = [(loss := call(tensors, options), *torch.autograd.grad(loss.sum(), tensors)) for _ in range(3)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0]): assert torch.equal(a, b)
    order = torch.randperm(300)
    mixed = [x.detach()[order].requires_grad_() for x in tensors]
    loss = call(mixed, options | dict(groups=options['groups'][order]))
    again = loss, *torch.autograd.grad(loss.sum(), mixed)
    for a, b in zip(again, runs[0]): torch.testing.assert_close(a, b[order], rtol=1e-4, atol=1e-5)


def test_what_a_group_ignores_has_no_influence():
    tensors, _ = example(100, 8)
    groups = torch.arange(100) // 50
    before = info_nce(tensors[0], tensors[1], groups=groups)
    with torch.no_grad(): tensors[1][:49] += 100.    # keys of group 0, but its last
    after = info_nce(tensors[0], tensors[1], groups=groups)
    assert torch.equal(before[49], after[49]) and (before[50:] != after[50:]).all()
    alone = info_nce(tensors[0], tensors[1], groups=torch.zeros(100, dtype=torch.int32))
    assert torch.equal(alone, torch.zeros(100))
    assert not torch.autograd.grad(alone.sum(), tensors[0])[0].any()


def test_a_tiny_loss_keeps_its_digits():
    q = torch.eye(40, dtype=torch.float64)
    true = plain([q, q], temperature=.03)            # 40 exp(-33), lost beside 1 in float32
    q = q.float().requires_grad_()
    loss = info_nce(q, q.detach(), temperature=.03)
    torch.testing.assert_close(loss.double(), torch.log1p(39 * torch.exp(torch.tensor(-1 / .03))).double().expand(40),
                               rtol=1e-4, atol=0)
    assert (loss > 0).all() and true.shape == loss.shape
    assert torch.autograd.grad(loss.sum(), q)[0].abs().max() > 0


def test_hard_rows():
    tensors, _ = example(60, 16)
    def both(values, **options):
        loss = info_nce(*values, **options)
        return loss, *torch.autograd.grad(loss.sum(), values)
    def with_row(value): return [x.detach().index_fill(0, torch.tensor([3]), value).requires_grad_() for x in tensors]
    for values, options in ((with_row(0.), {}), (cast(tensors, torch.float32), dict(temperature=1e-3)),
                            ([(1e4 * x).detach().requires_grad_() for x in tensors], dict(normalize=False))):
        for result in both(values, **options): assert result.isfinite().all()
    assert (both(with_row(0.))[1][3]).abs().max() > 0                 # silence has a way out
    loss, grad_q, _ = both([with_row(torch.nan)[0], tensors[1]])
    assert loss[3].isnan() and grad_q[3].isnan().all()
    assert loss[4:].isfinite().all() and grad_q[4:].isfinite().all()  # a broken query hurts itself alone


@pytest.mark.parametrize('shape', [(1, 1), (7, 33), (36, 16), (100, 40), (101, 256), (250, 64), (700, 40)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('name', ['cosine', 'all'])
def test_cores_change_neither_a_bit_nor_the_threads_of_torch(name, dtype, shape):
    tensors, options = example(*shape, dtype=dtype, **OPTIONS[name])
    def run(): return (loss := call(tensors, options), *torch.autograd.grad(loss.sum(), tensors))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        for threads in 2, 4, 3:
            torch.set_num_threads(threads)
            for a, b in zip(run(), alone): assert torch.equal(a, b)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_rows_whose_squares_overflow(backend):
    tensors, _ = example(20, 6)
    expected = call(tensors, {}, backend)
    grad, = torch.autograd.grad(expected.sum(), tensors[0])
    large = [(1e25 * x).detach().requires_grad_() for x in tensors]
    loss = call(large, {}, backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(1e25 * torch.autograd.grad(loss.sum(), large[0])[0], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_both_sides_of_the_switch_agree(dtype, monkeypatch):
    for name, scale in [(name, 1.) for name in OPTIONS] + [('product', 1e3)]:     # huge scores, too
        tensors, options = example(120, 21, dtype=dtype, **OPTIONS[name])
        tensors = [(scale * x).detach().requires_grad_() for x in tensors]
        found = []
        for most in 0, 4 * 160 * 160 * 2:
            monkeypatch.setattr(info_nce_torch, 'MATRIX', most)
            loss = call(tensors, options)
            found.append((loss, *torch.autograd.grad(loss.sum(), tensors)))
        for a, b in zip(*found): assert distance(a, b) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize('name', OPTIONS)
def test_rows_of_length_one_are_kept_or_computed_again(name, monkeypatch):
    tensors, options = example(120, 21, **OPTIONS[name])
    found = []
    for most in 0, 2 ** 17:
        monkeypatch.setattr(info_nce_torch, 'UNITS', most)
        loss = call(tensors, options)
        found.append((loss, *torch.autograd.grad(loss, tensors, torch.linspace(-1, 1, 120))))
    for a, b in zip(*found): assert torch.equal(a, b)


def test_a_loss_whose_own_share_is_rounded_to_zero():
    q = torch.tensor([[200., 0.], [0., 1.]], requires_grad=True)
    k = torch.tensor([[-1., 0.], [1., 0.]])
    loss = info_nce(q, k, normalize=False, temperature=1.)
    torch.testing.assert_close(loss, torch.tensor([400., .5]).masked_fill(torch.tensor([False, True]), math.log(2)))
    grad, = torch.autograd.grad(loss.sum(), q)
    torch.testing.assert_close(grad, torch.tensor([[2., 0.], [-1., 0.]]))


def test_any_number_is_a_temperature():
    tensors, _ = example(9, 5)
    assert torch.equal(info_nce(*tensors, temperature=np.float32(.5)), info_nce(*tensors, temperature=.5))


class Largest(TorchDispatchMode):
    "The largest tensor that any operation returns, in elements"
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize('name', ['cosine', 'all'])
def test_no_matrix_of_rows_by_rows_above_the_switch(name, monkeypatch):
    N, D = 2000, 8
    monkeypatch.setattr(info_nce_torch, 'MATRIX', 4 * N * N - 1)
    tensors, options = example(N, D, **OPTIONS[name])
    q, k = tensors[0].detach(), torch.cat(tensors[1:]).detach()
    given = options.get('groups'), options.get('temperature', .1), options.get('normalize', True)
    with Largest() as seen:     # the operator hides what happens inside it: call what it calls
        loss, *rest = info_nce_torch.forward(q, k, *given)
        info_nce_torch.backward(torch.ones(N), q, k, given[0], [loss, *rest], *given[1:], [True, True])
    assert seen.numel <= len(k) * D + 96 * 56       # N x N would be 4,000,000
    kept = {}
    def keep(x): kept[x.data_ptr()] = x.numel(); return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): info_nce(q.requires_grad_(), k[:N])
    assert 0 < sum(kept.values()) <= 2 * N * D + 4 * N


def test_operators_pass_opcheck():
    tensors, _ = example(9, 5, **OPTIONS['extra'])
    q, k = tensors[0], torch.cat(tensors[1:]).detach().requires_grad_()
    groups = torch.arange(9) // 2
    for marks in None, groups:
        torch.library.opcheck(module._info_nce, (q, k, marks, .1, True, 'torch'))
    saved = list(module._info_nce(q.detach(), k.detach(), groups, .1, True, 'torch'))
    for need in [True, True], [False, True]:
        torch.library.opcheck(module._info_nce_backward, (
            torch.ones(9), q.detach(), k.detach(), groups, saved, .1, True, need, 'torch'))


@pytest.mark.parametrize('name, shape', [('cosine', (50, 12)), ('cosine', (48, 16)), ('all', (50, 12))], ids=str)
def test_compiles_in_one_graph(name, shape):
    tensors, options = example(*shape, **OPTIONS[name])
    def loss(*x): return call(x, options).square().mean()
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    expected = loss(*tensors)
    assert torch.equal(compiled(*tensors), expected)
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(expected, tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast_changes_nothing(backend):
    tensors, options = example(50, 12, **OPTIONS['all'])
    expected = call(tensors, options, backend)
    expected_grads = torch.autograd.grad(expected.sum(), tensors)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = call(tensors, options, backend)
        if backend == 'torch': found = torch.autograd.grad(loss.sum(), tensors)
    # the backward pass of plain torch belongs outside
    if backend == 'reference': found = torch.autograd.grad(loss.sum(), tensors)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    for a, b in zip(found, expected_grads): assert torch.equal(a, b)


def test_mixed_dtypes_keep_their_own():
    (q, k), _ = example(20, 6)
    k = k.detach().bfloat16().requires_grad_()
    grad_q, grad_k = torch.autograd.grad(info_nce(q, k).sum(), (q, k))
    assert (grad_q.dtype, grad_k.dtype) == (torch.float32, torch.bfloat16)
    assert info_nce(q.double(), k).dtype == torch.float64


def test_doubles_among_other_dtypes_widen_all():
    tensors, _ = example(21, 6, extra=5)
    wide = [x.detach().double() for x in tensors]
    for k in range(3):
        mixed = [w if j == k else x for j, (x, w) in enumerate(zip(tensors, wide))]
        torch.testing.assert_close(call(mixed, {}), call(wide, {}))


# ------------------------------------------------------------------------------- Triton

DEVICES = [pytest.param('cpu', marks=pytest.mark.interpreted), pytest.param('cuda', marks=pytest.mark.cuda)]


@pytest.fixture
def triton_tiles(monkeypatch):
    "Tiles that an example spans several of"
    from speechloss.kernels import info_nce_triton as kernels
    monkeypatch.setattr(kernels, 'TILES', {0: kernels.Tile(16, 32, 16, 4, 2), 50: kernels.Tile(32, 16, 16, 4, 2)})
    monkeypatch.setattr(kernels, 'STRIP', (16, 48))
    return kernels


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape, name', [*((s, 'cosine') for s in SHAPES), *(((90, 35), n) for n in OPTIONS)], ids=str)
def test_triton_gradient_error_is_at_most_twice_the_plain_one(shape, name, dtype, device, monkeypatch):
    if device == 'cpu':     # the interpreter takes its time for each tile, whatever its size
        from speechloss.kernels import info_nce_triton as kernels
        monkeypatch.setattr(kernels, 'TILES', {0: kernels.Tile(256, 128, 128, 4, 2)})
        monkeypatch.setattr(kernels, 'STRIP', (512, 512))
    check_rule(shape, name, dtype, 'triton', device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', OPTIONS)
def test_triton_equals_torch_over_many_tiles(name, device, triton_tiles, monkeypatch):
    monkeypatch.setattr(launch, 'BUSY', 12)      # some shares of several tiles
    tensors, options = example(75, 35, device=device, **OPTIONS[name])
    tensors[0] = tensors[0].detach()[:, torch.arange(35)].mT.contiguous().mT.requires_grad_()
    results = []
    for backend in 'torch', 'triton', 'triton':
        loss = call(tensors, options, backend)
        results.append((loss, *torch.autograd.grad(loss, tensors, torch.linspace(-1, 1, 75, device=device))))
    for a, b, c in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert torch.equal(b, c)


@pytest.mark.parametrize('device', DEVICES)
def test_triton_on_hard_rows(device, triton_tiles):
    tensors, _ = example(40, 9, device=device)
    with torch.no_grad():
        tensors[0][3], tensors[1][5] = 0., 0.
    for options in dict(temperature=1e-3), dict(normalize=False, temperature=1e-6), dict(groups=torch.zeros(40).long()):
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss = info_nce(*tensors, backend='triton', **options)
        assert loss.isfinite().all() and (loss >= 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), tensors))
    assert not loss.any()
    with torch.no_grad(): tensors[0][7, 2] = torch.nan
    loss = info_nce(*tensors, backend='triton')
    assert loss.isnan().nonzero().tolist() == [[7]]
    unit = torch.eye(20, device=device, requires_grad=True)
    tiny = info_nce(unit, unit.detach(), temperature=.03, backend='triton')     # 19 exp(-33), with its digits
    torch.testing.assert_close(tiny, info_nce(unit, unit.detach(), temperature=.03, backend='torch'), rtol=1e-4, atol=0)
    one, = torch.autograd.grad(tiny.sum(), unit, retain_graph=True)
    assert one.abs().max() > 0


@pytest.mark.parametrize('device', DEVICES)
def test_triton_gives_the_gradients_that_are_wanted(device, triton_tiles):
    (q, k), _ = example(40, 9, device=device)
    both = torch.autograd.grad(info_nce(q, k, backend='triton').sum(), (q, k))
    for wanted in 0, 1:
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((q, k))]
        grad, = torch.autograd.grad(info_nce(*leaves, backend='triton').sum(), leaves[wanted])
        assert torch.equal(grad, both[wanted])


@pytest.mark.cuda
def test_a_cuda_graph_replays_the_same_bits():
    (q, k), _ = example(300, 64, device='cuda')
    def step(): return torch.autograd.grad(info_nce(q, k).sum(), (q, k))
    expected, found = replayed(step)
    for a, b in zip(found, expected): assert torch.equal(a, b)


@pytest.mark.slow
def test_in_the_interpreter(): run_interpreted(__file__)


X = torch.zeros(4, 3)
BAD = {
    'queries is list': (TypeError, lambda: info_nce([1.], X)),
    'keys is torch.int64: give a real floating point': (TypeError, lambda: info_nce(X, X.long())),
    'queries has shape (4,)': (ValueError, lambda: info_nce(X[:, 0], X)),
    'queries has shape (0, 3)': (ValueError, lambda: info_nce(X[:0], X[:0])),
    'keys has 2 dims and queries have 3': (ValueError, lambda: info_nce(X, X[:, :2])),
    'there are 3 keys and 4 queries': (ValueError, lambda: info_nce(X, X[:3])),
    'extra_negatives has 2 dims': (ValueError, lambda: info_nce(X, X, extra_negatives=X[:, :2])),
    'temperature is 0': (ValueError, lambda: info_nce(X, X, temperature=0)),
    'temperature is 1e-45: give a number of at least 1e-06': (ValueError, lambda: info_nce(X, X, temperature=1e-45)),
    'temperature is inf': (ValueError, lambda: info_nce(X, X, temperature=float('inf'))),
    'temperature is nan': (ValueError, lambda: info_nce(X, X, temperature=float('nan'))),
    'temperature is a Tensor: give a number; to learn one': (
        TypeError, lambda: info_nce(X, X, temperature=torch.tensor(.1))),
    'groups is torch.float32': (TypeError, lambda: info_nce(X, X, groups=X[:, 0])),
    'groups has shape (3,)': (ValueError, lambda: info_nce(X, X, groups=torch.arange(3))),
    "backend is 'cuda': choose one of": (ValueError, lambda: info_nce(X, X, backend='cuda')),
    'keys is on meta and queries on cpu': (ValueError, lambda: info_nce(X, X.to('meta'))),
}


@pytest.mark.parametrize('sentence', BAD)
def test_bad_input_is_one_sentence(sentence):
    error, attempt = BAD[sentence]
    with pytest.raises(error) as caught: attempt()
    assert sentence in str(caught.value) and '\n' not in str(caught.value)


def test_no_extra_negatives_may_be_an_empty_tensor():
    tensors, _ = example(6, 3)
    assert torch.equal(info_nce(*tensors, extra_negatives=torch.empty(0, 3)), info_nce(*tensors))
