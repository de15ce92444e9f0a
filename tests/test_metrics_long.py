"""Long recordings: metrics by pieces give what they give of the whole, and their memory hardly grows."""
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import cards as M, composite, distances, packaged
from speechloss.metrics.distances import wave_pieces
from speechloss.signal import stft

RATE = 16_000
BY_PIECES = [name for name in ('seg_snr', 'lsd', 'mcd', 'nmr', 'llr', 'wss', 'stoi', 'estoi')
             if all(map(importlib.util.find_spec, M.METRICS[name].needs))]


def pair(samples: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Noisy and clean `(T,)`: noise of a falling spectrum in the rhythm of syllables"
    rng, time = np.random.default_rng(seed), np.arange(samples) / RATE
    spectrum = np.fft.rfft(rng.standard_normal((2, samples)))
    coloured = np.fft.irfft(spectrum / (1 + np.arange(spectrum.shape[1]) * 2e3 / samples), samples)
    clean, other = .1 * coloured / coloured.std(1, keepdims=True)
    clean *= np.sin(2 * np.pi * 2 * time).clip(.01)
    return clean + .3 * other, clean


def silenced(wave: np.ndarray, start: float, end: float) -> np.ndarray:
    "Digital silence between two parts of its length"
    wave = wave.copy()
    wave[int(start * len(wave)):int(end * len(wave))] = 0
    return wave


@pytest.fixture
def by(monkeypatch):
    "A metric with pieces of so many frames"
    def scored(name, most, *waves):
        for module in (distances, composite, packaged): monkeypatch.setattr(module, 'PIECE_FRAMES', most)
        return M.METRICS[name].function(*waves, RATE)
    return scored


CASES = {f'{n} samples': pair(n) for n in (20_000, 24_319, 32_768, 40_960, 48_127)}
CASES |= {'silence in the clean one': (pair(40_001)[0], silenced(pair(40_001)[1], .2, .7)),
          'silence in both': tuple(silenced(wave, .3, .8) for wave in pair(40_001)),
          'silence at the ends': tuple(silenced(silenced(wave, 0, .2), .9, 1) for wave in pair(40_001)),
          'the same': (pair(30_000)[1],) * 2}


@pytest.mark.parametrize('name', BY_PIECES)
def test_pieces_give_what_the_whole_gives(by, name):
    for case, waves in CASES.items():
        want = by(name, 10 ** 9, *waves)
        for most in (16, 61, 64):
            found = by(name, most, *waves)
            assert found == pytest.approx(want, rel=1e-9, abs=1e-12), (case, most)


@pytest.mark.parametrize('hop', [64, 100, 128, 256])
def test_pieces_are_the_frames_of_the_whole(hop):
    draw = torch.Generator().manual_seed(0)
    for size in (257, 300, 2047, 2048, 2049, 2303, 2304, 2305):
        wave = torch.randn(1, size, generator=draw, dtype=torch.float64)
        for most in (1, 2, 7, 8, 1000):
            parts = [stft(wave[:, samples], 512, hop)[0, frames]
                     for samples, frames in wave_pieces(size, 512, hop, most=most)]
            assert all(len(part) <= most for part in parts)
            torch.testing.assert_close(torch.cat(parts), stft(wave, 512, hop)[0], rtol=0, atol=1e-12)


# ---- STOI is that of pystoi

@pytest.mark.parametrize('extended', [False, True])
def test_stoi_is_that_of_its_package(extended):
    package = pytest.importorskip('pystoi')
    name = 'estoi' if extended else 'stoi'
    for seed, samples in enumerate((20_000, 25_601, 33_333, 160_000)):
        noisy, clean = pair(samples, seed=seed)
        want = package.stoi(clean, noisy, RATE, extended=extended)
        assert M.METRICS[name].function(noisy, clean, RATE) == pytest.approx(want, rel=1e-9), samples
    with pytest.raises(SpeechLossError, match='needs 0.4 s'): M.METRICS[name].function(noisy[:100], clean[:100], RATE)


def test_estoi_counts_digital_silence_as_nothing():
    "`pystoi` correlates it with noise that it draws: its mean is ours"
    package = pytest.importorskip('pystoi')
    noisy, clean = pair(32_000)
    noisy = silenced(noisy, .2, .8)
    ours = M.estoi(noisy, clean, RATE)
    drawn = np.array([package.stoi(clean, noisy, RATE, extended=True) for _ in range(30)])
    assert drawn.std() > 1e-6 and M.estoi(noisy, clean, RATE) == ours
    assert abs(drawn.mean() - ours) < 4 * drawn.std() / 30 ** .5


# ---- what a package cannot do

@pytest.mark.parametrize('on, off, seconds', [(.25, .25, 40), (.5, 1., 90)])
def test_pesq_of_many_utterances_does_not_end_its_process(on, off, seconds):
    "The package has room for 50 utterances and does not check; in pieces of fewer it gives what each alone has"
    script = f"""
import numpy as np
from speechloss.metrics.packaged import pesq_row
from speechloss.metrics.utterances import utterance_count, utterance_pieces
rng, rate = np.random.default_rng(0), 16000
burst = lambda: np.r_[rng.standard_normal(round({on} * rate)) * .1, np.zeros(round({off} * rate))]
clean = np.concatenate([burst() for _ in range(round({seconds} / {on + off}))])
enhanced = clean + .01 * rng.standard_normal(len(clean))
assert utterance_count(clean, rate) > 50, utterance_count(clean, rate)
pieces = utterance_pieces(clean, rate)
row = pesq_row(enhanced, clean, rate)
alone = [pesq_row(enhanced[p], clean[p], rate) for p in pieces]
assert row['pesq_pieces'] == len(pieces) > 1 and all(one['pesq_pieces'] == 1 for one in alone)
mean = np.average([one['pesq'] for one in alone], weights=[p.stop - p.start for p in pieces])
assert abs(row['pesq'] - mean) < 1e-6
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:] or done.returncode


def test_short_recordings_have_the_score_of_the_package():
    pesq = pytest.importorskip('pesq')
    enhanced, clean = pair(20 * RATE)
    assert M.pesq_row(enhanced, clean, RATE) == dict(pesq=pesq.pesq(RATE, clean, enhanced, 'wb'), pesq_pieces=1)
    values, reasons = M.score_one(*pair(61 * RATE), ['pesq', 'composite'])
    assert not reasons and 'pesq_pieces' not in values


# ---- memory

GROWTH = """
import resource, sys
import numpy as np
from speechloss.metrics import score_one
wave = np.random.default_rng(0).standard_normal(240 * 16_000).astype('float32') / 10
wave *= np.sin(np.arange(len(wave)) / 2500) ** 2
peaks = []
for seconds in (2, 60, 240):
    part = wave[:seconds * 16_000]
    values, reasons = score_one(part + part[::-1] / 3, part, sys.argv[1])
    assert not reasons, reasons
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss has another unit')
@pytest.mark.parametrize('name', ['si_sdr', 'wave_snr', *BY_PIECES, 'vqscore', 'dnsmos_fast'])
def test_memory_hardly_grows(name):
    "Three minutes more cost the waves themselves a few times over (23 MB each in float64), not their spectra"
    if not all(map(importlib.util.find_spec, M.METRICS[name].needs)): pytest.skip(f'{name} needs a package')
    run = subprocess.run([sys.executable, '-c', GROWTH, name], capture_output=True, text=True,
                         env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr
    small, minute, four = (int(kb) / 1024 for kb in run.stdout.split())
    assert four - minute < 200, f'{four - minute:.0f} MB more'
    assert four - small < 300, f'{four - small:.0f} MB more'


def test_visqol_of_a_long_recording_is_a_mean_of_pieces(monkeypatch):
    "What a piece is worth is made up, as the package takes minutes: up to a minute there is one, then of half a minute"
    lengths = []
    monkeypatch.setattr(packaged, '_visqol_of_piece', lambda e, c: lengths.append(len(c) / 48_000) or len(lengths))
    for seconds, most in ((50, 50), (100, 30)):
        lengths.clear()
        row = packaged.visqol_row(*pair(seconds * RATE), RATE)
        assert row['visqol_pieces'] == len(lengths) and max(lengths) <= most and abs(sum(lengths) - seconds) < 1e-3
        assert row['visqol'] == pytest.approx(np.average(np.arange(len(lengths)) + 1, weights=lengths))
    assert len(lengths) >= 4
