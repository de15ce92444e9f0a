"""What hearing costs: the codec loss and the masking loss beside the multi-resolution STFT loss.

Each loss is a formula of its own, so each has its own truth, the same module in float64.
"""
from copy import deepcopy

import torch

from speechloss.losses import CodecLoss, MaskingLoss, MultiResolutionSTFTLoss

from .common import DEVICE, Contest

SHAPES = ((1, 64000), (8, 64000))   # 4 s at 16 kHz


def noise(shape):
    draw = torch.Generator().manual_seed(0)
    clean = .1 * torch.randn(*shape, generator=draw)
    return (clean + .02 * torch.randn(*shape, generator=draw)).to(DEVICE), clean.to(DEVICE)


def contests() -> list[Contest]:
    losses = dict(multi_resolution_stft=MultiResolutionSTFTLoss(), masking=MaskingLoss(), codec=CodecLoss(),
                  codec_inner=CodecLoss(layers='inner'))
    losses = {name: loss.to(DEVICE) for name, loss in losses.items()}
    truth = {name: deepcopy(loss).double() for name, loss in losses.items()}
    return [Contest('codec', 'perceptual losses', f'{b}x{t}', lambda shape=(b, t): noise(shape), losses, truth=truth,
                    backward=backward) for b, t in SHAPES for backward in (False, True)]
