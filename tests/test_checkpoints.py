"""Checkpoints under kills, full disks and rot: whole or absent, and never a silent fresh start."""
import os
import resource
import signal

import pytest
import torch

from speechloss.common.errors import CheckpointError
from speechloss.common.files import write_folder
from speechloss.training.checkpoints import latest, save_checkpoint
from speechloss.training import checkpoints


def save(root, step, size=1000):
    return save_checkpoint(root, step, {'w': torch.full((size,), float(step))}, dict(n=step))


def in_child(work) -> int:
    "Exit status of `work` in a forked process, or minus the signal that ended it"
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(call: int, monkeypatch):
    "Have this process killed at the n-th call that touches the disk"
    seen = [0]

    def counted(function):
        def wrapped(*args, **kwargs):
            seen[0] += 1
            if seen[0] == call: os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped

    for module, name in ((os, 'fsync'), (os, 'rename'), (os, 'replace'), (os, 'mkdir'),
                         (os, 'rmdir'), (os, 'unlink'), (os, 'chmod')):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize('again', [False, True], ids=['new step', 'same step'])
def test_killed_at_every_call(tmp_path, monkeypatch, again):
    "After a kill at any call there is a sound checkpoint, and the next save tidies up"
    new = 20 if again else 30
    for call in range(1, 100):
        root = tmp_path / str(call)
        save(root, 10)
        save(root, 20)
        with monkeypatch.context() as patch:
            died = in_child(lambda: (die_at(call, patch), save(root, new)))
        assert died in (0, -signal.SIGKILL)
        assert latest(root)[0] in ((10, 20) if again else (20, 30))
        save(root, new)
        assert latest(root)[0] == new and not list(root.glob('.*'))
        if died == 0: break
    assert call > 8


@pytest.mark.parametrize('kept', [0, 1, 100, -1])
def test_cut_short(tmp_path, kept):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / checkpoints.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.warns(UserWarning, match='going on from step-00000001'):
        assert latest(tmp_path)[0] == 1


def test_rot(tmp_path):
    "One flipped bit in the data, which safetensors itself does not see"
    save(tmp_path, 1)
    path = save(tmp_path, 2) / checkpoints.TENSORS_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='has changed since it was written'):
        assert latest(tmp_path)[0] == 1


@pytest.mark.parametrize('text', ['', '{', '[]', '{"step": 1}', 'null'])
def test_state_unreadable(tmp_path, text):
    (save(tmp_path, 1) / checkpoints.STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match='no checkpoint in .* can be read'):
        latest(tmp_path)


def test_both_corrupt(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / checkpoints.TENSORS_FILE).unlink()
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path)
    assert '\n' not in str(caught.value) and 'missing' in str(caught.value)


def test_full_disk(tmp_path):
    "The operating system refuses the bytes: one sentence, and the one before is intact"
    save(tmp_path, 1)

    def refused():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(CheckpointError, match='what was saved before is intact'):
            save(tmp_path, 2, size=100_000)

    assert in_child(refused) == 0
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']
    assert latest(tmp_path)[0] == 1


def test_not_a_folder(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointError, match='cannot be written'):
        save(tmp_path / 'file', 1)


def test_readable_by_others(tmp_path):
    folder = save(tmp_path, 1)
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / checkpoints.TENSORS_FILE).stat().st_mode & 0o777 == 0o666 & ~mask


def test_tensors_of_all_kinds(tmp_path):
    "Kinds, shapes and strides come back; nothing shares memory with the source"
    source = dict(a=torch.arange(6).view(2, 3).T, b=torch.tensor(2.5), c=torch.zeros(0, 4),
                  d=torch.ones(3, dtype=torch.bfloat16), e=torch.ones(2, dtype=torch.uint8))
    source['shared'] = source['a'][0]
    save_checkpoint(tmp_path, 1, source, {})
    _, found, _ = latest(tmp_path)
    for name, value in source.items():
        assert found[name].equal(value) and found[name].dtype == value.dtype


def test_interrupted_write_keeps_the_old(tmp_path):
    target = write_folder(tmp_path / 'model', lambda folder: (folder / 'a').write_text('old'))

    def interrupted(folder):
        (folder / 'a').write_text('new')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(target, interrupted)
    assert (target / 'a').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
