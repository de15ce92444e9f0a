"""The enhancer of VQScore: its attack within range, the second stage against its formula, and what must not move."""
import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from speechloss.common.errors import SpeechLossError, TrainingError
from speechloss.common.weights import load_network
from speechloss.corpora import get, Manifest, Mixtures
from speechloss.features.vqvae import VQVAE
from speechloss.models import enhancer, load_enhancer, VQEnhancer
from speechloss.models.vq_enhancer import SelfDistillation, _entropy_gradient, attack_step, spectral_ratio
from speechloss.signal import load, save, istft, stft
from speechloss.training import VQDistillation, VQTraining, train_vqvae
from speechloss.training.vq import mean_pesq, restored_share

FEW = dict(corpus='mini', steps=4, batch_size=4, seconds=1., valid_size=2, warmup=1, eval_every=2)
SHAPE = dict(recipe='enhance', widths=(24, 16), size=48, blocks=0)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = VQVAE(**SHAPE).train()
    net(.1 * torch.randn(4, 8_000))
    return net.eval()


@pytest.fixture
def wave(): return .1 * torch.randn(6, 8_000, generator=torch.Generator().manual_seed(1))


# ---- the attack

def test_attacks_lie_within_their_range_and_go_uphill(net, wave, monkeypatch):
    distil, seen = SelfDistillation(net), []
    def spy(clean, gradient, strength):
        moved = attack_step(clean, gradient, strength)
        seen.append((clean.detach(), gradient, moved))
        return moved
    monkeypatch.setattr('speechloss.models.vq_enhancer.attack_step', spy)
    for seed in range(5):
        torch.manual_seed(seed)
        terms = distil(wave)
        assert terms['tokens_attacked'] > terms['tokens']
    for clean, gradient, moved in seen:
        step = moved - clean
        snr = 20 * torch.log10(clean.norm(dim=-1) / step.norm(dim=-1))
        assert (snr >= 5.19).all() and (snr <= 30.46).all()
        assert torch.allclose(F.cosine_similarity(step, gradient), torch.ones(6), atol=1e-4)
    snrs = torch.cat([20 * torch.log10(c.norm(dim=-1) / (m - c).norm(dim=-1)) for c, _, m in seen])
    assert snrs.min() < 8 and snrs.max() > 12                        # drawn, for each utterance


def test_without_a_gradient_nothing_moves(wave):
    gradient = torch.randn(6, 8_000)
    gradient[1], gradient[2, 5] = 0, math.nan
    moved = attack_step(wave, gradient, torch.full((6,), .3))
    assert torch.equal(moved[1:3], wave[1:3]) and not torch.equal(moved[0], wave[0]) and moved.isfinite().all()
    assert not attack_step(0 * wave, gradient, torch.full((6,), .3)).any()


def test_dropout_does_not_choose_the_attack(wave):
    "The step is that of eval mode, in `attacked` and in a training step; the student goes on as it was"
    torch.manual_seed(0)
    net = VQVAE('enhance', widths=(24, 16, 16), size=32, blocks=2)
    net(wave)
    distil, strength = SelfDistillation(net).train(), torch.full((len(wave),), .3)
    modes = [module.training for module in net.modules()]
    one, two = (distil.attacked(wave, strength) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, wave)
    assert modes == [module.training for module in net.modules()] and any(modes)
    taken, tokens = [], distil.tokens(wave)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('speechloss.models.vq_enhancer.attack_step',
                      lambda wave, gradient, strength: taken.append(gradient) or wave)
        distil.train()(wave)['tokens_attacked'].backward()
    assert torch.allclose(taken[0], _entropy_gradient(net, wave, tokens, None), atol=1e-7)
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_padding_has_no_part_in_an_attack(net, wave):
    lengths = torch.tensor([8_000, 5_000, 6_000, 8_000, 700, 8_000])
    beyond = torch.arange(8_000) >= lengths[:, None]
    distil, terms = SelfDistillation(net), []
    for fill in (0., math.nan, 50.):
        torch.manual_seed(0)
        terms.append(distil(torch.where(beyond, fill, wave), lengths))
        moved = distil.attacked(torch.where(beyond, fill, wave), torch.full((6,), .3), lengths)
        clean = torch.where(beyond, 0., wave)
        assert torch.allclose((moved - clean).norm(dim=-1) / clean.norm(dim=-1), torch.full((6,), .3), atol=1e-4)
        assert not (moved - clean)[beyond].any()
    for other in terms[1:]: assert all(torch.equal(terms[0][name], other[name]) for name in terms[0])


# ---- the second stage

@pytest.mark.parametrize('lengths', [None, torch.tensor([8_000, 5_000, 6_000, 8_000, 700, 8_000])])
def test_terms_are_their_formula(net, wave, lengths):
    distil = SelfDistillation(net, attack=False)
    with torch.no_grad(): distil.student.encoder.convs[0].weight.mul_(1.1)      # away from its teacher
    terms = distil(wave, lengths)
    tokens, decoder = [], [0., 0.]
    for k, w in enumerate(wave):
        w = w[None, :8_000 if lengths is None else int(lengths[k])]
        spectrum, mask = net.spectrum(w)
        z, teacher = net.encode(spectrum, mask)[0], distil.teacher.net
        wanted = torch.cdist(teacher.encode(spectrum, mask)[0], teacher.codebook.codes).argmin(-1)
        logits = -torch.cdist(z, net.codebook.codes)
        tokens.append(F.cross_entropy(logits, wanted))
        out = net.decode(net.codebook.codes[logits.argmax(-1)][None], mask)
        decoder[0] += (out - spectrum).abs().sum()
        decoder[1] += spectrum.sum()
    assert torch.allclose(terms['tokens'], torch.stack(tokens).mean(), rtol=1e-4)
    assert torch.allclose(terms['decoder'], 45 * decoder[0] / decoder[1], rtol=1e-3)


def test_encoder_learns_from_tokens_and_decoder_from_codes_alone(net, wave):
    distil = SelfDistillation(net)
    teacher = copy.deepcopy(distil.teacher.net.state_dict())
    for names, learner, still in ((('tokens', 'tokens_attacked'), net.encoder, net.decoder),
                                  (('decoder', 'decoder_attacked'), net.decoder, net.encoder)):
        distil.zero_grad()
        terms = distil.train()(wave)
        sum(terms[n] for n in names).backward()
        assert all(p.grad is not None and p.grad.any() for p in learner.parameters())
        assert all(p.grad is None for p in still.parameters())
    assert all(torch.equal(v, distil.teacher.net.state_dict()[k]) for k, v in teacher.items())
    assert torch.equal(net.codebook.codes, teacher['codebook.codes']) and torch.equal(net.codebook.counts,
                                                                                      teacher['codebook.counts'])
    assert not any('teacher' in name for name in distil.state_dict()) and not distil.teacher.net.training


def test_mistakes_are_named(net, tmp_path):
    for wrong in (dict(strength=(0., .5)), dict(strength=(.5, .1)), dict(net=VQVAE(**SHAPE | dict(size=0)))):
        with pytest.raises(SpeechLossError, match='strength is'): SelfDistillation(**dict(net=net) | wrong)
    with pytest.raises(SpeechLossError, match="synthesis 'flat' is unknown: choose one of hann, hamming"):
        VQEnhancer(synthesis='flat')
    with pytest.raises(TrainingError, match="selection 'best' is unknown"): VQTraining(selection='best')
    with pytest.raises(SpeechLossError, match='holds no'):
        train_vqvae(VQDistillation(**FEW, init=str(tmp_path)), tmp_path/'out')


# ---- the enhancer

def test_wave_to_wave(net, wave):
    hann, hamming = VQEnhancer.of(net), VQEnhancer.of(net, synthesis='hamming')
    with torch.no_grad():
        spec = stft(wave, 512, 128)
        found = net(wave).decoded.expm1() * torch.polar(torch.ones(()), spec.angle())
        for model, window in ((hann, 'hann'), (hamming, 'hamming')):
            assert torch.allclose(model(wave), istft(found, 512, 128, window=window, length=8_000), atol=1e-5)
        assert not torch.allclose(hann(wave), hamming(wave), atol=1e-4)
        for size in (1, 200, 512, 4_001): assert hann(wave[:, :size]).shape == (6, size)
        assert hann(0 * wave).isfinite().all()
        lengths = torch.tensor([8_000, 5_000, 300, 8_000, 8_000, 8_000])
        together = hann(torch.where(torch.arange(8_000) < lengths[:, None], wave, math.nan).nan_to_num(9.), lengths)
        assert torch.allclose(together[1, :4_600], hann(wave[1, :5_000])[:4_600], atol=1e-5)
        assert not together[1, 5_000:].any() and not together[2, 300:].any()
    assert hann.encode(wave).shape == (6, 63, 16)


def test_saved_and_loaded_like_others(net, wave, tmp_path):
    model = VQEnhancer.of(net, synthesis='hamming')
    model.save_pretrained(tmp_path)
    back = load_enhancer(tmp_path)
    with torch.no_grad(): assert torch.equal(back(wave), model(wave)) and back.synthesis == 'hamming'
    assert isinstance(enhancer(dict(kind='vq', widths=(8, 4), size=8, blocks=0)), VQEnhancer)
    assert sum(p.numel() for p in VQEnhancer().parameters()) == 1_456_512 + 1_456_641       # the published one


def test_both_stages_from_nothing(tmp_path):
    first = train_vqvae(VQTraining(**FEW, network=SHAPE), tmp_path/'first')
    runs = {}
    for attack in (True, False):
        runs[attack] = load_network(VQVAE, train_vqvae(VQDistillation(**FEW, init=str(first), attack=attack),
                                              tmp_path/f'second{attack}'))
    assert runs[True][1]['weights'] == runs[False][1]['weights']
    assert not torch.equal(runs[True][0].encoder.convs[0].weight, runs[False][0].encoder.convs[0].weight)
    assert load_enhancer(tmp_path/'secondTrue')(.1 * torch.randn(4_000)).shape == (4_000,)
    log = [json.loads(line) for line in open(tmp_path/'secondTrue/run/log.jsonl')]
    assert all('restored' in row['valid'] for row in log)
    again = train_vqvae(VQDistillation(**FEW, init=str(first)), tmp_path/'secondTrue')
    assert again == tmp_path/'secondTrue/model'
    with pytest.raises(TrainingError, match='another run'):
        train_vqvae(VQDistillation(**FEW, init=str(first), strength=(.1, .2)), tmp_path/'secondTrue')


def test_what_a_validation_measures(net, wave):
    class Perfect(torch.nn.Module):
        def spectrum(self, x): return net.spectrum(x)
        def forward(self, x):
            return type('Found', (), dict(spectrum=net.spectrum(x)[0], decoded=self.answer, quantised=None))
    model = Perfect()
    data = [dict(noisy=wave[0] + wave[1], clean=wave[0])]
    spectrum, mask = net.spectrum(wave[:1])
    for answer, want in ((spectrum, 1.), (net.spectrum(wave[:1] + wave[1:2])[0], 0.)):
        model.answer = answer
        assert restored_share(model, data)['restored'] == pytest.approx(want, abs=1e-6)
    assert spectral_ratio(2 * spectrum, spectrum, mask).item() == pytest.approx(1.)
    pytest.importorskip('pesq')
    pairs = Mixtures.grid(get('mini'), 'valid', limit=2, seconds=2., extra_noise=('white',))
    from pesq import pesq
    with torch.no_grad(): made = [VQEnhancer.of(net)(pairs[k]['noisy']).numpy() for k in range(2)]
    want = sum(pesq(16_000, pairs[k]['clean'].numpy(), made[k], 'wb') for k in range(2)) / 2
    assert mean_pesq(net, pairs)['pesq'] == pytest.approx(want, abs=1e-4)


# ---- training

@pytest.mark.parametrize('stage', ['quality', 'first', 'second'])
def test_stopped_and_started_again_it_ends_with_the_same_bits(stage, tmp_path):
    training = VQTraining(**FEW | dict(steps=7), network=dict(widths=(16, 8), size=32) if stage == 'quality' else SHAPE)
    if stage == 'second':
        first = train_vqvae(training, tmp_path/'first')
        training = VQDistillation(**FEW | dict(steps=7), init=str(first))
    training = replace(training, eval_every=3)
    def stop_at(step):
        def progress(label, done, total):
            if done == step: raise KeyboardInterrupt
        return progress
    def run(name, *stops):
        for step in stops:
            with pytest.raises(KeyboardInterrupt): train_vqvae(training, tmp_path/name, progress=stop_at(step))
        train_vqvae(training, tmp_path/name)
        return {p.relative_to(tmp_path/name): p.read_bytes() for p in (tmp_path/name).rglob('*.safetensors')
                if 'checkpoints' not in p.parts}
    whole = run('whole')
    assert whole == run('again', 2, 5) and len(whole) == 3 + (stage != 'quality')


def test_of_pairs_the_clean_side_is_heard(tmp_path):
    speech = [r for split in ('train', 'valid') for r in get('mini').speech(split)[:3]]
    rows = []
    for k, r in enumerate(speech):
        wave = load(r.path)[0]
        save(tmp_path/f'{k}.wav', (wave + .3 * torch.randn(len(wave))).clamp(-1, 1), 16_000)
        rows.append(replace(r, kind='pair', path=str(tmp_path/f'{k}.wav'), clean_path=r.path, clean_sha256=r.sha256,
                            sha256=''))
    corpus = Manifest(rows, 'pairs').save(tmp_path/'pairs.jsonl')
    alone = Manifest([*speech], 'speech').save(tmp_path/'speech.jsonl')
    few = FEW | dict(network=dict(widths=(16, 8), size=32))
    a, b = (load_network(VQVAE, train_vqvae(VQTraining(**few | dict(corpus=str(path))), tmp_path/path.stem))
            for path in (corpus, alone))
    assert all(torch.equal(v, b[0].state_dict()[k]) for k, v in a[0].state_dict().items())
    assert a[1]['speakers'] == b[1]['speakers'] != [] and a[1]['seconds_of_speech'] == b[1]['seconds_of_speech'] > 0
    pytest.importorskip('pesq')
    chosen = train_vqvae(VQTraining(**FEW | dict(corpus=str(corpus), selection='pesq'), network=SHAPE), tmp_path/'pesq')
    assert load_network(VQVAE, chosen)[1]['chosen']['valid']['pesq'] >= 1       # on the noisy twins


def test_the_second_stage_is_that_of_an_enhancer(tmp_path):
    quality = train_vqvae(VQTraining(**FEW, network=dict(widths=(16, 8), size=32)), tmp_path/'q')
    with pytest.raises(TrainingError, match="is of the recipe 'quality'"):
        train_vqvae(VQDistillation(**FEW, init=str(quality)), tmp_path/'second')


def script_of(tmp_path):
    "A script that trains a small network into tmp_path/out"
    script = tmp_path/'train.py'
    script.write_text('from speechloss.training.vq import VQTraining, train_vqvae\n'
                      f'few = dict({", ".join(f"{k}={v!r}" for k, v in FEW.items())})\n'
                      f'print(train_vqvae(VQTraining(**few, network={SHAPE}), {str(tmp_path/"out")!r}))\n')
    return script


def test_runs_that_wait_for_one_another_write_one_network(tmp_path):
    "All are there when the training ends, and none gets into the way of the one that writes"
    runs = [subprocess.Popen([sys.executable, str(script_of(tmp_path))], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=os.environ | dict(OMP_NUM_THREADS='1')) for _ in range(4)]
    for run in runs:
        told, error = run.communicate(timeout=300)
        assert run.returncode == 0, error[-2000:]
        assert told.strip() == str(tmp_path/'out/model')
    assert load_network(VQVAE, tmp_path/'out/model')[0].codebook.begun
    assert load_enhancer(tmp_path/'out').sample_rate == 16_000


def test_two_processes_write_one_network(tmp_path):
    script = script_of(tmp_path)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                           str(script)], capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_network(VQVAE, tmp_path/'out/model')[0].codebook.begun
    assert load_enhancer(tmp_path/'out').sample_rate == 16_000
