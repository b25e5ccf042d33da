"""Whole batches, made of pictures by their keys, and their order in an epoch.

What a sample looks like depends only on (seed, epoch, index): not on the number of loader
processes, nor on where a run was resumed.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from split_affinity.data.pictures import NO_ROOM, BrokenImage, derived_seed
from split_affinity.errors import one_line

# Images (n, 3, size, size), and class indices (n,) or, of mixed images, probabilities (n, classes).
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LoadRecord:
    """When a batch was loaded, in seconds of time.perf_counter, which all processes share.

    `loader` is the number of the loader process, -1 for the main thread.
    """

    loader: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Loaded:
    """A batch (None if no image of it could be read), and the broken images left out of it.

    Broken images are returned, not raised: exceptions that leave a loader process arrive with that
    process's traceback as their text; a value arrives as it is.
    """

    batch: Batch | None
    record: LoadRecord = LoadRecord(-1, 0.0, 0.0)
    broken: tuple[str, ...] = ()


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that another process can be handed, in a file in memory.

    DataLoader's own way is a file in /dev/shm, where containers have 64 MB (Docker's default), less
    than some batches. Without memfd_create(2), which is Linux's, the tensor itself, for that way.
    """
    try:
        # os.memfd_create is missing in Pythons that were built for older systems.
        file = ctypes.CDLL(None).memfd_create(b"batch", 0)
        os.ftruncate(file, tensor.nbytes)
    except (AttributeError, OSError):
        return tensor
    storage = torch.UntypedStorage._new_shared_fd_cpu(file, tensor.nbytes)
    os.close(file)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape).copy_(tensor)


SampleKey = tuple[int, int]  # epoch and index


class Samples(Dataset):
    """Whole batches of a data set's pictures, by their keys, through the transform of the epoch;
    those of `confused` classes through `transform_in(epoch, True)`. Each stands `alone` if no other
    shall be lost for it: one that there is no memory for is then left out, like a broken one. Where
    broken images leave fewer than `least`, the first of a batch is in it again, differently
    augmented: BatchNorm learns nothing from one image, and a step has to have all its batches.

    torch's global generator is seeded for every sample, since torchvision's transforms draw from
    it, and then put back: without loader processes, the model's dropout uses the same one.
    """

    def __init__(
        self,
        pictures: Dataset,
        seed: int,
        transform_in: Callable[..., v2.Transform],
        mix: v2.Transform | None = None,
        confused: Sequence[int] | None = None,
        alone: bool = False,
        least: int = 1,
    ):
        self._pictures, self._seed, self._mix, self._alone = pictures, seed, mix, alone
        self._transform_in, self._confused, self._least = transform_in, confused, least

    def __getitem__(self, keys: Sequence[SampleKey]) -> Loaded:
        start_s = time.perf_counter()
        samples, used, broken, batch = [], [], [], None
        epoch, _ = keys[0]  # a batch is of one epoch
        transform, stronger = self._transform_in(epoch), {}
        if self._confused:
            stronger = dict.fromkeys(self._confused, self._transform_in(epoch, True))
        with torch.random.fork_rng(devices=()):
            for key in keys:
                try:
                    samples.append(self._sample(*key, transform, stronger))
                    used.append(key)
                except BrokenImage as error:
                    broken.append(str(error))
            whole = len(samples)
            for again in range(self._least - whole if whole else 0):
                samples.append(self._sample(*used[0], transform, stronger, f"again {again}"))
            if samples:
                images, targets = zip(*samples, strict=True)
                batch = torch.stack(images), torch.tensor(targets)
            if self._mix and batch:
                torch.default_generator.manual_seed(derived_seed(self._seed, "mix", *keys[0]))
                batch = tuple(self._mix(*batch))
        process = torch.utils.data.get_worker_info()
        if process and batch:
            batch = tuple(map(shared, batch))
        record = LoadRecord(process.id if process else -1, start_s, time.perf_counter())
        return Loaded(batch, record, tuple(broken))

    def _sample(
        self,
        epoch: int,
        index: int,
        usual: v2.Transform,
        of_class: dict[int, v2.Transform],
        *more: str,
    ) -> tuple[torch.Tensor, int]:
        torch.default_generator.manual_seed(derived_seed(self._seed, epoch, index, *more))
        picture, target = self._pictures[index]
        try:
            return of_class.get(int(target), usual)(picture), int(target)
        except Exception as error:
            memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
            if memory and not self._alone:
                raise
            width, height = picture.size
            name = f"{getattr(picture, 'filename', index)} of {width} x {height} pixels"
            reason = NO_ROOM if memory else one_line(error)
            raise BrokenImage(f"broken image {name}: {reason}") from error


class EpochOrder:
    """The batches of one epoch, as lists of keys: a sampler. `begin` chooses the epoch.

    Shuffled by seed and epoch if there is a seed; else in order, with the last batch incomplete.
    They are dealt out to ranks one by one; `dealt` are the number of this one, and of all ranks.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int | None,
        dealt: tuple[int, int] = (0, 1),
    ):
        self._indices, self._batch_size, self._seed = indices, batch_size, seed
        self._epoch, self._span, self._dealt = 1, slice(None), dealt

    def begin(self, epoch: int, start: int = 0, stop: int | None = None) -> int:
        """Give this rank's part of the batches `start` to `stop` of an epoch from now on; says how
        many these are.
        """
        self._epoch, self._span = epoch, slice(start, stop)
        return len(self._own())

    def _own(self) -> range:
        """The numbers of the batches to give."""
        rank, ranks = self._dealt
        return range(len(self))[self._span][rank::ranks]

    def __len__(self) -> int:
        """Batches in an epoch, those of all ranks together."""
        whole, rest = divmod(len(self._indices), self._batch_size)
        return whole + (self._seed is None and rest > 0)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = range(len(self._indices))
        if self._seed is not None:
            seed = derived_seed(self._seed, "order", self._epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(order), generator=generator).tolist()
        for batch in self._own():
            places = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield [(self._epoch, self._indices[place]) for place in places]
