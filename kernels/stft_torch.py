"""The terms of one resolution: once as a reader would write them, once with their gradient.

`reference_terms` is plain torch on a batch, differentiable as often as one likes.
`utterance_terms` takes one utterance at a time, so that its true length is simply its size and
what is in memory at once is one spectrogram pair; it returns the gradient waves with the values.
"""
import torch
from torch import Tensor

from .framing import fold_reflection, frame_count, frame_mask, kept_window, overlap_add, pad_reflect


def window(resolution, like: Tensor) -> Tensor:   # (win_length,)
    return kept_window(resolution.window, resolution.win_length, resolution.gain, like.dtype, like.device)


# ------------------------------------------------------------------- as a reader would write it

def _spectrum(wave: Tensor, resolution, lengths: Tensor | None) -> Tensor:   # (B, frames, bins)
    padded = pad_reflect(wave, resolution.n_fft // 2, lengths)
    spec = torch.stft(padded, resolution.n_fft, resolution.hop_length, resolution.win_length,
                      window(resolution, wave), center=False, return_complex=True)
    return spec.transpose(1, 2)


def floored(spec: Tensor, plan) -> Tensor:
    "Power with its floor, same shape, >= eps"
    power = spec.real.square() + spec.imag.square()
    return power + plan.eps if plan.floor == 'smooth' else power.clamp_min(plan.eps)


def reference_terms(
    enhanced: Tensor,                # (B, T), float32 or float64
    clean: Tensor,                   # (B, T)
    resolution,
    filters: Tensor | None,          # (bins, bands)
    plan,
    lengths: Tensor | None = None,   # (B,) valid samples
) -> Tensor:                         # (B, terms)
    "The terms of `plan` for one resolution, in plain torch"
    E, S = (_spectrum(wave, resolution, lengths) for wave in (enhanced, clean))
    frames = torch.full((len(enhanced),), E.shape[1], device=E.device) if lengths is None \
        else frame_count(lengths, resolution.hop_length, resolution.n_fft)
    mask = frame_mask(frames, E.shape[1])[..., None]                        # (B, frames, 1)
    r_e, r_s = floored(E, plan), floored(S, plan)
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


# ------------------------------------------------------------------------- with the gradient

def _utterance_spectrum(wave: Tensor, resolution) -> Tensor:   # (T,) to (frames, bins)
    "Frames of the window's support alone: where its zeros lie changes the phase, not the magnitude"
    n, size = resolution.n_fft, resolution.win_length
    padded = pad_reflect(wave[None], n // 2)[0]
    first, count = (n - size) // 2, frame_count(len(wave), resolution.hop_length, n)
    frames = padded[first:].unfold(0, size, resolution.hop_length)[:count]
    return torch.fft.rfft(frames * window(resolution, wave), n)


def _power(spec: Tensor, plan) -> Tensor:
    square = torch.view_as_real(spec).square()
    power = square[..., 0] + square[..., 1]
    return power.add_(plan.eps) if plan.floor == 'smooth' else power.clamp_min_(plan.eps)


def magnitudes(wave: Tensor, resolution, filters, plan) -> Tensor:   # (frames, bins or bands)
    mag = _power(_utterance_spectrum(wave, resolution), plan).sqrt_()
    return mag if filters is None else mag @ filters


def norms(enhanced: Tensor, clean: Tensor, resolution, filters, plan) -> tuple[Tensor, Tensor, int]:
    "(|s - e|², |s|², cells) of one utterance: what a norm over the batch adds up"
    e, s = (magnitudes(wave, resolution, filters, plan) for wave in (enhanced, clean))
    return (s - e).square().sum(), s.square().sum(), s.numel()


def _convergence(diff: Tensor, s: Tensor, plan, batch) -> tuple[Tensor, Tensor]:
    "(|s - e| / |s|, the factor of e - s in its gradient)"
    over, under, cells = batch or (torch.dot(diff, diff), torch.dot(s, s), len(s))
    over, under = over.sqrt(), under.sqrt() + plan.sc_floor * cells ** .5
    return over / under, torch.where(over > 0, 1 / (over * under), 0.)


def _magnitude_terms(e: Tensor, s: Tensor, plan, batch, need_grad: bool):
    "{term: (value, slope in e)} of the terms of magnitudes; slopes are scaled, None without gradient"
    diff, cells, found = e - s, e.numel(), {}
    sign = diff.sign() if need_grad and {'log_l1', 'lin_l1'} & {*plan.terms} else None
    above = e + plan.offset if plan.offset else e
    if {'log_l1', 'log_l2'} & {*plan.terms}:
        logs = (above / (s + plan.offset if plan.offset else s)).log_()
    for name in plan.terms:
        slope = None
        if name == 'sc':
            value, factor = _convergence(diff.view(-1), s.view(-1), plan, batch)
            if need_grad: slope = diff * factor
        elif name == 'log_l1':
            value = torch.linalg.vector_norm(logs, 1) / cells
            if need_grad: slope = (sign / above).div_(cells)
        elif name == 'log_l2':
            value = torch.dot(logs.view(-1), logs.view(-1)) / cells
            if need_grad: slope = (logs / above).mul_(2 / cells)
        elif name == 'lin_l1':
            value = torch.linalg.vector_norm(diff, 1) / cells
            if need_grad: slope = sign / cells
        elif name == 'lin_l2':
            value = torch.dot(diff.view(-1), diff.view(-1)) / cells
            if need_grad: slope = diff * (2 / cells)
        elif name == 'compressed':
            gap = e ** plan.power - s ** plan.power
            value = gap.square().mean()
            if need_grad: slope = (e ** (plan.power - 1)).mul_(gap).mul_(2 * plan.power / cells)
        else:
            continue
        found[name] = value, slope
    return found


def _complex_term(E: Tensor, S: Tensor, r_e: Tensor, r_s: Tensor, plan, need_grad: bool):
    "(value, gradient in the spectrum) of the compressed complex distance"
    half = (plan.power - 1) / 2
    gain = r_e ** half
    gap = E * gain - S * r_s ** half
    flat = torch.view_as_real(gap).view(-1)
    value = torch.dot(flat, flat) / r_e.numel()
    if not need_grad: return value, None
    # the gain moves with the power, unless that lies under a clamp
    along = (torch.view_as_real(gap) * torch.view_as_real(E)).sum(-1).mul_(gain).div_(r_e).mul_(2 * half)
    if plan.floor == 'clamp': along *= r_e > plan.eps
    return value, (gap * gain + E * along).mul_(2 / r_e.numel())


def _to_wave(grad: Tensor, resolution, length: int) -> Tensor:
    "The adjoint of `_utterance_spectrum`: gradient in the spectrum (frames, bins) to (length,)"
    n, size, hop = resolution.n_fft, resolution.win_length, resolution.hop_length
    # a real transform counts the bins between the ends twice
    grad *= .5
    grad[:, 0] *= 2
    if n % 2 == 0: grad[:, -1] *= 2
    frames = torch.fft.irfft(grad, n, norm='forward')[:, :size] * window(resolution, grad.real)
    first = (n - size) // 2
    padded = overlap_add(frames, hop, length + 2 * (n // 2) - first)
    return fold_reflection(torch.cat([padded.new_zeros(first), padded]), n // 2)


def utterance_terms(
    enhanced: Tensor,             # (T,), float32 or float64
    clean: Tensor,                # (T,)
    resolution,
    filters: Tensor | None,       # (bins, bands)
    plan,
    mix: list[list[float]],       # (outputs, terms)
    need_grad: bool,
    batch: tuple | None = None,   # `norms` of the whole batch, for plan.norm 'batch'
) -> tuple[Tensor, Tensor | None]:   # (terms,), (outputs, T)
    "Terms of one utterance, and the gradient of each mix of them in `enhanced`"
    E, S = (_utterance_spectrum(wave, resolution) for wave in (enhanced, clean))
    r_e, r_s = _power(E, plan), _power(S, plan)
    mag = r_e.sqrt()
    e, s = (mag, r_s.sqrt()) if filters is None else (mag @ filters, r_s.sqrt() @ filters)
    found = _magnitude_terms(e, s, plan, batch, need_grad)
    if 'complex' in plan.terms: found['complex'] = _complex_term(E, S, r_e, r_s, plan, need_grad)
    values = torch.stack([found[name][0] for name in plan.terms])
    if not need_grad: return values, None
    waves = []
    for row in mix:
        slope, grad = None, None
        for name, weight in zip(plan.terms, row):
            if not weight: continue
            part = found[name][1]
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
