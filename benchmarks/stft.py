"""Multi-resolution STFT distances against auraloss and plain torch."""
import auraloss
import torch

from speechloss.losses import MelLoss, MultiResolutionSTFTLoss, from_auraloss, preset

from .common import DEVICE, Contest, speechlike

SECONDS, RATE = 4, 16000


def against(loss, **others) -> dict:
    "Our back ends beside the others, all of waves `(B, T)`"
    own = dict(torch=loss(backend='reference').to(DEVICE), speechloss=loss(backend='auto').to(DEVICE))
    # on a CPU the compiler cannot do more than the pointwise tail, and takes most of a minute for it
    if DEVICE == 'cuda': own |= {'compile': torch.compile(own['torch'])}
    return {**others, **own}


def _channels(peer):
    peer = peer.to(DEVICE)
    return lambda x, y: peer(x[:, None], y[:, None])


def contests() -> list[Contest]:
    sizes = (8,) if DEVICE == 'cpu' else (16, 64)
    found = []
    for batch in sizes:
        def one(config, providers, truth, unlike=(), batch=batch):
            return Contest('stft_distance', config, f'{batch}x{SECONDS * RATE}', lambda: speechlike(batch), providers,
                           truth, bytes_modelled=3 * 4 * batch * SECONDS * RATE, unlike=unlike)
        plain = MultiResolutionSTFTLoss(backend='reference').to(DEVICE)
        found.append(one('mrstft 1024/120/600 2048/240/1200 512/50/240', against(
            MultiResolutionSTFTLoss, auraloss=_channels(auraloss.freq.MultiResolutionSTFTLoss())), plain,
            unlike=('auraloss',)))   # one norm over the batch, and a clamp
        # the same formula as auraloss, one norm over the batch
        peer = auraloss.freq.MultiResolutionSTFTLoss()
        found.append(one('auraloss parity', dict(auraloss=_channels(peer), speechloss=from_auraloss(peer).to(DEVICE)),
                         from_auraloss(peer, backend='reference').to(DEVICE)))
        found.append(one('mel 80 1024/256', against(
            lambda backend: MelLoss(sample_rate=RATE, backend=backend),
            auraloss=_channels(auraloss.freq.MelSTFTLoss(RATE, w_sc=0., n_mels=80))),
            MelLoss(sample_rate=RATE, backend='reference').to(DEVICE), unlike=('auraloss',)))
        for name in ('dac-mel', 'deepfilternet'):
            found.append(one(name, against(lambda backend, name=name: preset(name, backend=backend)),
                             preset(name, backend='reference').to(DEVICE)))
    return found
