"""Data. Run: python -m pytest tests/test_data.py"""

import contextlib
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
from conftest import as_loaded
from torch.utils.data import Dataset

import train_split_affinity as tsa
from train_split_affinity import Settings


def small(**settings):
    return Settings(**({"image_size": 32, "batch_size": 4, "workers": 0} | settings))


def load(dataset, settings, cpus=tuple(tsa.ALLOWED_CPUS), count=3):
    with contextlib.closing(
        tsa.Batches(tsa.make_loader(dataset, settings, cpus), count)
    ) as batches:
        return list(batches)


def test_synthetic_images():
    dataset, classes = tsa.open_dataset(small(num_classes=5))
    images, targets = load(dataset, small())[0]
    assert classes == 5
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.shape == (4,)
    assert set(targets.tolist()) <= set(range(5))


def test_synthetic_images_depend_on_the_seed():
    first, again, other = (
        load(tsa.open_dataset(small(seed=seed))[0], small(seed=seed))[0][0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("below", ["", "train"])
def test_an_image_folder_with_or_without_train(photos, below):
    settings = small(data_path=photos / below)
    dataset, classes = tsa.open_dataset(settings)
    assert classes == 2
    assert dataset.classes == ["flower", "temple"]
    assert len(dataset) == 12
    images, targets = load(dataset, settings)[0]
    assert images.shape == (4, 3, 32, 32)
    assert -3 < images.mean() < 3, "normalised"
    assert 0.2 < images.std() < 3


def test_more_classes_than_the_folder_has(photos):
    assert tsa.open_dataset(small(data_path=photos, num_classes=9))[1] == 9


def test_paths_that_hold_no_images(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images/a").mkdir(parents=True)
    (tmp_path / "no_images/b").mkdir(parents=True)
    (tmp_path / "no_images/a/notes.txt").write_text("hello")
    shutil.copytree(photos / "train/temple", tmp_path / "one/temple")
    picture = photos / "train/temple/0000.jpg"
    for path, reason in (
        (tmp_path / "nowhere", "does not exist"),
        (picture, "is a file"),
        (tmp_path / "empty", "no images"),
        (tmp_path / "no_images", "no images"),
        (tmp_path / "one", r"one class only \(temple\)"),
    ):
        with pytest.raises(tsa.UserError, match=f"--data-path {path}.*{reason}") as caught:
            tsa.open_dataset(small(data_path=path))
        assert "\n" not in str(caught.value)


def test_settings_that_do_not_suit_the_folder(photos):
    with pytest.raises(tsa.UserError, match="--batch-size 13: .* has only 12 images"):
        tsa.open_dataset(small(data_path=photos, batch_size=13))
    with pytest.raises(tsa.UserError, match="--num-classes 1: .* has 2 classes"):
        tsa.open_dataset(small(data_path=photos, num_classes=1))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_broken_image_is_named(photos, tmp_path, workers, damage):
    shutil.copytree(photos, tmp_path / "copy")
    path = tmp_path / "copy/train/temple/0003.jpg"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:600], "garbage": b"x" * 600, "empty": b""}[damage])
    settings = small(data_path=tmp_path / "copy", workers=workers)
    dataset, _ = tsa.open_dataset(settings)
    with pytest.raises(tsa.BrokenImage, match=f"broken image {path}: ") as caught:
        load(dataset, settings)
    assert "\n" not in str(caught.value)


class Whereabouts(Dataset):
    """Samples that tell on which CPUs, and with which signals ignored, they were loaded."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ignored = [
            signal.getsignal(signum) == signal.SIG_IGN for signum in (signal.SIGINT, signal.SIGTERM)
        ]
        return os.getpid(), sorted(os.sched_getaffinity(0)), ignored


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs thread affinity")
def test_loader_processes_stay_on_their_cores():
    last = max(tsa.ALLOWED_CPUS)
    settings = small(workers=1, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for process, cpus, ignored in load(Whereabouts(), settings, (last,), count=8):
            assert process.item() != os.getpid()
            assert [cpu.item() for cpu in cpus] == [last]
            assert all(flag.item() for flag in ignored)


def test_batches_go_on_over_epochs():
    batches = tsa.Batches(as_loaded([1, 2, 3]), 7)
    assert next(batches) == 1
    assert batches.left == 6
    assert list(batches) == [2, 3, 1, 2, 3, 1]
    assert batches.left == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_when_and_where_batches_were_loaded(workers):
    settings = small(num_classes=5, workers=workers)
    dataset, _ = tsa.open_dataset(settings)
    begin_s = time.perf_counter()
    loader = tsa.make_loader(dataset, settings, tuple(tsa.ALLOWED_CPUS))
    with contextlib.closing(tsa.Batches(loader, 4)) as batches:
        list(batches)
        records = batches.take_records()
        assert batches.take_records() == ()
    assert [record.loader for record in records] == ([0, 1, 0, 1] if workers else [-1] * 4)
    for record in records:
        assert begin_s < record.start_s < record.end_s < time.perf_counter()


def test_prefetching_fetches_one_batch_and_no_more():
    fetched = []

    def loader():
        for number in range(5):
            fetched.append(number)
            yield as_loaded([number])[0]

    batches = tsa.Batches(loader(), 3)
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


def test_incomplete_batches_are_left_out(photos):
    settings = small(data_path=photos, batch_size=5)
    dataset, _ = tsa.open_dataset(settings)
    assert [len(targets) for _, targets in load(dataset, settings, count=4)] == [5, 5, 5, 5]
