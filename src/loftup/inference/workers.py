"""Pieces of one call on all cores of a CPU, each piece on one thread from its beginning to its end.

PyTorch splits every operation among its threads and waits for the slowest. A stream has thousands of operations, many
of them small, and where another process takes a core nearly all of the time goes into waiting. Here threads of our own
take whole pieces, and PyTorch's operations inside them are not split any further.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

__all__ = ["enough", "run_all", "scratch", "workers"]

Task = Callable[[], None]
_POOLS: list[tuple[int, ThreadPoolExecutor]] = []  # one at most, with its number of threads
_LOCK = threading.Lock()
_OWN = threading.local()  # .memory, of each thread
if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_POOLS.clear)


@functools.cache
def _openmp() -> bool:
    """Tell whether a thread can have a number of PyTorch's threads for itself."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()


def workers(device: torch.device) -> int:
    """How many pieces may be computed at once in the caller's context; 1 where they go one after another."""
    # Modes and the profiler see their own thread alone.
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    watched = watched or torch._C._autograd._profiler_enabled()
    if device.type != "cpu" or watched or torch.is_autocast_enabled("cpu") or not _openmp():
        return 1
    return torch.get_num_threads()


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, the same for every call of a thread: no pages to be made, warm in its cache."""
    if torch._C._len_torch_dispatch_stack():  # tensors of a mode are not to be kept
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = math.prod(shape) * dtype.itemsize
    memory: Tensor | None = getattr(_OWN, "memory", None)
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):
            memory = _OWN.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory[:size].view(dtype).view(shape)


def enough(count: int, most: int) -> bool:
    """Tell whether ``count`` pieces at once use the cores better than operations split among all of ``most``."""
    return count > 1 and 4 * count >= 3 * most


def run_all(tasks: Iterable[Task], count: int) -> None:
    """Run tasks, ``count`` at once, in the caller's grad and inference mode; one after another for 1.

    Tasks are taken from the iterable, in this thread, as others end. After an error no further one begins, and none is
    running when it is raised.
    """
    if count == 1 or (found := _pool(count)) is None:
        for task in tasks:
            task()
        return
    size, pool = found
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(task: Task) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            task()

    at_once = 2 * count if count == size else count  # twice, so that no worker waits for this thread
    running: set[Future[None]] = set()
    try:
        for task in tasks:
            running.add(pool.submit(run, task))
            if len(running) == at_once:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
        for each in running:
            each.result()
    except BaseException:
        for each in running:
            each.cancel()
        wait(running)
        raise


def _pool(count: int) -> tuple[int, ThreadPoolExecutor] | None:
    """The threads, made once and kept, each of which has one thread of PyTorch's; None where none can be made."""
    with _LOCK:
        size, pool = _POOLS[0] if _POOLS else (0, None)
        if pool is None or size < count:
            before = torch.get_num_threads()
            size = max(count, before)
            pool, together = ThreadPoolExecutor(size, "loftup"), threading.Barrier(size)

            def begin() -> None:
                torch.set_num_threads(1)
                torch.get_num_threads()  # a thread takes the number of all at its first operation: let that be this
                together.wait()

            try:
                for each in [pool.submit(begin) for _ in range(size)]:
                    each.result()
            except BaseException as error:
                together.abort()
                pool.shutdown(wait=False)
                if isinstance(error, RuntimeError):  # the system gives no more threads
                    return None
                raise
            finally:
                torch.set_num_threads(before)  # of this thread, and of threads to come
            _POOLS[:] = [(size, pool)]
        return size, pool
