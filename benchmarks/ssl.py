"""The SSL loss by family and depth, against the library's whole network run for the same layer.

Base networks with random weights: cost does not depend on them.
"""
from copy import deepcopy
from functools import cache, partial

import torch

from speechloss.common.libraries import transformers_module
from speechloss.common.weights import SHIPPED
from speechloss.losses import SSLLoss

from .common import DEVICE, Contest, noisy_pair

SAMPLES = 64000     # 4 s at 16 kHz
#: Network -> depths; conv6 is the last convolution
DEPTHS = {'small': ('conv6', 'layer4'), 'wav2vec2-base': ('layer12',), 'hubert-base': ('layer12',),
          'wavlm-base': ('conv6', 'layer6', 'layer12'), 'whisper-tiny': ('layer4',)}


def network(name: str):
    package = transformers_module()
    torch.manual_seed(0)
    if name == 'small': return package.AutoModel.from_pretrained(SHIPPED['small'], dtype=torch.float32).eval()
    if name == 'whisper-tiny':
        return package.WhisperModel(package.WhisperConfig(
            d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, decoder_layers=1)).eval()
    kind = {'wav2vec2': 'Wav2Vec2', 'hubert': 'Hubert', 'wavlm': 'WavLM'}[name.removesuffix('-base')]
    return getattr(package, f'{kind}Model')(getattr(package, f'{kind}Config')()).eval()


class Whole:
    "All layers of the network as the library runs them, one of them compared"
    def __init__(self, net, depth: str):
        self.net, self.depth = net.requires_grad_(False).to(DEVICE), depth

    def view(self, wave):
        found = self.net(wave, output_hidden_states=True)
        if self.depth.startswith('layer'): return found.hidden_states[int(self.depth[5:])]
        return self.net.feature_extractor(wave).mT

    def __call__(self, enhanced, clean):
        if self.net.config.model_type == 'hubert' and self.net.config.feat_extract_norm == 'layer':
            enhanced, clean = ((w - w.mean()) / (w.var(correction=0) + 1e-7).sqrt() for w in (enhanced, clean))
        with torch.no_grad(): target = self.view(clean)
        return (self.view(enhanced) - target).square().mean()


@cache
def providers(name: str, depth: str) -> dict:
    "Built when first called: a process that measures one contest builds one network"
    net = network(name)
    found = dict(speechloss=SSLLoss(net, layers=depth).to(DEVICE))
    if name != 'whisper-tiny':   # there is no shorter way to its encoder
        found |= dict(transformers=Whole(net, depth), truth=Whole(deepcopy(net).double(), depth))
    return found


def contests() -> list[Contest]:
    found = []
    for name, depths in DEPTHS.items():
        for depth in depths:
            def called(key, name=name, depth=depth): return lambda *waves: providers(name, depth)[key](*waves)
            keys = ('speechloss',) if name == 'whisper-tiny' else ('transformers', 'speechloss')
            found += [Contest('ssl', f'{name} {depth}', f'1x{SAMPLES}', partial(noisy_pair, 1, SAMPLES),
                              {key: called(key) for key in keys},
                              truth=called('truth') if len(keys) > 1 else None, backward=backward)
                      for backward in (False, True)]
    return found
