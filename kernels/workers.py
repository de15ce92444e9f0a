"""Independent pieces of work side by side on the cores of a CPU.

torch splits every operation over its threads and waits for all of them at its end. For the many
short operations on one utterance that waiting costs more than it gains, and ruins everything
when a core is busy elsewhere. One thread for each piece has no such barriers.
"""
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch

#: Into so many pieces is cut what can be cut anywhere: enough for so many cores, the same for all
PIECES = 16
#: Cores that one call uses at most: each has its piece in memory
MOST = 4


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    "Threads in which torch uses one thread; elsewhere it goes on with as many as before"
    before, all_here = torch.get_num_threads(), Barrier(workers)

    def start():
        torch.set_num_threads(1)
        torch.get_num_threads()   # settles it for this thread, whatever is set later

    pool = ThreadPoolExecutor(workers, 'speechloss', start)
    list(pool.map(lambda _: all_here.wait(60), range(workers)))
    torch.set_num_threads(before)  # the setting of a thread is also the start of every new thread
    return pool


if hasattr(os, 'register_at_fork'):   # the threads do not survive a fork, the pool object would
    os.register_at_fork(after_in_child=_pool.cache_clear)


def side_by_side(function: Callable, pieces: Iterable, *, cpu: bool) -> list:
    """The function of each piece, on as many cores as torch may use, without gradient; in order.

    What a piece computes does not depend on the number of cores.
    """
    pieces = list(pieces)
    workers = min(torch.get_num_threads(), len(pieces), MOST) if cpu else 1
    if workers <= 1: return [function(piece) for piece in pieces]

    def without_gradient(piece):
        with torch.no_grad(): return function(piece)   # the mode belongs to the thread

    return list(_pool(workers).map(without_gradient, pieces))
