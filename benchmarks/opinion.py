"""Losses outside of the package: what DistillMOS, a network that was taught opinions of listeners, says of a wave.

    speechloss judge benchmarks.opinion:Opinion benchmarks.opinion:OpinionDistance --listeners MUSHRA

`Opinion` is 5 minus the opinion that the network guesses, without a reference, so the clean wave is not its minimum and
whatever pleases the network is: a training can please it in ways that nobody likes. `OpinionDistance` compares what
the network sees, frame by frame, before it makes up its mind; it is 0 at identity. `random_seed` draws the weights
anew: the control that says what was learned from listeners. Needs the extra `mos` (DistillMOS, Stahl and Gamper 2025,
MIT; its weights lie in its wheel).
"""
import copy

import numpy as np
import torch
from torch.nn import functional as F

from speechloss.features.base import Frozen, randomized
from speechloss.losses import Loss
from speechloss.metrics.opinions import distillmos_network

WINDOW, HOP = 122_880, 16_000    # samples at 16 kHz that the network takes, and between two such windows


class Single(Frozen):
    "Hold a network that stays in float32, as its window of the spectrum does"
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.net.float()
        return self


def zero_where_nan(wave):
    "Give a wave no gradient where it has none: at exact silence, for the network's magnitude"
    if wave.requires_grad: wave.register_hook(lambda gradient: gradient.nan_to_num(0., 0., 0.))
    return wave


class Judged(Loss):
    "Show windows of each utterance to DistillMOS"
    def __init__(self, *, random_seed: int | None = None, reduction: str = 'mean'):
        super().__init__(reduction=reduction, sample_rate=16000)
        net = copy.deepcopy(distillmos_network())
        self.net = Single(net if random_seed is None else randomized(net, seed=random_seed))

    def windows(self, wave):     # (T,) -> (windows, WINDOW)
        wave = F.pad(wave.float(), (0, max(WINDOW - len(wave), 0)))
        over = len(wave) - WINDOW
        starts = [int(share * over) for share in np.linspace(0, 1, -(-over // HOP) + 1)]
        return zero_where_nan(torch.stack([wave[k:k + WINDOW] for k in starts]))

    def utterances(self, waves):     # each cut to its length
        for k in range(len(waves.enhanced)):
            length = None if waves.lengths is None else int(waves.lengths[k])
            yield waves.enhanced[k, :length], waves.clean[k, :length]


class Opinion(Judged):
    "Measure by how much the guessed opinion falls short of 5; what it is compared with does not count"
    def values(self, waves):
        guessed = [self.net(self.windows(enhanced)).mean() for enhanced, _ in self.utterances(waves)]
        return dict(opinion=(5 - torch.stack(guessed)).to(waves.enhanced.dtype))


class OpinionDistance(Judged):
    "Measure the distance of what the network sees of two waves, before it pools over time; 0 at identity"
    def seen(self, wave):        # (T,) -> (windows, frames, dim)
        net, windows = self.net.net, self.windows(wave)
        windows = zero_where_nan(windows / (windows.abs().amax(1, keepdim=True) + 1e-8))
        judge = net.transformer_pool_attn
        frames = judge.norm_input(net.cnn(windows)).transpose(-1, -2)       # as its forward does
        return judge.norm_trans(judge.transformer(frames).transpose(-1, -2)).transpose(-1, -2)

    def values(self, waves):
        apart = [(self.seen(enhanced) - self.seen(clean)).abs().mean() for enhanced, clean in self.utterances(waves)]
        return dict(distance=torch.stack(apart).to(waves.enhanced.dtype))
