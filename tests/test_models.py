"""The enhancer's promises: any length, any gain, no batch mates, and files of any kind."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from speechloss.common.errors import AudioError, SpeechLossError, CheckpointError
from speechloss.models import (
    SpectralAutoencoder, enhance_file, enhance_wave, encoder_modules, encoder_parameters, enhancer,
    load_enhancer, SpectralEnhancer)
from speechloss.models import blockwise as streaming, catalogue as models
from speechloss.signal import info, load

KINDS = {'both ways': dict(causal=False), 'causal': dict(causal=True),
         'deep': dict(layers=2, kernel=2), 'hop 1/4': dict(n_fft=128, hop_length=32, causal=True),
         'odd hop': dict(n_fft=128, hop_length=50),
         'bands': dict(kind='band_split', n_fft=128, hop_length=64, channels=8, blocks=2),
         'bands, causal': dict(kind='band_split', n_fft=256, hop_length=64, channels=8, blocks=3, causal=True)}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def net(request):
    return enhancer(request.param if 'kind' in request.param else dict(preset='tiny') | request.param).eval()


@pytest.mark.parametrize('size', [1, 2, 63, 64, 65, 127, 128, 129, 7919])
def test_any_length(net, size):
    noisy = torch.randn(2, size)
    assert net(noisy).shape == (2, size) and net(noisy).isfinite().all()
    assert net.encode(noisy).shape[:2] == (2, int(net.frame_lengths(torch.tensor(size))))


def test_batch_mates(net):
    "Every utterance of a padded batch, padding full of noise, comes out as it does alone"
    lengths = torch.tensor([3000, 1, 127, 128, 129, 1999, 2950])
    noisy = torch.randn(len(lengths), 3000)
    together = net(noisy, lengths)
    codes = net.encode(noisy, skips=True, lengths=lengths)
    for k, n in enumerate(lengths.tolist()):
        assert torch.allclose(together[k, :n], net(noisy[k, :n]), atol=1e-5)
        assert together[k, n:].eq(0).all()
        for code, alone in zip(codes, net.encode(noisy[k:k + 1, :n], skips=True)):
            assert torch.allclose(code[k, :alone.shape[1]], alone[0], atol=1e-5)
    order = torch.randperm(len(lengths))
    assert torch.allclose(net(noisy[order], lengths[order]), together[order], atol=1e-5)


def test_nan_in_one_wave_stays_there(net):
    noisy = torch.randn(2, 1000)
    expected = net(noisy)[1]
    noisy[0, 10] = float('nan')
    assert torch.allclose(net(noisy)[1], expected, atol=1e-6)


@given(st.floats(-60, 40))
def test_gain(decibels):
    net = SpectralEnhancer(**models.MODEL_PRESETS['tiny']).eval()
    noisy, gain = torch.randn(1, 2000) / 10, 10 ** (decibels / 20)
    assert torch.allclose(net(gain * noisy) / gain, net(noisy), atol=1e-3)


@pytest.mark.parametrize('wave', [
    torch.zeros(1, 2000), torch.ones(1, 2000), torch.full((1, 2000), 1e-20),
    torch.randn(1, 2000).sign(), 1e4 * torch.randn(1, 2000),
    torch.cat([torch.zeros(1, 1500), torch.randn(1, 500)], -1)],
    ids=['silence', 'constant', 'tiny', 'clipped', 'huge', 'silence first'])
def test_hard_inputs(net, wave):
    wave = wave.clone().requires_grad_()
    out = net(wave)
    assert out.isfinite().all()
    (out.square().sum() / (wave.detach().square().sum() + 1e-9)).backward()
    assert wave.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    if not wave.any(): assert not out.any()


def test_causal_looks_back_only():
    net = SpectralEnhancer(**models.MODEL_PRESETS['tiny'], causal=True).eval()
    one = torch.randn(1, 4000)
    other = one.clone()
    other[:, 2500:] = torch.randn(1, 1500)
    same = 2500 - net.n_fft
    assert torch.allclose(net(one)[:, :same], net(other)[:, :same], atol=1e-6)
    assert not torch.allclose(net(one), net(other), atol=1e-3)


def test_double_and_half(net):
    noisy = torch.randn(2, 1000)
    double = copy.deepcopy(net).double()(noisy.double())
    assert double.dtype == torch.double and torch.allclose(double.float(), net(noisy), atol=1e-5)
    assert net(noisy.bfloat16()).dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.allclose(net(noisy), net(noisy.float()), atol=.1)


def test_eval_is_train(net):
    noisy = torch.randn(2, 1000)
    assert net.train()(noisy).equal(net.eval()(noisy))


def test_forward_is_decode_of_encode(net):
    "The parameters that `encode` uses are those of the encoder, and the others the decoder's"
    names = {name for name, _ in net.named_parameters()}
    used = set(encoder_parameters(net))
    encoder = [net.encoder] if hasattr(net, 'encoder') else [net.split, *net.blocks[:len(net.blocks) // 2]]
    ours = {id(p) for part in encoder for p in part.parameters()}
    assert used == {name for name, p in net.named_parameters() if id(p) in ours} != names
    assert encoder_modules(net) == [m for part in encoder for m in part.modules() if not list(m.children())]


def test_small_is_small():
    net = enhancer('small')
    weights = sum(p.numel() for p in net.parameters())
    decoder = sum(p.numel() for p in net.decoder.parameters())
    assert 200_000 < weights < 400_000 and .4 < decoder / weights < .6
    assert 1_500_000 < sum(p.numel() for p in enhancer('base').parameters()) < 2_500_000


@pytest.mark.parametrize('wave,lengths', [
    (torch.zeros(2, 0), None), (torch.zeros(1, 2, 5), None), (torch.zeros(1, 5).long(), None),
    (torch.zeros(2, 5), torch.tensor([5])), (torch.zeros(2, 5), torch.tensor([5, 6])),
    (torch.zeros(2, 5), torch.tensor([0, 5]))])
def test_wrong_waves(wave, lengths):
    with pytest.raises(SpeechLossError, match='give'):
        enhancer('tiny')(wave, lengths)


# Saving and loading

def test_round_trip(tmp_path, net):
    net.save_pretrained(tmp_path / 'net')
    noisy = torch.randn(1, 1000)
    assert load_enhancer(tmp_path / 'net')(noisy).equal(net(noisy))
    assert not load_enhancer(tmp_path / 'net').training


def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize('harm', [
    lambda folder: cut(folder / 'model.safetensors'),
    lambda folder: (folder / 'model.safetensors').unlink(),
    lambda folder: cut(folder / 'config.json'),
    lambda folder: (folder / 'config.json').unlink(),
    lambda folder: (folder / 'config.json').write_text('{"channels": 32}'),
    lambda folder: (folder / 'config.json').write_text('{"depth": 32}'),
    lambda folder: (folder / 'config.json').write_text('[]'),
], ids=['cut', 'no weights', 'config cut', 'no config', 'other size', 'other net', 'no record'])
def test_damaged_model(tmp_path, harm):
    enhancer('tiny').save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_enhancer(tmp_path)
    assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_no_network(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs): raise ConnectionError('no route\nto host')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(CheckpointError, match='check the name and the network') as caught:
        load_enhancer('someone/enhancer')
    assert '\n' not in str(caught.value)
    for path in ('/absent/folder', './absent', 'absent', 'a/b/c'):
        with pytest.raises(CheckpointError, match='is not a folder'):
            load_enhancer(path)


def test_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub
    enhancer('tiny').save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: str(tmp_path))
    assert isinstance(load_enhancer('someone/enhancer'), SpectralEnhancer)


def test_config_is_plain(tmp_path):
    enhancer({'preset': 'tiny', 'causal': True}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['causal'] is True and config['channels'] == 16


# Files

class Halve(nn.Module):
    "A model whose right answer is known, and which remembers the longest wave it saw"
    def __init__(self, sample_rate=16000):
        super().__init__()
        self.sample_rate, self.longest = sample_rate, 0

    def forward(self, noisy):
        self.longest = max(self.longest, noisy.shape[-1])
        return noisy / 2


@given(st.integers(1, 30_000), st.sampled_from([.05, .3, 1.]), st.sampled_from([0., .02, .5]))
def test_blocks_meet(size, seconds, context):
    wave = torch.randn(2, size)
    out = enhance_wave(Halve(), wave, 16000, seconds=seconds, context=context)
    assert torch.allclose(out, wave / 2, atol=1e-6)


@pytest.mark.parametrize('rate', [8000, 11025, 16000, 22050, 44100, 48000])
def test_any_rate(rate):
    t = torch.arange(2 * rate) / rate
    wave = torch.sin(2 * torch.pi * 440 * t)
    out = enhance_wave(Halve(), wave, rate, seconds=.4)
    assert out.shape == wave.shape and (out - wave / 2)[500:-500].abs().max() < 5e-3


def test_mode_is_given_back():
    net = enhancer('tiny').train()
    enhance_wave(net, torch.randn(1000), 16000)
    assert net.training


@pytest.mark.parametrize('wave', [torch.zeros(0), torch.full((10,), float('nan')),
                                  torch.zeros(1, 1, 5), torch.zeros(5).int()])
def test_wrong_wave(wave):
    with pytest.raises(AudioError):
        enhance_wave(Halve(), wave, 16000)


def write(path, seconds=1., rate=16000, channels=1, **options):
    wave = np.random.default_rng(0).uniform(-.5, .5, (int(seconds * rate), channels))
    soundfile.write(path, wave, rate, **options)
    return path


@pytest.mark.parametrize('suffix', ['.wav', '.flac', '.ogg', '.opus', '.mp3', '.aiff', '.aif'])
def test_formats(tmp_path, suffix):
    source = write(tmp_path / 'noisy.wav', rate=48000, channels=2)
    made = info(enhance_file(Halve(), source, tmp_path / f'out{suffix}'))
    assert (made.sample_rate, made.channels) == (48000, 2) and abs(made.frames - 48000) < 3000


def test_memory_of_one_block(tmp_path):
    source, model = write(tmp_path / 'long.flac', seconds=200, rate=8000), Halve(8000)
    enhance_file(model, source, tmp_path / 'out.flac', seconds=5.)
    assert model.longest <= 8000 * (5 + 2 * streaming.CONTEXT_SECONDS + streaming.FADE_SECONDS)
    one, other = load(source)[0], load(tmp_path / 'out.flac')[0]
    assert torch.allclose(other, one / 2, atol=1e-4)


def test_truncated_source(tmp_path):
    "Found out half way: one sentence, and neither a target nor a temporary file"
    source = write(tmp_path / 'noisy.flac', seconds=30)
    cut(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AudioError, match='cut short'):
        enhance_file(Halve(), source, tmp_path / 'out.flac', seconds=2.)
    assert sorted(tmp_path.iterdir()) == before


def test_unwritable_target(tmp_path):
    source = write(tmp_path / 'noisy.wav')
    (tmp_path / 'file').write_text('')
    for target in ('out.doc', 'out', 'file/out.wav'):
        with pytest.raises(AudioError):
            enhance_file(Halve(), source, tmp_path / target)


def test_in_place(tmp_path):
    "Source and target may be one file: it is replaced when the new one is whole"
    source = write(tmp_path / 'a.wav', seconds=3.)
    before = load(source)[0]
    enhance_file(Halve(), source, source, seconds=1.)
    assert torch.allclose(load(source)[0], before / 2, atol=1e-4)


def test_push_to_hub_uploads_what_is_needed(monkeypatch):
    "With the hub's interface replaced, since there is no network: what would be uploaded, and is it whole?"
    from huggingface_hub import hub_mixin
    sent = {}

    class Hub:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **options): return type('Url', (), dict(repo_id=repo_id))()
        def upload_folder(self, repo_id, folder_path, **options):
            sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()}, repo=repo_id)

    monkeypatch.setattr(hub_mixin, 'HfApi', Hub)
    net = enhancer('tiny')
    net.push_to_hub('someone/enhancer')
    assert sent.pop('repo') == 'someone/enhancer' and {'config.json', 'model.safetensors'} <= set(sent)
    from safetensors.torch import load
    weights = load(sent['model.safetensors'])
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())


class ConvTasNet(nn.Module):
    "Learned filter bank, dilated convolutions, a mask: Luo & Mesgarani 2019 in small; one method more"
    sample_rate = 16000

    def __init__(self, filters=16, kernel=16):
        super().__init__()
        self.bank = nn.Conv1d(1, filters, kernel, kernel // 2)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Conv1d(filters, filters, 3, padding=d, dilation=d, groups=filters), nn.PReLU(),
            nn.GroupNorm(1, filters), nn.Conv1d(filters, filters, 1)) for d in (1, 2, 4))
        self.mask, self.back = nn.Conv1d(filters, filters, 1), nn.ConvTranspose1d(filters, 1, kernel, kernel // 2)

    def _separate(self, wave):
        frames = x = self.bank(wave[:, None]).relu()
        for block in self.blocks: x = x + block(x)
        return frames, x

    def encode(self, wave): return self._separate(wave)[1].mT

    def forward(self, noisy):
        frames, x = self._separate(noisy)
        out = self.back(frames * self.mask(x).sigmoid())[:, 0]
        return nn.functional.pad(out, (0, noisy.shape[-1] - out.shape[-1]))


def test_a_convtasnet_plugs_in_by_one_method():
    "Its own encoder judges it; what is behind the bottleneck is found; lengths keep their promise"
    from speechloss.losses import ModelAsLoss
    torch.manual_seed(0)
    net, clean = ConvTasNet(), torch.randn(2, 8000)
    noisy = clean + torch.randn(2, 8000)
    behind = set(dict(net.named_parameters())) - set(encoder_parameters(net))
    assert behind == {'mask.weight', 'mask.bias', 'back.weight', 'back.bias'}
    loss = ModelAsLoss(net, rule='frozen-fe')
    loss(net(noisy), clean).backward()
    assert all(p.grad is not None for p in net.parameters())
    # its norm runs over the whole utterance, so padding would change it if utterances were not cut
    each = ModelAsLoss(net, reduction='none')
    ragged = each(noisy, clean, lengths=torch.tensor([8000, 5000]))
    assert ragged[1].allclose(each(noisy[1:, :5000], clean[1:, :5000])[0], rtol=1e-5)
    assert enhance_wave(net.eval(), noisy[0], 16000).shape == (8000,)


# ---- the autoencoder

def small_autoencoder():
    torch.manual_seed(0)
    return SpectralAutoencoder(latents=8, n_fft=128, hop_length=64, channels=16).eval()


@pytest.mark.parametrize('size', [1, 63, 64, 65, 129, 3001])
def test_autoencoder_takes_any_length_and_says_how_many_frames(size):
    net, wave = small_autoencoder(), torch.randn(2, size)
    codes = net.encode(wave)
    assert net(wave).shape == (2, size) and net(wave[0]).shape == (size,)
    assert codes.shape == (2, int(net.frame_lengths(torch.tensor(size))), 8) and codes.abs().max() <= 1


def test_autoencoder_does_not_see_batch_mates_or_padding():
    net, lengths = small_autoencoder(), torch.tensor([3000, 1, 129, 1999])
    wave = torch.randn(4, 3000)
    together, codes = net(wave, lengths), net.encode(wave, lengths=lengths)
    for k, n in enumerate(lengths.tolist()):
        alone = net.encode(wave[k:k + 1, :n])[0]
        assert torch.allclose(codes[k, :len(alone)], alone, atol=1e-5)
        assert torch.allclose(together[k, :n], net(wave[k, :n]), atol=1e-5) and not together[k, n:].any()


@pytest.mark.parametrize('wave', [torch.zeros(1, 2000), torch.full((1, 2000), 1e-20), 1e4 * torch.randn(1, 2000)],
                         ids=['silence', 'tiny', 'huge'])
def test_autoencoder_has_a_gradient_everywhere(wave):
    net, wave = small_autoencoder(), wave.clone().requires_grad_()
    out = net(wave)
    (out.square().sum() / (wave.detach().square().sum() + 1e-9)).backward()
    assert out.isfinite().all() and wave.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@given(st.floats(-40, 40))
def test_gain_passes_an_autoencoder(decibels):
    net, wave, gain = small_autoencoder(), torch.randn(1, 2000) / 10, 10 ** (decibels / 20)
    assert torch.allclose(net(gain * wave) / gain, net(wave), atol=1e-3)


def test_only_the_waist_reaches_the_decoder():
    "Two waves of one level and one code are one to it"
    net, wave = small_autoencoder(), torch.randn(1, 2000)
    codes = net.encode(wave)
    with torch.no_grad(): net.waist.weight.zero_()
    other = torch.randn(1, 2000)
    other *= wave.norm() / other.norm()
    assert net.encode(wave).equal(net.encode(other)) and not net.encode(wave).equal(codes)
    assert torch.allclose(net(wave), net(other), atol=1e-5)


def test_autoencoder_is_saved_and_trained_as_an_enhancer(tmp_path):
    net = small_autoencoder()
    net.save_pretrained(tmp_path)
    wave = torch.randn(1, 1000)
    loaded = load_enhancer(tmp_path)
    assert isinstance(loaded, SpectralAutoencoder) and loaded(wave).equal(net(wave))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['kind'] == 'autoencoder' and config['latents'] == 8


@pytest.mark.parametrize('options', [dict(latents=0), dict(kernel=4), dict(power=1.5), dict(n_fft=511)])
def test_autoencoder_names_a_wrong_option(options):
    with pytest.raises(SpeechLossError, match=f'{next(iter(options))} '):
        enhancer({'kind': 'autoencoder'} | options)


def test_memory_forgets_what_was_before():
    "A loud beginning: with a memory of 0.2 s its level is gone after 3.4 s, without one it is not"
    wave = torch.randn(1, 64_000, generator=torch.Generator().manual_seed(0)) / 100
    loud = wave.clone()
    loud[:, :8000] *= 50
    changed = []
    for memory in (.2, None):
        torch.manual_seed(0)
        model = enhancer(dict(preset='tiny', causal=True, memory=memory)).eval()
        with torch.no_grad(): features = [
            model.encoder.features(model._band_power(s.real, s.imag), None)
            for s in (model._spectrum(x, None)[0] for x in (wave, loud))]
        changed.append(float((features[0] - features[1])[:, -10:].abs().max()))
    assert changed[0] < 1e-3 < .1 < changed[1]


@pytest.mark.parametrize('wrong', [dict(memory=0.), dict(memory=-1.), dict(causal=False, memory=1.)])
def test_memory_is_of_a_causal_model(wrong):
    with pytest.raises(SpeechLossError, match='memory is'): enhancer(dict(preset='tiny', causal=True) | wrong)
