"The enhancer that comes with the package: its files, its card, what it gains, its stream, and its commands."
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from speechloss.cli.pipe import enhance_pipe
from speechloss.common.errors import SpeechLossError
from speechloss.common.weights import SHIPPED
from speechloss.metrics import score_one
from speechloss.models import BandSplitEnhancer, SpectralEnhancer, enhance_wave, load_enhancer
from speechloss.models.streaming import Stream
from speechloss.signal import load

FOLDER, FRONT = SHIPPED['default'], Path(__file__).resolve().parents[1] / 'nbs/front'


@pytest.fixture(scope='module')
def model(): return load_enhancer()


@pytest.fixture(scope='module')
def clip():
    "Speaker and noise of the test split of the corpus desk"
    return {name: np.asarray(load(FRONT / f'{name}.flac')[0]) for name in ('noisy', 'enhanced', 'clean')}


def test_it_is_small_causal_and_described(model):
    card = (FOLDER / 'README.md').read_text(encoding='utf-8')
    weights = sum(p.numel() for p in model.parameters())
    assert model.causal and (model.n_fft, model.hop_length, model.sample_rate) == (512, 256, 16000)
    assert 50_000 < weights < 400_000 and f'{weights:,}' in card
    assert (FOLDER / 'model.safetensors').stat().st_size < 1e6
    assert hashlib.sha256((FOLDER / 'model.safetensors').read_bytes()).hexdigest() in card
    assert set(json.loads((FOLDER / 'config.json').read_text(encoding='utf-8'))) >= {'causal', 'memory', 'kind'}
    for told in ('LibriSpeech', 'steps', 'seed', 'PESQ', 'Do not'): assert told in card
    assert not re.search(r'\{|TODO|More Information', card)


def test_it_gains_on_a_test_clip(model, clip):
    with torch.no_grad(): found = model(torch.from_numpy(clip['noisy'])).numpy()
    before, after = (score_one(wave, clip['clean'], metrics=('pesq', 'estoi', 'si_sdr'))[0]
                     for wave in (clip['noisy'], found))
    assert after['pesq'] > before['pesq'] + .2 and after['estoi'] > before['estoi']
    assert after['si_sdr'] > before['si_sdr'] + 4
    np.testing.assert_allclose(found, clip['enhanced'], atol=2e-3)     # the file that the front page plays


def test_clean_speech_passes(model, clip):
    with torch.no_grad(): found = model(torch.from_numpy(clip['clean'])).numpy()
    assert score_one(found, clip['clean'], metrics=('pesq',))[0]['pesq'] > 3.5


def test_every_way_in_is_one_model(model, clip):
    other, wave = BandSplitEnhancer.from_pretrained('default').eval(), torch.from_numpy(clip['noisy'])[None, :32000]
    with torch.no_grad():
        whole = model(wave)
        assert torch.equal(whole, other(wave)) and torch.equal(whole, load_enhancer('default')(wave))
    stream = Stream(model)
    pieces = [stream(part) for part in wave[0].split(700)] + [stream.flush()]
    torch.testing.assert_close(torch.cat(pieces), whole[0], atol=1e-5, rtol=1e-4)


def test_a_limit_leaves_a_share_of_the_noise(model, clip):
    wave = torch.from_numpy(clip['noisy'])[:40_000]
    free, limited = enhance_wave(model, wave, 16000), enhance_wave(model, wave, 16000, limit_db=20.)
    torch.testing.assert_close(limited, .9 * free + .1 * wave)
    sink = io.BytesIO()
    enhance_pipe(model, io.BytesIO((wave * 32768).round().numpy().astype('<i2').tobytes()), sink, 700, 20.)
    piped = torch.from_numpy(np.frombuffer(sink.getvalue(), '<i2').astype('float32') / 32768)
    torch.testing.assert_close(piped, limited, atol=1e-4, rtol=1e-3)
    with pytest.raises(SpeechLossError, match='limit_db is 0.0: give dB above 0'):
        enhance_wave(model, wave, 16000, limit_db=0.)


def test_a_class_refuses_the_folder_of_another(tmp_path):
    with pytest.raises(SpeechLossError, match="default is a model of kind 'band_split': open it by load_enhancer"):
        SpectralEnhancer.from_pretrained('default')
    SpectralEnhancer(n_fft=256, hop_length=128, bands=16, channels=16).save_pretrained(tmp_path)
    assert SpectralEnhancer.from_pretrained(tmp_path).n_fft == 256
    with pytest.raises(SpeechLossError, match="a model of kind 'enhancer'"): BandSplitEnhancer.from_pretrained(tmp_path)


def test_the_command_needs_nothing_else(clip, tmp_path):
    from typer.testing import CliRunner

    from speechloss.cli.app import app
    sf.write(tmp_path / 'noisy.wav', clip['noisy'], 16000)
    done = CliRunner().invoke(app, ['enhance', str(tmp_path / 'noisy.wav'), str(tmp_path / 'out.wav'), '--quiet'])
    assert done.exit_code == 0, done.output
    found, rate = sf.read(tmp_path / 'out.wav', dtype='float32')
    assert rate == 16000 and len(found) == len(clip['noisy'])
    np.testing.assert_allclose(found[:16000], clip['enhanced'][:16000], atol=2e-2)
