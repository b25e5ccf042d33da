"""Loader processes, which live on from epoch to epoch, and what happens when one dies.

Knows nothing of lanes; loader processes are told which CPUs to stay on.
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

from split_affinity.data.pictures import ImageData, NewPictures
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
from split_affinity.options.settings import Settings
from split_affinity.terminal import warn
from split_affinity.text import format_cpu_list, plural

LOOK_S = 2.0  # that a batch may take before it is looked whether one can still come
PATIENCE_S = 60.0  # that a batch may take before it is told
LONGEST_WORDS_BYTES = 1000  # what a pipe takes at once, be there who else writes

# A socket's path has 103 bytes on macOS, 107 on Linux; 32 are multiprocessing's own names in it.
LONGEST_FOLDER_BYTES = 103 - len("/pymp-12345678/listener-12345678")


def start_loader(cpus: Sequence[int], last_words: Connection, worker: int) -> None:
    """Confine a loader process, leave signals to the main process, and have the process end if it
    cannot hand over what it has loaded.

    The mask is set after torch is up, since a lazy OpenMP start can reset it [pytorch 99625].
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    end_by_errors(multiprocessing.queues.Queue, partial(end_loader, last_words, worker))
    mask = confine_thread(cpus)
    if mask != set(cpus):
        asked, given = format_cpu_list(cpus), format_cpu_list(mask)
        raise RuntimeError(f"loader {worker}: cores {asked} asked for, {given} given")


def end_loader(last_words: Connection, worker: int, error: Exception, *of: object) -> NoReturn:
    """End a loader process by an error, which the main process is told."""
    try:
        text = f"loader {worker} cannot hand over a batch: {one_line(error)}"
        last_words.send_bytes(text.encode(errors="replace")[:LONGEST_WORDS_BYTES])
    finally:
        os._exit(1)


def end_by_errors(queues: type, end: Callable[..., NoReturn]) -> None:
    """Have queues of this process call `end` where they would lose what is put into them, with no
    more than a traceback on the screen: whoever is at the other end would wait for it for ever
    [pytorch 142884].

    An error can arise where something is put, if no thread can be started for the queue, and later
    in that thread, which needs another thread and a socket to hand tensors over.
    """
    put = queues.put

    def put_or_end(*args: Any, **options: Any) -> None:
        try:
            put(*args, **options)
        except Exception as error:
            end(error)

    queues.put = put_or_end
    queues._on_queue_feeder_error = staticmethod(end)


class BadImages:
    """The broken images of a run, skipped until there are more than allowed."""

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.command = ""  # goes on without those that are too many
        self.messages: list[str] = []
        self.shared = 0  # so many of them are known to all ranks

    @classmethod
    def of(cls, settings: Settings, data: ImageData) -> BadImages:
        """None yet; allowed are as many as asked, or one in a thousand."""
        asked, usual = settings.max_bad_images, max(1, len(data.chosen) // 1000)
        return cls(usual if asked is None else asked)

    def offer(self, settings: Settings) -> None:
        """Have the error offer the command that goes on where the run was stopped, or begins anew
        if nothing was saved, with ten times as many allowed.
        """
        resume = Path("auto") if settings.output_dir else settings.resume
        allowed = 10 * max(1, self.allowed)
        more = dataclasses.replace(settings, resume=resume, max_bad_images=allowed)
        self.command = f"to go on without such images{command_again(more)}"

    def add(self, messages: Iterable[str]) -> None:
        """Take note of broken images. Raises RunError for the first one too many."""
        for message in messages:
            new = message not in self.messages
            if len(self.messages) + new > self.allowed:
                remedy = f"; {self.command}" if self.command else ""
                raise RunError(f"{message} (more than --max-bad-images {self.allowed}){remedy}")
            if new:
                self.messages.append(message)

    def share(self, messages_by_rank: Iterable[Sequence[str]]) -> None:
        """Take note of those of all ranks, in an order that is the same for all."""
        self.messages.clear()
        self.add(itertools.chain.from_iterable(messages_by_rank))
        self.shared = len(self.messages)


class Batches:
    """`left` batches of a loader, which is gone through again and again if that takes it; `records`
    tells of each batch given out when it was loaded. The first batch is fetched at once.
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
        """Fetch the next batch, if there is one, now and not when it is asked for.

        Without loader processes this uses torch's global generator, and puts it back, as dropout
        uses it in a forward pass: to be called at moments when no forward pass runs.
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
        """The batches given out since the last call; forgets them."""
        records, self.records = tuple(self.records), []
        return records


class LoaderDied(Exception):
    """A loader process ended before its time."""

    def __init__(self, pid: int, code: int):
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        super().__init__(f"loader process {pid} was ended by {cause}")


class LoaderFailed(Exception):
    """A loader process could not hand over what it had loaded, and ended; the text is its own."""


def make_socket_folder() -> None:
    """Choose the folder for the sockets through which batches are handed over, for this process and
    its loaders: where temporary files are kept, or else, if the path of that is too long for a
    socket's, the first place that is not.

    The folder is this process's, which goes with it. Loaders are killed, and their own would stay.
    """
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    usual, short = places[0], [each for each in places if fits_sockets(each)]
    try:
        tempfile.tempdir = short[0] if short else usual
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def fits_sockets(folder: str) -> bool:
    """Whether sockets can be made below a folder."""
    return len(os.fsencode(folder)) <= LONGEST_FOLDER_BYTES and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def child_signal_kept() -> Iterator[None]:
    """Leave SIGCHLD as it was: DataLoader has it raise, anywhere in the main thread, when a loader
    process has died (torch/utils/data/_utils/signal_handling.py). Without that, it looks after its
    processes when no batch comes for five seconds.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def check_open_files(workers: int) -> None:
    """Raise the limit of open files if loader processes could need that; UserError if it cannot be.

    Without descriptors left, a loader loses a batch, and the run waits for it for ever.
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


def unheard() -> None:
    """What a feed calls while it waits, if nothing can come meanwhile."""


def open_files() -> int:
    """How many files the process has open; without /proc, up to the first number that is free."""
    try:
        return psutil.Process().num_fds()
    except (psutil.Error, OSError):
        with Path(os.devnull).open() as file:
            return file.fileno()


class Loader:
    """The batches of a data set, epoch after epoch, made by loader processes that live on.

    The processes start at once: none may be forked once a lane, with its OpenMP team, exists. Close
    it, since they ignore signals. `hear` is called while a batch is waited for, and may raise.
    """

    def __init__(
        self,
        samples: Samples,
        order: EpochOrder,
        settings: Settings,
        cpus: Sequence[int],
        hear: Callable[[], None] = unheard,
    ):
        # torch advises no more loaders than the main thread has cores; ours share them on purpose.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # damaged EXIF data
        self._order, self._hear, self._waited_s = order, hear, 0.0
        self._last_words, told = multiprocessing.Pipe(duplex=False)
        self._loader = DataLoader(
            samples,
            batch_size=None,  # a sample is a whole batch already
            sampler=order,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            worker_init_fn=partial(start_loader, tuple(cpus), told),
            generator=torch.Generator().manual_seed(settings.seed),
        )
        if settings.workers:
            check_open_files(settings.workers)
            order.begin(0, 0, 0)
            self._start()

    def _start(self) -> None:
        """Start the loader processes: all, or none with a RunError."""
        before = multiprocessing.active_children()
        try:
            make_socket_folder()
            with child_signal_kept():
                iterator = iter(self._loader)
        except OSError as error:  # no more processes or semaphores
            for process in set(multiprocessing.active_children()).difference(before):
                process.kill()
            atexit.register(repr, error)  # keeps torch's half-made iterator, whose end would fail
            reason = one_line(error)
            raise RunError(f"loader processes cannot start: {reason}; try a lower -j") from None
        iterator._try_get_data = partial(self._await, iterator._try_get_data)

    def _await(self, get: Callable[[float], tuple[bool, Any]]) -> tuple[bool, Any]:
        """Whether a batch has come, and the batch: what DataLoader calls again and again until one
        has. DataLoader itself, by `get`, notices no more than that a process has ended.
        """
        has_come, batch = get(LOOK_S)
        if has_come:
            self._waited_s = 0.0
            return has_come, batch
        self._raise_last_words()
        self._hear()
        self._waited_s += LOOK_S
        if self._waited_s == PATIENCE_S:
            loaders = plural(len(self._loader._iterator._workers), "loader process")
            reason = "are its images on a disk or a network that is slow, or gone?"
            warn(f"no batch for {PATIENCE_S:.0f} s, though {loaders} live: {reason}")
        return has_come, batch

    def _raise_last_words(self) -> None:
        """Raise LoaderFailed if a loader could not hand something over."""
        if self._last_words.poll():
            raise LoaderFailed(self._last_words.recv_bytes().decode())

    def __len__(self) -> int:
        """Batches in an epoch, those of all ranks together."""
        return len(self._order)

    def batches(
        self, bad: BadImages, epoch: int = 1, start: int = 0, stop: int | None = None
    ) -> Batches:
        """The rank's part of the batches `start` to `stop` of an epoch."""
        return Batches(self, self._order.begin(epoch, start, stop), bad)

    def __iter__(self) -> Iterator[Loaded]:
        """The batches of the span that was begun. Raises LoaderDied if a process has ended, of
        which DataLoader tells in many ways, or LoaderFailed.
        """
        try:
            yield from self._loader
        except Stopped:
            raise
        except Exception as error:
            iterator = getattr(self._loader, "_iterator", None)
            for process in iterator._workers if iterator else ():
                process.join(0.1)  # it may just be dying
                self._raise_last_words()
                if process.exitcode:
                    raise LoaderDied(process.pid, process.exitcode) from error
            raise

    def close(self) -> None:
        """Kill the loader processes, which have nothing to lose. DataLoader would tell them to end
        by threads and locks, which a process without memory cannot have, or a dead one may hold;
        and for those left over the interpreter would wait for ever, since they ignore SIGTERM.
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
    hear: Callable[[], None] = unheard,
) -> Loader:
    """Shuffled, augmented training images; what does not fill a batch is left out of an epoch."""
    transform_in, mix = partial(transform_of_epoch, data, settings), mixing_transform(settings)
    least = min(2, settings.batch_size)
    samples = Samples(data.train, settings.seed, transform_in, mix, data.confused, least=least)
    dealt = rank, settings.ranks
    order = EpochOrder(data.chosen, settings.batch_size, settings.seed, dealt)
    return Loader(samples, order, settings, cpus, hear)


def validation_feed(
    data: ImageData,
    settings: Settings,
    cpus: Sequence[int],
    rank: int = 0,
    hear: Callable[[], None] = unheard,
) -> Loader | None:
    """The validation images in order, if there are any."""
    if data.val is None:
        return None
    transform = validation_transform(data.native.overruled(settings))
    samples = Samples(data.val, settings.seed, partial(same_transform, transform))
    dealt = rank, settings.ranks
    order = EpochOrder(range(len(data.val)), settings.batch_size, None, dealt)
    return Loader(samples, order, settings, cpus, hear)


def open_loaders(
    stack: contextlib.ExitStack, data: ImageData, settings: Settings, *source: Any
) -> tuple[Loader, Loader | None]:
    """What a run trains on, and what it validates with if it does; they end with the stack."""
    train = training_loader(data, settings, *source)
    stack.callback(train.close)
    validates = settings.epochs or settings.test_only
    val = validation_feed(data, settings, *source) if validates else None
    if val:
        stack.callback(val.close)
    return train, val


def picture_loader(
    paths: Sequence[str],
    ready: Preprocessing,
    settings: Settings,
    cpus: Sequence[int],
    hear: Callable[[], None] = unheard,
) -> Loader:
    """Pictures in order, made ready as to validate; no more loaders than there are batches."""
    batches = math.ceil(len(paths) / settings.batch_size)
    workers = min(settings.workers, batches) if batches > 1 else 0
    transform = partial(same_transform, validation_transform(ready))
    order = EpochOrder(range(len(paths)), settings.batch_size, None)
    samples = Samples(NewPictures(paths), settings.seed, transform, alone=True)
    loader = Loader(samples, order, dataclasses.replace(settings, workers=workers), cpus, hear)
    order.begin(1)
    return loader
