"""Whole batches, made of pictures by their keys, and their order in an epoch.

A sample depends only on (seed, epoch, index): not on the number of loader processes, nor on where a
run was resumed.
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

# Images (n, 3, size, size), and class indices (n,) or, of mixed images, probabilities (n, classes).
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LoadRecord:
    """When a batch was loaded, in seconds of time.perf_counter, and by which loader process."""

    loader: int  # -1: the main thread
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Loaded:
    """A batch (None if no image of it could be read), and the broken images left out of it.

    Broken images are returned, not raised: an exception would leave a loader process with a
    traceback as its text.
    """

    batch: Batch | None
    record: LoadRecord = LoadRecord(-1, 0.0, 0.0)
    broken: tuple[str, ...] = ()


def share_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in a file in memory, to hand to another process.

    DataLoader would use /dev/shm, where containers often have 64 MB (Docker's default), less than
    some batches. Where Linux's memfd_create(2) is missing, the tensor itself is returned.
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
    """Whole batches of a data set's pictures, by their keys, through the transform of the epoch.

    Pictures of `confused` classes go through `transform_in(epoch, True)`. If broken images leave
    fewer than `least`, the first image is repeated, augmented in another way: BatchNorm learns
    nothing from one image, and a step needs all its batches. With `skip_too_large`, a picture for
    which memory is missing counts as broken.

    Each sample seeds torch's global generator, as torchvision's transforms draw from it. It is put
    back: without loader processes the model's dropout uses it, too.
    """

    def __init__(
        self,
        pictures: Dataset,
        seed: int,
        transform_in: Callable[..., v2.Transform],
        mix: v2.Transform | None = None,
        confused: Sequence[int] | None = None,
        skip_too_large: bool = False,
        least: int = 1,
    ):
        self._pictures, self._seed = pictures, seed
        self._transform_in, self._mix = transform_in, mix
        self._confused, self._skip_too_large = frozenset(confused or ()), skip_too_large
        self._least = least

    def __getitem__(self, keys: Sequence[SampleKey]) -> Loaded:
        start_s = time.perf_counter()
        samples, used, broken, batch = [], [], [], None
        epoch, _ = keys[0]  # a batch is of one epoch
        transform = stronger = self._transform_in(epoch)
        if self._confused:
            stronger = self._transform_in(epoch, True)
        with torch.random.fork_rng(devices=()):
            for key in keys:
                try:
                    samples.append(self._sample(*key, transform, stronger))
                    used.append(key)
                except BrokenImage as error:
                    broken.append(str(error))
            missing = self._least - len(samples) if samples else 0
            for again in range(missing):
                samples.append(self._sample(*used[0], transform, stronger, f"again {again}"))
            if samples:
                images, targets = zip(*samples, strict=True)
                batch = torch.stack(images), torch.tensor(targets)
            if self._mix and batch:
                torch.default_generator.manual_seed(derived_seed(self._seed, "mix", *keys[0]))
                batch = tuple(self._mix(*batch))
        process = torch.utils.data.get_worker_info()
        if process and batch:
            batch = tuple(map(share_tensor, batch))
        record = LoadRecord(process.id if process else -1, start_s, time.perf_counter())
        return Loaded(batch, record, tuple(broken))

    def _sample(
        self, epoch: int, index: int, usual: v2.Transform, stronger: v2.Transform, *more: str
    ) -> tuple[torch.Tensor, int]:
        """One image and its class. Raises BrokenImage, or what a transform raises."""
        torch.default_generator.manual_seed(derived_seed(self._seed, epoch, index, *more))
        picture, target = self._pictures[index]
        transform = stronger if int(target) in self._confused else usual
        try:
            return transform(picture), int(target)
        except (MemoryError, RuntimeError, OSError) as error:
            no_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
            if not no_memory or not self._skip_too_large:
                raise
            width, height = picture.size
            name = f"{getattr(picture, 'filename', index)} of {width} x {height} pixels"
            raise BrokenImage(f"broken image {name}: {NO_ROOM}") from error


class EpochOrder:
    """A sampler: the batches of one epoch, as lists of keys. `begin` chooses the epoch.

    With a seed they are shuffled by seed and epoch. Without, they are in order, and the last may be
    incomplete. Batch by batch they are dealt to the ranks; `dealt` is (this rank, ranks).
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
        """Give this rank's part of an epoch's batches `start` to `stop`; returns their number."""
        self._epoch, self._span = epoch, slice(start, stop)
        return len(self._own_batches())

    def _own_batches(self) -> range:
        """The numbers of the batches to give."""
        rank, ranks = self._dealt
        return range(len(self))[self._span][rank::ranks]

    def __len__(self) -> int:
        """Batches in an epoch, those of all ranks together."""
        full, rest = divmod(len(self._indices), self._batch_size)
        return full + (self._seed is None and rest > 0)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = range(len(self._indices))
        if self._seed is not None:
            seed = derived_seed(self._seed, "order", self._epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(order), generator=generator).tolist()
        for batch in self._own_batches():
            places = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield [(self._epoch, self._indices[place]) for place in places]
