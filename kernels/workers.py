"""`side_by_side`: independent pieces of work on the cores of a CPU, a thread for each.

torch splits every operation over its threads and waits for all of them at its end. For the many
short operations on one utterance that waiting costs more than it gains, above all when another
program keeps a core busy. With a thread for each piece there is one wait, at the end.
"""
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import Any

import torch

#: Number of pieces of work that can be cut anywhere. It is fixed, since results must not depend on the
#: number of cores, and large enough for that many cores.
PIECES = 16
#: Most cores that one call uses: each holds a piece in memory
MOST = 4


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    "A pool of threads in each of which torch uses one thread; in other threads its setting stays"
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


def side_by_side(function: Callable[[Any], Any], pieces: Iterable, *, cpu: bool) -> list:
    """Call a function with each piece, on as many cores as torch may use, and return the results in order.

    Gradients are off in the function where it runs in a thread. What a piece computes does not
    depend on the number of cores.
    """
    pieces = list(pieces)
    workers = min(torch.get_num_threads(), len(pieces), MOST) if cpu else 1
    if workers <= 1: return [function(piece) for piece in pieces]

    def without_gradient(piece):
        with torch.no_grad(): return function(piece)   # the mode belongs to the thread

    return list(_pool(workers).map(without_gradient, pieces))


@lru_cache(maxsize=1)
def keep_memory() -> None:
    """Make glibc keep the memory of freed tensors, by freeing one large tensor.

    Until then glibc returns every megabyte to the system and takes it back with the next
    tensor, which costs twice the arithmetic. A training has freed such a tensor long ago; a
    first call has not.
    """
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)
