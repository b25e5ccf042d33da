"""From a picture to a tensor. Run: python -m pytest tests/data/test_transforms.py"""

import contextlib
import dataclasses
import multiprocessing
import resource

import numpy as np
import psutil
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from loading import (
    ALL_CPUS,
    assert_same_batches,
    colour,
    draws,
    load,
    noise,
    plain,
    small,
    transform,
)
from patching import set_everywhere
from PIL import Image
from scipy.special import betainc
from torch.utils.data import Dataset
from torchvision.transforms import v2

from split_affinity.data.dataset import open_data
from split_affinity.data.loader import BadImages, training_loader, validation_loader
from split_affinity.data.samples import Samples
from split_affinity.data.transforms import (
    image_size_in,
    mixing_transform,
    tensor_transforms,
    training_transform,
    validation_transform,
)
from split_affinity.machine.topology import read_topology
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.settings import Settings
from split_affinity.options.values import MIXING
from split_affinity.runs.setup import settings_in_force
from train_split_affinity import main


def validation_of(data, size):
    """What validation makes of pictures at another image size."""
    return validation_transform(data.native.overruled(small(image_size=size)))


def as_bytes(image):
    """The bytes (height, width, 3) that an image (3, height, width) from 0 to 1 was made of."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def steps(transformation):
    return [type(step).__name__ for step in transformation.transforms]


@pytest.mark.parametrize(
    ("asked", "step"),
    [
        ("none", []),
        ("ra", ["RandAugment"]),
        ("ta", ["TrivialAugmentWide"]),
        ("aa", ["AutoAugment"]),
    ],
)
def test_the_order_of_the_augmentation(asked, step):
    end = ["ToImage", "ToDtype", "Normalize", "RandomErasing"]
    begin = ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert steps(transform(auto_augment=asked)) == [*begin, *step, *end]
    jitter = transform(auto_augment=asked, color_jitter=0.4)
    assert steps(jitter) == [*begin, *step, "ColorJitter", *end]
    begin = ["RandomCrop", "Resize", "RandomHorizontalFlip"]
    assert steps(transform(kind="cifar10", auto_augment=asked)) == [*begin, *step, *end]


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_the_magnitude_of_rand_augment(magnitude):
    chosen = {} if magnitude == 9 else {"ra_magnitude": magnitude}
    ours = draws(transform(auto_augment="ra", **chosen), noise(), 8)
    expected = transform(auto_augment="none").transforms
    expected.insert(2, v2.RandAugment(2, magnitude, 31))
    for image, other in zip(ours, draws(v2.Compose(expected), noise(), 8), strict=True):
        assert torch.equal(image, other)


@pytest.mark.parametrize("asked", ["ra", "ta", "aa"])
def test_automatic_augmentation_changes_pictures(asked):
    images = draws(transform(auto_augment=asked), noise(), 12)
    assert all(image.shape == (3, 32, 32) for image in images)
    assert len({as_bytes(image).tobytes() for image in images}) > 3


@pytest.mark.parametrize(("kind", "policy"), [("folder", "imagenet"), ("cifar10", "cifar10")])
def test_autoaugment_has_the_policy_of_the_data(kind, policy):
    (step,) = (
        step
        for step in transform(kind=kind, auto_augment="aa").transforms
        if isinstance(step, v2.AutoAugment)
    )
    assert step.policy.value == policy


def test_a_flip_never_and_always():
    for image in draws(transform(hflip=0.0), noise(), 5):
        assert np.array_equal(as_bytes(image), noise())
    for image in draws(transform(hflip=1.0), noise(), 5):
        assert np.array_equal(as_bytes(image), noise()[:, ::-1])


def test_a_flip_now_and_then():
    images = draws(transform(hflip=0.5), noise(), 40)
    assert 5 < sum(np.array_equal(as_bytes(image), noise()) for image in images) < 35


@pytest.mark.parametrize(("smallest", "least", "most"), [(0.08, 0.06, 0.5), (0.9, 0.8, 1.0)])
def test_how_much_of_a_picture_a_crop_shows(smallest, least, most):
    """Red grows from left to right, green from top to bottom: their spans tell the part seen."""
    place = np.arange(200, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(place, place), np.zeros((200, 200), np.uint8)], axis=2)
    areas = []
    for image in draws(transform(min_scale=smallest), pixels, 50):
        red, green, _ = (channel.max() - channel.min() for channel in image * 255 / 200)
        areas.append((red * green).item())
    assert least < min(areas) < most
    assert max(areas) > 0.85


def test_colour_jitter_changes_brightness_up_to_its_strength():
    values = []
    for image in draws(transform(color_jitter=0.4), colour(100, 100, 100), 50):
        assert image.min() == image.max()
        values.append(image.mean().item() * 255)
    assert 59 < min(values) < 75
    assert 125 < max(values) < 141


def test_colour_jitter_changes_saturation_and_no_hue():
    reds = []
    for image in draws(transform(color_jitter=0.4), colour(150, 100, 100), 50):
        red, green, blue = image[:, 0, 0].tolist()
        assert red > green == blue
        reds.append(red / green)
    assert min(reds) < 1.4
    assert max(reds) > 1.6


@pytest.mark.parametrize(("probability", "erased"), [(0.0, 0), (1.0, 20)])
def test_random_erasing(probability, erased):
    images = draws(transform(random_erase=probability), colour(255, 255, 255), 20)
    assert sum(bool((image == 0).any()) for image in images) == erased
    assert all((image == 1).any() for image in images)


def test_cifar10_is_padded_and_cropped():
    padded = np.pad(noise(), ((4, 4), (4, 4), (0, 0)))
    corners = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = {
        corners[as_bytes(image).tobytes()]
        for image in draws(transform(kind="cifar10"), noise(), 200)
    }
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9))
    assert len(seen) > 40


def test_cifar10_at_another_size():
    (image,) = draws(transform(64, "cifar10"), noise(), 1)
    assert image.shape == (3, 64, 64)


def test_the_middle_of_a_picture_validates():
    image = validation_of(plain(), 224)(Image.fromarray(noise(256)))
    assert np.array_equal(as_bytes(image), noise(256)[16:240, 16:240])


@pytest.mark.parametrize(
    ("size", "width", "height"), [(32, 64, 128), (64, 300, 100), (224, 40, 40)]
)
def test_pictures_of_any_shape_validate(size, width, height):
    picture = Image.new("RGB", (width, height))
    assert validation_of(plain(), size)(picture).shape == (3, size, size)


def test_cifar10_validates_whole():
    image = validation_of(plain("cifar10"), 32)(Image.fromarray(noise()))
    assert np.array_equal(as_bytes(image), noise())


def test_photographs_are_normalised_by_imagenets_colours(photos):
    """By hand: a fifth, two fifths and four fifths, less the mean, in standard deviations."""
    data = open_data(small(data_path=photos))
    picture = Image.new("RGB", (32, 32), (51, 102, 204))
    for transformation in (
        training_transform(data, small(), 32),
        validation_of(data, 32),
    ):
        image = transformation(picture)
        expected = torch.tensor([-1.244541, -0.25, 1.751111]).view(3, 1, 1).expand(3, 32, 32)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("native", "asked", "ready"),  # in the order of Preprocessing
    [
        ((224, 256), {}, (224, 256)),
        ((224, 256), {"image_size": 128}, (128, 146)),
        ((224, 232), {"max_res": 160, "min_res": 96, "end_ramp": 3}, (160, 166)),
        ((224, 256), {"val_resize": 224}, (224, 224)),
        ((224, 256), {"val_resize": 320, "image_size": 288}, (288, 320)),
        ((32, 32), {"image_size": 64}, (64, 64)),
        ((32, 32), {"val_resize": 40}, (32, 40)),
        ((224, 256, "bicubic"), {}, (224, 256, "bicubic")),
        ((224, 256, "bicubic"), {"interpolation": "nearest"}, (224, 256, "nearest")),
        (
            (224, 256, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
            {"mean": (0.0, 0.0, 0.0)},
            (224, 256, "bilinear", (0.0, 0.0, 0.0), (0.4, 0.5, 0.6)),
        ),
        (
            (224, 256, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
            {"std": (1.0, 1.0, 1.0)},
            (224, 256, "bilinear", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)),
        ),
    ],
)
def test_settings_overrule_how_pictures_are_made_ready(native, asked, ready):
    found = Preprocessing(*native).overruled(Settings(**asked))
    assert found == Preprocessing(*ready)
    in_force = dataclasses.replace(Settings(), **vars(found))
    assert Preprocessing(*native).overruled(in_force) == found, "settings in force say it all"


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_picture_validates_as_torchvisions_preset_has_it(interpolation):
    picture = Image.fromarray(noise(200))
    ready = Preprocessing(48, 60, interpolation, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    preset = torchvision.transforms._presets.ImageClassification(
        crop_size=48,
        resize_size=60,
        mean=ready.mean,
        std=ready.std,
        interpolation=v2.InterpolationMode(interpolation),
    )
    image = validation_transform(ready)(picture)  # by v2, which scales by 1/255: one rounding
    torch.testing.assert_close(torch.Tensor(image), preset(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["folder", "cifar10"])
def test_the_interpolation_of_training_images(kind, interpolation):
    """Ours and torchvision's, with the same random crop."""
    mode = {"interpolation": v2.InterpolationMode(interpolation), "antialias": True}
    crop = [v2.RandomResizedCrop(48, (0.5, 1), **mode)]
    if kind == "cifar10":
        crop = [v2.RandomCrop(32, padding=4), v2.Resize(48, **mode)]
    unused = v2.RandomHorizontalFlip(0), v2.RandomErasing(0)  # which draw nevertheless
    to_tensor = v2.ToImage(), v2.ToDtype(torch.float32, scale=True)
    expected = v2.Compose([*crop, unused[0], *to_tensor, unused[1]])
    ours = transform(48, kind, interpolation=interpolation, min_scale=0.5)
    pixels = noise(32 if kind == "cifar10" else 100)
    for image, other in zip(draws(ours, pixels, 4), draws(expected, pixels, 4), strict=True):
        assert torch.equal(image, other)


def test_mean_and_deviation_that_are_asked_for(with_val):
    """By hand, to train and to validate: a fifth, two fifths and four fifths."""
    settings = small(data_path=with_val, mean=(0.0, 0.4, 0.5), std=(1.0, 0.5, 0.1))
    data = open_data(settings)
    picture = Image.new("RGB", (32, 32), (51, 102, 204))
    for transformation in (
        training_transform(data, settings, 32),
        validation_transform(data.native.overruled(settings)),
    ):
        expected = torch.tensor([0.2, 0.0, 3.0]).view(3, 1, 1).expand(3, 32, 32)
        torch.testing.assert_close(transformation(picture), expected, rtol=0, atol=1e-6)


def test_the_shorter_side_of_a_picture_to_validate(with_val):
    """With the side that is cut out, nothing is lost but what is longer."""
    settings = small(data_path=with_val, val_resize=32, mean=(0, 0, 0), std=(1, 1, 1))
    ready = open_data(settings).native.overruled(settings)
    image = validation_transform(ready)(Image.fromarray(noise(32)))
    assert np.array_equal(as_bytes(image), noise(32))


def test_a_shorter_side_that_is_too_short_for_the_data(cifar, in_tmp, capsys):
    cheap = ["--model", "squeezenet1_1", "-b", "2", "-j", "0", "--split", "none", "--steps", "1"]
    assert main(["--data-path", str(cifar), "--val-resize", "31", *cheap]) == 2
    message = "--val-resize 31: at least the image size, 32, is allowed\n"
    assert capsys.readouterr().err.endswith(message)
    assert main(["--data-path", str(cifar), "--val-resize", "40", *cheap]) == 0


class Flat(Dataset):
    """Six images of one value each: the number of their class."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((3, 16, 16), float(index)), index


def mixed_batches(epochs, **settings):
    chosen = small(num_classes=6, **settings)
    unchanged = v2.Identity()
    samples = Samples(Flat(), 0, lambda epoch: unchanged, mixing_transform(chosen))
    keys = [[(epoch, index) for index in range(6)] for epoch in range(epochs)]
    return [samples[batch].batch for batch in keys]


MIXES = pytest.mark.parametrize(
    "settings",
    [{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}],
)


@MIXES
def test_targets_of_mixed_images_say_what_is_in_them(settings):
    for images, targets in mixed_batches(10, **settings):
        assert targets.shape == (6, 6)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        shares = targets @ torch.arange(6.0)
        torch.testing.assert_close(images.mean((1, 2, 3)), shares, rtol=0, atol=1e-4)


@MIXES
def test_mixing_is_seeded(settings):
    first, second = mixed_batches(6, **settings), mixed_batches(6, **settings)
    assert_same_batches(first, second)
    assert len({targets.amax().item() for _, targets in first}) > 3, "another in each epoch"


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"mixup_alpha": 0.5}, {"blended"}),
        ({"cutmix_alpha": 1.0}, {"pasted"}),
        ({"mixup_alpha": 0.5, "cutmix_alpha": 1.0}, {"blended", "pasted"}),
    ],
)
def test_both_ways_to_mix_take_turns(settings, kinds):
    seen = set()
    for images, _ in mixed_batches(20, **settings):
        flat = images.amin((1, 2, 3)) == images.amax((1, 2, 3))
        whole = images == images.round()
        if flat.all() and not whole.all():
            seen.add("blended")
        if whole.all() and not flat.all():
            seen.add("pasted")
    assert seen == kinds


@pytest.mark.parametrize("strength", ["0.01", "0.2", "1", "1000"])
def test_shares_are_drawn_from_the_beta_distribution_at_every_strength_allowed(strength):
    """The share of the draws below some points, by SciPy's integral; out of float32's reach torch
    draws the mean.
    """
    alpha = MIXING(strength)
    (mixup,) = mixing_transform(small(mixup_alpha=alpha)).transforms
    torch.manual_seed(0)
    shares = np.array([mixup.make_params([])["lam"] for _ in range(4000)])
    points = np.array([1e-6, 0.001, 0.1, 0.49, 0.4999, 0.5001, 0.51, 0.9, 0.999])
    below = (shares[:, None] < points).mean(0)
    np.testing.assert_allclose(below, betainc(alpha, alpha, points), rtol=0, atol=0.03)


def test_no_mixing_unless_asked_for():
    assert mixing_transform(small()) is None


@pytest.mark.parametrize(
    ("low", "high", "end", "sizes"),  # a size for each epoch from the first
    [
        (None, 224, None, [224, 224, 224]),
        (128, 224, 1, [224, 224]),
        (128, 224, 2, [128, 224, 224]),
        (128, 224, 4, [128, 160, 192, 224, 224]),
        (128, 224, 6, [128, 128, 160, 160, 192, 224, 224]),
        (128, 224, 20, [128] * 7 + [160] * 6 + [192] * 6 + [224] * 3),
        (32, 64, 3, [32, 32, 64, 64]),
        (64, 64, 3, [64, 64, 64]),
    ],
)
def test_the_image_size_of_each_epoch(low, high, end, sizes):
    settings = Settings(min_res=low, image_size=high, end_ramp=end)
    found = [image_size_in(settings, epoch) for epoch in range(1, len(sizes) + 1)]
    assert found == sizes


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 300))
def test_image_sizes_grow_from_the_first_to_the_last(low, more, end):
    low, high = 32 * low, 32 * (low + more)
    settings = Settings(min_res=low, image_size=high, end_ramp=end)
    sizes = [image_size_in(settings, epoch) for epoch in range(1, end + 3)]
    assert sizes == sorted(sizes)
    assert all(size % 32 == 0 for size in sizes)
    assert (sizes[0], sizes[-3]) == (high if end == 1 else low, high)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_grow_while_training_and_not_in_validation(with_val, workers):
    settings = small(
        data_path=with_val, image_size=64, min_res=32, end_ramp=2, batch_size=6, workers=workers
    )
    data = open_data(settings)
    with contextlib.closing(training_loader(data, settings, ALL_CPUS)) as loader:
        for epoch, side in ((1, 32), (2, 64), (3, 64)):
            for images, _ in loader.batches(BadImages(), epoch):
                assert images.shape == (6, 3, side, side)
    with contextlib.closing(validation_loader(data, settings, ALL_CPUS)) as loader:
        for images, _ in loader.batches(BadImages()):
            assert images.shape == (6, 3, 64, 64)


def test_a_ramp_of_any_length_is_ready_at_once(monkeypatch):
    calls, size_in = [], image_size_in
    set_everywhere(monkeypatch, "image_size_in", lambda *args: calls.append(args) or size_in(*args))
    settings = small(min_res=32, image_size=64, end_ramp=100_000)
    data = open_data(settings)
    sides = [load(data, settings, epoch, stop=1)[0][0].shape[-1] for epoch in (1, 99_999, 100_000)]
    assert sides == [32, 32, 64]
    assert len(calls) < 100


def test_synthetic_images_grow_too():
    settings = Settings(
        batch_size=2, workers=0, num_classes=2, epochs=2, min_res=32, max_res=64, end_ramp=2
    )
    data = open_data(settings)
    settings = settings_in_force(settings, read_topology(), data)
    sides = [load(data, settings, epoch, stop=1)[0][0].shape[-1] for epoch in (1, 2)]
    assert sides == [32, 64]


def test_images_of_cifar10_cannot_shrink(cifar, in_tmp, capsys):
    ramp = ["--min-res", "64", "--end-ramp", "3", "--epochs", "3", "--steps", "1"]
    cheap = ["--model", "squeezenet1_1", "-b", "2", "-j", "0", "--split", "none"]
    assert main(["--data-path", str(cifar), *ramp, *cheap]) == 2
    assert "--min-res 64 --max-res 32" in capsys.readouterr().err


INTERPOLATIONS = st.sampled_from(["nearest", "bilinear", "bicubic"])
SIDES = st.integers(1, 120)


def by_torchvision(ready):
    how = v2.InterpolationMode(ready.interpolation)
    resize = v2.Resize(ready.val_resize, how, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(ready.image_size), *tensor_transforms(ready)])


@given(SIDES, SIDES, st.integers(1, 50), st.integers(1, 50), INTERPOLATIONS)
def test_the_middle_is_torchvision_s_to_the_last_bit(width, height, size, short, how):
    ready = Preprocessing(size, short, how)
    width = min(width, 100 * height)
    height = min(height, 100 * width)
    picture = Image.fromarray(np.resize(noise(), (height, width, 3)))
    assert torch.equal(validation_transform(ready)(picture), by_torchvision(ready)(picture))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 50), st.integers(1, 50), INTERPOLATIONS)
def test_the_middle_of_a_long_picture_is_the_same_too(narrow, more, size, short, how):
    """Smooth ones, as interpolation in another order rounds otherwise by a level or two."""
    ready = Preprocessing(size, short, how, (0, 0, 0), (1, 1, 1))
    waves = 127 + 100 * np.sin(np.arange(101 * narrow + 37 * more) / 20)
    pixels = np.uint8(np.broadcast_to(waves, (narrow, len(waves))))
    for lying in (pixels, pixels.T):
        picture = Image.fromarray(np.ascontiguousarray(lying)).convert("RGB")
        ours, theirs = validation_transform(ready)(picture), by_torchvision(ready)(picture)
        assert ours.shape == theirs.shape == (3, size, size)
        assert (ours - theirs).abs().max() <= (6 if how == "nearest" else 2.1) / 255


def make_ready_in_little_memory():
    """With 300 MB more than a process has."""
    torch.set_num_threads(1)  # of the parent's team there are no threads in a fork
    most = psutil.Process().memory_info().vms + 300 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for size in ((1, 30_000), (30_000, 1), (2, 150_000), (1, 100), (100, 1)):
        picture = Image.new("RGB", size, (255, 255, 255))
        for transformed in (validation_transform(Preprocessing()), transform(224, min_scale=0.08)):
            assert transformed(picture).shape == (3, 224, 224)


def test_a_line_of_pixels_takes_little_memory():
    process = multiprocessing.get_context("fork").Process(target=make_ready_in_little_memory)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 0
