"""Ctrl-C and the like: a signal becomes a request to stop, which is heard between two steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

from split_affinity.errors import STOP_SIGNALS, Stopped


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request that `check` raises as Stopped:
    between two optimizer steps, or batches of a validation.

    A second signal ends the process at once, unless there are several ranks, of which the launcher
    kills those that do not end in time; a SIGHUP that is ignored (nohup) stays so. A context
    manager: leaving it restores the handlers. Outside the main thread, where Python allows no
    handlers, it does nothing.
    """

    def __init__(self, ranks: int = 1):
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._next = signal.SIG_DFL if ranks == 1 else signal.SIG_IGN

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: object) -> None:
        self.signum = signum
        for other in self._previous:
            signal.signal(other, self._next)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
