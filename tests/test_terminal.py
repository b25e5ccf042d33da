"""Output that cannot be written. Run: python -m pytest tests/test_terminal.py"""

import contextlib
import os
import sys

import pytest

from split_affinity.terminal import lossy_output, say, say_lines, warn
from split_affinity.text import try_print

# Output that cannot be written


@contextlib.contextmanager
def piped(monkeypatch):
    """Have a pipe as the process's own standard output; gives the descriptor to read from."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="ascii") as stream, monkeypatch.context() as patch:
        for name in ("stdout", "__stdout__"):
            patch.setattr(sys, name, stream)
        yield reading
        assert sys.stdout is stream
    with contextlib.suppress(OSError):
        os.close(reading)


def test_output_is_taken_as_long_as_somebody_reads_it(monkeypatch):
    with piped(monkeypatch) as pipe:
        sys.stdout.write("before\n")  # and still in its buffer
        with lossy_output():
            say("Bl\u00fcte")
            print("printed")
            assert os.read(pipe, 100) == b"before\nBl\\xfcte\nprinted\n"
            os.close(pipe)
            for _ in range(2):
                say("lost" * 50_000)
            print("lost", end="")


def test_output_beyond_what_a_pipe_holds_is_lost_where_writing_does_not_wait(monkeypatch):
    with piped(monkeypatch) as pipe, lossy_output():
        os.set_blocking(sys.stdout.fileno(), False)
        for _ in range(3):
            say("text" * 50_000)
        assert os.read(pipe, 4) == b"text"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_missing_stream_is_made_up_for_and_missing_again_in_the_end(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with lossy_output():
        say("lost", getattr(sys, name))
    assert getattr(sys, name) is None


def test_what_is_said_does_not_steer_the_terminal(capsys):
    """Line feeds of the program's own are left; a warning is one line, whatever is in it."""
    say("a\x1b[31mb\r\u202e\nc\x07")
    say_lines(["d\ne", "f\tg"])
    warn("x\n# y")
    try_print("z\x9b\nend", sys.stdout)
    printed = capsys.readouterr()
    assert printed.out == "a\\x1b[31mb\\r\\u202e\nc\\x07\nd\\ne\nf\\tg\nz\\x9b\nend\n"
    assert printed.err == "warning: x\\n# y\n"


def test_a_last_line_is_printed_as_far_as_the_stream_takes_it(monkeypatch):
    with piped(monkeypatch) as pipe:
        try_print("Bl\u00fcte", sys.stdout)
        assert os.read(pipe, 100) == b"Bl\\xfcte\n"
        os.close(pipe)
        try_print("lost", sys.stdout)
    try_print("lost", None)


def test_streams_of_somebody_else_stay(capsys):
    streams = sys.stdout, sys.stderr
    with lossy_output():
        assert (sys.stdout, sys.stderr) == streams
        print("shown")
    assert capsys.readouterr().out == "shown\n"
