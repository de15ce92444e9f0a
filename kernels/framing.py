"""Frames of waves and back: reflected ends, windows, and the adjoint of framing by gather."""
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def frame_count(
    lengths,          # samples, int or (B,)
    hop_length: int,  # samples between frames
    n_fft: int = 0,   # samples; an odd one is padded by a sample less than it is long
):                    # frames of a centre-padded STFT, same type
    "Number of STFT frames of an utterance: `1 + lengths // hop_length`"
    return 1 + (lengths - n_fft % 2) // hop_length


def frame_mask(
    lengths: Tensor,  # (B,) valid frames (or samples)
    size: int,        # frames (or samples) in the batch
) -> Tensor:          # (B, size), True where valid
    "Mask of the valid positions"
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def shortest(
    wave: Tensor,                   # (B, T)
    lengths: Tensor | None = None,  # (B,) valid samples; None: all T
) -> int:                           # samples
    "Samples of the shortest utterance; while compiling, those of the batch"
    if lengths is None or torch.compiler.is_compiling():
        return wave.shape[-1]
    return int(lengths.min())


def pad_reflect(
    wave: Tensor,                   # (B, T)
    pad: int,                       # samples on each side
    lengths: Tensor | None = None,  # (B,) valid samples; None: all T
) -> Tensor:                        # (B, T + 2 * pad)
    "Reflect each utterance at its own two ends; beyond that, zeros"
    if (size := shortest(wave, lengths)) <= pad:
        raise ValueError(
            f'the wave has {size} samples, too short to be padded by {pad}: '
            f'give at least n_fft // 2 + 1 = {pad + 1} samples')
    if lengths is None:
        return F.pad(wave[:, None], (pad, pad), mode='reflect')[:, 0]
    last = lengths[:, None] - 1                                      # (B, 1)
    position = torch.arange(-pad, wave.shape[-1] + pad, device=wave.device)
    source = position.abs().expand(len(wave), -1)                    # left end
    source = torch.where(source > last, 2 * last - source, source)   # right end
    padded = wave.gather(-1, source.clamp(0, wave.shape[-1] - 1))
    return padded * (position <= last + pad)


WINDOWS = dict(hann=torch.hann_window, hamming=torch.hamming_window, blackman=torch.blackman_window,
               bartlett=torch.bartlett_window, kaiser=torch.kaiser_window)


def window_of(
    name: str,         # one of WINDOWS, periodic
    win_length: int,   # samples
    like: Tensor,      # gives dtype and device
) -> Tensor:           # (win_length,)
    "Analysis window by name"
    if name not in WINDOWS:
        raise ValueError(f'window is {name!r}: choose one of {", ".join(WINDOWS)}')
    return WINDOWS[name](win_length, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=64)
def kept_window(name: str, win_length: int, gain: float, dtype: torch.dtype, device) -> Tensor:
    "A window that is made once: `gain` times that of `window_of`"
    # made while validating, it must still serve a training
    with torch.inference_mode(False):
        return gain * window_of(name, win_length, torch.empty(0, dtype=dtype, device=device))


def overlap_add(
    frames: Tensor,   # (F, size)
    hop_length: int,  # samples between frames
    length: int,      # samples of the result, >= (F - 1) * hop_length + size
) -> Tensor:          # (length,)
    """The adjoint of cutting frames.

    Every `stride`-th frame lies beside the one before without overlap, so each of `stride` adds
    is one strided sum: no scatter, and the same bits every time.
    """
    count, size = frames.shape
    stride = -(-size // hop_length)
    wave = frames.new_zeros(length + stride * hop_length)
    for first in range(min(stride, count)):
        part = frames[first::stride]
        place = wave.as_strided(part.shape, (stride * hop_length, 1), first * hop_length)
        place += part
    return wave[:length]


def fold_reflection(
    padded: Tensor,  # (length + 2 * pad,)
    pad: int,        # samples on each side
) -> Tensor:         # (length,)
    "The adjoint of reflecting both ends"
    wave = padded[pad:len(padded) - pad].clone()
    wave[1:pad + 1] += padded[:pad].flip(0)
    wave[-pad - 1:-1] += padded[len(padded) - pad:].flip(0)
    return wave
