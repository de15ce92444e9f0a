"The recurrent layer: the numbers and gradients of nn.GRU, both ways, at true lengths, compiled, and in a model."
import pytest
import torch
from torch import nn

from speechloss.kernels import gru_torch
from speechloss.kernels.gru import gru
from speechloss.models import mask_network
from speechloss.models.catalogue import enhancer
from speechloss.models.mask_network import Recurrent


def layer(*, both: bool, width: int = 6, features: int = 5, dtype=torch.float64) -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(features, width, batch_first=True, bidirectional=both, dtype=dtype)


def output_and_gradients(run, x, parameters, weight):
    x = x.detach().clone().requires_grad_()
    output = run(x)
    return output, torch.autograd.grad((output * weight).sum(), [x, *parameters])


@pytest.mark.parametrize('both', [False, True])
@pytest.mark.parametrize('frames', [1, 2, 33])
@pytest.mark.parametrize('lengths', [None, 'mixed'])
def test_equals_the_layer_of_torch(both, frames, lengths):
    net = layer(both=both)
    x, parameters = torch.randn(4, frames, 5, dtype=torch.float64), list(net.parameters())
    weight = torch.randn(4, frames, 12 if both else 6, dtype=torch.float64)
    lengths = lengths and torch.tensor([frames, 1, max(frames // 2, 1), frames])
    wanted, slopes = output_and_gradients(lambda x: gru_torch.reference(x, parameters, lengths), x, parameters, weight)
    found, ours = output_and_gradients(lambda x: gru(x, parameters, lengths=lengths), x, parameters, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    for a, b in zip(ours, slopes): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_equal_differences():
    net = layer(both=True, width=2, features=3)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda x, *p: gru(x, p, lengths=lengths), (x, *net.parameters()))


def test_padding_changes_nothing():
    net, x = layer(both=True), torch.randn(2, 9, 5, dtype=torch.float64)
    lengths, other = torch.tensor([9, 4]), x.clone()
    other[1, 4:] = 7.
    one, two = (gru(wave, list(net.parameters()), lengths=lengths) for wave in (x, other))
    assert torch.equal(one, two) and not one[1, 4:].any()


def test_a_frozen_layer_gets_no_gradient():
    net, x = layer(both=False).requires_grad_(False), torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    gru(x, list(net.parameters())).sum().backward()
    found, x.grad = x.grad, None
    net(x)[0].sum().backward()
    torch.testing.assert_close(found, x.grad)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_is_one_node_of_a_compiled_graph():
    net, x = layer(both=True, dtype=torch.float32), torch.randn(2, 9, 5, requires_grad=True)
    parameters = list(net.parameters())
    torch.library.opcheck(torch.ops.speechloss.gru.default, (x, parameters, torch.tensor([9, 4])))


@pytest.mark.parametrize('given, wanted', [
    (dict(x=torch.zeros(3, 5)), 'x has shape'),
    (dict(parameters=[torch.zeros(2)] * 3), '3 parameters'),
    (dict(x=torch.zeros(1, 4, 7)), r'shape \(18, 5\)'),
    (dict(x=torch.zeros(1, 4, 5).double()), 'float64'),
    (dict(lengths=torch.ones(3, dtype=torch.long)), 'lengths'),
])
def test_refuses_what_does_not_fit(given, wanted):
    call = dict(x=torch.zeros(1, 4, 5), parameters=list(layer(both=False, dtype=torch.float32).parameters())) | given
    with pytest.raises(ValueError, match=wanted): gru(call['x'], call['parameters'], lengths=call.get('lengths'))


@pytest.mark.parametrize('causal, layers', [(False, 1), (True, 2), (False, 2)])
def test_the_model_trains_as_with_the_layer_of_torch(monkeypatch, causal, layers):
    x, lengths = torch.randn(3, 4000) / 10, torch.tensor([4000, 1500, 900])
    grads = []
    for ours in (True, False):
        if not ours: monkeypatch.setattr(mask_network, 'in_training', lambda x, weight: False)
        torch.manual_seed(1)
        model = enhancer(dict(preset='tiny', causal=causal, layers=layers)).double()
        model(x.double(), lengths).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_half_types_and_inference_run_as_torch_has_them():
    net, x = Recurrent(8, 1, causal=True), torch.randn(2, 5, 8)
    with torch.autocast('cpu', torch.bfloat16): assert net(x).dtype == nn.GRU.forward(net, x)[0].dtype
    with torch.no_grad(): wanted = net(x)
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)
