"""`depthwise`: a convolution of each channel over frames on a CPU, on `(batch, frames, channels)` as it lies.

`nn.Conv1d` wants the channels before the frames, so that its input, its output and both gradients are
turned over in memory. Here a tap is a product with shifted frames.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import check_floating


def depthwise(
    x: Tensor,        # (B, T, C), float32 or float64
    weight: Tensor,   # (C, 1, K), as of nn.Conv1d(C, C, K, groups=C)
    bias: Tensor,     # (C,)
    *,
    before: int,      # frames of zeros set in front, 0 to K - 1; K - 1 - before follow
) -> Tensor:          # (B, T, C)
    """Convolve each channel with its own K taps and return as many frames.

    The numbers are those of `nn.Conv1d` between frames of zeros. Gradients reach all three tensors; they have no
    derivative of their own. Raises ValueError and TypeError for shapes and types that do not fit.

    >>> layer, x = torch.nn.Conv1d(3, 3, 5, groups=3), torch.randn(2, 7, 3)
    >>> wanted = layer(torch.nn.functional.pad(x.mT, (4, 0))).mT
    >>> torch.allclose(depthwise(x, layer.weight, layer.bias, before=4), wanted, atol=1e-6)
    True
    """
    check_floating('x', x)
    if x.ndim != 3 or weight.shape[:-1] != (x.shape[2], 1) or bias.shape != x.shape[2:]:
        raise ValueError(f'x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)}: '
                         'give (batch, frames, channels), (channels, 1, taps) and (channels,)')
    if not 0 <= before < weight.shape[2]:
        raise ValueError(f'before is {before}: give 0 to {weight.shape[2] - 1}, one less than the taps')
    return _depthwise(x, weight, bias, before)


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::depthwise', mutates_args=())
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor:
    output, taps = bias.expand_as(x).contiguous(), _taps(weight)
    for tap, to, source in _shifts(x.shape[1], len(taps), before):
        output[:, to].addcmul_(x[:, source], taps[tap])
    return output


@_depthwise.register_fake
def _(x, weight, bias, before): return x.new_empty(x.shape)


@torch.library.custom_op('speechloss::depthwise_backward', mutates_args=())
def _depthwise_backward(grad: Tensor, x: Tensor, weight: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
    "Gradients of the input, the weight and the bias"
    taps = _taps(weight)
    by_x, by_taps = torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(taps)
    for tap, to, source in _shifts(x.shape[1], len(taps), before):
        by_x[:, source].addcmul_(grad[:, to], taps[tap])
        by_taps[tap] = (grad[:, to] * x[:, source]).sum((0, 1))
    return by_x, by_taps.T[:, None].contiguous(), grad.sum((0, 1))


@_depthwise_backward.register_fake
def _(grad, x, weight, before): return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2])


def _keep(ctx, inputs, output):
    x, weight, _, ctx.before = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    found = _depthwise_backward(grad, *ctx.saved_tensors, ctx.before)
    return *(each if need else None for each, need in zip(found, ctx.needs_input_grad)), None


_depthwise.register_autograd(_backward, setup_context=_keep)


def _taps(weight: Tensor) -> Tensor: return weight[:, 0].T.contiguous()   # (C, 1, K) -> (K, C)


def _shifts(frames: int, taps: int, before: int) -> Iterator[tuple[int, slice, slice]]:
    "For each tap that meets any frame: its number, the frames of the output and those of the input"
    for tap in range(taps):
        shift = tap - before
        first, last = max(0, -shift), min(frames, frames - shift)
        if first < last: yield tap, slice(first, last), slice(first + shift, last + shift)
