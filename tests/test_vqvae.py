"""The autoencoder of VQScore: published shapes, its codebook by brute force and closed form, foreign checkpoints."""
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from speechloss.common.errors import SpeechLossError
from speechloss.common.files import sha256
from speechloss.features.codebook import Codebook
from speechloss.features.vqvae import RECIPES, VQVAE, from_official

PUBLISHED = {'quality': (452_928, 453_153, 2048 * 32), 'enhance': (1_456_512, 1_456_641, 4096 * 128)}


@pytest.mark.parametrize('recipe', RECIPES)
def test_as_many_weights_as_published(recipe):
    net = VQVAE(recipe)
    count = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder)]
    assert (*count, net.codebook.codes.numel()) == PUBLISHED[recipe]


# ---- the codebook

def filled(size=64, dim=8, **options):
    torch.manual_seed(0)
    book = Codebook(size, dim, **options)
    book(torch.randn(2, 200, dim), update=True)
    return book


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_nearest_by_brute_force(metric):
    book, x = filled(distance=metric).eval(), torch.randn(3, 50, 8)
    found = book(x)
    seen = F.normalize(x, dim=-1) if metric == 'cosine' else x
    apart = (seen[..., None, :].double() - book.codes.double()).square().sum(-1)
    assert found.index.equal(apart.argmin(-1))
    torch.testing.assert_close(found.commitment, apart.amin(-1).mean(-1).float() / 8)
    torch.testing.assert_close(found.codes, book.codes[found.index], atol=1e-6, rtol=0)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_moving_averages_by_closed_form(metric):
    book = filled(distance=metric)
    before, x = copy.deepcopy(book.state_dict()), torch.randn(2, 90, 8)
    index = book(x).index
    seen = book.unit(x).flatten(0, 1).double()
    hits = F.one_hot(index.flatten(), 64).double()
    counts = .8 * before['counts'].double() + .2 * hits.sum(0)
    sums = .8 * before['sums'].double() + .2 * hits.T @ seen
    smooth = (counts + 1e-5) / (counts.sum() + 64e-5) * counts.sum()
    codes = sums / smooth[:, None]
    if metric == 'cosine': codes = codes / codes.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(book.counts.double(), counts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(book.codes.double(), codes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_the_library_that_others_keep_makes_the_same_codes(metric):
    library = pytest.importorskip('vector_quantize_pytorch')
    torch.manual_seed(0)
    ours, draw = Codebook(64, 8, distance=metric), torch.randn(64, 8)
    theirs = library.VectorQuantize(dim=8, codebook_size=64, decay=.8, kmeans_init=False, commitment_weight=1.,
                                    use_cosine_sim=metric == 'cosine', threshold_ema_dead_code=0)
    book, counts = theirs._codebook, 1 + 5 * torch.rand(64)
    draw = ours.unit(draw)
    for mine, other, value in ((ours.codes, book.embed, draw), (ours.counts, book.cluster_size, counts),
                               (ours.sums, book.embed_avg, draw * counts[:, None])):
        mine.copy_(value)
        other.data.copy_(value[None])
    for flag in (ours.begun, book.initted): flag.fill_(True)
    for _ in range(3):
        x = torch.randn(2, 50, 8)
        found, (codes, index, commitment) = ours(x), theirs(x)
        assert found.index.equal(index) and torch.allclose(found.codes, codes, atol=1e-6)
        assert torch.allclose(found.commitment.mean(), commitment)
        assert torch.allclose(ours.codes, book.embed[0], atol=1e-6)


def test_gradient_goes_straight_through():
    book, x = filled(distance='euclidean').eval(), torch.randn(1, 20, 8, requires_grad=True)
    weight = torch.randn(1, 20, 8)
    (book(x).codes * weight).sum().backward()
    assert x.grad.equal(weight)
    x.grad = None
    found = book(x)
    found.commitment.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - book.codes[found.index]) / x.numel())


def test_padding_and_mates_do_not_move_the_codes():
    one, two = filled(), filled()
    x, lengths = torch.randn(2, 30, 8), torch.tensor([30, 11])
    spoiled = x.clone()
    spoiled[1, 11:] = 1e3
    found = one(spoiled, lengths)
    two(torch.cat([x[0], x[1, :11]])[None])
    assert one.codes.allclose(two.codes) and one.counts.allclose(two.counts)
    assert (found.index[1, 11:] == -1).all() and not found.codes[1, 11:].any()
    alone = one.eval()(x[1:, :11])
    assert one(spoiled, lengths).commitment[1].allclose(alone.commitment[0])


def test_codes_rest_outside_training_and_live_in_the_state():
    book = filled()
    before = copy.deepcopy(book.state_dict())
    book.eval()(torch.randn(1, 20, 8))
    book.train()(torch.randn(1, 20, 8), update=False)
    assert all(before[k].equal(v) for k, v in book.state_dict().items())
    other = Codebook(64, 8)
    with pytest.raises(SpeechLossError, match='the codebook is empty'): other.eval()(torch.randn(1, 20, 8))
    other.load_state_dict(before)
    x = torch.randn(1, 20, 8)
    assert other(x).index.equal(book.eval()(x).index)


def test_a_dead_code_is_revived_where_it_is_asked_for():
    far = torch.tensor([[[5., 5.], [5.1, 5.], [5., 5.1], [4.9, 5.]]])
    for revive, alive in ((0., False), (.5, True)):
        book = Codebook(2, 2, distance='euclidean', revive=revive)
        book.load_state_dict(dict(codes=torch.tensor([[0., 0.], [-90., 0.]]), sums=torch.zeros(2, 2),
                                  counts=torch.tensor([4., .4]), begun=torch.tensor(True)))
        for _ in range(3): book(far)
        assert bool(((book.codes[1] - 5).abs() < 1).all()) == alive


def test_kmeans_finds_what_is_there():
    torch.manual_seed(1)
    centres = 10 * torch.randn(3, 4)
    data = centres.repeat(20, 1) + torch.randn(60, 4)
    book = Codebook(3, 4, distance='euclidean', iterations=20)
    found = book(data[None]).index[0]
    assert torch.cdist(centres, book.codes).amin(1).max() < 1 and book.begun       # each centre has its code,
    for k in range(3): assert torch.allclose(book.codes[k], data[found == k].mean(0), atol=1e-3)    # a mean
    few = Codebook(50, 4)
    few(torch.randn(1, 10, 4))                      # fewer vectors than codes
    assert few.codes.isfinite().all()


# ---- foreign checkpoints: the layout, rebuilt here from its description

class Layout(nn.Module):
    "The names of the authors' modules, and what they compute"
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        a, b, d, size = (128, 64, 32, 2048) if recipe == 'quality' else (200, 150, 128, 4096)
        enc, dec = (257, a, a, b, b, d, d), (d, d, b, b, a, a, 257)
        self.CNN_1D_encoder, self.CNN_1D_decoder, self.quantizer = nn.Module(), nn.Module(), nn.Module()
        for k in range(6):
            setattr(self.CNN_1D_encoder, f'conv_enc{k + 1}', nn.Conv1d(enc[k], enc[k + 1], 7, padding=3))
            setattr(self.CNN_1D_decoder, f'conv_dec{k + 1}', nn.Conv1d(dec[k], dec[k + 1], 7, padding=3))
        if recipe == 'enhance':
            def blocks(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(
                d, 8, d, dropout=.4, activation='gelu', batch_first=True), 2, enable_nested_tensor=False)
            self.CNN_1D_encoder.transformer_encoder = blocks()
            self.CNN_1D_decoder.transformer_decoder = blocks()
        self.quantizer.quantizer = nn.Module()
        book = self.quantizer.quantizer._codebook = nn.Module()
        codes = torch.randn(1, size, d)
        if recipe == 'quality': codes = F.normalize(codes, dim=-1)
        for name, value in dict(initted=torch.ones(1), cluster_size=torch.ones(1, size), embed_avg=codes.clone(),
                                embed=codes).items(): book.register_buffer(name, value)

    def level(self, x):
        if self.recipe == 'quality': return F.instance_norm(x)
        return x - x.mean(-1, keepdim=True)

    def encode(self, x):     # (B, 257, frames)
        c = [getattr(self.CNN_1D_encoder, f'conv_enc{k}') for k in range(1, 7)]
        def step(conv, y): return self.level(F.leaky_relu(conv(y), .3))
        e1 = step(c[0], self.level(x))
        e3 = step(c[2], e1 + step(c[1], e1))
        e5 = step(c[4], e3 + step(c[3], e3))
        if self.recipe == 'quality': return self.level(c[5](e5))
        mixed = self.CNN_1D_encoder.transformer_encoder((e5 + step(c[5], e5)).mT)
        return self.level(mixed.mT)

    def decode(self, z):     # (B, frames, dim)
        c = [getattr(self.CNN_1D_decoder, f'conv_dec{k}') for k in range(1, 7)]
        def step(conv, y): return F.leaky_relu(conv(y), .3)
        if self.recipe == 'enhance': z = self.CNN_1D_decoder.transformer_decoder(z)
        d2 = step(c[1], step(c[0], z.mT))
        d4 = step(c[3], step(c[2], d2) + d2)
        return F.relu(c[5](step(c[4], d4) + d4)).mT


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_checkpoint_of_the_published_layout_computes_the_same(recipe, tmp_path):
    torch.manual_seed(0)
    theirs = Layout(recipe).eval()
    torch.save(dict(model=dict(VQVAE=theirs.state_dict()), steps=1), tmp_path/'x.pkl')
    ours = from_official(tmp_path/'x.pkl', recipe, checksum=sha256(tmp_path/'x.pkl'))
    wave = .1 * torch.randn(2, 9000)
    with torch.no_grad():
        spectrum, mask = ours.spectrum(wave)
        vectors = ours.encode(spectrum, mask)
        torch.testing.assert_close(vectors, theirs.encode(spectrum.mT).mT, atol=1e-4, rtol=1e-4)
        found = ours.codebook(vectors)
        codes = theirs.quantizer.quantizer._codebook.embed[0]
        assert found.index.equal((-torch.cdist(ours.codebook.unit(vectors), codes)).argmax(-1))
        want = theirs.decode(codes[found.index])
        torch.testing.assert_close(ours.decode(found.codes, mask), want, atol=1e-4, rtol=1e-4)


def test_what_is_no_checkpoint_of_theirs(tmp_path):
    good = dict(model=dict(VQVAE=Layout('quality').state_dict()))
    torch.save(good, tmp_path/'good.pkl')
    with pytest.raises(SpeechLossError, match='another checksum'): from_official(tmp_path/'good.pkl', checksum='0' * 64)
    with pytest.raises(SpeechLossError, match='does not fit the recipe'): from_official(tmp_path/'good.pkl', 'enhance')
    with pytest.raises(SpeechLossError, match='is no file'): from_official(tmp_path/'absent.pkl')
    (tmp_path/'text.pkl').write_text('hello')
    torch.save(dict(weights=1), tmp_path/'other.pkl')
    torch.save(nn.Linear(1, 1), tmp_path/'code.pkl')       # a pickled object is not run
    for name in ('text', 'other', 'code'):
        with pytest.raises(SpeechLossError, match='holds no weights'): from_official(tmp_path/f'{name}.pkl')
    good['model']['VQVAE']['CNN_1D_encoder.conv_encX.weight'] = torch.zeros(1)
    torch.save(good, tmp_path/'odd.pkl')
    with pytest.raises(SpeechLossError, match='has no place'): from_official(tmp_path/'odd.pkl')


@pytest.mark.parametrize('recipe', RECIPES)
def test_utterances_do_not_see_their_mates(recipe):
    torch.manual_seed(0)
    net = VQVAE(recipe, size=32).eval()
    wave, lengths = .1 * torch.randn(3, 5000), torch.tensor([5000, 3000, 1300])
    spectrum, mask = net.spectrum(wave, lengths)
    vectors = net.encode(spectrum, mask)
    back = net.decode(vectors, mask)
    for k, n in enumerate(lengths.tolist()):
        one, whole = net.spectrum(wave[k:k + 1, :n])
        alone = net.encode(one, whole)
        frames = alone.shape[1]
        torch.testing.assert_close(vectors[k, :frames], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(back[k, :frames], net.decode(alone, whole)[0], atol=1e-4, rtol=1e-4)
        assert not vectors[k, frames:].any() and not back[k, frames:].any()


def test_mistakes_are_named():
    with pytest.raises(SpeechLossError, match="recipe 'score' is unknown"): VQVAE('score')
    with pytest.raises(SpeechLossError, match="option of VQVAE 'depth' is unknown"): VQVAE(depth=3)
    for options in (dict(distance='l1'), dict(size=0), dict(decay=1.)):
        (name, value), = options.items()
        with pytest.raises(SpeechLossError, match=rf"\b{name} (is )?{value!r}"): Codebook(**options)


def test_a_stored_card_may_say_metric():
    net = VQVAE(widths=(16, 8), size=4, metric='euclidean')
    assert net.codebook.distance == 'euclidean' and net.options['metric'] == 'euclidean'


# ---- several processes

def follow(rank: int, folder: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    book = Codebook(16, 8)
    for step in range(3):       # the first begins the codes, from what the first process has
        vectors = torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(step))
        torch.manual_seed(rank)
        book(vectors[rank:rank + 1])
    torch.save(book.state_dict(), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_codes_of_one(tmp_path):
    torch.multiprocessing.spawn(follow, (str(tmp_path),), 2)
    a, b = (torch.load(tmp_path/f'{rank}.pt') for rank in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    one = Codebook(16, 8)
    first = torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)                                        # k-means over all, begun from the first half
    one.codes.copy_(F.normalize(first[0], dim=-1)[torch.randperm(90)[:16]])
    whole = F.normalize(first.flatten(0, 1), dim=-1)
    for _ in range(10):
        index = (whole @ one.codes.T).argmax(-1)
        for k in range(16):
            if (index == k).any(): one.codes[k] = F.normalize(whole[index == k].mean(0), dim=-1)
    one.counts.copy_(torch.bincount(index, minlength=16))
    one.sums.copy_(one.codes * one.counts[:, None])
    one.begun.fill_(True)
    for step in range(3): one(torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(step)))
    assert torch.allclose(a['codes'], one.codes, atol=1e-5) and torch.allclose(a['counts'], one.counts, atol=1e-4)
