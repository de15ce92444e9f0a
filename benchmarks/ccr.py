"""Contrastive regularisation as a loss between waves: two negatives, all layers, against plain torch.

Inputs are the enhanced, clean and noisy wave and the output of an earlier model. `plain` is the same
formula as one would write it; `pull` is the distance to clean alone, which needs two of the four
waves. Features are part of the time: the kernel by itself is in `contrastive.py`.
"""
from copy import deepcopy
from functools import cache, partial

import torch

from speechloss.features import RandomFeatures, STFTFeatures, SSLFeatures, VQFeatures
from speechloss.losses import ContrastiveRegularization, FeatureDistance

from .common import DEVICE, Contest, noisy_pair

SHAPES = ((1, 64000), (8, 64000))   # 4 s at 16 kHz
FEATURES = dict(stft=partial(STFTFeatures, resolutions=((512, 128), (1024, 256), (2048, 512))),
                random=RandomFeatures, ssl=partial(SSLFeatures, layers='all'), vq=partial(VQFeatures, layers='all'))
EPS, CLAMP = 1e-3, 10.


def inputs(batch: int, samples: int) -> tuple:
    enhanced, clean = noisy_pair(batch, samples)
    noise = .05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean)
    return enhanced, clean, clean + noise, clean + .3 * noise


class Plain(torch.nn.Module):
    "The ratio as one would write it, with the same weights and the same epsilon"
    def __init__(self, features, weights):
        super().__init__()
        self.features, self.weights = features, weights

    def forward(self, enhanced, clean, noisy, earlier):
        with torch.no_grad(): s, x, n = map(self.features, (clean, noisy, earlier))
        total = 0.
        for weight, *layer in zip(self.weights, self.features(enhanced), s, x, n):
            a, b, c, d = layer
            near, far, further, size = ((p - q).abs().mean((1, 2)) for p, q in (
                (a, b), (a, c), (a, d), (b, torch.zeros_like(b))))
            total = total + weight * near / (.5 * far + .5 * further + EPS * size)
        return (total / (1 + total / CLAMP)).mean()


class Ours(torch.nn.Module):
    def __init__(self, features, **options):
        super().__init__()
        self.loss = ContrastiveRegularization(features, eps=EPS, clamp=CLAMP, **options)

    def forward(self, enhanced, clean, noisy, earlier):
        return self.loss(enhanced, clean, noisy=noisy, negatives=dict(earlier=earlier))


class Pull(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.loss = FeatureDistance(features)

    def forward(self, enhanced, clean, noisy, earlier): return self.loss(enhanced, clean)


@cache
def providers(name: str) -> tuple[dict, torch.nn.Module]:
    "Built when first called: a process that measures one contest builds one network"
    features = FEATURES[name]().to(DEVICE)
    ours = Ours(features)
    plain = Plain(features, ours.loss.weights.tolist())
    found = dict(plain=plain, speechloss=ours, curriculum=Ours(features, curriculum={}),
                 info_nce=Ours(features, form='info_nce'), pull=Pull(features))
    return found, deepcopy(plain).double()


def contest(name: str, batch: int, samples: int, backward: bool) -> Contest:
    def provider(which): return lambda *waves: providers(name)[0][which](*waves)
    names = ('plain', 'speechloss', 'curriculum', 'info_nce', 'pull')
    return Contest('ccr', f'{name} K=2', f'{batch}x{samples}', partial(inputs, batch, samples),
                   {which: provider(which) for which in names}, truth=lambda *waves: providers(name)[1](*waves),
                   backward=backward, unlike=('curriculum', 'info_nce', 'pull'))


def contests() -> list[Contest]:
    return [contest(name, batch, samples, backward) for name in FEATURES for batch, samples in SHAPES
            for backward in (False, True)]
