"""`stft_distance`: distances of STFT magnitudes over several resolutions, and their gradient.

The gradient is computed on the way forward, so what is kept for the backward pass is one wave
for each output and not the spectrograms. Back ends: see `speechloss.kernels.backends`.
"""
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import stft_torch
from .backends import check_floating, choose, wants_grad, working_dtype
from .stft_plan import EPS, SC_FLOOR, TERMS, Plan, Resolution, checked_plan, plan_of

__all__ = ['EPS', 'SC_FLOOR', 'TERMS', 'Distances', 'Plan', 'Resolution', 'stft_distance']


class Distances(NamedTuple):
    "What `stft_distance` returns"
    values: Tensor   # (B, terms), or (B,) with weights
    parts: Tensor    # (B, resolutions, terms), without gradient, for logs; no weight in it


def stft_distance(
    enhanced: Tensor,                      # (B, T), floating point
    clean: Tensor,                         # (B, T); gets no gradient
    resolutions: Iterable[Resolution],
    terms: Iterable[str] = ('sc', 'log_l1'),   # some of TERMS
    *,
    weights: Iterable[float] | None = None,    # one per term: return their weighted sum (B,)
    lengths: Tensor | None = None,         # (B,) valid samples; padding may hold anything
    filters: Sequence[Tensor | None] | None = None,   # per resolution None or a bank (bins, bands) >= 0, such as mel
    eps: float = EPS,                      # power of the magnitude's floor
    floor: str = 'smooth',                 # or 'clamp', which has no gradient below eps
    power: float = .3,                     # of 'compressed' and 'complex'
    norm: str = 'utterance',               # of 'sc'; 'batch': one norm, and all rows hold the batch's values
    sc_floor: float = SC_FLOOR,            # RMS magnitude added to the denominator of 'sc'
    offset: float = 0.,                    # added to magnitudes before the logarithm
    backend: str = 'auto',                 # see speechloss.kernels.backends
) -> Distances:
    """Return distances of STFT magnitudes, summed over resolutions with their weights; 0 at identity.

    The gradient reaches `enhanced` alone. Where `enhanced` is exactly silent only 'complex' has
    a gradient. Shorter types are computed in float32, also under autocast; float64 in float64. A
    second derivative, and forward-mode differentiation, need `backend='reference'`. Before a
    CUDA graph is captured, call once: the first call makes tables. Raises ValueError and
    TypeError for what cannot be computed, before anything is.
    """
    plan = checked_plan(resolutions, terms, weights, filters, eps=eps, floor=floor, power=power, norm=norm,
                        sc_floor=sc_floor, offset=offset)
    _check_waves(enhanced, clean, lengths, plan)
    banks = _checked_filters(filters, plan, enhanced)
    chosen = choose('torch' if backend == 'auto' and norm == 'batch' else backend, enhanced, clean)
    if chosen == 'triton' and norm == 'batch':
        raise ValueError("norm 'batch' has no Triton kernel: use backend='torch'")
    dtype = working_dtype(enhanced, clean)
    lengths = _clamped(lengths, enhanced, plan)
    with torch.autocast(enhanced.device.type, enabled=False):
        x, y = enhanced.to(dtype), clean.detach().to(dtype)
        if chosen == 'reference':
            parts = stft_torch.reference(x, y, lengths, banks, plan)
            values = _outputs(parts, plan)
        else:
            values, parts, _ = _distance(x, y, lengths, banks, plan.text(), chosen, wants_grad(x))
    return Distances(values[:, 0] if plan.weights else values, parts.detach())


def _outputs(parts: Tensor, plan: Plan) -> Tensor:   # (B, resolutions, terms) -> (B, outputs)
    # numbers and not a tensor of them: that would be a copy to the GPU, and wait for it
    outputs = torch.stack([_total(parts, [plan.mix(r)[o] for r in plan.resolutions])
                           for o in range(plan.outputs)], 1)
    return outputs if plan.norm == 'utterance' else outputs.mean(0, keepdim=True).expand_as(outputs).clone()


def _total(parts: Tensor, mix: list[list[float]]) -> Tensor:   # (B, resolutions, terms) -> (B,)
    total = torch.zeros_like(parts[:, 0, 0])
    for r, row in enumerate(mix):
        for t, weight in enumerate(row):
            if weight: total = total + parts[:, r, t] * weight
    return total


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::stft_distance', mutates_args=())
def _distance(enhanced: Tensor, clean: Tensor, lengths: Tensor | None, filters: list[Tensor],
              plan: str, backend: str, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    "(outputs (B, O), parts (B, resolutions, terms), gradient waves (O, B, T) or empty)"
    made = plan_of(plan)
    if backend == 'triton':
        from . import stft_triton   # here, since it needs triton
        parts, waves = stft_triton.distance(enhanced, clean, lengths, filters, made, need_grad)
    else:
        parts, waves = stft_torch.distance(enhanced, clean, lengths, filters, made, need_grad)
    return _outputs(parts, made), parts, waves


@_distance.register_fake
def _(enhanced, clean, lengths, filters, plan, backend, need_grad):
    made, size = plan_of(plan), len(enhanced)
    return (enhanced.new_empty(size, made.outputs),
            enhanced.new_empty(size, len(made.resolutions), len(made.terms)),
            enhanced.new_empty(made.outputs, *enhanced.shape) if need_grad else enhanced.new_empty(0))


@torch.library.custom_op('speechloss::stft_distance_backward', mutates_args=())
def _distance_backward(grad: Tensor, waves: Tensor, over_batch: bool) -> Tensor:
    "Gradient of the waves `(B, T)` from that of the outputs `(B, O)`; has no derivative of its own"
    # one norm over the batch: every utterance's output moves with every utterance
    if over_batch: grad = grad.sum(0, keepdim=True).expand_as(grad)
    result = torch.zeros_like(waves[0])
    for k, wave in enumerate(waves): result.addcmul_(wave, grad[:, k, None])
    return result


@_distance_backward.register_fake
def _(grad, waves, over_batch):
    return torch.empty_like(waves[0])


def _keep(ctx, inputs, output):
    plan = plan_of(inputs[4])
    ctx.over_batch, ctx.banks = plan.norm == 'batch', len(inputs[3])
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_parts, grad_waves):
    given = None if grad is None else _distance_backward(grad, ctx.saved_tensors[0], ctx.over_batch)
    return given, None, None, [None] * ctx.banks, None, None, None


_distance.register_autograd(_backward, setup_context=_keep)


# ---------------------------------------------------------------------------------- checks

def _check_waves(enhanced: Tensor, clean: Tensor, lengths: Tensor | None, plan: Plan) -> None:
    for name, wave in (('enhanced', enhanced), ('clean', clean)):
        check_floating(name, wave)
        if wave.ndim != 2 or not wave.numel():
            raise ValueError(f'{name} has shape {tuple(wave.shape)}: give (B, T) with at least one sample')
    if enhanced.shape != clean.shape:
        raise ValueError(f'clean has shape {tuple(clean.shape)} and enhanced has '
                         f'{tuple(enhanced.shape)}: the two must be equal')
    if enhanced.device != clean.device:
        raise ValueError(f'clean is on {clean.device} and enhanced on {enhanced.device}: '
                         'move them to one device')
    size = enhanced.shape[1]
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f'lengths is {type(lengths).__name__}: give a tensor of {len(enhanced)} integers')
        if lengths.shape != (len(enhanced),) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f'lengths is {lengths.dtype} of shape {tuple(lengths.shape)}: '
                             f'give {len(enhanced)} integers, one per utterance')
        # on a GPU a look at the values would wait for it: there they are clamped, see `_clamped`
        if lengths.is_cpu and not torch.compiler.is_compiling():
            size, high = int(lengths.min()), int(lengths.max())
            if size < 1 or high > enhanced.shape[1]:
                raise ValueError(f'lengths go from {size} to {high}: they must lie in '
                                 f'1..{enhanced.shape[1]}, the samples of the batch')
    largest = max(r.n_fft for r in plan.resolutions)
    if size <= largest // 2:
        raise ValueError(f'the shortest wave has {size} samples and n_fft is {largest}: '
                         f'give at least n_fft // 2 + 1 = {largest // 2 + 1} samples')


def _clamped(lengths: Tensor | None, wave: Tensor, plan: Plan) -> Tensor | None:
    "Lengths on the device of the waves, clamped to what can be computed where they were not checked"
    if lengths is None: return None
    return lengths.to(wave.device).clamp(max(r.n_fft for r in plan.resolutions) // 2 + 1, wave.shape[1])


def _checked_filters(filters: Sequence[Tensor | None] | None, plan: Plan, like: Tensor) -> list[Tensor]:
    "The filter banks that there are, without gradient"
    banks = []
    for resolution, bank in zip(plan.resolutions, filters or ()):
        if bank is None: continue
        if not isinstance(bank, Tensor):
            raise TypeError(f'a filter bank is {type(bank).__name__}: give a tensor ({resolution.bins}, bands)')
        if bank.ndim != 2 or len(bank) != resolution.bins or bank.device != like.device:
            raise ValueError(f'a filter bank has shape {tuple(bank.shape)} on {bank.device}: give '
                             f'({resolution.bins}, bands) on {like.device} for n_fft {resolution.n_fft}')
        if bank.is_cpu and not torch.compiler.is_compiling() and not ((bank >= 0).all() and (bank > 0).any(0).all()):
            raise ValueError('a filter bank has a negative weight or a band without a bin: its logarithm would be NaN')
        banks.append(bank.detach())
    return banks
