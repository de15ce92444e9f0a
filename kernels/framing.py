"""`frame_count`, `pad_reflect` and `window_of` for frames of waves, and `fold_reflection` for the way back."""
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F


#: One length, or those of a batch
Lengths = TypeVar('Lengths', int, Tensor)


def frame_count(
    lengths: Lengths,  # samples, an integer or (B,)
    hop_length: int,   # samples between frames
    n_fft: int = 0,    # samples; an odd one has `n_fft - 1` samples of padding, not n_fft
) -> Lengths:          # frames, of the same type
    "Return the number of frames of a centre-padded STFT: `1 + lengths // hop_length`, with an even n_fft"
    return 1 + (lengths - n_fft % 2) // hop_length


def frame_mask(
    lengths: Tensor,  # (B,) valid frames (or samples)
    size: int,        # frames (or samples) in the batch
) -> Tensor:          # (B, size), True where valid
    "Return a mask of the valid positions"
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def shortest(
    wave: Tensor,                   # (B, T)
    lengths: Tensor | None = None,  # (B,) valid samples; None: all T
) -> int:                           # samples
    "Return the samples of the shortest utterance; under torch.compile, those of the batch"
    if lengths is None or torch.compiler.is_compiling():
        return wave.shape[-1]
    return int(lengths.min())


def pad_reflect(
    wave: Tensor,                   # (B, T)
    pad: int,                       # samples on each side
    lengths: Tensor | None = None,  # (B,) valid samples; None: all T
) -> Tensor:                        # (B, T + 2 * pad)
    "Pad each utterance with its reflection at both of its ends; beyond that, zeros. ValueError if it is too short"
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
    "Make an analysis window by its name; ValueError for another name"
    if name not in WINDOWS:
        raise ValueError(f'window is {name!r}: choose one of {", ".join(WINDOWS)}')
    return WINDOWS[name](win_length, dtype=like.dtype, device=like.device)


@lru_cache(maxsize=64)
def kept_window(name: str, win_length: int, gain: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    "Return `gain` times the window of `window_of`, made once"
    # made while validating, it must still serve a training
    with torch.inference_mode(False):
        return gain * window_of(name, win_length, torch.empty(0, dtype=dtype, device=device))


def fold_reflection(
    padded: Tensor,  # (..., length + 2 * pad)
    pad: int,        # samples on each side, at least 1
) -> Tensor:         # (..., length)
    "Add the padding back to the samples it reflects: the adjoint of `pad_reflect` without lengths"
    wave = padded[..., pad:-pad].clone()
    wave[..., 1:pad + 1] += padded[..., :pad].flip(-1)
    wave[..., -pad - 1:-1] += padded[..., -pad:].flip(-1)
    return wave
