"""C files of this folder as libraries: compiled once for this CPU, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch

from split_affinity.errors import one_line
from split_affinity.files import open_itself
from split_affinity.text import shown

COMPILERS = "cc", "gcc", "clang"
COMPILING_S = 60.0  # at the most; a second is usual
# What a CPU can do, in /proc/cpuinfo of x86 and of Arm.
CPU_LINES = re.compile(r"^(?:model name|flags|CPU part|Features)\s*:.*$", re.MULTILINE)


class CannotCompile(Exception):
    """There can be no library on this machine; the message says why, in one line."""


def load_library(name: str) -> ctypes.CDLL:
    """The library of the C file `name` in this folder, compiled if it is not in the cache.

    Its threads are those of the OpenMP that PyTorch uses. Raises CannotCompile.
    """
    check_openmp()
    source = resources.files(__package__).joinpath(name).read_bytes()  # in a .pyz, too
    compiler = find_compiler()
    key = hashlib.sha256(b"\0".join([source, *describe_target(compiler)])).hexdigest()[:32]
    kept = None
    with contextlib.suppress(OSError):  # a home that is missing, read-only, or open to others
        kept = cache_folder() / f"{Path(name).stem}-{key}.so"
        os.close(open_itself(kept, os.O_RDONLY))  # no link, and nothing but a file
        with contextlib.suppress(CannotCompile):
            return dlopen(kept)
    try:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "library.so"
            compile_source(source, built, compiler)
            with contextlib.suppress(OSError, CannotCompile):
                if kept:
                    keep_library(built, kept)
                    return dlopen(kept)
            return dlopen(built)
    except OSError as error:
        raise CannotCompile(f"no room to compile in: {error.strerror}") from None


def check_openmp() -> None:
    """Raise CannotCompile unless a new library would find the OpenMP that PyTorch runs with.

    A program may hold several, such as scikit-learn's own. Each would start threads of its own.
    """
    if not sys.platform.startswith("linux"):
        raise CannotCompile(f"it is known for Linux alone, not for {platform.system()}")
    of_torch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    found = []
    for library in (None, of_torch):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(library and os.fspath(library)).GOMP_parallel
            found.append(ctypes.cast(function, ctypes.c_void_p).value)
    if len(found) < 2 or found[0] != found[1]:
        raise CannotCompile("the OpenMP that PyTorch runs with is not to be found")


def find_compiler() -> list[str]:
    """The command of a C compiler: $CC, or the first that there is. Raises CannotCompile."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [[each] for each in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    raise CannotCompile(f"there is no C compiler ({asked[0] if asked else ', '.join(COMPILERS)})")


def compiler_options() -> list[str]:
    """Options of gcc and clang: for this very CPU, and no OpenMP of the compiler's own."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-O3", native, "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi"]


def describe_target(compiler: Sequence[str]) -> list[bytes]:
    """What makes a library another one, beside its source: compiler, options, and the CPU."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpu = ""
    version = run_compiler([*compiler, "--version"])
    lines = sorted(set(CPU_LINES.findall(cpu)))
    target = [*compiler, *compiler_options(), platform.machine(), *lines]
    return [version, *map(os.fsencode, target)]


def run_compiler(command: Sequence[str]) -> bytes:
    """What the compiler prints; raises CannotCompile with its first error."""
    name, pipe = Path(command[0]).name, subprocess.PIPE
    try:
        running = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise CannotCompile(f"{name} cannot be started: {error.strerror}") from None
    with running:
        try:
            printed, errors = running.communicate(timeout=COMPILING_S)
        except BaseException as error:  # it has processes of its own, which hold the pipes
            os.killpg(running.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CannotCompile(f"{name} takes more than {COMPILING_S:g} s") from None
            raise
    if running.returncode:
        said = errors.decode(errors="replace").splitlines()
        wrong = next((line for line in said if "error" in line), said[-1] if said else "it fails")
        raise CannotCompile(f"{name} fails: {shown(wrong.strip())}")
    return printed


def compile_source(source: bytes, library: Path, compiler: Sequence[str]) -> None:
    """Write the library of a C file. Raises CannotCompile, OSError."""
    path = library.with_suffix(".c")
    path.write_bytes(source)
    command = [*compiler, *compiler_options(), "-o", os.fspath(library), os.fspath(path)]
    run_compiler([*command, "-lm"])


def cache_folder() -> Path:
    """The user's own folder for libraries, made if it is not there.

    Raises OSError if there can be none, or if others could put a library there.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = asked if asked.is_absolute() else Path("~/.cache").expanduser()
    folder = base / "train-split-affinity"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not private")
    return folder


def keep_library(built: Path, path: Path) -> None:
    """Copy a library to its place, whole or not at all: another process may do the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(built.read_bytes())
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def dlopen(path: Path) -> ctypes.CDLL:
    """A library in a file. Raises CannotCompile, as where nothing there may be executed."""
    try:
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise CannotCompile(f"the library cannot be loaded: {one_line(error)}") from None
