"""The corpora `desk` and `voicebank-demand`: their table, their builders, and what can go wrong on the way."""
import hashlib
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import RATE, hiss, refuses_corpus

from speechloss.common.files import sha256
from speechloss.corpora import desk, download, get, tables, voicebank
from speechloss.corpora.download import read_listing
from speechloss.signal import load, save


# The table -----------------------------------------------------------------------------------

def test_nothing_is_in_two_splits():
    rows = [r for r in read_listing('desk') if not r['reason']]
    assert len({r['id'] for r in rows}) == len(rows) == 1502
    for kind, key in (('speech', 'speaker'), ('noise', 'noise'), ('noise', 'group'), ('room', 'group')):
        home = {}
        for r in rows:
            if r['kind'] == kind and r[key]: assert home.setdefault(r[key], r['split']) == r['split'], r
        assert home
    assert len({r['sha256'] for r in rows if r['kind'] != 'room'}) == sum(r['kind'] != 'room' for r in rows)


def test_the_test_set_is_large_and_unheard():
    rows = [r for r in read_listing('desk') if not r['reason']]
    speakers = {s: {r['speaker'] for r in rows if r['kind'] == 'speech' and r['split'] == s}
                for s in ('train', 'valid', 'test')}
    assert (len(speakers['train']), len(speakers['valid']), len(speakers['test'])) == (221, 25, 48)
    unheard = [r for r in rows if r['kind'] == 'noise' and r['split'] == 'test']
    assert len({r['group'] or r['id'] for r in unheard}) == 39
    laptop = {(r['sha256'], r['split']) for r in read_listing('laptop')}
    shared = {r['sha256'] for r in rows} & {s for s, _ in laptop}
    assert shared and all((r['sha256'], r['split']) in laptop for r in rows if r['sha256'] in shared)


def test_a_noisy_reference_is_left_out_whole_speakers_too():
    talk = [r for r in read_listing('desk') if r['kind'] == 'speech']
    by_speaker = {}
    for r in talk: by_speaker.setdefault(r['speaker'], []).append(float(r['floor_db']))
    for r in talk:
        floors = sorted(by_speaker[r['speaker']])
        median = (floors[(len(floors) - 1) // 2] + floors[len(floors) // 2]) / 2
        if max(float(r['floor_db']), median) > -30: assert r['reason'] == 'noise floor', r
        else: assert not r['reason'] or abs(max(float(r['floor_db']), median) + 30) < .06, r
    other = {r['speaker']: r['split'] for r in talk if 'test-other' in r['path']}
    assert sorted(other.values()) == ['left out'] * 6 + ['test'] * 4
    assert not any(r['noise'] == 'sneeze' and r['split'] != 'left out' for r in read_listing('desk'))


def test_every_file_says_whose_it_is():
    rows = read_listing('desk')
    assert all(r['licence'] and r['author'] and r['origin'].startswith('http') for r in rows)
    assert all(len(r['sha256']) == 64 and r['repository'] in desk.COMMITS for r in rows)
    assert {r['licence'] for r in rows} == {
        'CC-BY-4.0', 'CC-BY-3.0', 'CC-BY', 'CC0-1.0', 'Public-Domain', 'Apache-2.0', 'MIT', 'CC-BY-SA-4.0',
        'free for commercial and non-commercial use'}


# Building desk -------------------------------------------------------------------------------

@pytest.fixture
def small(tmp_path, monkeypatch):
    "A desk of six files in a folder `given`, published as WAV of two ears, WAV and FLAC"
    given, rows = tmp_path / 'given', []
    for k, (kind, split) in enumerate((('speech', 'train'), ('speech', 'test'), ('noise', 'train'), ('noise', 'test'),
                                       ('room', 'train'), ('speech', 'left out'))):
        name = f'{kind}{k}_l'
        wave = torch.stack([hiss(seed=k), hiss(seed=k + 50)]) if kind == 'room' else hiss(2, seed=k)
        path = save(given / f'{name}{".flac" if k == 0 else ".wav"}', wave, 48000 if kind == 'room' else RATE)
        rows.append(dict(
            id=f'src/{name}', kind=kind, split=split, speaker=f's{k}' if kind == 'speech' else '',
            group='hall' if kind == 'room' else '', noise=f'k{k}' if kind == 'noise' else '',
            licence='CC0-1.0', author='Ann', origin='https://example.org', repository='bbc/bbcrd-brirs',
            path=f'a b/{path.name}', sha256=sha256(path),
            copy_sha256='', start='8000' if k == 1 else '', frames='16000' if k == 1 else '',
            reason='noise floor' if split == 'left out' else ''))
    monkeypatch.setattr(desk, 'read_listing', lambda name: rows)
    return given, rows


def test_desk_from_a_folder(small, tmp_path):
    given, _ = small
    made = get('desk', from_dir=given, home=tmp_path / 'home')
    assert [len(made.speech()), len(made.noise()), len(made.rooms()), len(made.skipped)] == [2, 2, 1, 1]
    cut = made.speech('test')[0]
    assert (cut.start, cut.frames) == (8000, 16000)
    assert (load(cut.path)[0] - hiss(2, seed=1)[8000:24000]).abs().max() < 2**-14
    room = load(made.rooms('train')[0].path)[0]
    assert len(room) == round(RATE * RATE / 48000) and abs(room.abs().max() - desk.ROOM_PEAK) < 1e-3
    assert {r.noise for r in made.noise()} == {'k2', 'k3'} and made.summary()['splits']['train']['rooms'] == 1
    assert get('desk', home=tmp_path / 'home').hash == made.hash


def test_a_changed_file_is_one_sentence(small, tmp_path):
    given, _ = small
    save(given / 'noise2_l.wav', hiss(seed=99), RATE)
    refuses_corpus(lambda: get('desk', from_dir=given, home=tmp_path / 'home'), 'changed', 'noise2_l.wav')


def test_a_killed_build_goes_on(small, tmp_path, monkeypatch):
    given, _ = small
    place, count = tables._place, [0]

    def killed(*args):
        count[0] += 1
        if count[0] == 3: raise KeyboardInterrupt
        return place(*args)
    monkeypatch.setattr(tables, '_place', killed)
    with pytest.raises(KeyboardInterrupt): get('desk', from_dir=given, home=tmp_path / 'home')
    assert not (tmp_path / 'home/corpora/desk/manifest.jsonl').exists()
    assert len(get('desk', from_dir=given, home=tmp_path / 'home')) == 5


def test_a_file_of_several_rows_is_fetched_once(small, tmp_path, monkeypatch):
    given, rows = small
    rows.append(dict(rows[4], id='src/room4_r'))
    asked = []

    def fetch(wanted):
        for url, target, _ in wanted:
            asked.append(url)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((given / Path(url).name).read_bytes())
    monkeypatch.setattr(tables, 'download', fetch)
    made = get('desk', home=tmp_path / 'home')
    assert len(made.rooms()) == 2 and len(asked) == 5 and all('/a%20b/' in url for url in asked)
    assert not (tmp_path / 'home/corpora/desk/published').exists()


# VoiceBank-DEMAND ----------------------------------------------------------------------------

NAMES = ('p232_001', 'p257_002', 'p226_003', 'p228_004')


def official(root):
    for k, name in enumerate(NAMES):
        part = 'testset_wav' if name < 'p226' or name[:4] in ('p232', 'p257') else 'trainset_28spk_wav'
        for j, side in enumerate(('clean', 'noisy')):
            save(root / f'{side}_{part}' / f'{name}.wav', hiss(3, seed=2 * k + j), 48000)
    return root


def test_the_official_folders(tmp_path):
    made = get('voicebank-demand', from_dir=official(tmp_path / 'given'), home=tmp_path / 'home')
    assert {r.id: r.split for r in made.pairs()} == dict(zip(NAMES, ('test', 'test', 'valid', 'train')))
    assert all((r.sample_rate, r.frames) == (RATE, RATE) for r in made)
    assert {r.speaker for r in made} == {n[:4] for n in NAMES} and not made.skipped
    damaged = Path(made.recordings[0].clean_path)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert download.open_corpus(tmp_path / 'home/corpora/voicebank-demand') is None    # clean files are checked too


def test_a_partial_copy_keeps_its_pairs(tmp_path):
    for k, name in enumerate(NAMES):
        save(tmp_path / 'given/noisy' / f'{name}.flac', hiss(seed=k), RATE)
    save(tmp_path / 'given/clean/p232_001.flac', hiss(seed=9), RATE)
    save(tmp_path / 'given/clean/p257_002.flac', hiss(2, seed=9), RATE)
    made = get('voicebank-demand', from_dir=tmp_path / 'given', home=tmp_path / 'home')
    assert [r.id for r in made] == ['p232_001'] and 'partial: 1 of 12396' in made.note
    reasons = dict(made.skipped)
    assert reasons['p226_003.flac'] == 'has no clean reference' and 'samples' in reasons['p257_002.flac']


def test_a_folder_without_it(tmp_path):
    (tmp_path / 'empty').mkdir()
    refuses_corpus(lambda: get('voicebank-demand', from_dir=tmp_path / 'empty', home=tmp_path / 'home'),
                   'clean_testset_wav')


def test_too_little_space_is_said_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(voicebank.shutil, 'disk_usage', lambda p: type('U', (), dict(free=10**9)))
    monkeypatch.setattr(voicebank, 'download_archive', lambda *a: pytest.fail('it started'))
    refuses_corpus(lambda: get('voicebank-demand', home=tmp_path / 'home'), '1.0 GB free', 'SPEECHLOSS_HOME')


@pytest.fixture
def archives(tmp_path, monkeypatch):
    "The four archives on a server of this machine that can break off; returns (folder, what was asked for, faults)"
    folder, made, files, asked, faults = official(tmp_path / 'given'), [], {}, [], []
    for a in voicebank.ARCHIVES:
        with zipfile.ZipFile(tmp_path / f'{a.name}.zip', 'w') as z:
            paths = sorted((folder / a.name).glob('*.wav'))
            for p in paths: z.write(p, f'{a.name}/{p.name}')
            z.writestr(f'__MACOSX/{a.name}/._x.wav', b'')
        data = (tmp_path / f'{a.name}.zip').read_bytes()
        files[f'/{a.address}/content'] = data
        made.append(a._replace(size=len(data), md5=hashlib.md5(data).hexdigest(), files=len(paths)))

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            data, wanted = files[self.path], self.headers.get('Range')
            asked.append((self.path, wanted))
            start = int(wanted.split('=')[1].rstrip('-')) if wanted and 'whole' not in faults else 0
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', str(len(data) - start))
            self.end_headers()
            cut = 'cut' in faults
            if cut: faults.remove('cut')
            self.wfile.write(data[start:start + 1000] if cut else data[start:])

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(voicebank, 'DATASHARE', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(voicebank, 'ARCHIVES', tuple(made))
    monkeypatch.setattr(voicebank.time, 'sleep', lambda s: None)
    yield tmp_path, asked, faults
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('fault', [['cut'], ['cut', 'whole']])
def test_a_broken_download_goes_on(archives, fault):
    root, asked, faults = archives
    faults += fault
    made = get('voicebank-demand', home=root / 'home')
    assert len(made) == 4 and asked[1] == (asked[0][0], 'bytes=1000-') and len(asked) == 5
    assert not (root / 'home/corpora/voicebank-demand/published').exists()
    assert made.hash == get('voicebank-demand', from_dir=root / 'given', home=root / 'other').hash


def test_what_has_arrived_waits_for_the_next_call(archives, monkeypatch):
    root, asked, faults = archives
    target, url = root / 'a.zip', f'{voicebank.DATASHARE}/{voicebank.ARCHIVES[0].address}/content'
    faults += ['cut']
    refuses_corpus(lambda: voicebank.download_archive(url, target, voicebank.ARCHIVES[0].md5, attempts=1),
                   'broke', '--from')
    assert target.with_name('a.zip.part').stat().st_size == 1000
    voicebank.download_archive(url, target, voicebank.ARCHIVES[0].md5)
    assert target.is_file() and asked[-1][1] == 'bytes=1000-'
    refuses_corpus(lambda: voicebank.download_archive(url, root / 'b.zip', '0' * 32, attempts=2), 'MD5')


def test_archives_in_a_folder(archives):
    root, _, _ = archives
    made = get('voicebank-demand', from_dir=root, home=root / 'home')
    assert len(made) == 4 and soundfile.info(made.recordings[0].clean_path).samplerate == RATE
