"""What happens before PyTorch is loaded: `--help`, wrong options, a line about what was asked."""

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
    ANSWERING,
    installed_version,
    parse_arguments,
    split_arguments,
)
from split_affinity.options.existence import missing_early
from split_affinity.ranks.launch import launched
from split_affinity.signals import end_while_loading
from split_affinity.text import shown, try_print, without_login

ENDED_WITHIN_S = 5  # a launcher ends the other processes of a machine once one has failed
PACKAGES = ("torch", "torchvision", "PIL", "fsspec", "psutil", "tqdm")
PIP_NAMES = {"PIL": "pillow"}  # if that is not the name to import
# What Python, glibc and OpenBLAS say if the system refuses what an import asks for.
TOO_FEW_THREADS = "start new thread|Resource temporarily unavailable"
TOO_LITTLE_MEMORY = (
    "failed to map segment|[Cc]annot allocate memory(?! in static TLS)|[Oo]ut of memory|bad_alloc"
)
ENOUGH_BYTES = 8 * 2**30  # of address space: PyTorch takes half of that


def begin() -> None:
    """Do what comes before PyTorch, then load it. Exits after `--help`, or if options are wrong."""
    argv, launch = sys.argv[1:], launched()
    end_while_loading(not launch.local_rank)
    try:
        command, settings = parse_arguments(argv, ranks=launch.ranks)
        for message in missing_early(command, settings, launch.rank):
            raise UserError(message)
        begin_anew()
    except UserError as error:
        if launch.local_rank:  # the launcher ends this process once the first one has said why
            time.sleep(ENDED_WITHIN_S)
        else:
            try_print(f"{PROGRAM}: error: {shown(str(error))}", sys.stderr)
        raise SystemExit(error.exit_code) from None
    if not launch.rank:
        announce(command, argv)
    load_packages()


def announce(command: str, argv: Sequence[str]) -> None:
    """Say what was asked, and that loading takes seconds; beside answers only on a terminal."""
    stream = sys.stderr if command in ANSWERING else sys.stdout
    if command in ANSWERING and not (stream and stream.isatty()):
        return
    typed = [] if command == "list-models" else map(without_login, split_arguments(argv)[1])
    asked = shown(" ".join([command, shlex.join(typed)]).rstrip())
    try_print(f"{asked}; loading PyTorch, which takes some seconds", stream)


def load_packages() -> None:
    """Import what takes seconds. Exits with one line if that fails."""
    package = PACKAGES[0]
    try:
        check_address_space()
        for package in PACKAGES:
            importlib.import_module(package)
    except Exception as error:
        try_print(f"{PROGRAM}: error: {explain_import_error(error, package)}", sys.stderr)
        raise SystemExit(UserError.exit_code) from None


def check_address_space(packages: Sequence[str] = PACKAGES) -> None:
    """Raise MemoryError if `ulimit -v` leaves the packages too little room.

    If that is low, another process tries to import them: C++ and OpenBLAS end the process if they
    do not get what they ask for.
    """
    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    if not 0 <= limit_bytes < ENOUGH_BYTES:
        return
    # A tenth less than this process has, which has loaded something already.
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
    # Any other exception will be raised, and explained, in this process too.
    other = trial.returncode == 1 and not re.search(f"MemoryError|BLAS|{TOO_LITTLE_MEMORY}", text)
    if trial.returncode and not other:
        lines = [line for line in text.split("\n") if line.strip()]
        raise MemoryError(lines[-1].strip(" .") if lines else "ended")


def explain_import_error(error: Exception, package: str = "torch") -> str:
    """Why a package cannot be loaded and what helps, in one line.

    An error that names no package is taken for one of `package`.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing and not find_spec(missing):
        name = PIP_NAMES.get(missing, missing)
        return f"cannot load {name}, which is not installed: pip install {name}"
    if re.search(TOO_FEW_THREADS, str(error)):
        limit = describe_limit("-u", resource.RLIMIT_NPROC, 1)
        return f"cannot load {package}: {reason}; more threads are needed: raise {limit}"
    if isinstance(error, MemoryError) or re.search(TOO_LITTLE_MEMORY, str(error)):
        limit = describe_limit("-v", resource.RLIMIT_AS, 1024)
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


def describe_limit(flag: str, limit: int, unit_bytes: int) -> str:
    """A limit of this process: the shell's command for it and its value."""
    value = resource.getrlimit(limit)[0]
    return f"`ulimit {flag}` (here {value // unit_bytes if value >= 0 else 'unlimited'})"
