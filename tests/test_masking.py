"""The masking threshold against the tables of ISO/IEC 11172-3 and against its steps done one by one."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechloss.common.errors import SpeechLossError
from speechloss.losses import MaskingLoss, WaveL2Loss, build
from speechloss.losses.functional import masking
from speechloss.metrics import score_one, nmr
from speechloss.signal import resample, MaskingModel
from speechloss.signal.masking import (
    bark, noise_offset, quiet_threshold, masking_spread, tone_offset, find_tones)

#: Table D.1 of ISO/IEC 11172-3, layer I at 44.1 kHz: Hz, Bark, dB in quiet
TABLE = np.array([
    (86.13, .850, 25.87), (172.27, 1.694, 14.85), (258.40, 2.525, 10.72), (344.53, 3.337, 8.50),
    (430.66, 4.124, 7.10), (516.80, 4.882, 6.11), (602.93, 5.608, 5.37), (689.06, 6.301, 4.79),
    (1033.59, 8.723, 3.25), (1378.13, 10.629, 2.11), (1722.66, 12.125, .90), (2067.19, 13.317, -.56),
    (2411.72, 14.288, -2.21), (2756.25, 15.100, -3.77), (3100.78, 15.795, -4.78), (3359.18, 16.260, -4.98),
    (3789.84, 16.951, -4.17), (4134.38, 17.447, -2.82), (4823.44, 18.331, -.04), (5512.50, 19.108, 1.51),
    (6546.09, 20.120, 2.63), (7579.69, 20.971, 4.02), (8268.75, 21.457, 5.35), (9991.41, 22.420, 10.54),
    (12058.59, 23.213, 21.64), (14125.78, 23.749, 40.24), (15848.44, 24.070, 63.48), (16537.50, 24.176, 68.),
    (19982.81, 24.573, 68.)])


def test_the_tables_of_the_standard():
    hz, z, quiet = torch.tensor(TABLE.T)
    assert (bark(hz) - z).abs().max() <= 1.01e-3          # printed to the third digit
    assert (quiet_threshold(hz) - quiet).abs().max() <= .011 + .011 * (hz > 15800).max()
    assert quiet_threshold(torch.tensor([0.])).isfinite().all()


@pytest.mark.parametrize('dz,level,expected', [      # D.1, step 6, by hand
    (-3., 60., 17 * -2 - 30.), (-2., 60., 17 * -1 - 30.), (-1., 60., -30.), (-.5, 60., -15.), (0., 60., 0.),
    (.5, 60., -8.5), (1., 60., -17.), (3., 60., -2 * 8 - 17.), (3., 20., -2 * 14 - 17.),
    (-3.1, 60., -math.inf), (8., 60., -math.inf)])
def test_masking_function_by_hand(dz, level, expected):
    assert masking_spread(torch.tensor(dz), torch.tensor(level)).item() == pytest.approx(expected)
    assert tone_offset(10.) == pytest.approx(-8.775) and noise_offset(10.) == pytest.approx(-3.775)


def by_steps(power, rate, n_fft, full_scale=96.):
    "One frame, in loops, as the standard writes it down: dB at each line of the grid"
    hz = np.arange(len(power)) * rate / n_fft
    z = 13 * np.arctan(.76e-3 * hz) + 3.5 * np.arctan((hz / 7500) ** 2)
    f = np.maximum(hz, 20) / 1000
    quiet = np.minimum(3.64 * f ** -.8 - 6.5 * np.exp(-.6 * (f - 3.3) ** 2) + 1e-3 * f ** 4, 68)
    level = 10 * np.log10(np.maximum(power, 1e-30))
    last, found, used = len(power) - 1, [], set()
    for k in range(1, last):
        if not (level[k] > level[k - 1] and level[k] >= level[k + 1]): continue
        reach = 2 if hz[k] < 5426 else 3 if hz[k] < 10939 else 6
        if k - reach < 0 or k + reach > last: continue
        if all(level[k] - max(level[k - j], level[k + j]) >= 7 for j in range(2, reach + 1)):
            found.append((10 * np.log10(power[k - 1:k + 2].sum()) + full_scale, k))
            used |= set(range(k - reach, k + reach + 1))
    maskers = []
    audible = [(x, k) for x, k in found if x >= quiet[k]]
    for x, k in audible:
        if all(x >= other for other, m in audible if abs(z[m] - z[k]) < .5):
            maskers.append((x, z[k], -1.525 - .275 * z[k] - 4.5))
    for b in range(int(z[-1]) + 1):
        lines = [k for k in range(last + 1) if int(z[k]) == b]
        if not lines: continue
        rest = sum(power[k] for k in lines if k not in used)
        middle = np.exp(np.mean(np.log(np.maximum(hz[lines], 1))))
        k = int(np.abs(hz - middle).argmin())
        x = 10 * np.log10(max(rest, 1e-30)) + full_scale
        if x >= quiet[k]: maskers.append((x, z[k], -1.525 - .175 * z[k] - .5))
    total = 10 ** (quiet / 10)
    for x, at, offset in maskers:
        for i in range(last + 1):
            dz = z[i] - at
            if not -3 <= dz < 8: continue
            if dz < -1: v = 17 * (dz + 1) - (.4 * x + 6)
            elif dz < 0: v = (.4 * x + 6) * dz
            elif dz < 1: v = -17 * dz
            else: v = -(dz - 1) * (17 - .15 * x) - 17
            total[i] += 10 ** ((x + offset + v) / 10)
    return 10 * np.log10(total)


def waves(seconds=.25, rate=16_000, seed=0):
    "Harmonics with noise, and pauses"
    draw = torch.Generator().manual_seed(seed)
    t = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    voice = sum(torch.sin(2 * math.pi * 140 * k * t) / k for k in range(1, 30)) * (torch.sin(9 * t) > -.4)
    return .1 * voice + .002 * torch.randn(len(t), generator=draw, dtype=torch.float64)


@pytest.mark.parametrize('rate,n_fft', [(16_000, 512), (44_100, 512), (8_000, 256), (16_000, 320)])
def test_thresholds_are_those_of_the_steps(rate, n_fft):
    model = MaskingModel(rate, n_fft, n_fft // 2)
    power = model.power(waves(rate=rate)[None])
    found = 10 * model.threshold(power)[0].log10() + 96
    for k in range(0, power.shape[1], 5):
        expected = by_steps(power[0, k].numpy(), rate, n_fft)
        np.testing.assert_allclose(found[k, model.grid], expected[model.grid.numpy()], atol=1e-6)


@given(st.integers(0, 10_000))
def test_tones_are_few_and_apart(seed):
    power = torch.rand(3, 257, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    peak, taken = find_tones(power, torch.arange(257) * 31.25)
    assert not (peak & ~taken).any()
    for row in peak: assert (row.nonzero().flatten().diff() > 2).all()


def test_full_scale_and_playing_level():
    tone = torch.sin(2 * math.pi * 1000 / 16_000 * torch.arange(16_000, dtype=torch.float64))[None]
    assert MaskingModel().power(tone)[0, 5:-5].sum(-1).log10().abs().max() < 1e-9
    clean, error = 1e-4 * tone, 1e-5 * torch.randn(1, 16_000, dtype=torch.float64)
    soft, loud = (MaskingLoss(full_scale_db=level)(clean + error, clean) for level in (60., 110.))
    assert soft < loud / 10        # played softly, nothing of it is heard


def test_noise_below_the_threshold_costs_less():
    torch.manual_seed(0)
    clean = waves(1.)[None].float()
    model = MaskingModel()
    hidden = model.threshold(model.power(clean)).sqrt()
    spec = torch.stft(torch.randn(1, 16_000), 512, 256, window=torch.hann_window(512), return_complex=True).mT
    shaped = torch.istft((spec * hidden).mT, 512, 256, window=torch.hann_window(512), length=16_000)
    white = torch.randn_like(clean)
    shaped, white = (.003 * e / e.square().mean().sqrt() for e in (shaped, white))
    assert abs(WaveL2Loss()(clean + shaped, clean) / WaveL2Loss()(clean + white, clean) - 1) < 1e-3
    assert MaskingLoss()(clean + shaped, clean) < .7 * MaskingLoss()(clean + white, clean)
    assert nmr(clean[0] + shaped[0], clean[0], 16_000) < nmr(clean[0] + white[0], clean[0], 16_000) - 5


def test_metric_against_its_formula():
    clean = waves(1.)
    enhanced = clean + .01 * torch.randn(16_000, dtype=torch.float64)
    ratio = MaskingModel().noise_to_mask(enhanced[None], clean[None])[0]
    assert nmr(enhanced, clean, 16_000) == pytest.approx(10 * ratio.mean().log10().item())
    assert nmr(clean, clean, 16_000) == -100.
    up = [resample(w, 16_000, 48_000) for w in (enhanced, clean)]
    assert nmr(*up, 48_000) == pytest.approx(nmr(enhanced, clean, 16_000), abs=.5)    # another rate is resampled
    assert score_one(enhanced, clean, 'nmr')[0]['nmr'] == nmr(enhanced, clean, 16_000)
    with pytest.raises(SpeechLossError, match='silent'): nmr(enhanced, 0 * clean, 16_000)


def test_names_and_mistakes():
    assert isinstance(build('masking'), MaskingLoss)
    x = torch.randn(2, 4000)
    assert masking(x, x).tolist() == [0., 0.]
    with pytest.raises(SpeechLossError, match='want an even n_fft'): build({'name': 'masking', 'n_fft': 33})
    with pytest.raises(SpeechLossError, match='unexpected keyword'): build({'name': 'masking', 'loudness': 3})
