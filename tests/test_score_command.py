"""`speechloss score`: what a batch survives, killed at any moment, on files of every kind of wrong."""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from speechloss.cli.app import app
from speechloss.common.errors import SpeechLossError
from speechloss.common.tables import read_table
from speechloss.metrics import METRICS, score_one, score_files, summary_of, jobs_of, vq_score
from speechloss.metrics.files import METRICS_WITH_CLEAN

RATE = 16_000


def wave(seed: int, seconds: float = 1.) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return (.05 * noise * np.sin(np.arange(len(noise)) / 2500) ** 2).astype('float32')


def put(path: Path, x: np.ndarray, rate: int = RATE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, rate, **options)
    return path


def run(*args):
    "Exit code, stdout and stderr of the command in this process"
    done = CliRunner().invoke(app, ['score', *map(str, args)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    for k in range(5): put(tmp_path/f'in/{"ab"[k % 2]}/{k}.wav', wave(k))
    return tmp_path


# ---- files of every kind

def test_a_bad_file_is_a_row_with_its_error(tmp_path):
    place = tmp_path/'in'
    put(place/'good.flac', wave(0))
    put(place/'8bit.wav', wave(1), subtype='PCM_U8')
    put(place/'5channel.wav', np.stack([wave(k) for k in range(5)], 1))
    put(place/'phone.wav', wave(2)[::2], 8_000)
    put(place/'float.wav', wave(3), subtype='DOUBLE')
    bad = {'one.wav': '0.25 s', 'nan.wav': 'NaN', 'silent.wav': 'silent', 'empty.wav': 'empty.wav',
           'text.wav': 'text.wav', 'cut.flac': 'cut', 'none.wav': 'none.wav'}
    put(place/'one.wav', wave(4)[:1])
    put(place/'nan.wav', np.where(np.arange(RATE) == 99, math.nan, wave(5)), subtype='FLOAT')
    put(place/'silent.wav', 0 * wave(6))
    put(place/'none.wav', wave(6)[:0])
    (place/'empty.wav').write_bytes(b'')
    (place/'text.wav').write_text('no audio')
    (place/'cut.flac').write_bytes((place/'good.flac').read_bytes()[:5_000])
    code, out, err = run(place, '--out', tmp_path/'s.jsonl')
    rows = {Path(row['file']).name: row for row in read_table(tmp_path/'s.jsonl')}
    assert code == 1 and '7 of 12 files have an error' in err and set(rows) == {p.name for p in place.iterdir()}
    for name, row in rows.items():
        if name in bad: assert row['vqscore'] is None and bad[name] in row['error'] and '\n' not in row['error'], row
        else: assert -1 <= row['vqscore'] <= 1 and row['error'] is None, row
    assert rows['good.flac']['vqscore'] == pytest.approx(vq_score(soundfile.read(place/'good.flac')[0]), abs=1e-5)
    assert (rows['phone.wav']['sample_rate'], rows['phone.wav']['seconds']) == (8_000, 1.)
    assert out.splitlines()[1].split('\t')[:3] == ['vqscore', '5', '7']


def test_with_references_everything_that_is_usual(tmp_path):
    for k in range(2):
        put(tmp_path/f'clean/{k}.flac', wave(k, 2.))
        put(tmp_path/f'enhanced/{k}.wav', wave(k, 2.) + .1 * wave(9, 2.))
    put(tmp_path/'enhanced/alone.wav', wave(3, 2.))
    put(tmp_path/'enhanced/broken.wav', wave(3, 2.))
    (tmp_path/'clean/broken.wav').write_bytes(b'x')
    code, _, _ = run(tmp_path/'enhanced', '--ref', tmp_path/'clean', '--out', tmp_path/'s.csv')
    rows = {Path(row['file']).stem: row for row in read_table(tmp_path/'s.csv')}
    columns = [c for name in METRICS_WITH_CLEAN for c in METRICS[name].columns]
    shown = [c for name in METRICS_WITH_CLEAN for c in METRICS[name].columns + METRICS[name].notes]
    assert code == 1
    assert list(rows['0']) == ['file', 'clean', 'seconds', 'sample_rate', 'resampled', 'cut_ms', 'delay_ms', *shown,
                               'error', 'variants', 'fingerprint']
    e, c = (soundfile.read(tmp_path/p)[0] for p in ('enhanced/0.wav', 'clean/0.flac'))
    want, _ = score_one(e, c, METRICS_WITH_CLEAN)
    assert {n: float(rows['0'][n]) for n in columns} == pytest.approx(want, rel=1e-6)
    for name in ('alone', 'broken'):       # what needs no clean file is there all the same
        assert float(rows[name]['vqscore']) and not rows[name]['pesq'] and name in rows[name]['error']


def test_usual_metrics_whose_package_is_missing_are_left_out_and_named(tmp_path, monkeypatch):
    "A metric that was asked for by name is not left out"
    for k, name in enumerate(('noisy', 'clean')): put(tmp_path / f'{name}.wav', wave(k, 1.))
    monkeypatch.setattr('speechloss.metrics.cards.missing_package', lambda name: 'pesq' if 'pesq' in name else '')
    args = ['score', str(tmp_path / 'noisy.wav'), '--ref', str(tmp_path / 'clean.wav'), '--workers', '1']
    done = CliRunner().invoke(app, [*args, '--out', str(tmp_path / 'scores.csv')])
    row, = read_table(tmp_path / 'scores.csv')
    assert done.exit_code == 0 and 'si_sdr' in row and 'pesq' not in row
    assert "without pesq, pesq_nb, which need more: pip install '.[metrics]'" in done.stderr
    done = CliRunner().invoke(app, [*args, '--metrics', 'pesq'])
    assert done.exit_code != 0 and not done.stdout


def test_manifests_globs_and_single_files(folder):
    names = sorted(p.relative_to(folder).as_posix() for p in (folder/'in').rglob('*.wav'))
    (folder/'m.jsonl').write_text(''.join(json.dumps(dict(enhanced=n, speaker=n[3], take=1)) + '\n' for n in names))
    with open(folder/'m.csv', 'w', newline='') as file:
        table = csv.DictWriter(file, ['file', 'speaker'])
        table.writeheader()
        table.writerows(dict(file=n, speaker=n[3]) for n in names)
    want = [job.enhanced for job in jobs_of([folder/'in'])]
    for source in ('m.jsonl', 'm.csv', 'in/**/*.wav'):
        assert [job.enhanced for job in jobs_of([folder/source])] == want, source
    assert len(jobs_of([folder/'in', folder/'in/a', *want, folder/'in/../in'])) == 5          # each once
    rows = score_files(jobs_of([folder/'m.jsonl']), workers=1)
    assert [row['speaker'] for row in rows] == list('aaabb') and rows[0]['take'] == 1 and rows[0]['file'] == names[0]
    (folder/'clean.csv').write_text(f'path,clean\n{names[0]},{names[1]}\n{names[0]},{names[2]}\n')
    assert [job.clean for job in jobs_of([folder/'clean.csv'])] == [folder/names[1], folder/names[2]]
    one = jobs_of([want[0]], reference=want[1])
    assert one[0].clean == want[1]


def test_a_manifest_finds_its_clean_files(folder):
    "Not itself: that would be a perfect score"
    for k in range(5): put(folder/f'clean/{"ab"[k % 2]}/{k}.flac', wave(k))
    put(folder/'clean/other/0.wav', wave(9))                 # so the name 0 alone says nothing
    inside = [f'in/{"ab"[k % 2]}/{k}.wav' for k in range(5)]
    (folder/'lists').mkdir()
    (folder/'in/here.csv').write_text('\n'.join(['file', *(n[3:] for n in inside)]))
    (folder/'lists/up.csv').write_text('\n'.join(['file', *(f'../{n}' for n in inside)]))
    (folder/'lists/whole.csv').write_text('\n'.join(['file', *(str(folder/n) for n in inside)]))
    for name in ('in/here.csv', 'lists/up.csv', 'lists/whole.csv'):
        jobs = jobs_of([folder/name], folder/'clean')
        assert all(job.clean.is_relative_to(folder/'clean') for job in jobs)
        known = [job.clean for job in jobs if job.clean.exists()]
        assert known == [folder/f'clean/{"ab"[k % 2]}/{k}.flac' for k in range(name != 'in/here.csv', 5)]
    rows = score_files(jobs, ['si_sdr', 'vqscore'], workers=1)
    assert rows[0]['si_sdr'] is None and '0.wav' in rows[0]['error'] and rows[0]['vqscore']


def test_odd_manifests(tmp_path):
    put(tmp_path/'1.wav', wave(1))
    put(tmp_path/'2.wav', wave(2))
    (tmp_path/'m.jsonl').write_text('{"enhanced": "1.wav", "file": "hello", "error": "x", "vqscore": 9, '
                                    '"pesq": 4, "n": 1}\n'
                                    '{"enhanced": "2.wav", "n": "two"}\n{"enhanced": 5}\n')
    for kind in ('csv', 'jsonl', 'parquet'):
        rows = score_files(jobs_of([tmp_path/'m.jsonl']), out=tmp_path/f's.{kind}', workers=1)
        assert [row['file'] for row in rows] == ['1.wav', '2.wav', '5'] and rows[0]['pesq'] == 4 and rows[0]['n'] == 1
        assert -1 <= rows[0]['vqscore'] <= 1 and rows[0]['error'] is None and '/5 is not a file' in rows[2]['error']
        assert summary_of(rows, ['vqscore'])[0]['files'] == 2
    again = jobs_of([tmp_path/'s.csv'])          # a table of scores is a manifest
    assert [job.enhanced for job in again] == [tmp_path/n for n in ('1.wav', '2.wav', '5')]


def test_a_name_of_any_bytes_is_a_row(tmp_path):
    put(tmp_path/'in/good.wav', wave(1))
    odd = os.fsencode(tmp_path/'in') + b'/\xff.wav'
    with open(odd, 'wb') as file: file.write((tmp_path/'in/good.wav').read_bytes())
    for kind in ('csv', 'jsonl', 'parquet'):
        rows = score_files(jobs_of([tmp_path/'in']), out=tmp_path/f's.{kind}', workers=1)
        assert len(rows) == len(read_table(tmp_path/f's.{kind}')) == 2 and rows[0]['vqscore']
        assert rows[1]['file'].endswith('in/\\xff.wav')


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_tables_say_the_same(folder, suffix):
    rows = score_files(jobs_of([folder/'in']), out=folder/f's.{suffix}', workers=1)
    back = read_table(folder/f's.{suffix}')
    assert [float(row['vqscore']) for row in back] == [row['vqscore'] for row in rows]
    assert [row['file'] for row in back] == [row['file'] for row in rows]
    assert sorted(p.name for p in folder.iterdir()) == ['in', f's.{suffix}']


# ---- killed and resumed

def test_killed_at_any_moment_no_row_is_lost_or_doubled(tmp_path):
    for k in range(60): put(tmp_path/f'in/{k:02}.wav', wave(k, .5))
    (tmp_path/'in/30.wav').write_bytes(b'x')
    calm = score_files(jobs_of([tmp_path/'in']), out=tmp_path/'calm.csv', workers=1)
    out, part, seen = tmp_path/'s.csv', tmp_path/'s.csv.part', []
    for kill in range(4):
        command = [sys.executable, '-m', 'speechloss', 'score', str(tmp_path/'in'), '--out', str(out), '--resume', '-q',
                   '--workers', str(1 + kill % 2)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        before = part.read_bytes().count(b'\n') if part.exists() else 0
        while process.poll() is None and not (          # as soon as some rows more are there
                part.exists() and part.read_bytes().count(b'\n') > before + 3 * kill): time.sleep(.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() in (1, -signal.SIGKILL)
        if part.exists():
            lines = part.read_bytes().split(b'\n')[1:-1]
            seen.append(len({json.loads(line)[0] for line in lines}))
            assert len(lines) - seen[-1] <= 2 + kill                 # the one with an error is tried again
    assert seen == sorted(seen)
    assert run(tmp_path/'in', '--out', out, '--resume', '-q', '--workers', 1)[0] == 1 and not part.exists()
    assert out.read_bytes() == (tmp_path/'calm.csv').read_bytes() and len(calm) == 60


def test_resume_scores_what_is_new_changed_or_failed(folder):
    out = folder/'s.csv'
    (folder/'in/a/0.wav').write_bytes(b'x')
    assert run(folder/'in', '--out', out)[0] == 1
    first = out.read_bytes()
    code, _, err = run(folder/'in', '--out', out)
    assert code == 2 and '--resume' in err and '--overwrite' in err and out.read_bytes() == first
    put(folder/'in/a/0.wav', wave(0))                               # mended
    put(folder/'in/b/1.wav', wave(77))                              # changed
    put(folder/'in/b/9.wav', wave(9))                               # new
    (folder/'in/a/2.wav').unlink()                                  # gone
    done = []
    rows = score_files(jobs_of([folder/'in']), out=out, resume=True, workers=1, progress=lambda *a: done.append(a))
    assert done[0] == ('scoring', 2, 5) and not any(row['error'] for row in rows)
    assert [Path(row['file']).name for row in rows] == ['0.wav', '4.wav', '1.wav', '3.wav', '9.wav']
    fresh = score_files(jobs_of([folder/'in']), out=folder/'t.csv', workers=1)
    assert [row['vqscore'] for row in rows] == [row['vqscore'] for row in fresh]
    assert out.read_bytes() == (folder/'t.csv').read_bytes()
    with pytest.raises(SpeechLossError, match='no column dnsmos_fast_ovrl'):
        score_files(jobs_of([folder/'in']), ['dnsmos_fast'], out, resume=True, workers=1)
    assert score_files(jobs_of([folder/'in']), out=out, resume=True, workers=1) == fresh      # and that is no obstacle


def test_what_changed_is_scored_anew_whenever_it_changed(folder, monkeypatch):
    jobs, out = jobs_of([folder/'in']), folder/'s.csv'
    def replaced(label, done, total):       # while the others are scored, and with the time of the old one
        if done != 3: return
        old = (folder/'in/a/0.wav').stat()
        put(folder/'in/a/0.wav', wave(77, 1.5))
        os.utime(folder/'in/a/0.wav', ns=(old.st_atime_ns, old.st_mtime_ns))
    first = score_files(jobs, out=out, workers=1, progress=replaced)
    done = []
    again = score_files(jobs, out=out, resume=True, workers=1, progress=lambda *a: done.append(a))
    assert done[0] == ('scoring', 4, 5) and again[0]['vqscore'] != first[0]['vqscore'] and again[1:] == first[1:]
    monkeypatch.setattr('speechloss.metrics.files._weights', lambda: 'of another network')
    score_files(jobs, out=out, resume=True, workers=1, progress=lambda *a: done.append(a))
    assert ('scoring', 0, 5) in done


def test_begun_anew_and_stopped_it_goes_on_anew(folder):
    jobs, out = jobs_of([folder/'in']), folder/'s.csv'
    want = score_files(jobs, out=out, workers=1)
    before = out.read_text()
    out.write_text(before.replace(str(want[3]['vqscore']), '0.123'))        # a value that a new run would not give
    def stop(label, done, total):
        if done == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): score_files(jobs, out=out, overwrite=True, workers=1, progress=stop)
    assert '0.123' in out.read_text() and (folder/'s.csv.part').exists()    # the old one stands until the new is whole
    assert score_files(jobs, out=out, resume=True, workers=1) == want
    assert out.read_text() == before and not (folder/'s.csv.part').exists()


def test_resume_with_fewer_metrics_keeps_those_asked_for(folder):
    put(folder/'clean.wav', wave(0))
    jobs, out = jobs_of([folder/'in'], folder/'clean.wav'), folder/'s.csv'
    both = score_files(jobs, ['lsd', 'vqscore'], out, workers=1)
    code, shown, _ = run(folder/'in', '--ref', folder/'clean.wav', '--metrics', 'vqscore', '--out', out, '--resume',
                         '-q')
    assert code == 0 and shown.splitlines()[1].startswith('vqscore\t5\t0')
    assert [float(row['vqscore']) for row in read_table(out)] == [row['vqscore'] for row in both]
    assert 'lsd' not in read_table(out)[0]


# ---- manners

def test_output_for_people_and_programs(folder):
    code, out, err = run(folder/'in', '--workers', 1)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 6
    assert lines[0].split('\t') == ['file', 'seconds', 'sample_rate', 'vqscore', 'error']
    assert 'vqscore: mean' in err and 'over 5 files' in err
    rows = json.loads(run(folder/'in', '--workers', 1, '--json', '-q')[1])
    assert len(rows) == 5 and all(isinstance(row['vqscore'], float) for row in rows)
    summary = json.loads(run(folder/'in', '--out', folder/'s.csv', '--workers', 1, '--json', '-q',
                             '--metrics', 'vqscore, dnsmos_fast')[1])
    assert [line['column'] for line in summary][:2] == ['vqscore', 'dnsmos_fast_ovrl']
    assert summary[0]['low'] <= summary[0]['mean'] <= summary[0]['high']
    assert summary[0]['mean'] == pytest.approx(np.mean([row['vqscore'] for row in rows]), abs=1e-6)


def test_pictures(folder):
    put(folder/'clean.wav', wave(0))
    assert run(folder/'in', '--plot', folder/'h.png', '-q')[0] == 0
    code, out, _ = run(folder/'in', '--ref', folder/'clean.wav', '--metrics', 'vqscore,lsd', '--plot', folder/'s.svg',
                       '--columns', 'vqscore,lsd', '-q', '--out', folder/'t.csv')
    assert code == 0 and out.strip().endswith('s.svg') and '<svg' in (folder/'s.svg').read_text()
    assert (folder/'h.png').read_bytes().startswith(b'\x89PNG')
    for wrong, words in ((['h.png', '--columns', 'pesq'], 'give one or two of vqscore'),
                         (['h.abc'], "ends in '.abc'")):
        code, out, err = run(folder/'in', '--plot', folder/wrong[0], *wrong[1:], '-q')
        assert code == 2 and words in err and not out      # before anything is scored


@pytest.mark.parametrize('args,words', [
    (['nowhere'], 'nowhere does not exist'), (['*.opus'], 'matches no audio'),
    (['in', '--ref', 'nowhere'], 'reference'),
    (['in', '--metrics', 'best'], "metric 'best' is unknown"), (['in', '--out', 's.txt'], "ends in '.txt'"),
    (['in', '--metrics', 'vqscore,pesq'], 'give a reference'),
    (['m.csv'], 'names no file'), (['gone.csv'], 'does not exist'), (['bad.jsonl'], 'cannot be read'),
    (['void.csv'], 'no rows'), (['long.csv'], 'row 1 has more fields'),
    (['in', '--out', 'in/a/0.wav/s.csv'], 'cannot be written')])
def test_mistakes_are_one_sentence(folder, monkeypatch, args, words):
    monkeypatch.chdir(folder)
    Path('m.csv').write_text('name\nx.wav\n')
    Path('bad.jsonl').write_text('{"file": ')
    Path('void.csv').write_text('file\n')
    Path('long.csv').write_text('file\nin/a/0.wav,1\n')
    code, out, err = run(*args)
    said = [line for line in err.splitlines() if line.startswith('speechloss: ')]
    assert code == 2 and out == '' and len(said) == 1 and words in said[0], err
    assert not list(folder.rglob('*.part')) and not list(folder.rglob('.*'))


def test_two_at_once_do_not_mix(folder):
    from speechloss.common.tables import Journal
    held = Journal(folder/'s.csv.part', dict(metrics=['vqscore']))
    code, _, err = run(folder/'in', '--out', folder/'s.csv', '--resume')
    assert code == 2 and 'another process' in err
    held.close(remove=True)


def test_a_summary_is_over_speakers_where_they_are_named():
    rng = np.random.default_rng(0)
    rows = [dict(file=str(k), vqscore=float(rng.normal() * .01 + s), speaker=str(s), error=None)
            for s in range(10) for k in range(20)]
    by_speaker, = summary_of(rows, ['vqscore'])
    by_file, = summary_of([{k: v for k, v in row.items() if k != 'speaker'} for row in rows], ['vqscore'])
    assert by_speaker['high'] - by_speaker['low'] > 3 * (by_file['high'] - by_file['low'])
    rows[0]['vqscore'] = None
    assert summary_of(rows, ['vqscore'])[0]['failed'] == 1 and summary_of([], ['vqscore'])[0]['mean'] is None
