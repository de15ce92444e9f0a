"""Self-supervised features: every family, in both libraries, against the library's own forward."""
import copy
import socket

import pytest
import torch
from helpers import LARGE, SMALL, hugging, whisper
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from speechloss.common.errors import SpeechLossError
from speechloss.common.libraries import torchaudio_module, transformers_module
from speechloss.common.weights import SHIPPED
from speechloss.features import MelFeatures, CachedFeatures, SSLFeatures
from speechloss.features.ssl import layer_names
from speechloss.features.ssl_networks import open_stages, stages_of
from speechloss.losses import SSLLoss, build

CONVS = [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2


def of_torchaudio(mode='group_norm'):
    torch.manual_seed(3)
    return torchaudio_module().models.wav2vec2_model(
        extractor_mode=mode, extractor_conv_layer_config=CONVS,
        extractor_conv_bias=mode == 'layer_norm', encoder_embed_dim=24,
        encoder_projection_dropout=0., encoder_pos_conv_kernel=16, encoder_pos_conv_groups=2,
        encoder_num_layers=4, encoder_num_heads=2, encoder_attention_dropout=0.,
        encoder_ff_interm_features=32, encoder_ff_interm_dropout=0., encoder_dropout=.1,
        encoder_layer_norm_first=mode == 'layer_norm', encoder_layer_drop=0., aux_num_out=None)


def wavlm_of_torchaudio():
    torch.manual_seed(3)
    return torchaudio_module().models.wavlm_model(
        extractor_mode='group_norm', extractor_conv_layer_config=CONVS, extractor_conv_bias=False,
        encoder_embed_dim=24, encoder_projection_dropout=0., encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=2, encoder_num_layers=4, encoder_num_heads=2,
        encoder_num_buckets=32, encoder_max_distance=80, encoder_attention_dropout=0.,
        encoder_ff_interm_features=32, encoder_ff_interm_dropout=0., encoder_dropout=0.,
        encoder_layer_norm_first=False, encoder_layer_drop=0., aux_num_out=None)


NETS = {
    'wav2vec2': lambda: hugging('Wav2Vec2'),
    'wav2vec2-large': lambda: hugging('Wav2Vec2', LARGE),
    'hubert': lambda: hugging('Hubert'),
    'hubert-large': lambda: hugging('Hubert', LARGE),
    'wavlm': lambda: hugging('WavLM'),
    'wavlm-large': lambda: hugging('WavLM', LARGE),
    'torchaudio': of_torchaudio,
    'torchaudio-large': lambda: of_torchaudio('layer_norm'),
    'torchaudio-wavlm': wavlm_of_torchaudio,
    'whisper': whisper,
}
each_net = pytest.mark.parametrize('name', NETS)


def waves(batch=3, samples=6000, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return .1 * torch.randn(batch, samples, generator=draw)


def normalized(wave):
    centred = wave - wave.mean(-1, keepdim=True)
    return centred / (wave.var(-1, keepdim=True, correction=0) + 1e-7).sqrt()


def own_forward(name, net, wave):
    "Outputs of the blocks, 1 to 4, as the library gives them"
    if 'large' in name: wave = normalized(wave)
    if 'torchaudio' in name: return net.extract_features(wave)[0]
    states = net(wave, output_hidden_states=True).hidden_states
    if 'large' in name: return states[1:-1]      # the last has gone through one more norm
    return states[1:]


@each_net
def test_every_depth_is_the_librarys(name):
    net = NETS[name]().eval()
    wave = waves(2, 32000 if name == 'whisper' else 6000)
    with torch.no_grad():
        if name == 'whisper':
            mel = transformers_module().WhisperFeatureExtractor(chunk_length=2)(
                list(wave.numpy()), sampling_rate=16000, return_tensors='pt').input_features
            theirs = net.encoder(mel, output_hidden_states=True).hidden_states[1:-1]
        else:
            theirs = own_forward(name, net, wave)
        ours = SSLFeatures(net, layers=[1, 2, 3, 4])(wave)
    for mine, its in zip(ours, theirs):
        torch.testing.assert_close(mine, its, atol=2e-5, rtol=1e-4)


def test_the_closing_norm_is_all_that_is_missing_in_large_models():
    net = hugging('WavLM', LARGE).eval()
    with torch.no_grad():
        last = net(normalized(waves())).last_hidden_state
        mine = SSLFeatures(net, layers='last')(waves())[0]
    torch.testing.assert_close(net.encoder.layer_norm(mine), last, atol=1e-5, rtol=1e-4)


@each_net
def test_cutting_changes_the_cost_and_not_the_value(name):
    net, flops = NETS[name](), []
    whole = SSLFeatures(net, layers=[*stages_of(net).names])
    for k, layer in enumerate(whole.names):
        cut = SSLFeatures(net, layers=layer)
        with FlopCounterMode(display=False) as counter: mine = cut(waves())[0]
        flops.append(counter.get_total_flops())
        assert torch.equal(mine, whole(waves())[k]), layer
    assert flops == sorted(flops) and flops[0] < flops[-1], flops


@each_net
def test_neither_padding_nor_batch_mates_count(name):
    features = SSLFeatures(NETS[name](), layers=['conv1', 'layer0', 'layer3'])
    wave, lengths = waves(4), torch.tensor([6000, 4321, 6000, 3000])
    spoilt = wave.clone()
    for row, n in zip(spoilt, lengths): row[n:] = torch.nan
    together = features(spoilt, lengths)
    for k, counts in enumerate(features.frame_lengths(lengths)):
        for row, n in enumerate(lengths.tolist()):
            alone = features(wave[row:row + 1, :n])[k][0]
            assert alone.shape[0] == counts[row]
            torch.testing.assert_close(together[k][row, :counts[row]], alone, atol=1e-5, rtol=1e-4)


def test_group_norm_is_the_trap_it_is_said_to_be():
    net = hugging('Hubert').eval()
    wave = waves(1, 6000)
    with torch.no_grad():
        alone = net(wave).last_hidden_state
        mask = torch.arange(12000)[None] < 6000
        padded = net(F.pad(wave, (0, 6000)), attention_mask=mask.long()).last_hidden_state
    frames = alone.shape[1]
    assert (padded[:, :frames] - alone).norm() / alone.norm() > .02    # the library's own way
    mine = SSLFeatures(net, layers='last')(F.pad(wave, (0, 6000)), torch.tensor([6000]))[0]
    torch.testing.assert_close(mine, alone)


@each_net
def test_gradient_is_that_of_the_network_unscaled(name):
    net, wave = NETS[name]().eval(), waves(2, 32000 if name == 'whisper' else 6000)
    mine = wave.clone().requires_grad_()
    features = SSLFeatures(net, layers=3)(mine)[0]
    pull = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (features * pull).sum().backward()
    assert mine.grad.abs().min() > 0 or name == 'whisper'      # its mel cuts off what is quiet
    if name == 'whisper': return
    theirs = wave.clone().requires_grad_()
    (own_forward(name, net, theirs)[2] * pull).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5 * theirs.grad.abs().max())


@each_net
def test_checkpointing_changes_nothing(name):
    grads = []
    for keep in (False, True):
        wave = waves(2).requires_grad_()
        sum(f.square().mean() for f in SSLFeatures(NETS[name](), layers='all', checkpoint=keep)(wave)).backward()
        grads.append(wave.grad)
    assert torch.equal(*grads)


@each_net
@pytest.mark.parametrize('training', [True, False])
def test_identity_is_exactly_zero_and_nothing_leaks(name, training):
    net = NETS[name]()
    loss = SSLLoss(net)
    parent = nn.ModuleDict(dict(loss=loss)).train(training)
    clean, enhanced = waves(2), waves(2, seed=1).requires_grad_()
    assert loss(clean.clone().requires_grad_(), clean) == 0
    loss(enhanced, clean).backward()
    assert enhanced.grad.abs().sum() > 0
    assert not parent.state_dict() and not list(parent.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in loss.features.stages.parameters())
    assert not any(m.training for m in loss.features.stages.modules())
    assert net.training and all(p.requires_grad and p.grad is None for n, p in net.named_parameters()
                                if 'embed_positions' not in n)     # the user's own, untouched


def test_train_mode_would_have_shown():
    "The same network, let into train mode, tells identical waves apart: what the freeze is for"
    net = hugging('WavLM').train()
    a, b = (net(waves(2)).last_hidden_state for _ in range(2))
    assert (a - b).square().mean() > .01


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    loss, clean, enhanced = SSLLoss(hugging('WavLM')), waves(2), waves(2, seed=1)
    plain = loss(enhanced, clean)
    with torch.autocast('cpu', dtype=dtype):
        assert torch.equal(loss(enhanced, clean), plain)


@pytest.mark.parametrize('rate', [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_inside(rate):
    net = hugging('Hubert', LARGE)
    time = torch.arange(rate) / rate
    tone = (2 * torch.pi * 440 * time).sin()[None] * .1
    features = SSLFeatures(net, layers=2, sample_rate=rate)
    heard = features(tone)[0]
    assert heard.shape[1] == features.frame_lengths(torch.tensor([rate]))[0]
    at_16k = SSLFeatures(net, layers=2)((2 * torch.pi * 440 * torch.arange(16000) / 16000).sin()[None] * .1)[0]
    middle = slice(5, -5)       # the ends of a resampled wave ring
    assert (heard - at_16k)[:, middle].norm() / at_16k[:, middle].norm() < .05


def test_a_saved_checkpoint_opens_with_networking_off(tmp_path, monkeypatch):
    package, net = transformers_module(), hugging('WavLM', LARGE).eval()
    net.save_pretrained(tmp_path)
    package.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)

    def closed(*args, **kwargs): raise OSError('the network is off')
    monkeypatch.setattr(socket, 'socket', closed)
    features = SSLFeatures(str(tmp_path), layers=2)
    with torch.no_grad():       # its preprocessor says that waves stay as they are
        its = net(waves(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(features(waves())[0], its)
    assert SSLFeatures('small', layers=1)(waves())[0].isfinite().all()


@pytest.mark.parametrize('head', ['HubertForCTC', 'WavLMForXVector', 'Wav2Vec2ForCTC'])
def test_heads_are_left_aside(head):
    package = transformers_module()
    kind = head.partition('For')[0]
    net = getattr(package, head)(getattr(package, f'{kind}Config')(**SMALL))
    assert SSLFeatures(net).names == ('layer3', 'layer4')


def test_a_bundles_model_says_how_it_wants_its_waves():
    from importlib import import_module
    net = of_torchaudio('layer_norm')
    torchaudio_module()
    wrapped = import_module('torchaudio.pipelines._wav2vec2.utils')._extend_model(net, normalize_waveform=True)
    one = SSLFeatures(wrapped, layers=2)
    loud = torch.cat([waves(1), 100 * waves(1, seed=5)])       # a batch mate that is louder
    torch.testing.assert_close(one(loud)[0][:1], one(waves(1))[0], atol=1e-5, rtol=1e-4)
    theirs = wrapped.extract_features(loud)[0][1][:1]           # the wrapper norms over the batch
    assert (theirs - one(waves(1))[0]).abs().max() > .01


def wrong_inputs():
    net = hugging('Hubert')
    return {
        'short': (lambda: SSLFeatures(net)(torch.zeros(1, 399)), ('399', '400')),
        'short at 48 kHz': (lambda: SSLFeatures(net, sample_rate=48000)(torch.zeros(1, 1100)), ('1200', '48000')),
        'layer': (lambda: SSLFeatures(net, layers='conv9'), ('conv9', 'conv0', 'layer4')),
        'number': (lambda: SSLFeatures(net, layers=5), ('5', '0 to 4')),
        'none': (lambda: SSLFeatures(net, layers=[]), ('layers', 'later')),
        'rate': (lambda: SSLFeatures(net, sample_rate=0), ('sample_rate', '0')),
        'name': (lambda: SSLFeatures('no/such-model'), ('no/such-model', 'folder')),
        'bundle': (lambda: SSLFeatures('WAVLM_HUGE'), ('WAVLM_HUGE', 'WAVLM_BASE')),
        'module': (lambda: SSLFeatures(nn.Linear(2, 2)), ('Linear', 'HuBERT')),
        'offset': (lambda: SSLLoss(net, offset=1.5), ('offset', '1.5')),
        'whisper': (lambda: SSLFeatures(whisper(50))(torch.zeros(1, 17000)), ('50', 'shorter')),
        'vector': (lambda: SSLFeatures(net)(torch.zeros(4000)), ('4000', 'batch')),
        'whole numbers': (lambda: SSLFeatures(net)(torch.zeros(1, 4000).short()), ('int16', 'float')),
        'rate of text': (lambda: SSLFeatures(net, sample_rate='16k'), ('sample_rate', '16k')),
        'truth': (lambda: SSLFeatures(net, layers=True), ('True', 'layer4')),
        'no weight': (lambda: SSLLoss(net, weights=[0., 0.]), ('weights', 'above 0')),
        'lost option': (lambda: SSLLoss(SSLFeatures(net), sample_rate=48000), ('sample_rate', '48000')),
        'offset of others': (lambda: SSLLoss(MelFeatures(sample_rate=16000), offset=.1), ('offset', 'SSLFeatures')),
        'shape': (lambda: SSLLoss(net)(torch.zeros(1, 4000), torch.zeros(1, 4001)), ('4000', '4001')),
    }


@pytest.mark.parametrize('case', wrong_inputs())
def test_what_is_wrong_is_one_sentence(case, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    call, said = wrong_inputs()[case]
    with pytest.raises(ValueError) as caught: call()
    text = str(caught.value)
    assert '\n' not in text and all(word in text for word in said), text


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(SpeechLossError, match='config.json'): SSLFeatures(str(tmp_path))
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(SpeechLossError): SSLFeatures(str(tmp_path))


def test_a_checkpoint_without_its_weights_is_refused(tmp_path):
    "transformers draws at random what a checkpoint lacks, with a warning alone"
    from safetensors.torch import load_file, save_file
    hugging('Hubert').save_pretrained(tmp_path)
    weights = tmp_path / 'model.safetensors'
    save_file({f'other.{k}': v for k, v in load_file(weights).items()}, weights, metadata=dict(format='pt'))
    with pytest.raises(SpeechLossError, match='no trained weights'): SSLFeatures(str(tmp_path))


def test_lengths_of_32_bits_do_not_overflow():
    features = SSLFeatures(hugging('Hubert'))
    for kind in (torch.int32, torch.int64):
        assert features.frame_lengths(torch.tensor([200_000], dtype=kind))[0] == 624


@pytest.mark.parametrize('distance', ['l1', 'l2', 'cosine'])
@pytest.mark.parametrize('options', [dict(offset=.3), dict(cache=8), dict(checkpoint=True)], ids=str)
def test_every_distance_is_exactly_zero_at_identity(distance, options):
    loss = SSLLoss(hugging('WavLM'), distance=distance, reduction='none', layers='all', **options).train()
    clean, lengths = waves(4), torch.tensor([6000, 5000, 4000, 3000])
    for _ in range(4): assert (loss(clean.clone().requires_grad_(), clean, lengths=lengths) == 0).all()


def test_only_wanted_outputs_are_kept():
    import weakref
    net = hugging('Hubert').eval()
    stages, alive = stages_of(net), []
    for conv in net.feature_extractor.conv_layers:
        conv.register_forward_hook(lambda m, i, out: alive.append(weakref.ref(out)))
    counts = []
    net.encoder.layers[-1].register_forward_hook(lambda *_: counts.append(sum(r() is not None for r in alive)))
    with torch.no_grad(): stages(waves(1), ['layer4'])
    assert counts == [0]


def test_random_weights_follow_from_the_seed():
    net = hugging('WavLM')
    a, b, c = (SSLFeatures(net, random_seed=s)(waves())[0] for s in (1, 1, 2))
    trained = SSLFeatures(net)(waves())[0]
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=.01) and not torch.allclose(a, trained, atol=.01)
    drawn = SSLFeatures(net, random_seed=1).stages.state_dict()
    kept = SSLFeatures(net).stages.state_dict()
    same = [k for k, v in kept.items() if v.numel() > 1 and v.std() > 0 and torch.equal(v, drawn[k])]
    assert not same, same


def test_kept_features_are_those_of_the_wave():
    features = SSLFeatures(hugging('Hubert'), layers=[1, 2])
    kept = CachedFeatures(features, size=4)
    wave, lengths = waves(3), torch.tensor([6000, 5000, 6000])
    with torch.no_grad():
        for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
            for mine, its in zip(kept(wave[order], lengths[order]), features(wave[order], lengths[order])):
                torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)
        kept(waves(8, seed=9))
    assert len(kept.kept) == 4 and not kept.state_dict()
    clean, enhanced = waves(3), waves(3, seed=1)
    net = hugging('Hubert')
    assert torch.equal(SSLLoss(net, cache=8)(enhanced, clean), SSLLoss(net)(enhanced, clean))


def test_the_loss_by_name_and_its_weights():
    loss = build(dict(name='ssl', model='small', layers=[1, 2], weights=[1., 3.], distance='l1'))
    parts = loss.terms(waves(), waves(seed=1))
    plain = {k: SSLLoss('small', layers=k, distance='l1')(waves(), waves(seed=1)) for k in parts}
    assert torch.allclose(parts['layer1'], .25 * plain['layer1'])
    assert torch.allclose(parts['layer2'], .75 * plain['layer2'])


def test_the_shipped_network_is_small_and_has_its_card():
    folder = SHIPPED['small']
    weights = folder / 'model.safetensors'
    stages = open_stages('small')
    assert sum(p.numel() for p in stages.parameters()) <= 5e6 and weights.stat().st_size < 10e6
    assert isinstance(stages.front, type(stages_of(hugging('Hubert', LARGE)).front))
    from speechloss.common.files import sha256
    card = (folder / 'README.md').read_text(encoding='utf-8')
    assert sha256(weights) in card and 'CC BY 4.0' in card


def test_words_for_layers():
    names = ('conv0', 'conv1', *(f'layer{k}' for k in range(13)))
    assert layer_names('later', names) == tuple(f'layer{k}' for k in range(7, 13))
    assert layer_names('all', names)[0] == 'layer1' and layer_names('last', names) == ('layer12',)
    assert layer_names(-1, names) == ('layer12',) and layer_names('conv', names) == ('conv0', 'conv1')
    assert layer_names(['layer2', 0, 'conv1', 2], names) == ('conv1', 'layer0', 'layer2')


def test_a_copied_loss_is_whole():
    loss = copy.deepcopy(SSLLoss(hugging('WavLM')))
    assert loss(waves(), waves()) == 0 and loss(waves(), waves(seed=1)) > 0
