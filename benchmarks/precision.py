"""How wrong the gradient of an STFT loss becomes when its DFT is computed in short numbers.

    python -m benchmarks.precision [precision.csv]

No GPU is needed: operands are rounded as tensor cores round them, products are summed in
float32. What real tensor cores lose while they sum is not in these figures. The DFT is the
folded one of the kernels, its adjoint is rounded the same way, and all that follows the DFT
is float32 in every mode. The reference is float64 of the same float32 waves.
"""
import csv
import sys

import torch
from torch import Tensor

from speechloss.kernels.framing import pad_reflect
from speechloss.kernels.stft_plan import EPS, SC_FLOOR, Plan, Resolution
from speechloss.kernels.stft_torch import reference_terms
from speechloss.kernels.stft_triton_tables import exact

RESOLUTIONS = (Resolution(1024, 120, 600), Resolution(2048, 240, 1200), Resolution(512, 50, 240))
PLAN = Plan(RESOLUTIONS, ('sc', 'log_l1'), (1., 1.))
COLUMNS = ('mode', 'n_fft', 'hop_length', 'win_length', 'grad_err', 'loss_err', 'log_mean', 'log_max', 'mag_err')


def tf32(x: Tensor) -> Tensor:
    "float32 with the 10 bits of fraction that a TF32 product reads, rounded to nearest, ties away"
    return ((x.view(torch.int32) + 0x1000) & ~0x1fff).view(torch.float32)


def fp16(x: Tensor) -> Tensor: return x.half().float()


def bf16(x: Tensor) -> Tensor: return x.bfloat16().float()


def parts(x: Tensor, rounding, count: int) -> list[Tensor]:
    "`count` short numbers whose sum is x, or nearly"
    found = []
    for _ in range(count):
        found.append(rounding(x))
        x = x - found[-1]
    return found


#: Mode: rounding, pairs of (part of the signal, part of the table), small products first, and
#: whether rows are scaled to a power of two before they are split
MODES = {
    'GEMM float32': (None, (), False),
    'fp16x3 scaled': (fp16, ((1, 0), (0, 1), (0, 0)), True),
    'tf32x3': (tf32, ((1, 0), (0, 1), (0, 0)), False),
    'bf16x6': (bf16, ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)), False),
    'fp16x3 unscaled': (fp16, ((1, 0), (0, 1), (0, 0)), False),
    'bf16x3': (bf16, ((1, 0), (0, 1), (0, 0)), False),
    'fp16x2 signal split': (fp16, ((1, 0), (0, 0)), True),
    'bf16x2 signal split': (bf16, ((1, 0), (0, 0)), False),
    'tf32': (tf32, ((0, 0),), False),
    'fp16': (fp16, ((0, 0),), True),
    'bf16': (bf16, ((0, 0),), False),
}


def product(values: Tensor, table: Tensor, mode: str) -> Tensor:
    "values (rows, k) @ table (k, n), float64, as `mode` computes it; one float32 sum"
    if values.dtype == torch.float64: return values @ table
    rounding, pairs, scaled = MODES[mode]
    if rounding is None: return values @ table.float()
    scale = torch.ones(())
    if scaled: scale = torch.exp2(12 - values.abs().amax(1, keepdim=True).clamp_min(1e-30).log2().floor())
    # tables are given with the largest entry near 1: the kernels lift theirs to 2^8
    lift = 256. if scaled else 1.
    a = parts(values * scale, rounding, 1 + max(i for i, _ in pairs))
    exact_table, b = table * lift, []
    for _ in range(1 + max(j for _, j in pairs)):
        b.append(rounding(exact_table.float()))
        exact_table = exact_table - b[-1].double()
    return torch.cat([a[i] for i, _ in pairs], 1) @ torch.cat([b[j] for _, j in pairs]) / (scale * lift)


class Product(torch.autograd.Function):
    "`product`, and its adjoint in the same mode"
    @staticmethod
    def forward(ctx, values, table, mode):
        ctx.table, ctx.mode = table, mode
        return product(values, table, mode)

    @staticmethod
    def backward(ctx, grad):
        return product(grad.contiguous(), ctx.table.T, ctx.mode), None, None


def magnitude(wave: Tensor, resolution: Resolution, mode: str) -> Tensor:
    "(frames, bins) by the folded DFT, floored as the kernels do"
    n, size = resolution.n_fft, resolution.win_length
    cos, sin, skip = exact(resolution)
    first = (n - size) // 2
    frames = pad_reflect(wave[None], n // 2)[0][first:].unfold(0, size, resolution.hop_length)
    frames = frames[:1 + (len(wave) - n % 2) // resolution.hop_length]
    i = torch.arange(skip, size // 2 + 1)
    paired = (i > 0) & (2 * i < size)
    left, right = frames[:, i], frames[:, (size - i) % size] * paired
    re, im = Product.apply(left + right, cos, mode), Product.apply(left - right, sin, mode)
    return (re.square() + im.square() + EPS).sqrt()


def loss(enhanced: Tensor, clean: Tensor, resolution: Resolution, mode: str) -> Tensor:
    "Spectral convergence plus L1 of log magnitudes"
    if mode == 'torch.stft float32':
        return reference_terms(enhanced[None], clean[None], resolution, None, PLAN).sum()
    e, s = magnitude(enhanced, resolution, mode), magnitude(clean, resolution, mode)
    convergence = (s - e).norm() / (s.norm() + SC_FLOOR * s.numel() ** .5)
    return convergence + (s.log() - e.log()).abs().mean()


def gradient(enhanced: Tensor, clean: Tensor, resolution: Resolution, mode: str) -> tuple[Tensor, Tensor]:
    x = enhanced.clone().requires_grad_()
    value = loss(x, clean, resolution, mode)
    return value.detach(), torch.autograd.grad(value, x)[0]


def speech_like(seconds: float = 1., rate: int = 16000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Enhanced and clean (T,): clean falls 12 dB an octave above 100 Hz and pauses at -80 dBFS,
    enhanced has white noise left in it."""
    size, make = int(seconds * rate), torch.Generator().manual_seed(seed)
    voice, pause, left = torch.randn(3, size, generator=make, dtype=torch.float64)
    tilt = (torch.fft.rfftfreq(size, 1 / rate) / 100).clamp_min(1).double() ** -2
    voice, pause = torch.fft.irfft(torch.fft.rfft(torch.stack([voice, pause])) * tilt, size)
    beat = torch.sin(2 * torch.pi * 3 * torch.arange(size, dtype=torch.float64) / rate) > -.4
    voice, pause, left = (wave / wave.abs().max() for wave in (voice, pause, left))
    clean = .5 * voice * beat + 1e-4 * pause
    return (clean + .02 * left).float(), clean.float()


def rows(seconds: float = 1., seed: int = 0, modes=('torch.stft float32', *MODES)) -> list[dict]:
    "One row for each mode and resolution, with relative errors against float64"
    enhanced, clean = speech_like(seconds, seed=seed)
    found = []
    for resolution in RESOLUTIONS:
        value, right = gradient(enhanced.double(), clean.double(), resolution, 'float64')
        true = magnitude(enhanced.double(), resolution, 'float64')
        for mode in modes:
            got, grad = gradient(enhanced, clean, resolution, mode)
            if mode == 'torch.stft float32':
                mag = torch.stft(enhanced, resolution.n_fft, resolution.hop_length, resolution.win_length,
                                 torch.hann_window(resolution.win_length), return_complex=True).T.abs()
                mag = (mag.square() + EPS).sqrt()
            else:
                mag = magnitude(enhanced, resolution, mode)
            logs = (mag.double().log() - true.log()).abs()
            found.append(dict(zip(COLUMNS, (
                mode, resolution.n_fft, resolution.hop_length, resolution.win_length,
                float((grad - right).norm() / right.norm()), float((got - value).abs() / value),
                float(logs.mean()), float(logs.max()), float((mag - true).norm() / true.norm())))))
    return found


def main(path: str = 'benchmarks/precision.csv') -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        for row in rows():
            writer.writerow({k: f'{v:.3g}' if isinstance(v, float) else v for k, v in row.items()})


if __name__ == '__main__':
    main(*sys.argv[1:])
