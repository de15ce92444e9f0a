"""Metrics against their packages, against other definitions, and on what cannot be scored."""
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import cards as M, composite, packaged as listeners
from speechloss.metrics.composite import composite_ratings, llr, seg_snr, wss
from speechloss.signal import resample

pytest.importorskip('pesq')
RATE = 16_000


def is_there(name: str) -> bool:
    "Whether a metric has its packages and its weights"
    try: return bool(M.metric_cards(name))
    except SpeechLossError: return False


THERE = [name for name in M.METRICS if is_there(name)]
NAMES = [n for n in THERE if M.METRICS[n].reference]


def speech_like(seconds=2., seed=0):
    "Pulses through moving formants, four syllables a second"
    from scipy.signal import lfilter
    rng, out, n = np.random.default_rng(seed), [], RATE // 4
    for _ in range(round(seconds * 4)):
        x = np.diff(np.floor(np.cumsum(np.linspace(*rng.uniform(100, 180, 2), n)) / RATE), prepend=0)
        x += .01 * rng.standard_normal(n)
        for f, width in zip(rng.uniform([300, 900, 2200], [800, 2000, 3000]), (60, 90, 150)):
            p = np.exp((-width * np.pi + 2j * np.pi * f) / RATE)
            x = lfilter([1], [1, -2 * p.real, abs(p) ** 2], x)
        out.append(x * np.hanning(n) ** .5 / np.abs(x).max() * rng.uniform(.1, .4))
    return np.concatenate(out)


CLEAN = speech_like()
NOISE = sum(speech_like(seed=k) for k in range(1, 7))                  # babble and hiss
NOISE += .05 * NOISE.std() * np.random.default_rng(5).standard_normal(len(CLEAN))
NOISE *= CLEAN.std() / NOISE.std()
NOISY = CLEAN + .4 * NOISE


# ---- every metric

@pytest.mark.parametrize('name', THERE)
def test_a_card_tells_the_truth(name):
    card = M.METRICS[name]
    waves = (NOISY, CLEAN) if card.reference else (NOISY,)
    found = card.function(*waves, RATE)
    found = found if isinstance(found, dict) else {card.columns[0]: found}
    assert tuple(found) == card.columns + card.notes
    assert all(type(v) is float and card.range[0] <= v <= card.range[1] for v in map(found.get, card.columns))
    assert card.function.__doc__ and card.source


@pytest.mark.parametrize('name', NAMES)
def test_tensors_of_any_float_type_and_layout_score_alike(name):
    function = M.METRICS[name].function
    want = function(NOISY, CLEAN, RATE)
    wide = torch.zeros(len(NOISY), 2, dtype=torch.float64)
    wide[:, 0] = torch.from_numpy(NOISY)
    strided = function(wide[:, 0].requires_grad_(), torch.from_numpy(CLEAN)[None], RATE)
    single = function(NOISY.astype('float32'), CLEAN.astype('float32'), RATE)
    for got in (strided, single):
        for key in want if isinstance(want, dict) else ['x']:
            a, b = (want[key], got[key]) if isinstance(want, dict) else (want, got)
            assert math.isclose(a, b, rel_tol=2e-3, abs_tol=1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_more_noise_scores_worse(name):
    card = M.METRICS[name]
    for column in card.columns:
        score = [M.score_one(CLEAN + k * NOISE, CLEAN, name)[0][column] for k in (.05, .2, .8)]
        sign = 1 if card.direction == 'higher' else -1
        assert sign * score[0] > sign * score[1] >= sign * score[2], (column, score)   # 1 is the end


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('case,words', [
    ((NOISY[:-1], CLEAN), 'enhanced has'),
    ((np.stack([NOISY, NOISY]), np.stack([CLEAN, CLEAN])), 'scores one channel'),
    ((NOISY * math.nan, CLEAN), 'NaN'),
    ((0 * NOISY, CLEAN), 'enhanced is silent'),
    ((NOISY, 0 * CLEAN), 'clean is silent'),
    ((NOISY[:0], CLEAN[:0]), 'is empty'),
    (((NOISY * 2 ** 15).astype('int16'), CLEAN), 'int16'),
])
def test_what_cannot_be_scored_is_one_sentence(name, case, words):
    with pytest.raises(SpeechLossError, match=words) as error:
        M.METRICS[name].function(*case, RATE)
    assert '\n' not in str(error.value)
    values, reasons = M.score_one(*case, name)
    assert set(values) == set(reasons) == set(M.METRICS[name].columns)
    assert all(math.isnan(v) for v in values.values())
    with pytest.raises(SpeechLossError, match='sample_rate is'):
        M.METRICS[name].function(NOISY, CLEAN, -16_000)


def test_another_rate_is_resampled():
    up = [resample(torch.from_numpy(w), RATE, 48_000) for w in (NOISY, CLEAN)]
    for name in ('pesq', 'estoi', 'llr', 'mcd'):
        want = M.score_one(NOISY, CLEAN, name)[0][name]
        assert math.isclose(M.score_one(*up, name, 48_000)[0][name], want, rel_tol=.03), name


# ---- against other definitions

def test_packages_are_called_the_right_way_round():
    from pesq import pesq
    from pystoi import stoi
    assert M.pesq_wb(NOISY, CLEAN, RATE) == pytest.approx(pesq(RATE, CLEAN, NOISY, 'wb'))
    assert M.estoi(NOISY, CLEAN, RATE) == pytest.approx(stoi(CLEAN, NOISY, RATE, extended=True))
    assert M.stoi(NOISY, CLEAN, RATE) == pytest.approx(stoi(CLEAN, NOISY, RATE))


def test_snr_and_si_sdr_agree_with_the_losses_of_that_name():
    waveform = pytest.importorskip('speechloss.losses.waveform')
    e, c = torch.from_numpy(NOISY), torch.from_numpy(CLEAN)
    assert M.wave_snr(e, c, RATE) == pytest.approx(float(waveform.snr(e, c)), abs=1e-6)
    assert M.si_sdr(e, c, RATE) == pytest.approx(float(waveform.si_sdr(e, c)), abs=1e-6)
    assert M.si_sdr(c, c, RATE) == pytest.approx(float(waveform.si_sdr(c, c)), abs=1e-3)


def test_visqol_is_that_of_its_package_and_its_mode_for_audio():
    visqol = pytest.importorskip('visqol')
    api = visqol.VisqolApi()
    api.create(mode='audio')
    e, c = (resample(torch.from_numpy(w), RATE, 48_000).numpy() for w in (NOISY, CLEAN))
    want = api.measure_from_arrays(c, e, 48_000).moslqo
    assert M.visqol(NOISY, CLEAN, RATE) == pytest.approx(want, abs=1e-6)
    assert M.visqol(CLEAN, CLEAN, RATE) > 4.7


def test_dnsmos_is_that_of_its_package():
    dnsmos = pytest.importorskip('speechmos.dnsmos')
    wave = np.tile(NOISY, 6)[:int(10.1 * RATE)].astype('float32')            # two windows
    want, got = dnsmos.run(wave, RATE), M.dnsmos(wave, RATE)
    for key in ('ovrl', 'sig', 'bak', 'p808'):
        assert got[f'dnsmos_{key}'] == pytest.approx(float(want[f'{key}_mos']), abs=1e-3)
    assert listeners._dnsmos() is listeners._dnsmos()                                      # loaded once
    loud = M.dnsmos_fast(8 * NOISY / np.abs(NOISY).max(), RATE)
    assert loud == pytest.approx(M.dnsmos_fast(NOISY / np.abs(NOISY).max(), RATE))


@pytest.mark.parametrize('seconds', [.5, 2, 3.3, 4, 7.77, 9.01, 9.5, 10.02, 12, 20.6])
def test_dnsmos_hears_the_windows_of_its_package(seconds):
    size = round(seconds * RATE)
    wave = np.arange(size)
    looped = wave
    while len(looped) < 9.01 * RATE: looped = np.append(looped, looped)
    want = []
    for k in range(int(np.floor(len(looped) / RATE) - 9.01) + 1):
        part = looped[int(k * RATE):int((k + 9.01) * RATE)]
        if len(part) >= int(9.01 * RATE): want.append(part)
    found = listeners._windows(wave, None)
    assert sum(found.values()) == len(want)
    got = [wave.take(range(s, s + listeners.DNSMOS_WINDOW), mode='wrap') for s, n in found.items() for _ in range(n)]
    assert sorted(p[0] for p in got) == sorted(p[0] for p in want)
    assert all(any((p == q).all() for q in got) for p in want)


def test_mcd_by_the_long_way():
    from scipy.fft import dct
    librosa = pytest.importorskip('librosa')
    mel = librosa.filters.mel(sr=RATE, n_fft=512, n_mels=40, dtype=np.float64)
    power = [np.abs(librosa.stft(w, n_fft=512, hop_length=128, pad_mode='reflect')) ** 2
             for w in (NOISY, CLEAN)]
    e, c = (mel @ p for p in power)
    floor = c.max() * 1e-8
    gap = dct(.5 * np.log(np.maximum(e, floor) / np.maximum(c, floor)), axis=0)[1:25] / 40
    want = (10 * 2 ** .5 / math.log(10) * np.sqrt((gap ** 2).sum(0))).mean()
    assert M.mcd(NOISY, CLEAN, RATE) == pytest.approx(want, rel=1e-3)


@settings(max_examples=8, deadline=None)
@given(gain=st.floats(-40, 20), seed=st.integers(0, 99))
def test_what_a_gain_does(gain, seed):
    clean = np.random.default_rng(seed).standard_normal(8000) * .05
    noisy = clean + .3 * np.random.default_rng(seed + 100).standard_normal(8000) * .05
    loud = 10 ** (gain / 20) * noisy
    for metric in (llr, wss, M.mcd, M.si_sdr):
        assert metric(loud, clean, RATE) == pytest.approx(metric(noisy, clean, RATE), abs=1e-6)
    assert M.lsd(10 ** (gain / 20) * clean, clean, RATE) == pytest.approx(abs(gain), rel=1e-3)


REFERENCE = os.environ.get('SPEECHLOSS_REFERENCE_AUDIO')


@pytest.mark.skipif(not REFERENCE, reason='SPEECHLOSS_REFERENCE_AUDIO names no folder')
def test_published_figures():
    """The example recordings of pysepm (1_*.wav) and of the pesq package (speech*.wav), 16 kHz,
    are not ours to ship; with them in one folder, the figures of other implementations."""
    import soundfile
    from pesq import pesq
    read = lambda name: soundfile.read(Path(REFERENCE) / name)[0]
    assert pesq(RATE, read('speech.wav'), read('speech_bab_0dB.wav'), 'nb') == pytest.approx(1.6072081)
    assert M.pesq_wb(read('speech_bab_0dB.wav'), read('speech.wav'), RATE) == pytest.approx(1.0832337)
    e, c = read('1_noisySpeech.wav'), read('1_speech.wav')
    assert seg_snr(e, c, RATE) == pytest.approx(-.217, abs=5e-4)
    assert llr(e, c, RATE, limit=2.) == pytest.approx(1.2531, abs=5e-5)
    assert wss(e, c, RATE) == pytest.approx(44.699, abs=5e-4)
    assert M.stoi(e, c, RATE) == pytest.approx(.8389, abs=5e-5)
    assert M.pesq_wb(e, c, RATE) == pytest.approx(1.1624, abs=5e-5)
    assert [*M.composite(e, c, RATE).values()] == pytest.approx([2.038, 1.863, 1.543], abs=5e-4)
    e = read('1_processed.wav')
    assert M.stoi(e, c, RATE) == pytest.approx(.6612, abs=5e-5)
    assert M.pesq_wb(e, c, RATE) == pytest.approx(1.0595, abs=5e-5)


def test_frames_of_silence_inside_a_clip_are_harmless():
    clean, noisy = CLEAN.copy(), NOISY.copy()
    clean[8000:16_000] = noisy[8000:16_000] = 0
    values, reasons = M.score_one(noisy, clean, NAMES)
    assert not reasons
    same, reasons = M.score_one(clean, clean, NAMES)
    assert not reasons and same['llr'] == same['wss'] == same['lsd'] == 0 and same['seg_snr'] == 35


# ---- score_one

def test_composite_takes_what_is_known(monkeypatch):
    calls = []
    monkeypatch.setitem(composite.COMPOSITE_PARTS, 'pesq', lambda *a: calls.append(a) or 2.)
    values, _ = M.score_one(NOISY, CLEAN, ['pesq', 'llr', 'wss', 'seg_snr', 'composite'])
    assert not calls                                                       # the card's own was used
    assert values['covl'] == composite_ratings(
        **{k: values[k] for k in ('pesq', 'llr', 'wss', 'seg_snr')})['covl']
    M.score_one(NOISY, CLEAN, ['composite'])
    assert len(calls) == 1


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n: None if n == 'pesq' else find(n))
    with pytest.raises(SpeechLossError, match=r"'pesq' needs pesq: pip install '.\[metrics\]' in the clone"):
        M.score_one(NOISY, CLEAN, 'pesq')
    monkeypatch.setitem(sys.modules, 'pesq', None)
    with pytest.raises(SpeechLossError, match='PESQ needs pesq'): M.pesq_wb(NOISY, CLEAN, RATE)
    monkeypatch.setitem(sys.modules, 'visqol', None)
    listeners._visqol.cache_clear()
    with pytest.raises(SpeechLossError, match=r"ViSQOL needs visqol: pip install '.\[visqol\]'"):
        M.visqol(NOISY, CLEAN, RATE)


def test_without_reference_only_dnsmos_answers():
    pytest.importorskip('speechmos')
    values, reasons = M.score_one(NOISY, None, ['pesq', 'dnsmos_fast'])
    assert math.isnan(values['pesq']) and 'none was given' in reasons['pesq']
    assert 1 < values['dnsmos_fast_ovrl'] < 5


def test_a_crash_in_a_metric_is_a_reason(monkeypatch):
    broken = M.Metric('lsd', ('lsd',), lambda *a: 1 / 0, (0, 1), 'lower', '', '')
    monkeypatch.setitem(M.METRICS, 'lsd', broken)
    values, reasons = M.score_one(NOISY, CLEAN, ['lsd', 'mcd'])
    assert math.isnan(values['lsd'])
    assert reasons == {'lsd': 'ZeroDivisionError while scoring: division by zero'}
    assert values['mcd'] > 0


def test_import_is_light():
    heavy = ['pesq', 'pystoi', 'scipy', 'librosa', 'onnxruntime']
    code = f'import sys, speechloss.metrics.scoring; print([m for m in {heavy} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stdout + done.stderr
