"""Files at the border: every rate, layout and kind of damage; levels against closed forms."""
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings, strategies as st

from speechloss.common.errors import AudioError, SpeechLossError
from speechloss.common.files import home
from speechloss.common.libraries import optional
from speechloss.signal import load, resample, save, scan, active_level, mix, rms_db, set_level
from speechloss.signal.levels import active_speech

RATE = 16000


def noise(seconds, seed=0, rate=RATE):
    return torch.randn(int(seconds * rate), generator=torch.Generator().manual_seed(seed)) * .1


def one_sentence(error, *parts):
    text = str(error.value)
    assert '\n' not in text and all(p in text for p in parts), text


# Files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['.wav', '.flac', '.ogg', '.mp3'])
@pytest.mark.parametrize('rate', [8000, 16000, 44100])
def test_round_trip(tmp_path, suffix, rate):
    x = noise(1., rate=rate)
    y, got = load(save(tmp_path / f'a{suffix}', x, rate))
    assert got == rate and abs(len(y) - len(x)) < .2 * rate  # lossy coders pad
    if suffix in ('.wav', '.flac'): assert (x - y).abs().max() <= 2**-15


def test_stereo_becomes_the_mean(tmp_path):
    left, right = noise(.5), noise(.5, 1)
    save(tmp_path / 's.wav', torch.stack([left, right]), RATE, subtype='FLOAT')
    assert load(tmp_path / 's.wav')[0].allclose((left + right) / 2, atol=1e-7)
    assert load(tmp_path / 's.wav', mono=False)[0].shape == (2, 8000)
    assert load(tmp_path / 's.wav', sample_rate=8000, mono=False)[0].shape == (2, 4000)


def test_every_truncation_of_a_flac_is_refused(tmp_path):
    whole = save(tmp_path / 'a.flac', noise(2.), RATE).read_bytes()
    for share in (0., .0005, .01, .3, .7, .999):
        (tmp_path / 'cut.flac').write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(AudioError) as e: load(tmp_path / 'cut.flac')
        one_sentence(e, 'cut.flac')


def test_truncated_wav_is_refused(tmp_path):
    """libsndfile reads what is there; its log says that the header promised more."""
    whole = save(tmp_path / 'a.wav', noise(1.), RATE).read_bytes()
    for size in (20, 1000, 16000, len(whole) - 100):
        (tmp_path / 'cut.wav').write_bytes(whole[:size])
        with pytest.raises(AudioError) as e: load(tmp_path / 'cut.wav')
        one_sentence(e, 'cut.wav')


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_values_that_are_not_finite(tmp_path, value):
    x = noise(.1)
    x[100] = value
    soundfile.write(tmp_path / 'a.wav', x.numpy(), RATE, subtype='FLOAT')
    with pytest.raises(AudioError) as e: load(tmp_path / 'a.wav')
    one_sentence(e, 'NaN', 'a.wav')
    with pytest.raises(AudioError) as e: save(tmp_path / 'b.wav', x, RATE)
    assert not (tmp_path / 'b.wav').exists()


def test_zero_length_text_and_missing(tmp_path):
    soundfile.write(tmp_path / 'none.wav', np.zeros(0, np.float32), RATE)
    (tmp_path / 'text.flac').write_text('not audio')
    for name, part in (('none.wav', 'no samples'), ('text.flac', 'cannot be read'),
                       ('gone.wav', 'not a file')):
        with pytest.raises(AudioError) as e: load(tmp_path / name)
        one_sentence(e, name, part)
    with pytest.raises(AudioError): load(save(tmp_path / 'a.wav', noise(.1), RATE), start=1600)


def test_save_refuses(tmp_path):
    for wave, path, part in ((torch.zeros(0), 'a.wav', 'shape'), (torch.zeros(2, 2, 2), 'a.wav', 'shape'),
                             (noise(.1), 'a.doc', 'format')):
        with pytest.raises(AudioError) as e: save(tmp_path / path, wave, RATE)
        one_sentence(e, part)
    (tmp_path / 'file').write_text('')
    with pytest.raises((AudioError, OSError)): save(tmp_path / 'file' / 'a.wav', noise(.1), RATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file']


def test_save_keeps_the_old_file_on_failure(tmp_path):
    path = save(tmp_path / 'a.wav', noise(.1), RATE)
    before = path.read_bytes()
    with pytest.raises(AudioError): save(path, noise(.1), RATE, subtype='NO_SUCH')
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
def test_a_kill_leaves_no_half_written_file(tmp_path):
    code = ('import torch; from speechloss.signal.audio import save\n'
            'print("go", flush=True)\n'
            f'for i in range(10**6): save(r"{tmp_path}/a.flac", torch.rand(160000), 16000)')
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    p.stdout.readline()
    time.sleep(.5)
    p.send_signal(signal.SIGKILL)
    p.wait()
    if (tmp_path / 'a.flac').exists(): assert len(load(tmp_path / 'a.flac')[0]) == 160000


def test_scan(tmp_path):
    for name in ('b/x.wav', 'a/y.flac', 'a/.hidden.wav', 'a/notes.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in scan(tmp_path)] == ['y.flac', 'x.wav']
    (tmp_path / 'empty').mkdir()
    for folder in ('empty', 'missing'):
        with pytest.raises(AudioError) as e: scan(tmp_path / folder)
        one_sentence(e, folder)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv('SPEECHLOSS_HOME', str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv('SPEECHLOSS_HOME')
    assert home().name == 'speechloss' and issubclass(AudioError, SpeechLossError)


# Rates ---------------------------------------------------------------------------------------

@given(st.integers(1, 3000), st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]),
       st.sampled_from([8000, 16000, 48000]))
@settings(max_examples=40, deadline=None)
def test_resampled_length(frames, orig, new):
    assert len(resample(torch.ones(frames), orig, new)) == round(frames * new / orig)


def test_resample_is_linear_and_keeps_what_fits():
    x, y = noise(1., 1), noise(1., 2)
    both = resample(x + 2 * y, RATE, 8000)
    assert both.allclose(resample(x, RATE, 8000) + 2 * resample(y, RATE, 8000), atol=1e-5)
    t = torch.arange(RATE) / RATE
    low = sum(torch.sin(2 * math.pi * f * t) for f in (90., 440., 3000.)) / 3
    back = resample(resample(low, RATE, 8000), 8000, RATE)
    assert back[500:-500].allclose(low[500:-500], atol=1e-3)
    assert resample(x, RATE, RATE) is x
    with pytest.raises(AudioError): resample(x, 0, RATE)


# Levels --------------------------------------------------------------------------------------

def on_off(on, off, times, amplitude=.25):
    """A 500 Hz tone, on and off in turn."""
    t = torch.arange(int(on * RATE)) / RATE
    tone = amplitude * torch.sin(2 * math.pi * 500 * t)
    return torch.cat([tone, torch.zeros(int(off * RATE))] * times)


@pytest.mark.parametrize('on,off', [(2., 2.), (3., 1.), (1., 3.), (4., 12.)])
def test_active_level_of_a_gated_tone(on, off):
    """Active time is `on` plus the hangover and what the smoothing takes to fall: about 0.3 s."""
    x = on_off(on, off, 4)
    level, factor = active_speech(x, RATE)
    full = 20 * math.log10(.25 / math.sqrt(2))
    expected = full - 10 * math.log10((on + .3) / on)
    assert abs(level - expected) < .25, (level, expected)
    assert abs(factor - (on + .3) / (on + off)) < .04
    power = 10**(level / 10) * factor                  # the two are one energy, divided twice
    assert abs(10 * math.log10(power) - rms_db(x)) < 1e-6


def test_active_level_ignores_silence_around():
    x = on_off(1., .5, 4)
    padded = torch.cat([torch.zeros(5 * RATE), x, torch.zeros(20 * RATE)])
    assert abs(active_level(padded, RATE) - active_level(x, RATE)) < .2
    assert rms_db(padded) < rms_db(x) - 7


@given(st.floats(-60, 20))
@settings(max_examples=20, deadline=None)
def test_active_level_follows_a_gain(gain):
    x = on_off(.7, .6, 3) + noise(3.9) * .01
    moved = active_level(x * 10**(gain / 20), RATE) - active_level(x, RATE)
    assert abs(moved - gain) < .15


@pytest.mark.parametrize('rate', [8000, 16000, 48000])
def test_active_level_at_any_rate(rate):
    x = on_off(1., 1., 4)
    assert abs(active_level(resample(x, RATE, rate), rate) - active_level(x, RATE)) < .1


def test_silence_has_no_level():
    z = torch.zeros(1000)
    assert rms_db(z) == active_level(z, RATE) == -math.inf and active_speech(z, RATE)[1] == 0
    for call in (lambda: set_level(z, -20), lambda: mix(z, noise(1000 / RATE), 0),
                 lambda: mix(noise(1000 / RATE), z, 0)):
        with pytest.raises(AudioError) as e: call()
        one_sentence(e, 'silent')
    with pytest.raises(AudioError) as e: set_level(noise(.1), -20, level='loud')
    one_sentence(e, "'loud'")


# Mixtures ------------------------------------------------------------------------------------

@given(st.floats(-20, 40), st.integers(200, 5000), st.floats(1e-4, 1))
@settings(max_examples=40, deadline=None)
def test_snr_is_exact(snr, frames, loudness):
    clean, other = noise(frames / RATE, 1), noise(frames / RATE, 2) * loudness
    noisy, scaled = mix(clean, other, snr)
    assert abs(rms_db(clean) - rms_db(scaled) - snr) < 1e-4
    assert noisy.equal(clean + scaled)


def test_snr_on_active_speech():
    clean = on_off(1., 3., 2)
    scaled = mix(clean, noise(8.), 5., level='active')[1]
    assert abs(active_level(clean, RATE) - rms_db(scaled) - 5) < 1e-4
    assert rms_db(clean) - rms_db(scaled) < 1           # pauses hide from the plain level


def test_mix_refuses_unequal_lengths():
    with pytest.raises(AudioError) as e: mix(noise(.1), noise(.2), 0)
    one_sentence(e, '(1600,)', '(3200,)')


def test_import_is_light():
    code = ('import torch, sys, time; t = time.process_time(); import speechloss.signal.audio, '
            'speechloss.corpora.corpus, speechloss.corpora.mixing; print(time.process_time() - t); '
            'assert not {"soxr", "scipy", "pyroomacoustics"} & set(sys.modules)')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    assert float(r.stdout) < 1.


def test_a_missing_package_names_its_cure():
    assert optional('math', 'nobody', 'metrics').pi > 3
    with pytest.raises(SpeechLossError, match=r"the moon needs nowhere: pip install '\.\[codec\]'"):
        optional('nowhere.at_all', 'the moon', 'codec')
