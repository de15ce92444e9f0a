"""`contrastive_ratio`, `contrastive_terms`: distance to clean over distance to negatives, over feature layers.

Every layer of every utterance is read once, a block at a time. For 'l1' the backward pass needs
no features, only the signs of the differences: two bits for each comparison, four comparisons a
byte. For 'l2' and 'cosine' it reads the features again; for 'cosine' two numbers for each frame
and comparison are kept beside them. Back ends: see `speechloss.kernels.backends`.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import contrastive_torch
from .backends import check_floating, choose, wants_grad, working_dtype
from .contrastive_torch import kept_dtype, regions, shape_of

DISTANCES = ('l1', 'l2', 'cosine')
#: Added to the mean size of the clean features, so that silence has a denominator
FLOOR = 1e-8


class ContrastiveTerms(NamedTuple):
    "What `contrastive_terms` returns; all but the values without gradient, for logs"
    values: Tensor         # (B,)
    numerators: Tensor     # (B, layers), distance to clean
    denominators: Tensor   # (B, layers), weighted distance to the negatives, epsilon included
    distances: Tensor      # (B, layers, 1 + K), to clean and to each negative


def contrastive_ratio(
    enhanced: list[Tensor],
    clean: list[Tensor],
    negatives: list[list[Tensor]],
    **options,                            # of `contrastive_terms`
) -> Tensor:                              # (B,)
    """Return distance to clean over the weighted distance to negatives, summed over layers.

    Arguments are those of `contrastive_terms`, whose `values` this is.

    >>> contrastive_ratio([torch.ones(1, 4, 2)], [torch.zeros(1, 4, 2)], [[torch.full((1, 4, 2), 3.)]])
    tensor([0.5000])
    """
    return contrastive_terms(enhanced, clean, negatives, **options).values


def contrastive_terms(
    enhanced: list[Tensor],               # layers (B, frames, dim), which may differ in frames and dim
    clean: list[Tensor],                  # the same layers of the clean waves
    negatives: list[list[Tensor]],        # K lists of the same layers
    *,
    weights: Tensor | None = None,        # (K,) or (B, K) >= 0, of the negatives; None: 1 / K
    layer_weights: Sequence[float] | Tensor | None = None,   # one number per layer; None: 1
    distance: str = 'l1',                 # one of DISTANCES
    frames: Tensor | Sequence[Tensor] | None = None,   # (B,) valid frames, or a list of them per layer
    eps: float = 1e-3,                    # > 0, of the mean size of the clean features
    backend: str = 'auto',                # see speechloss.kernels.backends
) -> ContrastiveTerms:
    """Return the distance to clean over the weighted distance to negatives, and its parts.

    The value of an utterance is `sum_l w_l d(enhanced, clean) / (sum_k w_k d(enhanced,
    negative_k) + eps * size(clean))`, over layers l and negatives k.
    `d` is a mean over the valid frames of an utterance and over dims: of |a - b| (l1), of
    (a - b)² (l2), or over frames of 1 - cos (cosine); the size of clean is its mean |c|, its mean
    c², or 1. So a value lies below `d / (eps * size)`, and nothing depends on the rest of the
    batch. The gradient reaches `enhanced` alone. Shorter types are computed in float32, also
    under autocast; float64 in float64. A second derivative needs `backend='reference'`.
    Nothing here waits for a GPU: give `weights`, `layer_weights` and `frames` on its device.
    Raises ValueError and TypeError for what cannot be computed, before anything is.
    """
    enhanced, clean, flat = _check_layers(enhanced, clean, negatives)
    if distance not in DISTANCES:
        raise ValueError(f'distance is {distance!r}: choose one of {", ".join(DISTANCES)}')
    if not 0 < eps < float('inf'): raise ValueError(f'eps is {eps}: give a number above 0')
    every = [*enhanced, *clean, *flat]
    first, dtype = enhanced[0], working_dtype(*every)
    weights = _weights(weights, len(negatives), first, dtype)
    layer_weights = _layer_weights(layer_weights, len(enhanced), first, dtype)
    frames = _frames(frames, enhanced)
    chosen = choose(backend, *every)
    with torch.autocast(first.device.type, enabled=False):
        clean, flat = [x.detach() for x in clean], [x.detach() for x in flat]
        if chosen == 'reference':
            distances, sizes = contrastive_torch.reference(enhanced, clean, flat, frames, distance, dtype)
            values = _ratio(distances, sizes, weights, layer_weights, eps)[0]
        else:
            values, distances, sizes, _ = _contrastive(enhanced, clean, flat, weights, layer_weights, frames,
                                                       distance, float(eps), wants_grad(*enhanced), chosen)
        distances = distances.detach()
        denominators = _ratio(distances, sizes.detach(), weights, layer_weights, eps)[1]
    return ContrastiveTerms(values, distances[..., 0], denominators, distances)


def _ratio(
    distances: Tensor,        # (B, layers, 1 + K)
    sizes: Tensor,            # (B, layers)
    weights: Tensor,          # (B, K)
    layer_weights: Tensor,    # (layers,)
    eps: float,
) -> tuple[Tensor, Tensor]:   # (B,), (B, layers)
    "The values and their denominators"
    denominators = (distances[..., 1:] * weights[:, None]).sum(-1) + eps * (sizes + FLOOR)
    return (layer_weights * distances[..., 0] / denominators).sum(-1), denominators


def _coefficients(grad: Tensor, distances: Tensor, sizes: Tensor, weights: Tensor, layer_weights: Tensor,
                  eps: float) -> Tensor:
    "Derivative of the values with respect to the distances, times `grad`: (B, layers, 1 + K)"
    denominators = (distances[..., 1:] * weights[:, None]).sum(-1) + eps * (sizes + FLOOR)
    pull = layer_weights * grad[:, None] / denominators                              # (B, layers)
    push = -pull * (distances[..., 0] / denominators)
    return torch.cat([pull[..., None], push[..., None] * weights[:, None]], -1)


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::contrastive', mutates_args=())
def _contrastive(enhanced: list[Tensor], clean: list[Tensor], negatives: list[Tensor], weights: Tensor,
                 layer_weights: Tensor, frames: Tensor | None, distance: str, eps: float, need_grad: bool,
                 backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "Values (B,), distances (B, layers, 1 + K), size of clean (B, layers), and what is kept: see `regions`"
    with torch.autocast(weights.device.type, enabled=False):
        if backend == 'triton':
            from . import contrastive_triton   # here, since it needs triton
            found = contrastive_triton.sums(enhanced, clean, negatives, frames, distance, need_grad)
        else:
            found = contrastive_torch.sums(enhanced, clean, negatives, frames, distance, need_grad, weights.dtype)
        distances, sizes, kept = found
        return _ratio(distances, sizes, weights, layer_weights, eps)[0], distances, sizes, kept


@_contrastive.register_fake
def _(enhanced, clean, negatives, weights, layer_weights, frames, distance, eps, need_grad, backend):
    B, layers, comparisons = len(enhanced[0]), len(enhanced), 1 + len(negatives) // len(enhanced)
    size = regions([shape_of(e) for e in enhanced], comparisons, distance)[-1].stop if need_grad else 0
    return (weights.new_empty(B), weights.new_empty(B, layers, comparisons), weights.new_empty(B, layers),
            weights.new_empty(size, dtype=kept_dtype(distance)))


@torch.library.custom_op('speechloss::contrastive_backward', mutates_args=())
def _contrastive_backward(grad: Tensor, features: list[Tensor], kept: Tensor, shapes: list[int],
                          distances: Tensor, sizes: Tensor, weights: Tensor, layer_weights: Tensor,
                          frames: Tensor | None, distance: str, eps: float, dtype: torch.dtype,
                          backend: str) -> list[Tensor]:
    "Gradients of the enhanced layers, which have no derivative of their own"
    layers = [(shapes[k], shapes[k + 1], shapes[k + 2]) for k in range(0, len(shapes), 3)]
    with torch.autocast(grad.device.type, enabled=False):
        coefficients = _coefficients(grad.to(weights.dtype), distances, sizes, weights, layer_weights, eps)
        if backend == 'triton':
            from . import contrastive_triton
            return contrastive_triton.gradients(features, kept, layers, coefficients, frames, distance, dtype)
        return contrastive_torch.gradients(features, kept, layers, coefficients, frames, distance, dtype)


@_contrastive_backward.register_fake
def _(grad, features, kept, shapes, distances, sizes, weights, layer_weights, frames, distance, eps, dtype, backend):
    return [grad.new_empty(shapes[k:k + 3], dtype=dtype) for k in range(0, len(shapes), 3)]


def _keep(ctx, inputs, output):
    enhanced, clean, negatives, weights, layer_weights, frames, ctx.distance, ctx.eps, _, ctx.backend = inputs
    ctx.shapes, ctx.dtype = [n for e in enhanced for n in e.shape], enhanced[0].dtype
    ctx.counts = len(enhanced), len(clean), len(negatives)
    features = [] if ctx.distance == 'l1' else [*enhanced, *clean, *negatives]
    ctx.save_for_backward(*output[1:], weights, layer_weights, frames, *features)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    rest = [None] * ctx.counts[1], [None] * ctx.counts[2], *[None] * 7
    if grad is None: return [None] * ctx.counts[0], *rest
    distances, sizes, kept, weights, layer_weights, frames, *features = ctx.saved_tensors
    return _contrastive_backward(grad, features, kept, ctx.shapes, distances, sizes, weights, layer_weights, frames,
                                 ctx.distance, ctx.eps, ctx.dtype, ctx.backend), *rest


_contrastive.register_autograd(_backward, setup_context=_keep)


# ---------------------------------------------------------------------------------- checks

def _check_layers(enhanced: list[Tensor], clean: list[Tensor],
                  negatives: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    "The layers of enhanced, of clean, and of all negatives end to end"
    negatives = [negatives] if isinstance(negatives, Tensor) else list(negatives)
    stacks = dict(enhanced=enhanced, clean=clean) | {f'negatives[{k}]': x for k, x in enumerate(negatives)}
    for name, stack in stacks.items():
        if isinstance(stack, Tensor) or not hasattr(stack, '__len__'):
            raise TypeError(f'{name} is a {type(stack).__name__}: give a list of layers, (B, frames, dim) each')
        if len(stack) != len(enhanced) or not len(stack):
            raise ValueError(f'{name} has {len(stack)} layers and enhanced has {len(enhanced)}: '
                             'give the same layers, at least one')
        for l, layer in enumerate(stack): _check_layer(f'{name}[{l}]', layer, f'enhanced[{l}]', enhanced[l])
    if not negatives: raise ValueError('negatives is empty: give at least one list of layers')
    for l, layer in enumerate(enhanced):
        if len(layer) != len(enhanced[0]) or layer.dtype != enhanced[0].dtype:
            raise ValueError(f'enhanced[{l}] holds {len(layer)} utterances in {layer.dtype} and enhanced[0] '
                             f'{len(enhanced[0])} in {enhanced[0].dtype}: the two must be equal')
    return list(enhanced), list(clean), [layer for stack in negatives for layer in stack]


def _check_layer(name: str, layer: Tensor, like_name: str, like: Tensor) -> None:
    check_floating(name, layer)
    if layer.ndim != 3 or not layer.numel():
        raise ValueError(f'{name} has shape {tuple(layer.shape)}: give (B, frames, dim), at least one of each')
    if layer.shape != like.shape:
        raise ValueError(f'{name} has shape {tuple(layer.shape)} and {like_name} has {tuple(like.shape)}: '
                         'the two must be equal')
    if layer.device != like.device:
        raise ValueError(f'{name} is on {layer.device} and {like_name} on {like.device}: move them to one device')


def _weights(weights: Tensor | None, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:   # (B, K)
    if weights is None: return like.new_full((len(like), count), 1 / count, dtype=dtype)
    check_floating('weights', weights)
    if weights.shape not in ((count,), (len(like), count)) or weights.device != like.device:
        raise ValueError(f'weights has shape {tuple(weights.shape)} on {weights.device}: give one weight for each '
                         f'negative, ({count},) or ({len(like)}, {count}) on {like.device}')
    # a copy: a curriculum may change its weights before the backward pass
    return weights.detach().to(dtype, copy=True).expand(len(like), count)


def _layer_weights(weights: Sequence[float] | Tensor | None, count: int, like: Tensor,
                   dtype: torch.dtype) -> Tensor:   # (layers,)
    if weights is None: return like.new_ones(count, dtype=dtype)
    if len(weights) != count:
        raise ValueError(f'layer_weights has {len(weights)} numbers and there are {count} layers: give one for each')
    return torch.as_tensor(weights, dtype=dtype, device=like.device).detach().clone()


def _frames(frames: Tensor | Sequence[Tensor] | None, enhanced: list[Tensor]) -> Tensor | None:   # (layers, B)
    if frames is None: return None
    each = [frames] * len(enhanced) if isinstance(frames, Tensor) else list(frames)
    if len(each) != len(enhanced):
        raise ValueError(f'frames has {len(each)} entries and there are {len(enhanced)} layers: '
                         'give one tensor for each, or one for all')
    for l, (valid, layer) in enumerate(zip(each, enhanced)):
        B, T = layer.shape[:2]
        if not isinstance(valid, Tensor) or valid.shape != (B,) or valid.is_floating_point() \
                or valid.device != layer.device:
            got = f'{valid.dtype} of shape {tuple(valid.shape)} on {valid.device}' if isinstance(valid, Tensor) \
                else f'a {type(valid).__name__}'
            raise ValueError(f'frames is {got}: give {B} integers on {layer.device}, one per utterance')
        # on another device the look would wait for it
        if valid.device.type == 'cpu' and not torch.compiler.is_compiling():
            low, high = int(valid.min()), int(valid.max())
            if low < 1 or high > T:
                raise ValueError(f'frames go from {low} to {high}: they must lie in 1..{T}, the frames of layer {l}')
    return torch.stack([valid.to(torch.int64) for valid in each])
