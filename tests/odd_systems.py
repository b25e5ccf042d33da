"""A launcher for commands on a system that lacks something: files, or system calls.

    python tests/odd_systems.py WHAT COMMAND...

WHAT is a name of MOUNTS, which needs root, or `203,204=1`: these system calls fail with errno 1
(x86-64; 203 sets the affinity of a thread, 204 reads it). The launcher ends with UNSUPPORTED, and
starts nothing, where the system does not let it be made odd.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
import tempfile

UNSUPPORTED = 77
SET_AFFINITY, GET_AFFINITY = 203, 204
BIND = 4096  # of mount(2), as all that follow
PRIVATE, RECURSIVE, NEW_NAMESPACE = 1 << 18, 1 << 14, 0x20000
# By name: what is mounted there, as which file system, with which flags.
MOUNTS = {
    "no /proc": ("tmpfs", "/proc", "tmpfs", 0),
    "no /sys": ("tmpfs", "/sys", "tmpfs", 0),
    "empty /proc/stat": (os.devnull, "/proc/stat", None, BIND),
    "a mount without a source": ("", None, "tmpfs", 0),
}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    """A function of libc; ends the process where the system refuses it."""
    if getattr(libc, name)(*args):
        print(f"{name}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(UNSUPPORTED)


def mount(source: str, target: str | None, kind: str | None, flags: int) -> None:
    """Mount something for this process and its children alone, on a new folder here at need."""
    target = target or tempfile.mkdtemp(prefix="a mount\twithout\x0ba source ", dir=".")
    call("unshare", NEW_NAMESPACE)
    call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    call("mount", source.encode(), os.fsencode(target), kind and kind.encode(), flags, None)


def refuse(calls: list[int], errno: int) -> None:
    """Have system calls fail with an error, in this process and its children (seccomp(2))."""
    if platform.machine() != "x86_64":
        sys.exit(UNSUPPORTED)
    load, equal, answer, allowed, refused = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
    steps = [(load, 0, 0, 0)]  # the number of the call
    steps += [(equal, len(calls) - index, 0, number) for index, number in enumerate(calls)]
    steps += [(answer, 0, 0, allowed), (answer, 0, 0, refused | errno)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    call("prctl", no_new_privileges, 1, 0, 0, 0)
    call("prctl", set_seccomp, mode_filter, ctypes.create_string_buffer(program))


def launch(what: str, command: list[str]) -> None:
    """Make the system odd, and become the command."""
    if what in MOUNTS:
        mount(*MOUNTS[what])
    else:
        calls, _, errno = what.partition("=")
        refuse([int(number) for number in calls.split(",")], int(errno))
    os.execv(command[0], command)


def run_oddly(what: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Python, with arguments, on an odd system. The test is skipped where that cannot be had."""
    import pytest  # not for the launcher

    command = [sys.executable, __file__, what, sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    if done.returncode == UNSUPPORTED:
        pytest.skip(f"{what}: {done.stderr.strip()}")
    return done


if __name__ == "__main__":
    launch(sys.argv[1], sys.argv[2:])
