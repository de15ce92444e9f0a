"""Token cross-entropy over distances: loss and gradient against float64; memory; bad input; Triton."""
import pytest
import torch
import torch.nn.functional as F
from cuda_graph import replayed
from interpreted import run_interpreted
from test_kernel_nearest_code import DEVICES, Largest, data, relative

from speechloss.kernels import token_loss as module
from speechloss.kernels import token_loss_torch
from speechloss.kernels.nearest_code import nearest_code
from speechloss.kernels.token_loss import METRICS, token_cross_entropy

SHAPES = [(1, 2, 1), (17, 63, 31), (301, 2049, 32), (300, 4500, 9)]         # N, codes, D
FLOOR = dict(loss=1e-6, gradient=1e-5)
OUTPUT = {torch.float32: 0, torch.bfloat16: 4e-3, torch.float16: 1e-3}      # rounding of a gradient


def inputs(n, k, d, dtype=torch.float32, metric='euclidean'):
    "Frames near codes, half of the tokens the nearest one, and a temperature that leaves a choice"
    frames, codes = data(n, k, d, dtype)
    targets = torch.where(torch.rand(n) < .5, nearest_code(frames, codes).index, torch.randint(k, (n,)))
    return frames, codes, targets, dict(euclidean=.2 * d ** .5, squared=.4 * d, cosine=.1)[metric]


def oracle(frames, codes, targets, temperature=1., metric='euclidean'):
    "Without expanded distances, and with no 1 - p: the target on its own side"
    if metric == 'cosine':
        distance = 1 - torch.cosine_similarity(frames[:, None], codes, dim=-1, eps=1e-30)
    else:
        square = torch.stack([(frames - code).square().sum(-1) for code in codes], -1)
        distance = square if metric == 'squared' else square.clamp_min(1e-300).sqrt()
    logits = -distance / temperature
    own, target = logits.gather(1, targets[:, None])[:, 0], F.one_hot(targets, len(codes)).bool()
    z = logits.masked_fill(target, -torch.inf).logsumexp(-1) - own
    return torch.logaddexp(z, torch.zeros_like(z))


def plain(frames, codes, targets, temperature=1., metric='euclidean'):
    "The plain way: all distances, then the cross-entropy of torch"
    if metric == 'cosine':
        distance = 1 - F.normalize(frames, dim=-1) @ F.normalize(codes, dim=-1).T
    else:
        distance = torch.cdist(frames, codes)
    distance = distance.square() if metric == 'squared' else distance
    return F.cross_entropy(-distance / temperature, targets, reduction='none')


def gradients(call, frames, codes, *rest, **options):
    "Loss and its gradient in frames and codes, by random weights"
    frames, codes = (t.detach().clone().requires_grad_() for t in (frames, codes))
    loss = call(frames, codes, *rest, **options)
    (loss * torch.linspace(.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)).sum().backward()
    return loss.detach(), frames.grad, codes.grad


@pytest.mark.parametrize('dtype', OUTPUT)
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n,k,d', SHAPES)
def test_error_of_loss_and_gradient(n, k, d, metric, dtype):
    frames, codes, targets, temperature = inputs(n, k, d, dtype, metric)
    options = dict(temperature=temperature, metric=metric)
    true = gradients(oracle, frames.double(), codes.double(), targets, **options)
    base = gradients(plain, frames.float(), codes.float(), targets, **options)
    fast = gradients(token_cross_entropy, frames, codes, targets, **options)
    assert fast[0].dtype == torch.float32 and fast[1].dtype == fast[2].dtype == dtype
    assert relative(fast[0], true[0]) <= 2 * relative(base[0], true[0]) + FLOOR['loss']
    for got, simple, right in zip(fast[1:], base[1:], true[1:]):
        assert relative(got, right) <= 2 * relative(simple, right) + FLOOR['gradient'] + OUTPUT[dtype]


@pytest.mark.parametrize('metric', METRICS)
def test_reference_is_the_same_loss(metric):
    *arguments, temperature = inputs(40, 30, 6, torch.float64, metric)
    options = dict(temperature=temperature, metric=metric)
    true = gradients(oracle, *arguments, **options)
    for backend in ('reference', 'torch'):
        for got, right in zip(gradients(token_cross_entropy, *arguments, backend=backend, **options), true):
            assert relative(got, right) < 1e-12


@pytest.mark.parametrize('metric,temperature', [('euclidean', .1), ('squared', .1), ('cosine', .01)])
def test_a_frame_that_is_sure_of_its_token(metric, temperature):
    "Loss and gradient keep their digits where 1 - p has none left"
    codes = torch.randn(200, 8, dtype=torch.float64).float()
    targets = torch.randint(200, (50,))
    frames = codes[targets] + .02 * torch.randn(50, 8)
    true = gradients(oracle, frames.double(), codes.double(), targets, temperature, metric)
    base = gradients(plain, frames, codes, targets, temperature, metric)
    fast = gradients(token_cross_entropy, frames, codes, targets, temperature=temperature, metric=metric)
    assert true[0].median() < 1e-3 and all(relative(a, b) < 2e-5 for a, b in zip(fast, true))
    assert metric != 'euclidean' or relative(base[0], true[0]) > 2e-5      # the test can see it


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_gradcheck(backend, metric):
    frames, codes, targets, temperature = inputs(7, 5, 3, torch.float64, metric)
    call = lambda x, c: token_cross_entropy(x, c, targets, temperature=temperature, metric=metric, backend=backend)
    arguments = frames.requires_grad_(), codes.requires_grad_()
    assert torch.autograd.gradcheck(call, arguments)
    if backend == 'reference': assert torch.autograd.gradgradcheck(call, arguments)


def test_a_second_derivative_is_an_error():
    frames, codes, targets, _ = inputs(7, 5, 3)
    loss = token_cross_entropy(frames.requires_grad_(), codes, targets)
    first, = torch.autograd.grad(loss.sum(), frames, create_graph=True)
    with pytest.raises(RuntimeError): torch.autograd.grad(first.square().sum(), frames)


@pytest.mark.parametrize('wanted', [(True, False), (False, True), (True, True)])
def test_only_what_is_asked_for(wanted):
    *arguments, targets, _ = inputs(20, 15, 4)
    true = gradients(token_cross_entropy, *arguments, targets)[1:]
    for tensor, grad in zip(arguments, wanted): tensor.requires_grad_(grad)
    token_cross_entropy(*arguments, targets).mul(torch.linspace(.5, 1.5, 20)).sum().backward()
    for tensor, grad, right in zip(arguments, wanted, true):
        assert torch.equal(tensor.grad, right) if grad else tensor.grad is None


@pytest.mark.parametrize('metric', METRICS)
def test_bits_do_not_depend_on_the_run_or_on_mates(metric):
    frames, codes, targets, _ = inputs(1001, 333, 31)
    first = gradients(token_cross_entropy, frames, codes, targets, metric=metric)
    for _ in range(2):
        again = gradients(token_cross_entropy, frames, codes, targets, metric=metric)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    x = frames.clone().requires_grad_()
    token_cross_entropy(x, codes, targets, metric=metric).sum().backward()
    for rows in [slice(0, 1), slice(3, 20), slice(500, 1001), torch.randperm(1001)]:
        y = frames[rows].clone().requires_grad_()
        part = token_cross_entropy(y, codes, targets[rows], metric=metric)
        part.sum().backward()
        assert torch.equal(part.detach(), first[0][rows]) and torch.equal(y.grad, x.grad[rows])


def test_what_is_left_out():
    frames, codes, targets, _ = inputs(24, 11, 6)
    frames, targets = frames.view(4, 6, 6), targets.view(4, 6)
    lengths = torch.tensor([6, 0, 3, 1])
    valid = torch.arange(6) < lengths[:, None]
    frames[~valid], targets[~valid] = torch.nan, -1
    true = gradients(token_cross_entropy, frames[valid], codes, targets[valid])
    weights = torch.full((4, 6), 3.).masked_scatter_(valid, torch.linspace(.5, 1.5, 10))
    for options in dict(lengths=lengths), dict(mask=valid), dict(), dict(ignore_index=-1, mask=valid):
        x, c = frames.clone().requires_grad_(), codes.clone().requires_grad_()
        loss = token_cross_entropy(x, c, targets, **options)
        (loss * weights).sum().backward()
        assert torch.equal(loss[valid], true[0]) and loss[~valid].eq(0).all()
        assert torch.equal(x.grad[valid], true[1]) and x.grad[~valid].eq(0).all()
        assert torch.allclose(c.grad, true[2], atol=1e-6)
    padded = nearest_code(frames, codes, lengths=lengths).index         # its padding is understood here
    assert token_cross_entropy(frames, codes, padded)[~valid].eq(0).all()


@pytest.mark.parametrize('metric', METRICS)
def test_extremes(metric):
    codes = torch.randn(9, 4)
    sure = gradients(token_cross_entropy, codes, codes, torch.arange(9), metric=metric)  # frames on their codes
    far = gradients(token_cross_entropy, 32768 * torch.randn(9, 4), codes, torch.arange(9), metric=metric)
    silent = gradients(token_cross_entropy, torch.zeros(9, 4), codes, torch.arange(9), metric=metric)
    single = gradients(token_cross_entropy, torch.randn(9, 4), codes[:1], torch.zeros(9).long(), metric=metric)
    for values in (sure, far, silent, single): assert all(value.isfinite().all() for value in values)
    assert all(value.eq(0).all() for value in single)                    # one code: no choice, no loss
    frames = torch.randn(9, 4)
    frames[4, 1] = torch.nan
    loss = token_cross_entropy(frames, codes, torch.arange(9), metric=metric)
    assert torch.equal(loss.isnan(), torch.arange(9) == 4)
    if metric != 'cosine':                                               # an offset that all share costs no digits
        far = frames.nan_to_num() + 4096, codes + 4096
        near = token_cross_entropy(*far, torch.arange(9), metric=metric)
        true = oracle(*(t.double() for t in far), torch.arange(9), metric=metric)
        assert relative(near, true) < 1e-5
    if metric == 'cosine':
        torch.testing.assert_close(silent[0], torch.full((9,), torch.tensor(9.).log().item()))


def test_strides_offsets_and_expanded_grad_output():
    frames, codes, targets, _ = inputs(60, 40, 8)
    true = gradients(token_cross_entropy, frames, codes, targets)
    wide = torch.randn(61, 17)
    wide[1:, 1::2] = frames
    tokens = torch.stack([targets, targets], -1)[:, 0].to(torch.uint8)
    odd = gradients(token_cross_entropy, wide[1:, 1::2], codes.T.contiguous().T, tokens)
    for a, b in zip(true, odd): assert torch.equal(a, b)
    x, y = frames.clone().requires_grad_(), frames.clone().requires_grad_()
    token_cross_entropy(x, codes, targets).sum().backward()              # a gradient of stride 0
    torch.cat([token_cross_entropy(y, codes, targets), torch.ones(3)])[::2].sum().backward()
    assert torch.equal(y.grad[::2], x.grad[::2]) and y.grad[1::2].eq(0).all()


def test_the_input_may_be_overwritten_elsewhere_but_not_here():
    "Autograd knows what the backward reads"
    frames, codes, targets, _ = inputs(6, 5, 3)
    x = frames.requires_grad_() * 1
    loss = token_cross_entropy(x, codes, targets)
    x.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.sum().backward()


@pytest.mark.parametrize('metric', METRICS)
def test_the_matrix_is_never_stored(metric):
    frames, codes, targets, _ = inputs(2000, 4096, 16)
    with Largest() as seen: gradients(token_cross_entropy, frames, codes, targets, metric=metric)
    assert seen.elements <= token_loss_torch.ROWS * token_loss_torch.COLUMNS < 2000 * 4096 / 15


def test_one_number_per_frame_is_kept():
    frames, codes, targets, _ = inputs(200, 300, 16)
    kept = []
    keep = lambda t: kept.append(t) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        token_cross_entropy(frames.requires_grad_(), codes, targets)
    inside = {t.untyped_storage().data_ptr() for t in (frames, codes, targets)}
    new = sum(t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in inside)
    assert new == 200 * (4 + 8)                 # rest, and the tokens as int64


def test_registration():
    frames, codes, targets, _ = inputs(20, 33, 5)
    tensors = frames.requires_grad_(), codes.requires_grad_(), targets
    for metric in METRICS:
        torch.library.opcheck(module._token_loss, (*tensors, .7, metric, 'torch'))
    grad = torch.linspace(.5, 1.5, 20)
    rest = module._token_loss(*tensors, .7, 'squared', 'torch')[1].detach()
    torch.library.opcheck(module._token_loss_backward, (grad, frames.detach(), codes.detach(), targets, rest, .7,
                                                       'squared', 'torch', [True, False]))


@pytest.mark.parametrize('metric', METRICS)
def test_compiles_whole_and_ignores_autocast(metric):
    frames, codes, targets, _ = inputs(36, 50, 8)
    frames, targets, lengths = frames.view(2, 18, 8), targets.view(2, 18), torch.tensor([18, 7])
    call = lambda x, c: token_cross_entropy(x, c, targets, metric=metric, lengths=lengths)
    true = gradients(call, frames, codes)
    for got, right in zip(gradients(torch.compile(call, fullgraph=True), frames, codes), true):
        assert torch.allclose(got, right, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        for got, right in zip(gradients(call, frames, codes), true): assert torch.equal(got, right)


@pytest.mark.parametrize('backend', ['torch', 'reference'])
@pytest.mark.parametrize('metric', METRICS)
def test_targets_out_of_range_that_nobody_checked(metric, backend):
    frames, codes, targets, _ = inputs(20, 30, 4)
    targets[5] = -1
    wrong = targets.index_copy(0, torch.tensor([3, 8]), torch.tensor([30, -7]))
    call = lambda x, c, t: token_cross_entropy(x, c, t, metric=metric, backend=backend)
    left_out = targets.index_fill(0, torch.tensor([3, 8]), -1)
    true = gradients(call, frames, codes, left_out)
    got = gradients(torch.compile(call, fullgraph=True, backend='aot_eager'), frames, codes, wrong)
    assert got[0].isnan().nonzero().flatten().tolist() == [3, 8]
    assert torch.equal(got[0].nan_to_num(), true[0])
    for a, b in zip(got[1:], true[1:]): assert torch.allclose(a, b, atol=1e-6)


def test_training_takes_the_same_path_as_plain():
    "200 steps of moving frames and codes: loss curves within 1e-3"
    frames, codes, targets, _ = inputs(60, 20, 8)
    curves = []
    for loss in (token_cross_entropy, plain):
        x, c = frames.clone().requires_grad_(), codes.clone().requires_grad_()
        optimizer, curve = torch.optim.SGD([x, c], lr=.5), []
        for _ in range(200):
            optimizer.zero_grad()
            value = loss(x, c, targets).mean()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(torch.tensor(curve))
    assert (curves[0] - curves[1]).abs().max() < 1e-3 and curves[0][-1] < .8 * curves[0][0]


@pytest.mark.parametrize('options,error,words', [
    (dict(metric='l2'), ValueError, "metric is 'l2': choose one of euclidean, squared, cosine"),
    (dict(temperature=0.), ValueError, 'temperature is 0.0: give a number of at least 1e-06'),
    (dict(temperature=1e-45), ValueError, 'temperature is 1e-45: give a number of at least'),
    (dict(temperature=float('inf')), ValueError, 'temperature is inf'),
    (dict(temperature=torch.tensor(.1)), TypeError, 'temperature is a Tensor: give a number; to learn one'),
    (dict(temperature=float('nan')), ValueError, 'temperature is nan'),
    (dict(targets=torch.zeros(2, 4).long()), ValueError, r'targets is torch.int64 of shape \(2, 4\): give integers'),
    (dict(targets=[1]), ValueError, 'targets is list: give integers of shape'),
    (dict(targets=torch.zeros(2, 5)), TypeError, 'targets is torch.float32: give integers, indices of codes'),
    (dict(targets=torch.full((2, 5), 4)), ValueError, r'targets holds 4: give indices in \[0, 4\), or -1 to leave'),
    (dict(targets=torch.full((2, 5), -2)), ValueError, 'targets holds -2'),
    (dict(codes=torch.ones(4, 2)), ValueError, 'their last dimensions must be equal'),
])
def test_bad_input(options, error, words):
    arguments = dict(frames=torch.ones(2, 5, 3), codes=torch.ones(4, 3), targets=torch.zeros(2, 5).long()) | options
    with pytest.raises(error, match=words):
        token_cross_entropy(*[arguments.pop(name) for name in ('frames', 'codes', 'targets')], **arguments)


# ---- Triton: in its interpreter, and on a GPU where there is one

SMALL = [(1, 1, 1), (1, 2, 1), (17, 63, 31), (130, 70, 40), (65, 33, 130)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n,k,d', SMALL)
def test_triton_error_of_loss_and_gradient(n, k, d, metric, device):
    *tensors, temperature = inputs(n, k, d, metric=metric)
    frames, codes, targets = (t.to(device) for t in tensors)
    options = dict(temperature=temperature, metric=metric)
    if k == 1: options['temperature'] = 1.
    true = gradients(oracle, frames.double(), codes.double(), targets, **options)
    base = gradients(plain, frames, codes, targets, **options)
    runs = [gradients(token_cross_entropy, frames, codes, targets, backend='triton', **options) for _ in range(3)]
    for run in runs[1:]: assert all(torch.equal(a, b) for a, b in zip(runs[0], run))
    assert relative(runs[0][0], true[0]) <= 2 * relative(base[0], true[0]) + FLOOR['loss']
    for got, simple, right in zip(runs[0][1:], base[1:], true[1:]):
        assert relative(got, right) <= 2 * relative(simple, right) + FLOOR['gradient']


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('metric', METRICS)
def test_triton_on_hard_frames(metric, device):
    *tensors, temperature = inputs(150, 70, 6, metric=metric)
    frames, codes, targets = (t.to(device) for t in tensors)
    call = lambda x, c, t: token_cross_entropy(x, c, t, metric=metric, temperature=temperature, backend='triton')
    left = targets.clone()
    left[::7] = -1
    holes = frames.clone()
    holes[::7] = torch.nan                                              # left out, whatever it holds
    got, true = gradients(call, holes, codes, left), gradients(call, frames, codes, left)
    assert all(torch.equal(a, b) for a, b in zip(got, true)) and got[1][::7].eq(0).all() and got[0][::7].eq(0).all()
    for rows in slice(0, 1), slice(3, 20):                              # mates
        x, y = frames.clone().requires_grad_(), frames[rows].clone().requires_grad_()
        whole, part = call(x, codes, targets), call(y, codes, targets[rows])
        whole.sum().backward(), part.sum().backward()
        assert torch.equal(whole[rows], part) and torch.equal(x.grad[rows], y.grad)
    for x in codes, 32768 * codes, 0 * codes:                           # on the codes, far away, silent
        assert all(v.isfinite().all() for v in gradients(call, x, codes, torch.arange(70, device=device)))
    frames[4, 1] = torch.nan
    assert call(frames, codes, targets).isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize('device', DEVICES)
def test_triton_is_sure_of_its_token(device):
    codes = torch.randn(200, 8)
    targets = torch.randint(200, (50,))
    frames = codes[targets] + .02 * torch.randn(50, 8)
    arguments = [t.to(device) for t in (frames, codes, targets)]
    true = gradients(oracle, *(t.double() for t in arguments[:2]), arguments[2], .1)
    got = gradients(token_cross_entropy, *arguments, temperature=.1, backend='triton')
    assert true[0].median() < 1e-3 and all(relative(a, b) < 2e-5 for a, b in zip(got, true))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('wanted', [(True, False), (False, True)])
def test_triton_gives_what_is_asked_for(wanted, device):
    tensors = [t.to(device) for t in inputs(90, 75, 4)[:3]]
    true = gradients(token_cross_entropy, *tensors, backend='torch')[1:]
    for tensor, grad in zip(tensors, wanted): tensor.requires_grad_(grad)
    loss = token_cross_entropy(*tensors, backend='triton')
    loss.mul(torch.linspace(.5, 1.5, 90, device=device)).sum().backward()
    for tensor, grad, right in zip(tensors, wanted, true):
        assert relative(tensor.grad, right.double()) < 1e-5 if grad else tensor.grad is None


@pytest.mark.cuda
def test_a_cuda_graph_replays_the_same_bits():
    frames, codes, targets = (t.cuda() for t in inputs(3000, 1024, 64)[:3])
    frames.requires_grad_()
    step = lambda: torch.autograd.grad(token_cross_entropy(frames, codes, targets).sum(), frames)[0]
    true, found = replayed(step)
    assert torch.equal(found, true)


def test_in_the_interpreter(): run_interpreted(__file__)
