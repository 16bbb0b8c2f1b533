"""Being told to stop: SIGINT and SIGTERM end a run after the step at hand."""

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopSignal", "ignore_signals"]


class Interrupted(Exception):  # noqa: N818  (not an error: what was asked for)
    """A run was stopped by a signal, and saved; the text says how to go on.

    Attributes:
        status: the exit status that tells of the signal, 130 for SIGINT and 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class StopSignal:
    """Context in which the first SIGINT or SIGTERM is noted in ``number``; the second acts as it did before.

    Outside the main thread, where Python has no signals, nothing is noted.

    Args:
        answer: written to standard error when the signal comes.
    """

    def __init__(self, answer: str = "") -> None:
        self.number = 0
        self._answer = answer
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        if self._answer:
            # Not print, which the signal may have interrupted.
            os.write(2, f"\n{self._answer}; once more to stop at once\n".encode())


def ignore_signals(worker: int = 0) -> None:
    """For loader workers: the signal that goes to all processes of a run is the main process's to answer.

    It must also end them, with the loader's iterator: multiprocessing would do so by SIGTERM, and wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
