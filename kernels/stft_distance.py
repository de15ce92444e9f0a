"""Distances of STFT magnitudes over several resolutions, and their gradient, in one call.

What is kept for the backward pass is one wave for each output, not the spectrograms: the
gradient is computed on the way forward. Back ends: see `speechloss.kernels.backends`.
"""
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import check_floating, choose, wants_grad, working_dtype
from .framing import WINDOWS
from .stft_torch import norms, reference_terms, utterance_terms
from .workers import side_by_side

#: The terms of a resolution; e and s are magnitudes of enhanced and clean, means over cells
TERMS = {
    'sc': 'spectral convergence |s - e| / |s|, norms over the utterance',
    'log_l1': 'mean |ln s - ln e|',
    'log_l2': 'mean (ln s - ln e)²',
    'lin_l1': 'mean |s - e|',
    'lin_l2': 'mean (s - e)²',
    'compressed': 'mean (s^power - e^power)²',
    'complex': 'mean |s^power exp(i arg S) - e^power exp(i arg E)|²',
}
FLOORS = ('smooth', 'clamp')
NORMS = ('utterance', 'batch')
#: Power added under the root of a magnitude. A full-scale sine has power (n_fft / 4)² in a Hann
#: STFT, so 1e-8 lies 122 dB below it at n_fft 512 and 134 dB below at 2048.
EPS = 1e-8
#: Root mean square magnitude added to the denominator of spectral convergence
SC_FLOOR = 1e-3


@dataclass(frozen=True)
class Resolution:
    "One STFT: centred, reflected at the ends, periodic window in the middle of `n_fft`"
    n_fft: int = 1024
    hop_length: int = 256
    win_length: int | None = None   # samples; None: n_fft
    window: str = 'hann'            # one of `framing.WINDOWS`
    gain: float = 1.                # on the window; n_fft ** -0.5 makes the DFT unitary
    weight: float = 1.              # of this resolution in every term

    def __post_init__(self):
        if self.win_length is None: object.__setattr__(self, 'win_length', self.n_fft)
        if self.n_fft < 2 or self.hop_length < 1:
            raise ValueError(f'the resolution has n_fft {self.n_fft} and hop_length '
                             f'{self.hop_length}: give n_fft >= 2 and hop_length >= 1')
        if not 0 < self.win_length <= self.n_fft:
            raise ValueError(f'win_length is {self.win_length}: it must lie in 1..n_fft ({self.n_fft})')
        if self.window not in WINDOWS:
            raise ValueError(f'window is {self.window!r}: choose one of {", ".join(WINDOWS)}')

    @property
    def bins(self) -> int: return self.n_fft // 2 + 1


@dataclass(frozen=True)
class Plan:
    "All that a call computes beside its tensors; plain data, so that a custom op can take it"
    resolutions: tuple[Resolution, ...]
    terms: tuple[str, ...]
    weights: tuple[float, ...] | None = None   # one output, the weighted sum, instead of one a term
    eps: float = EPS
    floor: str = 'smooth'       # magnitude sqrt(power + eps), or 'clamp': sqrt(max(power, eps))
    power: float = .3           # of the compressed terms
    norm: str = 'utterance'     # of spectral convergence; 'batch': one norm over the batch
    sc_floor: float = SC_FLOOR
    offset: float = 0.          # added to filtered magnitudes before the logarithm
    filtered: tuple[bool, ...] = field(default=())   # which resolutions have a filter bank

    @property
    def outputs(self) -> int: return 1 if self.weights else len(self.terms)

    def mix(self, resolution: Resolution, utterances: int = 1) -> list[list[float]]:
        """(outputs, terms): what each term of a resolution counts in each output.

        With a norm over the batch the outputs are means over `utterances`, but for that norm.
        """
        share = [resolution.weight if self.norm == 'utterance' or name == 'sc'
                 else resolution.weight / utterances for name in self.terms]
        if self.weights: return [[w * s for w, s in zip(self.weights, share)]]
        return [[s * (i == k) for k, s in enumerate(share)] for i in range(len(share))]

    def text(self) -> str:
        "For the custom op; `_plan` reads it. Plain joins, which torch.compile can follow."
        resolutions = ';'.join(f'{r.n_fft},{r.hop_length},{r.win_length},{r.window},{r.gain},{r.weight}'
                               for r in self.resolutions)
        weights = ','.join(str(w) for w in self.weights or ())
        filtered = ','.join(str(int(f)) for f in self.filtered)
        return '|'.join([resolutions, ','.join(self.terms), weights, filtered, self.floor, self.norm,
                         str(self.eps), str(self.power), str(self.sc_floor), str(self.offset)])


@lru_cache(maxsize=256)
def _plan(text: str) -> Plan:
    resolutions, terms, weights, filtered, floor, norm, *numbers = text.split('|')
    eps, power, sc_floor, offset = map(float, numbers)
    made = []
    for line in resolutions.split(';'):
        n_fft, hop_length, win_length, window, gain, weight = line.split(',')
        made.append(Resolution(int(n_fft), int(hop_length), int(win_length), window, float(gain), float(weight)))
    return Plan(tuple(made), tuple(terms.split(',')), tuple(map(float, weights.split(','))) if weights else None,
                eps, floor, power, norm, sc_floor, offset, tuple(f == '1' for f in filtered.split(',') if f))


@lru_cache(maxsize=1)
def _keep_memory() -> None:
    """Tell glibc to keep the memory of freed tensors: it does once it has seen a large one freed.

    Until then it returns every megabyte to the system and takes it back with the next tensor,
    which costs twice the arithmetic. A training has long freed such a block; a first call has not.
    """
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)


def _torch(x: Tensor, y: Tensor, lengths: Tensor | None, filters: list[Tensor], plan: Plan, need_grad: bool):
    "(B, resolutions, terms), (outputs, B, T): one resolution of one utterance on each core"
    if x.is_cpu: _keep_memory()
    sizes = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
    parts = x.new_empty(len(x), len(plan.resolutions), len(plan.terms))
    waves = x.new_zeros(plan.outputs, *x.shape) if need_grad else x.new_empty(0)
    banks = iter(filters)
    for k, resolution in enumerate(plan.resolutions):
        bank = next(banks).to(x.dtype) if plan.filtered[k] else None
        batch = None
        if plan.norm == 'batch' and 'sc' in plan.terms:
            each = side_by_side(lambda b: norms(x[b, :sizes[b]], y[b, :sizes[b]], resolution, bank, plan),  # noqa: B023
                                range(len(x)), cpu=x.is_cpu)
            batch = tuple(map(sum, zip(*each)))

        def one(b, k=k, resolution=resolution, bank=bank, batch=batch):
            parts[b, k], grad = utterance_terms(x[b, :sizes[b]], y[b, :sizes[b]], resolution, bank, plan,
                                                plan.mix(resolution, len(x)), need_grad, batch)
            if need_grad: waves[:, b, :sizes[b]] += grad   # a row of its own

        side_by_side(one, range(len(x)), cpu=x.is_cpu)
    return parts, waves


@torch.library.custom_op('speechloss::stft_distance', mutates_args=())
def _distance(enhanced: Tensor, clean: Tensor, lengths: Tensor | None, filters: list[Tensor],
              plan: str, backend: str, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    "(outputs (B, O), parts (B, resolutions, terms), gradient waves (O, B, T) or empty)"
    made = _plan(plan)
    if backend == 'triton':
        from .stft_triton import distance
        parts, waves = distance(enhanced, clean, lengths, filters, made, need_grad)
    else:
        parts, waves = _torch(enhanced, clean, lengths, filters, made, need_grad)
    return _outputs(parts, made), parts, waves


def _outputs(parts: Tensor, plan: Plan) -> Tensor:   # (B, resolutions, terms) to (B, outputs)
    # numbers and not a tensor of them: that would be a copy to the GPU, and wait for it
    outputs = torch.stack([_total(parts, [plan.mix(r)[o] for r in plan.resolutions])
                           for o in range(plan.outputs)], 1)
    return outputs if plan.norm == 'utterance' else outputs.mean(0, keepdim=True).expand_as(outputs).clone()


def _total(parts: Tensor, mix: list[list[float]]) -> Tensor:   # (B,)
    weighted = [parts[:, r, t] * weight for r, row in enumerate(mix) for t, weight in enumerate(row) if weight]
    return sum(weighted) if weighted else torch.zeros_like(parts[:, 0, 0])


@_distance.register_fake
def _(enhanced, clean, lengths, filters, plan, backend, need_grad):
    made, size = _plan(plan), len(enhanced)
    return (enhanced.new_empty(size, made.outputs),
            enhanced.new_empty(size, len(made.resolutions), len(made.terms)),
            enhanced.new_empty(made.outputs, *enhanced.shape) if need_grad else enhanced.new_empty(0))


@torch.library.custom_op('speechloss::stft_distance_backward', mutates_args=())
def _pull(grad: Tensor, waves: Tensor, over_batch: bool) -> Tensor:
    "Gradient of the waves `(B, T)` from that of the outputs `(B, O)`; has no derivative of its own"
    # one norm over the batch: every utterance's output moves with every utterance
    if over_batch: grad = grad.sum(0, keepdim=True).expand_as(grad)
    result = torch.zeros_like(waves[0])
    for k, wave in enumerate(waves): result.addcmul_(wave, grad[:, k, None])
    return result


@_pull.register_fake
def _(grad, waves, over_batch):
    return torch.empty_like(waves[0])


def _keep(ctx, inputs, output):
    plan = _plan(inputs[4])
    ctx.over_batch, ctx.banks = plan.norm == 'batch', len(inputs[3])
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_parts, grad_waves):
    given = None if grad is None else _pull(grad, ctx.saved_tensors[0], ctx.over_batch)
    return given, None, None, [None] * ctx.banks, None, None, None


_distance.register_autograd(_backward, setup_context=_keep)


class Distances(NamedTuple):
    "What `stft_distance` returns"
    values: Tensor   # (B, terms), or (B,) with weights
    parts: Tensor    # (B, resolutions, terms), without gradient, for logs; no weight in it


def stft_distance(
    enhanced: Tensor,                      # (B, T), floating point
    clean: Tensor,                         # (B, T); gets no gradient
    resolutions,                           # of Resolution
    terms=('sc', 'log_l1'),                # some of TERMS
    *,
    weights=None,                          # one per term: return their weighted sum (B,)
    lengths: Tensor | None = None,         # (B,) valid samples; padding may hold anything
    filters=None,                          # per resolution None or a bank (bins, bands) >= 0, such as mel
    eps: float = EPS,                      # power of the magnitude's floor
    floor: str = 'smooth',                 # or 'clamp', which has no gradient below eps
    power: float = .3,                     # of 'compressed' and 'complex'
    norm: str = 'utterance',               # of 'sc'; 'batch': one norm, and all rows hold the batch's values
    sc_floor: float = SC_FLOOR,            # RMS magnitude added to the denominator of 'sc'
    offset: float = 0.,                    # added to magnitudes before the logarithm
    backend: str = 'auto',                 # see speechloss.kernels.backends
) -> Distances:
    """Distances of STFT magnitudes, summed over resolutions with their weights; 0 at identity.

    Numerics are float32 for shorter types, also under autocast; float64 stays float64. The
    gradient reaches `enhanced` alone. A magnitude has none at exact silence: 'complex' does.
    A second derivative, and forward-mode differentiation, need `backend='reference'`. Before a
    CUDA graph is captured, call once: tables are made on the first call. Raises ValueError and TypeError for what
    cannot be computed, before anything is.
    """
    plan = _checked_plan(resolutions, terms, weights, filters, eps, floor, power, norm, sc_floor, offset)
    _check_waves(enhanced, clean, lengths, plan)
    banks = _check_filters(filters, plan, enhanced)
    chosen = choose('torch' if backend == 'auto' and norm == 'batch' else backend, enhanced, clean)
    if chosen == 'triton' and norm == 'batch':
        raise ValueError("norm 'batch' has no Triton kernel: use backend='torch'")
    dtype = working_dtype(enhanced, clean)
    lengths = _lengths(lengths, enhanced, plan)
    with torch.autocast(enhanced.device.type, enabled=False):
        x, y = enhanced.to(dtype), clean.detach().to(dtype)
        if chosen == 'reference':
            values, parts = _reference(x, y, lengths, banks, plan)
        else:
            values, parts, _ = _distance(x, y, lengths, banks, plan.text(), chosen, wants_grad(x))
    return Distances(values[:, 0] if plan.weights else values, parts.detach())


def _lengths(lengths: Tensor | None, wave: Tensor, plan: Plan) -> Tensor | None:
    "On the device of the waves, and within what can be computed, whoever could not look at them"
    if lengths is None: return None
    return lengths.to(wave.device).clamp(max(r.n_fft for r in plan.resolutions) // 2 + 1, wave.shape[1])


def _reference(x, y, lengths, filters, plan: Plan) -> tuple[Tensor, Tensor]:
    if lengths is not None:
        # `where`, not a product: padding may hold anything, NaN included
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)
    banks = iter(filters)
    parts = torch.stack([
        reference_terms(x, y, r, next(banks).to(x.dtype) if has else None, plan, lengths)
        for r, has in zip(plan.resolutions, plan.filtered)], 1)
    return _outputs(parts, plan), parts


# ---------------------------------------------------------------------------------- checks

def _checked_plan(resolutions, terms, weights, filters, eps, floor, power, norm, sc_floor, offset) -> Plan:
    resolutions, terms = tuple(resolutions), tuple(terms)
    if not resolutions or not all(isinstance(r, Resolution) for r in resolutions):
        raise ValueError(f'resolutions is {resolutions!r}: give one Resolution or more')
    if not terms or set(terms) - set(TERMS) or len(set(terms)) < len(terms):
        raise ValueError(f'terms is {terms}: give some of {", ".join(TERMS)}, each once')
    if weights is not None and len(weights := tuple(map(float, weights))) != len(terms):
        raise ValueError(f'weights has {len(weights)} numbers and terms {len(terms)}: give one for each')
    for name, value, known in (('floor', floor, FLOORS), ('norm', norm, NORMS)):
        if value not in known:
            raise ValueError(f'{name} is {value!r}: choose one of {", ".join(known)}')
    if not eps > 0: raise ValueError(f'eps is {eps}: give a power above 0')
    if not 0 < power <= 1: raise ValueError(f'power is {power}: it must lie in (0, 1]')
    if sc_floor < 0 or offset < 0:
        raise ValueError(f'sc_floor is {sc_floor} and offset {offset}: neither may be negative')
    filters = [None] * len(resolutions) if filters is None else list(filters)
    if len(filters) != len(resolutions):
        raise ValueError(f'filters has {len(filters)} entries and there are {len(resolutions)} '
                         'resolutions: give one for each, None where there is no filter bank')
    filtered = tuple(bank is not None for bank in filters)
    if any(filtered) and 'complex' in terms:
        raise ValueError("term 'complex' compares complex spectra, which a filter bank has none of: "
                         'leave out the filters or the term')
    return Plan(resolutions, terms, weights, eps, floor, power, norm, sc_floor, offset, filtered)


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
        # on a GPU a look at the values would wait for it: there they are clamped, see `_lengths`
        if lengths.is_cpu and not torch.compiler.is_compiling():
            size, high = int(lengths.min()), int(lengths.max())
            if size < 1 or high > enhanced.shape[1]:
                raise ValueError(f'lengths go from {size} to {high}: they must lie in '
                                 f'1..{enhanced.shape[1]}, the samples of the batch')
    largest = max(r.n_fft for r in plan.resolutions)
    if size <= largest // 2:
        raise ValueError(f'the shortest wave has {size} samples and n_fft is {largest}: '
                         f'give at least n_fft // 2 + 1 = {largest // 2 + 1} samples')


def _check_filters(filters, plan: Plan, like: Tensor) -> list[Tensor]:
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
