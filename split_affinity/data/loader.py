"""Loader processes, which live on from epoch to epoch, and what happens when one dies.

Knows nothing of lanes; loader processes are told which CPUs to stay on.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import math
import multiprocessing.util
import resource
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

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
from split_affinity.errors import STOP_SIGNALS, RunError, UserError, one_line
from split_affinity.lanes.lane import confine_thread
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.settings import Settings
from split_affinity.text import format_cpu_list


def start_loader(cpus: Sequence[int], worker: int) -> None:
    """Confine a loader process, and leave signals to the main process.

    The mask is set after torch is up, since a lazy OpenMP start can reset it [pytorch 99625].
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    mask = confine_thread(cpus)
    if mask != set(cpus):
        asked, given = format_cpu_list(cpus), format_cpu_list(mask)
        raise RuntimeError(f"loader {worker}: cores {asked} asked for, {given} given")


class BadImages:
    """The broken images of a run, skipped until there are more than allowed."""

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.messages: list[str] = []
        self.shared = 0  # so many of them are known to all ranks

    def add(self, messages: Iterable[str]) -> None:
        """Take note of broken images. Raises RunError for the first one too many."""
        for message in messages:
            new = message not in self.messages
            if len(self.messages) + new > self.allowed:
                raise RunError(f"{message} (more than --max-bad-images {self.allowed})")
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
    needed = psutil.Process().num_fds() + 16 + 8 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            reason = f"--workers {workers} can need {needed} open files, and {hard} are allowed"
            remedy = "raise ulimit -n, or load without loader processes by -j 0"
            raise UserError(f"{reason}: {remedy}") from None


class Feed:
    """The batches of a data set, epoch after epoch, made by loader processes that live on.

    The processes start at once: none may be forked once a lane, with its OpenMP team, exists. Close
    it, since they ignore signals.
    """

    def __init__(
        self, samples: Samples, order: EpochOrder, settings: Settings, cpus: Sequence[int]
    ):
        # torch advises no more loaders than the main thread has cores; ours share them on purpose.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # damaged EXIF data
        self._order = order
        self._loader = DataLoader(
            samples,
            batch_size=None,  # a sample is a whole batch already
            sampler=order,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            worker_init_fn=partial(start_loader, tuple(cpus)),
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
            # Batches are handed over through sockets in a temporary folder: let that be this
            # process's, which goes with it. Loaders are killed, and their own would stay.
            multiprocessing.util.get_temp_dir()
            with child_signal_kept():
                iter(self._loader)
        except OSError as error:  # no more processes or semaphores
            for process in set(multiprocessing.active_children()).difference(before):
                process.kill()
            atexit.register(repr, error)  # keeps torch's half-made iterator, whose end would fail
            reason = one_line(error)
            raise RunError(f"loader processes cannot start: {reason}; try a lower -j") from None

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
        which DataLoader tells in many ways.
        """
        try:
            yield from self._loader
        except Exception as error:
            iterator = getattr(self._loader, "_iterator", None)
            for process in iterator._workers if iterator else ():
                process.join(0.1)  # it may just be dying
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


def training_feed(data: ImageData, settings: Settings, cpus: Sequence[int], rank: int = 0) -> Feed:
    """Shuffled, augmented training images; what does not fill a batch is left out of an epoch."""
    transform_in, mix = partial(transform_of_epoch, data, settings), mixing_transform(settings)
    samples = Samples(data.train, settings.seed, transform_in, mix, data.confused)
    dealt = rank, settings.ranks
    order = EpochOrder(data.chosen, settings.batch_size, settings.seed, dealt)
    return Feed(samples, order, settings, cpus)


def validation_feed(
    data: ImageData, settings: Settings, cpus: Sequence[int], rank: int = 0
) -> Feed | None:
    """The validation images in order, if there are any."""
    if data.val is None:
        return None
    transform = validation_transform(data.native.overruled(settings))
    samples = Samples(data.val, settings.seed, partial(same_transform, transform))
    dealt = rank, settings.ranks
    order = EpochOrder(range(len(data.val)), settings.batch_size, None, dealt)
    return Feed(samples, order, settings, cpus)


def picture_feed(
    paths: Sequence[str], ready: Preprocessing, settings: Settings, cpus: Sequence[int]
) -> Feed:
    """Pictures in order, made ready as to validate; no more loaders than there are batches."""
    batches = math.ceil(len(paths) / settings.batch_size)
    workers = min(settings.workers, batches) if batches > 1 else 0
    transform = partial(same_transform, validation_transform(ready))
    order = EpochOrder(range(len(paths)), settings.batch_size, None)
    samples = Samples(NewPictures(paths), settings.seed, transform)
    feed = Feed(samples, order, dataclasses.replace(settings, workers=workers), cpus)
    order.begin(1)
    return feed
