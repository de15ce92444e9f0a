"""The contrastive ratio over the layers of a WavLM-base, with two negatives, against plain torch.

Inputs are the layers of enhanced, clean and two negatives, one after the other.
"""
import torch
import torch.nn.functional as F

from speechloss.kernels.contrastive import DISTANCES, contrastive_ratio

from .common import DEVICE, Contest

LAYERS, FRAMES, DIM, NEGATIVES = 13, 199, 768, 2      # WavLM-base, 4 s
BATCHES = (16, 64) if DEVICE == 'cuda' else (4, 16)
EPS = 1e-3


def inputs(B: int) -> tuple:
    draw = torch.Generator(DEVICE).manual_seed(B)
    clean = [torch.randn(B, FRAMES, DIM, generator=draw, device=DEVICE) for _ in range(LAYERS)]
    def near(size): return [c + size * torch.randn(c.shape, generator=draw, device=DEVICE) for c in clean]
    return *near(.5), *clean, *near(1.), *near(.6)


def stacks(layers) -> tuple:   # enhanced, clean, [negatives]
    enhanced, clean, *negatives = (list(layers[k:k + LAYERS]) for k in range(0, len(layers), LAYERS))
    return enhanced, clean, negatives


def weights(like) -> torch.Tensor: return torch.tensor([.6, .4], dtype=like.dtype, device=like.device)


def plain(distance: str):
    "As one would write it: per utterance, layer by layer"
    apart = dict(l1=lambda a, b: (a - b).abs().mean((1, 2)), l2=lambda a, b: (a - b).square().mean((1, 2)),
                 cosine=lambda a, b: (1 - F.cosine_similarity(a, b, dim=-1)).mean(1))[distance]

    def loss(*layers):
        enhanced, clean, negatives = stacks(layers)
        total, share = 0, weights(enhanced[0])
        for l, (e, c) in enumerate(zip(enhanced, clean)):
            size = 1. if distance == 'cosine' else apart(c, torch.zeros_like(c[:, :1, :1]))
            total = total + apart(e, c) / (sum(w * apart(e, n[l]) for w, n in zip(share, negatives)) + EPS * size)
        return total.mean()
    return loss


def fused(distance: str, backend: str = 'auto'):
    def loss(*layers):
        enhanced, clean, negatives = stacks(layers)
        return contrastive_ratio(enhanced, clean, negatives, weights=weights(enhanced[0]), distance=distance,
                                 eps=EPS, backend=backend).mean()
    return loss


def contests() -> list[Contest]:
    found = []
    for distance in DISTANCES:
        providers = {'torch': plain(distance), 'speechloss': fused(distance)}
        if DEVICE == 'cuda':
            providers |= {'compile': torch.compile(plain(distance)), 'speechloss-torch': fused(distance, 'torch')}
        for B in BATCHES:
            # all features are read once, the gradient is written once; signs are written and read
            traffic = B * LAYERS * FRAMES * DIM * (4. * (3 + NEGATIVES) + (2 if distance == 'l1' else 4 * 4))
            found.append(Contest('contrastive', f'{distance} K={NEGATIVES}', f'{B}x{LAYERS}x{FRAMES}x{DIM}',
                                 lambda B=B: inputs(B), providers, truth=plain(distance), gradients=LAYERS,
                                 bytes_modelled=traffic))
    return found
