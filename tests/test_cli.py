"""The command, as a user types it: what it prints where, its exit codes, and bad input.

Most commands run in this process, through the `main` of `python -m speechloss`. A process of its own
(`in_a_process`) has what is a matter of processes: start-up, streams, closed pipes, full disks, Ctrl-C.
"""
import contextlib
import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from speechloss.__main__ import main
from speechloss.cli.app import _one_thread, app, cards_in_code
from speechloss.common.errors import SpeechLossError
from speechloss.common.weights import DATA

RATE = 16000


def in_a_process(*args, **more) -> subprocess.CompletedProcess:
    "The command in a process of its own"
    return subprocess.run([sys.executable, '-m', 'speechloss', *map(str, args)], text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=300, **more)


def speechloss(*args, **env) -> subprocess.CompletedProcess:
    "The command in this process, with some variables of the environment; a bug is raised"
    out, err, argv = io.StringIO(), io.StringIO(), ['speechloss', *map(str, args)]
    with (mock.patch.object(sys, 'argv', argv), mock.patch.dict(os.environ, env),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end):
        main()
    return subprocess.CompletedProcess(argv, end.value.code or 0, out.getvalue(), err.getvalue())


def refused(*args, command=speechloss, code: int = 2, **more) -> str:
    "The one sentence that a refused command says, on stderr alone"
    done = command(*args, **more)
    assert done.returncode == code, done.stderr
    assert done.stdout == '', done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith('speechloss: ')]
    assert len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]


def files(folder: Path) -> list[str]:
    "Every file below a folder, hidden ones too"
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


def wave(seconds: float = .5, rate: int = RATE, channels: int = 1) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(int(seconds * rate), channels))
    return (.05 * noise).astype('float32')


@pytest.fixture(scope='session')
def model(tmp_path_factory) -> Path:
    "A tiny enhancer, untrained, as training leaves it"
    from speechloss.models import enhancer
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    enhancer('tiny').save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------- manners

def test_help_is_quick():
    "Processor time, which a busy machine does not stretch; the better of two"
    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    times = []
    for _ in range(2):
        before = spent()
        assert 'reproduce' in in_a_process('--help').stdout
        times.append(spent() - before)
    assert min(times) < .5


def test_help_imports_nothing_heavy():
    code = ("import sys\nfrom typer.testing import CliRunner\nfrom speechloss.cli.app import app\n"
            "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
            "print(sorted({'torch', 'numpy', 'soundfile', 'pandas', 'papermill'} & set(sys.modules)))")
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'


@pytest.mark.parametrize('command', ['reproduce', 'enhance', 'train', 'data', 'losses', 'doctor'])
def test_every_command_has_help(command):
    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0


def test_train_lists_the_fields_of_a_recipe():
    lines = CliRunner().invoke(app, ['train', '--fields']).output.splitlines()
    assert lines[0] == 'field\tdefault\tmeaning' and 'steps\t2000\tof the optimiser' in lines
    assert '--fields' in CliRunner().invoke(app, ['train', '--help']).output


def test_version_is_the_package_s():
    from speechloss import __version__
    assert CliRunner().invoke(app, ['--version']).output.strip() == __version__


def test_losses_are_the_cards():
    from speechloss.losses import cards
    rows = json.loads(CliRunner().invoke(app, ['losses', '--json']).output)
    assert rows == cards()
    table = CliRunner().invoke(app, ['losses']).output.splitlines()
    assert table[0].split('\t')[0] == 'name' and len(table) == len(rows) + 1


def test_doctor_reports():
    done = in_a_process('doctor', '--json')
    rows = {row['name']: row for row in json.loads(done.stdout)}
    assert done.returncode == 0 and done.stderr == ''
    assert rows['torch']['found'].startswith(torch.__version__)
    assert {'triton', 'torchaudio', 'audio files', 'cache', 'corpus mini'} <= set(rows)
    assert all(row['cure'] for row in rows.values() if row['status'] == 'missing')


def test_without_its_packages_the_command_says_what_to_install(tmp_path):
    hidden = "import sys\nsys.modules['typer'] = None\nsys.argv = ['speechloss']\n"
    code = hidden + "from speechloss.__main__ import main\nmain()"
    code = code.replace('import sys\n', 'import sys, importlib.util as u\nfound = u.find_spec\n'
                        "u.find_spec = lambda name, *a: None if name == 'typer' else found(name, *a)\n", 1)
    done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True)
    assert done.returncode == 2 and "pip install '.[enhance]' in the clone" in done.stderr


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr('speechloss.cli.app._kept_cards', lambda kind: 1 / 0)
    result = CliRunner().invoke(app, ['losses'])
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f'{sys.executable} -m speechloss losses | head -1', shell=True, text=True,
                          capture_output=True)
    assert done.stdout.startswith('name') and 'Traceback' not in done.stderr


# ------------------------------------------------------------------------------------ reproduce

@pytest.mark.parametrize('args, said', [
    (['nobody'], "paper 'nobody' is unknown"),
    (['model_as_loss', '--scale', 'laptpo'], "scale 'laptpo' is unknown: did you mean 'laptop'"),
    (['all', '--scale', 'huge'], "scale 'huge' is unknown"),
    (['model_as_loss', '--corpus', 'min'], "corpus 'min' is unknown: did you mean 'mini'"),
    (['model_as_loss', '--seed', '-3'], 'seed is -3')])
def test_reproduce_refuses(args, said, tmp_path):
    assert said in refused('reproduce', *args, '--out', tmp_path / 'runs')
    assert files(tmp_path) == []


def test_reproduce_refuses_a_place_that_is_taken(tmp_path):
    (tmp_path / 'file').touch()
    assert 'cannot be written' in refused('reproduce', 'model_as_loss', '--out', tmp_path / 'file')
    taken = tmp_path / 'runs/model_as_loss-smoke-0'
    taken.mkdir(parents=True)
    (taken / 'thesis.tex').touch()
    said = refused('reproduce', 'model_as_loss', '--out', tmp_path / 'runs')
    assert 'thesis.tex' in said and os.listdir(taken) == ['thesis.tex']


def test_reproduce_prints_the_verdicts_and_fails_on_what_must_hold(tmp_path, monkeypatch):
    from speechloss.reproduce import runner as reproduce
    folder = tmp_path / 'run'
    folder.mkdir()
    row = dict(id='c', kind='must hold', verdict='not reproduced', measured='x = 1')
    results = dict(claims=[row], failures=['claim c (must hold) is not reproduced: x = 1'])
    (folder / 'results.json').write_text(json.dumps(results))
    monkeypatch.setattr(reproduce, 'run', lambda *args, **more: folder)
    result = CliRunner().invoke(app, ['reproduce', 'model_as_loss'])
    assert result.exit_code == 1 and 'c\tmust hold\tnot reproduced\tx = 1' in result.stdout
    (folder / 'results.json').write_text(json.dumps({**results, 'failures': []}))
    assert CliRunner().invoke(app, ['reproduce', 'model_as_loss']).exit_code == 0


def test_one_paper_of_all_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    from speechloss.reproduce import runner as reproduce
    done = []

    def run(study, **more):
        done.append(study.paper)
        kind = reproduce.NotebookError if study.paper == 'a' else reproduce.ReproduceError
        raise kind(f'no {study.paper}')

    monkeypatch.setattr(reproduce, 'run', run)
    monkeypatch.setattr(reproduce, 'papers', lambda: dict(a=Path('a'), b=Path('b')))
    result = CliRunner().invoke(app, ['reproduce', 'all'])
    assert done == ['a', 'b'] and result.exit_code == 2
    assert 'a: no a' in result.stderr and 'b: no b' in result.stderr


# -------------------------------------------------------------------------------------- enhance

@pytest.mark.parametrize('rate, channels, suffix', [(16000, 1, 'wav'), (44100, 2, 'flac'), (8000, 1, 'wav')])
def test_enhance_any_rate_and_channels(rate, channels, suffix, model, tmp_path):
    source, target = tmp_path / f'in.{suffix}', tmp_path / 'deep/out.flac'
    soundfile.write(source, wave(.3, rate, channels), rate)
    done = speechloss('enhance', source, target, '--model', model)
    assert done.returncode == 0 and done.stdout.strip() == str(target), done.stderr
    before, after = soundfile.info(source), soundfile.info(target)
    for what in ('samplerate', 'channels', 'frames'):
        assert getattr(before, what) == getattr(after, what)
    assert files(tmp_path) == ['deep/out.flac', f'in.{suffix}']


def test_enhance_a_tree_with_bad_files(model, tmp_path):
    "One bad file never ends the batch: every good one is there, whole, and the exit code is 1"
    source = tmp_path / 'in'
    for name in ('a.wav', 'deep/b.flac', 'deep/er/c.wav', 'z.wav'):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(source / name, wave(), RATE)
    (source / 'deep/bad.wav').write_bytes(b'RIFF')
    (source / 'notes.txt').write_text('not audio')
    done = in_a_process('enhance', source, tmp_path / 'out', '--model', model)
    assert done.returncode == 1 and '1 of 5 files failed' in done.stderr and 'bad.wav' in done.stderr
    assert files(tmp_path / 'out') == ['a.wav', 'deep/b.flac', 'deep/er/c.wav', 'z.wav']
    assert len(done.stdout.splitlines()) == 4
    before = (tmp_path / 'out/a.wav').stat().st_mtime_ns
    (source / 'deep/bad.wav').unlink()
    done = speechloss('enhance', source, tmp_path / 'out', '--model', model, '--skip-existing')
    assert done.returncode == 0 and done.stdout == ''
    assert (tmp_path / 'out/a.wav').stat().st_mtime_ns == before


def nan_audio(path):
    bad = wave()
    bad[100] = np.nan
    soundfile.write(path, bad, RATE, subtype='FLOAT')


def no_samples(path):
    soundfile.write(path, wave(0), RATE)


def not_audio(path):
    path.write_text('this is not audio')


def cut_flac(path):
    soundfile.write(path, wave(3), RATE, format='FLAC')
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize('spoil, said', [(nan_audio, 'NaN'), (no_samples, 'no samples'),
                                         (not_audio, 'cannot be read'), (cut_flac, 'cut short')])
def test_enhance_refuses_a_bad_file(spoil, said, model, tmp_path):
    source = tmp_path / ('in.flac' if spoil is cut_flac else 'in.wav')
    spoil(source)
    sentence = refused('enhance', source, tmp_path / 'out.wav', '--model', model, '--quiet')
    assert said in sentence and source.name in sentence
    assert files(tmp_path) == [source.name]


def test_enhance_refuses_places(model, tmp_path):
    (tmp_path / 'empty').mkdir()
    soundfile.write(tmp_path / 'a.wav', wave(), RATE)
    before = (tmp_path / 'a.wav').read_bytes()
    for source, target, said in (('missing', 'out', 'does not exist'), ('empty', 'out', 'holds no audio'),
                                 ('a.wav', 'a.wav', 'is the source too'), ('a.wav', '.', 'is the source too'),
                                 ('a.wav', 'a.docx', 'is no audio format'), ('.', '.', 'is the source too')):
        result = CliRunner().invoke(app, ['enhance', str(tmp_path / source), str(tmp_path / target),
                                          '--model', str(model)])
        assert result.exit_code == 2 and said in result.stderr, (source, target, result.stderr)
    assert files(tmp_path) == ['a.wav'] and (tmp_path / 'a.wav').read_bytes() == before


@pytest.mark.parametrize('device, said', [('cuda:99', 'is not here'), ('mps', 'is not here: this machine has cpu'),
                                          ('gpu', 'is unknown')])
def test_enhance_refuses_a_device(device, said, model, tmp_path):
    soundfile.write(tmp_path / 'a.wav', wave(), RATE)
    if device == 'mps' and torch.backends.mps.is_available(): pytest.skip('this machine has it')
    assert said in refused('enhance', tmp_path / 'a.wav', tmp_path / 'b.wav', '--model', model,
                           '--device', device)


def test_a_device_that_torch_has_is_taken(monkeypatch):
    from speechloss.cli.console import torch_device
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [torch_device(name) for name in ('mps', 'mps:0', 'cpu', 'cpu:0', 'cuda', 'cuda:1', None)] == [
        'mps', 'mps', 'cpu', 'cpu', 'cuda', 'cuda:1', 'cuda']


def test_enhance_refuses_a_bad_model(model, tmp_path):
    soundfile.write(tmp_path / 'a.wav', wave(), RATE)
    cut = shutil.copytree(model, tmp_path / 'cut')
    weights = (cut / 'model.safetensors').read_bytes()
    (cut / 'model.safetensors').write_bytes(weights[:len(weights) // 2])
    (tmp_path / 'empty').mkdir()
    for folder, said in (('cut', 'model.safetensors'), ('empty', 'config.json'), ('no/such/one', 'no/such/one')):
        sentence = refused('enhance', tmp_path / 'a.wav', tmp_path / 'b.wav', '--model', tmp_path / folder)
        assert said in sentence
    assert not (tmp_path / 'b.wav').exists()


def test_enhance_without_network_refuses_a_hub_name(tmp_path):
    soundfile.write(tmp_path / 'a.wav', wave(), RATE)
    assert 'network' in refused('enhance', tmp_path / 'a.wav', tmp_path / 'b.wav', '--model', 'somebody/model')


def test_enhance_on_a_full_disk(model, tmp_path):
    soundfile.write(tmp_path / 'a.wav', wave(5), RATE)
    said = refused('enhance', tmp_path / 'a.wav', tmp_path / 'b.wav', '--model', model, '--quiet',
                   command=in_a_process, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert 'b.wav' in said and files(tmp_path) == ['a.wav']


def test_ctrl_c_leaves_nothing_half_written(model, tmp_path):
    soundfile.write(tmp_path / 'a.wav', wave(300), RATE)
    # a script starts its background jobs deaf to SIGINT, and pytest may be one of them
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, '-m', 'speechloss', 'enhance', tmp_path / 'a.wav',
                                tmp_path / 'b.wav', '--model', model], stderr=subprocess.PIPE, text=True,
                               preexec_fn=hear)
    begin = time.monotonic()
    while len(files(tmp_path)) < 2 and time.monotonic() < begin + 600 and process.poll() is None:
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30 + 5 * (time.monotonic() - begin))
    assert process.returncode == 130 and 'Traceback' not in said and files(tmp_path) == ['a.wav']


# ----------------------------------------------------------------------------------------- data

@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    "An empty cache"
    monkeypatch.setenv('SPEECHLOSS_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home'


def test_data_refuses_names(home, tmp_path):
    for args, said in ((['get', 'lap'], "did you mean 'laptop'"), (['show', 'nothing'], 'is unknown'),
                       (['check', 'mini'], 'speechloss data get mini'),
                       (['show', str(tmp_path / 'no.jsonl')], 'does not exist'),
                       (['make', str(tmp_path / 'm.jsonl')], 'needs --speech'),
                       (['make', str(tmp_path / 'm.csv'), '--speech', '.'], '.jsonl')):
        result = CliRunner().invoke(app, ['data', *args])
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / 'm.jsonl').exists()


def test_data_get_from_a_folder_that_does_not_hold_it(home, tmp_path):
    (tmp_path / 'empty').mkdir()
    for name in ('mini', 'laptop'):
        for folder in ('missing', 'empty'):
            assert str(tmp_path / folder) in refused('data', 'get', name, '--from', tmp_path / folder)


def test_data_get_without_network(home):
    closed = 'http://127.0.0.1:9'
    for name in ('mini', 'laptop'):
        said = refused('data', 'get', name, SPEECHLOSS_SOURCE_URL=closed, PIP_INDEX_URL=closed, PIP_RETRIES='0',
                       PIP_NO_INDEX='1')
        assert 'network' in said or '--from' in said
        assert not list(home.rglob('manifest.jsonl'))


def test_data_make_show_check(tmp_path):
    for name in ('speech/anna/1.wav', 'speech/bert/1.wav', 'speech/carl/1.wav', 'noise/rain.wav'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.random.default_rng(len(name) + sum(map(ord, name)))
                        .normal(size=RATE).astype('float32') / 20, RATE)
    nan_audio(tmp_path / 'speech/anna/2.wav')
    manifest = tmp_path / 'mine.jsonl'
    result = CliRunner().invoke(app, ['data', 'make', str(manifest), '--speech', str(tmp_path / 'speech'),
                                      '--noise', str(tmp_path / 'noise'), '--split', 'train'])
    assert result.exit_code == 0 and '2.wav' in result.stderr and result.stdout.strip() == str(manifest)
    shown = json.loads(CliRunner().invoke(app, ['data', 'show', str(manifest)]).stdout)
    assert shown['splits']['train']['speakers'] == 3 and shown['splits']['train']['noises'] == 1
    assert CliRunner().invoke(app, ['data', 'check', str(manifest)]).exit_code == 0
    cut_flac(tmp_path / 'cut.flac')
    shutil.copy(tmp_path / 'cut.flac', tmp_path / 'speech/bert/1.wav')
    result = CliRunner().invoke(app, ['data', 'check', str(manifest)])
    assert result.exit_code == 2 and 'bert' in result.stderr and '1 bad' in result.stderr


def test_data_make_of_a_flat_folder(tmp_path):
    "As VoiceBank-DEMAND has it: pairs, and who speaks stands in the name"
    waves = np.random.default_rng(0).normal(size=(4, RATE)).astype('float32') / 20
    for folder, gain in (('clean', 1.), ('noisy', .5)):
        (tmp_path / folder).mkdir()
        for name, wave in zip(('p226_001', 'p226_002', 'p227_001', 'unknown'), gain * waves):
            soundfile.write(tmp_path / folder / f'{name}.wav', wave, RATE)
    result = CliRunner().invoke(app, ['data', 'make', str(tmp_path / 'm.jsonl'), '--split', 'train',
                                      '--clean', str(tmp_path / 'clean'), '--noisy', str(tmp_path / 'noisy'),
                                      '--speaker', '^p[0-9]+'])
    assert result.exit_code == 0
    assert "unknown.wav has a name in which --speaker '^p[0-9]+' finds nothing" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / 'm.jsonl').read_text().splitlines()]
    assert {row['speaker'] for row in rows if 'speaker' in row} == {'p226', 'p227'}
    said = refused('data', 'make', tmp_path / 'n.jsonl', '--speech', tmp_path / 'clean', '--speaker', '(')
    assert 'no regular expression' in said


@pytest.mark.parametrize('spoil', [None, nan_audio, no_samples, not_audio])
def test_data_make_of_a_folder_without_speech(spoil, tmp_path):
    (tmp_path / 'speech').mkdir()
    if spoil:
        spoil(tmp_path / 'speech/1.wav')
    said = refused('data', 'make', tmp_path / 'm.jsonl', '--speech', tmp_path / 'speech')
    assert 'speech' in said and not (tmp_path / 'm.jsonl').exists()


# ---------------------------------------------------------------------------------------- train

def tone(speaker: int) -> np.ndarray:
    "Two seconds that a level meter takes for speech: a harmonic sound that comes and goes"
    time = np.arange(2 * RATE) / RATE
    sound = sum(np.sin(2 * np.pi * (100 + 20 * speaker) * k * time) / k for k in range(1, 20))
    return (.05 * sound * (np.sin(2 * np.pi * 2 * time) > -.3)).astype('float32')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
    "The manifest of a corpus of sounds, with the three splits"
    from speechloss.corpora import from_folder
    folder, made = tmp_path_factory.mktemp('corpus'), None
    for k, split in enumerate(('train', 'valid', 'test')):
        for kind, sound in (('speech', tone(k)), ('noise', wave(3)[:, 0] * (1 + k))):
            path = folder / split / kind / f'{kind}{k}' / f'{kind}{k}.wav'
            path.parent.mkdir(parents=True)
            soundfile.write(path, sound, RATE)
        part = from_folder(folder / split / 'speech', folder / split / 'noise', split=split)
        made = part if made is None else made + part
    return made.save(folder / 'mine.jsonl')


@pytest.fixture
def recipe(tmp_path, corpus) -> Path:
    path = tmp_path / 'recipe.toml'
    path.write_text(f"""model = 'tiny'
corpus = {str(corpus)!r}
steps = 4
steps_per_epoch = 2
batch_size = 2
seconds = 0.5
eval_every = 2
valid_size = 2
save_every = 2
log_every = 1
""")
    return path


@pytest.mark.slow
def test_train_then_again_then_enhance(recipe, tmp_path):
    out = tmp_path / 'out'
    done = speechloss('train', recipe, '--steps', 6, '--objective.weights.wave=0.2', '--out', out)
    assert done.returncode == 0 and done.stdout.strip() == str(out / 'final'), done.stderr
    assert done.stderr.startswith('train: reading the corpus\n')
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(1, 7))
    assert json.loads((out / 'recipe.json').read_text())['recipe']['objective']['weights']['wave'] == .2
    before = files(out)
    again = speechloss('train', recipe, '--steps', 6, '--objective.weights.wave=0.2', '--out', out)
    assert again.returncode == 0 and again.stdout == done.stdout and files(out) == before
    assert 'another run' in refused('train', recipe, '--out', out)
    soundfile.write(tmp_path / 'a.wav', wave(), RATE)
    done = speechloss('enhance', tmp_path / 'a.wav', tmp_path / 'b.wav', '--model', out)
    assert done.returncode == 0 and soundfile.info(tmp_path / 'b.wav').frames == RATE // 2


@pytest.mark.parametrize('args, said', [
    (['--stesp', '5'], "field 'stesp' is unknown: did you mean 'steps'"),
    (['--steps', '-5'], 'steps is -5'),
    (['--steps', 'many'], "steps is 'many': give a number"),
    (['--steps'], 'not understood'),
    (['--device', 'gpu'], "device 'gpu' is unknown"),
    (['--device', 'mps'], "device is 'mps', but torch finds no such GPU here"),
    (['--model', '{"kind": "band_split", "n_fft": 500}'], 'n_fft is 500: give a multiple of 128'),
    (['--corpus', 'nothing'], "corpus 'nothing' is unknown"),
    (['--model', 'huge'], "model 'huge' is unknown"),
    (['--steps.a', '5'], 'has no parts')])
def test_train_refuses_an_option(args, said, recipe, tmp_path):
    if 'mps' in args and torch.backends.mps.is_available(): pytest.skip('this machine has it')
    result = CliRunner().invoke(app, ['train', str(recipe), '--out', str(tmp_path / 'out'), *args])
    assert result.exit_code == 2 and said in result.stderr, (result.stderr, result.exception)
    assert not (tmp_path / 'out/final').exists()


@pytest.mark.parametrize('name, content, said', [
    ('no.toml', None, 'does not exist'), ('bad.toml', 'steps =', 'cannot be read'),
    ('bad.json', '{', 'cannot be read'), ('list.json', '[1]', 'fields')])
def test_train_refuses_a_recipe(name, content, said, tmp_path):
    if content:
        (tmp_path / name).write_text(content)
    result = CliRunner().invoke(app, ['train', str(tmp_path / name), '--out', str(tmp_path / 'out')])
    assert result.exit_code == 2 and said in result.stderr, result.exception
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_train_refuses_a_checkpoint_cut_in_half(recipe, tmp_path):
    out = tmp_path / 'out'
    assert speechloss('train', recipe, '--out', out, '-q').returncode == 0
    shutil.rmtree(out / 'final')
    for path in (out / 'checkpoints').rglob('*.safetensors'):
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    before = files(out)
    assert 'checkpoint' in refused('train', recipe, '--out', out, '-q')
    assert files(out) == before


def test_train_refuses_a_corpus_without_speech(recipe, tmp_path):
    for name in ('speech/anna/1.wav', 'noise/rain.wav'):
        (tmp_path / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / name, wave() * ('noise' in name), RATE)
    made = CliRunner().invoke(app, ['data', 'make', str(tmp_path / 'm.jsonl'), '--split', 'train',
                                    '--speech', str(tmp_path / 'speech'), '--noise', str(tmp_path / 'noise')])
    if made.exit_code == 0:  # silence may be refused here already
        made = CliRunner().invoke(app, ['train', str(recipe), '--out', str(tmp_path / 'out'),
                                        '--corpus', str(tmp_path / 'm.jsonl')])
    assert made.exit_code == 2, (made.stderr, made.exception)
    assert not (tmp_path / 'out/final').exists()


def test_train_into_a_place_that_is_a_file(recipe, tmp_path):
    (tmp_path / 'out').touch()
    assert 'out' in refused('train', recipe, '--out', tmp_path / 'out')


# ---- what only prints text

def test_tables_of_cards_are_those_of_the_code():
    kept = json.loads((DATA / 'cards.json').read_text(encoding='utf-8'))
    assert kept == cards_in_code(), 'run python -c "from speechloss.cli.app import write_cards; write_cards()"'
    assert {'name', 'range', 'better', 'needs', 'extra'} <= kept['metrics'][0].keys() and len(kept['metrics']) > 20


def test_metrics_say_what_they_need():
    rows = {row['name']: row for row in json.loads(speechloss('metrics', '--json').stdout)}
    assert rows['pesq']['needs'] == 'pesq' and rows['pesq']['reference'] == 'clean' and rows['lsd']['better'] == 'lower'
    assert rows['vqscore']['reference'] == 'none' and rows['distillmos']['extra'] == 'mos'
    assert rows['dnsmos']['columns'].startswith('dnsmos_ovrl') and set(row['here'] for row in rows.values()) <= {
        'yes', 'no', 'unfetched'}


def test_metrics_say_whether_their_weights_are_here(tmp_path, monkeypatch):
    """Of every metric whose packages do not bring its weights; where they are missing, the cure stands beside."""
    from speechloss.common.libraries import cached_files, extra
    from speechloss.judges import register_judges
    from speechloss.metrics import METRICS, opinions
    register_judges()
    places = dict(HOME=tmp_path / 'home', TORCH_HOME=tmp_path / 't[1]', HF_HUB_CACHE=tmp_path / 'hub', HF_HUB_OFFLINE=1)
    for name, place in places.items(): monkeypatch.setenv(name, str(place))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)

    def here() -> dict:
        with mock.patch('importlib.util.find_spec', lambda name: None if name == 'visqol' else name):
            rows = json.loads(speechloss('metrics', '--json').stdout)
        return {row['name']: (row['here'], row['cure']) for row in rows}
    outside = {name for name, card in METRICS.items() if card.weights}
    assert outside == {'nisqa', 'squim', 'wer_whisper_tiny_en'} and outside <= {
        name for name, card in METRICS.items() if card.check}
    assert {name for name, (word, _) in here().items() if word == 'unfetched'} == outside
    assert here()['visqol'] == ('no', extra('visqol')) and here()['pesq'] == ('yes', '')
    assert all(here()[name][1] == METRICS[name].cure for name in outside)
    with mock.patch('speechloss.cli.app._columns', lambda rows, short: short):       # a narrow terminal
        said = speechloss('metrics').stderr
        assert said.count('\n') == 3 and METRICS['squim'].cure in said
    with pytest.raises(SpeechLossError, match='the hub is out of reach: run hf download'):
        METRICS['wer_whisper_tiny_en'].check()
    for path in (tmp_path / 'home/.torchmetrics/NISQA/nisqa.tar', opinions._squim_file(),
                 tmp_path / 'hub/models--openai--whisper-tiny.en/snapshots/0/model.safetensors'):
        path.parent.mkdir(parents=True)
        path.touch()
    assert {here()[name] for name in outside} == {('yes', '')}
    assert cached_files(METRICS['squim'].weights) == [opinions._squim_file()]


@pytest.mark.parametrize('args', [['-h'], ['losses'], ['metrics'], ['doctor', '-h'], ['score', '-h'], ['train', '-h'],
                                  ['data', 'make', '-h']])
def test_text_is_printed_without_torch(args):
    code = ("import sys; sys.argv = ['speechloss', *sys.argv[1:]]\nfrom speechloss.__main__ import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_one_long_item_says_that_it_goes_on(monkeypatch, capsys):
    from speechloss.common import progress
    monkeypatch.setattr(progress, '_MINUTE', .1)
    with progress.bar('score') as draw:
        draw('scoring', 0, 1)
        time.sleep(.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == 'score: scoring (0/1)' and len(lines) > 1 and all('so far' in line for line in lines[1:])


def test_enhance_takes_one_core_unless_it_is_told_more(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, 'set_num_threads', taken.append)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    _one_thread()
    assert not taken
    monkeypatch.delenv('OMP_NUM_THREADS')
    _one_thread()
    assert taken == [1]
