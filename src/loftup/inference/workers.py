"""Pieces of one call on all cores of a CPU, each piece on one thread from its beginning to its end.

PyTorch splits every operation among its threads and waits for the slowest. A stream has thousands of operations, many
of them small, and where another process takes a core nearly all of the time goes into waiting. Here threads of our own
take whole pieces, and PyTorch's operations inside them are not split any further.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

__all__ = ["run_all", "workers"]

Task = Callable[[], None]
_POOLS: dict[int, ThreadPoolExecutor] = {}
_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_POOLS.clear)


@functools.cache
def _openmp() -> bool:
    """Whether a thread can have a number of PyTorch's threads for itself."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def workers(device: torch.device) -> int:
    """How many pieces may be computed at once in the caller's context; 1 where they go one after another."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()  # modes see their own thread
    if device.type != "cpu" or watched or torch.is_autocast_enabled("cpu") or not _openmp():
        return 1
    return torch.get_num_threads()


def run_all(tasks: Iterable[Task], count: int) -> None:
    """Run tasks, ``count`` at once, in the caller's grad and inference mode; one after another for 1.

    Tasks are taken from the iterable, in this thread, as others end. After an error no further one begins, and none is
    running when it is raised.
    """
    if count == 1:
        for task in tasks:
            task()
        return
    pool = _pool(count)
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(task: Task) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            task()

    running: set[Future[None]] = set()
    waiting: Iterator[Task] = iter(tasks)
    try:
        for task in waiting:
            running.add(pool.submit(run, task))
            if len(running) == 2 * count:  # so that no worker waits for this thread
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
        for each in list(running):
            each.result()
    except BaseException:
        for each in running:
            each.cancel()
        wait(running)
        raise


def _pool(count: int) -> ThreadPoolExecutor:
    """The threads, made once and kept, each of which has one thread of PyTorch's."""
    with _LOCK:
        if count not in _POOLS:
            before = torch.get_num_threads()
            pool = ThreadPoolExecutor(count, "loftup")
            together = threading.Barrier(count)

            def begin() -> None:
                torch.set_num_threads(1)
                torch.get_num_threads()  # a thread takes the number of all at its first operation: let that be this
                together.wait()

            for each in [pool.submit(begin) for _ in range(count)]:
                each.result()
            torch.set_num_threads(before)  # of this thread, and of threads to come
            _POOLS[count] = pool
        return _POOLS[count]
