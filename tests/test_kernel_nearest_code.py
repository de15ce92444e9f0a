"""Nearest code: index, distance, gradient and counts against float64; ties; memory; Triton."""
import sys

import pytest
import torch
from interpreted import run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from speechloss.kernels import nearest_code_torch as tiles
from speechloss.kernels.frames_and_codes import unit
from speechloss.kernels.nearest_code import METRICS, nearest_code

module = sys.modules['speechloss.kernels.nearest_code']  # the package has the function by this name

SHAPES = [(1, 1, 1), (17, 63, 31), (1001, 2048, 32), (300, 2049, 9)]    # N, codes, D
FLOOR = dict(distance=1e-6, gradient=1e-5)                              # of the relative L2 error
OUTPUT = {torch.float32: 0, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # rounding of a gradient


def data(n, k, d, dtype=torch.float32, offset=0.):
    "Frames near codes, as of a trained codebook, and the codes"
    codes = torch.randn(k, d, dtype=torch.float64)
    frames = codes[torch.randint(k, (n,))] + .3 * torch.randn(n, d, dtype=torch.float64)
    return (frames + offset).to(dtype), (codes + offset).to(dtype)


def every_distance(frames, codes, metric):
    "float64 oracle, without the expanded form: (N, K)"
    frames, codes = frames.double(), codes.double()
    if metric == 'cosine':
        return 1 - torch.stack([torch.cosine_similarity(frames, code, dim=-1, eps=1e-30) for code in codes], -1)
    squared = torch.stack([(frames - code).square().sum(-1) for code in codes], -1)
    return squared if metric == 'squared' else squared.sqrt()


def plain(frames, codes, metric):
    "The plain way, in the dtype that comes in: the rival of the benchmark too"
    if metric == 'cosine':
        unit = [torch.nn.functional.normalize(t, dim=-1) for t in (frames, codes)]
        return (1 - unit[0] @ unit[1].T).min(-1)
    distance = torch.cdist(frames, codes)
    return (distance.square() if metric == 'squared' else distance).min(-1)


def gradients(call, frames, codes):
    "Distance and its gradient in frames and codes, by random weights"
    frames, codes = (t.detach().clone().requires_grad_() for t in (frames, codes))
    distance = call(frames, codes)
    weights = torch.linspace(.5, 1.5, distance.numel(), dtype=distance.dtype).view_as(distance)
    (distance * weights).sum().backward()
    return distance.detach(), frames.grad, codes.grad


def relative(value, true):
    return float((value.double() - true).norm() / true.norm().clamp_min(1e-30))


class Largest(TorchDispatchMode):
    "The most elements that any tensor made inside had"
    def __init__(self): super().__init__(); self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('n,k,d', SHAPES)
def test_against_float64(n, k, d, backend, metric):
    check_index(n, k, d, backend, metric)


def check_index(n, k, d, backend, metric, device='cpu'):
    "The winner is the true one, its distance and the counts are right"
    frames, codes = (t.to(device) for t in data(n, k, d))
    true = every_distance(frames, codes, metric)
    found = nearest_code(frames, codes, metric=metric, backend=backend)
    assert found.index.dtype == found.usage.dtype == torch.int64 and found.distance.dtype == torch.float32
    # but for a tie within the rounding of the expanded form
    lost = true.gather(1, found.index[:, None])[:, 0] - true.amin(-1)
    assert float(lost.max()) <= 1e-5 * max(1., float(frames.double().square().sum(-1).max()))
    assert relative(found.distance, true.gather(1, found.index[:, None])[:, 0]) < FLOOR['distance']
    assert torch.equal(found.usage, found.index.bincount(minlength=k)) and int(found.usage.sum()) == n


@pytest.mark.parametrize('dtype', OUTPUT)
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n,k,d', SHAPES)
def test_error_of_the_gradient(n, k, d, metric, dtype):
    frames, codes = data(n, k, d, dtype)
    index = every_distance(frames, codes, metric).argmin(-1)
    won = lambda x, c: module._distance(*((x, c) if metric != 'cosine' else (unit(x), unit(c))), index,
                                   metric)
    _, *true = gradients(won, frames.double(), codes.double())
    _, *base = gradients(lambda x, c: plain(x, c, metric).values, frames.float(), codes.float())
    distance, *fast = gradients(lambda x, c: nearest_code(x, c, metric=metric).distance, frames, codes)
    assert distance.dtype == torch.float32 and all(g.dtype == dtype for g in fast)
    for got, simple, right in zip(fast, base, true):
        assert relative(got, right) <= 2 * relative(simple, right) + FLOOR['gradient'] + OUTPUT[dtype]


def test_a_distance_that_the_expanded_form_loses():
    "A frame almost on its code, far from 0: |x|^2 - 2xc + |c|^2 has no digit left"
    frames, codes = data(50, 20, 8, torch.float64, offset=300.)
    frames = codes[torch.arange(50) % 20] + 1e-3
    found = nearest_code(frames.float(), codes.float())
    assert torch.equal(found.index, torch.arange(50) % 20)
    true = every_distance(frames.float(), codes.float(), 'squared').amin(-1)
    assert relative(found.distance, true) < 1e-5
    assert relative(plain(frames.float(), codes.float(), 'squared').values, true) > .1  # the test can see it


@pytest.mark.parametrize('offset', [0., 1e5])
def test_an_offset_that_all_share_does_not_cost_digits(offset):
    "Codes on a grid of whole numbers, shifted: the same indices, ties included"
    grid = torch.cartesian_prod(*[torch.arange(-3., 4)] * 3)[torch.randperm(343)[:300]]
    frames = torch.randint(-8, 9, (500, 3)) / 2                         # half of them lie between codes
    true = every_distance(frames, grid, 'squared').argmin(-1)
    assert torch.equal(nearest_code(frames + offset, grid + offset).index, true)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_ties_go_to_the_lowest_index(backend, metric, dtype):
    "Across the borders of groups and tiles, too"
    codes = torch.randn(2 * tiles.COLUMNS + 100, 16, dtype=dtype)
    frames = codes[:40] + .01 * torch.randn(40, 16, dtype=dtype)
    places = torch.randperm(len(codes) - 40)[:120].view(3, 40) + 40     # three copies of each code
    places[0, :4] = torch.tensor([tiles.GROUP, tiles.COLUMNS, tiles.COLUMNS - 1, 2 * tiles.COLUMNS])
    codes[places] = codes[:40].clone()
    index = nearest_code(frames, codes, metric=metric, backend=backend).index
    if backend == 'torch':
        assert torch.equal(index, torch.arange(40))
    codes[:40] = 100 * torch.eye(16, dtype=dtype)[0] + torch.randn(40, 16, dtype=dtype)  # the first ones are gone
    index = nearest_code(frames, codes, metric=metric).index
    assert torch.equal(codes[index], codes[places.amin(0)])
    assert torch.equal(index, (codes[index][:, None] == codes).all(-1).int().argmax(-1))


def test_all_codes_equal():
    assert nearest_code(torch.randn(100, 5), torch.ones(3000, 5)).index.eq(0).all()
    assert nearest_code(torch.zeros(3, 5), torch.randn(3000, 5), metric='cosine').index.eq(0).all()


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_gradcheck(backend, metric):
    frames, codes = (t.requires_grad_() for t in data(7, 5, 3, torch.float64))
    call = lambda x, c: nearest_code(x, c, metric=metric, backend=backend).distance
    assert torch.autograd.gradcheck(call, (frames, codes))
    assert torch.autograd.gradgradcheck(call, (frames, codes))


@pytest.mark.parametrize('metric', METRICS)
def test_bits_do_not_depend_on_the_run_or_on_mates(metric):
    frames, codes = data(1001, 333, 31)
    first = gradients(lambda x, c: nearest_code(x, c, metric=metric).distance, frames, codes)
    for _ in range(2):
        again = gradients(lambda x, c: nearest_code(x, c, metric=metric).distance, frames, codes)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for rows in [slice(0, 1), slice(3, 20), slice(500, 1001), torch.randperm(1001)]:
        part = nearest_code(frames[rows], codes, metric=metric)
        assert torch.equal(part.distance, first[0][rows])
    between = (codes[:300] + codes[1:301]) / 2                           # there one rounding decides
    index = nearest_code(between, codes, metric=metric).index
    assert all(torch.equal(nearest_code(x[None], codes, metric=metric).index, i[None]) for x, i in zip(between, index))


def test_lengths_and_mask():
    frames, codes = data(24, 11, 6)
    frames = frames.view(4, 6, 6)
    lengths = torch.tensor([6, 0, 3, 1])
    valid = torch.arange(6) < lengths[:, None]
    frames[~valid] = torch.nan                                          # whatever padding holds
    frames.requires_grad_()
    found = nearest_code(frames, codes, lengths=lengths)
    masked = nearest_code(frames, codes, mask=valid)
    alone = nearest_code(frames[valid], codes)
    assert found.index.shape == found.distance.shape == (4, 6)
    for got, other in zip(found, masked): assert torch.equal(got, other)
    assert torch.equal(found.index[valid], alone.index) and found.index[~valid].eq(-1).all()
    assert torch.equal(found.distance[valid], alone.distance) and found.distance[~valid].eq(0).all()
    assert torch.equal(found.usage, alone.usage) and int(found.usage.sum()) == 10
    found.distance.sum().backward()
    assert frames.grad[~valid].eq(0).all() and frames.grad[valid].ne(0).any()


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_what_is_not_finite_shows(backend, metric):
    frames, codes = data(6, 70, 4)
    frames[1, 2], frames[3, 0] = torch.nan, torch.inf
    whole = [0, 2, 4, 5]
    found = nearest_code(frames, codes, metric=metric, backend=backend)
    assert found.index[[1, 3]].eq(0).all()
    assert found.distance[1].isnan() and not found.distance[3].isfinite()
    assert torch.equal(found.distance[whole], nearest_code(frames[whole], codes, metric=metric).distance)
    codes[69, 0] = torch.nan
    spoilt = nearest_code(frames[whole], codes, metric=metric, backend=backend)
    assert spoilt.distance.isnan().all() and spoilt.index.eq(0).all()


@pytest.mark.parametrize('scale', [1e-25, 1e-6, 32768., 1e15])
def test_cosine_does_not_see_the_scale(scale):
    frames, codes = data(40, 30, 8)
    here, there = (nearest_code(f, codes, metric='cosine') for f in (frames, frames * scale))
    assert torch.equal(here.index, there.index)
    assert (here.distance - there.distance).abs().max() < 1e-6


def test_cosine_of_zeros_is_one_without_a_gradient():
    frames, codes = torch.zeros(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    found = nearest_code(frames, codes, metric='cosine')
    assert found.distance.eq(1).all()
    found.distance.sum().backward()
    assert frames.grad.eq(0).all() and codes.grad.eq(0).all()
    assert nearest_code(torch.ones(1, 3), torch.zeros(1, 3), metric='cosine').distance.item() == 1


def test_strides_offsets_and_expanded_grad_output():
    frames, codes = data(60, 40, 8)
    true = nearest_code(frames, codes)
    wide = torch.randn(61, 17)
    wide[1:, 1::2] = frames
    odd = nearest_code(wide[1:, 1::2], codes.T.contiguous().T)
    for a, b in zip(true, odd): assert torch.equal(a, b)
    x = frames.clone().requires_grad_()
    distance = nearest_code(x.view(3, 20, 8).transpose(0, 1), codes).distance
    assert torch.equal(distance, true.distance.view(3, 20).T)
    distance.sum().backward()                                           # hands over a gradient of stride 0
    assert torch.equal(x.grad, 2 * (frames - codes[true.index]))
    y = frames.clone().requires_grad_()
    torch.cat([nearest_code(y, codes).distance, torch.ones(3)])[::2].square().sum().backward()
    assert y.grad[1::2].eq(0).all() and y.grad[::2].ne(0).any()


def test_the_matrix_is_never_stored():
    frames, codes = data(3000, 4096, 16)
    with Largest() as seen: nearest_code(frames.requires_grad_(), codes).distance.sum().backward()
    assert seen.elements <= tiles.ROWS * tiles.COLUMNS < 3000 * 4096 / 20
    with Largest() as seen: plain(frames, codes, 'squared')
    assert seen.elements >= 3000 * 4096                                 # the counter counts


def test_no_frames():
    found = nearest_code(torch.zeros(0, 3), torch.randn(4, 3))
    assert found.index.shape == found.distance.shape == (0,) and found.usage.eq(0).all()


def test_registration():
    frames, codes = data(20, 70, 5)
    for euclidean in (True, False):
        torch.library.opcheck(module._nearest_index, (frames, codes, euclidean, 'torch'))


@pytest.mark.parametrize('metric', METRICS)
def test_compiles_whole_and_ignores_autocast(metric):
    frames, codes = data(36, 50, 8)
    frames, lengths = frames.view(2, 18, 8), torch.tensor([18, 7])
    call = lambda x, c: nearest_code(x, c, metric=metric, lengths=lengths).distance
    true = gradients(call, frames, codes)
    whole = torch.compile(call, fullgraph=True)
    for got, right in zip(gradients(whole, frames, codes), true): assert torch.allclose(got, right, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        for got, right in zip(gradients(call, frames, codes), true): assert torch.equal(got, right)


@pytest.mark.parametrize('options,error,words', [
    (dict(frames=[1.]), TypeError, 'frames is list: give a tensor'),
    (dict(codes=torch.ones(4, 3).long()), TypeError, 'codes is torch.int64: give a floating-point tensor'),
    (dict(frames=torch.ones(3)), ValueError, r'frames has shape \(3,\): give \(N, D\) or \(B, F, D\)'),
    (dict(codes=torch.ones(0, 3)), ValueError, r'codes has shape \(0, 3\): give \(K, D\) with at least one'),
    (dict(codes=torch.ones(4, 2)), ValueError, r'\(2, 5, 3\) and codes \(4, 2\): their last dimensions must be'),
    (dict(metric='cityblock'), ValueError, "metric is 'cityblock': choose one of squared, euclidean, cosine"),
    (dict(backend='cuda'), ValueError, "backend is 'cuda': choose one of"),
    (dict(lengths=torch.ones(3).long()), ValueError, r'lengths is torch.int64 of shape \(3,\) for frames'),
    (dict(lengths=torch.ones(2)), TypeError, 'lengths is torch.float32: give integers'),
    (dict(lengths=torch.tensor([1, 6])), ValueError, 'lengths runs from 1 to 6: there are 5 frames'),
    (dict(mask=torch.ones(2, 4).bool()), ValueError, r'mask is torch.bool of shape \(2, 4\): give booleans of'),
    (dict(mask=torch.ones(2, 5)), ValueError, r'mask is torch.float32 of shape \(2, 5\): give booleans'),
])
def test_bad_input(options, error, words):
    arguments = dict(frames=torch.ones(2, 5, 3), codes=torch.ones(4, 3)) | options
    with pytest.raises(error, match=words): nearest_code(arguments.pop('frames'), arguments.pop('codes'), **arguments)


# ---- Triton: in its interpreter, and on a GPU where there is one

DEVICES = [pytest.param('cpu', marks=pytest.mark.interpreted), pytest.param('cuda', marks=pytest.mark.cuda)]
SMALL = [(1, 1, 1), (17, 63, 31), (130, 300, 40), (70, 2049, 9)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n,k,d', SMALL)
def test_triton_against_float64(n, k, d, metric, device):
    check_index(n, k, d, 'triton', metric, device)
    frames, codes = (t.to(device) for t in data(n, k, d))
    runs = [gradients(lambda x, c: nearest_code(x, c, metric=metric, backend='triton').distance, frames, codes)
            for _ in range(3)]
    for run in runs[1:]: assert all(torch.equal(a, b) for a, b in zip(runs[0], run))
    plainly = gradients(lambda x, c: nearest_code(x, c, metric=metric, backend='torch').distance, frames, codes)
    assert all(relative(a, b) < 1e-5 for a, b in zip(runs[0], plainly))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('shares', [1, 3, 100])
def test_triton_ties_go_to_the_lowest_index(shares, device, monkeypatch):
    "Across tiles, and across the programs that share the codes"
    from speechloss.kernels import launch
    monkeypatch.setattr(launch, 'BUSY', shares)
    codes = torch.randn(500, 5, device=device)
    frames = codes[:30] + .01 * torch.randn(30, 5, device=device)
    places = (torch.randperm(470)[:90].view(3, 30) + 30).to(device)
    codes[places] = codes[:30].clone()
    assert torch.equal(nearest_code(frames, codes, backend='triton').index, torch.arange(30, device=device))
    codes[:30] = 100 + torch.randn(30, 5, device=device)
    assert torch.equal(nearest_code(frames, codes, backend='triton').index, places.amin(0))
    assert nearest_code(frames, torch.ones_like(codes), backend='triton').index.eq(0).all()


@pytest.mark.parametrize('device', DEVICES)
def test_triton_on_hard_frames(device):
    frames, codes = (t.to(device) for t in data(70, 150, 4))
    true = nearest_code(frames, codes, backend='triton')
    for rows in [slice(0, 1), slice(3, 20), torch.randperm(70).to(device)]:        # mates
        part = nearest_code(frames[rows], codes, backend='triton')
        assert torch.equal(part.index, true.index[rows]) and torch.equal(part.distance, true.distance[rows])
    odd = nearest_code(frames.T.contiguous().T, torch.cat([codes[:1], codes])[1:], backend='triton')
    for a, b in zip(odd, true): assert torch.equal(a, b)
    shifted = nearest_code(frames + 4096, codes + 4096, backend='triton')          # 4096: about 3 digits are left
    assert (shifted.distance - true.distance).abs().max() < .05
    frames[1, 2], frames[3, 0] = torch.nan, torch.inf
    found = nearest_code(frames, codes, backend='triton')
    assert found.index[[1, 3]].eq(0).all() and found.distance[1].isnan() and found.distance[3].isinf()
    assert torch.equal(found.index[4:], true.index[4:])
    codes[149, 0] = torch.nan
    assert nearest_code(frames, codes, backend='triton').distance.isnan().all()
    assert nearest_code(frames[:0], codes, backend='triton').index.shape == (0,)


@pytest.mark.cuda
def test_a_cuda_graph_replays_the_same_bits():
    frames, codes = (t.cuda() for t in data(3000, 1024, 64))
    true = nearest_code(frames, codes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): found = nearest_code(frames, codes)
    graph.replay()
    for a, b in zip(found, true): assert torch.equal(a, b)


def test_in_the_interpreter(): run_interpreted(__file__)
