"""What comes after a report: the page in a browser, and the command to type next."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from pathlib import Path

from split_affinity.terminal import say_lines

SHOWS = "DISPLAY", "WAYLAND_DISPLAY", "BROWSER"  # one of which a browser needs, but on macOS


def sibling_command(program: str, *arguments: str | Path) -> str:
    """A command that runs another program of this folder, and starts as the running one did."""
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    ours = Path(__file__).with_name(Path(words[-1]).name)
    is_ours = ours.suffix == ".py" and ours.exists() and words[-1] == sys.argv[0]
    started = [*words[:-1], str(Path(words[-1]).with_name(program))]
    return shlex.join(
        [*(started if is_ours else ["python", f"deploy/{program}"]), *map(str, arguments)]
    )


def open_page(path: Path) -> None:
    """Open a page in the user's browser; where there is none to be seen, say where the page is."""
    can_show = sys.platform == "darwin" or any(map(os.environ.get, SHOWS))
    if not (can_show and webbrowser.open(path.resolve().as_uri())):
        say_lines([f"no browser can be shown here: open {path.resolve()} in one"])
