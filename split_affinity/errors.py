"""Errors that the user reads as one line."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """The user asked for something impossible: one line, nothing written."""

    exit_code = 2


class RunError(Exception):
    """A run cannot go on, and the program is not to blame: one line."""

    exit_code = 1


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked the run to stop; raised between two optimizer steps."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.exit_code = signum, 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:  # ranks send it to each other
        return Stopped, (self.signum,)


LIKELY_REASONS = {  # by a pattern in an error's text; the first match counts
    r"MemoryError|allocate memory|not enough memory|ENOMEM": (
        "out of memory: try a smaller --batch-size (with more --accumulate), or fewer loaders (-j)"
    ),
    r"LoaderDied.*SIGBUS": (
        "shared memory (/dev/shm) is full: enlarge it (docker run --shm-size=1g), or try fewer "
        "loaders (-j)"
    ),
    r"LoaderDied": (
        "a loader was killed, by the system for want of memory perhaps: try fewer loaders (-j) or "
        "a smaller --batch-size"
    ),
    r"Too many open files": "too many open files: raise `ulimit -n`, or try fewer loaders (-j)",
    r"AF_UNIX path too long": (
        "no folder with a path short enough for sockets: let TMPDIR name one, or load without "
        "loader processes (-j 0)"
    ),
    r"can't start new thread": (
        "no room for another thread: raise the limits of memory (ulimit -v) and of processes (-u), "
        "or try fewer loaders (-j)"
    ),
    r"LoaderFailed": "a loader failed: try fewer loaders (-j), or none (-j 0)",
}


def likely_reason(error: Exception) -> str:
    """Why a run ended and what helps, in one line: a foreseen error's text is that already."""
    if isinstance(error, (UserError, RunError, Stopped)):
        return str(error)
    name, lines = type(error).__name__, str(error).strip().splitlines() or [""]
    text = f"{name}: {lines[-1] if 'Original Traceback' in str(error) else lines[0]}"
    for pattern, reason in LIKELY_REASONS.items():
        if re.search(pattern, f"{name}: {error}"):
            return f"{reason} ({text})"
    return f"an error that was not foreseen: {text}"


LESS_MEMORY = "lower --batch-size, --image-size or --num-classes"


def one_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a failed allocation, in Python, torch or the system, into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        reason = one_line(error).rpartition("DefaultCPUAllocator: ")[2]
        raise UserError(f"not enough memory: {reason}; {LESS_MEMORY}") from None
