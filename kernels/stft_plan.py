"""`Resolution` and `Plan`: what a call of `stft_distance` computes, beside its tensors.

A custom operator of torch takes tensors, numbers and text, but no dataclass. So a plan goes
through it as JSON: `Plan.text` writes it and `plan_of` reads it back.
"""
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

from .framing import WINDOWS

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
    """One STFT: centred, reflected at the ends, periodic window in the middle of `n_fft`.

    Raises ValueError where the sizes or the name of the window do not fit.
    """
    n_fft: int = 1024
    hop_length: int = 256
    # samples; given as None it becomes n_fft, so that every Resolution holds a number
    win_length: int = None          # type: ignore[assignment]
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
    def bins(self) -> int:
        "Number of frequency bins, `n_fft // 2 + 1`"
        return self.n_fft // 2 + 1


@dataclass(frozen=True)
class Plan:
    "What a call computes, apart from its tensors: plain numbers and names"
    resolutions: tuple[Resolution, ...]
    terms: tuple[str, ...]      # some of TERMS
    weights: tuple[float, ...] | None = None   # one output, the weighted sum, instead of one a term
    eps: float = EPS
    floor: str = 'smooth'       # magnitude sqrt(power + eps), or 'clamp': sqrt(max(power, eps))
    power: float = .3           # of the compressed terms
    norm: str = 'utterance'     # of spectral convergence; 'batch': one norm over the batch
    sc_floor: float = SC_FLOOR
    offset: float = 0.          # added to filtered magnitudes before the logarithm
    filtered: tuple[bool, ...] = ()   # which resolutions have a filter bank

    @property
    def outputs(self) -> int:
        "Number of outputs of an utterance: 1 with weights, else one a term"
        return 1 if self.weights else len(self.terms)

    def mix(self, resolution: Resolution, utterances: int = 1) -> list[list[float]]:
        """Return how much each term of a resolution counts in each output, (outputs, terms).

        With a norm over the batch, an output is the mean over `utterances` of every term but
        'sc', which is one number for the batch already.
        """
        share = [resolution.weight if self.norm == 'utterance' or name == 'sc'
                 else resolution.weight / utterances for name in self.terms]
        if self.weights: return [[w * s for w, s in zip(self.weights, share)]]
        return [[s * (i == k) for k, s in enumerate(share)] for i in range(len(share))]

    def text(self) -> str:
        "Write the plan as JSON with named fields; `plan_of` reads it"
        return _json(self)


_RESOLUTION, _PLAN = (tuple(field.name for field in fields(kind)) for kind in (Resolution, Plan))
_NOT_FINITE = {'inf': 'Infinity', '-inf': '-Infinity', 'nan': 'NaN'}   # as Python's json reads them


def _json(value) -> str:
    "`json.dumps` for what a plan holds, in steps that torch.compile can trace"
    if value is None: return 'null'
    if isinstance(value, bool): return 'true' if value else 'false'
    if isinstance(value, str): return f'"{value}"'     # a name from a fixed list: nothing to escape
    if isinstance(value, tuple): return '[' + ', '.join([_json(item) for item in value]) + ']'
    if isinstance(value, (Resolution, Plan)):
        names = _PLAN if isinstance(value, Plan) else _RESOLUTION
        return '{' + ', '.join([f'"{name}": {_json(getattr(value, name))}' for name in names]) + '}'
    return _NOT_FINITE.get(str(value), str(value))


@lru_cache(maxsize=256)
def plan_of(text: str) -> Plan:
    "Read a plan from what `Plan.text` wrote"
    data = json.loads(text)
    data['resolutions'] = [_made(Resolution, each) for each in data['resolutions']]
    return _made(Plan, {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def _made(kind, data: dict):
    "A dataclass from its named fields; an integer given for a float becomes one"
    floats = {field.name for field in fields(kind) if field.type is float}
    return kind(**{name: float(value) if name in floats else value for name, value in data.items()})


def checked_plan(
    resolutions: Iterable[Resolution],
    terms: Iterable[str],              # some of TERMS
    weights: Iterable[float] | None,   # one a term
    filters: Iterable | None,          # one a resolution, None where it has no filter bank
    *,
    eps: float, floor: str, power: float, norm: str, sc_floor: float, offset: float,
) -> Plan:
    "Make the plan of a call; ValueError for what cannot be computed"
    resolutions, terms = tuple(resolutions), tuple(terms)
    if not resolutions or not all(isinstance(r, Resolution) for r in resolutions):
        raise ValueError(f'resolutions is {resolutions!r}: give one Resolution or more')
    if not terms or set(terms) - set(TERMS) or len(set(terms)) < len(terms):
        raise ValueError(f'terms is {terms}: give some of {", ".join(TERMS)}, each once')
    numbers = None if weights is None else tuple(map(float, weights))
    if numbers is not None and len(numbers) != len(terms):
        raise ValueError(f'weights has {len(numbers)} numbers and terms {len(terms)}: give one for each')
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
    return Plan(resolutions, terms, numbers, eps, floor, power, norm, sc_floor, offset, filtered)
