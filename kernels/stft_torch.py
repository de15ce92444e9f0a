"""`reference` and `distance`: the STFT distance in plain torch, and with its gradient in one pass.

`reference` writes the formulas out for a batch and can be differentiated as often as one likes.
`distance` works on one utterance at a time, so that its true length is simply its size and only
one pair of spectrograms is in memory; it returns the gradient waves with the values.
"""
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from .framing import fold_reflection, frame_count, frame_mask, kept_window, overlap_add, pad_reflect
from .stft_plan import Plan, Resolution
from .workers import side_by_side


def _window(resolution: Resolution, like: Tensor) -> Tensor:   # (win_length,)
    return kept_window(resolution.window, resolution.win_length, resolution.gain, like.dtype, like.device)


# ------------------------------------------------------------------------------ the reference

def reference(
    enhanced: Tensor,          # (B, T), float32 or float64
    clean: Tensor,             # (B, T)
    lengths: Tensor | None,    # (B,) valid samples
    filters: list[Tensor],     # (bins, bands) of each filtered resolution
    plan: Plan,
) -> Tensor:                   # (B, resolutions, terms)
    "Compute the terms of every resolution in plain torch"
    if lengths is not None:
        # `where`, not a product: padding may hold anything, NaN included
        inside = torch.arange(enhanced.shape[1], device=enhanced.device) < lengths[:, None]
        enhanced, clean = torch.where(inside, enhanced, 0), torch.where(inside, clean, 0)
    banks = iter(filters)
    return torch.stack([
        reference_terms(enhanced, clean, r, next(banks).to(enhanced.dtype) if has else None, plan, lengths)
        for r, has in zip(plan.resolutions, plan.filtered)], 1)


def reference_terms(
    enhanced: Tensor,                # (B, T), float32 or float64
    clean: Tensor,                   # (B, T)
    resolution: Resolution,
    filters: Tensor | None,          # (bins, bands)
    plan: Plan,
    lengths: Tensor | None = None,   # (B,) valid samples
) -> Tensor:                         # (B, terms)
    "Compute the terms of one resolution in plain torch"
    E, S = (_spectrum(wave, resolution, lengths) for wave in (enhanced, clean))
    frames = torch.full((len(enhanced),), E.shape[1], device=E.device) if lengths is None \
        else frame_count(lengths, resolution.hop_length, resolution.n_fft)
    mask = frame_mask(frames, E.shape[1])[..., None]                        # (B, frames, 1)
    r_e, r_s = _floored(E, plan), _floored(S, plan)
    e, s = r_e.sqrt(), r_s.sqrt()
    if filters is not None: e, s = e @ filters, s @ filters                 # (B, frames, bands)
    cells = (frames * e.shape[-1]).to(e.dtype)

    def norm(cells_of):   # vector_norm has a zero subgradient at zero; a bare root has NaN
        axes = (0, 1, 2) if plan.norm == 'batch' else (1, 2)
        return torch.linalg.vector_norm(torch.where(mask, cells_of, 0), dim=axes)

    def mean(values): return torch.where(mask, values, 0).sum((1, 2)) / cells

    def convergence():
        every = cells.sum() if plan.norm == 'batch' else cells
        return (norm(s - e) / (norm(s) + plan.sc_floor * every.sqrt())).expand(len(e))

    def ratio(): return (s + plan.offset).log() - (e + plan.offset).log()

    def complex_():
        half = (plan.power - 1) / 2
        gap = torch.view_as_real(E) * (r_e ** half)[..., None] - torch.view_as_real(S) * (r_s ** half)[..., None]
        return mean(gap.square().sum(-1))

    formulas = dict(
        sc=convergence,
        log_l1=lambda: mean(ratio().abs()), log_l2=lambda: mean(ratio().square()),
        lin_l1=lambda: mean((s - e).abs()), lin_l2=lambda: mean((s - e).square()),
        compressed=lambda: mean((s ** plan.power - e ** plan.power).square()),
        complex=complex_)
    return torch.stack([formulas[name]() for name in plan.terms], 1)


def _spectrum(wave: Tensor, resolution: Resolution, lengths: Tensor | None) -> Tensor:   # (B, frames, bins)
    padded = pad_reflect(wave, resolution.n_fft // 2, lengths)
    spec = torch.stft(padded, resolution.n_fft, resolution.hop_length, resolution.win_length,
                      _window(resolution, wave), center=False, return_complex=True)
    return spec.transpose(1, 2)


def _floored(spec: Tensor, plan: Plan) -> Tensor:
    "Power with its floor, same shape, >= eps"
    power = spec.real.square() + spec.imag.square()
    return power + plan.eps if plan.floor == 'smooth' else power.clamp_min(plan.eps)


# ------------------------------------------------------------------------- with the gradient

class _Norms(NamedTuple):
    "What spectral convergence is made of, of one utterance or of the batch"
    gap: Tensor     # |s - e|², a scalar
    clean: Tensor   # |s|², a scalar
    cells: int


#: A term: its value, and how to get its slope, which is computed only where it is needed
_Term = tuple[Tensor, Callable[[], Tensor]]


def distance(
    enhanced: Tensor,          # (B, T), float32 or float64
    clean: Tensor,             # (B, T)
    lengths: Tensor | None,    # (B,) valid samples
    filters: list[Tensor],     # (bins, bands) of each filtered resolution
    plan: Plan,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:    # (B, resolutions, terms), (outputs, B, T) or empty
    "Compute the terms, and the gradient of each output in `enhanced`; an utterance on each core"
    if enhanced.is_cpu: _keep_memory()
    sizes = [enhanced.shape[1]] * len(enhanced) if lengths is None else lengths.tolist()
    pairs = [(x[:size], y[:size]) for x, y, size in zip(enhanced, clean, sizes)]
    parts = enhanced.new_empty(len(enhanced), len(plan.resolutions), len(plan.terms))
    waves = enhanced.new_zeros(plan.outputs, *enhanced.shape) if need_grad else enhanced.new_empty(0)
    banks = iter(filters)
    for k, resolution in enumerate(plan.resolutions):
        bank = next(banks).to(enhanced.dtype) if plan.filtered[k] else None
        batch = None
        if plan.norm == 'batch' and 'sc' in plan.terms:
            batch = _batch_norms(pairs, resolution, bank, plan)

        def one(b, k=k, resolution=resolution, bank=bank, batch=batch):
            x, y = pairs[b]
            mix = plan.mix(resolution, len(pairs))
            parts[b, k], grad = utterance_terms(x, y, resolution, bank, plan, mix, need_grad, batch)
            if grad is not None: waves[:, b, :sizes[b]] += grad   # a row of its own

        side_by_side(one, range(len(pairs)), cpu=enhanced.is_cpu)
    return parts, waves


def utterance_terms(
    enhanced: Tensor,              # (T,), float32 or float64
    clean: Tensor,                 # (T,)
    resolution: Resolution,
    filters: Tensor | None,        # (bins, bands)
    plan: Plan,
    mix: list[list[float]],        # (outputs, terms)
    need_grad: bool,
    batch: _Norms | None = None,    # of the whole batch, for plan.norm 'batch'
) -> tuple[Tensor, Tensor | None]:   # (terms,), (outputs, T)
    "Compute the terms of one utterance, and the gradient of each mix of them in `enhanced`"
    E, S = (_utterance_spectrum(wave, resolution) for wave in (enhanced, clean))
    r_e, r_s = _power(E, plan), _power(S, plan)
    mag = r_e.sqrt()
    e, s = (mag, r_s.sqrt()) if filters is None else (mag @ filters, r_s.sqrt() @ filters)
    found = _magnitude_terms(e, s, plan, batch)
    if 'complex' in plan.terms: found['complex'] = _complex_term(E, S, r_e, r_s, plan)
    values = torch.stack([found[name][0] for name in plan.terms])
    if not need_grad: return values, None
    waves = []
    for row in mix:
        slope, grad = None, None       # in the magnitude, in the spectrum
        for name, weight in zip(plan.terms, row):
            if not weight: continue
            part = found[name][1]()
            if name == 'complex': grad = part * weight
            else: slope = part * weight if slope is None else slope.add_(part, alpha=weight)
        if slope is not None:
            slope = slope if filters is None else slope @ filters.T
            slope = slope.div_(mag)
            if plan.floor == 'clamp': slope *= r_e > plan.eps
            grad = E * slope if grad is None else grad.add_(E * slope)
        waves.append(torch.zeros_like(enhanced) if grad is None
                     else _to_wave(grad, resolution, len(enhanced)))
    return values, torch.stack(waves)


def _magnitude_terms(e: Tensor, s: Tensor, plan: Plan, batch: _Norms | None) -> dict[str, _Term]:
    "{term: (value, slope in e)} of the terms of magnitudes"
    diff, cells, power, offset = e - s, e.numel(), plan.power, plan.offset
    above = e + offset if offset else e
    sign = cache(diff.sign)

    @cache
    def logs(): return (above / (s + offset if offset else s)).log_()

    def convergence():
        over, under, count = batch or _Norms(diff.view(-1).dot(diff.view(-1)), s.view(-1).dot(s.view(-1)), cells)
        over, under = over.sqrt(), under.sqrt() + plan.sc_floor * count ** .5
        return over / under, lambda: diff * torch.where(over > 0, 1 / (over * under), 0.)

    def log_l1(): return torch.linalg.vector_norm(logs(), 1) / cells, lambda: (sign() / above).div_(cells)

    def log_l2(): return logs().view(-1).dot(logs().view(-1)) / cells, lambda: (logs() / above).mul_(2 / cells)

    def lin_l1(): return torch.linalg.vector_norm(diff, 1) / cells, lambda: sign() / cells

    def lin_l2(): return diff.view(-1).dot(diff.view(-1)) / cells, lambda: diff * (2 / cells)

    def compressed():
        gap = e ** power - s ** power
        return gap.square().mean(), lambda: (e ** (power - 1)).mul_(gap).mul_(2 * power / cells)

    formulas = dict(sc=convergence, log_l1=log_l1, log_l2=log_l2, lin_l1=lin_l1, lin_l2=lin_l2, compressed=compressed)
    return {name: formulas[name]() for name in plan.terms if name in formulas}


def _complex_term(E: Tensor, S: Tensor, r_e: Tensor, r_s: Tensor, plan: Plan) -> _Term:
    "(value, gradient in the spectrum) of the compressed complex distance"
    half = (plan.power - 1) / 2
    gain = r_e ** half
    gap = E * gain - S * r_s ** half
    flat = torch.view_as_real(gap).view(-1)

    def slope():
        # the gain moves with the power, unless that lies under a clamp
        along = (torch.view_as_real(gap) * torch.view_as_real(E)).sum(-1).mul_(gain).div_(r_e).mul_(2 * half)
        if plan.floor == 'clamp': along *= r_e > plan.eps
        return (gap * gain + E * along).mul_(2 / r_e.numel())

    return torch.dot(flat, flat) / r_e.numel(), slope


def _batch_norms(pairs: list[tuple[Tensor, Tensor]], resolution: Resolution, filters: Tensor | None,
                 plan: Plan) -> _Norms:
    "The norms over all utterances, added in their order"
    def one(pair):
        e, s = (_magnitudes(wave, resolution, filters, plan) for wave in pair)
        return _Norms((s - e).square().sum(), s.square().sum(), s.numel())

    each = side_by_side(one, pairs, cpu=pairs[0][0].is_cpu)
    return _Norms(*(reduce(add, numbers) for numbers in zip(*each)))


def _magnitudes(wave: Tensor, resolution: Resolution, filters: Tensor | None,
                plan: Plan) -> Tensor:   # (T,) -> (frames, bins or bands)
    mag = _power(_utterance_spectrum(wave, resolution), plan).sqrt_()
    return mag if filters is None else mag @ filters


def _utterance_spectrum(wave: Tensor, resolution: Resolution) -> Tensor:   # (T,) -> (frames, bins)
    "Frames of the window's support alone: where its zeros lie changes the phase, not the magnitude"
    n, size = resolution.n_fft, resolution.win_length
    padded = pad_reflect(wave[None], n // 2)[0]
    first, count = (n - size) // 2, frame_count(len(wave), resolution.hop_length, n)
    frames = padded[first:].unfold(0, size, resolution.hop_length)[:count]
    return torch.fft.rfft(frames * _window(resolution, wave), n)


def _power(spec: Tensor, plan: Plan) -> Tensor:
    "`_floored` with less memory, which autograd cannot follow"
    square = torch.view_as_real(spec).square()
    power = square[..., 0] + square[..., 1]
    return power.add_(plan.eps) if plan.floor == 'smooth' else power.clamp_min_(plan.eps)


def _to_wave(grad: Tensor, resolution: Resolution, length: int) -> Tensor:
    "The adjoint of `_utterance_spectrum`: gradient in the spectrum (frames, bins) to (length,)"
    n, size, hop = resolution.n_fft, resolution.win_length, resolution.hop_length
    # a real transform counts the bins between the ends twice
    grad *= .5
    grad[:, 0] *= 2
    if n % 2 == 0: grad[:, -1] *= 2
    frames = torch.fft.irfft(grad, n, norm='forward')[:, :size] * _window(resolution, grad.real)
    first = (n - size) // 2
    padded = overlap_add(frames, hop, length + 2 * (n // 2) - first)
    return fold_reflection(torch.cat([padded.new_zeros(first), padded]), n // 2)


@lru_cache(maxsize=1)
def _keep_memory() -> None:
    """Make glibc keep the memory of freed tensors, by freeing one large tensor.

    Until then glibc returns every megabyte to the system and takes it back with the next
    tensor, which costs twice the arithmetic. A training has freed such a tensor long ago; a
    first call has not.
    """
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)
