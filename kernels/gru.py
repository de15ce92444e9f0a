"""`gru`: a layer of gated recurrent units on a CPU, forwards or both ways, with a short backward pass.

torch records each of its operations of each frame for autograd, and goes through that record one
by one. Here a frame costs seven operations forwards and three backwards; what does not depend on
the next frame is computed for all frames at once. On a GPU cuDNN does as much: use `nn.GRU` there.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from . import gru_torch
from .backends import check_floating

#: Tensors of one direction, as nn.GRU has them: weight_ih, weight_hh, bias_ih, bias_hh
PARAMETERS = 4


def gru(
    x: Tensor,                        # (B, T, in), float32 or float64
    parameters: Sequence[Tensor],     # of one direction, or of both: (3 H, in), (3 H, H), (3 H,), (3 H,) for each
    *,
    lengths: Tensor | None = None,    # (B,) valid frames, 1 to T
) -> Tensor:                          # (B, T, H) or (B, T, 2 H); zeros beyond lengths
    """Run a layer of GRU from a state of zeros and return its states, those of the way back behind the others.

    The numbers are those of `nn.GRU` with the same parameters, in the same order of gates (reset, update, new).
    Gradients reach `x` and the parameters; they have no derivative of their own. Raises ValueError and TypeError
    for shapes and types that do not fit.

    >>> layer = torch.nn.GRU(3, 2, batch_first=True)
    >>> x = torch.randn(1, 4, 3)
    >>> torch.allclose(gru(x, list(layer.parameters())), layer(x)[0], atol=1e-6)
    True
    """
    _check(x, parameters, lengths)
    return _gru(x, list(parameters), lengths)[0]


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::gru', mutates_args=())
def _gru(x: Tensor, parameters: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    "States (B, T, D H), and what the backward pass needs: states, reset and update gates, new gates, their inner part"
    return gru_torch.forward(x, parameters, lengths)


@_gru.register_fake
def _(x, parameters, lengths):
    (batch, frames, _), ways, width = x.shape, len(parameters) // PARAMETERS, parameters[1].shape[1]
    made = x.new_empty
    return (made(batch, frames, ways * width), made(frames + 1, ways, batch, width),
            made(frames, ways, batch, 2 * width), made(frames, ways, batch, width), made(frames, ways, batch, width))


@torch.library.custom_op('speechloss::gru_backward', mutates_args=())
def _gru_backward(grad: Tensor, x: Tensor, parameters: list[Tensor], lengths: Tensor | None,
                  saved: list[Tensor], need: list[bool]) -> list[Tensor]:
    "Gradients of the input and of each parameter, empty where not needed"
    return gru_torch.backward(grad, x, parameters, lengths, saved, need)


@_gru_backward.register_fake
def _(grad, x, parameters, lengths, saved, need):
    wanted = [need[0]] + [need[1]] * len(parameters)
    return [tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip((x, *parameters), wanted)]


def _keep(ctx, inputs, output):
    x, parameters, lengths = inputs
    ctx.save_for_backward(x, lengths, *parameters, *output[1:])
    ctx.count = len(parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    if grad is None: return None, [None] * ctx.count, None
    x, lengths, *rest = ctx.saved_tensors
    # a frozen network wants no gradients of its parameters, which are half of the work
    need = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])]
    given, *grads = _gru_backward(grad, x, rest[:ctx.count], lengths, rest[ctx.count:], need)
    return given if need[0] else None, grads if need[1] else [None] * ctx.count, None


_gru.register_autograd(_backward, setup_context=_keep)


# ---------------------------------------------------------------------------------- checks

def _check(x: Tensor, parameters: Sequence[Tensor], lengths: Tensor | None) -> None:
    check_floating('x', x)
    if x.ndim != 3 or not x.numel():
        raise ValueError(f'x has shape {tuple(x.shape)}: give (batch, frames, features), at least one of each')
    if len(parameters) not in (PARAMETERS, 2 * PARAMETERS):
        raise ValueError(f'there are {len(parameters)} parameters: give the four of nn.GRU, or the eight of both ways')
    width = parameters[1].shape[-1]
    shapes = [(3 * width, x.shape[2]), (3 * width, width), (3 * width,), (3 * width,)] * (len(parameters) // PARAMETERS)
    for tensor, shape in zip(parameters, shapes):
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f'a parameter is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}: '
                             f'give {x.dtype} of shape {shape} on {x.device}')
    if lengths is None: return
    if lengths.shape != x.shape[:1] or lengths.is_floating_point():
        raise ValueError(f'lengths is {lengths.dtype} of shape {tuple(lengths.shape)}: '
                         f'give {len(x)} integers, one for each sequence')
