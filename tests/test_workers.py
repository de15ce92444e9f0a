"""What is left behind: no process outlives the one that started it, and no database the user does not know of."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechloss.common.processes import end_with_parent

WORKERS = '''
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from speechloss.common.processes import end_with_parent
if __name__ == '__main__':
    context = multiprocessing.get_context('spawn')
    server = SyncManager(ctx=context)
    server.start(end_with_parent)
    pool = ProcessPoolExecutor(2, context, end_with_parent)
    for future in [pool.submit(time.sleep, .1) for _ in range(4)]: future.result()
    print(*pool._processes, server._process.pid, flush=True)
    time.sleep(60)
'''


def alive(pid: int) -> bool:
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks at /proc')
def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / 'work.py').write_text(WORKERS)
    with subprocess.Popen([sys.executable, tmp_path / 'work.py'], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline: time.sleep(.05)
    assert not [pid for pid in pids if alive(pid)]


def test_the_first_process_has_none_to_watch():
    end_with_parent()


def test_every_pool_watches():
    """Whoever starts a pool in the package names it; a new one must think of its end."""
    import speechloss
    root = Path(speechloss.__file__).parent
    starting = [p for p in root.rglob('*.py') if 'ProcessPoolExecutor(' in p.read_text(encoding='utf-8')]
    assert starting and not [p for p in starting if 'end_with_parent' not in p.read_text(encoding='utf-8')]


def test_no_database_of_events_in_the_users_cache(tmp_path):
    pytest.importorskip('onnxruntime')
    code = "from speechloss.common.libraries import optional; optional('onnxruntime', 'this test', 'metrics')"
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('XDG_CACHE_HOME', 'ORT_DISABLE_TELEMETRY')} | dict(HOME=str(tmp_path))
    subprocess.run([sys.executable, '-c', code], env=environment, check=True)
    assert not list(tmp_path.rglob('*'))
