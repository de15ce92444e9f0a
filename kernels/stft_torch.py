"""`reference` and `distance`: the STFT distance in plain torch, and with its gradient in one pass.

`reference` writes the formulas out for a batch and can be differentiated as often as one likes.
`distance` works on some frames of one utterance at a time, so that its true length is simply its size
and no spectrogram is in memory; it returns the gradient waves with the values. What it does to the
frames is in `stft_torch_cells`.
"""
import torch
from torch import Tensor

from .framing import frame_count, frame_mask, kept_window, pad_reflect
from .stft_plan import Plan, Resolution
from .stft_torch_cells import Cells, Frames, Utterance, gradient
from .workers import keep_memory, side_by_side

#: Cells of a batch from which on each utterance has a thread of its own; a pool that starts behind an operation of
#: torch finds its threads still spinning, which costs some milliseconds
_WORTH_THREADS = 2 ** 21


# ------------------------------------------------------------------------------ the reference

def _window(resolution: Resolution, like: Tensor) -> Tensor:   # (win_length,)
    return kept_window(resolution.window, resolution.win_length, resolution.gain, like.dtype, like.device)


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

def distance(
    enhanced: Tensor,          # (B, T), float32 or float64
    clean: Tensor,             # (B, T)
    lengths: Tensor | None,    # (B,) valid samples
    filters: list[Tensor],     # (bins, bands) of each filtered resolution
    plan: Plan,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:    # (B, resolutions, terms), (outputs, B, T) or empty
    """Compute the terms, and the gradient of each output in `enhanced`.

    Large batches go an utterance to a thread; in small ones the threads of torch share each operation. The same bits
    on any number of threads, but for transforms of 64 samples and fewer in a small batch, whose last digits the FFT
    library rounds by the rows that a thread gets.
    """
    if enhanced.is_cpu: keep_memory()
    sizes = [enhanced.shape[1]] * len(enhanced) if lengths is None else lengths.tolist()
    given = iter(filters)
    banks = [next(given).to(enhanced.dtype) if has else None for has in plan.filtered]
    parts = enhanced.new_empty(len(enhanced), len(plan.resolutions), len(plan.terms))
    waves = enhanced.new_zeros(plan.outputs, *enhanced.shape) if need_grad else enhanced.new_empty(0)
    batch = _BatchNorm(enhanced, plan, need_grad) if plan.norm == 'batch' and 'sc' in plan.terms else None

    def one(b: int) -> None:      # writes rows of its own
        size = sizes[b]
        utterance = Utterance(enhanced[b, :size], clean[b, :size], plan)
        total = utterance.zeros(len(waves))
        for k, (resolution, bank) in enumerate(zip(plan.resolutions, banks)):
            work = _Work(utterance, resolution, bank, plan)
            sums = work.run(plan.mix(resolution, len(enhanced)) if need_grad else [], total)
            parts[b, k] = work.values(sums)
            if batch: batch.keep(k, b, sums, work)
        for wave, grad in zip(waves, total): utterance.fold(grad, wave[b, :size])

    cells = sum(sum(frame_count(size, r.hop_length, r.n_fft) for size in sizes) * r.bins for r in plan.resolutions)
    side_by_side(one, range(len(sizes)), cpu=enhanced.is_cpu and cells >= _WORTH_THREADS)
    if batch: batch.finish(parts, waves)
    return parts, waves


class _Work:
    "An utterance at one resolution: some frames at a time"
    def __init__(self, utterance: Utterance, resolution: Resolution, bank: Tensor | None, plan: Plan):
        self.utterance, self.bank, self.plan = utterance, bank, plan
        self.frames = Frames(utterance, resolution)
        self.cells = self.frames.count * (resolution.bins if bank is None else bank.shape[1])
        self.apart: Tensor | None = None   # (padded samples,), the gradient of 'sc' still to be scaled

    def run(
        self,
        mix: list[list[float]],   # (outputs, terms); empty without gradient
        total: Tensor,            # (outputs, padded samples), to which the gradients are added
    ) -> dict[str, Tensor]:       # {term: (1,) or (2,)}
        "Return the sums that the values are made of"
        over_batch, sums = self.plan.norm == 'batch', []
        waiting: list[tuple] = []
        rows = [{name: weight for name, weight in zip(self.plan.terms, row) if weight} for row in mix]
        convergence = [row.pop('sc', 0.) for row in rows]
        if over_batch and any(convergence): self.apart = self.utterance.zeros(1)[0]
        for span in self.frames.spans():
            cells = Cells(self.frames.transform(span), self.bank, self.plan, self.cells)
            terms = cells.terms()
            sums.append({name: torch.stack(each) for name, (each, _) in terms.items()})
            if self.apart is not None and (own := cells.slope(terms, {'sc': 1.})) is not None:
                self.frames.add(self.apart, gradient(cells.spectra[0], own, None), span)
            for out, row, weight in zip(total, rows, convergence):
                slope, across = cells.slope(terms, row), cells.across(row)
                if weight and not over_batch:   # the factor is known when all frames were seen
                    waiting.append((out, span, cells.spectra[0], slope, cells.slope(terms, {'sc': weight}), across))
                elif slope is not None: self.frames.add(out, gradient(cells.spectra[0], slope, across), span)
        found = {name: torch.cat([each[name] for each in sums], 1).sum(1) for name in self.plan.terms}
        for out, span, spectrum, slope, own, across in waiting:
            scaled = own * _convergence(found['sc'], self.cells, self.plan)[1]
            if slope is not None: scaled += slope
            self.frames.add(out, gradient(spectrum, scaled, across), span)
        return found

    def values(self, sums: dict[str, Tensor]) -> Tensor:   # (terms,)
        "Return the values of the terms"
        return torch.stack([_convergence(sums[name], self.cells, self.plan)[0] if name == 'sc'
                            else sums[name][0] / self.cells for name in self.plan.terms])


def _convergence(squares: Tensor, cells: int, plan: Plan) -> tuple[Tensor, Tensor]:
    "Return spectral convergence from the squares of the gap and of clean, and the factor of its slope"
    over, under = squares.sqrt()
    under = under + plan.sc_floor * cells ** .5
    return over / under, torch.where(over > 0, 1 / (over * under), 0.)


class _BatchNorm:
    """Spectral convergence with one norm over the batch, which is known when every utterance was seen.

    Until then the gradient of its numerator waits as a wave for each resolution: its factor is one number.
    """
    def __init__(self, enhanced: Tensor, plan: Plan, need_grad: bool):
        count = len(plan.resolutions)
        self.plan, self.cells = plan, [[0] * len(enhanced) for _ in range(count)]
        self.squares = enhanced.new_zeros(count, len(enhanced), 2)       # of the gap, of clean
        self.waves = enhanced.new_zeros(count if need_grad else 0, *enhanced.shape)

    def keep(self, k: int, b: int, sums: dict[str, Tensor], work: _Work) -> None:
        "Take utterance `b` at resolution `k`"
        self.squares[k, b] = sums['sc']
        self.cells[k][b] = work.cells
        if work.apart is not None: work.utterance.fold(work.apart, self.waves[k, b, :work.utterance.size])

    def finish(self, parts: Tensor, waves: Tensor) -> None:
        "Write the value into the parts, and add the gradient to the waves"
        place = self.plan.terms.index('sc')
        for k, resolution in enumerate(self.plan.resolutions):
            parts[:, k, place], factor = _convergence(self.squares[k].sum(0), sum(self.cells[k]), self.plan)
            for wave, row in zip(waves, self.plan.mix(resolution)):
                if row[place]: wave.addcmul_(self.waves[k], factor, value=row[place])
