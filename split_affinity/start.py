"""What the program does before it loads PyTorch, which takes seconds: answer `--help`, refuse
options that are wrong, say what was asked, and explain a PyTorch that cannot be loaded.
"""

from __future__ import annotations

import importlib
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec

from split_affinity import PROGRAM
from split_affinity.errors import UserError
from split_affinity.machine.binding import begin_anew
from split_affinity.options.commands import (
    installed_version,
    parse_arguments,
    split_arguments,
)
from split_affinity.options.existence import missing_early
from split_affinity.ranks.launch import Launch, launched
from split_affinity.signals import end_while_loading
from split_affinity.text import shown, tell, without_login

ENDED_WITHIN_S = 5  # a launcher ends the other processes of a machine once one has failed
PACKAGES = ("torch", "torchvision", "PIL", "fsspec", "psutil", "tqdm")
PIP_NAMES = {"PIL": "pillow"}  # where that is not the name to import
# What Python, glibc and OpenBLAS say where the system does not give what an import asks for.
TOO_FEW_THREADS = "start new thread|Resource temporarily unavailable"
TOO_LITTLE_MEMORY = (
    "failed to map segment|[Cc]annot allocate memory(?! in static TLS)|[Oo]ut of memory|bad_alloc"
)
ENOUGH_BYTES = 8 * 2**30  # of address space: PyTorch takes a half of that
ANSWERING = ("predict", "list-models")  # what they print may be for other programs


def begin() -> None:
    """Do what comes before PyTorch, and load that. Ends the program, with its exit code, where
    nothing more was asked for, where options are wrong, and where a package cannot be loaded.
    """
    argv, launch = sys.argv[1:], launched()
    end_while_loading(not launch.local_rank)
    command = check_early(argv, launch)
    load_packages(("tqdm",))  # which `announce` needs
    if not launch.rank:
        announce(command, argv)
    load_packages()


def check_early(argv: Sequence[str], launch: Launch) -> str:
    """The command. Ends the program if the arguments are wrong, or ask for nothing but a text."""
    try:
        command, settings = parse_arguments(argv, ranks=launch.ranks)
        for message in missing_early(command, settings, launch.rank):
            raise UserError(message)
        begin_anew()
        return command
    except UserError as error:
        if launch.local_rank:  # which the launcher ends as soon as the first one has said why
            time.sleep(ENDED_WITHIN_S)
        else:
            tell(f"{PROGRAM}: error: {shown(str(error))}", sys.stderr)
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
            say(f"{shown(asked)}; loading PyTorch, which takes some seconds", stream)


def load_packages(packages: Sequence[str] = PACKAGES) -> None:
    """Import what takes seconds. Ends the program with one line if that cannot be."""
    package = packages[0]
    try:
        if packages == PACKAGES:
            check_address_space()
        for package in packages:
            importlib.import_module(package)
    except Exception as error:
        tell(f"{PROGRAM}: error: {explain_import_error(error, package)}", sys.stderr)
        raise SystemExit(UserError.exit_code) from None


def check_address_space(packages: Sequence[str] = PACKAGES) -> None:
    """Raise MemoryError if the packages have too little room under `ulimit -v`. Where that is low,
    a process of its own tries: C++ and OpenBLAS end one that cannot have what they ask for.
    """
    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    if not 0 <= limit_bytes < ENOUGH_BYTES:
        return
    # It has a tenth less room than this one, which needs some for what it has loaded already.
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_AS, 2 * ({limit_bytes * 9 // 10},))\n"
        f"try:\n import {', '.join(packages)}\n"
        "except Exception as error: sys.exit(f'{type(error).__name__}: {error}')"
    )
    trial = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True
    )
    text = trial.stderr.decode(errors="replace")
    # Any other exception is explained when it comes here, too.
    other = trial.returncode == 1 and not re.search(f"MemoryError|BLAS|{TOO_LITTLE_MEMORY}", text)
    if trial.returncode and not other:
        lines = text.split("\n")
        raise MemoryError(next(filter(str.strip, reversed(lines)), "ended").strip(" ."))


def explain_import_error(error: Exception, package: str = "torch") -> str:
    """Why a package cannot be loaded, and what helps, in one line: it is missing, limits of the
    system are too low, PyTorch and torchvision do not fit together, or it is damaged. An error that
    names no package is taken for one of `package`.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing and not find_spec(missing):
        name = PIP_NAMES.get(missing, missing)
        return f"cannot load {name}, which is not installed: pip install {name}"
    if re.search(TOO_FEW_THREADS, str(error)):
        limit = limit_here("-u", resource.RLIMIT_NPROC, 1)
        return f"cannot load {package}: {reason}; more threads are needed: raise {limit}"
    if isinstance(error, MemoryError) or re.search(TOO_LITTLE_MEMORY, str(error)):
        limit = limit_here("-v", resource.RLIMIT_AS, 1024)
        return f"cannot load {package}: {reason}; too little memory or address space: raise {limit}"
    if package in ("torch", "torchvision"):
        versions = " with ".join(f"{each} {installed_version(each)}" for each in PACKAGES[:2])
        return (
            f"cannot load {versions}: {reason}; a torch release needs the torchvision made for "
            "it: pip install --upgrade -r requirements.txt"
        )
    name = PIP_NAMES.get(package, package)
    again = f"pip install --force-reinstall {name}"
    return f"cannot load {name} {installed_version(name)}: {reason}; install it again: {again}"


def limit_here(flag: str, limit: int, unit_bytes: int) -> str:
    """A limit of this process, as the shell calls it, and what it is."""
    value = resource.getrlimit(limit)[0]
    return f"`ulimit {flag}` (here {value // unit_bytes if value >= 0 else 'unlimited'})"
