"""`--open`: the pictures that a command has drawn, shown by whatever opens them here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from split_affinity.terminal import say_lines
from split_affinity.text import without_login

SHOWN_BY = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # variables: a screen, or what opens pages
PATIENCE_S = 5.0  # what opens a picture has begun by then, or goes on by itself
# In a process of its own: a browser for terminals waits until it is left, some print what they do.
# webbrowser takes xdg-open where that is.
OPENER = "import sys, webbrowser; sys.exit(not all([*map(webbrowser.open, sys.argv[1:])]))"


def open_files(paths: Sequence[Path], environment: Mapping[str, str] = os.environ) -> None:
    """Open files; if nothing can show them, print where they are. Neither waits nor fails."""
    there = [path for path in paths if path.exists()]
    if there and not (has_screen(environment) and opened(there)):
        places = ", ".join(without_login(str(path)) for path in there)
        say_lines([f"nothing here can open pictures; they are {places}"])


def has_screen(environment: Mapping[str, str]) -> bool:
    """Whether there is a screen, or a program that was named to show pages."""
    return sys.platform == "darwin" or any(environment.get(name) for name in SHOWN_BY)


def opened(paths: Sequence[Path]) -> bool:
    """Whether a browser took the files, or is still busy with them."""
    addresses = [path.absolute().as_uri() for path in paths]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-c", OPENER, *addresses], start_new_session=True, **nowhere
        )
        try:
            return process.wait(PATIENCE_S) == 0
        except subprocess.TimeoutExpired:
            return True
    return False
