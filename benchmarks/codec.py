"""What hearing costs: the codec loss and the masking loss beside the multi-resolution STFT loss.

Each loss is a formula of its own, so each has its own truth, the same module in float64. A second of each of 8
waves is what `window=1.` compares; `codec_cached` has heard the clean waves before.
"""
from copy import deepcopy
from functools import partial

from speechloss.losses import CodecLoss, MaskingLoss, MultiResolutionSTFTLoss

from .common import DEVICE, Contest, noisy_pair

SHAPES = ((1, 64000), (8, 64000), (8, 16000))   # at 16 kHz


def contests() -> list[Contest]:
    losses = dict(multi_resolution_stft=MultiResolutionSTFTLoss(), masking=MaskingLoss(), codec=CodecLoss(),
                  codec_inner=CodecLoss(layers='inner'), codec_cached=CodecLoss(cache=64))
    losses = {name: loss.to(DEVICE) for name, loss in losses.items()}
    truth = {name: deepcopy(loss).double() for name, loss in losses.items()}
    return [Contest('codec', 'perceptual losses', f'{b}x{t}', partial(noisy_pair, b, t), losses, truth=truth,
                    backward=backward) for b, t in SHAPES for backward in (False, True)]
