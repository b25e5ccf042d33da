"""Files that are written whole or not at all, text that several runs append to, locked folders.

A folder may come from a stranger: no link in it is followed, and no pipe in it is waited for.
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
from collections.abc import Iterator
from pathlib import Path

from split_affinity.errors import RunError, UserError, one_line
from split_affinity.text import readable, shown


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a RunError: this path cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A small system file without its line end; empty if it is missing or unreadable."""
    try:
        return os.fsdecode(path.read_bytes()).strip()  # names of mounts need not be UTF-8
    except OSError:
        return ""


def flush_folder(folder: Path) -> None:
    """Write to disk which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SYSTEM_FOLDERS = ("/dev/", "/proc/")  # /dev/stdout is a link to a link


def followed(path: Path) -> Path:
    """The target of a link that the user has named; any other path as it is."""
    in_system = os.fspath(path.absolute()).startswith(SYSTEM_FOLDERS)
    return path.resolve() if path.is_symlink() and not in_system else path


def open_itself(path: Path, flags: int, any_kind: bool = False) -> int:
    """A descriptor of the file with this very name, made anew if `flags` say so.

    Raises OSError for a link, since a stranger may have left it to make us write elsewhere, and for
    anything but a file, unless `any_kind` is allowed. Does not wait at a pipe.
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
    """A new file to write to, in place of any other with its name. Raises OSError."""
    path.unlink(missing_ok=True)
    return io.FileIO(open_itself(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w")


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace a file as a whole; raises RunError, and leaves the old one, if that fails.

    A link is replaced too; its target stays as it is.
    """
    temporary = path.with_name(path.name + ".tmp")
    with write_errors(path):
        try:
            with io.BufferedWriter(new_file(temporary)) as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_where_asked(path: Path, data: str | bytes) -> None:
    """Write to a place that the user has named, as `write_whole` does.

    A link's target is replaced. A pipe or a device, such as /dev/stdout, is written to directly.
    """
    with write_errors(path):
        if path.exists() and not path.is_file():
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        else:
            write_whole(followed(path), data)


def why_not_saved(error: Exception) -> str:
    """The system's reason, if there is one: torch hides it behind an error of its own."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return one_line(error)


def link_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy if the disk knows no links."""
    if target.exists() and target.samefile(source) and not target.is_symlink():
        return  # renaming one of two links over the other would leave both
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


LOCK = ".lock"


def lock_folder(folder: Path) -> io.FileIO:
    """Lock a folder for this process; closing the returned file unlocks it.

    The kernel keeps the lock: a killed process leaves none, and processes forked later share it.
    Raises UserError if another process has it, OSError if the file system knows no locks.
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
        file.close()  # its former owner has removed it meanwhile


def append_text(path: Path, text: str, header: str = "") -> None:
    """Append text to a file, as `append_bytes` does."""
    append_bytes(path, readable(text).encode(), readable(header).encode())


def append_bytes(path: Path, data: bytes, header: bytes = b"") -> None:
    """Append to a file under a lock, the header first if it is new; all or, with RunError, none."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with write_errors(path), io.FileIO(open_itself(path, flags, any_kind=True), "a") as file:
        lock_or_warn(file, path)
        size = os.fstat(file.fileno()).st_size
        write_end(file, size, data if size else header + data)


def replace_text(path: Path, old: str, new: str) -> bool:
    """Replace the last `old` in a file; returns whether there is one.

    Under a lock, and in the same file: another run may hold its lock, or wait for it.
    """
    with (
        write_errors(path),
        contextlib.suppress(FileNotFoundError),
        io.FileIO(open_itself(path, os.O_RDWR), "r+") as file,
    ):
        lock_or_warn(file, path)
        before, found, after = file.read().rpartition(old.encode())
        if found:
            file.seek(len(before))
            write_end(file, len(before), readable(new).encode() + after, found + after)
        return bool(found)
    return False


LOCK_WAIT_S = 1.0  # others hold a lock for milliseconds
WITHOUT_LOCK: set[Path] = set()  # files, and folders of files, that are written without a lock


def lock_or_warn(file: io.FileIO, path: Path) -> None:
    """Lock a file until it is closed; after a second go on without the lock, and say so once.

    Anybody who can read the file can hold its lock for ever, and Lustre and NFS may have no locks.
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
    """Write `data` at `start` in place of `before`, the file's end, which is put back on OSError.

    In one call: a kill can cut that between pages at most.
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
    """Whether `replace_text` works: not in a pipe or a device, nor in an append-only file."""
    try:
        os.close(open_itself(path, os.O_RDWR))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def check_appendable(path: Path, folder: Path, any_kind: bool = False) -> None:
    """Raise OSError if a file, or the folder to make it in, cannot be written to."""
    try:
        os.close(open_itself(path, os.O_WRONLY | os.O_APPEND, any_kind))
    except FileNotFoundError:
        tempfile.TemporaryFile(dir=folder).close()


TRACEBACK = "traceback.txt"


def write_traceback(folder: Path | None, error: Exception) -> str:
    """Write an error's traceback into a folder, or into a new temporary file; returns where."""
    text = readable("".join(traceback.format_exception(error)))
    if folder:
        with contextlib.suppress(RunError):
            write_whole(folder / TRACEBACK, text)
            return f"traceback in {shown(str(folder / TRACEBACK))}"
    with contextlib.suppress(OSError):
        # A new name: others share the folder of temporary files.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="traceback-", suffix=".txt", delete=False
        ) as file:
            file.write(text)
        return f"traceback in {shown(file.name)}"
    return text
