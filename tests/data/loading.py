"""What several tests of data use."""

import contextlib
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from split_affinity import ALLOWED_CPUS, process_cpus
from split_affinity.data.loader import BadImages, Loader, training_loader
from split_affinity.data.pictures import ImageData
from split_affinity.data.samples import EpochOrder, Samples
from split_affinity.data.transforms import training_transform
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.settings import Settings

ALL_CPUS = tuple(sorted(ALLOWED_CPUS))
ALL_WORKERS = pytest.mark.parametrize("workers", [0, 1, 2])


def small(**settings):
    chosen = {"image_size": 32, "batch_size": 4, "workers": 0, "num_classes": 2} | settings
    return Settings(**chosen)


def load(data, settings, epoch=1, start=0, stop=None):
    """Training batches, as a run gets them."""
    with contextlib.closing(training_loader(data, settings, ALL_CPUS)) as loader:
        bad = BadImages(settings.max_bad_images or 0)
        return list(loader.batches(bad, epoch, start, stop))


def assert_same_batches(batches, others):
    assert len(batches) == len(others)
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def folder_of(root, *names):
    """A folder with small pictures, each of another colour, under these names."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return root


def colour(red, green, blue):
    return np.broadcast_to(np.uint8([red, green, blue]), (32, 32, 3))


def plain(kind="folder"):
    """Data whose images keep their values from 0 to 1, to see what transforms do."""
    sides = (32, 32) if kind == "cifar10" else (224, 256)
    native = Preprocessing(*sides, "bilinear", (0, 0, 0), (1, 1, 1))
    padded = 32 if kind == "cifar10" else 0
    return ImageData(kind, None, None, ("a", "b"), native, padded=padded)


def transform(size=32, kind="folder", **settings):
    """Without what is random, unless settings say so."""
    chosen = small(**({"min_scale": 1.0, "hflip": 0.0, "image_size": size} | settings))
    return training_transform(plain(kind), chosen, size)


def noise(side=32):
    return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


def draws(transformation, pixels, count):
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    torch.manual_seed(0)
    return [transformation(picture) for _ in range(count)]


AUGMENTED = {
    "batch_size": 3,
    "auto_augment": "ra",
    "color_jitter": 0.4,
    "random_erase": 0.5,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
}


class Labels(Dataset):
    """Nothing but labels."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


class Whereabouts(Dataset):
    """Samples that tell by which process, on which CPUs and with which signals ignored they were
    loaded.
    """

    def __len__(self):
        return 8

    def __getitem__(self, index):
        signums = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        ignored = all(signal.getsignal(signum) == signal.SIG_IGN for signum in signums)
        cpus = sorted(process_cpus())
        return torch.tensor([os.getpid(), len(cpus), cpus[0], ignored]), 0


def unchanged(epoch):
    return v2.Identity()


@contextlib.contextmanager
def whereabouts(workers, cpus=ALL_CPUS):
    """A loader of single samples of them."""
    order = EpochOrder(range(8), 1, None)
    with contextlib.closing(
        Loader(Samples(Whereabouts(), 0, unchanged), order, cpus, workers, 0)
    ) as loader:
        yield loader
