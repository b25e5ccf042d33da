"""Loader processes, which live on from epoch to epoch, and what happens when one dies.

Knows nothing of lanes; loader processes are told their CPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import math
import multiprocessing.queues
import multiprocessing.util
import os
import resource
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from torch.utils.data import DataLoader

from split_affinity.data.decoding import picture_reader
from split_affinity.data.pictures import ImageData, UnlabelledPictures
from split_affinity.data.samples import Batch, EpochOrder, Loaded, LoadRecord, Samples
from split_affinity.data.transforms import (
    mixing_transform,
    same_transform,
    transform_of_epoch,
    validation_transform,
)
from split_affinity.errors import STOP_SIGNALS, RunError, Stopped, UserError, one_line
from split_affinity.lanes.lane import confine_thread
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.commands import command_again
from split_affinity.options.settings import DataSettings, Settings
from split_affinity.terminal import warn
from split_affinity.text import format_cpu_list, plural

LOOK_S = 2.0  # wait this long for a batch before looking whether one can still come
PATIENCE_S = 60.0  # wait this long before a warning
LONGEST_MESSAGE_BYTES = 1000  # a pipe takes these at once, even if several processes write

# A socket's path has 103 bytes on macOS, 107 on Linux; 32 are multiprocessing's own names in it.
LONGEST_FOLDER_BYTES = 103 - len("/pymp-12345678/listener-12345678")


def start_loader(cpus: Sequence[int], errors: Connection, worker: int) -> None:
    """Prepare a loader process: it ignores signals, keeps to its CPUs, and ends by errors.

    If a batch cannot be handed over, multiprocessing prints a traceback and goes on, and the main
    process waits for ever [pytorch 142884]. Here the process sends the error and ends.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)

    def end(error: Exception, *_: object) -> NoReturn:
        try:
            text = f"loader {worker} cannot hand over a batch: {one_line(error)}"
            errors.send_bytes(text.encode(errors="replace")[:LONGEST_MESSAGE_BYTES])
        finally:
            os._exit(1)

    def put_or_end(*args: Any, **options: Any) -> None:
        try:
            put(*args, **options)
        except Exception as error:  # no thread can be started for the queue
            end(error)

    queues = multiprocessing.queues.Queue
    put, queues.put = queues.put, put_or_end
    queues._on_queue_feeder_error = staticmethod(end)  # of that thread
    mask = confine_thread(cpus)  # after torch is up: a lazy OpenMP start resets it [pytorch 99625]
    if mask != set(cpus):
        asked, given = format_cpu_list(cpus), format_cpu_list(mask)
        raise RuntimeError(f"loader {worker}: cores {asked} asked for, {given} given")


class BadImages:
    """The broken images of a run, skipped until there are more than allowed."""

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.command = ""  # how to go on without more of them
        self.messages: list[str] = []
        self.shared = 0  # how many messages all ranks know

    @classmethod
    def of(cls, settings: DataSettings, data: ImageData) -> BadImages:
        """No image yet, and `--max-bad-images` allowed (default: one in a thousand)."""
        asked, usual = settings.max_bad_images, max(1, len(data.chosen) // 1000)
        return cls(usual if asked is None else asked)

    def offer(self, settings: Settings) -> None:
        """Offer, in the error for too many, a command that resumes with ten times as many."""
        resume = Path("auto") if settings.output_dir else settings.resume
        allowed = 10 * max(1, self.allowed)
        more = dataclasses.replace(settings, resume=resume, max_bad_images=allowed)
        self.command = f"to leave out up to {allowed} of them{command_again(more)}"

    def add(self, messages: Iterable[str]) -> None:
        """Note broken images. Raises RunError for the first one too many."""
        for message in messages:
            new = message not in self.messages
            if len(self.messages) + new > self.allowed:
                remedy = f"; {self.command}" if self.command else ""
                raise RunError(f"{message} (more than --max-bad-images {self.allowed}){remedy}")
            if new:
                self.messages.append(message)

    def share(self, messages_by_rank: Iterable[Sequence[str]]) -> None:
        """Note the broken images of all ranks, in the same order everywhere."""
        self.messages.clear()
        self.add(itertools.chain.from_iterable(messages_by_rank))
        self.shared = len(self.messages)


class Batches:
    """`left` batches of a loader, in as many passes over it as that takes.

    `records` say when batches were loaded. The first batch is fetched at once.
    """

    def __init__(self, loader: Iterable[Loaded], left: int, bad: BadImages | None = None):
        self.left = left
        self.records: list[LoadRecord] = []
        self._bad = bad or BadImages()
        passes = itertools.chain.from_iterable(itertools.repeat(loader))
        self._stream = itertools.islice(passes, left)
        self._ahead: list[Loaded] = []
        self.prefetch()

    def prefetch(self) -> None:
        """Fetch the next batch now, if there is one. Call it while no forward pass runs.

        Without loader processes it uses torch's global generator for a while, as dropout does.
        """
        if not self._ahead:
            self._ahead = list(itertools.islice(self._stream, 1))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.prefetch()
        if not self._ahead:
            raise StopIteration
        loaded = self._ahead.pop()
        self._bad.add(loaded.broken)
        if loaded.batch is None:
            raise RunError(f"no image of a batch can be read; {loaded.broken[-1]}")
        self.left -= 1
        self.records.append(loaded.record)
        return loaded.batch

    def take_records(self) -> tuple[LoadRecord, ...]:
        """The records of the batches since the last call."""
        records, self.records = tuple(self.records), []
        return records


class LoaderDied(Exception):
    """A loader process ended before its time."""

    def __init__(self, pid: int, code: int):
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        super().__init__(f"loader process {pid} was ended by {cause}")


class LoaderFailed(Exception):
    """A loader process could not hand over a batch, and ended with this message."""


def make_socket_folder() -> None:
    """Choose the folder for the sockets of this process and its loaders.

    It is in the folder for temporary files, or, if that has too long a path for a socket, in the
    first other place. It ends with this process; folders of killed loaders would stay.
    """
    usual = tempfile.gettempdir()
    try:
        for place in (usual, "/tmp", "/var/tmp", "/dev/shm"):
            is_short = len(os.fsencode(place)) <= LONGEST_FOLDER_BYTES
            if is_short and os.access(place, os.W_OK | os.X_OK):
                tempfile.tempdir = place
                break
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def check_open_files(workers: int) -> None:
    """Raise the limit of open files to what loaders can need; UserError if that is not allowed.

    Without free descriptors a loader loses a batch, and the run waits for it for ever.
    """
    # For each loader the main process has 3, and 2 for each of its 2 batches; a loader inherits up
    # to 4 for each. 16 are for batches in use, a loader's own, and the run's files.
    needed = open_files() + 16 + 8 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            reason = f"--workers {workers} can need {needed} open files, and {hard} are allowed"
            remedy = "raise ulimit -n, or load without loader processes by -j 0"
            raise UserError(f"{reason}: {remedy}") from None


def open_files() -> int:
    """How many files the process has open; without /proc, up to the first free number."""
    try:
        return psutil.Process().num_fds()
    except (psutil.Error, OSError):
        with Path(os.devnull).open() as file:
            return file.fileno()


class Loader:
    """The batches of a data set, epoch after epoch, made by loader processes that live on.

    The processes start at once: create it before the lanes, as none may be forked once an OpenMP
    team exists. Close it: the processes ignore signals. `check_stop` is called while a batch is
    waited for, and may raise.
    """

    def __init__(
        self,
        samples: Samples,
        order: EpochOrder,
        cpus: Sequence[int],
        workers: int,
        seed: int,
        check_stop: Callable[[], None] | None = None,
    ):
        # torch advises no more loaders than the main thread has cores; ours share them on purpose.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # damaged EXIF data
        self._order, self._check_stop, self._waited_s = order, check_stop, 0.0
        self._errors, errors_to_send = multiprocessing.Pipe(duplex=False)
        self._loader = DataLoader(
            samples,
            batch_size=None,  # a sample is a whole batch already
            sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=partial(start_loader, tuple(cpus), errors_to_send),
            generator=torch.Generator().manual_seed(seed),
        )
        if workers:
            check_open_files(workers)
            order.begin(0, 0, 0)
            self._start()

    def _start(self) -> None:
        """Start the loader processes: all, or none with a RunError."""
        before, on_child_end = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        try:
            make_socket_folder()
            iterator = iter(self._loader)
        except OSError as error:  # no more processes or semaphores
            for process in set(multiprocessing.active_children()).difference(before):
                process.kill()
            atexit.register(repr, error)  # keeps torch's half-made iterator, whose end would fail
            reason = one_line(error)
            raise RunError(f"loader processes cannot start: {reason}; try a lower -j") from None
        finally:
            # DataLoader's handler would raise anywhere in the main thread when a loader has died.
            # Without it, it looks after its processes when no batch comes for a while.
            main = threading.current_thread() is threading.main_thread()
            if main and on_child_end is not None:
                signal.signal(signal.SIGCHLD, on_child_end)
        iterator._try_get_data = partial(self._wait_for_batch, iterator._try_get_data)

    def _wait_for_batch(self, get: Callable[[float], tuple[bool, Any]]) -> tuple[bool, Any]:
        """Whether a batch has come, and the batch. DataLoader calls it until one has.

        `get` is DataLoader's own, which only notices that a process has ended.
        """
        has_come, batch = get(LOOK_S)
        if has_come:
            self._waited_s = 0.0
            return has_come, batch
        self._raise_error_sent()
        if self._check_stop:
            self._check_stop()
        self._waited_s += LOOK_S
        if self._waited_s == PATIENCE_S:
            loaders = plural(len(self._loader._iterator._workers), "loader process")
            reason = "are its images on a disk or a network that is slow, or gone?"
            warn(f"no batch for {PATIENCE_S:.0f} s, though {loaders} live: {reason}")
        return has_come, batch

    def _raise_error_sent(self) -> None:
        """Raise LoaderFailed if a loader process has sent an error."""
        if self._errors.poll():
            raise LoaderFailed(self._errors.recv_bytes().decode())

    def __len__(self) -> int:
        """Batches in an epoch, those of all ranks together."""
        return len(self._order)

    def batches(
        self, bad: BadImages, epoch: int = 1, start: int = 0, stop: int | None = None
    ) -> Batches:
        """The rank's part of the batches `start` to `stop` of an epoch."""
        return Batches(self, self._order.begin(epoch, start, stop), bad)

    def __iter__(self) -> Iterator[Loaded]:
        """The batches that were begun. Raises LoaderFailed or, if a process ended, LoaderDied."""
        try:
            yield from self._loader
        except Stopped:
            raise
        except Exception as error:  # DataLoader has many errors for a dead process
            iterator = getattr(self._loader, "_iterator", None)
            for process in iterator._workers if iterator else ():
                process.join(0.1)  # it may just be dying
                self._raise_error_sent()
                if process.exitcode:
                    raise LoaderDied(process.pid, process.exitcode) from error
            raise

    def close(self) -> None:
        """Kill the loader processes, which have nothing to lose.

        DataLoader would end them with threads and locks: without memory there is no new thread, and
        a dead process may hold a lock. The interpreter would wait for ever for processes left over.
        """
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is None or iterator._shutdown:
            return
        iterator._shutdown, iterator._worker_pids_set = True, False
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
        for process in iterator._workers:
            process.kill()
            process.join()
        for indices in iterator._index_queues:
            indices.cancel_join_thread()
            indices.close()


def training_loader(
    data: ImageData,
    settings: Settings,
    cpus: Sequence[int],
    rank: int = 0,
    check_stop: Callable[[], None] | None = None,
) -> Loader:
    """Shuffled, augmented training images in full batches; the rest of an epoch is left out."""
    transform_in, mix = partial(transform_of_epoch, data, settings), mixing_transform(settings)
    least = min(2, settings.batch_size)
    samples = Samples(data.train, settings.seed, transform_in, mix, data.confused, least=least)
    dealt = rank, settings.ranks
    order = EpochOrder(data.chosen, settings.batch_size, settings.seed, dealt)
    return Loader(samples, order, cpus, settings.workers, settings.seed, check_stop)


def validation_loader(
    data: ImageData,
    settings: Settings,
    cpus: Sequence[int],
    rank: int = 0,
    check_stop: Callable[[], None] | None = None,
) -> Loader | None:
    """The validation images in order, if there are any."""
    if data.val is None:
        return None
    transform = validation_transform(data.native.overruled(settings))
    samples = Samples(data.val, settings.seed, partial(same_transform, transform))
    dealt = rank, settings.ranks
    order = EpochOrder(range(len(data.val)), settings.batch_size, None, dealt)
    return Loader(samples, order, cpus, settings.workers, settings.seed, check_stop)


def open_loaders(
    stack: contextlib.ExitStack,
    data: ImageData,
    settings: Settings,
    cpus: Sequence[int],
    rank: int,
    check_stop: Callable[[], None],
) -> tuple[Loader, Loader | None]:
    """The loaders of a run, to train and, if it validates, to validate; they end with the stack."""
    train = training_loader(data, settings, cpus, rank, check_stop)
    stack.callback(train.close)
    if not settings.epochs and not settings.test_only:
        return train, None
    val = validation_loader(data, settings, cpus, rank, check_stop)
    if val:
        stack.callback(val.close)
    return train, val


def picture_loader(
    paths: Sequence[str],
    ready: Preprocessing,
    settings: Settings,
    cpus: Sequence[int],
    check_stop: Callable[[], None] | None = None,
) -> Loader:
    """Pictures in order, with the validation transform."""
    batches = math.ceil(len(paths) / settings.batch_size)
    workers = min(settings.workers, batches) if batches > 1 else 0
    transform = partial(same_transform, validation_transform(ready))
    order = EpochOrder(range(len(paths)), settings.batch_size, None)
    pictures = UnlabelledPictures(paths, picture_reader(settings.full_decode))
    samples = Samples(pictures, settings.seed, transform, skip_too_large=True)
    loader = Loader(samples, order, cpus, workers, settings.seed, check_stop)
    order.begin(1)
    return loader
