"""Nearest code and token cross-entropy against `cdist` with `argmin`, a plain product, and `cross_entropy`."""
import torch
import torch.nn.functional as F

from speechloss.kernels.nearest_code import nearest_code
from speechloss.kernels.token_loss import token_cross_entropy

from .common import DEVICE, Contest

#: Frames, codes, dimensions: enhancement and quality of VQScore
SHAPES = (24000, 4096, 128), (24000, 2048, 32)


def trained(n: int, k: int, d: int) -> tuple:
    "Frames around codes, as of a trained codebook, and the codes; the token of frame i is i % k"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(k, d, generator=generator)
    frames = codes[torch.arange(n) % k] + .5 * torch.randn(n, d, generator=generator)
    return frames.to(DEVICE), codes.to(DEVICE)


def tokens(frames, codes):
    return torch.arange(len(frames), device=frames.device) % len(codes)


def by_cdist_argmin(frames, codes):
    index = torch.cdist(frames.detach(), codes).argmin(-1)
    return (frames - codes[index]).square().sum()


def by_product(frames, codes):
    index = torch.addmm(codes.square().sum(-1) / -2, frames.detach(), codes.T).argmax(-1)
    return (frames - codes[index]).square().sum()


def by_cosine(frames, codes):
    return (1 - F.normalize(frames, dim=-1) @ F.normalize(codes, dim=-1).T).min(-1).values.sum()


def cross_entropy(frames, codes):
    return F.cross_entropy(-torch.cdist(frames, codes), tokens(frames, codes), reduction='sum')


def distilled(frames, codes):
    return token_cross_entropy(frames, codes, tokens(frames, codes)).sum()


def compiled(function):
    "On a GPU alone: a compiled contestant"
    return dict(compile=torch.compile(function)) if DEVICE == 'cuda' else {}


def contests() -> list[Contest]:
    found = []
    for n, k, d in SHAPES:
        def one(config, providers, truth, backward, n=n, k=k, d=d, **more):
            return Contest('nearest_code', config, f'{n}x{k}x{d}', lambda: trained(n, k, d), providers, truth, backward,
                           bytes_modelled=4 * d * (n * (2 if backward else 1) + k), **more)
        nearest = dict(speechloss=lambda x, c: nearest_code(x, c).distance.sum())
        found += [
            one('squared', {'cdist': by_cdist_argmin, 'product': by_product, **compiled(by_product), **nearest},
                by_cdist_argmin, False),
            one('cosine', dict(torch=by_cosine, **compiled(by_cosine),
                               speechloss=lambda x, c: nearest_code(x, c, metric='cosine').distance.sum()),
                by_cosine, False),
            one('squared, gradient', {'cdist': by_cdist_argmin, **nearest}, by_cdist_argmin, True),
            *[one(config, dict(torch=cross_entropy, **compiled(cross_entropy), speechloss=distilled), cross_entropy,
                  True, gradients=gradients)
              for config, gradients in (('token cross-entropy, frozen codes', 1), ('token cross-entropy', 2))],
        ]
    return found
