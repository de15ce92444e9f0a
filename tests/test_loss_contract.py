"""Every loss of the package keeps the loss contract."""
from functools import partial

import pytest
import torch
from helpers import LARGE, Half, TinyModel, hugging, whisper
from loss_contract import Case, LossContract

from speechloss.features import (
    EncoderFeatures, RandomFeatures, GammatoneFeatures, MelFeatures, STFTFeatures)
from speechloss.features.codec import CodecNet
from speechloss.features.vqvae import VQVAE
from speechloss.losses import (
    CARDS, CodecLoss, CompressedComplexLoss, ContrastiveRegularization, FeatureDistance,
    MaskingLoss, MelLoss, ModelAsLoss, MultiResolutionSTFTLoss, Objective, PESQLoss, SISDRLoss, SNRLoss,
    SSLLoss, STFTLoss, STOILoss, VQLoss, WaveL1Loss, WaveL2Loss, preset)
from speechloss.models import enhancer

# A magnitude knows no direction at exact silence.
MAGNITUDE = ('silent enhanced',)
# SI-SDR looks for the clean wave in the enhanced one: either may be missing.
SCALE_FREE = ('silent clean', 'silent enhanced', 'both silent')


TWO = ((512, 128), (256, 64))
CAUSAL = dict(preset='small', causal=True)
RUNNING = ('balancer.running', 'balancer.steps')


def own(reduction='mean', model=TinyModel, **options):
    torch.manual_seed(7)
    return ModelAsLoss(model(), reduction=reduction, **options)


def distance(features, reduction='mean', **options):
    return FeatureDistance(features(), reduction=reduction, **options)


def codec(reduction='mean', **options):
    torch.manual_seed(7)
    net = CodecNet(widths=(4, 6, 8))
    card = dict(skill=dict(skill=.2), scale={name: .1 + .1 * k for k, name in enumerate(net.names)})
    return CodecLoss(net, card=card, reduction=reduction, **options)


def vq(reduction='mean', **options):
    torch.manual_seed(7)
    return VQLoss(VQVAE(widths=(16, 8), size=32), reduction=reduction, **options)


def contrastive(reduction='mean', features=RandomFeatures, earlier=True, **options):
    return ContrastiveRegularization(features(), earlier=Half() if earlier else None, reduction=reduction, **options)


def objective(*names, reduction='mean', **options):
    makers = dict(l1=WaveL1Loss, l2=WaveL2Loss, cc=CompressedComplexLoss, snr=SNRLoss,
                  mel=partial(MelLoss, sample_rate=16000), own=own)
    return Objective({name: makers[name]() for name in names}, reduction=reduction, **options)


WAVES = [
    Case('wave_l1', WaveL1Loss, compiles='aot_eager'),
    Case('wave_l2', WaveL2Loss, compiles='aot_eager'),
    Case('snr', SNRLoss, -100., compiles='aot_eager'),
    Case('snr-30', partial(SNRLoss, max_db=30.), -30.),
    Case('si_sdr', SISDRLoss, -100., compiles='aot_eager',
         blind=SCALE_FREE + ('DC alone', 'DC target')),
    Case('si_sdr-mean-30', partial(SISDRLoss, max_db=30., zero_mean=False), -30.,
         compiles='aot_eager', blind=SCALE_FREE),
]

SPECTRA = [
    Case('masking', MaskingLoss),
    Case('masking-loud', partial(MaskingLoss, full_scale_db=110., hop_length=128)),
    Case('pesq', PESQLoss, blind=SCALE_FREE),
    Case('stoi', STOILoss, blind=SCALE_FREE),
    Case('estoi', partial(STOILoss, extended=True), blind=SCALE_FREE),
    Case('stoi-all', partial(STOILoss, remove_silence=False), blind=SCALE_FREE, atol=1e-5),
    Case('stft', STFTLoss, compiles='aot_eager', blind=MAGNITUDE),
    Case('stft-lin', partial(STFTLoss, n_fft=400, hop_length=100, win_length=321,
                             terms=dict(lin_l1=2.), window='hamming'), blind=MAGNITUDE),
    Case('stft-sc', partial(STFTLoss, terms=dict(sc=1.)), blind=MAGNITUDE),
    Case('stft-log', partial(STFTLoss, terms=dict(log_l1=1.), eps=1e-7), blind=MAGNITUDE),
    Case('multi_resolution_stft', MultiResolutionSTFTLoss, compiles='aot_eager', blind=MAGNITUDE),
    Case('multi_resolution_stft-all', partial(
        MultiResolutionSTFTLoss, resolutions=((256, 64, 256), (128, 50, 100)),
        terms=dict(sc=.5, log_l1=2., lin_l1=1., log_l2=.5, lin_l2=.1)), blind=MAGNITUDE),
    Case('mel', partial(MelLoss, sample_rate=16000), compiles='aot_eager', blind=MAGNITUDE),
    Case('mel-20', partial(MelLoss, sample_rate=8000, resolutions=[(256, 100, 256)], n_mels=20),
         blind=MAGNITUDE),
    Case('compressed_complex', CompressedComplexLoss, compiles='inductor'),
    Case('compressed_complex-complex', partial(CompressedComplexLoss, share=1., power=.5)),
    Case('dac-mel', partial(preset, 'dac-mel'), blind=MAGNITUDE),
    Case('deepfilternet', partial(preset, 'deepfilternet')),
    Case('compressed_complex-magnitude', partial(CompressedComplexLoss, share=0.), blind=MAGNITUDE),
]

SETS = {
    'stft': (partial(STFTFeatures, resolutions=TWO), MAGNITUDE),
    'stft-log': (partial(STFTFeatures, kind='log'), MAGNITUDE),
    'stft-complex': (partial(STFTFeatures, kind='complex'), ()),
    'mel': (partial(MelFeatures, sample_rate=16000, n_mels=40), MAGNITUDE),
    'gammatone': (partial(GammatoneFeatures, sample_rate=16000, n_bands=40), MAGNITUDE),
    'random': (RandomFeatures, ()),
    'encoder': (partial(EncoderFeatures, TinyModel()), ()),
}

DISTANCES = [
    Case(f'{name}-{kind}', partial(distance, make, distance=kind), blind=blind,
         compiles='aot_eager' if name != 'encoder' and kind == 'cosine' else '')
    for name, (make, blind) in SETS.items() for kind in ('l1', 'l2', 'cosine')]

BALANCED = [
    Case('standardized', partial(distance, RandomFeatures, standardize=True)),
    Case('weights', partial(distance, RandomFeatures, weights=[1., 0., 2., .5])),
    Case('by value', partial(distance, RandomFeatures, balance='value')),
    Case('by mean', partial(distance, RandomFeatures, balance='mean'), state=RUNNING),
    Case('by grad', partial(distance, RandomFeatures, balance='grad'), state=RUNNING),
    Case('by grad, cosine', partial(distance, RandomFeatures, balance='grad', distance='cosine'),
         state=RUNNING),
]

OWN = [
    Case('model_as_loss', own),
    Case('dynamic-l2-all', partial(own, rule='dynamic', layers='all', distance='l2')),
    Case('frozen-fe-cosine', partial(own, rule='frozen-fe', layers=[1], distance='cosine')),
    Case('standardized-by-value', partial(own, layers='all', standardize=True, balance='value')),
    Case('by grad', partial(own, layers='all', balance='grad'), state=RUNNING),
    Case('enhancer', partial(own, model=partial(enhancer, 'small'), layers='all'), blind=MAGNITUDE),
    Case('causal enhancer', partial(own, model=partial(enhancer, CAUSAL)), blind=MAGNITUDE),
]

NETWORKS = [
    Case('codec', codec, blind=MAGNITUDE),
    Case('codec-inner', partial(codec, layers='inner', distance='l2'), blind=MAGNITUDE),
    Case('vq', vq, blind=MAGNITUDE),
    Case('vq-all-l2', partial(vq, layers='all', distance='l2'), blind=MAGNITUDE),
    Case('ssl', lambda **options: SSLLoss(hugging('WavLM'), **options)),
    Case('standardised', lambda **options: SSLLoss(
        hugging('Hubert', LARGE), layers='all', distance='l1', **options)),
    Case('kept', lambda **options: SSLLoss(hugging('Wav2Vec2'), layers='conv', distance='cosine', cache=64, **options)),
    Case('whisper', lambda **options: SSLLoss(whisper(), layers=[1, 3], checkpoint=True, **options),
         blind=MAGNITUDE + ('-120 dBFS', '-120 dBFS enhanced')),   # its mel is cut off below -100 dB
]

RATIOS = [
    Case('contrastive', partial(contrastive, earlier=False), noisy=True, compiles='aot_eager'),
    Case('two negatives', partial(contrastive, curriculum={}, distance='l2', weights=[1., 0., 2., .5]), noisy=True),
    Case('smooth', partial(contrastive, curriculum=dict(rule='smooth'), distance='cosine', clamp=1.), noisy=True),
    Case('spectra', partial(contrastive, features=partial(STFTFeatures, resolutions=TWO), curriculum={}, cache=9),
         noisy=True, blind=MAGNITUDE),
    Case('data set', partial(contrastive, curriculum=dict(level='dataset')), noisy=True,
         state=('curriculum.margins', 'curriculum.steps')),
    Case('encoder', partial(contrastive, features=partial(EncoderFeatures, TinyModel()), clamp=None), noisy=True),
    Case('info_nce', partial(contrastive, form='info_nce', curriculum={}), noisy=True, atol=1e-5),
    Case('info_nce-1', partial(contrastive, form='info_nce', earlier=False), noisy=True, atol=1e-5,
         compiles='aot_eager'),
    Case('no push', partial(contrastive, push=False), noisy=True),
]

OBJECTIVES = [
    Case('sum', partial(objective, 'l1', 'cc', 'snr'), -100., compiles='aot_eager', atol=1e-5),
    Case('weights', partial(objective, 'snr', 'own', weights=dict(snr=.1, own=2.)), -10.,
         atol=1e-5),
    Case('by value', partial(objective, 'l1', 'l2', balance='value')),
    Case('by mean', partial(objective, 'l1', 'cc', 'own', balance='mean'), state=RUNNING),
    Case('by grad', partial(objective, 'cc', 'mel', balance='grad', weights=dict(mel=.5)),
         state=RUNNING),
]


class TestWaves(LossContract): cases = WAVES
class TestSpectra(LossContract): cases = SPECTRA
class TestDistances(LossContract): cases = DISTANCES
class TestBalanced(LossContract): cases = BALANCED
class TestModelAsLoss(LossContract): cases = OWN
class TestNetworks(LossContract): cases = NETWORKS
class TestRatios(LossContract): cases = RATIOS
class TestObjective(LossContract): cases = OBJECTIVES


def test_every_card_is_tested():
    tested = {type(case.make(reduction='none'))
              for case in WAVES + SPECTRA + DISTANCES + OWN + NETWORKS + RATIOS}
    assert {card.loss for card in CARDS.values()} <= tested


@pytest.mark.parametrize('card', CARDS.values(), ids=lambda card: card.name)
def test_identity_of_the_cards(card):
    case = next(c for c in WAVES + SPECTRA + DISTANCES + OWN + NETWORKS + RATIOS
                if type(c.make(reduction='none')) is card.loss)
    assert card.identity == {0.: '0', -100.: '-max_db'}[case.identity]
