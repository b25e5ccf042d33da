"""Files that are whole or as they were, text that several runs append to, folders with a lock.

Knows nothing of what the files hold. A folder may have come from a stranger: no link in it is
followed, and nothing in it is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import platform
import shutil
import stat
import tempfile
import time
import traceback
from pathlib import Path

from split_affinity.errors import RunError, UserError, one_line
from split_affinity.text import readable, shown


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


SYSTEM_FOLDERS = ("/dev/", "/proc/")  # /dev/stdout is a link to a link


def followed(path: Path) -> Path:
    """Where a path leads that the user has named, if it is a link."""
    in_system = os.fspath(path.absolute()).startswith(SYSTEM_FOLDERS)
    return path.resolve() if path.is_symlink() and not in_system else path


def open_itself(path: Path, flags: int, any_kind: bool = False) -> int:
    """A descriptor of the file that has this very name, made anew if `flags` say so. Raises OSError
    for a link, which a stranger may have left there to have us write elsewhere, and for what is no
    file, unless `any_kind` is welcome; waits for nobody at the other end of a pipe.
    """
    if not os.fspath(path.absolute()).startswith(SYSTEM_FOLDERS):
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            reason = "a symbolic link, which is not followed; name the file itself"
            raise OSError(errno.ELOOP, reason) from None
        raise
    kind = os.fstat(descriptor).st_mode
    if not any_kind and not stat.S_ISREG(kind):
        os.close(descriptor)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "no regular file")
    os.set_blocking(descriptor, True)
    return descriptor


def new_file(path: Path) -> io.FileIO:
    """A new file to write, in place of any other of its name. Raises OSError."""
    path.unlink(missing_ok=True)
    return io.FileIO(open_itself(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w")


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file in place of what was there, which stays if not all gets to the disk. Raises
    RunError then. A link is replaced like any other file; what it points to stays as it is.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            with io.BufferedWriter(new_file(temporary)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def write_where_asked(path: Path, data: str | bytes) -> None:
    """Write to a place that the user has named, as `write_whole`: of a link, the file that it
    points to is replaced; a pipe or a device, such as /dev/stdout, is written to as it is.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        else:
            write_whole(followed(path), data)
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
    if target.exists() and target.samefile(source) and not target.is_symlink():
        return  # and renaming one of two links over the other would leave both
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        with source.open("rb") as whole, io.BufferedWriter(new_file(temporary)) as file:
            shutil.copyfileobj(whole, file)
            file.flush()
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
        file = io.FileIO(open_itself(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--output-dir {folder}: process {file.read().decode()} is training there; wait "
                "for its end, or choose another folder"
            ) from None
        except OSError:
            WITHOUT_LOCK.add(folder)
            raise
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
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with io.FileIO(open_itself(path, flags, any_kind=True), "a") as file:
            lock_or_say_why_not(file, path)
            size = os.fstat(file.fileno()).st_size
            write_end(file, size, data if size else header + data)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def replace_text(path: Path, old: str, new: str) -> bool:
    """Put text in place of the last `old` in a file; False if there is none. Under a lock, as
    `append_text`; in the same file, since another run may hold its lock, or wait for it.
    """
    try:
        with io.FileIO(open_itself(path, os.O_RDWR), "r+") as file:
            lock_or_say_why_not(file, path)
            before, found, after = file.read().rpartition(old.encode())
            if found:
                file.seek(len(before))
                write_end(file, len(before), readable(new).encode() + after, found + after)
            return bool(found)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


LOCK_WAIT_S = 1.0  # others hold a lock for milliseconds
WITHOUT_LOCK: set[Path] = set()  # files, and folders of files, known to be written without one


def lock_or_say_why_not(file: io.FileIO, path: Path) -> None:
    """Lock a file until it is closed. Whoever may read it can hold its lock for ever, and some file
    systems have no locks (Lustre, NFS): after a second nobody is waited for, and that is said once.
    """
    until_s = time.monotonic() + (0 if path in WITHOUT_LOCK else LOCK_WAIT_S)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return WITHOUT_LOCK.discard(path)
        except BlockingIOError:
            if time.monotonic() < until_s:
                time.sleep(0.01)
                continue
            what, reason = path, f"another process has kept it locked for {LOCK_WAIT_S:g} s"
        except OSError as error:
            what, reason = path.parent, f"its file system has no locks ({error.strerror})"
        if what not in WITHOUT_LOCK:
            from split_affinity.terminal import warn  # tqdm: not for --help

            WITHOUT_LOCK.add(what)
            warn(f"{path}: {reason}: it is written without a lock")
        return None


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
        os.close(open_itself(path, os.O_RDWR))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def check_appendable(path: Path, folder: Path, any_kind: bool = False) -> None:
    """Raise OSError if a file, or a folder in which it is to be made, cannot be written; `any_kind`
    as in `open_itself`.
    """
    try:
        os.close(open_itself(path, os.O_WRONLY | os.O_APPEND, any_kind))
    except FileNotFoundError:
        tempfile.TemporaryFile(dir=folder).close()


def write_traceback(folder: Path | None, error: Exception) -> str:
    """Write an error's traceback into a folder, or into a new file for temporary ones, whose folder
    others share; says where it is.
    """
    text = readable("".join(traceback.format_exception(error)))
    if folder:
        with contextlib.suppress(RunError):
            write_whole(folder / TRACEBACK, text)
            return f"traceback in {shown(str(folder / TRACEBACK))}"
    with contextlib.suppress(OSError):
        name, ending = Path(TRACEBACK).stem, Path(TRACEBACK).suffix
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f"{name}-", suffix=ending, delete=False
        ) as file:
            file.write(text)
        return f"traceback in {shown(file.name)}"
    return text
