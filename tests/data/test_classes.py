"""Class names. Run: python -m pytest tests/data/test_classes.py"""

import dataclasses
import json
import pickle

import pytest
import torch
import torchvision
from loading import (
    ALL_WORKERS,
    AUGMENTED,
    assert_same_batches,
    draws,
    load,
    noise,
    plain,
    small,
    transform,
)
from small import TINY
from torchvision.transforms import v2

from split_affinity.data.classes import (
    confused_classes,
    match_classes,
    with_known_classes,
    wordnet_ids,
)
from split_affinity.data.dataset import describe_images, open_data
from split_affinity.data.decoding import decoded
from split_affinity.data.transforms import training_transform, validation_transform
from split_affinity.errors import UserError
from split_affinity.models.pretrained import Preprocessing, imagenet_classes
from split_affinity.options.settings import Settings
from split_affinity.reports.confusion import confused_json
from split_affinity.training.network import Confusion
from train_split_affinity import main

# Classes that were confused

NUMBERS = ("one", "two", "three", "four")


def confused_file(folder, *pairs, **more):
    path = folder / "confused.json"
    keys = "true", "taken_for", "images"
    found = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    path.write_text(json.dumps({"pairs": found} | more))
    return path


@pytest.mark.parametrize(
    ("pairs", "confused"),
    [
        ([], []),
        ([("two", "one", 1)], [0, 1]),
        ([("two", "three", 9), ("three", "two", 4), ("one", "two", 4)], [1, 2]),
        ([("two", "three", 9), ("four", "two", 5), ("one", "two", 4)], [1, 2, 3]),
        ([("one", "two", 1), ("three", "four", 8)], [2, 3]),  # in any order
        ([("one", "two", 2), ("two", "three", 2), ("four", "three", 1)], [0, 1, 2, 3]),
        ([("four", "class 5", 3)], [3]),  # the model tells more classes apart than there are
    ],
)
def test_the_classes_that_were_confused_most(tmp_path, pairs, confused):
    settings = Settings(augment_confused=confused_file(tmp_path, *pairs), num_classes=6)
    assert confused_classes(settings, NUMBERS) == confused


def test_what_a_test_has_written_is_read(tmp_path):
    confusion = Confusion({(0, 1): 9, (2, 1): 5, (1, 2): 4, (3, 3): 50, (4, 3): 1})
    path = tmp_path / "confused.json"
    path.write_text(confused_json(confusion, (*NUMBERS, "class 4"), "a.pt"))
    settings = Settings(augment_confused=path, num_classes=5)
    assert confused_classes(settings, NUMBERS) == [0, 1, 2]


def test_without_a_file_or_to_test_nothing_is_read(tmp_path):
    assert confused_classes(Settings(), NUMBERS) is None
    gone = Settings(augment_confused=tmp_path / "gone.json", test_only=True)
    assert confused_classes(gone, NUMBERS) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "no confused.json of a --test-only"),
        (b"\xff", "no confused.json of a --test-only"),
        (b"true class,predicted class,images", "no confused.json of a --test-only"),
        (b"[]", "no confused.json of a --test-only"),
        (b"{}", "no confused.json of a --test-only"),
        (b'{"pairs": 3}', "no confused.json of a --test-only"),
        (b'{"pairs": ["one"]}', "no confused.json of a --test-only"),
        (b'{"pairs": [{"true": "one", "images": 3}]}', "no confused.json of a --test-only"),
        (
            b'{"pairs": [{"true": "one", "taken_for": "two", "images": "3"}]}',
            "no confused.json of a --test-only",
        ),
        (b"[" * 100_000, "no confused.json of a --test-only"),
        (
            b'{"pairs": [{"true": "one", "taken_for": "two", "images": 9},'
            b'{"true": "one", "taken_for": "dog", "images": 1}]}',
            "the data have no class dog",
        ),
    ],
)
def test_a_file_that_is_none_of_confused_classes(tmp_path, content, reason):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        confused_classes(Settings(augment_confused=path), NUMBERS)
    assert str(caught.value) == f"--augment-confused {path}: {reason}"


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([], "confused  no class with a stronger RandAugment"),
        ([("temple", "flower", 3)], "confused  2 classes (flower, temple) with a stronger "),
    ],
)
def test_what_is_said_of_confused_classes(photos, tmp_path, in_tmp, capsys, pairs, line):
    path = confused_file(tmp_path, *pairs)
    cheap = [word for word in TINY if word not in ("--num-classes", "3")]
    options = ["--data-path", str(photos), "--augment-confused", str(path)]
    assert main(["plan", *cheap, *options]) == 0
    assert any(each.startswith(line) for each in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("settings", "stronger"),
    [
        ({}, v2.RandAugment(2, 9)),
        ({"ra_magnitude": 12}, v2.RandAugment(2, 12)),
        ({"auto_augment": "ra"}, v2.RandAugment(3, 14)),
        ({"auto_augment": "ra", "ra_magnitude": 30}, v2.RandAugment(3, 30)),
        ({"auto_augment": "ta"}, v2.RandAugment(3, 14)),
        ({"auto_augment": "aa", "ra_magnitude": 1}, v2.RandAugment(3, 6)),
    ],
)
def test_the_stronger_augmentation(settings, stronger):
    asked = small(min_scale=1.0, hflip=0.0, **settings)
    ours = draws(training_transform(plain(), asked, 32, True), noise(), 8)
    expected = transform().transforms
    expected.insert(2, stronger)
    for image, other in zip(ours, draws(v2.Compose(expected), noise(), 8), strict=True):
        assert torch.equal(image, other)


@ALL_WORKERS
def test_only_the_pictures_of_confused_classes_are_augmented_more_strongly(
    photos, monkeypatch, tmp_path, workers
):
    """Picture by picture as in one run where no class is, and one where all are."""
    settings = small(data_path=photos, batch_size=3, workers=workers)
    of_class, of_all = (
        confused_file(tmp_path, ("temple", name, 2)).rename(tmp_path / f"{name}.json")
        for name in ("temple", "flower")
    )
    usual, one, all_of_them = (
        load(open_data(asked), asked, epoch=2)
        for asked in (
            settings,
            dataclasses.replace(settings, augment_confused=of_class),
            dataclasses.replace(settings, augment_confused=of_all),
        )
    )
    seen = set()
    for without, some, stronger in zip(usual, one, all_of_them, strict=True):
        for place, target in enumerate(some[1].tolist()):
            assert torch.equal(some[0][place], (stronger if target else without)[0][place])
            seen.add((target, torch.equal(without[0][place], stronger[0][place])))
    assert {(0, False), (1, False)} <= seen, "there is a difference to be seen"


def test_confused_classes_and_a_run_that_goes_on(photos, tmp_path):
    path = confused_file(tmp_path, ("temple", "temple", 2))
    settings = small(data_path=photos, augment_confused=path, **AUGMENTED)
    data = open_data(settings)
    assert_same_batches(load(data, settings, 3, start=2), load(data, settings, 3)[2:])
    assert describe_images(data)["confused"] == ["temple"]


# Classes that trained weights know

IMAGENET = imagenet_classes()


def test_the_wordnet_ids_of_imagenet():
    ids = wordnet_ids()
    assert len(ids) == 1000
    assert list(ids) == sorted(set(ids))
    for number, name in {
        0: "n01440764",  # tench
        1: "n01443537",  # goldfish
        134: "n02012849",  # the bird crane
        207: "n02099601",  # golden retriever
        281: "n02123045",  # tabby cat
        517: "n03126707",  # the machine crane
        620: "n03642806",  # laptop
        981: "n09835506",  # ballplayer
        999: "n15075141",  # toilet tissue
    }.items():
        assert ids[number] == name
    for wordnet_id, names in torchvision.datasets.Imagenette._WNID_TO_CLASS.items():
        assert IMAGENET[ids.index(wordnet_id)] == names[0]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("n01440764", 0),
        ("tench", 0),
        ("Tench", 0),
        ("golden retriever", 207),
        ("golden_retriever", 207),
        ("Golden-Retriever", 207),
        ("jack-o'-lantern", 607),
        ("JACK_O'_LANTERN", 607),
        ("n15075141", 999),
        ("N15075141", 999),
        ("Cardigan", 264),  # the dog
        ("cardigan", 474),  # the garment
    ],
)
def test_a_class_of_imagenet_by_name(name, number):
    assert match_classes([name], IMAGENET, "the weights") == [number]


def test_classes_are_found_by_name_whatever_their_place():
    assert match_classes(["b", "C", "a"], ["a", "b", "c"], "w") == [1, 2, 0]
    assert match_classes(IMAGENET, IMAGENET, "w") == [*range(1000)]
    assert match_classes(wordnet_ids(), IMAGENET, "w") == [*range(1000)]


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("0", IMAGENET, "class 0 is none of the 1000 of the weights"),
        ("goldfisch", IMAGENET, "class goldfisch is none of .*; did you mean goldfish,"),
        ("n01440764", ["a", "b"], "class n01440764 is none of the 2 of the weights"),
        ("CARDIGAN", IMAGENET, "can be several of the weights: n02113186, n02963159; use such"),
        ("a", ["a", "b", "a"], "class a can be several of the weights: class 0, class 2"),
    ],
)
def test_a_class_that_weights_do_not_know(name, known, message):
    with pytest.raises(UserError, match=message):
        match_classes([name], known, "the weights")


def settings_to_test(**settings):
    """Settings to test weights with."""
    return small(model="resnet18", weights="DEFAULT", test_only=True, num_classes=None, **settings)


def test_data_to_test_weights_with_have_all_classes_that_these_know(imagenet_photos):
    settings = settings_to_test(data_path=imagenet_photos)
    data = open_data(settings)
    assert data.classes == ("n15075141", "tench")
    known = with_known_classes(data, settings)
    assert known.classes == IMAGENET
    for part in (known.train, known.val):
        assert part.targets == [{0: 999, 1: 0}[target] for target in data.val.targets]
        assert part[0][1] == 999
        assert part[11][1] == 0
        assert decoded(part[0][0]).tobytes() == decoded(data.train[0][0]).tobytes()
    assert len(pickle.loads(pickle.dumps(known.val))) == 12
    with pytest.raises(UserError, match="^--num-classes 3: --weights DEFAULT know 1000 class"):
        with_known_classes(data, dataclasses.replace(settings, num_classes=3))


def test_data_with_a_class_that_the_weights_to_test_do_not_know(photos_with_val):
    settings = settings_to_test(data_path=photos_with_val)
    message = f"^--data-path {photos_with_val}: class flower is none of the 1000 of --weights DEFA"
    with pytest.raises(UserError, match=message):
        with_known_classes(open_data(settings), settings)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", "DEFAULT"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("vgg16", "IMAGENET1K_FEATURES"),
    ],
)
def test_pictures_are_made_ready_as_the_weights_say(photos, model, weights):
    data = open_data(small(model=model, weights=weights, data_path=photos, image_size=None))
    picture, _ = data.train[0]
    theirs = torchvision.models.get_model_weights(model)[weights].transforms()(decoded(picture))
    ours = validation_transform(data.native)(picture).as_subclass(torch.Tensor)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # a deviation may be 1 / 255


def test_weights_are_asked_before_the_data_how_pictures_are_made_ready(cifar):
    """And options before both."""
    weights = {"model": "resnet18", "weights": "DEFAULT", "image_size": None, "num_classes": 10}
    data = open_data(small(data_path=cifar, **weights))
    assert data.native == Preprocessing(224, 256)
    chosen = small(data_path=cifar, **weights | {"image_size": 112, "std": (0.5, 0.5, 0.5)})
    expected = Preprocessing(112, 128, std=(0.5, 0.5, 0.5))
    assert open_data(chosen).native.overruled(chosen) == expected
