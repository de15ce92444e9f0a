"""`speechloss score` and `compare` on folders as they are: rates, lengths, delays, names, and what is broken."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from speechloss.cli.app import app
from speechloss.common.errors import SpeechLossError
from speechloss.common.tables import read_table
from speechloss.metrics import jobs_of, score_files, score_one
from speechloss.metrics.alignment import PairRules
from speechloss.metrics.checks import check_files
from speechloss.signal import resample

RATE = 16_000


def wave(seed: int, seconds: float = 1.) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return (.05 * noise * np.sin(np.arange(len(noise)) / 2500) ** 2).astype('float32')


def put(path: Path, x: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, rate)
    return path


def at_48k(x: np.ndarray) -> np.ndarray: return resample(torch.from_numpy(x), RATE, 48_000).numpy()


def run(command, *args):
    done = CliRunner().invoke(app, [command, *map(str, args)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def place(tmp_path):
    "12 pairs: clean at 48 kHz, 100 samples short, 10 ms late, broken, without a partner; all named _enhanced"
    for k in range(12):
        clean = wave(k)
        put(tmp_path/f'clean/p{k % 3}_{k:02}.wav', *((at_48k(clean), 48_000) if k < 3 else (clean,)))
        enhanced = clean + .1 * wave(k + 50)
        if k == 4: enhanced = enhanced[:-100]
        if k == 5: enhanced = np.r_[np.zeros(160, 'float32'), enhanced][:RATE]
        if k == 6: enhanced = enhanced[:-8_000]
        put(tmp_path/f'enhanced/p{k % 3}_{k:02}_enhanced.wav', enhanced)
    (tmp_path/'enhanced/p1_07_enhanced.wav').write_bytes(b'RIFF')
    put(tmp_path/'enhanced/p9_99_enhanced.wav', wave(99))
    return tmp_path


def by_name(rows): return {Path(row['file']).stem.removesuffix('_enhanced'): row for row in rows}


METRICS = 'si_sdr,lsd,vqscore'


def test_one_table_whatever_the_folder_holds(place):
    code, _, err = run('score', place/'enhanced', '--ref', place/'clean', '--metrics', METRICS, '--out',
                       place/'s.jsonl')
    rows = by_name(read_table(place/'s.jsonl'))
    assert code == 1 and len(rows) == 13 and '3 of 13 files have an error' in err
    for words in ('3 of 13 pairs had two rates', '1 of 13 pairs had two lengths: the longer was cut, by 6.25 ms',
                  '1 of 13 pairs have a delay, of 10 ms (10 to 10): --align takes it out'): assert words in err, err
    short, late, far = rows['p1_04'], rows['p2_05'], rows['p0_06']
    assert rows['p0_00']['resampled'] == 'clean 48000 to 16000 Hz'
    assert rows['p0_00']['si_sdr'] > 10           # what noise has next to 8 kHz did not survive the two resamplings
    assert short['cut_ms'] == -6.25 and abs(short['si_sdr'] - 20) < 1 and late['delay_ms'] == 10
    assert late['si_sdr'] < 5 and rows['p0_03']['delay_ms'] == 0 and rows['p0_03']['resampled'] is None
    assert '500.0 ms apart' in far['error'] and '--tolerance 500' in far['error']
    assert far['vqscore'] and far['lsd'] is None
    assert rows['p1_07']['error'] and rows['p1_07']['seconds'] is None
    assert 'p9_99_enhanced.wav has no clean file' in rows['p9_99']['error'] and rows['p9_99']['vqscore']
    assert 'vq-speech of this package' in short['variants'] and 'sha256' in short['variants']


def test_aligned_and_strict(place):
    jobs = jobs_of([place/'enhanced'], place/'clean')
    aligned = by_name(score_files(jobs, ['si_sdr'], workers=1, rules=PairRules(align=True)))
    assert abs(aligned['p2_05']['si_sdr'] - 20) < 1 and aligned['p2_05']['delay_ms'] == 10
    assert aligned['p0_03']['si_sdr'] == by_name(score_files(jobs, ['si_sdr'], workers=1))['p0_03']['si_sdr']
    strict = by_name(score_files(jobs, ['si_sdr'], workers=1, rules=None))
    assert 'resample to one rate first' in strict['p0_00']['error']
    assert 'cut them to one length' in strict['p1_04']['error']
    assert 'delay_ms' not in strict['p0_03'] and strict['p0_03']['si_sdr'] == aligned['p0_03']['si_sdr']
    wide = by_name(score_files(jobs, ['si_sdr'], workers=1, rules=PairRules(tolerance=500)))
    assert wide['p0_06']['cut_ms'] == -500 and abs(wide['p0_06']['si_sdr'] - 20) < 1


CRASHING = """
import ctypes
class NoUtterancesError(Exception): pass
PesqError = NoUtterancesError
def pesq(rate, clean, enhanced, *args, **kwargs):
    if len(clean) < 5000: ctypes.string_at(0)
    return 1 + float(abs(clean - enhanced).mean())
"""


@pytest.fixture
def forty(tmp_path, monkeypatch):
    "40 pairs: 3 broken, one that ends the process, some at 48 kHz, some 100 samples short; and a PESQ that crashes"
    for k in range(40):
        clean = wave(k, .25 if k == 20 else .5 + k / 1000)       # the largest come first, so it is the last
        enhanced = clean + .1 * wave(k + 50, len(clean) / RATE)
        put(tmp_path/f'clean/s{k % 4}/{k:02}.wav', *((at_48k(clean), 48_000) if k % 20 == 1 else (clean,)))
        short = enhanced[:-100] if k % 10 == 3 else enhanced
        put(tmp_path/f'enh/s{k % 4}/{k:02}_enh.wav', *((at_48k(short), 48_000) if k % 20 == 2 else (short,)))
    (tmp_path/'enh/s3/07_enh.wav').write_bytes(b'RIFF')
    (tmp_path/'enh/s1/17_enh.wav').unlink()
    (tmp_path/'enh/s1/17_enh.wav').symlink_to(tmp_path/'unmounted/17.wav')
    (tmp_path/'enh/s9').symlink_to(tmp_path/'unmounted/s9')
    (tmp_path/'packages').mkdir()
    (tmp_path/'packages/pesq.py').write_text(CRASHING)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path/'packages'))     # of the command that is killed
    monkeypatch.syspath_prepend(tmp_path/'packages')               # of the processes that this one starts
    return tmp_path


def test_killed_twice_and_resumed_it_is_the_undisturbed_table(forty):
    options = ['--ref', str(forty/'clean'), '--metrics', 'pesq,si_sdr', '--workers', '1', '-q']
    code, _, err = run('score', forty/'enh', *options, '--out', forty/'calm.csv')
    rows = {Path(row['file']).stem: row for row in read_table(forty/'calm.csv')}
    assert code == 1 and len(rows) == 41 and '4 of 41 files have an error' in err
    crashed = rows['20_enh']
    assert crashed['error'].startswith('pesq: pesq ended the process') and not crashed['pesq']
    assert float(crashed['si_sdr']) > 15
    for name in ('17_enh', 's9'): assert 'which is not there: mount or fetch it' in rows[name]['error']
    out, part = forty/'s.csv', forty/'s.csv.part'
    command = [sys.executable, '-m', 'speechloss', 'score', str(forty/'enh'), *options, '--out', str(out), '--resume']
    for mark in (6, 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (part.exists() and part.read_bytes().count(b'\n') > mark):
            time.sleep(.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL and part.exists()
    assert run('score', forty/'enh', *options, '--out', out, '--resume')[0] == 1
    assert not part.exists() and out.read_bytes() == (forty/'calm.csv').read_bytes()


def test_other_rules_for_pairs_are_scored_anew(place):
    options, out = ['--ref', place/'clean', '--metrics', 'si_sdr', '--workers', '1', '-q'], place/'s.csv'
    assert run('score', place/'enhanced', *options, '--out', out)[0] == 1
    before = by_name(read_table(out))['p2_05']['si_sdr']
    assert run('score', place/'enhanced', *options, '--out', out, '--resume', '--align')[0] == 1
    assert by_name(read_table(out))['p2_05']['si_sdr'] != before


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_what_was_done_is_kept_by_a_resumption(place, suffix):
    jobs, out, scored = jobs_of([place/'enhanced'], place/'clean'), place/f's.{suffix}', []
    whole = score_files(jobs, ['lsd', 'pesq'], out, workers=1)
    again = score_files(jobs, ['lsd', 'pesq'], out, resume=True, workers=1, progress=lambda *a: scored.append(a))
    assert again == whole and scored[0] == ('scoring', 10, 13)


# ---- names

def test_never_another_folders_file(tmp_path):
    for k, name in enumerate(('spk/s1/utt1', 'spk/s2/utt1', 'clean/s1/utt1', 'clean/utt1')):
        put(tmp_path/f'{name}.wav', wave(k))
    first, second = jobs_of([tmp_path/'spk'], tmp_path/'clean')
    assert first.clean == tmp_path/'clean/s1/utt1.wav' and not first.why
    assert 's2/utt1.wav has no clean file' in second.why and not second.clean.exists()


@pytest.mark.parametrize('enhanced, clean, options, pairs', [
    (['a_DeepFilterNet3', 'b_DeepFilterNet3'], ['a', 'b'], {}, 2), (['a', 'b'], ['a_clean', 'b_clean'], {}, 2),
    (['enhanced_a', 'enhanced_b'], ['a', 'b'], {}, 2), (['a_enh', 'b_enh'], ['a_clean', 'b_clean'], {}, 2),
    (['anna_1', 'bob_1'], ['1'], {}, 0), (['1688-142285-0001'], ['1688-142285'], {}, 0),
    (['a', 'b'], ['x/a', 'x/b'], {}, 2), (['a'], ['x/a', 'y/a'], {}, 0),
    (['a_x_fileid_1', 'b_y_fileid_22'], ['clean_fileid_1', 'clean_fileid_22'],
                                     dict(match=r'fileid_(\d+)'), 2),
    (['s1/a', 's2/a'], ['s1_a', 's2_a'], dict(match=r'(s\d)[_/](\w+)\.'), 2)])
def test_names_find_each_other_or_say_why(tmp_path, enhanced, clean, options, pairs):
    for name in (*(f'e/{n}' for n in enhanced), *(f'c/{n}' for n in clean)): put(tmp_path/f'{name}.wav', wave(1, .1))
    jobs = jobs_of([tmp_path/'e'], tmp_path/'c', **options)
    found = [job for job in jobs if not job.why]
    assert len(found) == pairs and len({job.clean for job in found}) == pairs
    assert [job.clean.relative_to(tmp_path/'c').with_suffix('').as_posix() for job in found] == clean[:pairs]


def test_speakers_of_the_names_are_clusters(place):
    code, out, _ = run('score', place/'enhanced', '--metrics', 'si_sdr', '--ref', place/'clean', '--speaker',
                       r'^(p\d+)_', '--json')
    rows = json.loads(out)
    assert {row['speaker'] for row in rows} == {'p0', 'p1', 'p2', 'p9'}
    code, _, err = run('score', place/'enhanced', '--speaker', r'^x(\d)')
    assert code == 2 and 'finds nothing in p0_00_enhanced.wav (13 of 13 files)' in err


def test_odd_lists_and_patterns(tmp_path):
    for name in 'ab': put(tmp_path/f'g/{name}.wav', wave(1))
    (tmp_path/'blank.csv').write_text('file, clean\ng/a.wav, g/b.wav\n')
    assert jobs_of([tmp_path/'blank.csv'])[0].clean == tmp_path/'g/b.wav'
    (tmp_path/'long.csv').write_text(f'file\ng/a.wav\n{"x" * 300}.wav\n')
    good, bad = score_files(jobs_of([tmp_path/'long.csv']), out=tmp_path/'l.csv', workers=1)
    assert good['error'] is None and bad['error']
    (tmp_path/'bars.csv').write_text('file|clean\ng/a.wav|g/b.wav\n')
    with pytest.raises(SpeechLossError, match=r'its columns are file\|clean'): jobs_of([tmp_path/'bars.csv'])
    assert run('score', tmp_path/'g/*', '--out', tmp_path/'g/s.csv', '-q')[0] == 0
    assert run('score', tmp_path/'g/*', '--out', tmp_path/'g/s.csv', '-q', '--resume')[0] == 0
    assert len(read_table(tmp_path/'g/s.csv')) == 2


# ---- the check

def test_a_check_names_each_trouble_and_its_cure(place):
    put(place/'clean/spare.wav', wave(7))
    code, out, err = run('score', place/'enhanced', '--ref', place/'clean', '--check', '--json', '--out', place/'c.csv')
    found = {row['finding']: row for row in json.loads(out)}
    assert code == 1 and '13 files checked, 3 of them would have no score' in err
    assert len(read_table(place/'c.csv')) == 13
    assert found['lengths differ, by up to 500.0 ms']['cure'] == '--tolerance 500'
    assert found['cannot be read']['files'] == 1 and found['no clean file']['files'] == 1
    assert found['another rate than the clean file']['files'] == 3
    assert found['clean file without enhanced']['example'].endswith('spare.wav')
    assert found['delay of 10 ms (10 to 10)']['cure'] == '--align' and not list(place.glob('*.part'))
    tidy = check_files(jobs_of([place/'clean'], place/'clean'), rules=PairRules())
    assert {f.finding for f in tidy.findings} >= {'the clean file itself'}


def test_a_tidy_folder_needs_nothing(tmp_path):
    for k in range(3): put(tmp_path/f'e/{k}.wav', wave(k) + .1 * wave(k + 9)), put(tmp_path/f'c/{k}.wav', wave(k))
    code, out, err = run('score', tmp_path/'e', '--ref', tmp_path/'c', '--check')
    assert code == 0 and out.count('\n') == 1 and '3 files checked, 0 of them' in err


# ---- comparing

@pytest.fixture
def tables(tmp_path):
    for k in range(24):
        clean, hiss = wave(k, .5), wave(k + 100, .5)
        put(tmp_path/f'clean/{k}.wav', clean)
        for name, gain in dict(noisy=.5, a=.2, b=.49).items(): put(tmp_path/f'{name}/{k}.wav', clean + gain * hiss)
    for name in ('noisy', 'a', 'b'):
        out = tmp_path/f'{name}.csv'
        score_files(jobs_of([tmp_path/name], tmp_path/'clean'), ['si_sdr', 'lsd'], out, workers=1)
    return tmp_path


def test_compare_reads_what_score_writes(tables):
    paths = [tables/f'{name}.csv' for name in ('noisy', 'a', 'b')]
    code, out, _ = run('compare', *paths, '--json', '--html', tables/'r.html', '--plot', tables/'r.png', '--out',
                       tables/'d.csv')
    rows = {(row['column'], row['system']): row for row in json.loads(out[:out.rindex(']') + 1])}
    assert code == 0 and rows['si_sdr', 'a']['verdict'] == rows['lsd', 'a']['verdict'] == 'better'
    assert rows['si_sdr', 'b']['verdict'] == 'tied' and rows['si_sdr', 'b']['files'] == 24
    assert len(read_table(tables/'d.csv')) == 4
    want = score_one(*(soundfile.read(tables/f'{n}/0.wav')[0] for n in ('a', 'clean')), ['si_sdr'], RATE)[0]['si_sdr']
    assert float(read_table(tables/'a.csv')[0]['si_sdr']) == pytest.approx(want, abs=1e-3)
    page = (tables/'r.html').read_text()
    assert page.count('<audio') == 2 * 3 * 4 and 'not here' not in page
    assert 'src="http' not in page and '<script' not in page
    assert (tables/'r.png').read_bytes().startswith(b'\x89PNG')
    code, out, err = run('compare', paths[0], tables/'clean')
    assert code == 2 and err.startswith('speechloss: table')
    code, _, err = run('compare', *paths[:2], '--html', tables/'r.txt')
    assert code == 2 and 'end its name in .html' in err


# ---- words

def test_words_are_counted_against_the_texts_of_a_manifest(tmp_path, monkeypatch):
    """Where a row has a text no clean file is needed; another text is another score."""
    from speechloss.judges import scores
    from speechloss.metrics.cards import metric_cards
    scores.register_judges()
    try: metric_cards('wer_pocketsphinx')
    except SpeechLossError as error: pytest.skip(str(error))
    monkeypatch.setattr(scores, '_recogniser', lambda name: lambda waves: ['the cat sat'] * len(waves))
    for name in 'abc': put(tmp_path/f'{name}.wav', wave(1))

    def rows(first: str, **options):
        (tmp_path/'m.jsonl').write_text('\n'.join(json.dumps(row) for row in (
            dict(file='a.wav', text=first), dict(file='b.wav', text='(laughter)'), dict(file='c.wav'))))
        return score_files(jobs_of([tmp_path/'m.jsonl']), ['wer_pocketsphinx'], tmp_path/'s.csv', workers=1, **options)
    right, empty, none = rows('The cat sat.')
    assert right['wer_pocketsphinx'] == right['cer_pocketsphinx'] == 0 and right['words_pocketsphinx'] == 3
    assert 'column text' in right['variants'] and 'has no word' in empty['error'] and 'clean wave' in none['error']
    assert rows('The bat sat.', resume=True)[0]['wer_pocketsphinx'] == pytest.approx(1 / 3)
    put(tmp_path/'clean/c.wav', wave(1))
    jobs = jobs_of([tmp_path/'c.wav'], tmp_path/'clean')
    assert score_files(jobs, ['wer_pocketsphinx'], workers=1)[0]['wer_pocketsphinx'] == 0      # what it hears there


def test_words_against_a_text_and_against_what_is_heard_are_two_means(tmp_path, monkeypatch):
    """Each row names its reference, and neither a summary nor a comparison takes the two for one."""
    from speechloss.judges import scores
    from speechloss.metrics.cards import metric_cards
    scores.register_judges()
    try: metric_cards('wer_pocketsphinx')
    except SpeechLossError as error: pytest.skip(str(error))
    monkeypatch.setattr(scores, '_recogniser', lambda name: lambda waves: ['the cat sat'] * len(waves))
    # scored in this process, which is patched
    monkeypatch.setattr('speechloss.metrics.scoring._PLAIN', {'pocketsphinx', 'jiwer', 'transformers'})
    for k in range(5): put(tmp_path/f'e/{k}.wav', wave(k, .5)), put(tmp_path/f'c/{k}.wav', wave(k, .5))

    def table(name: str, texts: dict, *options: str) -> tuple:
        lines = [dict(file=f'e/{k}.wav', clean=f'c/{k}.wav', **texts.get(k, {})) for k in range(5)]
        (tmp_path/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        return run('score', tmp_path/f'{name}.jsonl', '--metrics', 'wer_pocketsphinx,lsd', '--json', '--out',
                   tmp_path/f'{name}.csv', *options)
    a, b = dict(text='a cat sat'), dict(text='the cat sat')
    code, out, err = table('a', {0: a, 1: a, 2: a})
    assert code == 0 and [row['against_pocketsphinx'] for row in read_table(tmp_path/'a.csv')] == [
        'text', 'text', 'text', 'heard', 'heard']
    lines = {(line['column'], line['kind']): line for line in json.loads(out)}
    assert lines['wer_pocketsphinx', 'heard']['mean'] == 0 and lines['wer_pocketsphinx', 'heard']['files'] == 2
    assert lines['cer_pocketsphinx', 'text']['files'] == 3 and lines['lsd', None]['files'] == 5
    assert lines['wer_pocketsphinx', 'text']['mean'] == pytest.approx(1 / 3)
    said, = [line for line in err.splitlines() if 'wer_pocketsphinx' in line]
    assert '2 kinds, heard: 2, text: 3 (column against_pocketsphinx)' in said
    assert table('a', {0: a, 1: a, 2: a}, '--resume')[:2] == (0, out)
    assert table('b', {0: b, 1: b, 3: b}, '--strict')[0] == 0
    code, out, err = run('compare', tmp_path/'a.csv', tmp_path/'b.csv', '--json')
    found = {row['column']: row for row in json.loads(out)}
    assert code == 0 and found['wer_pocketsphinx']['files'] == 3 and found['lsd']['files'] == 5
    assert 'wer_pocketsphinx: 2 of 5 files are scored in two ways' in err
    assert 'over files of 2 kinds, heard: 1, text: 2' in err
