"""The weights of classes in the loss. Run: python -m pytest tests/data/test_class_weights.py"""

import json
import re

import numpy as np
import pytest
from loading import small
from photos import make_photos
from sklearn.utils import class_weight

from split_affinity.data.class_weights import LARGEST_FILE_BYTES, find_class_weights, weights_text
from split_affinity.data.dataset import describe_data, describe_images, open_data
from split_affinity.errors import UserError


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Photographs of two classes, six temples and two flowers."""
    root = make_photos(tmp_path_factory.mktemp("uneven"), 12, smallest=64, largest=128)
    for path in sorted(root.joinpath("train/flower").iterdir())[2:]:
        path.unlink()
    return root


def weighted(path, asked, **settings):
    return small(data_path=path, class_weights=str(asked), **{"num_classes": None} | settings)


@pytest.mark.parametrize("settings", [{}, {"subset": 0.5}, {"val_share": 0.4}])
def test_balanced_weights_are_scikit_learns(uneven, settings):
    """Of the images that are trained on."""
    data = open_data(weighted(uneven, "balanced", **settings))
    targets = [data.train.targets[index] for index in data.chosen]
    expected = class_weight.compute_class_weight("balanced", classes=np.unique(targets), y=targets)
    assert list(data.class_weights) == expected.tolist()
    assert sum(data.class_weights[target] for target in targets) == pytest.approx(len(targets))
    lines = {(): "flower 2, temple 0.667", ("subset",): "flower 2, temple 0.667"}
    expected_line = lines.get(tuple(settings), "flower 2.5, temple 0.625")
    assert f"weights   {expected_line} in the loss" in describe_data(data)
    assert describe_images(data)["class_weights"] == list(data.class_weights)


def test_weights_of_a_file_have_a_mean_of_1(uneven, tmp_path):
    """A class that is not named counts 1; names may be spelt in other capitals."""
    path = tmp_path / "w.json"
    path.write_text('{"Flower": 5}')
    data = open_data(weighted(uneven, path, num_classes=4))
    scale = 8 / (2 * 5 + 6 * 1)
    assert data.class_weights == pytest.approx((5 * scale, scale, 1, 1))
    assert describe_images(data)["class_weights"] == pytest.approx([5 * scale, scale])
    assert "weights   flower 2.5, temple 0.5 in the loss" in describe_data(data)


def test_without_the_option_there_are_no_weights(uneven):
    data = open_data(small(data_path=uneven, num_classes=None))
    assert data.class_weights is None
    assert "class_weights" not in describe_images(data)
    assert find_class_weights(weighted(uneven, "gone.json", test_only=True), data) is None


NO_TABLE = 'not JSON of the form {"class": weight, ...}'
ALLOWED = "numbers from 1e-06 to 1e+06 are allowed"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", NO_TABLE),
        ("{}", NO_TABLE),
        ("3", NO_TABLE),
        ('[["flower", 2]]', NO_TABLE),
        ("[" * 100_000, NO_TABLE),
        ('{"a":' * 100_000, NO_TABLE),
        (
            '{"flowers": 2}',
            "class flowers is none of the 2 of --data-path PATH; did you mean flower?",
        ),
        ('{"dog": 2}', "class dog is none of the 2 of --data-path PATH"),
        (
            json.dumps({"x" * 10**5: 2}),
            f"class {'x' * 60}... is none of the 2 of --data-path PATH",
        ),
        ('{"flower": 2, "flower": 3}', "class flower is there twice"),
        ('{"flower": 2, "FLOWER": 3}', "class flower is there twice"),
        ('{"flower": 0}', f"the weight of flower is 0: {ALLOWED}"),
        ('{"flower": -1.5}', f"the weight of flower is -1.5: {ALLOWED}"),
        ('{"flower": NaN}', f"the weight of flower is nan: {ALLOWED}"),
        ('{"flower": 1e999}', f"the weight of flower is inf: {ALLOWED}"),
        ('{"flower": 1e7}', f"the weight of flower is 10000000.0: {ALLOWED}"),
        ('{"flower": true}', f"the weight of flower is True: {ALLOWED}"),
        ('{"flower": "2"}', f"the weight of flower is '2': {ALLOWED}"),
        ('{"flower": {"temple": 2}}', f"the weight of flower is no number: {ALLOWED}"),
        (" " * LARGEST_FILE_BYTES + "{}", "larger than 16777216 bytes, the most allowed"),
    ],
    ids=range(20),
)
def test_a_file_of_something_else_is_refused(uneven, tmp_path, content, reason):
    path = tmp_path / "w.json"
    path.write_text(content)
    message = f"--class-weights {path}: {reason.replace('PATH', str(uneven))}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_data(weighted(uneven, path))


def test_a_file_that_is_not_there(uneven):
    with pytest.raises(UserError, match=r"balance: cannot be read: No such .*; did you mean balan"):
        open_data(weighted(uneven, "balance"))


def test_of_many_classes_the_lowest_and_the_highest_weight_are_named():
    classes = [f"class {number}" for number in range(100)]
    weights = [0.5 + number % 97 for number in range(100)]
    text = weights_text(weights, classes)
    assert text == "0.5 (class 0) to 96.5 (class 96), of 100 classes"
