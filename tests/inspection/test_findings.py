"""What looks wrong, and what to do. Run: python -m pytest tests/inspection/test_findings.py"""

import pytest
from looking import look, seen, survey

from split_affinity.inspection import findings
from split_affinity.inspection.findings import advised, find, fitting_size
from split_affinity.options.settings import Settings

LEFT_OUT = [("other file", "a.txt"), ("other file", "b.txt"), ("hidden folder", ".git")]


def sized(number, label=0, part="train", side=64):
    """A picture of its own, that nothing is like."""
    own = {"digest": number.to_bytes(2, "big"), "hash": None, "mirrored": None}
    return seen(number, label, part, look(0, size=(side, side), **own))


def healthy(train=20, validation=5, side=64):
    """Pictures of three classes with which nothing is wrong, but that they are not compared."""
    parts = ["train"] * train + ["validation"] * validation
    return [
        sized(len(parts) * label + number, label, part, side)
        for label in range(3)
        for number, part in enumerate(parts)
    ]


def titles(pictures, batch_size=20, **changes):
    found = find(survey(pictures, **changes), Settings(batch_size=batch_size))
    return [each.title for each in found if not each.title.startswith("Only exact copies")]


def test_nothing_to_do_is_said():
    assert titles(healthy()) == ["Ready to train"]


def copies_of(*places):
    return [seen(number, label, part, look(1)) for number, label, part in places]


TO_TRAIN, TO_VALIDATE = "train", "validation"


@pytest.mark.parametrize(
    ("more", "title"),
    [
        (copies_of((90, 0, TO_TRAIN), (91, 1, TO_TRAIN)), "1 picture in two classes"),
        (
            copies_of((90, 0, TO_TRAIN), (91, 0, TO_VALIDATE), (92, 0, TO_VALIDATE)),
            "2 validation pictures known from training",
        ),
        (
            copies_of((90, 0, TO_TRAIN), (91, 0, TO_TRAIN), (92, 0, TO_TRAIN)),
            "1 picture more than once in its class",
        ),
        ([seen(90, fault="broken image b")], "1 broken picture"),
        ([sized(90, side=31)], "1 picture enlarged more than twice"),
        ([sized(90, side=7000)], "1 huge picture"),
        ([sized(100 + n) for n in range(20)], "2.0 times as many pictures of a as of b"),
    ],
)
def test_each_fault_is_found(more, title):
    (found,) = titles([*healthy(), *more], batch_size=1)
    assert found == title


@pytest.mark.parametrize(
    ("pictures", "batch_size", "title"),
    [
        (healthy(validation=0), 20, "No pictures to validate with"),
        (healthy(train=19), 19, "Few pictures of 3 classes"),
        (healthy(validation=4), 20, "Few pictures to validate with"),
        (healthy(train=22), 20, "6 of 66 pictures left out of each epoch"),
    ],
)
def test_too_few_pictures_are_found(pictures, batch_size, title):
    (found,) = titles(pictures, batch_size)
    assert found == title


def test_what_was_left_out_is_told_by_kind():
    (found,) = find(survey(healthy(), left_out=LEFT_OUT), Settings())[:1]
    assert found.title == "3 things left out"
    assert found.figures == "2 other files (a.txt); 1 hidden folder (.git)."


def test_what_there_is_to_do_comes_first():
    pictures = [*healthy(), *copies_of((90, 0, TO_TRAIN), (91, 0, TO_TRAIN))]
    found = find(survey(pictures), Settings(batch_size=1))
    assert [bool(each.to_do) for each in found] == [True, False]
    assert found[1].title.startswith("Only exact copies looked for of 75 pictures")


def test_a_missing_package_is_named():
    found = find(survey(healthy(), can_compare=False), Settings(batch_size=1))
    assert found[0].to_do == "pip install imagehash"


def test_a_recipe_fits_its_batch_to_the_pictures_itself():
    pictures = survey(healthy(train=22))
    assert findings.incomplete_batch(pictures, Settings(batch_size=20)) is not None
    assert findings.incomplete_batch(pictures, Settings(batch_size=20, fit_batch=True)) is None


@pytest.mark.parametrize(
    ("side", "size"),
    [(20, 32), (33, 32), (50, 64), (100, 96), (208, 192), (224, None), (500, None)],
)
def test_image_sizes_that_fit(side, size):
    assert fitting_size(survey([sized(0, side=side)], image_size=224)) == size


def test_a_training_is_advised_by_what_was_found():
    asked = Settings(recipe="finetune")
    assert advised(survey(healthy()), asked) == asked
    found = advised(survey(healthy(train=30, validation=0, side=50)[20:], image_size=224), asked)
    assert (found.val_share, found.image_size) == (0.2, 64)
    assert found.class_weights == "balanced"
    assert found.recipe == "finetune"


def test_long_lists_are_cut():
    assert findings.some(["a", "b", "c"]) == "a, b, c"
    assert findings.some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
