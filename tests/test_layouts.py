"""Corpora as they lie on people's disks: what is recognised, who is in which split, and what is refused.

The published layouts are made in miniature, of noise, under their published names.
"""
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import soundfile
import torch
from helpers import RATE, hiss, refuses_corpus
from hypothesis import assume, given, settings, strategies as st
from typer.testing import CliRunner

from speechloss.cli.app import app
from speechloss.common.errors import CorpusError, SpeechLossError
from speechloss.corpora import audit, from_layout, get, Manifest
from speechloss.corpora.audit import audit_rows, is_clipped
from speechloss.corpora.folders import (
    deal, make_manifest, name_speakers, speaker_finder, split_rows, survey, survey_pairs)
from speechloss.corpora.layouts import LAYOUTS, doubt_speakers, pieces_of, recognise, speakers_of
from speechloss.signal import save


def put(root, *names, rate=RATE, seconds=.05):
    "A file of noise of its own under each name"
    for name in names: save(root / name, hiss(1., seed=crc32(name.encode()))[:int(seconds * RATE)], rate)
    return root


def put_pair(root, clean, noisy, rate=RATE):
    wave = hiss(seed=crc32(clean.encode()))[:800]
    save(root / clean, wave, rate)
    save(root / noisy, wave + hiss(seed=crc32(noisy.encode()))[:800] * .3, rate)


def speakers_in(manifest, split):
    return {r.speaker for r in manifest if r.split == split and r.kind in ('speech', 'pair')}


def command(*args):
    "What the command says: its exit code, stdout, stderr"
    return CliRunner().invoke(app, ['data', *map(str, args)])


# The published layouts -----------------------------------------------------------------------

def voicebank(root):
    for who, part in (('p226', 'trainset_28spk'), ('p287', 'trainset_28spk'), ('p227', 'trainset_28spk'),
                      ('p228', 'trainset_28spk'), ('p232', 'testset'), ('p257', 'testset')):
        for n in (1, 2):
            put_pair(root, f'clean_{part}_wav/{who}_{n:03}.wav', f'noisy_{part}_wav/{who}_{n:03}.wav', 48000)
    return dict(p226='valid', p287='valid', p227='train', p228='train', p232='test', p257='test')


def librispeech(root):
    place = {'train-clean-100': ('19', '26'), 'dev-clean': ('84',), 'test-clean': ('61', '121')}
    for subset, readers in place.items():
        for who in readers:
            for chapter in (198, 227): put(root, f'LibriSpeech/{subset}/{who}/{chapter}/{who}-{chapter}-0000.flac')
    return {'19': 'train', '26': 'train', '84': 'valid', '61': 'test', '121': 'test'}


def libritts(root):
    place = {'train-clean-360': ('14', '16'), 'dev-other': ('116',), 'test-other': ('367',)}
    for subset, readers in place.items():
        for who in readers:
            for chapter in (208, 209):
                name = f'{subset}/{who}/{chapter}/{who}_{chapter}_000001_000000'
                put(root, f'{name}.wav', rate=24000)
                (root / f'{name}.normalized.txt').write_text('A text.')
    return {'14': 'train', '16': 'train', '116': 'valid', '367': 'test'}


def vctk(root):
    for who in ('p225', 'p226', 'p227', 'p280', 's5'):
        for n in (1, 2):
            for mic in (1,) if who == 'p280' else (1, 2):
                put(root, f'wav48_silence_trimmed/{who}/{who}_{n:03}_mic{mic}.flac', rate=48000)
    return dict.fromkeys(('p225', 'p226', 'p227', 'p280', 's5'))


def dns(root):
    for k in range(8):
        reader = 6709 + k // 2
        put(root, f'datasets_fullband/clean_fullband/read_speech/book_00000_chp_0009_reader_{reader:05}_{k}.wav',
            rate=48000)
    put(root, *(f'datasets_fullband/clean_fullband/vctk_wav48_silence_trimmed/{who}/{who}_001_mic1.flac'
                for who in ('p225', 'p226')))
    put(root, *(f'datasets_fullband/clean_fullband/german_speech/{k}/{c}.wav' for k in (1, 2) for c in 'ab'))
    put(root, *(f'datasets_fullband/noise_fullband/door_Freesound_validated_{k}_{piece}.wav'
                for k in (101, 102, 103, 104) for piece in (0, 1)))
    put(root, *(f'datasets_fullband/impulse_responses/SLR26/Room{k}/Room{k}-{p}.wav' for k in 'ABC' for p in '12'))
    return dict.fromkeys(('06709', '06710', '06711', '06712', 'p225', 'p226', 'german_speech'))


def ears(root):
    for who in ('p001', 'p002', 'p100', 'p101', 'p102', 'p107'):
        put(root, *(f'EARS/{who}/{style}.wav' for style in ('emo_anger_sentences', 'rainbow_01_regular')), rate=48000)
    return dict(p001='train', p002='train', p100='valid', p101='valid', p102='test', p107='test')


def pairs(root):
    for who in ('ann', 'bob', 'cat', 'dan'):
        for n in '12': put_pair(root, f'set/clean/{who}/{n}.wav', f'set/noisy/{who}/{n}.wav')
    return dict.fromkeys(('ann', 'bob', 'cat', 'dan'))


PUBLISHED = {'voicebank-demand': voicebank, 'librispeech': librispeech, 'libritts': libritts, 'vctk': vctk, 'dns': dns,
             'ears': ears, 'pairs': pairs}
each_layout = pytest.mark.parametrize('layout', PUBLISHED)


@each_layout
def test_a_published_layout_is_recognised_wherever_it_lies(layout, tmp_path):
    wanted = PUBLISHED[layout](tmp_path / 'a' / 'any name')
    for folder in (tmp_path / 'a' / 'any name', tmp_path / 'a'):
        found = survey(folder).found
        assert found.layout == layout and found.why
    made = from_layout(tmp_path / 'a' / 'any name')
    placed = {r.speaker: r.split for r in made if r.kind in ('speech', 'pair')}
    assert placed.keys() == wanted.keys()
    assert all(split in (None, placed[who]) for who, split in wanted.items()), placed
    for split in ('train', 'valid', 'test'): assert speakers_in(made, split)
    assert audit(made) == []


@each_layout
def test_no_speaker_is_in_two_splits_by_the_command(layout, tmp_path):
    wanted = PUBLISHED[layout](tmp_path / 'top')
    done = command('make', tmp_path / 'm.jsonl', tmp_path / 'top')
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / 'm.jsonl')
    assert f'{tmp_path / "top"}: {layout}, ' in done.stderr
    assert 'split\tkind\tfiles\thours\tspeakers\trecordings' in done.stderr and 'make: read' in done.stderr
    made = get(str(tmp_path / 'm.jsonl'))
    by_split = [speakers_in(made, split) for split in ('train', 'valid', 'test')]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == len(wanted)
    checked = command('check', tmp_path / 'm.jsonl')
    assert checked.exit_code == 0 and 'is sound' in checked.stderr, checked.stdout


@each_layout
def test_a_layout_can_be_asked_for_and_refused(layout, tmp_path):
    PUBLISHED[layout](tmp_path / 'top')
    assert survey(tmp_path / 'top', layout=layout).found.layout == layout
    assert survey(tmp_path / 'top', layout='none').found.layout == 'folders'
    put(tmp_path / 'other', 'ann/a.wav', 'bob/b.wav')
    refuses_corpus(lambda: survey(tmp_path / 'other', layout=layout), layout, LAYOUTS[layout][0], '--layout')
    refuses_corpus(lambda: survey(tmp_path / 'other', layout='timit'), "'timit'", 'vctk', 'none')


def test_one_microphone_of_two(tmp_path):
    vctk(tmp_path)
    (tmp_path / 'wav48_silence_trimmed/p225/p225_001_mic1.flac').unlink()
    made = from_layout(tmp_path)
    assert len(made.speech()) == 10 and {r.sample_rate for r in made} == {48000}
    assert sum('_mic2' in r.id for r in made) == 1
    assert 'the other microphone' in made.skipped[0][1] and '7 files' in made.skipped[0][1]


def test_pieces_and_rooms_stay_together(tmp_path):
    dns(tmp_path)
    made = from_layout(tmp_path)
    for kind, count in (('noise', 4), ('room', 3)):
        home = {}
        for r in made.of(kind): home.setdefault(r.group, set()).add(r.split)
        assert len(home) == count and all(len(splits) == 1 for splits in home.values())
    rows = {(row['split'], row['kind']): row for row in split_rows(made)}
    assert sum(row['recordings'] for (_, kind), row in rows.items() if kind == 'noise') == 4
    assert sum(row['files'] for (_, kind), row in rows.items() if kind == 'noise') == 8


@pytest.mark.parametrize('names,recordings', [
    (('cafe_0', 'cafe_1', 'rain-3', 'rain-4', 'wind'), 3),
    (('noise-free-sound-0000', 'noise-free-sound-0001', 'noise-sound-bible-0000'), 3),   # MUSAN counts recordings
    (('1-100032-A-0', '1-100032-B-0', '2-5-A', '3-7-A-2'), 3),                           # ESC-50, ESC-10
    (('100032-3-0-0', '100032-3-0-1', '7-1-0-0', '8-1-2-0'), 3),                         # UrbanSound8K
    (('a/ch01', 'a/ch02', 'b/ch01', 'b/ch02', 'c/ch01'), 3),                             # DEMAND
    (('x', 'y', 'z'), 3)])
def test_recordings_by_common_stem(names, recordings):
    assert len(set(pieces_of(f'{n}.wav' for n in names).values())) == recordings


def test_splits_that_the_folders_name(tmp_path):
    "As SGMSE and EARS-WHAM have it, and speech in split folders"
    for split, who in (('train', 'p226'), ('train', 'p230'), ('valid', 'p227'), ('test', 'p232')):
        put_pair(tmp_path / 'vb', f'{split}/clean/{who}_001.wav', f'{split}/noisy/{who}_001.wav')
        put_pair(tmp_path / 'ew', f'{split}/clean/{who}/00001.wav', f'{split}/noisy/{who}/00001_3.2dB.wav')
        put(tmp_path / 'sp', f'{split}/{who}/session/1.wav')
    wanted = dict(p226='train', p230='train', p227='valid', p232='test')
    for folder in ('vb', 'ew', 'sp'):
        assert {r.speaker: r.split for r in from_layout(tmp_path / folder)} == wanted, folder


def test_mixtures_of_the_dns_challenge_are_paired_by_number(tmp_path):
    for k in range(4):
        put_pair(tmp_path, f'clean/clean_fileid_{k}.wav', f'noisy/book_7_chp_1_reader_{k // 2}_0_snr5_fileid_{k}.wav')
    made = from_layout(tmp_path)
    assert len(made.pairs()) == 4 and {r.speaker for r in made} == {'0', '1'}
    assert all(Path(r.path).stem[-1] == Path(r.clean_path).stem[-1] for r in made)


def test_pairs_by_the_end_of_the_name(tmp_path):
    for who in 'abc': put_pair(tmp_path, f'{who}/1_clean.wav', f'{who}/1_noisy.wav')
    put(tmp_path, 'a/2_noisy.wav', 'a/3_clean.wav')
    made = from_layout(tmp_path)
    assert len(made.pairs()) == 3 and {r.speaker for r in made} == set('abc')
    assert {Path(p).name: why for p, why in made.skipped} == {
        '2_noisy.wav': 'has no clean file of the same name', '3_clean.wav': 'has no noisy file of the same name'}


def test_a_folder_of_speech_and_one_of_noise(tmp_path):
    put(tmp_path / 'speech', *(f'{who}/{n}.wav' for who in ('ann', 'bob', 'cat') for n in '12'))
    put(tmp_path / 'my noises', 'rain.wav', 'wind.wav', 'saw.wav')
    put(tmp_path / 'all', *(f'speech/{who}/1.wav' for who in 'abc'), 'noise/rain.wav', 'noise/saw.wav', 'noise/x.wav')
    (tmp_path / 'my_noise').symlink_to(tmp_path / 'my noises')
    for folders in ((tmp_path / 'speech', tmp_path / 'my_noise'), (tmp_path / 'all',)):
        (tmp_path / 'my noises').rename(tmp_path / 'noise') if (tmp_path / 'my noises').exists() else None
        folders = [f if f.name != 'my_noise' else tmp_path / 'noise' for f in folders]
        made = from_layout(*folders)
        assert len(made.noise()) == 3 and {r.kind for r in made} == {'speech', 'noise'}
    inner = librispeech(tmp_path / 'both/speech')
    put(tmp_path / 'both', *(f'noise/{n}.wav' for n in ('rain', 'saw', 'x')))
    made = from_layout(tmp_path / 'both')
    assert {r.speaker: r.split for r in made.speech()} == inner and len(made.noise()) == 3


# The traps of users --------------------------------------------------------------------------

def test_trap_a1_chapters_are_not_speakers(tmp_path):
    "LibriSpeech without its subsets, by --speech and --noise; and a manifest that somebody made with chapters"
    for who in range(1688, 1698):
        put(tmp_path / 'libri', *(f'{who}/{who + c}/{who}-{who + c}-{n:04}.flac' for c in (7, 900) for n in (0, 1)))
    put(tmp_path / 'noise', 'rain.wav', 'wind.wav', 'saw.wav')
    done = command('make', tmp_path / 'm.jsonl', '--speech', tmp_path / 'libri', '--noise', tmp_path / 'noise')
    assert done.exit_code == 0 and 'librispeech' in done.stderr
    made = get(str(tmp_path / 'm.jsonl'))
    home = {}
    for r in made.speech(): home.setdefault(Path(r.path).parts[-3], set()).add(r.split)
    assert len(home) == 10 and all(len(splits) == 1 for splits in home.values())
    assert command('check', tmp_path / 'm.jsonl').exit_code == 0

    split = deal(dict.fromkeys({Path(r.path).parent.name for r in made.speech()}, ''))
    chapters = [r if r.kind == 'noise' else replace(
        r, speaker=Path(r.path).parent.name, group='', split=split[Path(r.path).parent.name]) for r in made]
    Manifest(tuple(chapters)).check().save(tmp_path / 'wrong.jsonl')       # which contradicts nothing
    done = command('check', tmp_path / 'wrong.jsonl')
    assert done.exit_code == 2 and "by file name (libri)" in done.stderr and 'train' in done.stderr
    assert any(row.startswith('speakers\tbad\t') for row in done.stdout.splitlines())


def test_trap_a2_voicebank_in_one_call(tmp_path):
    wanted = voicebank(tmp_path / 'vb')
    done = command('make', tmp_path / 'all.jsonl', tmp_path / 'vb')
    made = get(str(tmp_path / 'all.jsonl'))
    assert done.exit_code == 0 and {r.speaker: r.split for r in made} == wanted
    assert {r.sample_rate for r in made} == {48000} and len(made.pairs()) == 12

    done = command('make', tmp_path / 'train.jsonl', '--clean', tmp_path / 'vb/clean_trainset_28spk_wav',
                   '--noisy', tmp_path / 'vb/noisy_trainset_28spk_wav')
    made = get(str(tmp_path / 'train.jsonl'))
    assert done.exit_code == 0 and {r.speaker: r.split for r in made} == {
        who: split for who, split in wanted.items() if split != 'test'}
    assert {r.id for r in made} >= {'p226_001'} and 'no speech is in test: ' in done.stderr

    for folder in ('clean', 'noisy'):          # the same in names that tell nothing
        put(tmp_path / 'flat' / folder, *(f'{k}.wav' for k in range(6)))
    done = command('make', tmp_path / 'flat.jsonl', tmp_path / 'flat')
    assert done.exit_code == 2 and not (tmp_path / 'flat.jsonl').exists()
    said = done.stderr.splitlines()[-1]
    assert 'all 6 files have no speaker' in said and '--speaker REGEX' in said and '--split' in said


def test_the_training_set_alone_has_its_validation_speakers(tmp_path):
    voicebank(tmp_path)
    shutil.rmtree(tmp_path / 'clean_testset_wav')
    shutil.rmtree(tmp_path / 'noisy_testset_wav')
    made = from_layout(tmp_path)
    assert speakers_in(made, 'valid') == {'p226', 'p287'} and not speakers_in(made, 'test')


def test_the_hash_does_not_know_the_place(tmp_path):
    pairs(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'elsewhere' / 'b')
    assert from_layout(tmp_path / 'a').hash == from_layout(tmp_path / 'elsewhere' / 'b').hash
    one = survey_pairs(tmp_path / 'a/set/clean', tmp_path / 'a/set/noisy')
    two = survey_pairs(tmp_path / 'elsewhere/b/set/clean', tmp_path / 'a/set/noisy')
    assert make_manifest([one]).hash == make_manifest([two]).hash


def test_one_subset_alone_is_dealt(tmp_path):
    for who in range(30): put(tmp_path, f'train-clean-100/{who}/5/{who}-5-0000.flac')
    made = from_layout(tmp_path)
    assert all(speakers_in(made, split) for split in ('train', 'valid', 'test'))
    assert from_layout(tmp_path, split='train').summary()['splits']['train']['speakers'] == 30


def test_subsets_that_are_given_one_by_one(tmp_path):
    wanted = librispeech(tmp_path)
    made = from_layout(*(tmp_path / 'LibriSpeech' / s for s in ('train-clean-100', 'dev-clean', 'test-clean')))
    assert {r.speaker: r.split for r in made} == wanted
    put(tmp_path, *(f'{split}/{who}/1.wav' for split in ('train', 'test') for who in (f'{split}1', f'{split}2')))
    made = from_layout(tmp_path / 'train', tmp_path / 'test')
    assert speakers_in(made, 'test') == {'test1', 'test2'} and speakers_in(made, 'valid') < {'train1', 'train2'}


def test_a_folder_of_several_corpora(tmp_path):
    "Readers are told apart where names tell them; what else lies there is coarse, and said"
    librispeech(tmp_path / 'all')
    put(tmp_path / 'all', *(f'mine/{who}/{n}.wav' for who in ('ann', 'bob') for n in '12'))
    found = survey(tmp_path / 'all').found
    assert found.layout == 'folders' and 'not told apart' in found.why
    assert {r.speaker for r in found.roles} == {'19', '26', '84', '61', '121', 'mine'}
    for k in range(30): put(tmp_path / 'more', f'noisy/p232_{k:03}.wav', f'a{k % 4}/x{k}.wav')
    put(tmp_path / 'more', 'clean/p232_001.wav')                 # one pair in sixty files makes no VoiceBank
    assert survey(tmp_path / 'more').found.layout == 'folders'


# Who speaks ----------------------------------------------------------------------------------

@pytest.mark.parametrize('paths,wanted', [
    (('ann/1.wav', 'bob/2.wav'), {'ann', 'bob'}),
    (('ann/s1/1.wav', 'ann/s2/2.wav', 'bob/s1/3.wav'), {'ann', 'bob'}),
    (('wav/ann/1.wav', 'wav/bob/2.wav'), {'ann', 'bob'}),
    (('ann/wav/1.wav', 'bob/wav/2.wav'), {'ann', 'bob'}),
    (('ann/p001_002.wav', 'ann/p002_002.wav', 'bob/p001_003.wav'), {'ann', 'bob'}),      # pages, not speakers
    (('p225_001.wav', 'p226_002.wav'), {'p225', 'p226'}),
    (('wavs/19-198-0000.wav', 'wavs/26-1-0001.wav'), {'19', '26'}),
    (('read/book_1_reader_07_0.wav', 'read/book_1_reader_08_0.wav', 'sung/a.wav'), {'07', '08', 'sung'}),
    (('1.wav', '2.wav'), {''})])
def test_speakers_of_a_plain_folder(paths, wanted):
    assert set(speakers_of(paths)[0].values()) == wanted


@pytest.mark.parametrize('paths,part', [
    (('1.wav', '2.wav', '3.wav'), 'no speaker in their paths'),
    (('ann/1.wav', 'ann/s/2.wav'), "one speaker, 'ann'"),
    (('wav/1.wav', 'ann/2.wav', 'bob/1.wav'), "'wav' is called like a folder"),
    (('ann/1.wav', 'bob/2.wav', '3.wav'), '1 files have no speaker')])
def test_speakers_that_cannot_be_are_refused(paths, part, tmp_path):
    put(tmp_path, *paths)
    refuses_corpus(lambda: from_layout(tmp_path), part, '--speaker REGEX', '--split')
    assert {r.split for r in from_layout(tmp_path, split='test')} == {'test'}


def test_speakers_that_count_the_files(tmp_path):
    put(tmp_path, *(f'x{k:03}.wav' for k in range(1, 7)))
    refuses_corpus(lambda: from_layout(tmp_path, speaker=r'x(\d+)'), "001 to 006 count the files", '--speaker')
    done = command('make', tmp_path / 'm.jsonl', tmp_path, '--speaker', r'x\d+')
    assert done.exit_code == 0 and "each of the 6 files has a speaker of its own, such as 'x001'" in done.stderr


def test_a_published_corpus_may_have_one_file_a_speaker():
    found = recognise(f'{who}-1-0000.wav' for who in range(20))
    assert found.layout == 'librispeech' and doubt_speakers(found.roles, published=found.published) == []


def test_speaker_sees_the_path_below_the_folder(tmp_path):
    put(tmp_path, *(f'{language}/{who}/{n}.wav' for language, who in (('de', 'ann'), ('de', 'bob'), ('en', 'cat'))
                    for n in '12'))
    made = from_layout(tmp_path, speaker='^[a-z]+/([a-z]+)/')
    assert {r.speaker for r in made} == {'ann', 'bob', 'cat'}
    assert speaker_finder('reader_([0-9]+)_')('read/book_1_reader_06709_3.wav') == '06709'
    with pytest.raises(SpeechLossError, match='no regular expression'): speaker_finder('(p')
    source = name_speakers(survey(tmp_path), '^de/([a-z]+)')
    assert len(source.found.roles) == 4 and all('finds nothing' in why for why in source.found.left_out.values())
    for side in ('clean', 'noisy'): put(tmp_path / side, 'x1/1.wav', 'x2/1.wav', 'x3/1.wav')
    found = name_speakers(survey_pairs(tmp_path / 'clean', tmp_path / 'noisy'), '^x[0-9]')
    assert {r.speaker for r in found.found.roles} == {'x1', 'x2', 'x3'}


# Splits --------------------------------------------------------------------------------------

def test_files_and_speakers_that_are_added_move_nobody(tmp_path):
    put(tmp_path, *(f's{k}/1.wav' for k in range(40)))
    before = {r.speaker: r.split for r in from_layout(tmp_path)}
    put(tmp_path, 's3/2.wav', 'new/1.wav', 'newer/1.wav')
    after = {r.speaker: r.split for r in from_layout(tmp_path)}
    assert {who: after[who] for who in before} == before and set(before.values()) == {'train', 'valid', 'test'}


@given(units=st.dictionaries(st.text(min_size=1), st.sampled_from(['', '', 'train', 'valid', 'test']), max_size=12),
       valid=st.sampled_from([0, .1, .3]), test=st.sampled_from([0, .2, .5]), seed=st.integers(0, 9))
def test_deal_keeps_what_is_published_and_leaves_no_split_empty(units, valid, test, seed):
    dealt = deal(units, valid=valid, test=test, seed=seed)
    assert dealt.keys() == units.keys() and set(dealt.values()) <= {'train', 'valid', 'test'}
    moved = {u for u, split in units.items() if split and dealt[u] != split}
    assert not moved or '' not in units.values() and 'valid' not in units.values() \
        and {(units[u], dealt[u]) for u in moved} == {('train', 'valid')}
    free = sum(split == '' for split in units.values())
    if free >= 3 and valid and test: assert set(dealt.values()) == {'train', 'valid', 'test'}
    if not (valid or free == 0): assert 'valid' not in set(dealt.values()) - set(units.values())


def test_a_reader_on_both_sides_is_left_out_of_the_training(tmp_path):
    librispeech(tmp_path)
    put(tmp_path, 'LibriSpeech/train-clean-100/61/7/61-7-0000.flac', 'LibriSpeech/dev-clean/19/7/19-7-0000.flac')
    made = from_layout(tmp_path)
    assert speakers_in(made, 'test') == {'61', '121'} and speakers_in(made, 'valid') == {'84', '19'}
    assert speakers_in(made, 'train') == {'26'}
    reasons = {Path(p).name: why for p, why in made.skipped}
    assert reasons['61-7-0000.flac'] == 'is published in train, and 61 is in test too'


def test_a_copy_under_another_speaker_is_left_out(tmp_path):
    "The same sound, as FLAC and as WAV; of one speaker it may be there twice"
    put(tmp_path, *(f's{k}/1.wav' for k in range(5)))
    for copy in ('s4/2.flac', 's0/2.flac'):
        soundfile.write(tmp_path / copy, *soundfile.read(tmp_path / 's0/1.wav', dtype='int16'))
    made = from_layout(tmp_path)
    assert [Path(p).relative_to(tmp_path).as_posix() for p, _ in made.skipped] == ['s4/2.flac']
    assert 's0/1.wav' in made.skipped[0][1] and len(made) == 6


def test_equal_ids_are_told_apart(tmp_path):
    put(tmp_path / 'one', 'a/1.wav', 'a/1.flac', 'b/1.wav', 'c/1.wav')
    put(tmp_path / 'two', 'a/1.wav', 'd/1.wav')
    made = from_layout(tmp_path / 'one', tmp_path / 'two')
    assert len({r.id for r in made}) == len(made) == 6 and {'a/1', 'a/1.wav', 'two/a/1'} <= {r.id for r in made}


# Random trees --------------------------------------------------------------------------------

_WHO = ('ann', 'bob', 'p225', 'p226', 's5', '19', '84', 'ann b', 'É', 'dev', 'test', 'noise', 'clean', 'wav')
_STYLES = {   # how a tree names its files: (top, speaker, session, number) -> path
    'flat': lambda top, who, session, n: f'{top}{who}/{n}.wav',
    'sessions': lambda top, who, session, n: f'{top}{who}/s{session}/{n}.wav',
    'chapters': lambda top, who, session, n: f'{top}{who}/{who}{session}/{n}.wav',
    'below': lambda top, who, session, n: f'{top}{who}/wav/{n}_{session}.wav',
    'named': lambda top, who, session, n: f'{top}{who}/{who}_00{n}_mic{session + 1}.wav',
    'pages': lambda top, who, session, n: f'{top}{who}/p00{session}_00{n}.wav',
    'pairs': lambda top, who, session, n: f'{top}{("clean", "noisy")[session % 2]}/{who}/{n}.wav',
    'sides': lambda top, who, session, n: f'{top}{who}/{n}_{("clean", "noisy")[session % 2]}.wav',
    'libri': lambda top, who, session, n: f'{top}{who}/{session}5/{_WHO.index(who)}-{session}5-000{n}.wav',
    'readers': lambda top, who, session, n: f'{top}{who}/reader_{_WHO.index(who)}_{session}{n}.wav'}
_TOPS = ('', 'wav/', 'data/audio/', 'train/', 'my corpus/', 'clean/')


@st.composite
def trees(draw):
    "Paths by their true speaker; some files are copies of others"
    style, top = draw(st.sampled_from([*_STYLES])), draw(st.sampled_from(_TOPS))
    split = draw(st.sampled_from([('',), ('',), ('train/', 'test/'), ('train-clean-100/', 'dev-clean/')]))
    who = draw(st.lists(st.sampled_from(_WHO), min_size=1, max_size=7, unique=True))
    assume(len(who) > 1 or who[0] in _WHO[:9])       # a lone folder called wav is no speaker
    files = {}
    for name in who:
        for session in range(draw(st.integers(1, 3))):
            for n in range(draw(st.integers(1, 2))):
                part = split[draw(st.integers(0, len(split) - 1))]
                files[_STYLES[style](part + top, name, session, n)] = (name, draw(st.integers(-3, 9)))
    return files


def check_tree(tree, ended):
    "Either it is refused, or nobody who speaks in two files lies in two splits, and no sound does"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, (path, (_, copy)) in enumerate(tree.items()):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            draw = torch.Generator().manual_seed(copy if copy < 0 else number)     # below zero: one of three sounds
            soundfile.write(root / path, torch.rand(50, generator=draw).numpy() - .5, RATE)
        try: made = from_layout(root)
        except CorpusError as error:
            assert '\n' not in str(error)
            return ended.append(False)
        home: dict[str, set] = {}
        for r in made:
            if r.kind not in ('speech', 'pair'): continue
            for place in filter(None, (r.path, r.clean_path)):
                home.setdefault(tree[Path(place).relative_to(root).as_posix()][0], set()).add(r.split)
        assert all(len(splits) == 1 for splits in home.values()), (home, sorted(tree))
        assert [f for f in audit(made) if f.bad] == []
    ended.append(True)


def test_no_random_tree_puts_a_speaker_into_two_splits():
    ended = []
    settings(max_examples=60)(given(trees())(lambda tree: check_tree(tree, ended)))()
    assert sum(ended) > len(ended) / 3, 'most are refused: the test proves little'


# Files that cannot be used -------------------------------------------------------------------

def test_bad_files_end_nothing(tmp_path):
    put(tmp_path, *(f's{k}/{n}.flac' for k in range(4) for n in '12'))
    (tmp_path / 's0/empty.wav').write_bytes(b'')
    (tmp_path / 's0/text.wav').write_text('no')
    (tmp_path / 's1/talk.m4a').write_bytes(b'....')
    save(tmp_path / 's1/silent.wav', torch.zeros(800), RATE)
    whole = (tmp_path / 's2/1.flac').read_bytes()
    (tmp_path / 's2/cut.flac').write_bytes(whole[:len(whole) // 2])
    endless = bytearray(whole)
    endless[21] &= 0xf0
    endless[22:26] = bytes(4)                                    # a stream that does not say how long it is
    (tmp_path / 's3/stream.flac').write_bytes(endless)
    done = command('make', tmp_path / 'm.jsonl', tmp_path)
    assert done.exit_code == 0 and done.stderr.count('left out: ') == 6, done.stderr
    made = get(str(tmp_path / 'm.jsonl'))
    assert len(made) == 8 and {Path(p).stem for p, _ in made.skipped} == {
        'empty', 'text', 'talk', 'silent', 'cut', 'stream'}
    assert all('\n' not in why for _, why in made.skipped)


def test_a_folder_without_a_usable_file(tmp_path):
    put(tmp_path / 'speech', *(f's{k}/1.wav' for k in range(4)))
    (tmp_path / 'noise').mkdir()
    refuses_corpus(lambda: from_layout(tmp_path / 'speech', noise=tmp_path / 'noise'), 'holds no audio')
    (tmp_path / 'noise/a.wav').write_text('no')
    refuses_corpus(lambda: from_layout(tmp_path / 'speech', noise=tmp_path / 'noise'), 'none of the 1', 'a.wav')
    refuses_corpus(lambda: from_layout(tmp_path / 'nowhere'), 'not a folder')
    refuses_corpus(lambda: from_layout(), 'needs a folder')


def test_pairs_of_other_length_or_rate_are_left_out(tmp_path):
    pairs(tmp_path)
    save(tmp_path / 'set/noisy/ann/1.wav', hiss()[:700], RATE)
    save(tmp_path / 'set/clean/bob/2.wav', hiss()[:800], 8000)
    save(tmp_path / 'set/clean/cat/1.wav', torch.zeros(800), RATE)
    made = from_layout(tmp_path)
    assert len(made.pairs()) == 5
    said = ' '.join(why for _, why in made.skipped)
    assert '700 samples' in said and '8000 Hz' in said and 'silent' in said


def test_linked_folders_are_speakers_too(tmp_path):
    put(tmp_path / 'pool', *(f's{k}/1.wav' for k in range(3)))
    put(tmp_path / 'speech', 'real/1.wav')
    for k in range(3): (tmp_path / f'speech/s{k}').symlink_to(tmp_path / f'pool/s{k}')
    (tmp_path / 'speech/real/again').symlink_to(tmp_path / 'speech')
    assert {r.speaker for r in from_layout(tmp_path / 'speech')} == {'real', 's0', 's1', 's2'}


# The command ---------------------------------------------------------------------------------

def test_an_existing_manifest_is_kept(tmp_path):
    librispeech(tmp_path / 'a')
    manifest = tmp_path / 'm.jsonl'
    assert command('make', manifest, tmp_path / 'a').exit_code == 0
    before = manifest.read_bytes()
    done = command('make', manifest, tmp_path / 'a')
    assert done.exit_code == 2 and '10 recordings, written 20' in done.stderr and '--force' in done.stderr
    assert manifest.read_bytes() == before
    put(tmp_path, 'a/LibriSpeech/dev-clean/84/9/84-9-0000.flac')
    assert command('make', manifest, tmp_path / 'a', '--force', '--quiet').exit_code == 0
    assert len(get(str(manifest))) == 11
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_the_manifest_has_the_name_of_the_folder_by_default(tmp_path, monkeypatch):
    librispeech(tmp_path / 'my libri')
    monkeypatch.chdir(tmp_path)
    assert command('make', 'my libri').stdout.strip() == 'my libri.jsonl'


@pytest.mark.parametrize('args,part', [
    (('m.jsonl',), 'needs a FOLDER'), (('m.jsonl', 'nowhere'), 'neither a folder nor a manifest'),
    (('m.jsonl', 'n.jsonl', '.'), 'name one manifest'), (('m.jsonl', '--clean', '.'), 'pairs need both'),
    (('m.jsonl', '--noise', '.'), 'needs a FOLDER'), (('m.jsonl', '.', '--split', 'dev'), "'dev'"),
    (('m.jsonl', 'top', '--layout', 'vctk'), 'laid out as vctk'), (('m.jsonl', 'top', '--speaker', '('), 'regular')])
def test_mistakes_are_one_sentence(args, part, tmp_path, monkeypatch):
    monkeypatch.chdir(put(tmp_path, 'top/ann/1.wav', 'top/bob/1.wav'))
    done = command('make', *args)
    lines = done.stderr.splitlines()
    assert done.exit_code == 2 and len(lines) == 1 and part in lines[0] and done.stdout == '', done.stderr
    assert not Path('m.jsonl').exists()


def test_a_split_for_all(tmp_path):
    voicebank(tmp_path)
    made = from_layout(tmp_path, split='test')
    assert {r.split for r in made} == {'test'}
    with pytest.raises(CorpusError, match="'dev'"): make_manifest([survey(tmp_path)], split='dev')


# The check -----------------------------------------------------------------------------------

def test_check_finds_all_at_once(tmp_path):
    librispeech(tmp_path)
    for who in 'ab': put_pair(tmp_path / 'p', f'clean/{who}/1.wav', f'noisy/{who}/1.wav')
    made = from_layout(tmp_path / 'LibriSpeech') + from_layout(tmp_path / 'p', split='valid')
    rows = [replace(r, split='test') if r.speaker == '19' and '227' in r.id else r for r in made]
    Path(rows[-1].path).unlink()
    save(tmp_path / 'p/clean/a/1.wav', hiss()[:900], 8000)
    save(Path(rows[0].path), hiss(), RATE)
    soundfile.write(tmp_path / 'copy.wav', *soundfile.read(rows[4].path, dtype='int16'))
    rows.append(replace(rows[4], id='copy', path=str(tmp_path / 'copy.wav'), speaker='zoe', group='', sha256='other',
                        split='train' if rows[4].split != 'train' else 'test'))
    where = Manifest(tuple(rows)).save(tmp_path / 'm.jsonl')
    with pytest.raises(CorpusError): get(str(where))             # sees the first of them
    done = command('check', where, '--json')
    table = {row['check']: row for row in json.loads(done.stdout)}
    assert done.exit_code == 2 and 'm.jsonl has ' in done.stderr.splitlines()[-1]
    assert {check for check, row in table.items() if row['verdict'] == 'bad'} == {
        'speakers', 'same audio', 'files', 'rates'}, table
    assert table['files']['found'] == 2          # one is gone, one is of another length than the manifest says
    assert command('check', where).stdout.splitlines()[0] == 'check\tverdict\tfound\tdetail'


def test_a_folder_of_sessions_that_were_taken_for_speakers(tmp_path):
    put(tmp_path, *(f'spk{s}/session{k}/{u}.wav' for s in range(4) for k in range(3) for u in '01'))
    assert {r.speaker for r in from_layout(tmp_path)} == {f'spk{s}' for s in range(4)}
    split = dict(session0='train', session1='valid', session2='test')
    wrong = [replace(r, speaker=(who := Path(r.path).parent.name), split=split[who]) for r in from_layout(tmp_path)]
    found = audit(Manifest(tuple(wrong)).check())
    assert len(found) == 4 and not any(f.bad for f in found)
    assert 'spk0' in found[0].text and '--speaker' in found[0].text
    assert audit_rows(found)[2]['verdict'] == 'warning'


@pytest.mark.parametrize('wave,clipped', [
    (torch.sin(torch.arange(16000) * .05), False), (2 * torch.sin(torch.arange(16000) * .05), True),
    (.1 * torch.sin(torch.arange(16000) * .05).clamp(-.5, .5), False), (torch.zeros(100), False),
    (torch.ones(2), False),
    (-(torch.sin(torch.arange(16000) * .05)).clamp(-2, .6), True)])
def test_clipping(wave, clipped):
    stored = (wave.clamp(-1, 1) * 32767).round() / 32768        # as 16 bits have it
    assert is_clipped(stored) == clipped
