"""Samples and their order. Run: python -m pytest tests/data/test_samples.py"""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loading import ALL_CPUS, ALL_WORKERS, AUGMENTED, assert_same_batches, load, small
from patching import set_everywhere
from PIL import Image
from torchvision.transforms import v2

from split_affinity.data.dataset import open_data
from split_affinity.data.loader import BadImages, validation_loader
from split_affinity.data.samples import EpochOrder, Samples
from split_affinity.data.transforms import training_transform


@ALL_WORKERS
def test_samples_do_not_depend_on_the_loaders(photos, workers):
    data = open_data(small(data_path=photos))
    expected = load(data, small(**AUGMENTED))
    torch.manual_seed(workers)  # must not matter
    assert_same_batches(load(data, small(workers=workers, **AUGMENTED)), expected)


@ALL_WORKERS
def test_an_epoch_can_begin_in_its_middle(photos, workers):
    data = open_data(small(data_path=photos))
    expected = load(data, small(**AUGMENTED), epoch=3)
    settings = small(workers=workers, **AUGMENTED)
    assert_same_batches(load(data, settings, epoch=3, start=1, stop=3), expected[1:3])
    assert_same_batches(load(data, settings, epoch=3, start=3), expected[3:])


def test_samples_do_not_depend_on_the_size_of_the_batch(photos):
    data = open_data(small(data_path=photos))
    for_each = {"auto_augment": "ra", "color_jitter": 0.4, "random_erase": 0.5}
    images, others = (
        torch.cat([images for images, _ in load(data, small(batch_size=size, **for_each))])
        for size in (2, 6)
    )
    assert torch.equal(images, others)


@pytest.mark.parametrize("changed", [{"epoch": 2}, {"seed": 1}])
def test_samples_differ_by_epoch_and_by_seed(photos, changed):
    """Looked up by index, so that it is not the order that differs."""
    settings = small(data_path=photos, **AUGMENTED)
    data = open_data(settings)
    given = {"epoch": 1, "seed": 0}
    images = []
    for each in (given, given, given | changed):
        transformation = training_transform(data, settings, 32)
        samples = Samples(data.train, each["seed"], lambda epoch, found=transformation: found)
        images.append(samples[[(each["epoch"], 5)]].batch[0])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_alone(photos, workers):
    data = open_data(small(data_path=photos))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(data, small(workers=workers, **AUGMENTED))
    assert torch.equal(torch.get_rng_state(), before)


class Faulty(v2.Transform):
    """A transform with a bug."""

    def forward(self, picture):
        raise ValueError("a bug in a transform")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_transform_is_no_broken_image(photos, monkeypatch, workers):
    set_everywhere(monkeypatch, "training_transform", lambda *args: Faulty())
    settings = small(data_path=photos, workers=workers, max_bad_images=99)
    with pytest.raises(ValueError, match="a bug in a transform"):
        load(open_data(settings), settings)


@pytest.mark.parametrize("skip_too_large", [True, False])
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory"), RuntimeError("another")]
)
def test_a_picture_too_large_for_a_transform(error, skip_too_large):
    class Large(v2.Transform):
        def forward(self, picture):
            raise error

    pictures = [(Image.new("RGB", (7, 9)), 0)]
    samples = Samples(pictures, 0, lambda epoch: Large(), skip_too_large=skip_too_large)
    if skip_too_large and "another" not in str(error):
        (message,) = samples[[(1, 0)]].broken
        assert message == "broken image 0 of 7 x 9 pixels: there is not enough memory for it"
        return
    with pytest.raises(type(error)) as caught:
        samples[[(1, 0)]]
    assert caught.value is error


def keys_of(order):
    return [key for batch in order for key in batch]


def spans(count):
    return st.tuples(st.integers(0, count), st.none() | st.integers(0, count))


@given(st.data(), st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_gives_each_image_once(data, count, batch_size, seed, epoch):
    indices = range(100, 100 + count)
    order = EpochOrder(indices, batch_size, seed)
    order.begin(epoch)
    batches = list(order)
    assert len(batches) == len(order) == count // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    keys = keys_of(batches)
    assert {each for each, _ in keys} <= {epoch}
    assert len({index for _, index in keys} & set(indices)) == len(keys)
    start, stop = data.draw(spans(len(batches)))
    order.begin(epoch, start, stop)
    assert list(order) == batches[start:stop]


@given(st.integers(1, 60), st.integers(1, 20))
def test_in_order_without_a_seed_to_the_last_image(count, batch_size):
    order = EpochOrder(range(count), batch_size, None)
    batches = list(order)
    assert keys_of(batches) == [(1, index) for index in range(count)]
    assert len(batches) == len(order)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_each_epoch_and_seed_has_its_own_order():
    orders = []
    for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
        order = EpochOrder(range(50), 10, seed)
        order.begin(epoch)
        orders.append(tuple(index for _, index in keys_of(order)))
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_incomplete_batches_train_nothing_but_validate(with_val):
    settings = small(data_path=with_val, batch_size=5)
    data = open_data(settings)
    assert [len(targets) for _, targets in load(data, settings)] == [5, 5]
    with contextlib.closing(validation_loader(data, settings, ALL_CPUS)) as loader:
        assert len(loader) == 3
        batches = list(loader.batches(BadImages()))
    assert [len(targets) for _, targets in batches] == [5, 5, 2]
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 6 + [1] * 6


def test_without_validation_images_there_is_no_loader_of_them(photos):
    settings = small(data_path=photos)
    assert validation_loader(open_data(settings), settings, ALL_CPUS) is None
