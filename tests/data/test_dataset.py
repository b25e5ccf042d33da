"""Which images are trained on, and which are kept apart to validate with.

Run: python -m pytest tests/data/test_dataset.py
"""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loading import ALL_CPUS, Labels, folder_of, load, small
from patching import set_everywhere
from small import TINY

from split_affinity import PROGRAM
from split_affinity.data.dataset import (
    choose_images,
    describe_data,
    describe_epoch,
    describe_images,
    fitted_batch,
    open_data,
    suspicions,
    with_validation,
)
from split_affinity.data.loader import BadImages, validation_loader
from split_affinity.data.pictures import ImageData
from split_affinity.data.transforms import validation_transform
from split_affinity.errors import UserError
from split_affinity.options.commands import parse_arguments
from split_affinity.options.data_sets import VAL_SHARE
from split_affinity.options.settings import Settings, as_options
from train_split_affinity import main


def chosen_of(targets, **settings):
    data = ImageData("folder", Labels(targets), None, ("a", "b", "c"))
    return choose_images(data, Settings(**settings))


def test_a_subset_has_its_part_of_each_class():
    targets = [0] * 100 + [1] * 10 + [2]
    chosen = chosen_of(targets, subset=0.2)
    assert [[targets[index] for index in chosen].count(each) for each in range(3)] == [20, 2, 1]
    assert chosen == sorted(set(chosen))
    assert chosen != [*range(20), 100, 101, 110], "not simply the first ones"


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=80),
    st.floats(0.01, 1),
    st.integers(0, 3),
)
def test_subsets_of_any_labels(targets, subset, seed):
    chosen = chosen_of(targets, subset=subset, seed=seed)
    assert set(chosen) <= set(range(len(targets)))
    for each in set(targets):
        count = sum(targets[index] == each for index in chosen)
        assert count >= 1
        assert count == 1 or abs(count - subset * targets.count(each)) <= 0.5


def test_a_subset_depends_on_the_seed_and_not_on_the_random_state():
    targets = [0, 1] * 50
    chosen = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(chosen))
        chosen.append(chosen_of(targets, subset=0.3, seed=seed))
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_only_the_subset_is_trained_on(photos):
    settings = small(data_path=photos, subset=0.5, batch_size=2)
    data = open_data(settings)
    indices = choose_images(data, settings)
    expected = sorted(data.train.targets[index] for index in indices)
    seen = [target for _, targets in load(data, settings) for target in targets.tolist()]
    assert sorted(seen) == expected == [0] * 3 + [1] * 3


# Images kept apart to validate with


def labelled(targets, **settings):
    """Data of these classes, with and without the images kept apart."""
    data = ImageData("folder", Labels(targets), None, tuple("abcdefgh"))
    settings = Settings(data_path=Path("data"), **settings)
    with_val = with_validation(data, settings)
    return dataclasses.replace(with_val, chosen=choose_images(with_val, settings))


SOME_LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=80).filter(
    lambda labels: max(Counter(labels).values()) > 1
)


@given(SOME_LABELS, st.floats(0.001, 0.999), st.integers(0, 3))
def test_images_kept_apart_of_any_labels(targets, share, seed):
    data = labelled(targets, val_share=share, seed=seed)
    kept, chosen = list(data.val.indices), data.chosen
    assert sorted([*kept, *chosen]) == list(range(len(targets)))
    for label, count in Counter(targets).items():
        apart = sum(targets[index] == label for index in kept)
        if count == 1:
            assert apart == 0
        else:
            assert 1 <= apart <= count - 1
            assert apart in (1, count - 1) or abs(apart - share * count) <= 0.5
    assert list(labelled(targets, val_share=share, seed=seed).val.indices) == kept


@given(SOME_LABELS, st.floats(0.01, 0.99), st.floats(0.01, 1), st.integers(0, 3))
def test_a_subset_is_one_of_what_is_left(targets, share, subset, seed):
    whole = labelled(targets, val_share=share, seed=seed)
    data = labelled(targets, val_share=share, subset=subset, seed=seed)
    assert data.val.indices == whole.val.indices, "the same validate"
    assert set(data.chosen) <= set(whole.chosen)
    left = Counter(targets[index] for index in whole.chosen)
    for label, count in left.items():
        found = sum(targets[index] == label for index in data.chosen)
        assert found == max(1, round(subset * count))


def test_which_images_are_kept_apart_depends_on_the_seed_alone():
    targets = [0, 1] * 50
    kept = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(kept))
        kept.append(labelled(targets, val_share=0.2, seed=seed).val.indices)
    assert kept[0] == kept[1] != kept[2]
    assert Counter(targets[index] for index in kept[0]) == {0: 10, 1: 10}
    assert kept[0] != list(range(20)), "not simply the first ones"


def folder_with(root, **counts):
    """A folder with so many small pictures of each class."""
    return folder_of(root, *(f"{name}/{n}.png" for name in counts for n in range(counts[name])))


def test_images_of_a_folder_kept_apart_validate_and_do_not_train(tmp_path):
    root = folder_with(tmp_path, a=10, b=5)
    settings = small(data_path=root, val_share=0.2, batch_size=2, image_size=8)
    data = open_data(settings)
    names = describe_data(data)
    assert names == [
        "data      12 images of 2 classes (a, b) to train on, 3 (0.2 of each class) kept apart to "
        "validate with"
    ]
    with contextlib.closing(validation_loader(data, settings, ALL_CPUS)) as loader:
        shown = [image for images, _ in loader.batches(BadImages()) for image in images]
    transform = validation_transform(data.native.overruled(settings))
    for image, index in zip(shown, data.val.indices, strict=True):
        assert torch.equal(image, transform(data.train[index][0]))
    trained = [targets for _, targets in load(data, settings)]
    assert Counter(torch.cat(trained).tolist()) == {0: 8, 1: 4}
    half = open_data(dataclasses.replace(settings, subset=0.5))
    assert describe_data(half)[0].startswith("data      6 of 12 images of 2 classes (a, b) to ")


def test_a_class_with_one_image_is_trained_on(tmp_path):
    root = folder_with(tmp_path, a=4, b=1, c=1)
    data = open_data(small(data_path=root, val_share=0.3, num_classes=3))
    assert describe_data(data) == [
        "data      5 images of 3 classes (a, b, c) to train on, 1 (0.17 of each class) kept apart "
        "to validate with",
        "note      the only image of 2 classes (b, c) is trained on",
    ]


def test_too_few_images_to_keep_any_apart(tmp_path):
    root = folder_with(tmp_path, a=1, b=1)
    with pytest.raises(UserError, match=f"--val-share 0.2: no class of {root} has two images"):
        open_data(small(data_path=root, val_share=0.2, batch_size=1))


@pytest.fixture
def run(tmp_path, in_tmp, capsys, monkeypatch):
    """Runs with images kept apart; returns the exit code and what was printed."""
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):  # longer than such a run
        set_everywhere(monkeypatch, name, lambda *args: None)
    root = folder_with(tmp_path / "data", a=5, b=5)
    fixed = [*TINY, "--data-path", str(root), "--num-classes", "2", "--split", "none", "-b", "4"]

    def start(*options):
        code = main([*fixed, "--val-share", "0.2", *options])
        return code, capsys.readouterr()

    return start


def test_a_resumed_run_keeps_the_same_images_apart(run, in_tmp):
    code, printed = run("--epochs", "1", "--output-dir", "out")
    assert code == 0
    assert "8 images of 2 classes (a, b) to train on, 2 (0.2 of each" in printed.out
    code, printed = run("--epochs", "2", "--output-dir", "out", "--resume", "auto")
    assert code == 0
    assert "numbers can differ from those of an unbroken run: images" not in printed.out
    more = ["--epochs", "3", "--output-dir", "out", "--resume", "auto"]
    code, printed = run(*more, "--seed", "2")
    assert "images to train on (names or sizes) 8 -> 8" in printed.out
    code, printed = run(*more, "--val-share", "0.4")
    assert (code, "--val-share 0.4: " in printed.err) == (2, True)


def test_images_that_a_checkpoint_may_know_are_told(run, in_tmp):
    assert run("--epochs", "1", "--output-dir", "out")[0] == 0
    test = ["--test-only", "--resume", "out/last.pt"]
    code, printed = run(*test)
    assert (code, printed.err) == (0, "")
    code, printed = run(*test, "--seed", "2")
    assert code == 0
    assert "out/last.pt was trained on all of these 2 images: the figures do not" in printed.err
    assert "(2 of the images were trained on), computed in " in printed.out


def test_no_share_where_there_are_images_to_validate_with(photos_with_val):
    error = f"--val-share 0.2: {photos_with_val} has 12 images to validate with; leave it out$"
    with pytest.raises(UserError, match=error):
        open_data(small(data_path=photos_with_val, val_share=0.2))
    assert len(open_data(small(data_path=photos_with_val, val_share=0.0)).val) == 12


def test_no_share_without_images_of_ones_own():
    message = "^--val-share 0.2 needs --data-path: synthetic images are made$"
    with pytest.raises(UserError, match=message):
        parse_arguments(["--val-share", "0.2"])
    with pytest.raises(UserError, match="--val-share: '1' is not a number of 0 or more and b"):
        parse_arguments(["--val-share", "1", "--data-path", "data"])


@pytest.mark.parametrize(("share", "kept"), [(None, 0), (0, 0), (0.4, 4), (0.001, 2), (0.999, 8)])
def test_how_many_are_kept_apart(share, kept):
    data = labelled([0] * 5 + [1] * 5, val_share=share)
    assert (len(data.val) if data.val else 0) == kept


def test_the_fingerprint_covers_what_is_kept_apart():
    prints = {}
    for share, seed in ((None, 0), (None, 1), (0.2, 0), (0.2, 0), (0.2, 2), (0.4, 0)):
        data = labelled([0, 1] * 10, val_share=share, seed=seed)
        prints[share, seed] = describe_images(data)["fingerprint"]
    assert prints[None, 0] == prints[None, 1] == hashlib.sha256().hexdigest()
    assert len(set(prints.values())) == 4


@pytest.mark.parametrize(
    ("counts", "left_out", "found"),
    [
        ((10, 10, 10), (), ""),
        ((10, 10, 4), (), "fewer than 5 images of c"),
        ((30, 12, 10), (), "3.0 times as many images of a as of c"),
        ((29, 12, 10), (("unused folder", "test"),), ""),
        ((9, 9, 9), (("other file", "x.txt"), ("classless image", "y.jpg")), "2 things among the "),
    ],
)
def test_data_that_looks_wrong_is_worth_a_look(counts, left_out, found, in_tmp):
    targets = [label for label, count in enumerate(counts) for _ in range(count)]
    chosen = range(len(targets))
    data = ImageData(
        "folder", Labels(targets), None, ("a", "b", "c"), chosen=chosen, left_out=left_out
    )
    settings = Settings(data_path=Path("some/photos"))
    told = suspicions(data, settings)
    assert bool(told) == bool(found)
    if found:
        assert told[0].startswith(f"look      {found}")
        assert told[0].endswith(": `data some/photos` tells more")
    Path("out/data/photos").mkdir(parents=True)
    assert suspicions(data, settings) == []


# Batches that fit


@pytest.mark.parametrize(
    ("images", "asked", "in_force"),
    [
        (120, {}, 30),
        (96, {}, 32),
        (1000, {}, 32),  # 8 of them are a few
        (37, {}, 18),  # leaves out one, any other more
        (40, {}, 20),
        (10, {}, 10),
        (3, {}, 3),
        (1, {}, 1),
        (3, {"batch_size": 2}, 2),  # one image is too few for BatchNorm
        (120, {"accumulate": 2}, 30),
        (120, {"ranks": 3}, 20),
        (50, {"accumulate": 4}, 12),
        (120, {"fit_batch": False}, 32),
    ],
)
def test_a_batch_is_fitted_to_few_images(images, asked, in_force):
    settings = Settings(**{"data_path": Path("p"), "fit_batch": True, **asked})
    assert fitted_batch(settings, images) == in_force


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 4))
def test_a_fitted_batch_is_half_of_the_batch_or_more(images, size, accumulate):
    settings = Settings(batch_size=size, accumulate=accumulate, fit_batch=True)
    found = fitted_batch(settings, images)
    most = max(1, min(size, images // accumulate))
    assert most / 2 <= found <= most
    out = images % (found * accumulate)
    assert out <= images % (most * accumulate) or out <= images / 100


def test_what_is_left_out_of_each_epoch_is_told():
    def told(images, **settings):
        lines = describe_epoch(Settings(data_path=Path("p"), **settings), images)
        return [line.removeprefix("note      ") for line in lines]

    assert told(120) == ["24 of 120 are left out of each epoch: -b 30 uses all"]
    assert told(37) == ["5 of 37 are left out of each epoch: -b 18 leaves out 1"]
    assert told(1000) == ["8 of 1000 are left out of each epoch"]
    assert told(96) == told(20) == []
    assert told(120, fit_batch=True) == ["30 images in a batch, not 32, fit better"]
    assert describe_epoch(Settings(batch_size=48), 1280) == []


# Folders of one's own under a recipe


@pytest.mark.parametrize("recipe", ["finetune", "scratch"])
def test_a_recipe_keeps_a_fifth_apart_where_nothing_validates(recipe, tmp_path, photos_with_val):
    root = folder_with(tmp_path, a=20, b=20)

    def opened(path, *options):
        typed = ["--recipe", recipe, "--data-path", str(path), "--weights", "none", *options]
        settings = parse_arguments(typed)[1]
        return open_data(settings), settings

    data, settings = opened(root)
    assert (len(data.chosen), len(data.val)) == (32, 8)
    assert f"--val-share {VAL_SHARE}" not in as_options(settings)
    assert opened(root, "--val-share", "0")[0].val is None
    assert len(opened(root, "--val-share", "0.5")[0].val) == 20
    assert len(opened(photos_with_val)[0].val) == 12
    with pytest.raises(UserError, match="--val-share 0.5: .* has 12 images to validate with"):
        opened(photos_with_val, "--val-share", "0.5")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_fitted_batch(tmp_path, in_tmp, capsys, monkeypatch):
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):
        set_everywhere(monkeypatch, name, lambda *args: None)
    root = folder_with(tmp_path / "data", a=23, b=23)  # 36 to train on
    typed = ["--recipe", "finetune", "--data-path", str(root), "--weights", "none", "-j", "0"]
    typed += ["--model", "squeezenet1_1", "--image-size", "32", "--split", "none"]
    assert main([*typed, "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "note      18 images in a batch, not 32, fit better\n" in printed
    assert "\nfinished after 2 of 2 steps\n" in printed
    assert f"next: python {PROGRAM} --test-only --resume out/finetune/best.pt" in printed
    ways = ["--resume", "out/finetune/last.pt"], [*typed, "--resume", "auto"]
    for epochs, again in enumerate(ways, 2):
        capsys.readouterr()
        assert main([*again, "--epochs", str(epochs), "-j", "0"]) == 0
        printed = capsys.readouterr().out
        assert f"\nfinished after {2 * epochs} of {2 * epochs} steps\n" in printed
        assert "images to train on" not in printed and "--batch-size" not in printed
