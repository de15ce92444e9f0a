"""One wave through every container and coding: the same samples, the same length, or one sentence."""
import shutil
import struct
import subprocess
import sys

import lameenc
import numpy as np
import pytest
import soundfile
import torch

from speechloss.common.errors import AudioError
from speechloss.models.blockwise import enhance_file
from speechloss.signal import info, load, save, scan
from speechloss.signal.opening import SUFFIXES, UNREAD_SUFFIXES, coding_for, container_of

RATE, SIZE = 16000, 9600
WAVE = (np.sin(np.arange(SIZE) * .05) * .3 + np.sin(np.arange(SIZE) * .31) * .1).astype(np.float32)

#: Largest error of a sample; a coding that is not here is lossless beyond 16 bit
STEPS = {'PCM_S8': 2**-7, 'PCM_U8': 2**-7, 'DPCM_8': 2**-7, 'PCM_16': 2**-15, 'DPCM_16': 2**-15, 'DWVW_16': 2**-15,
         'ALAC_16': 2**-15, 'ULAW': .01, 'ALAW': .01, 'MS_ADPCM': .03, 'MPEG_LAYER_III': .03, 'VORBIS': .05}
#: Codings that answer late or coarsely: their samples are held against libsndfile's own decoding alone
COARSE = ('IMA_ADPCM', 'GSM610', 'G721_32', 'G723_24', 'G723_40', 'NMS_ADPCM_16', 'NMS_ADPCM_24', 'NMS_ADPCM_32',
          'OPUS')
#: Containers of one file alone that nobody reads without being told the rate, and one whose second file is lost
HEADERLESS = ('RAW', 'SD2')
#: Of these a cut one looks like a shorter one: nothing in the file says how long it was
BOTTOMLESS = ('AVR', 'IRCAM', 'MAT4', 'MAT5', 'MPC2K', 'PAF', 'PVF', 'SDS', 'VOC', 'WVE', 'XI')

#: Of containers that hold one rate alone; that of VOC is rounded
OWN_RATES = {'WVE': 8000, 'XI': 44100}

ALL = [(container, coding) for container in soundfile.available_formats() if container not in HEADERLESS
       for coding in soundfile.available_subtypes(container)]


def written(folder, container, coding):
    path = folder / f'a.{container.lower()}'
    try: soundfile.write(path, WAVE, RATE, subtype=coding, format=container)
    except soundfile.SoundFileError: pytest.skip('libsndfile reads this and does not write it')
    return path


@pytest.mark.parametrize('container, coding', ALL, ids=map('-'.join, ALL))
def test_every_coding(tmp_path, container, coding):
    path = written(tmp_path, container, coding)
    wave, rate = load(path)
    assert rate == OWN_RATES.get(container, rate if container == 'VOC' else RATE) and len(wave) == info(path).frames
    # codings made of blocks fill up the last one
    assert len(wave) == SIZE or coding.endswith('ADPCM') and SIZE < len(wave) < SIZE + 1100 or \
        container == 'VOC' and len(wave) == SIZE + 1
    error = np.abs(wave.numpy()[:SIZE] - WAVE).max()
    if coding in COARSE: assert error < 1. and np.corrcoef(wave.numpy()[:SIZE], WAVE)[0, 1] > .8
    else: assert error <= STEPS.get(coding, 2**-12) + 1e-6, error
    part = load(path, start=3001, frames=4000)[0]
    assert len(part) == 4000 and (coding in COARSE or np.abs(part.numpy() - wave.numpy()[3001:7001]).max() < 2e-6)


@pytest.mark.parametrize('container, coding', ALL, ids=map('-'.join, ALL))
def test_every_cut(tmp_path, container, coding):
    path = written(tmp_path, container, coding)
    whole = path.read_bytes()
    for share in (.95, .6, .3, .02):
        path.write_bytes(whole[:int(len(whole) * share)])
        try: wave = load(path)[0]
        except AudioError as error: assert str(path) in str(error) and '\n' not in str(error)
        else: assert container in BOTTOMLESS and len(wave) <= SIZE


@pytest.mark.parametrize('suffix', [s for s in SUFFIXES if s not in ('.mp1', '.mp2')])
def test_every_suffix_is_written_and_found(tmp_path, suffix):
    rate = 8000 if suffix == '.wve' else RATE
    path = save(tmp_path / f'a{suffix}', torch.from_numpy(WAVE), rate)
    assert scan(tmp_path) == [path] and abs(load(path)[0].shape[-1] - SIZE) <= 1
    assert container_of(path)[0] in soundfile.available_formats()


def test_sound_that_is_not_read_is_named(tmp_path):
    for suffix in UNREAD_SUFFIXES:
        (tmp_path / f'a{suffix}').write_bytes(bytes(100))
        with pytest.raises(AudioError) as caught: load(tmp_path / f'a{suffix}')
        assert f'a{suffix}' in str(caught.value) and '\n' not in str(caught.value)
    assert len(scan(tmp_path, unread=True)) == len(UNREAD_SUFFIXES)
    with pytest.raises(AudioError, match='no audio'): scan(tmp_path)


# Headers that do not know ---------------------------------------------------------------------

def mp3(seconds=6., rate=16000, bit_rate=64):
    coder = lameenc.Encoder()
    for option, value in dict(channels=1, in_sample_rate=rate, bit_rate=bit_rate, quality=7).items():
        getattr(coder, f'set_{option}')(value)
    coder.silence()
    wave = np.sin(np.arange(int(seconds * rate)) * .118) * 8000
    return bytes(coder.encode(wave.astype(np.int16).tobytes())) + bytes(coder.flush())


def id3(size):
    head = b'ID3\x03\0\0' + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    return head + bytes(range(1, 201)) * (size // 200)


@pytest.mark.parametrize('tags', [b'', id3(200_000), id3(400) + id3(10_000)], ids=['none', 'one', 'two'])
def test_an_mp3_with_tags(tmp_path, tags):
    (tmp_path / 'a.mp3').write_bytes(tags + mp3())
    wave = load(tmp_path / 'a.mp3')[0]
    assert len(wave) == info(tmp_path / 'a.mp3').frames == 97344
    for start in (1, 30001, 90000):
        part = load(tmp_path / 'a.mp3', start=start, frames=5000)[0]
        assert np.abs(part - wave[start:start + 5000]).max() < 1e-6


def test_an_mp3_that_ends_within_a_frame(tmp_path):
    (tmp_path / 'a.mp3').write_bytes(mp3()[:-300])
    assert 95000 < len(load(tmp_path / 'a.mp3')[0]) == info(tmp_path / 'a.mp3').frames < 97344


def flac_stream(folder):
    soundfile.write(folder / 'a.flac', WAVE, RATE)
    data = bytearray((folder / 'a.flac').read_bytes())
    data[21] &= 0xf0
    data[22:26] = bytes(4)
    (folder / 'a.flac').write_bytes(data)
    return folder / 'a.flac'


def test_a_flac_of_unknown_length(tmp_path):
    path = flac_stream(tmp_path)
    assert info(path).frames == SIZE and np.abs(load(path)[0].numpy() - WAVE).max() <= 2**-15
    assert np.array_equal(load(path, start=5000, frames=100)[0], load(path)[0][5000:5100])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AudioError) as caught: load(path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('riff, data', [(0, 0), (2**32 - 1, 2**32 - 1), (2**32 - 1, 0), (0, 2**31 - 1),
                                        (0x7ffff024, 0x7ffff000)])
def test_a_wav_that_was_never_finished(tmp_path, riff, data):
    soundfile.write(tmp_path / 'a.wav', WAVE, RATE, subtype='PCM_16')
    raw = bytearray((tmp_path / 'a.wav').read_bytes())
    raw[4:8], raw[40:44] = riff.to_bytes(4, 'little'), data.to_bytes(4, 'little')
    (tmp_path / 'a.wav').write_bytes(raw)
    assert info(tmp_path / 'a.wav').frames == len(load(tmp_path / 'a.wav')[0]) == SIZE


@pytest.mark.parametrize('coding', ['PCM_U8', 'PCM_16', 'PCM_24', 'PCM_32', 'FLOAT', 'DOUBLE'])
def test_a_wav_of_the_other_byte_order(tmp_path, coding):
    """Its bytes are written here: RIFX, sizes and samples from the most significant byte on."""
    bits = dict(PCM_U8=8, FLOAT=32, DOUBLE=64).get(coding) or int(coding[4:])
    if coding in ('FLOAT', 'DOUBLE'): data = WAVE.astype(f'>f{bits // 8}').tobytes()
    else:
        numbers = np.round(WAVE.astype(float) * (2**(bits - 1) - 1)).astype(int) + (128 if bits == 8 else 0)
        data = b''.join(int(v).to_bytes(bits // 8, 'big', signed=bits > 8) for v in numbers)
    form = struct.pack('>HHIIHH', 1 if coding.startswith('PCM') else 3, 1, RATE, RATE * bits // 8, bits // 8, bits)
    body = b'WAVEfmt ' + struct.pack('>I', len(form)) + form + b'data'
    raw = b'RIFX' + struct.pack('>I', len(body) + 4 + len(data)) + body + struct.pack('>I', len(data)) + data
    path = tmp_path / 'a.wav'
    path.write_bytes(raw)
    wave, rate = load(path)
    assert (rate, info(path).subtype, len(wave)) == (RATE, coding, SIZE)
    assert np.abs(wave.numpy() - WAVE).max() <= (2**-6 if bits == 8 else 2**-14 if bits == 16 else 1e-6)
    path.write_bytes(raw[:4] + bytes(4) + body + bytes(4) + data)          # never finished
    assert np.array_equal(load(path)[0], wave)
    path.write_bytes(raw[:-1000])
    with pytest.raises(AudioError, match='is cut short'): load(path)


@pytest.mark.parametrize('suffix, name, place, width', [
    ('.au', b'.snd', 8, 4), ('.caf', b'data', 4, 8), ('.w64', b'data', 16, 8), ('.aiff', b'SSND', 4, 4)])
def test_other_files_that_were_never_finished(tmp_path, suffix, name, place, width):
    path = tmp_path / f'a{suffix}'
    soundfile.write(path, WAVE, RATE, subtype='PCM_16')
    whole, raw = load(path)[0], path.read_bytes()
    at = raw.index(name) + place
    for size in (bytes(width), b'\xff' * width):
        path.write_bytes(raw[:at] + size + raw[at + width:])
        assert np.array_equal(load(path)[0], whole) and info(path).frames == SIZE
    soundfile.write(path, np.zeros(0), RATE, subtype='PCM_16')
    with pytest.raises(AudioError): load(path)


def test_an_empty_wav_stays_empty(tmp_path):
    soundfile.write(tmp_path / 'a.wav', np.zeros(0), RATE)
    raw = (tmp_path / 'a.wav').read_bytes()
    for more in (b'', b'LIST\x04\0\0\0INFO'):
        (tmp_path / 'a.wav').write_bytes(raw + more)
        with pytest.raises(AudioError, match='no samples'): load(tmp_path / 'a.wav')


# Written --------------------------------------------------------------------------------------

@pytest.mark.parametrize('coding', ['IMA_ADPCM', 'MS_ADPCM', 'GSM610', 'PCM_24', 'FLOAT', 'ULAW'])
def test_an_enhanced_file_is_as_long_as_its_source(tmp_path, coding):


    class Same(torch.nn.Module):
        sample_rate = RATE
        def forward(self, wave): return wave

    soundfile.write(tmp_path / 'a.wav', WAVE, RATE, subtype=coding)
    made = enhance_file(Same(), tmp_path / 'a.wav', tmp_path / 'b.wav')
    assert info(made).frames == info(tmp_path / 'a.wav').frames
    assert info(made).subtype == (coding if coding in ('PCM_24', 'FLOAT', 'ULAW') else 'PCM_16')


def test_codings_of_targets():
    assert coding_for('a.wav', 'MPEG_LAYER_III') == 'PCM_16' and coding_for('a.mp3', 'PCM_24') is None
    assert coding_for('a.flac', 'PCM_24') == 'PCM_24' and coding_for('a.opus', 'PCM_16') == 'OPUS'
    with pytest.raises(AudioError, match='no audio format'): container_of('a.mp2')


@pytest.mark.parametrize('name', ['a' * 250, '日' * 82, 'x' * 251])
def test_names_as_long_as_a_file_system_takes(tmp_path, name):

    path = save(tmp_path / f'{name}.wav', torch.from_numpy(WAVE), RATE)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and load(path)[1] == RATE


# What ffmpeg makes ------------------------------------------------------------------------------

FFMPEG = [('mp3', '-q:a 2'), ('mp3', '-q:a 2 -write_xing 0'), ('mp3', '-b:a 64k -write_xing 0 -id3v2_version 0'),
          ('flac', ''), ('ogg', '-c:a libvorbis'), ('opus', '-c:a libopus'), ('wav', '-c:a adpcm_ima_wav'),
          ('wav', '-c:a adpcm_ms'), ('wav', '-c:a pcm_alaw'), ('wav', '-c:a pcm_f32le'), ('wav', '-rf64 always'),
          ('wav', '-c:a libmp3lame'), ('aiff', ''), ('au', ''), ('caf', ''), ('w64', ''), ('mp2', '')]


def decoded(path, rate):
    command = ['ffmpeg', '-v', 'error', '-i', path, '-f', 'f32le', '-ac', '1', '-ar', str(rate), '-']
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, 'f4')


@pytest.mark.skipif(shutil.which('ffmpeg') is None, reason='needs ffmpeg')
@pytest.mark.parametrize('piped', [False, True], ids=['file', 'pipe'])
@pytest.mark.parametrize('suffix, options', FFMPEG, ids=[f'{s} {o}'.strip() for s, o in FFMPEG])
def test_what_ffmpeg_makes(tmp_path, suffix, options, piped):
    # loud, then quiet: by its first frames an MP3 without a count looks a third as long
    wave = np.concatenate([np.random.default_rng(0).standard_normal(RATE // 2) * .2, np.zeros(RATE)])
    soundfile.write(tmp_path / 'source.wav', wave, RATE)
    target = tmp_path / f'made.{suffix}'
    command = ['ffmpeg', '-v', 'error', '-y', '-i', tmp_path / 'source.wav', *options.split()]
    if piped:
        container = {'opus': 'ogg', 'aiff': 'aiff'}.get(suffix, suffix)
        made = subprocess.run([*command, '-f', container, '-'], capture_output=True)
        target.write_bytes(made.stdout)
    else: made = subprocess.run([*command, target], capture_output=True)
    if made.returncode: pytest.skip(made.stderr.decode()[-100:])
    try: found, rate = load(target)
    except AudioError as error:
        assert str(target) in str(error) and '\n' not in str(error)
        assert piped and suffix == 'caf'
        return
    assert len(found) == info(target).frames
    try: right = decoded(target, rate)
    except subprocess.CalledProcessError: right = ()
    if not len(right):                   # it cannot read what it has made
        assert piped and len(found) == len(wave)
        return
    if suffix in ('opus', 'ogg'):        # decoders differ in how they begin and end
        assert abs(len(found) - len(right)) < 1000
        return
    assert len(found) == len(right)
    assert np.abs(found.numpy() - right).max() < (2e-3 if 'ima' in options else 1e-4)


def test_minutes_of_vorbis_end_no_process(tmp_path):
    """Given them at once, libsndfile writes beyond its stack; in a process of its own, for the sake of the others."""
    code = ("import sys, torch; from speechloss.signal.audio import info, save\n"
            "print(info(save(sys.argv[1], torch.zeros(300 * 16000), 16000)).frames)")
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'a.ogg'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == '4800000', done.stderr


def test_the_cure_of_sound_that_is_not_read_is_a_command(tmp_path):
    (tmp_path / 'a.m4a').write_bytes(b'\0\0\0\x20ftypM4A ' + bytes(100))
    with pytest.raises(AudioError, match='convert it, such as by ffmpeg -i a.m4a a.wav'): load(tmp_path / 'a.m4a')
