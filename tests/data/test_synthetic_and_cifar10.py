"""Synthetic images, and CIFAR-10. Run: python -m pytest tests/data/test_synthetic_and_cifar10.py"""

import contextlib
import hashlib
import http.server
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import CIFAR10, DIGITS, FOLDER, accept, make_cifar_digits
from loading import ALL_CPUS, ALL_WORKERS, assert_same_batches, load, small
from serving import QuietHandler, cut_in_half, flip_a_bit
from torchvision.transforms import v2

from split_affinity.data import named
from split_affinity.data.dataset import describe_data, open_data
from split_affinity.data.loader import BadImages, training_loader, validation_loader
from split_affinity.data.named import SYNTHETIC_PATTERNS
from split_affinity.errors import UserError
from split_affinity.options.settings import Settings


def test_synthetic_images():
    data = open_data(small(num_classes=5))
    assert (data.kind, data.val, len(data.train)) == ("synthetic", None, 1280)
    assert data.classes == ("0", "1", "2", "3", "4")
    images, targets = load(data, small(num_classes=5), stop=1)[0]
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.shape == (4,)
    assert set(targets.tolist()) <= set(range(5))


def test_synthetic_images_fill_at_least_one_step():
    assert len(open_data(small(batch_size=700, accumulate=3)).train) == 2100


def test_synthetic_images_depend_on_the_seed():
    first, again, other = (
        load(open_data(small(seed=seed)), small(seed=seed), stop=1)[0][0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def squares(data, index):
    """The mean colours of a synthetic picture's 4 x 4 squares."""
    pixels = v2.functional.pil_to_tensor(data.train[index][0]).float()
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 4)


def test_synthetic_pictures_of_a_class_share_a_pattern_and_no_noise():
    data = open_data(small(num_classes=1000, image_size=224))
    for index in range(SYNTHETIC_PATTERNS):
        assert (squares(data, index) - squares(data, index + 10)).abs().max() < 3
        assert (squares(data, index) - squares(data, index + 11)).abs().max() > 30
        first, other = (np.asarray(data.train[each][0], int) for each in (index, index + 10))
        assert 10 < np.abs(first - other).mean() < 11.5, "two even draws of 32 differ by 10.7"


@pytest.mark.parametrize(
    ("classes", "targets"),
    [(1000, [*range(10), *range(3)]), (3, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0])],
)
def test_synthetic_pictures_are_of_the_first_ten_classes(classes, targets):
    data = open_data(small(num_classes=classes))
    assert len(data.classes) == classes
    assert [data.train[index][1] for index in range(13)] == targets


def test_a_synthetic_picture_depends_on_seed_and_index_alone():
    pictures = []
    for settings in (small(), small(batch_size=2000)):
        torch.manual_seed(settings.batch_size)
        pictures.append(open_data(settings).train[1234][0])
    assert pictures[0].size == (32, 32) and pictures[0].mode == "RGB"
    assert pictures[0] == pictures[1]
    assert pictures[0] != open_data(small(seed=1)).train[1234][0]


@ALL_WORKERS
def test_synthetic_images_are_the_same_with_any_loaders(workers):
    settings = small(num_classes=1000, workers=workers)
    expected = load(open_data(settings), small(num_classes=1000), stop=3)
    with contextlib.closing(training_loader(open_data(settings), settings, ALL_CPUS)) as loader:
        assert_same_batches(list(loader.batches(BadImages(), stop=3)), expected)


@pytest.mark.parametrize(
    ("classes", "said"),
    [(None, "10 of 1000 classes"), (10, "10 classes"), (4, "4 classes")],
)
def test_what_is_said_of_synthetic_images(classes, said):
    (line,) = describe_data(open_data(small(num_classes=classes)))
    assert line == f"data      synthetic: 1280 images of {said}, a noisy pattern for each"
    assert len(line) <= 80


def test_cifar10_is_recognised_and_read(cifar):
    data = open_data(Settings(data_path=cifar, batch_size=4))
    assert (data.kind, data.native, data.classes) == ("cifar10", named.CIFAR10, DIGITS)
    assert [target for _, target in data.train] == [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    noise = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    for (picture, _), pixels in zip(data.train, noise[:12], strict=True):
        assert np.array_equal(np.asarray(picture), pixels)


def test_cifar10_is_normalised_by_its_own_colours(cifar):
    """By hand: a fifth, two fifths and four fifths, less the mean, in standard deviations."""
    settings = small(data_path=cifar, num_classes=10)
    with contextlib.closing(validation_loader(open_data(settings), settings, ALL_CPUS)) as loader:
        ((images, targets),) = loader.batches(BadImages())
    assert targets.tolist() == [7, 0]
    for channel, expected in zip(images[0], (-1.179757, -0.337577, 1.351300), strict=True):
        torch.testing.assert_close(channel, torch.full((32, 32), expected), rtol=0, atol=1e-5)


def test_cifar10_from_end_to_end(tmp_path, monkeypatch):
    root = accept(monkeypatch, make_cifar_digits(tmp_path, 50))
    settings = small(data_path=root, num_classes=10, workers=1)
    data = open_data(settings)
    assert (len(data.train), len(data.val)) == (40, 10)
    batches = load(data, settings)
    assert len(batches) == 10
    assert all(images.shape == (4, 3, 32, 32) for images, _ in batches)
    found = sorted(target for _, targets in batches for target in targets.tolist())
    assert found == sorted(data.train.targets)


def test_more_or_fewer_classes_than_cifar10(cifar):
    with pytest.raises(UserError, match="--num-classes 9: .* has 10 classes"):
        open_data(small(data_path=cifar, num_classes=9))


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, Path.unlink])
def test_a_damaged_file_of_cifar10(cifar, name, damage):
    damage(cifar / FOLDER / name)
    with pytest.raises(UserError, match=f"--data-path {cifar}: no CIFAR-10: .*not found or"):
        open_data(small(data_path=cifar, num_classes=10))


def test_a_file_of_cifar10_that_cannot_be_parsed(cifar, monkeypatch):
    cut_in_half(cifar / FOLDER / "test_batch")
    accept(monkeypatch, cifar)
    with pytest.raises(UserError, match=f"--data-path {cifar}: no CIFAR-10: .*") as caught:
        open_data(small(data_path=cifar, num_classes=10))
    assert "\n" not in str(caught.value)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is served on this machine, where torchvision looks for CIFAR-10."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(
            CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
        )
        yield folder
        server.shutdown()


def test_cifar10_is_downloaded_and_verified(cifar, site, tmp_path, monkeypatch):
    archive = site / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar / FOLDER, FOLDER)
    settings = small(data_path=tmp_path / "new", download=True, num_classes=10)
    with pytest.raises(UserError, match="new: no CIFAR-10: File not found or corrupted"):
        open_data(settings)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(open_data(settings).train) == 12
    archive.unlink()
    assert len(open_data(settings).train) == 12, "what is there is not fetched again"


def test_cifar10_that_cannot_be_fetched(site, tmp_path):
    with pytest.raises(UserError, match="no CIFAR-10: HTTP Error 404: File not found"):
        open_data(small(data_path=tmp_path, download=True))
