"""A batch that never comes is not waited for. Run: python -m pytest tests/data/test_waiting.py"""

import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from loading import load, small
from patching import set_everywhere
from small import TINY

from split_affinity.data import loader
from split_affinity.data.dataset import open_data
from split_affinity.data.loader import LoaderFailed
from split_affinity.data.named import SyntheticImages
from split_affinity.errors import likely_reason
from train_split_affinity import main

LONG_NAME = "t" * 80


def ended(run, within_s=60, signum=None, method="spawn"):
    """How a process ends that runs a function, after a signal perhaps, which is sent as soon as the
    function calls what it is given; None if it does not end.
    """
    context = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=run, args=(ready.set,))
    process.start()
    if signum:
        assert ready.wait(within_s)
        os.kill(process.pid, signum)
    process.join(within_s)
    code = process.exitcode
    if code is None:
        for left in (*psutil.Process(process.pid).children(), process):
            left.kill()
        process.join()
    return code


@pytest.fixture
def long_temporary_folder(tmp_path, monkeypatch):
    """A folder for temporary files whose path is too long for a socket's."""
    folder = tmp_path / LONG_NAME
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    return folder


def load_two_batches(ready=None):
    settings = small(num_classes=3, workers=1)
    assert len(load(open_data(settings), settings, stop=2)) == 2


def test_a_long_path_for_temporary_files(long_temporary_folder):
    assert ended(load_two_batches, method="fork") == 0
    assert not [*long_temporary_folder.iterdir()]


@pytest.mark.parametrize("length", [60, 75, 76, 77, 107])
def test_sockets_fit_into_their_folder(tmp_path, monkeypatch, length):
    folder = f"{tmp_path}/{'t' * (length - 1 - len(str(tmp_path)))}"
    if len(folder) != length:
        pytest.skip("the path of the test's own folder is longer")
    Path(folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    loader.make_socket_folder()
    with multiprocessing.connection.Listener(family="AF_UNIX") as listener:
        assert Path(listener.address).exists()
    assert tempfile.gettempdir() == folder


def test_without_any_folder_for_sockets_a_loader_says_so(long_temporary_folder, monkeypatch):
    monkeypatch.setattr(loader, "LONGEST_FOLDER_BYTES", 0)
    with pytest.raises(LoaderFailed, match="^loader 0 cannot .*: AF_UNIX path too long$") as error:
        load_two_batches()
    assert likely_reason(error.value).startswith("no folder with a path short enough for sockets: ")


def train_without_threads_in_loaders(allowed, ready):
    """A run whose loaders cannot start threads, but for those of an allowed name."""
    me, start = os.getpid(), threading.Thread.start

    def start_if_allowed(thread):
        if os.getpid() != me and thread.name != allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    threading.Thread.start = start_if_allowed
    multiprocessing.set_start_method("fork", force=True)  # loaders shall have the same
    os._exit(main([*TINY, "--steps", "2", "-j", "2"]))


@pytest.mark.slow
@pytest.mark.parametrize("allowed", ["none", "QueueFeederThread"])
def test_loaders_that_cannot_start_a_thread_end_the_run(in_tmp, capfd, allowed):
    """The thread that sends what is in a queue, or the one that hands tensors over."""
    assert ended(partial(train_without_threads_in_loaders, allowed)) == 1
    errors = capfd.readouterr().err
    told = [line for line in errors.splitlines() if line.startswith("train_split_affinity.py: ")]
    assert len(told) == 1
    assert "no room for another thread: raise the limits of memory (ulimit -v) and of p" in told[0]
    assert re.search(r"loader [01] cannot hand over a batch: can't start new thread\)", told[0])
    assert "Traceback" not in errors


def load_for_ever(ready):
    """A run whose loaders never come to the end of a picture."""

    def get(self, index):
        ready()
        time.sleep(1000)

    SyntheticImages.__getitem__ = get
    multiprocessing.set_start_method("fork", force=True)  # loaders shall have the same
    os._exit(main([*TINY, "-b", "1", "--steps", "2", "-j", "1"]))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_while_a_batch_is_waited_for(in_tmp, capfd, signum):
    assert ended(load_for_ever, signum=signum) == 128 + signum
    assert f": stopped by {signum.name}\n" in capfd.readouterr().err


class Slow(SyntheticImages):
    """Pictures that take a while."""

    def __getitem__(self, index):
        time.sleep(0.5)
        return super().__getitem__(index)


def test_a_batch_that_takes_long_comes_and_is_told(monkeypatch, capfd):
    set_everywhere(monkeypatch, "LOOK_S", 0.125)
    set_everywhere(monkeypatch, "PATIENCE_S", 0.25)
    set_everywhere(monkeypatch, "SyntheticImages", Slow)
    settings = small(num_classes=3, workers=1, batch_size=1)
    assert len(load(open_data(settings), settings, stop=2)) == 2
    text = "warning: no batch for 0 s, though 1 loader process live: "
    assert capfd.readouterr().err.count(text) == 2
