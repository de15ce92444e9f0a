"""`masked_wave`: the waves of spectra under a mask of bands on a CPU, with a short backward pass.

A few utterances at a time go through product, inverse transform and overlap-add, so that what one
step leaves is still in the cache for the next; autograd would take each step over the whole batch.
"""
import torch
from torch import Tensor

from .backends import check_floating

#: Utterances that go through all steps together: of 1 to 8, two were the fastest for waves of 4 s
TOGETHER = 2


def masked_wave(
    spec: Tensor,        # complex (B, frames, bins), of frames set in n_fft // 2 zeros
    mask: Tensor,        # (B, frames, 2 bands): real parts, then imaginary parts
    bands: Tensor,       # (bins, bands): how much of each band a bin takes
    window: Tensor,      # (n_fft,), of the synthesis
    envelope: Tensor,    # (T,), what the sum of the overlapped frames is multiplied by
    *,
    hop_length: int,     # samples between frames
) -> Tensor:             # (B, T)
    """Multiply a spectrum by the mask of its bins and return its waves, by overlap-add.

    Gradients reach the mask alone, and have no derivative of their own. Raises ValueError and TypeError for shapes
    and types that do not fit.

    >>> spec, mask = torch.randn(1, 3, 5, dtype=torch.complex64), torch.randn(1, 3, 4)
    >>> masked_wave(spec, mask, torch.rand(5, 2), torch.ones(8), torch.ones(12), hop_length=4).shape
    torch.Size([1, 12])
    """
    check_floating('mask', mask)
    n_fft, frames = len(window), spec.shape[1] if spec.ndim == 3 else 0
    if not spec.is_complex() or spec.shape[2:] != bands.shape[:1] or len(bands) != n_fft // 2 + 1 \
            or mask.shape != (*spec.shape[:2], 2 * bands.shape[1]):
        raise ValueError(f'spec is {spec.dtype} of shape {tuple(spec.shape)}, mask has shape {tuple(mask.shape)}, '
                         f'bands {tuple(bands.shape)} and window {tuple(window.shape)}: give complex (batch, frames, '
                         'bins), (batch, frames, 2 bands), (bins, bands) and (n_fft,)')
    most = (frames - 1) * hop_length + n_fft - n_fft // 2
    if not 0 < len(envelope) <= most:
        raise ValueError(f'envelope has {len(envelope)} samples: give 1 to {most}, which {frames} frames reach')
    return _masked_wave(spec, mask, bands, window, envelope, hop_length)


# ------------------------------------------------------------------------------ the operators

@torch.library.custom_op('speechloss::masked_wave', mutates_args=())
def _masked_wave(spec: Tensor, mask: Tensor, bands: Tensor, window: Tensor, envelope: Tensor,
                 hop_length: int) -> Tensor:
    n_fft, wave = len(window), mask.new_empty(len(mask), len(envelope))
    for some, masks, out in zip(*(tensor.split(TOGETHER) for tensor in (spec, mask, wave))):
        real, imag = (part @ bands.T for part in masks.chunk(2, -1))
        frames = torch.fft.irfft(torch.complex(real, imag).mul_(some), n_fft).mul_(window)
        total = _overlapped(frames, hop_length)
        torch.mul(total[:, n_fft // 2:n_fft // 2 + len(envelope)], envelope, out=out)
    return wave


@_masked_wave.register_fake
def _(spec, mask, bands, window, envelope, hop_length): return mask.new_empty(len(mask), len(envelope))


@torch.library.custom_op('speechloss::masked_wave_backward', mutates_args=())
def _masked_wave_backward(grad: Tensor, spec: Tensor, bands: Tensor, window: Tensor, envelope: Tensor,
                          hop_length: int) -> Tensor:
    "Gradient of the mask"
    n_fft, frames = len(window), spec.shape[1]
    found = grad.new_empty(*spec.shape[:2], 2 * bands.shape[1])
    # the gradient of an inverse transform is a transform over n_fft, twice where a bin stands for two
    share = torch.full_like(bands[:, :1], 2 / n_fft)
    share[0] = 1 / n_fft
    if n_fft % 2 == 0: share[-1] = 1 / n_fft
    from_bins = bands * share
    for some, waves, out in zip(*(tensor.split(TOGETHER) for tensor in (spec, grad, found))):
        padded = waves.new_zeros(len(waves), (frames - 1) * hop_length + n_fft)
        torch.mul(waves, envelope, out=padded[:, n_fft // 2:n_fft // 2 + len(envelope)])
        slopes = torch.fft.rfft(padded.unfold(-1, n_fft, hop_length) * window).mul_(some.conj())
        for part, place in zip((slopes.real, slopes.imag), out.chunk(2, -1)): place.copy_(part @ from_bins)
    return found


@_masked_wave_backward.register_fake
def _(grad, spec, bands, window, envelope, hop_length):
    return grad.new_empty(*spec.shape[:2], 2 * bands.shape[1])


def _keep(ctx, inputs, output):
    spec, _, *others, ctx.hop_length = inputs
    ctx.save_for_backward(spec, *others)


def _backward(ctx, grad):
    found = _masked_wave_backward(grad, *ctx.saved_tensors, ctx.hop_length) if ctx.needs_input_grad[1] else None
    return None, found, None, None, None, None


_masked_wave.register_autograd(_backward, setup_context=_keep)


def _overlapped(frames: Tensor, hop_length: int) -> Tensor:   # (B, frames, n_fft) -> (B, at least their reach)
    "Sum of the frames at their places, in blocks of a hop"
    parts = frames.split(hop_length, -1)
    total = frames.new_zeros(len(frames), frames.shape[1] + len(parts) - 1, hop_length)
    for k, part in enumerate(parts): total[:, k:k + frames.shape[1], :part.shape[2]] += part
    return total.flatten(1)
