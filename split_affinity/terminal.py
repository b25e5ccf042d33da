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


class Lossy(io.FileIO):
    """A descriptor for output whose loss ends nothing: what the system does not take, since the
    reader has gone or the disk is full, is dropped.
    """

    def write(self, data: Any) -> int:
        """As the file's own, but that it never fails."""
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


class BesideBar(Lossy):
    """A terminal on which another process may have drawn a progress bar: a line that begins takes
    the place of the bar, which is drawn once more below it.
    """

    CLEAR = b"\r\x1b[K"  # the line, from its beginning on
    begun = False  # a line

    def write(self, data: Any) -> int:
        """As Lossy, on a line of its own."""
        clear, self.begun = b"" if self.begun else self.CLEAR, not bytes(data).endswith(b"\n")
        return max(0, super().write(clear + bytes(data)) - len(clear))


def lossy(stream: Any, kind: type[Lossy] = Lossy) -> io.TextIOWrapper:
    """A stream to write to in place of the process's own, or of a missing one. Characters that its
    encoding lacks are escaped.
    """
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
    """Have no trouble with standard output or standard error end what is done meanwhile. Streams
    that somebody has put in place of the process's own stay.

    Descriptors 0 to 2 that are closed are opened: a checkpoint would get their numbers otherwise,
    and in it what any library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    with contextlib.ExitStack() as stack:
        if sys.stdout in (None, sys.__stdout__):
            stack.enter_context(contextlib.redirect_stdout(lossy(sys.stdout)))
        if sys.stderr in (None, sys.__stderr__):
            stack.enter_context(contextlib.redirect_stderr(lossy(sys.stderr)))
        yield


def say(text: str, file: Any = None) -> None:
    """Print above the progress bar, at once: into a pipe, too, lines shall come as they arise.
    Nothing in it steers the terminal, but for line feeds: foreign text is to be `shown` before.
    """
    file = file or sys.stdout
    tqdm.write(fitted(shown_lines(text), terminal_columns(file)), file=file)
    file.flush()


def say_lines(lines: Iterable[str]) -> None:
    """Print lines, as `say`, each of which is one whatever foreign text is in it."""
    say("\n".join(map(shown, lines)))


def terminal_columns(stream: Any) -> int | None:
    """The width of the terminal that a stream writes to; None if it writes elsewhere."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # some are 0 columns wide
    except (OSError, ValueError):
        return None


def fitted(text: str, columns: int | None) -> str:
    """Text whose lines are broken at blanks if they are longer than a terminal's, and go on below,
    indented; None: left whole. Without blanks they stay long, as lists of cores.
    """
    if not columns:
        return text
    wrap = textwrap.TextWrapper(
        columns, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    lines = text.split("\n")
    return "\n".join(wrap.fill(line) if len(line) > columns else line for line in lines)


def warn(text: str) -> None:
    """Print a warning, one line, on standard error."""
    say(shown(f"warning: {text}"), sys.stderr)


@contextlib.contextmanager
def silenced_output() -> Iterator[None]:
    """Have nothing printed on standard output meanwhile, and on standard error nothing into the
    progress bar of the process that is not silent.
    """
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        if terminal_columns(sys.stderr):
            stack.enter_context(contextlib.redirect_stderr(lossy(sys.stderr, BesideBar)))
        yield
