"""Networks of others as metrics: the number of their package, and one sentence where their weights are not here."""
import contextlib
import importlib.util
import io
import math

import numpy as np
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import METRICS, score_one, summary_of
from speechloss.metrics import opinions
from speechloss.metrics.cards import metric_cards

RATE = 16_000


def wave(seconds: float) -> torch.Tensor:
    samples = round(seconds * RATE)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    return .1 * noise * torch.sin(torch.arange(samples) / 2500) ** 2


def test_distillmos_is_that_of_its_package():
    if importlib.util.find_spec('distillmos') is None: pytest.skip('distillmos is not installed')
    opinions.distillmos_network()                       # torchaudio is opened the way that always works
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


# what the published weights carry, but for the sizes of the network
ARGUMENTS = dict(
    ms_fmax=20_000, ms_hop_length=.01, ms_max_segments=1300, ms_n_fft=4096, ms_n_mels=48, ms_seg_hop_length=4,
    ms_seg_length=15, ms_win_length=.02, cnn_c_out_1=2, cnn_c_out_2=2, cnn_c_out_3=2, cnn_dropout=.2,
    cnn_kernel_size=[3, 3], cnn_pool_1=[24, 7], cnn_pool_2=[12, 5], cnn_pool_3=[6, 3], pool_att_dropout=.1,
    pool_att_h=4, td_sa_d_model=4, td_sa_dropout=.1, td_sa_h=4, td_sa_num_layers=1)


def test_nisqa_is_that_of_torchmetrics(tmp_path, monkeypatch):
    """With weights of chance in a file of the published form, as it is for who has the real ones."""
    for package in ('requests', 'librosa'): pytest.importorskip(package)
    import torchmetrics.functional.audio.nisqa as theirs
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.manual_seed(0)
    arguments = ARGUMENTS | dict(td_sa_nhead=1, td_sa_pos_enc=False)
    net = theirs._NISQADIM(arguments)
    (tmp_path/'.torchmetrics/NISQA').mkdir(parents=True)
    torch.save(dict(args=arguments, model_state_dict=net.state_dict()), tmp_path/'.torchmetrics/NISQA/nisqa.tar')
    theirs._load_nisqa_model.cache_clear()
    try:
        for rate in (RATE, 48_000):
            values, reasons = score_one(wave(1.), None, 'nisqa', rate)
            want = theirs.non_intrusive_speech_quality_assessment(wave(1.), rate).tolist()
            assert not reasons and [values[c] for c in opinions.NISQA_COLUMNS] == pytest.approx(want, abs=1e-4)
        rows = [dict(zip(METRICS['nisqa'].columns, [3.] * 5), nisqa_rate=f'{rate} Hz') for rate in (RATE, 48_000, RATE)]
        assert opinions.nisqa_row(wave(1.), RATE)['nisqa_rate'] == '16000 Hz'
        found = {(line['kind'], line['files']) for line in summary_of(rows, ['nisqa'])}
        assert found == {('16000 Hz', 2), ('48000 Hz', 1)}
        for seconds, words in ((.1, 'too short.: score longer clips'), (60., 'cut it into pieces')):
            with pytest.raises(SpeechLossError, match=words): opinions.nisqa(wave(seconds), RATE)
    finally:
        theirs._load_nisqa_model.cache_clear()


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


def test_the_same_metrics_of_a_module_loaded_again_are_no_others():
    import importlib

    from speechloss.judges import scores
    scores.register_judges()
    importlib.reload(scores).register_judges()      # as a chapter does, whose cells are the module
    assert METRICS['wer_whisper_tiny_en'].check is not scores._check_whisper
