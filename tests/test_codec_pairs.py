"""MP3 pairs: in place to the sample, whole or not there, and one sentence for what cannot be coded."""
import json
import pickle
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from speechloss.common.errors import AudioError, SpeechLossError
from speechloss.corpora import Codec, CodecPairs, build_pairs, get
from speechloss.corpora.codec_pairs import BIT_RATES, source_wave
from speechloss.signal import load, resample, save

if find_spec('lameenc') is None: pytest.skip('without lameenc', allow_module_level=True)
RATE = 16_000


@pytest.fixture(scope='module')
def speech():
    return [load(r.path, sample_rate=RATE)[0][:6 * RATE] for r in get('mini').speech()[:3]]


@pytest.fixture
def folder(tmp_path, speech):
    for k, wave in enumerate(speech): save(tmp_path/f'speech/{k}.wav', wave, RATE)
    return tmp_path


def lags(coded, clean, most=2000):
    "Lag of the best match over the whole wave, and the correlation there"
    size = 1 << (len(clean) + most).bit_length()
    found = np.fft.irfft(np.fft.rfft(coded.double(), size) * np.conj(np.fft.rfft(clean.double(), size)), size)
    found = np.concatenate([found[-most:], found[:most + 1]])
    return int(found.argmax()) - most, float(found.max() / (coded.double().norm() * clean.double().norm()))


@pytest.mark.parametrize('bit_rate', [b for b in BIT_RATES[RATE] if b >= 16])
def test_aligned_on_speech_and_on_impulses(bit_rate, speech):
    codec = Codec(bit_rate)
    impulses = torch.zeros(2 * RATE)
    places = torch.arange(1_111, 2 * RATE - 500, 2_777)
    impulses[places] = .9
    coded = codec(impulses)
    for at in places:        # each impulse is where it was
        around = coded[at - 300:at + 301].abs()
        assert int(around.argmax()) == 300
    for wave in speech:
        lag, alike = lags(codec(wave), wave)
        assert lag == 0 and alike > .9, (lag, alike)


@pytest.mark.parametrize('rate', BIT_RATES)
def test_every_rate_and_bit_rate_is_aligned(rate, speech):
    wave = resample(speech[0][:3 * RATE], RATE, rate)
    for bit_rate in BIT_RATES[rate]:
        coded = Codec(bit_rate, rate)(wave)
        assert lags(coded, wave)[0] == 0 and len(coded) == len(wave), bit_rate


def test_more_bits_are_nearer(speech):
    error = [(Codec(b)(speech[0]) - speech[0]).square().mean() for b in (16, 24, 32, 48, 64)]
    assert error == sorted(error, reverse=True)
    assert torch.equal(Codec(16)(speech[0]), Codec(16)(speech[0]))


def test_nothing_is_lost_at_either_end(speech):
    for size in 1_600, 1_601, 2_303, 9_999:
        wave = speech[0][20_000:20_000 + size]
        coded = Codec(64)(wave)
        assert len(coded) == size and lags(coded, wave, 400)[0] == 0


@pytest.mark.parametrize('wave,said', [
    (torch.zeros(1599), '100 ms'), (torch.zeros(1, 4000), r'shape \(1, 4000\)'),
    (torch.zeros(4000, dtype=torch.int16), 'int16'),
    (torch.full((4000,), torch.inf), 'NaN or infinite')])
def test_one_sentence_for_a_wave(wave, said):
    with pytest.raises(SpeechLossError, match=said): Codec()(wave)


@pytest.mark.parametrize('options,said', [
    (dict(sample_rate=96_000), 'MP3 has 8000, 11025'), (dict(bit_rate=320), 'MP3 at 16000 Hz has 8, 16'),
    (dict(bit_rate=8, sample_rate=44_100), 'MP3 at 44100 Hz has 32'), (dict(quality=-1), 'quality is -1')])
def test_one_sentence_for_a_setting(options, said):
    with pytest.raises(SpeechLossError, match=said): Codec(**options)


def test_a_broken_mp3_is_an_error_and_not_noise(speech):
    data = Codec().encode(speech[0])
    for broken in b'', b'ID3 but no sound', data[:len(data) // 2]:
        with pytest.raises(AudioError, match='build the pair again'): Codec().decode(broken, len(speech[0]))


def test_a_folder_with_bad_files(folder):
    (folder/'speech/text.wav').write_text('no sound')
    (folder/'speech/empty.flac').write_bytes(b'')
    save(folder/'speech/click.wav', torch.ones(800), RATE)
    report = build_pairs(folder/'speech', folder/'pairs', bit_rates=[32, 16, 16])
    assert [(p.id, p.bit_rate) for p in report.pairs] == [(f'{k}', b) for k in range(3) for b in (16, 32)]
    assert len(report.skipped) == 3 and all(reason.count('\n') == 0 for _, reason in report.skipped)
    assert '50 ms' in dict(report.skipped)[str(folder/'speech/click.wav')]
    with pytest.raises(SpeechLossError, match='none of 1 sources'):
        build_pairs({'a': folder/'speech/text.wav'}, folder/'other')
    with pytest.raises(SpeechLossError, match='not a folder'): build_pairs(folder/'nowhere', folder/'other')
    with pytest.raises(SpeechLossError, match='bit_rates is empty'):
        build_pairs(folder/'speech', folder/'x', bit_rates=[])


def test_loud_sources_and_other_rates(tmp_path, speech):
    loud = 2 * speech[0].numpy() / speech[0].abs().max().item()
    soundfile.write(tmp_path/'loud.wav', np.stack([loud, loud], 1), RATE, subtype='FLOAT')
    save(tmp_path/'rate.wav', speech[1], 22_050)
    build_pairs({'loud': tmp_path/'loud.wav', 'rate': tmp_path/'rate.wav'}, tmp_path/'pairs', bit_rates=[64])
    assert source_wave(tmp_path/'loud.wav', RATE).abs().max() <= 1
    data = CodecPairs(tmp_path/'pairs', seconds=3.)
    for k in range(len(data.pairs)):
        clean, coded = data.read(k)
        assert lags(coded, clean)[0] == 0 and len(clean) == data.pairs[k].samples


BUILD = '''
import sys
from speechloss.corpora import build_pairs
build_pairs(sys.argv[1], sys.argv[2], bit_rates=(16, 24, 32, 48), progress=lambda label, *x: print(*x, flush=True))
'''


def test_killed_and_started_again(folder):
    "No half-written file at any time; what was coded stays; the end is that of an undisturbed build"
    for k in range(3, 12): save(folder/f'speech/{k:02}.wav', torch.randn(6 * RATE) * .1, RATE)
    whole = build_pairs(folder/'speech', folder/'whole', bit_rates=(16, 24, 32, 48))
    killed = subprocess.Popen([sys.executable, '-c', BUILD, folder/'speech', folder/'pairs'],
                              stdout=subprocess.PIPE, text=True)
    for _ in range(3): assert killed.stdout.readline()
    time.sleep(.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = {p: p.stat().st_mtime_ns for p in (folder/'pairs').rglob('[!.]*.mp3')}
    assert 12 <= len(left) < len(whole.pairs) and not (folder/'pairs/pairs.jsonl').exists()
    sizes = {p.mp3: (folder/'whole'/p.mp3).stat().st_size for p in whole.pairs}
    assert all(p.stat().st_size == sizes[p.relative_to(folder/'pairs').as_posix()] for p in left)
    again = build_pairs(folder/'speech', folder/'pairs', bit_rates=(16, 24, 32, 48))
    assert again == whole and all(p.stat().st_mtime_ns == t for p, t in left.items())


def test_damage_and_change_are_mended(folder):
    first = build_pairs(folder/'speech', folder/'pairs')
    (folder/'pairs'/first.pairs[0].mp3).write_bytes(b'damaged')
    save(folder/'speech/1.wav', torch.randn(2 * RATE) * .1, RATE)
    second = build_pairs(folder/'speech', folder/'pairs')
    assert second.pairs[0] == first.pairs[0] and second.pairs[1].mp3 != first.pairs[1].mp3
    (folder/'pairs/pairs.jsonl').write_text('{"half')
    with pytest.raises(SpeechLossError, match='delete it'): build_pairs(folder/'speech', folder/'pairs')


def test_what_was_listed_before_stays_listed(folder):
    few = build_pairs(folder/'speech', folder/'pairs').pairs
    more = build_pairs(folder/'speech', folder/'pairs', bit_rates=[32]).pairs
    listed = [json.loads(line)['mp3'] for line in (folder/'pairs/pairs.jsonl').read_text().splitlines()]
    assert listed == [p.mp3 for p in (*few, *more)]
    assert {p.bit_rate for p in CodecPairs(folder/'pairs', seconds=1., bit_rates=[32]).pairs} == {32}
    (folder/'speech/1.wav').write_bytes(b'no audio')           # what cannot be coded any more is not listed
    build_pairs(folder/'speech', folder/'pairs')
    left = [json.loads(line) for line in (folder/'pairs/pairs.jsonl').read_text().splitlines()]
    assert sorted((p['id'], p['bit_rate']) for p in left) == [('0', 16), ('0', 32), ('1', 32), ('2', 16), ('2', 32)]


def test_a_file_that_has_changed_since_is_no_pair(folder):
    build_pairs(folder/'speech', folder/'pairs')
    for k in range(3): save(folder/f'speech/{k}.wav', torch.randn(6 * RATE) * .1, RATE)
    with pytest.raises(AudioError, match='is not the file that was coded: build the pairs again'):
        CodecPairs(folder/'pairs', seconds=1.)[0]


def test_a_data_set_goes_to_another_process(folder):
    build_pairs(folder/'speech', folder/'pairs')
    data = CodecPairs(folder/'pairs', seconds=1.)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[3]['coded'], data[3]['coded'])


def test_crops_are_a_function_of_the_seed(folder):
    build_pairs(folder/'speech', folder/'pairs', bit_rates=(16, 48))
    a, b, other = (CodecPairs(folder/'pairs', seconds=1., seed=s) for s in (3, 3, 4))
    for k in 0, 5, 99:
        assert torch.equal(a[k]['coded'], b[k]['coded']) and not torch.equal(a[k]['clean'], other[k]['clean'])
    batch = next(iter(DataLoader(a, batch_size=4, num_workers=1)))
    assert batch['clean'].shape == (4, RATE) and batch['bit_rate'].dtype == torch.int64
    only = CodecPairs(folder/'pairs', seconds=1., ids=['1'], bit_rates=[48])
    assert [(p.id, p.bit_rate) for p in only.pairs] == [('1', 48)]
    with pytest.raises(SpeechLossError, match='has 0 such pairs'): CodecPairs(folder/'pairs', ids=['nobody'])
    rows = [json.loads(line) for line in (folder/'pairs/pairs.jsonl').read_text().splitlines()]
    assert len(rows) == 6 and {'mp3_sha256', 'sha256', 'samples'} <= set(rows[0])
