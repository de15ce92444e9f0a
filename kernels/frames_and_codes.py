"""`check`, `counted_frames`, `flattened`, `unit`, `anchor`: what the losses with a codebook share.

Frames have shape (N, D), or (B, F, D) with a length or a mask; codes have shape (K, D).
"""
import torch
from torch import Tensor

from .backends import working_dtype


def check(frames: Tensor, codes: Tensor) -> None:
    "Raise TypeError or ValueError where frames and codes do not go together"
    for name, value in dict(frames=frames, codes=codes).items():
        if not isinstance(value, Tensor):
            raise TypeError(f'{name} is {type(value).__name__}: give a tensor')
        if not value.is_floating_point():
            raise TypeError(f'{name} is {value.dtype}: give a floating-point tensor')
    if frames.ndim not in (2, 3):
        raise ValueError(f'frames has shape {tuple(frames.shape)}: give (N, D) or (B, F, D)')
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f'codes has shape {tuple(codes.shape)}: give (K, D) with at least one code')
    if frames.shape[-1] != codes.shape[-1]:
        raise ValueError(f'frames has shape {tuple(frames.shape)} and codes {tuple(codes.shape)}: '
                         'their last dimensions must be equal')
    if frames.device != codes.device:
        raise ValueError(f'frames is on {frames.device} and codes on {codes.device}: move one of them')


def counted_frames(
    frames: Tensor,            # (N, D) or (B, F, D)
    lengths: Tensor | None,    # (B,) frames that count, of (B, F, D)
    mask: Tensor | None,       # frames.shape[:-1], bool: True counts
) -> Tensor | None:            # bool, frames.shape[:-1]; None if all count
    "Return which frames count; TypeError or ValueError where lengths or mask do not fit the frames"
    valid = None
    if lengths is not None:
        if frames.ndim != 3 or not isinstance(lengths, Tensor) or lengths.shape != frames.shape[:1]:
            raise ValueError(f'lengths is {described(lengths)} for frames of shape {tuple(frames.shape)}: '
                             'give (B,) frame counts for frames of shape (B, F, D)')
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f'lengths is {lengths.dtype}: give integers, counts of frames')
        if lengths.is_cpu and not torch.compiler.is_compiling() and len(lengths):
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > frames.shape[1]:
                raise ValueError(f'lengths runs from {low} to {high}: '
                                 f'there are {frames.shape[1]} frames, so give 0 to {frames.shape[1]}')
        valid = torch.arange(frames.shape[1], device=frames.device) < lengths.to(frames.device)[:, None]
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != frames.shape[:-1] or mask.dtype != torch.bool:
            raise ValueError(f'mask is {described(mask)}: give booleans of shape {tuple(frames.shape[:-1])}, '
                             'True where a frame counts')
        mask = mask.to(frames.device)
        valid = mask if valid is None else valid & mask
    return valid


def described(value) -> str:
    "Name a wrong argument in a few words, for an error"
    return f'{value.dtype} of shape {tuple(value.shape)}' if isinstance(value, Tensor) else type(value).__name__


def flattened(
    frames: Tensor,          # (..., D)
    valid: Tensor | None,    # bool, frames.shape[:-1]
    codes: Tensor,           # (K, D)
) -> Tensor:                 # (N, D)
    "Return frames as rows in the working precision of both; rows that do not count are zeros"
    x = frames.to(working_dtype(frames, codes))
    if valid is not None:
        x = x.masked_fill(~valid[..., None], 0)
    return x.reshape(-1, x.shape[-1])


def unit(x: Tensor) -> Tensor:   # (..., D), same shape
    "Scale vectors to length 1, whatever their size; zeros stay zeros, without a gradient"
    peak = x.detach().abs().amax(-1, keepdim=True)
    zero = peak == 0
    y = x / peak.masked_fill(zero, 1)                # no square under- or overflows
    return (y / (y.square().sum(-1, keepdim=True) + zero).sqrt()).masked_fill(zero, 0)


def anchor(codes: Tensor) -> Tensor:   # (K, D) -> (D,)
    """Return a point amid the codes to measure from, so that an offset they share does not cancel.

    Rounded to about their spread: 0 for codes around 0, and whole numbers stay whole.
    """
    middle = codes.mean(0)
    coarse = 1.5 * (codes - middle).abs().amax() / torch.finfo(codes.dtype).eps
    return (middle + coarse) - coarse
