"""`Utterance` and `Cells`: padded waves, the cells of some frames, their terms, and the gradient back to waves.

Everything here is written for few passes over memory that stay in the cache: enhanced and clean are
transformed together, powers are shared between terms, factors go where a pass is made anyway.
"""
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from .framing import fold_reflection, frame_count, kept_window
from .stft_plan import Plan, Resolution

#: Most cells of time and frequency that are worked on at once. Fixed, since it may decide the last bits.
CELLS = 2 ** 17
#: Columns of a product are a multiple of this: only then has it the same bits on any number of threads
COLUMNS = 16

#: A term: sums of each frame (frames,), which make its value, and its slope in the magnitude with a
#: factor, which is computed only where it is needed
Term = tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, float]]]


class Utterance:
    "Enhanced and clean, reflected at their ends for the largest frame"
    def __init__(self, enhanced: Tensor, clean: Tensor, plan: Plan):   # (samples,) each
        self.size, self.pad = len(enhanced), max(r.n_fft for r in plan.resolutions) // 2
        both = torch.stack([enhanced, clean])
        self.waves = torch.cat([both[:, 1:self.pad + 1].flip(1), both, both[:, -self.pad - 1:-1].flip(1)], 1)

    def zeros(self, count: int) -> Tensor:   # (count, padded samples)
        "Return memory for gradients of the padded wave"
        return self.waves.new_zeros(count, self.waves.shape[1])

    def fold(self, padded: Tensor, out: Tensor) -> None:   # (..., padded samples), (..., samples)
        "Write the gradient of the wave from that of the padded wave"
        out.copy_(fold_reflection(padded, self.pad))


class Frames:
    "The frames of an utterance at one resolution: there and back"
    def __init__(self, utterance: Utterance, resolution: Resolution):
        r = self.resolution = resolution
        self.waves = utterance.waves
        self.first = utterance.pad - r.n_fft // 2 + (r.n_fft - r.win_length) // 2
        self.count = frame_count(utterance.size, r.hop_length, r.n_fft)
        self.window = kept_window(r.window, r.win_length, r.gain, self.waves.dtype, self.waves.device)

    def spans(self) -> Iterator[slice]:
        "Yield frames to be worked on together"
        parts = -(-self.count * self.resolution.bins // CELLS)
        step = -(-self.count // parts)
        for start in range(0, self.count, step): yield slice(start, min(start + step, self.count))

    def transform(self, span: slice) -> Tensor:   # (2, frames, bins), complex
        "Transform the window's support alone: where its zeros lie changes the phase, not the magnitude"
        n, size, hop = self.resolution.n_fft, self.resolution.win_length, self.resolution.hop_length
        frames = self.waves[:, self.first:].unfold(-1, size, hop)[:, span]
        framed = frames.new_empty(2, frames.shape[1], n)
        torch.mul(frames, self.window, out=framed[..., :size])
        if size < n: framed[..., size:] = 0
        return torch.fft.rfft(framed)

    def add(self, out: Tensor, grad: Tensor, span: slice) -> None:
        "The adjoint of `transform`: gradient in the spectrum (frames, bins), added to (padded samples,)"
        n, size, hop = self.resolution.n_fft, self.resolution.win_length, self.resolution.hop_length
        # a real transform counts the bins between the ends twice: half of all, and the ends twice
        grad[:, 0] *= 2
        if n % 2 == 0: grad[:, -1] *= 2
        frames = torch.fft.irfft(grad, n, norm='forward')[:, :size]
        # frames that are `stride` apart do not overlap: each of so many additions is one strided sum
        stride = -(-size // hop)
        for k in range(min(stride, len(frames))):
            part = frames[k::stride]
            start = out.storage_offset() + self.first + (span.start + k) * hop
            out.as_strided(part.shape, (stride * hop, 1), start).addcmul_(part, self.window, value=.5)


class Cells:
    "The cells of time and frequency of some frames, and what the terms need of them"
    def __init__(self, spectra: Tensor, bank: Tensor | None, plan: Plan, cells: int):
        self.spectra, self.bank, self.plan = spectra, bank, plan       # (2, frames, bins), complex
        self.count = cells                                             # of the utterance
        squares = torch.view_as_real(spectra).square()
        power = squares[..., 0] + squares[..., 1]
        self.power = power.add_(plan.eps) if plan.floor == 'smooth' else power.clamp_min_(plan.eps)
        self.magnitudes = self.power.sqrt()
        self.e, self.s = self.magnitudes if bank is None else _product(self.magnitudes, bank)

    @cached_property
    def diff(self) -> Tensor: return self.e - self.s

    @cached_property
    def sign(self) -> Tensor: return self.diff.sign()

    @cached_property
    def above(self) -> Tensor: return self.e + self.plan.offset if self.plan.offset else self.e

    @cached_property
    def logs(self) -> Tensor:
        return (self.above / (self.s + self.plan.offset if self.plan.offset else self.s)).log_()

    @cached_property
    def gains(self) -> Tensor:   # (2, frames, bins)
        "What compresses a spectrum: magnitude ** (power - 1)"
        return self.power.log().mul_((self.plan.power - 1) / 2).exp_()

    # ------------------------------------------------------------------------- the terms

    def terms(self) -> dict[str, Term]:
        "Compute {term: (sums, slope)}"
        return {name: getattr(self, f'_{name}')() for name in self.plan.terms}

    def _sc(self) -> Term:
        "Squares of the gap and of clean; the slope is still to be scaled"
        return (self.diff.square().sum(-1), self.s.square().sum(-1)), lambda: (self.diff, 1.)

    def _log_l1(self) -> Term: return (self.logs.abs().sum(-1),), lambda: (self.sign / self.above, 1 / self.count)

    def _log_l2(self) -> Term: return (self.logs.square().sum(-1),), lambda: (self.logs / self.above, 2 / self.count)

    def _lin_l1(self) -> Term: return (self.diff.abs().sum(-1),), lambda: (self.sign, 1 / self.count)

    def _lin_l2(self) -> Term: return (self.diff.square().sum(-1),), lambda: (self.diff, 2 / self.count)

    def _compressed(self) -> Term:
        power = self.plan.power
        if self.bank is None:
            steep, small = self.gains[0], self.gains * self.magnitudes      # e ** (power - 1), and ** power
            gap = small[0] - small[1]
        else:
            e, s = (x.log().mul_(power).exp_() for x in (self.e, self.s))
            gap, steep = e - s, e / self.e
        return (gap.square().sum(-1),), lambda: (gap * steep, 2 * power / self.count)

    def _complex(self) -> Term:
        "Along the spectrum the gain moves with the power; what goes along the gap is added by `gradient`"
        small = self.spectra * self.gains
        gap = self.gap = small[0] - small[1]
        flat, work = torch.view_as_real(gap), torch.view_as_real(small[1])
        sums = torch.mul(flat, flat, out=work).flatten(-2).sum(-1)

        def slope():
            torch.mul(flat, torch.view_as_real(small[0]), out=work)
            return (work[..., 0] + work[..., 1]).div_(self.power[0]), 2 * (self.plan.power - 1) / self.count

        return (sums,), slope

    # ---------------------------------------------------------------------- the gradient

    def slope(self, terms: dict[str, Term], weights: dict[str, float]) -> Tensor | None:   # (frames, bins)
        "Return what the spectrum is multiplied by in the gradient of weighted terms; None without terms"
        total: Tensor | None = None
        for name in weights:
            if name != 'complex': total = _added(total, *terms[name][1](), weights[name])
        if total is not None:
            total = (total if self.bank is None else _product(total, self.bank.T)) / self.magnitudes[0]
        if 'complex' in weights: total = _added(total, *terms['complex'][1](), weights['complex'])
        # under a clamp nothing moves with the power
        if total is not None and self.plan.floor == 'clamp': total *= self.power[0] > self.plan.eps
        return total

    def across(self, weights: dict[str, float]) -> Tensor | None:   # (frames, bins), complex
        "Return the part of the gradient that does not lie along the spectrum; None without 'complex'"
        if 'complex' not in weights: return None
        return self.gap.mul_(self.gains[0] * (2 * weights['complex'] / self.count))


def gradient(
    spectrum: Tensor,        # (frames, bins), complex, of enhanced
    slope: Tensor,           # (frames, bins)
    across: Tensor | None,   # (frames, bins), complex
) -> Tensor:                 # (frames, bins), complex
    "Return the gradient in the spectrum"
    grad = spectrum * slope
    return grad if across is None else grad.add_(across)


def _added(total: Tensor | None, part: Tensor, factor: float, weight: float) -> Tensor:
    return part * (factor * weight) if total is None else total.add_(part, alpha=factor * weight)


def _product(x: Tensor, bank: Tensor) -> Tensor:   # (..., rows, k), (k, columns)
    columns = bank.shape[1]
    if columns % COLUMNS: bank = torch.nn.functional.pad(bank, (0, -columns % COLUMNS))
    return (x @ bank)[..., :columns]
