"""Tiny networks, and small things to do with a run, that several test modules use.

Fixtures are in `conftest.py`, the loss contract in `loss_contract.py`, Triton's interpreter in
`interpreted.py`. No test module imports from another one.
"""
import torch
from torch import nn

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
