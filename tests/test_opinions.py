"""Networks of others as metrics: the number of their package, and one sentence where their weights are not here."""
import contextlib
import importlib.util
import io
import math

import numpy as np
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import METRICS, score_one
from speechloss.metrics import opinions
from speechloss.metrics.cards import metric_cards

RATE = 16_000


def wave(seconds: float) -> torch.Tensor:
    samples = round(seconds * RATE)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    return .1 * noise * torch.sin(torch.arange(samples) / 2500) ** 2


def test_distillmos_is_that_of_its_package():
    if importlib.util.find_spec('distillmos') is None: pytest.skip('distillmos is not installed')
    opinions._distillmos()                       # torchaudio is opened the way that always works
    from distillmos import ConvTransformerSQAModel
    with contextlib.redirect_stdout(io.StringIO()): net = ConvTransformerSQAModel().eval()
    for seconds in (1., 9.3):
        with torch.inference_mode(): want = float(net(wave(seconds)[None]))
        assert opinions.distillmos(wave(seconds), RATE) == pytest.approx(want, abs=1e-4)
    with pytest.raises(SpeechLossError, match='silent'): opinions.distillmos(0 * wave(1), RATE)


def test_squim_reads_the_weights_that_torchaudio_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(SpeechLossError, match='dns2020.pth is not there: fetch it'): metric_cards('squim')
    opinions.torchaudio_module()
    from torchaudio.models import squim_objective_base
    torch.manual_seed(0)
    net = squim_objective_base().eval()
    (tmp_path/'torchaudio/models').mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path/'torchaudio/models/squim_objective_dns2020.pth')
    values, reasons = score_one(wave(1.), None, 'squim')
    with torch.inference_mode(): want = [float(v) for v in net(wave(1.)[None])]
    assert not reasons and [values[c] for c in METRICS['squim'].columns] == pytest.approx(want, abs=1e-5)


def test_nisqa_is_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    pytest.importorskip('requests')
    with pytest.raises(SpeechLossError, match='CC BY-NC-SA'): metric_cards('nisqa')
    with pytest.raises(SpeechLossError, match='CC BY-NC-SA'): opinions.nisqa(wave(1.), RATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_judges_are_metrics_on_demand():
    from speechloss.judges import register_judges
    register_judges()
    names = ['wer_pocketsphinx', 'speaker_resemblyzer']
    try: metric_cards(names)
    except SpeechLossError as error: pytest.skip(str(error))
    e, c = (wave(1.) + .01 * wave(1.).roll(50)).numpy(), wave(1.).numpy()
    values, reasons = score_one(e, c, names)
    assert -1 <= values['speaker_resemblyzer'] <= 1
    assert math.isnan(values['wer_pocketsphinx']) == ('wer_pocketsphinx' in reasons)
    assert np.isfinite(values['wer_pocketsphinx']) or 'hears no word' in reasons['wer_pocketsphinx']
