"""Ctrl-C and the like: they end at once what is still being set up; then a signal becomes a request
to stop, which is answered at once and heard between two steps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from split_affinity import PROGRAM
from split_affinity.errors import STOP_SIGNALS, Stopped
from split_affinity.text import span_text

CLEARING_UP_S = 2  # after a signal that ends a run at once; then the process ends as it is

Handler = Callable[[int, object], None]


class Interrupted(KeyboardInterrupt):
    """A signal ended what was being done, and has been answered."""

    def __init__(self, signum: int):
        super().__init__(str(Stopped(signum)))
        self.exit_code = Stopped(signum).exit_code


def handled_by(handler: Handler) -> dict[int, Any]:
    """Have a function take the signals that stop a run; returns those that took them before. A
    SIGHUP that is ignored (nohup) stays so. Processes that are forked do nothing for a signal.

    Outside the main thread, where Python allows no handlers, nothing happens.
    """
    before: dict[int, Any] = {}
    process = os.getpid()

    def handle(signum: int, frame: object) -> None:
        if os.getpid() == process:
            handler(signum, frame)

    if threading.current_thread() is threading.main_thread():
        for signum in STOP_SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, handle)
    return before


def handle_again(handlers: dict[int, Any]) -> None:
    """Put handlers back."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def answer(text: str) -> None:
    """Print a line on standard error from a signal's handler: above the progress bar, unless the
    signal came in the middle of another print there.
    """
    try:
        from split_affinity.terminal import say  # tqdm: not for --help

        say(text, sys.stderr)
    except Exception:  # a stream that is in use, or half imported
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


def end_while_loading(says: bool = True) -> None:
    """Have a signal end the process, with one line if it `says` so, while there is nothing to clear
    up: as packages are imported, which an exception would leave in pieces.
    """

    def end(signum: int, frame: object) -> None:
        if says:
            with contextlib.suppress(OSError):
                os.write(2, f"{PROGRAM}: {Stopped(signum)}\n".encode())
        os._exit(Stopped(signum).exit_code)

    handled_by(end)


@contextlib.contextmanager
def ending_at_once(says: bool = True) -> Iterator[None]:
    """Have a signal raise Interrupted in what is done meanwhile, with one line if it `says` so. If
    it takes too long to clear up, or another signal comes, the process ends as it is.
    """
    ended: list[threading.Timer] = []

    def end(signum: int, frame: object) -> None:
        handle_again(dict.fromkeys(before, signal.SIG_DFL))
        error = Interrupted(signum)
        ended.append(threading.Timer(CLEARING_UP_S, os._exit, [error.exit_code]))
        ended[0].daemon = True
        ended[0].start()
        if says:
            answer(f"{PROGRAM}: {error}")
        raise error

    before = handled_by(end)
    try:
        yield
    finally:
        handle_again(before)
        for timer in ended:
            timer.cancel()


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request that `check` raises as Stopped:
    between two optimizer steps, or batches of a validation.

    A second signal ends the process at once, unless there are several ranks, of which the launcher
    kills those that do not end in time. If there is `work`, as "this step", the first is answered
    at once by what is finished before; `saves` says whether the run is saved then. A context
    manager: leaving it restores the handlers.
    """

    def __init__(self, ranks: int = 1, work: str = ""):
        self.signum: int | None = None
        self.saves = False
        self._work, self._answers, self._until_s = work, bool(work), 0.0
        self._took_s: dict[str, float] = {}
        self._before: dict[int, Any] = {}
        self._next = signal.SIG_DFL if ranks == 1 else signal.SIG_IGN

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def begin(self, work: str, before_s: float | None = None) -> None:
        """Take note of what is begun now, and of how long such work took the last time."""
        if before_s is not None:
            self._took_s[work] = before_s
        self._work, self._until_s = work, time.monotonic() + self._took_s.get(work, 0)

    def _handle(self, signum: int, frame: object) -> None:
        self.signum = signum
        handle_again(dict.fromkeys(self._before, self._next))
        if self._answers:
            answer(f"{PROGRAM}: {signal.Signals(signum).name}: {self._finishing()}")

    def _finishing(self) -> str:
        left_s = self._until_s - time.monotonic()
        about = f", about {span_text(left_s)}" if left_s >= 1 else ""
        saving = ", then saving" if self.saves else ""
        text = f"finishing {self._work}{about}{saving}"
        if self._next == signal.SIG_IGN:
            return text
        return f"{text}; once more: end {'without saving' if self.saves else 'at once'}"

    def __enter__(self) -> StopRequest:
        self._before = handled_by(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.signum is None or self._next == signal.SIG_DFL:
            handle_again(self._before)  # else the launcher may signal again while ranks part
