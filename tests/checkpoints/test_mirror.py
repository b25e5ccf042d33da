"""Copies at another address. Run: python -m pytest tests/checkpoints/test_mirror.py"""

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from patching import set_everywhere
from saved_runs import output, step_of

from split_affinity.checkpoints.mirror import Mirror
from train_split_affinity import main

# The mirror


@pytest.fixture
def uploads(monkeypatch):
    """Makes the store memory:// raise some errors, one at each upload; returns the pauses that the
    mirror makes, which take no time here.
    """

    def fail_with(*errors):
        left, pauses = iter(errors), []
        put_file = MemoryFileSystem.put_file

        def put(*args, **options):
            for error in left:
                raise error
            return put_file(*args, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put)
        monkeypatch.setattr(time, "sleep", pauses.append)
        return pauses

    return fail_with


@pytest.fixture
def far(tmp_path):
    """An address in memory that no other test uses."""
    yield f"memory://{tmp_path}/far"
    MemoryFileSystem.store.clear()


def mirror_files(url, *paths):
    """Copy files; what the mirror has to say."""
    mirror = Mirror(url)
    for path in paths:
        mirror.copy(path)
    mirror.close()
    return mirror.messages


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_the_mirror_ends_up_equal(in_tmp, train, protocol):
    url = f"{protocol}://{in_tmp}/far"
    train(in_tmp / "out", epochs=3, save_steps=1, save_freq=2, keep_best=1, mirror=url)
    filesystem, root = fsspec.core.url_to_fs(url)
    copies = {Path(path).name: filesystem.cat_file(path) for path in filesystem.ls(root, False)}
    kept = {path.name: path.read_bytes() for path in (in_tmp / "out").glob("*.pt")}
    del kept["previous.pt"]
    assert len([name for name in kept if name.startswith("best-")]) == 1
    assert copies == kept


def test_an_upload_is_tried_three_times(uploads, tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    pauses = uploads(ConnectionError("asleep"), TimeoutError("still asleep"))
    assert mirror_files(far, path) == []
    assert pauses == [1, 2]
    assert fsspec.open(f"{far}/last.pt").open().read() == b"a state"


def test_uploads_that_fail_are_told_in_one_line_and_the_run_goes_on(
    uploads, in_tmp, capsys, arguments, far
):
    uploads(*[ConnectionError("no such\nhost")] * 99)
    options = [*arguments, *output(in_tmp / "out"), "--epochs", "1", "--mirror", far]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert sorted(captured.err.splitlines()) == [
        f"warning: mirror: {name} not copied in 3 attempts: no such"
        for name in ("best-0001.pt", "best.pt", "last.pt")
    ]
    assert "finished after 3 of 3 steps" in captured.out
    assert step_of(in_tmp / "out") == 3


def test_half_an_upload_is_never_under_the_name(monkeypatch, tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    assert mirror_files(far, path) == []
    path.write_bytes(b"a new state")

    def put(self, local, remote, **options):
        self.pipe_file(remote, Path(local).read_bytes()[:5])
        raise ConnectionError("cable cut")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    set_everywhere(monkeypatch, "UPLOAD_ATTEMPTS", 1)
    assert mirror_files(far, path) == ["mirror: last.pt not copied in 1 attempt: cable cut"]
    assert fsspec.open(f"{far}/last.pt").open().read() == b"old"


def test_a_file_that_is_gone_is_left_out(tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    assert mirror_files(far, tmp_path / "best-0001.pt", path) == []
    assert fsspec.core.url_to_fs(far)[0].exists(f"{far}/last.pt")


def test_no_copy_is_removed_for_want_of_the_file(tmp_path, far):
    """Only for the asking."""
    path = tmp_path / "best.pt"
    path.write_bytes(b"a state")
    assert mirror_files(far, path) == []
    path.unlink()
    assert mirror_files(far, path) == []
    filesystem, root = fsspec.core.url_to_fs(far)
    assert filesystem.exists(f"{root}/best.pt")
    mirror = Mirror(far)
    for _ in range(2):  # the second time there is nothing to remove
        mirror.remove(path)
    mirror.close()
    assert mirror.messages == []
    assert not filesystem.exists(f"{root}/best.pt")


def test_a_removal_that_fails_is_told(monkeypatch, uploads, tmp_path, far):
    path = tmp_path / "best-0001.pt"
    path.write_bytes(b"a state")
    assert mirror_files(far, path) == []

    def refuse(self, path):
        raise PermissionError("not yours")

    pauses = uploads()
    monkeypatch.setattr(MemoryFileSystem, "rm_file", refuse)
    mirror = Mirror(far)
    mirror.remove(path)
    mirror.close()
    assert mirror.messages == ["mirror: best-0001.pt not removed in 3 attempts: not yours"]
    assert pauses == [1, 2]


def test_a_place_that_is_not_there_is_told(uploads, tmp_path, far):
    """s3fs raises FileNotFoundError for a bucket that does not exist."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    uploads(*[FileNotFoundError("The specified bucket does not exist")] * 3)
    assert mirror_files(far, path) == [
        "mirror: last.pt not copied in 3 attempts: The specified bucket does not exist"
    ]


@pytest.fixture
def hanging_store(monkeypatch):
    """A memory:// that takes a file and does not give an answer, and when it got the first one."""
    begun, released = threading.Event(), threading.Event()

    def put(*args, **options):
        begun.set()
        released.wait()

    set_everywhere(monkeypatch, "LAST_UPLOADS_S", 0.1)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    yield begun
    released.set()


def test_an_upload_that_hangs_does_not_hold_the_run_up(hanging_store, tmp_path, far):
    mirror = Mirror(far)
    for name in ("best.pt", "last.pt"):
        (tmp_path / name).write_bytes(b"a state")
        mirror.copy(tmp_path / name)
    hanging_store.wait()
    mirror.close()
    assert mirror.messages == ["mirror: best.pt, last.pt not copied within 0.1 s"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [("nope://bucket/run", "Protocol not known: nope"), ("memory://x::nope://y", "nope")],
)
def test_an_unknown_address_is_an_error(in_tmp, capsys, arguments, url, reason):
    assert main([*arguments, *output(in_tmp / "out"), "--mirror", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: --mirror {url}: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not list(in_tmp.iterdir())


def test_a_port_that_is_none_is_an_error_without_a_part_of_the_password(in_tmp, capsys, arguments):
    url = "ftp://me:se/cret@host/far"
    assert main([*arguments, *output(in_tmp / "out"), "--mirror", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_split_affinity.py: error: --mirror ftp://host/far: no address")
    assert "'se'" not in error
    assert error.count("\n") == 1
    assert not list(in_tmp.iterdir())


# What is at the other end of ftp://


@pytest.fixture
def ftp_server():
    """Starts a server of FTP that says some lines, one at each line that it gets, and then nothing;
    without any it accepts and is silent. Returns its address.
    """
    servers, closed = [], threading.Event()

    def answer(connection, lines):
        stream = connection.makefile("rw", newline="\r\n")
        with contextlib.suppress(OSError), connection, stream:
            for line in lines:
                stream.write(f"{line}\n")
                stream.flush()
                stream.readline()
            closed.wait()

    def serve(server, lines):
        with contextlib.suppress(OSError):
            while True:
                arguments = server.accept()[0], lines
                threading.Thread(target=answer, args=arguments, daemon=True).start()

    def start(*lines):
        servers.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=serve, args=(servers[-1], lines), daemon=True).start()
        return f"ftp://me:secret@127.0.0.1:{servers[-1].getsockname()[1]}/far"

    yield start
    closed.set()
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)  # ends the wait for a connection
        server.close()


@pytest.fixture
def impatient(monkeypatch):
    """A mirror that waits and pauses hardly at all."""
    set_everywhere(monkeypatch, "ANSWER_S", 0.2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_a_server_that_says_nothing_ends_and_holds_no_run(
    impatient, ftp_server, in_tmp, capsys, arguments
):
    url = ftp_server()
    shown = url.replace("me:secret@", "")
    before_s = time.monotonic()
    assert main([*arguments, *output(in_tmp / "out"), "--epochs", "1", "--mirror", url]) == 0
    assert time.monotonic() - before_s < 20
    captured = capsys.readouterr()
    lines = captured.err.replace("warning: mirror: ", "").splitlines()
    assert re.fullmatch(
        rf"\S+ not copied within 0\.\d+ s: {shown} gives no answer", first := lines.pop(0)
    )
    names = {"last.pt", "best.pt", "best-0001.pt"} - {first.split()[0]}
    assert sorted(lines) == [
        f"{name} not copied since {shown} gives no answer" for name in sorted(names)
    ]
    assert step_of(in_tmp / "out") == 3


def test_a_refused_login_is_a_warning(ftp_server, impatient, in_tmp, capsys, arguments):
    url = ftp_server("220 hello", "331 and your password?", "530 me:secret is not known here")
    options = [*arguments, *output(in_tmp / "out"), "--steps", "1", "--mirror", url]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert "warning: mirror: last.pt not copied in 3 attempts: 530 " in captured.err
    assert step_of(in_tmp / "out") == 1


def test_nobody_who_listens_is_a_warning(impatient, in_tmp, capsys, arguments):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"ftp://127.0.0.1:{server.getsockname()[1]}/far"
    options = [*arguments, *output(in_tmp / "out"), "--steps", "1", "--mirror", url]
    assert main(options) == 0
    assert "warning: mirror: last.pt not copied in 3 attempts: " in capsys.readouterr().err
    assert step_of(in_tmp / "out") == 1


def test_a_connection_that_is_lost_is_made_again(monkeypatch, tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    made, put_file = [], MemoryFileSystem.put_file
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def put(self, *args, **options):
        if len(made) < 2:
            raise EOFError
        return put_file(self, *args, **options)

    def connect(url, connect=fsspec.core.url_to_fs):
        made.append(url)
        return connect(url)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    monkeypatch.setattr(fsspec.core, "url_to_fs", connect)
    assert mirror_files(far, path) == []
    assert made == [far, far]
