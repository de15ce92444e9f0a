"""What folders and tables hold in the world: no traceback, no row lost, a sentence each."""
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from speechloss.cli.app import app
from speechloss.common.errors import SpeechLossError
from speechloss.common.tables import read_table
from speechloss.metrics import jobs_of, score_files
from speechloss.metrics.comparison import compare_tables, named_tables
from speechloss.metrics.files import pair_sentences
from speechloss.models import enhancer

RATE = 16_000


def wave(seed: int = 0, seconds: float = .6, rate: int = RATE, channels: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(round(seconds * rate), channels))
    return (.05 * noise * np.sin(np.arange(len(noise)) / 2500)[:, None] ** 2).astype('float32')


def put(path, x: np.ndarray | None = None, rate: int = RATE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        soundfile.write(file, wave() if x is None else x, rate, format=options.pop('format', 'WAV'), **options)
    return path


def run(*args) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*map(str, args)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(*args) -> str:
    code, _, err = run(*args)
    said = [line for line in err.splitlines() if line.startswith('speechloss: ')]
    assert code == 2 and len(said) == 1, err
    return said[0]


@pytest.fixture
def model(tmp_path) -> Path:
    enhancer('tiny').save_pretrained(tmp_path/'model')
    return tmp_path/'model'


# ---- names

NAMES = ('a b', 'new\nline', '-dash', 'tab\tx', 'quote\'"', 'пр', '100%', '[x]', 'comma,semi;', '~', 'c:d', '.', 'x.y')


def test_names_of_any_kind_are_scored_and_enhanced(tmp_path, model):
    """Blanks, line breaks, dashes, an accent apart from its letter, bytes that are no text."""
    apart, joined = (unicodedata.normalize(form, 'é') for form in ('NFD', 'NFC'))
    for k, name in enumerate((*NAMES, apart)):
        put(tmp_path/f'e/{name}x.wav', wave(k) + .1 * wave(k + 50))
        put(tmp_path/f'c/{joined if name == apart else name}x.wav', wave(k))
    for folder in 'ec': put(Path(os.fsdecode(os.fsencode(tmp_path) + f'/{folder}/'.encode() + b'\xff.wav')))
    names = len(NAMES) - ('.' in NAMES)        # what begins with a dot is hidden
    for kind in ('csv', 'jsonl', 'parquet'):
        rows = score_files(jobs_of([tmp_path/'e'], tmp_path/'c'), ['si_sdr'], tmp_path/f's.{kind}', workers=1)
        assert len(rows) == len(read_table(tmp_path/f's.{kind}')) == names + 2
        assert not [row['error'] for row in rows if row['error']]
    code, out, err = run('enhance', tmp_path/'e', tmp_path/'o', '--model', model, '-q')
    assert code == 0 and len(os.listdir(tmp_path/'o')) == names + 2 and '\\xff.wav' in out, err
    rows = score_files(jobs_of([tmp_path/'o'], tmp_path/'c'), ['si_sdr'], tmp_path/'o.csv', workers=1)
    assert not [row['error'] for row in rows if row['error']]
    code, out, err = run('compare', tmp_path/'s.csv', tmp_path/'o.csv', '--json')
    assert code == 0 and json.loads(out)[0]['files'] == names + 2, err


def test_linked_folders_count_once_and_under_their_first_name(tmp_path, model):
    put(tmp_path/'enh/p1/a.wav')
    put(tmp_path/'pool/p2/b.wav', wave(1))
    (tmp_path/'enh/p2').symlink_to('../pool/p2')
    (tmp_path/'enh/p3').symlink_to('p1')
    for source in ('enh', 'enh/**/*.wav'):
        jobs = jobs_of([f'{tmp_path}/{source}'])
        assert [Path(job.file).name for job in jobs] == ['a.wav', 'b.wav']
    assert run('enhance', tmp_path/'enh', tmp_path/'o', '--model', model, '-q')[1].count('.wav') == 2
    (tmp_path/'base').mkdir()
    (tmp_path/'base/z.wav').symlink_to(tmp_path/'enh/p1/a.wav')
    assert [Path(job.file).name for job in jobs_of([tmp_path/'enh/p1', tmp_path/'base'])] == ['a.wav']


# ---- sound

def test_sound_of_any_kind_is_a_row_or_a_sentence(tmp_path, model):
    odd = dict(zero=dict(x=wave(seconds=0)), one=dict(x=np.full((1, 1), .1)), seven=dict(x=wave(channels=7)),
               double=dict(subtype='DOUBLE'), ulaw=dict(subtype='ULAW'), one_hertz=dict(x=wave()[:60], rate=1),
               fast=dict(x=wave(rate=384_000), rate=384_000), endless=dict(rate=2**31 - 1), silent=dict(x=0 * wave()),
               loud=dict(x=1e30 * wave(), subtype='FLOAT'), faint=dict(x=1e-30 * wave(), subtype='DOUBLE'))
    for name, options in odd.items():
        for folder in 'ec': put(tmp_path/f'{folder}/{name}.wav', **options)
    for folder in 'ec':
        for k, name in enumerate(('a.wav', 'A.WAV', 'a.flac', 'eight.aiff', 'dir.wav/in.wav')):
            kind = dict(flac='FLAC', aiff='AIFF').get(name.partition('.')[2], 'WAV')
            put(tmp_path/folder/name, wave(k), format=kind, **dict(subtype='PCM_S8') if kind == 'AIFF' else {})
    (tmp_path/'e/text.wav').write_text('no sound')
    (tmp_path/'e/x.wav').mkdir()
    for name, to in (('loop', '.'), ('gone.wav', 'nowhere.wav'), ('self.wav', 'self.wav')):
        (tmp_path/'e'/name).symlink_to(to)
    os.mkfifo(tmp_path/'e/pipe.wav')
    rows = {Path(row['file']).name: row for row in
            score_files(jobs_of([tmp_path/'e'], tmp_path/'c'), ['si_sdr', 'vqscore'], tmp_path/'s.csv', workers=1)}
    assert len(rows) == len(odd) + 5 + 3
    good = {'a.wav', 'A.WAV', 'a.flac', 'eight.aiff', 'in.wav', 'seven.wav', 'double.wav', 'ulaw.wav', 'fast.wav'}
    assert good <= {name for name, row in rows.items() if not row['error']}
    for row in rows.values():
        assert row['error'] is None or '\n' not in row['error'] and 'while scoring' not in row['error'], row
    assert run('score', tmp_path/'e', '--ref', tmp_path/'c', '--check')[0] == 1
    code, out, err = run('enhance', tmp_path/'e', tmp_path/'o', '--model', model, '-q')
    made = {Path(name).name for name in out.splitlines()}
    assert code == 1 and good <= made | {'eight.aiff'} and 'Traceback' not in err


def test_files_that_vanish_while_they_are_scored_are_rows(tmp_path):
    for k in range(4): put(tmp_path/f'e/{k}.wav', wave(k))

    def progress(label, done, total):
        if done == 1: [path.unlink() for path in (tmp_path/'e').glob('*.wav')]
    rows = score_files(jobs_of([tmp_path/'e']), out=tmp_path/'s.csv', workers=1, progress=progress)
    assert [row['error'] is None for row in rows] == [True, False, False, False]
    assert len(read_table(tmp_path/'s.csv')) == 4 and 'is not a file' in rows[3]['error']


# ---- tables

@pytest.mark.parametrize('content', [
    b'\xef\xbb\xbffile;clean\r\ne/0.wav;c/0.wav\r\n', b'file\tclean\r\ne/0.wav\tc/0.wav\r\n',
    'file,clean\r\ne/0.wav,c/0.wav\r\n'.encode('utf-16'), b'File, CLEAN \ne/0.wav,c/0.wav\n',
    b'file,clean\ne/0.wav,c/0.wav\n\n,\n', b'file,clean\ne/0.wav,c/0.wav\ne/0.wav,c/0.wav\n'],
    ids=['semicolons', 'tabs', 'utf-16', 'case', 'empty lines', 'twice'])
def test_a_table_of_any_spreadsheet_is_a_manifest(tmp_path, content):
    (tmp_path/'m.csv').write_bytes(content)
    job, = jobs_of([tmp_path/'m.csv'])
    assert (job.enhanced, job.clean) == (tmp_path/'e/0.wav', tmp_path/'c/0.wav')


@pytest.mark.parametrize('name, content, said', [
    ('m.csv', b'', 'has no rows'), ('m.csv', b'file,clean\n', 'has no rows'), ('m.csv', b'a|b\n1|2\n', 'are a|b: give'),
    ('m.csv', b'file,file\na,b\n', 'two columns are named file'),
    ('m.csv', b'file\n\xe9.wav\n', 'save it as UTF-8'), ('m.jsonl', b'[1]\n', 'is no object')])
def test_a_table_that_is_no_manifest_is_one_sentence(tmp_path, name, content, said):
    (tmp_path/name).write_bytes(content)
    assert said in refused('score', tmp_path/name)


def test_one_bad_row_of_a_manifest_is_one_bad_row(tmp_path):
    put(tmp_path/'a.wav')
    rows = [dict(file='a.wav', snr=float('nan')), *(dict(file=name) for name in ('b\0.wav', ['a.wav'], '', 5))]
    (tmp_path/'m.jsonl').write_text('\r\n'.join(map(json.dumps, rows)))
    code, out, _ = run('score', tmp_path/'m.jsonl', '--json')
    found = json.loads(out, parse_constant=pytest.fail)          # there is no NaN in JSON
    assert code == 1 and [row['error'] is None for row in found] == [True, *[False] * 4]
    assert 'm.jsonl, row 4 is not a file' in found[3]['error']


def test_what_is_read_is_not_written_over(tmp_path):
    put(tmp_path/'a.wav')
    (tmp_path/'m.csv').write_text('file\na.wav\n')
    assert 'is what is to be scored' in refused('score', tmp_path/'m.csv', '--out', tmp_path/'m.csv', '--overwrite')
    for name in 'ab': (tmp_path/f'{name}.csv').write_text('file,lsd\n1.wav,1\n2.wav,2\n')
    for option in ('--out', '--html', '--plot'):
        name = 'b.html' if option == '--html' else 'b.csv'
        (tmp_path/'b.html').write_text('')
        args = ('compare', tmp_path/'a.csv', tmp_path/'b.csv', option, tmp_path/name)
        if option != '--html': assert 'is one of the tables' in refused(*args)
    assert read_table(tmp_path/'b.csv')[0]['file'] == '1.wav'


def test_a_table_that_was_written_in_is_scored_anew_there(tmp_path):
    for k in range(2): put(tmp_path/f'e/{k}.wav', wave(k))
    out = tmp_path/'s.csv'
    rows = score_files(jobs_of([tmp_path/'e']), out=out, workers=1)
    out.write_text(out.read_text().replace(str(rows[0]['vqscore']), 'good'))
    assert score_files(jobs_of([tmp_path/'e']), out=out, workers=1, resume=True) == rows
    (tmp_path/'notes.csv').write_text('what I wanted to say')
    assert 'is not ours' in refused('score', tmp_path/'e', '--out', tmp_path/'notes.csv', '--resume')


def test_a_folder_against_itself_is_told():
    rows = [dict(file='e/a.wav', clean='e/a.wav', delay_ms=0., cut_ms=0., resampled=None)]
    assert '1 of 1 pairs are a file with itself' in pair_sentences(rows)[0]


# ---- comparisons

def table(change=lambda k, row: row, count: int = 12) -> list[dict]:
    return [change(k, dict(file=f'e/{k}.wav', si_sdr=str(k), lsd=str(1 + k / 9))) for k in range(count)]


def test_cells_without_a_number_are_counted_and_left_out():
    bad = table(lambda k, row: row | dict(si_sdr=('nan', 'inf', '', '-inf', None)[k] if k < 5 else row['si_sdr']))
    found = compare_tables(dict(a=table(), b=bad))
    assert found.of('b', 'si_sdr').interval.n == 7 and found.of('b', 'lsd').interval.n == 12
    assert 'si_sdr: 5 of 12 files have no number in b or a, left out' in found.remarks
    empty = table(lambda k, row: row | dict(si_sdr='nan', lsd=''))
    with pytest.raises(SpeechLossError, match='no file has a score in a and'): compare_tables(dict(a=table(), b=empty))
    for wrong in ('0,5', 'good', [1]):
        rows = table(lambda k, row: row | dict(lsd=wrong))
        with pytest.raises(SpeechLossError, match='give numbers, with a point'): compare_tables(dict(a=table(), b=rows))
    with pytest.raises(SpeechLossError, match='1 to 2 rows'): compare_tables(dict(a=table(), b=table() + table()[:2]))


def test_places_that_are_no_tables(tmp_path):
    (tmp_path/'a.csv').write_text('file,lsd\n1.wav,1\n')
    assert list(named_tables([Path('a.csv'), Path('.')])) == ['a', '']
    for other in (tmp_path, '.', tmp_path/'x.wav', tmp_path/'none.csv'): refused('compare', tmp_path/'a.csv', other)


# ---- places

def test_a_place_that_cannot_be_written_is_told_once(tmp_path, model):
    for k in range(3): put(tmp_path/f'i/{k}.wav', wave(k))
    (tmp_path/'file').write_text('')
    (tmp_path/'link').symlink_to('i')
    for target, said in (('i', 'is the source too'), ('link', 'is the source too'), ('file', 'is a file'),
                         ('file/o', 'is a file'), ('i/0.wav', 'is a file')):
        assert said in refused('enhance', tmp_path/'i', tmp_path/target, '--model', model)
    assert 'choose another place' in refused('enhance', tmp_path/'i/0.wav', tmp_path/'file/o.wav', '--model', model)
    for out in ('file/s.csv', 'i'): refused('score', tmp_path/'i', '--out', tmp_path/out)
    if Path('/proc/self').exists():      # where no folder can be made
        for name in '23': (tmp_path/f'{name}.csv').write_text(f'file,lsd\n1.wav,1\n2.wav,{name}\n')
        for option, place in (('--html', '/proc/r.html'), ('--out', '/proc/r.csv')):
            code, _, err = run('compare', tmp_path/'2.csv', tmp_path/'3.csv', option, place)
            assert code == 2 and '/proc' in err and 'cannot be found' in err


# ---- corpora

APART, JOINED = (unicodedata.normalize(form, 'é') for form in ('NFD', 'NFC'))


def test_accents_apart_or_joined_are_one_speaker_and_one_name(tmp_path):
    from speechloss.corpora import Manifest, from_pairs
    for k in range(4):
        put(tmp_path/f'sp/{(APART, JOINED)[k % 2]}/{k}.wav', wave(k, 1.))
        put(tmp_path/f'no/{k}.wav', wave(k + 20, 1.))
        put(tmp_path/f'clean/p{k}/{JOINED}.wav', wave(k, 1.))
        put(tmp_path/f'noisy/p{k}/{APART}.wav', wave(k, 1.) + .1 * wave(k + 9, 1.))
    for k in range(2): put(tmp_path/f'sp/b{k}/a.wav', wave(k + 40, 1.))
    code, _, err = run('data', 'make', tmp_path/'m.jsonl', '--speech', tmp_path/'sp', '--noise', tmp_path/'no', '-q')
    speech = [r for r in Manifest.load(tmp_path/'m.jsonl') if r.kind == 'speech']
    assert code == 0 and len(speech) == 6 and {r.speaker for r in speech} == {JOINED, 'b0', 'b1'}, err
    assert len({r.split for r in speech if r.speaker == JOINED}) == 1
    sides = tmp_path/'clean', tmp_path/'noisy'
    code, _, err = run('data', 'make', tmp_path/'p.jsonl', '--clean', sides[0], '--noisy', sides[1], '-q')
    assert code == 0 and len(Manifest.load(tmp_path/'p.jsonl')) == len(from_pairs(*sides)) == 4, err


@pytest.mark.parametrize('pattern', [APART, JOINED])
@pytest.mark.parametrize('name', [APART, JOINED])
def test_a_pattern_finds_both_spellings_of_its_accents(pattern, name):
    from speechloss.corpora.folders import speaker_finder
    from speechloss.metrics.partners import compile_pattern, found_by
    assert found_by(compile_pattern('--match', f'{pattern}[0-9]'), f'x/{name}7.wav') == f'{JOINED}7'
    assert speaker_finder(f'{pattern}[0-9]')(f'x/{name}7.wav') == f'{JOINED}7'


def test_a_name_written_both_ways_in_one_folder_is_two_files(tmp_path):
    from speechloss.corpora.folders import survey
    for name in (APART, JOINED): put(tmp_path/f'{name}.wav', wave(seconds=1.))
    if len(os.listdir(tmp_path)) < 2: pytest.skip('this file system holds one of them')
    assert {path.name for path in survey(tmp_path, kind='speech').files.values()} == {f'{APART}.wav', f'{JOINED}.wav'}


def test_a_corpus_of_odd_files_and_places(tmp_path):
    for k in range(3): put(tmp_path/f'sp/s{k}/u.wav', wave(k, 1.)), put(tmp_path/f'no/n{k}.wav', wave(k + 9, 1.))
    spoilt = wave()
    spoilt[3] = np.nan
    for name, x in dict(zero=wave(seconds=0), silent=0 * wave(), nan=spoilt).items():
        put(tmp_path/f'sp/s0/{name}.wav', x, subtype='FLOAT')
    (tmp_path/'sp/s0/text.wav').write_text('no sound')
    (tmp_path/'sp/s0/x.wav').mkdir()
    for name, to in (('loop', '..'), ('self.wav', 'self.wav')): (tmp_path/'sp/s0'/name).symlink_to(to)
    os.mkfifo(tmp_path/'sp/s0/pipe.wav')
    folders = '--speech', tmp_path/'sp', '--noise', tmp_path/'no', '-q'
    code, _, err = run('data', 'make', tmp_path/'m.jsonl', *folders)
    assert code == 0 and err.count('left out: ') == 5 and 'Traceback' not in err, err
    assert run('data', 'check', tmp_path/'m.jsonl', '-q')[0] == 0
    (tmp_path/'d.jsonl').mkdir()
    (tmp_path/'file').write_text('')
    for place, said in (('d.jsonl', 'is a folder'), ('file/m.jsonl', 'cannot be written')):
        assert said in refused('data', 'make', tmp_path/place, *folders, '--force')
    for sides in (('--speech', '--noise'), ('--clean', '--noisy')):
        args = [part for side in sides for part in (side, tmp_path/'sp')]
        assert 'is given for both sides' in refused('data', 'make', tmp_path/'q.jsonl', *args)
