"""Waves, tiny networks, and small things to do with a run, that several test modules use.

Fixtures are in `conftest.py`, the loss contract in `loss_contract.py`, Triton's interpreter in
`interpreted.py`. No test module imports from another one.
"""
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from speechloss.common.errors import CorpusError

# --- waves ---

def waves(batch: int = 3, samples: int = 3001, *, seed: int = 0, dtype=torch.float32) -> tuple:
    "Enhanced, clean and noisy `(batch, samples)`: voices with pauses, in noise at 10 and 0 dB"
    return tuple(w.to(dtype, copy=True) for w in _waves(batch, samples, seed))


@cache
def _waves(batch: int, samples: int, seed: int) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(samples, dtype=torch.float64) / 16000
    pitch = 90 + 120 * torch.rand(batch, 1, generator=draw, dtype=torch.float64)
    voice = sum(torch.sin(2 * torch.pi * k * pitch * time + k) / k for k in range(1, 12))
    voice = .1 * voice * torch.sin(2 * torch.pi * 7 * time + pitch).clamp_min(0)
    noise = .03 * torch.randn(2, batch, samples, generator=draw, dtype=torch.float64)
    return voice + .3 * noise[0], voice, voice + noise[1]


RATE = 16000   # Hz, of `hiss`


def hiss(seconds: float = 1., seed: int = 0) -> Tensor:
    "White noise `(T,)`, of which corpora of the tests are made"
    return torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed)) * .1


def refuses_corpus(call, *parts):
    "`call` raises a `CorpusError` of one line with all of `parts` in it"
    with pytest.raises(CorpusError) as e: call()
    text = str(e.value)
    assert '\n' not in text and all(p in text for p in parts), text


def close_grad(found: Tensor, wanted: Tensor, tolerance: float = 5e-4):
    "Relative L2 error: single quiet bins may flip their sign"
    found, wanted = found.double(), wanted.double()
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-12)
    assert error <= tolerance, f'gradient is off by {error:.1e}'


# --- networks ---

class TinyModel(nn.Module):
    "The smallest model with a recurrent encoder and skips; `eval()` matters to its dropout"
    def __init__(self, bias: bool = True):
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv1d(1, 8, 80, 40, bias=bias)
        self.drop = nn.Dropout(.5)
        self.gru = nn.GRU(8, 6, num_layers=2, dropout=.5, batch_first=True, bias=bias)

    def encode(self, wave, *, skips=False):
        x = self.drop(torch.tanh(self.conv(wave[:, None])).transpose(1, 2))
        bottleneck = self.gru(x)[0]
        return [x, bottleneck] if skips else bottleneck


class Half(nn.Module):
    "The earlier model of a contrastive loss: half of what it hears, a little smeared"
    def __init__(self):
        super().__init__()
        self.register_parameter('taps', nn.Parameter(torch.tensor([[[.1, .5, .1]]])))

    def forward(self, wave): return nn.functional.conv1d(wave[:, None], self.taps, padding=1)[:, 0]


SMALL = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
             conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
LARGE = SMALL | dict(feat_extract_norm='layer', do_stable_layer_norm=True, conv_bias=True)


def hugging(kind, options=SMALL):
    from speechloss.common.libraries import transformers_module
    package = transformers_module()
    torch.manual_seed(3)
    return getattr(package, f'{kind}Model')(getattr(package, f'{kind}Config')(**options))


def whisper(positions=100):
    from speechloss.common.libraries import transformers_module
    package = transformers_module()
    torch.manual_seed(3)
    return package.WhisperModel(package.WhisperConfig(
        d_model=24, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        max_source_positions=positions))


# --- runs ---

def stop_at(step):
    "Progress that stops a run at a step, as Ctrl-C does"
    def progress(label, done, total):
        if done == step: raise KeyboardInterrupt
    return progress


def weights(folder) -> bytes:
    return (folder / 'model.safetensors').read_bytes()


def untimed(path) -> list[dict]:
    "The log of a run, without how long it took"
    from speechloss.training import read_log
    return [{**row, 'seconds': 0} for row in read_log(path)]
