"""The screen: lines above the progress bar, warnings, streams that may be closed or full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from split_affinity.text import shown, shown_lines


class LossyFile(io.FileIO):
    """A descriptor that drops what it cannot write: the reader has gone, or the disk is full."""

    def write(self, data: Any) -> int:
        """Write and never fail."""
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


class BesideBar(LossyFile):
    """A terminal with another process's progress bar: a new line overwrites the bar.

    That process draws it again below.
    """

    CLEAR_LINE = b"\r\x1b[K"
    in_line = False

    def write(self, data: Any) -> int:
        """Write, from the beginning of a line if none has begun."""
        clear = b"" if self.in_line else self.CLEAR_LINE
        self.in_line = not bytes(data).endswith(b"\n")
        return max(0, super().write(clear + bytes(data)) - len(clear))


def lossy_stream(stream: Any, kind: type[LossyFile] = LossyFile) -> io.TextIOWrapper:
    """A stream in place of the process's own, or of a missing one; it escapes what it lacks."""
    if stream:
        with contextlib.suppress(OSError):
            stream.flush()
    raw = kind(stream.fileno() if stream else os.devnull, "w", closefd=not stream)
    encoding = stream.encoding if stream else None
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True
    )


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Let no failure of standard output or standard error end the program.

    Streams that somebody has put in place of the process's own stay.
    """
    # A closed descriptor would become a checkpoint's, and prints of any library would go there.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    with contextlib.ExitStack() as stack:
        if sys.stdout in (None, sys.__stdout__):
            stack.enter_context(contextlib.redirect_stdout(lossy_stream(sys.stdout)))
        if sys.stderr in (None, sys.__stderr__):
            stack.enter_context(contextlib.redirect_stderr(lossy_stream(sys.stderr)))
        yield


def say(text: str, file: Any = None) -> None:
    """Print above the progress bar, and flush. Foreign text must be `shown` first.

    On a terminal long lines are broken at blanks, if they have any, and go on indented.
    """
    file = file or sys.stdout
    text = shown_lines(text)
    if columns := terminal_columns(file):
        wrap = textwrap.TextWrapper(
            columns, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        lines = text.split("\n")
        text = "\n".join(wrap.fill(line) if len(line) > columns else line for line in lines)
    tqdm.write(text, file=file)
    file.flush()


def say_lines(lines: Iterable[str]) -> None:
    """Print lines; foreign text in one does not break it."""
    say("\n".join(map(shown, lines)))


def terminal_columns(stream: Any) -> int | None:
    """The width of a stream's terminal; None if it writes elsewhere."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # some are 0 columns wide
    except (OSError, ValueError):
        return None


def warn(text: str) -> None:
    """Print a warning, one line, on standard error."""
    say(shown(f"warning: {text}"), sys.stderr)


@contextlib.contextmanager
def silenced_output() -> Iterator[None]:
    """Drop standard output, and print errors beside the progress bar of another process."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        if terminal_columns(sys.stderr):
            stack.enter_context(contextlib.redirect_stderr(lossy_stream(sys.stderr, BesideBar)))
        yield
