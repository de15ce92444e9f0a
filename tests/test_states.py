"""What a loss or a codebook keeps between calls: a bad batch, half precision, devices without float64, inference."""
import numpy as np
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.features import GammatoneFeatures, MelFeatures, RandomFeatures, SSLFeatures
from speechloss.features.codebook import Codebook
from speechloss.losses import (
    CARDS, CompressedComplexLoss, ContrastiveRegularization, Curriculum, Loss, MelLoss, Objective, PESQLoss, SISDRLoss,
    SNRLoss, STOILoss, SSLLoss, VQLoss, build)
from speechloss.losses.balance import Balancer
from speechloss.metrics import VQScore


def waves(batch=2, samples=4000, seed=0):
    return torch.randn(2, batch, samples, generator=torch.Generator().manual_seed(seed)) * .1


# One bad batch -------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 3e38])
@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
@pytest.mark.parametrize('first', [False, True])
def test_a_bad_frame_does_not_spoil_a_codebook(bad, distance, first):
    torch.manual_seed(0)
    book, x = Codebook(64, 8, distance=distance, revive=.1), torch.randn(4, 50, 8)
    if not first: book(x)
    book(x.index_put((torch.tensor(0), torch.tensor(0)), torch.full((8,), bad)))
    for _ in range(3): book(torch.randn(4, 50, 8))
    found = book.eval()(torch.randn(4, 50, 8))
    assert book.codes.isfinite().all() and book.sums.isfinite().all() and book.counts.isfinite().all()
    assert found.codes.isfinite().all() and len(found.index.unique()) > 40


def test_a_codebook_follows_what_it_would_without_the_bad_frame():
    torch.manual_seed(0)
    x, bad = torch.randn(1, 50, 8), torch.full((1, 1, 8), float('nan'))
    one, other = Codebook(16, 8, distance='euclidean'), Codebook(16, 8, distance='euclidean')
    for book in (one, other): torch.manual_seed(1); book(x)
    one(torch.cat([x, bad], 1))
    other(torch.cat([x, bad], 1), torch.tensor([50]))
    assert one.codes.equal(other.codes) and one.counts.equal(other.counts)
    with pytest.raises(SpeechLossError, match='finite'): Codebook(4, 8)(bad)


@pytest.mark.parametrize('mode', ['mean', 'grad'])
def test_a_bad_batch_does_not_spoil_a_balance(mode):
    objective, (e, c) = Objective(dict(a=SNRLoss(), b=CompressedComplexLoss()), balance=mode), waves()
    objective(e.requires_grad_(), c)
    before = {name: b.clone() for name, b in objective.named_buffers()}
    bad = e.detach().clone()
    bad[0, 0] = float('nan')
    objective(bad.requires_grad_(), c)
    assert all(b.equal(before[name]) for name, b in objective.named_buffers())


def test_a_bad_batch_does_not_spoil_a_curriculum():
    curriculum = Curriculum(level='dataset')
    curriculum(torch.tensor([[.5]]))
    curriculum(torch.tensor([[float('nan')]]))
    assert curriculum.margins.item() == .5 and curriculum.steps.item() == 1


# Precision and devices -----------------------------------------------------------------------

def without_float64(tensor):
    "What `.to('mps')` does with a tensor"
    if tensor.dtype == torch.float64: raise TypeError('Cannot convert a MPS Tensor to float64 dtype')
    return tensor


def stateful():
    features = RandomFeatures(layers=[(4, 10, 5), (4, 8, 4)])
    yield 'mean', Objective(dict(a=SNRLoss(), b=CompressedComplexLoss()), balance='mean')
    yield 'grad', Objective(dict(a=SNRLoss(), b=CompressedComplexLoss()), balance='grad')
    yield 'ssl', SSLLoss(balance='mean', layers='conv')
    yield 'contrastive', ContrastiveRegularization(features, curriculum=dict(level='dataset', others=1))
    yield 'mel', MelLoss(sample_rate=16000)
    yield 'pesq', PESQLoss()


@pytest.mark.parametrize('name', [name for name, _ in stateful()])
def test_moves_to_a_device_without_float64(name):
    loss, (e, c) = dict(stateful())[name], waves()
    loss._apply(without_float64)
    assert not [b for b in loss.buffers() if b.dtype == torch.float64]
    assert loss(e, c, noisy=e + c, negatives=dict(other=e - c)).isfinite()


def test_every_loss_moves_to_a_device_without_float64():
    for name in CARDS:
        if name == 'model_as_loss': continue       # its network is that of the user
        loss = build(name)._apply(without_float64)
        assert not [name for name, b in loss.named_buffers() if b.dtype == torch.float64], name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_running_means_and_filters_keep_their_precision(dtype):
    for make in (lambda: Balancer(('a',), mode='mean'), lambda: Curriculum(level='dataset'),
                 lambda: MelFeatures(sample_rate=16000), lambda: GammatoneFeatures(sample_rate=16000)):
        before, after = (dict(m.named_buffers()) for m in (make(), make().to(dtype)))
        assert all(b.dtype == after[name].dtype and b.equal(after[name]) for name, b in before.items())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('make', [VQLoss, SSLLoss, lambda: build('codec'), lambda: MelLoss(sample_rate=16000),
                                  PESQLoss, STOILoss], ids=['vq', 'ssl', 'codec', 'mel', 'pesq', 'stoi'])
def test_losses_in_half_precision(make, dtype):
    e, c = waves()
    torch.testing.assert_close(make().to(dtype)(e, c), make()(e, c), rtol=1e-2, atol=1e-3)


def test_scores_in_half_precision():
    e, _ = waves()
    torch.testing.assert_close(VQScore().bfloat16()(e), VQScore()(e), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype):
    e, c = waves()
    right, weights = VQLoss()(e, c), list(RandomFeatures(seed=0).buffers())
    try:
        torch.set_default_dtype(dtype)
        found, drawn = VQLoss()(e, c), list(RandomFeatures(seed=0).buffers())
    finally: torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-3)
    assert all(a.equal(b) for a, b in zip(weights, drawn, strict=True))


# Inference mode ------------------------------------------------------------------------------

@pytest.mark.parametrize('balance', ['none', 'value', 'mean', 'grad'])
def test_objective_under_inference_mode(balance):
    objective, (e, c) = Objective(dict(a=SNRLoss(), b=CompressedComplexLoss()), balance=balance).eval(), waves()
    with torch.inference_mode(): assert objective(*waves()).isfinite()
    with torch.inference_mode(): assert objective(e, c).isfinite()       # a batch that was made before
    if balance == 'grad': assert objective.balancer.steps == 0
    assert objective.train()(e.requires_grad_(), c).isfinite()
    with torch.inference_mode(): assert objective.eval()(*waves()).isfinite()


# Options -------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['type', 'values', 'keys', 'items', 'train', 'float', 'forward', 'a.b', ''])
def test_a_term_needs_a_name_that_a_module_can_have(name):
    with pytest.raises(SpeechLossError) as caught: build(dict(terms={name: 'snr'}))
    assert repr(name) in str(caught.value) and '\n' not in str(caught.value)


def test_what_an_objective_refuses():
    with pytest.raises(TypeError, match='no Loss'): Objective({'a': torch.nn.L1Loss()})
    for more in (dict(weights={'a': '0.1'}), dict(weights={'a': float('nan')}), dict(weights={'a': True}),
                 dict(momentum=2.), dict(momentum=-.1)):
        with pytest.raises(SpeechLossError): Objective({'a': SNRLoss()}, **more)
    for loss in (SNRLoss, SISDRLoss):
        for limit in (-10., 0., float('inf'), float('nan')):
            with pytest.raises(SpeechLossError, match='max_db'): loss(max_db=limit)


@pytest.mark.parametrize('options, part', [
    (dict(n_mels=0), 'n_mels'), (dict(n_mels=-1), 'n_mels'), (dict(f_max=12000.), '8000 Hz'),
    (dict(f_max=9000., n_mels=10), '8000 Hz'), (dict(f_min=-5.), 'f_min'), (dict(f_min=float('nan')), 'f_min'),
    (dict(f_min=4000., f_max=3000.), 'ascending'), (dict(f_max=0.), 'f_max')])
def test_mel_bands_that_cannot_be(options, part):
    with pytest.raises(SpeechLossError, match=part): MelLoss(sample_rate=16000, **options)


@pytest.mark.parametrize('lengths', [[4000, 2500], (4000, 2500), np.array([4000, 2500]), torch.tensor([4000, 2500])],
                         ids=['list', 'tuple', 'numpy', 'torch'])
def test_lengths_may_be_any_sequence(lengths):
    (e, c), right, score = waves(), torch.tensor([4000, 2500]), VQScore()
    for shape in ((2, 4000), (2, 1, 4000)):
        x, y = e.view(shape), c.view(shape)
        assert score(x, lengths).equal(score(x, right))
        for loss in (SNRLoss(), CompressedComplexLoss(), VQLoss()):
            assert isinstance(loss, Loss) and loss(x, y, lengths=lengths).equal(loss(x, y, lengths=right))
    assert SSLFeatures('small', layers='last')(e, right)[0].isfinite().all()
