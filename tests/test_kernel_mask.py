"The kernels of a mask network in training: the numbers and gradients of torch, compiled, and in a model."
import pytest
import torch
from torch.nn import functional as F

from speechloss.kernels.depthwise import depthwise
from speechloss.kernels.masked_wave import masked_wave
from speechloss.models.catalogue import enhancer
from speechloss.models.mask_network import apply_mask, erb_bands, spectrum
from speechloss.signal.spectra import inverse_envelope, window_of


def slopes(run, weight, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = run(*leaves)
    return output, torch.autograd.grad((output * weight).sum(), leaves)


@pytest.mark.parametrize('taps, before', [(1, 0), (5, 4), (5, 2), (4, 0)])
@pytest.mark.parametrize('frames', [1, 3, 20])
def test_convolution_equals_the_layer_of_torch(taps, before, frames):
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, frames, 6), (6, 1, taps), (6,))]
    weight = torch.randn(3, frames, 6, dtype=torch.float64)

    def layer(x, taps_, bias):
        return F.conv1d(F.pad(x.mT, (before, taps - 1 - before)), taps_, bias, groups=6).mT

    wanted, theirs = slopes(layer, weight, *leaves)
    found, ours = slopes(lambda *given: depthwise(*given, before=before), weight, *leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('n_fft, hop_length', [(512, 256), (512, 128), (256, 100)])
def test_wave_equals_the_inverse_transform_of_torch(n_fft, hop_length):
    torch.manual_seed(0)
    wave, bands = torch.randn(5, 1000, dtype=torch.float64), erb_bands(16, n_fft, 16000).double()
    spec = spectrum(wave, n_fft, hop_length)
    mask, weight = torch.randn(*spec.shape[:2], 32, dtype=torch.float64), torch.randn(5, 1000, dtype=torch.float64)

    def theirs(mask):
        real, imag = (part @ bands.T for part in mask.chunk(2, -1))
        return torch.istft((spec * torch.complex(real, imag)).mT, n_fft, hop_length,
                           window=window_of('hann', n_fft, mask), length=1000)

    wanted, slope = slopes(theirs, weight, mask)
    found, ours = slopes(lambda mask: apply_mask(spec, mask, bands, hop_length, 1000), weight, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, slope, rtol=1e-10, atol=1e-12)


def test_gradients_equal_differences():
    mask = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    spec = torch.randn(3, 4, 5, dtype=torch.complex128)
    bands, window = torch.rand(5, 2, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    envelope = torch.rand(11, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: masked_wave(spec, m, bands, window, envelope, hop_length=3), (mask,))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 6, 3), (3, 1, 4), (3,))]
    assert torch.autograd.gradcheck(lambda *given: depthwise(*given, before=2), leaves)


def test_operators_are_registered_soundly():
    x, taps, bias = torch.randn(2, 6, 3, requires_grad=True), torch.randn(3, 1, 4, requires_grad=True), torch.randn(3)
    torch.library.opcheck(torch.ops.speechloss.depthwise, (x, taps, bias, 1))
    mask, spec = torch.randn(3, 4, 4, requires_grad=True), torch.randn(3, 4, 5, dtype=torch.complex64)
    torch.library.opcheck(torch.ops.speechloss.masked_wave,
                          (spec, mask, torch.rand(5, 2), torch.rand(8), torch.rand(11), 3))


def test_what_is_frozen_gets_no_gradient():
    x = torch.randn(2, 6, 3, requires_grad=True)
    taps, bias = torch.randn(3, 1, 4), torch.randn(3)
    depthwise(x, taps, bias, before=0).sum().backward()
    assert x.grad is not None and taps.grad is None and bias.grad is None


@pytest.mark.parametrize('causal', [False, True])
def test_a_model_in_training_gives_what_it_gives_in_use(causal):
    model, noisy = enhancer(dict(preset='tiny', causal=causal)), torch.randn(3, 3000) / 10
    lengths = torch.tensor([3000, 1200, 1])
    for given in (None, lengths):
        trained = model(noisy, given)
        with torch.no_grad(): used = model(noisy, given)
        torch.testing.assert_close(trained, used, rtol=1e-4, atol=1e-6)
    leaf = noisy.clone().requires_grad_()      # a gradient of the wave goes through the steps of torch
    assert torch.autograd.grad(model(leaf).square().sum(), leaf)[0].isfinite().all()


def test_mistakes_are_named():
    x, taps, bias = torch.randn(2, 6, 3), torch.randn(3, 1, 4), torch.randn(3)
    with pytest.raises(ValueError, match='before is 4'): depthwise(x, taps, bias, before=4)
    with pytest.raises(ValueError, match='weight'): depthwise(x, taps[:2], bias, before=0)
    with pytest.raises(TypeError, match='x is torch.int64'): depthwise(x.long(), taps, bias, before=0)
    mask, spec = torch.randn(3, 4, 4), torch.randn(3, 4, 5, dtype=torch.complex64)
    bands, window = torch.rand(5, 2), torch.rand(8)
    with pytest.raises(ValueError, match='envelope has 17'):
        masked_wave(spec, mask, bands, window, torch.ones(17), hop_length=4)
    with pytest.raises(ValueError, match='mask has shape'):
        masked_wave(spec, mask[..., :3], bands, window, torch.ones(9), hop_length=4)


def test_envelope_is_one_over_the_sum_of_squared_windows():
    found = inverse_envelope('hann', 512, 512, 256, 9, 1500, torch.float64, torch.device('cpu'))
    window, total = torch.hann_window(512, dtype=torch.float64), torch.zeros(512 + 8 * 256, dtype=torch.float64)
    for k in range(9): total[256 * k:256 * k + 512] += window ** 2
    torch.testing.assert_close(found, 1 / total[256:1756])
