"""Files that are whole or as they were, text that several runs append to, folders with a lock.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import platform
import shutil
import tempfile
import traceback
from pathlib import Path

from split_affinity.errors import RunError, UserError, one_line
from split_affinity.text import readable


def read_text(path: Path) -> str:
    """A small system file without its line end; empty where it is missing or unreadable."""
    try:
        return os.fsdecode(path.read_bytes()).strip()  # names of mounts need not be UTF-8
    except OSError:
        return ""


LOCK = ".lock"


def flush_folder(folder: Path) -> None:
    """Have the disk know which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file in place of what was there, which stays if not all gets to the disk. Raises
    RunError then. Of a link, the file that it points to is replaced; a pipe or a device, such as
    /dev/stdout, is written to as it is.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()
        temporary = target.with_name(target.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def why_not_saved(error: Exception) -> str:
    """The system's reason where there is one: torch hides it behind an error of its own."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return one_line(error)


def link_file(source: Path, target: Path) -> None:
    """Have `target` be the same file as `source`, or a copy where the disk knows no links."""
    if target.exists() and target.samefile(source):
        return  # and renaming one of two links over the other would leave both
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    temporary.replace(target)


def lock_folder(folder: Path) -> io.FileIO:
    """Take a folder for this process; closing the file gives it free.

    The kernel keeps the lock, so that a killed process leaves none. Processes that are forked later
    share it, and may live a little longer. Raises UserError if another process has it, and OSError
    where the file system knows no locks.
    """
    path = folder / LOCK
    while True:
        file = path.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--output-dir {folder}: process {file.read().decode()} is training there; wait "
                "for its end, or choose another folder"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            with contextlib.suppress(OSError):  # a full disk can hold a lock, but no text
                file.truncate(0)
                file.write(f"{os.getpid()} on {platform.node()}".encode())
            return file
        file.close()  # the one that had it has removed it meanwhile


TRACEBACK = "traceback.txt"


def append_text(path: Path, text: str, header: str = "") -> None:
    """Append text to a file, as `append_bytes`."""
    append_bytes(path, readable(text).encode(), readable(header).encode())


def append_bytes(path: Path, data: bytes, header: bytes = b"") -> None:
    """Append to a file under a lock, so that what two runs write stays whole; a new file gets the
    header first. Raises RunError when the file cannot be written, and leaves no part of the data.
    """
    try:
        with path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file.fileno()).st_size
            write_end(file, size, data if size else header + data)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def replace_text(path: Path, old: str, new: str) -> bool:
    """Put text in place of the last `old` in a file; False if there is none. Under a lock, as
    `append_text`; in the same file, since another run may hold its lock, or wait for it.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before, found, after = file.read().rpartition(old.encode())
            if found:
                file.seek(len(before))
                write_end(file, len(before), readable(new).encode() + after, found + after)
            return bool(found)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def write_end(file: io.FileIO, start: int, data: bytes, before: bytes = b"") -> None:
    """Write to a file from `start` on, in place of `before`, which is all that follows there. If
    there is no room, it stands there again. In one call, which a kill cuts between pages at most.
    """
    left = data
    try:
        while left:
            left = left[file.write(left) :]
        if len(data) < len(before):
            file.truncate(start + len(data))
    except OSError:
        if before:
            file.seek(start)
            file.write(before)
        file.truncate(start + len(before))
        raise


def can_be_edited(path: Path) -> bool:
    """Whether text of a file can be replaced; not in a device or a pipe, which would block, nor in
    a file that may only be appended to.
    """
    try:
        if path.is_file():
            path.open("r+b").close()
        return path.is_file() or not path.exists()
    except OSError:
        return False


def check_appendable(path: Path, folder: Path) -> None:
    """Raise OSError if a file, or a folder in which it is to be made, cannot be written."""
    if path.exists():
        path.open("a").close()
    else:
        tempfile.TemporaryFile(dir=folder).close()


def write_traceback(folder: Path | None, error: Exception) -> str:
    """Write an error's traceback into a folder, or that for temporary files; says where it is."""
    text = readable("".join(traceback.format_exception(error)))
    for place in filter(None, (folder, Path(tempfile.gettempdir()))):
        with contextlib.suppress(RunError):
            write_whole(place / TRACEBACK, text)
            return f"traceback in {place / TRACEBACK}"
    return text
