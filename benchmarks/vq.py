"""What an autoencoder of clean speech costs as a loss: with and without a clean wave, beside MR-STFT.

Each loss is a formula of its own, so each has its own truth, the same module in float64.
"""
from copy import deepcopy
from functools import partial

from torch import nn

from speechloss.losses import MultiResolutionSTFTLoss, VQLoss
from speechloss.metrics import VQScore

from .common import DEVICE, Contest, noisy_pair

SHAPES = ((1, 64000), (8, 64000))   # 4 s at 16 kHz


class Score(nn.Module):
    "What a training without clean speech would add"
    def __init__(self):
        super().__init__()
        self.score = VQScore()

    def forward(self, enhanced, clean): return (1 - self.score(enhanced)).mean()


def contests() -> list[Contest]:
    losses = dict(multi_resolution_stft=MultiResolutionSTFTLoss(), vq=VQLoss(), vq_all=VQLoss(layers='all'),
                  vq_score=Score())
    losses = {name: loss.to(DEVICE) for name, loss in losses.items()}
    truth = {name: deepcopy(loss).double() for name, loss in losses.items()}
    return [Contest('vq', 'losses of clean speech', f'{b}x{t}', partial(noisy_pair, b, t), losses, truth=truth,
                    backward=backward) for b, t in SHAPES for backward in (False, True)]
