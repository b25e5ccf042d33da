"""SIGINT, SIGTERM and SIGHUP: they end set-up at once, and training between two steps.

In the order of a run: `end_while_loading` while packages are imported, `ending_at_once` around the
whole command, and inside it StopRequest around training, validation and measurements.
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

CLEANUP_S = 2  # after a signal during set-up; then the process ends as it is


class Interrupted(KeyboardInterrupt):
    """A signal ended set-up, and the user has been told."""

    def __init__(self, signum: int):
        super().__init__(str(Stopped(signum)))
        self.exit_code = Stopped(signum).exit_code


def handle_signals(handler: Callable[[int, object], None]) -> dict[int, Any]:
    """Let a function handle the signals that stop a run; returns the handlers before.

    An ignored SIGHUP (nohup) stays ignored. Outside the main thread nothing happens.
    """
    before: dict[int, Any] = {}
    process = os.getpid()

    def handle(signum: int, frame: object) -> None:
        if os.getpid() == process:  # not in a forked process
            handler(signum, frame)

    if threading.current_thread() is threading.main_thread():
        for signum in STOP_SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, handle)
    return before


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Set a handler for each signal."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def say_in_handler(text: str) -> None:
    """Print a line on standard error, above the progress bar if no other print is going on."""
    try:
        from split_affinity.terminal import say  # tqdm: not for --help

        say(text, sys.stderr)
    except Exception:  # a stream in use, or half imported
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


def end_while_loading(says: bool = True) -> None:
    """Let a signal end the process, with one line if it `says` so.

    An exception would leave packages half imported, and there is nothing to clean up.
    """

    def end(signum: int, frame: object) -> None:
        if says:
            with contextlib.suppress(OSError):
                os.write(2, f"{PROGRAM}: {Stopped(signum)}\n".encode())
        os._exit(Stopped(signum).exit_code)

    handle_signals(end)


@contextlib.contextmanager
def ending_at_once(says: bool = True) -> Iterator[None]:
    """Let a signal raise Interrupted, with one line if it `says` so.

    If cleaning up takes longer than CLEANUP_S, or another signal comes, the process ends as it is.
    """
    timers: list[threading.Timer] = []

    def end(signum: int, frame: object) -> None:
        restore_handlers(dict.fromkeys(before, signal.SIG_DFL))
        error = Interrupted(signum)
        timers.append(threading.Timer(CLEANUP_S, os._exit, [error.exit_code]))
        timers[0].daemon = True
        timers[0].start()
        if says:
            say_in_handler(f"{PROGRAM}: {error}")
        raise error

    before = handle_signals(end)
    try:
        yield
    finally:
        restore_handlers(before)
        for timer in timers:
            timer.cancel()


class StopRequest:
    """A context in which a signal makes `check` raise Stopped, between two steps or batches.

    A second signal ends the process at once. With several ranks it is ignored: the launcher kills
    those that do not end in time. With `work`, such as "this step", the handler prints "finishing
    this step", and ", then saving" if `saves` is set.
    """

    def __init__(self, ranks: int = 1, work: str = ""):
        self.signum: int | None = None
        self.saves = False
        self._says, self._work, self._until_s = bool(work), work, 0.0
        self._took_s: dict[str, float] = {}
        self._before: dict[int, Any] = {}
        self._next = signal.SIG_DFL if ranks == 1 else signal.SIG_IGN

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def begin(self, work: str, before_s: float | None = None) -> None:
        """Note which work begins now, and how long it took the last time, if that is known."""
        if before_s is not None:
            self._took_s[work] = before_s
        self._work, self._until_s = work, time.monotonic() + self._took_s.get(work, 0)

    def _handle(self, signum: int, frame: object) -> None:
        self.signum = signum
        restore_handlers(dict.fromkeys(self._before, self._next))
        if not self._says:
            return
        text = f"{PROGRAM}: {signal.Signals(signum).name}: finishing {self._work}"
        left_s = self._until_s - time.monotonic()
        if left_s >= 1:
            text += f", about {span_text(left_s)}"
        if self.saves:
            text += ", then saving"
        if self._next == signal.SIG_DFL:
            text += f"; once more: end {'without saving' if self.saves else 'at once'}"
        say_in_handler(text)

    def __enter__(self) -> StopRequest:
        self._before = handle_signals(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.signum is None or self._next == signal.SIG_DFL:
            restore_handlers(self._before)  # else the launcher may signal while ranks end
