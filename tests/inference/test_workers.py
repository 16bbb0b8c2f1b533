"""Pieces of one call on several threads: in the caller's modes, to the same result, and nothing left running."""

import os
import threading
import time

import pytest
import torch
from material import SINE, inputs, randomised, universal
from torch.utils._python_dispatch import TorchDispatchMode

from loftup import LoftUpError
from loftup.inference import workers as module
from loftup.inference.workers import enough, run_all, scratch, workers


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_tasks_run_at_once_with_one_thread_of_pytorchs_each():
    together, seen = threading.Barrier(3, timeout=30), []

    def task():
        together.wait()  # so that three are running
        seen.append((torch.get_num_threads(), threading.current_thread().name))

    module._POOLS.clear()
    run_all([task] * 6, 3)
    assert {count for count, _ in seen} == {1}
    assert all(name.startswith("loftup") for _, name in seen)
    assert torch.get_num_threads() == 3
    new = []
    thread = threading.Thread(target=lambda: new.append((torch.ones(1) + 1, torch.get_num_threads())))
    thread.start()
    thread.join()
    assert new[0][1] == 3  # threads to come have as many as ever


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_tasks_have_the_callers_modes(context):
    seen = []
    with context():
        expected = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        run_all([lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))] * 4, 3)
    assert seen == [expected] * 4


def test_after_an_error_no_task_begins_and_none_runs():
    begun, ended = [], []

    def task(index):
        begun.append(index)
        if index == 1:
            raise ValueError("task 1")
        time.sleep(0.05)
        ended.append(index)

    with pytest.raises(ValueError, match="task 1"):
        run_all((lambda index=index: task(index) for index in range(100)), 3)
    assert len(begun) < 20
    count = len(ended)
    time.sleep(0.1)
    assert len(ended) == count == len(begun) - 1


def test_one_at_a_time_runs_here():
    seen = []
    run_all([lambda: seen.append(threading.current_thread())], 1)
    assert seen == [threading.current_thread()]


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_a_call_uses_them_and_a_head_of_the_users_own_is_called_here(make, monkeypatch):
    counts = []
    monkeypatch.setattr(module, "_pool", lambda count, pool=module._pool: counts.append(count) or pool(count))
    up, (features, image) = make(), inputs(size=(200, 210))
    with torch.inference_mode():
        dense = up(features, image)
        assert set(counts) == {3}
        counts.clear()
        torch.set_num_threads(1)
        torch.testing.assert_close(up(features, image), dense, atol=1e-5, rtol=0)
        torch.set_num_threads(3)
        assert not counts
        seen = set()

        def head(x):
            seen.add(threading.current_thread())
            return x.sum(1)

        up(features, image, head=head)
        assert seen == {threading.current_thread()}


def test_triton_stays_in_one_thread():
    up, (features, image) = randomised(SINE), inputs(size=(4, 160))
    with torch.inference_mode():
        try:
            dense = up(features, image, backend="triton")
        except LoftUpError as error:
            pytest.skip(f"Triton cannot run here: {error}")
        torch.testing.assert_close(dense, up(features, image), atol=1e-4, rtol=0)


def test_where_most_would_be_idle_operations_are_split_as_ever(monkeypatch):
    assert [enough(count, 8) for count in (1, 5, 6, 8)] == [False, False, True, True]
    assert not enough(1, 1)
    monkeypatch.setattr(module, "_pool", lambda count: pytest.fail(f"{count} threads"))
    torch.set_num_threads(16)
    up, (features, image) = randomised(SINE), inputs(size=(40, 130))  # wide enough for two strips
    with torch.inference_mode():
        up(features, image)


def test_cells_in_several_areas_are_summed_in_order():
    up, (features, image) = universal(), inputs(grid=(4, 4), size=(448, 448))
    torch.set_num_threads(4)
    with torch.inference_mode():
        first = up(features, image)
        assert all(torch.equal(up(features, image), first) for _ in range(4))


def test_where_no_thread_can_be_made_tasks_run_here(monkeypatch):
    class Pool(module.ThreadPoolExecutor):
        def submit(self, *arguments):
            if self._work_queue.qsize() + len(self._threads) > 1:
                raise RuntimeError("can't start new thread")
            return super().submit(*arguments)

    monkeypatch.setattr(module, "_POOLS", [])
    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    seen = []
    run_all([lambda: seen.append(threading.current_thread())] * 3, 3)
    assert seen == [threading.current_thread()] * 3
    assert torch.get_num_threads() == 3


def test_the_profiler_sees_everything():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert workers(torch.device("cpu")) == 1


@pytest.mark.parametrize("make", [lambda: randomised(SINE), universal], ids=["loftup", "any"])
def test_a_small_budget_takes_fewer_of_them(make):
    up, (features, image) = make(), inputs(size=(150, 160))
    with torch.inference_mode():
        torch.testing.assert_close(up(features, image, memory=6 * 2**20), up(features, image), atol=1e-5, rtol=0)


def test_where_modes_watch_it_stays_in_this_thread():
    from torch.utils.flop_counter import FlopCounterMode

    cpu = torch.device("cpu")
    assert workers(cpu) == 3
    assert workers(torch.device("cuda")) == 1
    with FlopCounterMode(display=False):
        assert workers(cpu) == 1
    with torch.autocast("cpu"):
        assert workers(cpu) == 1
    with torch.device("cpu"):
        assert workers(cpu) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_makes_its_own():
    run_all([lambda: None] * 3, 3)
    child = os.fork()
    if not child:
        try:
            run_all([lambda: None] * 3, 3)
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_calls_from_several_threads_at_once():
    up, (features, image) = universal(), inputs(size=(120, 130))
    with torch.inference_mode():
        expected = up(features, image)
    results = [None] * 4

    def call(index):
        with torch.inference_mode():
            results[index] = up(features, image)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_scratch_is_the_threads_own_and_no_modes():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    first = scratch((3, 4), torch.float32)
    assert first.shape == (3, 4)
    assert scratch((2, 2), torch.float64).data_ptr() == first.data_ptr()
    with torch.device("meta"):
        assert scratch((1000, 1000), torch.float32).device.type == "cpu"
    kept = scratch((2, 2), torch.float32).data_ptr()
    with Mode():
        assert scratch((2, 2), torch.float32).data_ptr() != kept
    others = []
    thread = threading.Thread(target=lambda: others.append(scratch((3, 4), torch.float32).data_ptr()))
    thread.start()
    thread.join()
    assert others[0] != scratch((3, 4), torch.float32).data_ptr()
