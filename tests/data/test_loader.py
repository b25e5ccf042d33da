"""Loader processes, and images that cannot be read.

Run: python -m pytest tests/data/test_loader.py
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from loading import ALL_CPUS, ALL_WORKERS, AUGMENTED, assert_same_batches, load, small, whereabouts
from PIL import Image
from small import as_loaded

from split_affinity import ALLOWED_CPUS
from split_affinity.data.dataset import open_data
from split_affinity.data.loader import (
    BadImages,
    Batches,
    LoaderDied,
    check_open_files,
    training_loader,
)
from split_affinity.data.pictures import ImageData, load_image
from split_affinity.data.samples import share_tensor
from split_affinity.errors import RunError, UserError


@pytest.fixture
def breakable(photos, tmp_path):
    """A copy of the photographs."""
    shutil.copytree(photos, tmp_path / "copy")
    return tmp_path / "copy"


def spoil(folder, *names):
    paths = [folder / "train" / name for name in names]
    for path in paths:
        path.write_bytes(b"no picture")
    return paths


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_broken_image_is_named(breakable, workers, damage):
    path = breakable / "train/temple/0003.jpg"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:600], "garbage": b"x" * 600, "empty": b""}[damage])
    settings = small(data_path=breakable, workers=workers)
    with pytest.raises(RunError, match=f"^broken image {path}: ") as caught:
        load(open_data(settings), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_left_out_and_counted_once(breakable, workers):
    paths = spoil(breakable, "temple/0003.jpg", "flower/0000.jpg")
    settings = small(data_path=breakable, workers=workers, batch_size=6)
    bad = BadImages(2)
    with contextlib.closing(training_loader(open_data(settings), settings, ALL_CPUS)) as loader:
        for epoch in (1, 2, 3):
            assert sum(len(images) for images, _ in loader.batches(bad, epoch)) == 10
    assert len(bad.messages) == 2
    assert all(any(str(path) in message for message in bad.messages) for path in paths)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "")],
)
def test_a_picture_that_nobody_has_room_for_is_not_broken(photos, monkeypatch, error):
    path = next(photos.glob("train/*/*.jpg"))

    def fail(path, formats):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)) as caught:
        load_image(str(path))
    assert caught.value is error


def test_broken_images_are_left_out_before_mixing(breakable):
    spoil(breakable, "temple/0003.jpg", "flower/0000.jpg")
    settings = small(data_path=breakable, max_bad_images=2, mixup_alpha=0.2, batch_size=6)
    batches = load(open_data(settings), settings)
    assert sum(len(images) for images, _ in batches) == 10
    for images, targets in batches:
        assert targets.shape == (len(images), 2)


def test_the_first_broken_image_too_many_stops_the_run(breakable):
    spoil(breakable, "temple/0003.jpg", "flower/0000.jpg")
    settings = small(data_path=breakable, max_bad_images=1)
    with pytest.raises(RunError, match=r"broken image .* \(more than --max-bad-images 1\)$"):
        load(open_data(settings), settings)


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.2}])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_any_image_stops_the_run(breakable, workers, mixing):
    paths = spoil(
        breakable, *(f"{name}/{n:04}.jpg" for name in ("temple", "flower") for n in range(6))
    )
    settings = small(data_path=breakable, max_bad_images=99, workers=workers, **mixing)
    with pytest.raises(RunError, match="no image of a batch can be read; broken image ") as caught:
        load(open_data(settings), settings)
    assert any(str(path) in str(caught.value) for path in paths)


@pytest.mark.parametrize(
    ("images", "asked", "allowed"),
    [
        (12, None, 1),
        (1999, None, 1),
        (2000, None, 2),
        (10**6, None, 1000),
        (10**6, 0, 0),
        (2, 5, 5),
    ],
)
def test_one_image_in_a_thousand_may_be_broken(images, asked, allowed):
    data = ImageData("folder", None, None, (), chosen=range(images))
    assert BadImages.of(small(max_bad_images=asked), data).allowed == allowed


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_leave_no_batch_of_one(breakable, workers):
    """From which BatchNorm could not learn; the image is shown twice, augmented differently."""
    paths = [*breakable.glob("train/*/*.jpg")][1:]
    for path in paths:
        path.write_bytes(b"no picture")
    settings = small(data_path=breakable, max_bad_images=99, batch_size=12, workers=workers)
    data = open_data(settings)
    ((images, targets),) = load(data, settings)
    assert images.shape == (2, 3, 32, 32)
    assert targets[0] == targets[1]
    assert not torch.equal(images[0], images[1])
    assert_same_batches([(images, targets)], load(data, dataclasses.replace(settings, workers=0)))


def test_batches_go_on_over_epochs():
    batches = Batches(as_loaded([1, 2, 3]), 7)
    assert next(batches) == 1
    assert batches.left == 6
    assert list(batches) == [2, 3, 1, 2, 3, 1]
    assert batches.left == 0


def test_prefetching_fetches_one_batch_and_no_more():
    fetched = []

    def loader():
        for number in range(5):
            fetched.append(number)
            yield as_loaded([number])[0]

    batches = Batches(loader(), 3)
    assert fetched == [0], "at once, to start the loader"
    batches.prefetch()
    assert fetched == [0]
    assert next(batches) == 0
    batches.prefetch()
    batches.prefetch()
    assert fetched == [0, 1]
    assert list(batches) == [1, 2]
    batches.prefetch()
    assert fetched == [0, 1, 2], "never more than asked for"


def rows(loader, epoch=1):
    return [images[0].tolist() for images, _ in loader.batches(BadImages(), epoch)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs thread affinity")
def test_loader_processes_stay_on_their_cores_and_ignore_signals():
    last = max(ALLOWED_CPUS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with whereabouts(1, (last,)) as loader:
            for process, *rest in rows(loader):
                assert process != os.getpid()
                assert rest == [1, last, True]


def test_without_loader_processes_the_main_thread_loads():
    with whereabouts(0) as loader:
        assert {process for process, *_ in rows(loader)} == {os.getpid()}


def loaders():
    return {process.pid for process in psutil.Process().children()}


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_begin_at_once_live_on_and_end(workers):
    before = loaders()
    with whereabouts(workers) as loader:
        begun = loaders() - before
        assert len(begun) == workers
        for epoch in (1, 2, 3):
            assert {process for process, *_ in rows(loader, epoch)} == begun
        assert loaders() - before == begun
    assert loaders() == before


def test_a_loader_that_gave_nothing_ends_too():
    before = loaders()
    with whereabouts(2):
        pass
    assert loaders() == before


def test_a_loader_that_was_killed_is_told_where_a_batch_is_asked_for():
    """DataLoader would have it raise anywhere in the main thread, in the middle of a save, say."""
    before, handler = loaders(), signal.getsignal(signal.SIGCHLD)
    with whereabouts(2) as loader:
        assert signal.getsignal(signal.SIGCHLD) == handler
        killed, stopped = loaders() - before
        batches = loader.batches(BadImages())
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(LoaderDied, match=f"process {killed} was ended by SIGKILL"):
            list(batches)
        os.kill(stopped, signal.SIGSTOP)
    assert loaders() == before, "the one that cannot end by itself too"


def test_a_loader_is_closed_without_another_thread(monkeypatch):
    """For which there may be no memory."""
    before = loaders()
    with whereabouts(2):
        error = RuntimeError("can't start new thread")
        monkeypatch.setattr(threading.Thread, "start", functools.partial(raise_, error))
    assert loaders() == before


def raise_(error):
    raise error


def test_a_loader_may_be_closed_twice():
    with whereabouts(1) as loader:
        loader.close()


def augmented_loader(data, workers):
    loader = training_loader(data, small(workers=workers, **AUGMENTED), ALL_CPUS)
    return contextlib.closing(loader)


@ALL_WORKERS
def test_one_loader_serves_many_epochs(photos, workers):
    data = open_data(small(data_path=photos))
    with augmented_loader(data, workers) as loader:
        for epoch in (1, 2, 3):
            expected = load(data, small(**AUGMENTED), epoch)
            assert_same_batches(list(loader.batches(BadImages(), epoch)), expected)


@ALL_WORKERS
def test_an_epoch_left_early_leaves_nothing_behind(photos, workers):
    data = open_data(small(data_path=photos))
    with augmented_loader(data, workers) as loader:
        next(loader.batches(BadImages(), 1))
        batches = list(loader.batches(BadImages(), 2))
    assert_same_batches(batches, load(data, small(**AUGMENTED), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_when_and_where_batches_were_loaded(workers):
    settings = small(num_classes=5, workers=workers)
    data = open_data(settings)
    begin_s = time.perf_counter()
    with contextlib.closing(training_loader(data, settings, ALL_CPUS)) as loader:
        batches = loader.batches(BadImages(), stop=4)
        list(batches)
        records = batches.take_records()
        assert batches.take_records() == ()
    assert [record.loader for record in records] == ([0, 1, 0, 1] if workers else [-1] * 4)
    for record in records:
        assert begin_s < record.start_s < record.end_s < time.perf_counter()


needs_memory_files = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")


@needs_memory_files
@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.2}])
def test_loaders_hand_batches_over_without_dev_shm(mixing):
    """By the kernel's list of what is mapped where."""
    settings = small(workers=1, num_classes=5, **mixing)
    data = open_data(settings)
    with contextlib.closing(training_loader(data, settings, ALL_CPUS)) as loader:
        batch = next(loader.batches(BadImages(), stop=1))
        maps = Path("/proc/self/maps").read_text()
    for tensor in batch:
        (line,) = (each for each in maps.splitlines() if each.startswith(f"{tensor.data_ptr():x}-"))
        assert "/memfd:" in line
        assert "/dev/shm" not in line
    assert_same_batches([batch], load(data, small(num_classes=5, **mixing), stop=1))


@pytest.mark.parametrize("tensor", [torch.arange(5), torch.rand(3, 2).t(), torch.rand(2, 3, 4)])
def test_a_shared_tensor_is_a_copy(tensor):
    copy = share_tensor(tensor)
    assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(copy, tensor)
    copy.zero_()
    assert tensor.any()


class NoMemoryFiles:
    """A C library of a system without them."""


@pytest.mark.parametrize(
    "library", [NoMemoryFiles(), type("", (), {"memfd_create": lambda *_: -1})()]
)
def test_without_memory_files_torch_shares_as_it_does(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    tensor = torch.arange(5)
    assert share_tensor(tensor) is tensor
    settings = small(workers=1, num_classes=5)
    assert load(open_data(settings), settings, stop=1)[0][0].shape == (4, 3, 32, 32)


SHARES_NOTHING = 77


def load_in_small_shm():
    """Three batches of 48 KiB by two loaders where /dev/shm has 64 KiB, in a process with mounts of
    its own; ends with SHARES_NOTHING if there may be none.
    """
    clone_newns = 0x20000  # of sched.h
    if ctypes.CDLL(None).unshare(clone_newns):
        os._exit(SHARES_NOTHING)
    for options in ("--make-rprivate /", "-t tmpfs -o size=64k tmpfs /dev/shm"):
        if subprocess.run(["mount", *options.split()], stderr=subprocess.DEVNULL).returncode:
            os._exit(SHARES_NOTHING)
    settings = small(num_classes=3, workers=2)
    for images, _ in load(open_data(settings), settings, stop=3):
        assert images.shape == (4, 3, 32, 32)


@needs_memory_files
def test_loading_with_64_kilobytes_of_dev_shm():
    process = multiprocessing.get_context("fork").Process(target=load_in_small_shm)
    process.start()
    process.join(60)
    if process.exitcode == SHARES_NOTHING:
        pytest.skip("needs mount namespaces")
    assert process.exitcode == 0


def test_too_few_open_files_are_refused_before_any_loader_starts(monkeypatch):
    before, limits = loaders(), resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))
    settings = small(num_classes=3, workers=2)
    error = (
        r"^--workers 2 can need \d+ open files, and 20 are allowed: raise ulimit -n, or .* -j 0$"
    )
    with pytest.raises(UserError, match=error):
        training_loader(open_data(settings), settings, ALL_CPUS)
    assert loaders() == before
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    with contextlib.closing(training_loader(open_data(settings), small(num_classes=3), ALL_CPUS)):
        pass


def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = psutil.Process().num_fds() + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        check_open_files(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > lowest + 16
        settings = small(num_classes=3, workers=2)
        with contextlib.closing(training_loader(open_data(settings), settings, ALL_CPUS)) as loader:
            assert sum(len(images) for images, _ in loader.batches(BadImages(), stop=20)) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_loaders_need_no_more_open_files_than_are_asked_for(monkeypatch, workers):
    """While batches are fetched, in the main process and in the loaders, and ten more, which torch
    opens to see whether it can.
    """
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits[0]))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    me, most = psutil.Process(), 0
    settings = small(num_classes=3, workers=workers, batch_size=2)
    before = loaders()
    with contextlib.closing(training_loader(open_data(settings), settings, ALL_CPUS)) as loader:
        ours = [me, *(psutil.Process(pid) for pid in loaders() - before)]
        for _ in loader.batches(BadImages(), stop=30):
            most = max(most, *(process.num_fds() for process in ours))
    assert most + 10 <= asked[0]


def test_loaders_that_cannot_start_leave_none_behind(monkeypatch):
    """The third has no process left to be."""
    before, unraisable = loaders(), []
    forks = iter([os.fork, os.fork])

    def fork():
        for real in forks:
            return real()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    error = "^loader processes cannot start: .*Resource temporarily unavailable; try a lower -j$"
    settings = small(num_classes=3, workers=3)
    with pytest.raises(RunError, match=error):
        training_loader(open_data(settings), settings, ALL_CPUS)
    for process in multiprocessing.active_children():
        process.join(10)
    assert loaders() == before
    gc.collect()
    assert not unraisable, "torch's half-made iterator stays"


def load_by_forkserver(photos):
    """The same batches as without loader processes, by loaders that inherit nothing."""
    multiprocessing.set_start_method("forkserver", force=True)
    settings = small(workers=2, **AUGMENTED)
    data = open_data(small(data_path=photos))
    assert_same_batches(load(data, settings), load(data, small(**AUGMENTED)))


@pytest.mark.slow
def test_forkserver_starts_loaders_too(photos):
    process = multiprocessing.get_context("spawn").Process(
        target=load_by_forkserver, args=(photos,)
    )
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    assert code == 0
