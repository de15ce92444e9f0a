"""InfoNCE over frames and over utterances, against the plain formula.

The bar on a CPU: at 8192 x 256 less than 5 % of the plain path's peak memory, at no more than
1.3 times its time.
"""
import torch
import torch.nn.functional as F

from speechloss.kernels.info_nce import info_nce

from .common import DEVICE, Contest

#: Rows and dims: an utterance each, frames of a batch; the bar; B = 16 and 64 of 4 s on a GPU
SHAPES = ((256, 256), (3184, 768), (8192, 256))
ON_GPU = (*SHAPES, (12736, 768), (12736, 1024))
TEMPERATURE = .1


def inputs(N: int, D: int) -> tuple:
    "Queries and keys that resemble them"
    draw = torch.Generator().manual_seed(N)
    q = torch.randn(N, D, generator=draw)
    return q.to(DEVICE), (.5 * q + torch.randn(N, D, generator=draw)).to(DEVICE)


def plain(q, k):
    "As one would write it, and as it is usually written"
    scores = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(q), device=q.device))


def tiled(q, k): return info_nce(q, k, temperature=TEMPERATURE).mean()


def contests() -> list[Contest]:
    providers = {'torch': plain, 'speechloss': tiled}
    if DEVICE == 'cuda':
        providers |= {'compile': torch.compile(plain),
                      'speechloss-torch': lambda q, k: info_nce(q, k, temperature=TEMPERATURE, backend='torch').mean()}
    return [Contest('info_nce', 'cosine', f'{N}x{D}', lambda N=N, D=D: inputs(N, D), providers, truth=plain,
                    gradients=2, bytes_modelled=6. * 4 * N * D)
            for N, D in (ON_GPU if DEVICE == 'cuda' else SHAPES)]
