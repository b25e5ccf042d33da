"""What the program does before it loads PyTorch, which takes seconds: answer `--help`, refuse
options that are wrong, say what was asked, and explain a PyTorch that cannot be loaded.
"""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from collections.abc import Sequence

from split_affinity import PROGRAM
from split_affinity.errors import UserError
from split_affinity.options.commands import (
    installed_version,
    parse_arguments,
    split_arguments,
)
from split_affinity.ranks.launch import Launch, launched
from split_affinity.signals import end_while_loading
from split_affinity.text import readable, tell, without_login

ENDED_WITHIN_S = 5  # a launcher ends the other processes of a machine once one has failed
PACKAGES = ("torch", "torchvision", "PIL", "fsspec", "psutil", "tqdm")
ANSWERING = ("predict", "list-models")  # what they print may be for other programs


def begin() -> None:
    """Do what comes before PyTorch, and load that. Ends the program, with its exit code, where
    nothing more was asked for, where options are wrong, and where a package cannot be loaded.
    """
    argv, launch = sys.argv[1:], launched()
    end_while_loading(not launch.local_rank)
    command = check_early(argv, launch)
    if not launch.rank:
        announce(command, argv)
    load_packages()


def check_early(argv: Sequence[str], launch: Launch) -> str:
    """The command. Ends the program if the arguments are wrong, or ask for nothing but a text."""
    try:
        return parse_arguments(argv, ranks=launch.ranks)[0]
    except UserError as error:
        if launch.local_rank:  # which the launcher ends as soon as the first one has said why
            time.sleep(ENDED_WITHIN_S)
        else:
            tell(f"{PROGRAM}: error: {readable(str(error))}", sys.stderr)
        raise SystemExit(error.exit_code) from None


def announce(command: str, argv: Sequence[str]) -> None:
    """Say what was asked for, and what takes seconds now; beside answers, to a terminal alone."""
    from split_affinity.terminal import lossy_output, say, terminal_columns  # tqdm: not for --help

    typed = () if command == "list-models" else map(without_login, split_arguments(argv)[1])
    options = shlex.join(typed)
    asked = f"{command} {options}".rstrip()
    with lossy_output():
        stream = sys.stderr if command in ANSWERING else sys.stdout
        if stream is sys.stdout or terminal_columns(stream):
            say(f"{asked}; loading PyTorch, which takes some seconds", stream)


def load_packages() -> None:
    """Import what takes seconds. Ends the program with one line if that cannot be."""
    try:
        for package in PACKAGES:
            importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:
        tell(explain_import_error(error), sys.stderr)
        raise SystemExit(UserError.exit_code) from None


def explain_import_error(error: Exception) -> str:
    """One line that says which packages do not fit together and how to mend it."""
    versions = (f"{package} {installed_version(package)}" for package in ("torch", "torchvision"))
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{PROGRAM}: error: cannot load {' with '.join(versions)}: {reason}; a torch "
        "release needs the torchvision made for it: pip install --upgrade -r requirements.txt"
    )
