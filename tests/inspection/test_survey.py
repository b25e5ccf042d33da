"""What all pictures add up to. Run: python -m pytest tests/inspection/test_survey.py"""

import json

import numpy as np
import pytest
from looking import look, noise, seen, survey

from split_affinity.inspection.looks import look_at
from split_affinity.inspection.survey import HUGE_PIXELS, Bar, survey_figures


def test_classes_are_counted_by_part():
    found = survey([seen(0, 0), seen(1, 0), seen(2, 0, "validation"), seen(3, 2, look=look(0))])
    rows = [(row.name, row.train, row.validation, row.median_side) for row in found.rows]
    assert rows == [("a", 2, 1, None), ("b", 0, 0, None), ("c", 1, 0, 60)]
    assert found.imbalance == 2


def of_size(number, *size):
    """A picture of a size; what else was seen of it is of another one."""
    return seen(number, look=look(0, digest=bytes([number]), size=size))


def test_sizes():
    sizes = [(80, 60), (31, 90), (32, 32), (10_000, HUGE_PIXELS // 10_000 + 1)]
    found = survey([of_size(number, *size) for number, size in enumerate(sizes)], image_size=64)
    assert [each.index for each in found.tiny] == [1]
    assert [each.index for each in found.huge] == [3]
    assert found.sides == [31, 32, 60, 4001]


@pytest.mark.parametrize(
    "sides", [[32], [31, 32, 33, 45, 46, 64], [1, 1, 5000], [7, 100, 100, 224]]
)
def test_each_picture_is_in_one_bar(sides):
    pictures = [of_size(number, side, 9000) for number, side in enumerate(sides)]
    bars = survey(pictures).bars
    assert sum(bar.pictures for bar in bars) == len(sides)
    for bar in bars:
        assert bar.pictures == sum(bar.low <= side < bar.high for side in sides), bar
    assert all(first.high == second.low for first, second in zip(bars, bars[1:], strict=False))


def test_two_bars_for_each_doubling():
    pictures = [of_size(number, side, side) for number, side in enumerate((32, 127))]
    assert survey(pictures).bars == [
        Bar(32, 46, 1),
        Bar(46, 64, 0),
        Bar(64, 91, 0),
        Bar(91, 128, 1),
    ]


def test_colours_are_those_of_plain_arithmetic():
    pictures = [noise(n) for n in range(3)]
    looks = [look_at(each, "RGB") for each in pictures]
    parts = ["train", "train", "validation"]
    found = survey([seen(n, part=parts[n], look=each) for n, each in enumerate(looks)])
    values = np.concatenate([np.asarray(each).reshape(-1, 3) for each in pictures[:2]]) / 255
    mean, deviation = found.colours
    assert np.allclose(mean, values.mean(0), atol=1e-4)
    assert np.allclose(deviation, values.std(0), atol=1e-4)


def test_figures_are_plain_and_name_every_picture():
    pictures = [
        seen(0, 0, look=look(0, orientation=6)),
        seen(1, 1, "validation", look=look(0)),
        seen(2, 1, fault="broken image b/002.jpg: cut short"),
    ]
    left_out = [("other file", "notes.txt")]
    figures = survey_figures(survey(pictures, left_out=left_out))
    assert json.loads(json.dumps(figures))["pictures"] == {"train": 2, "validation": 1}
    assert figures["turned"] == ["a/000.jpg"]
    assert figures["broken"] == [{"path": "b/002.jpg", "why": "broken image b/002.jpg: cut short"}]
    assert figures["left_out"] == [{"kind": "other file", "path": "notes.txt"}]
    (twins,) = figures["twins"]
    assert (twins["exact"], twins["between_parts"], twins["between_classes"]) == (True, True, True)
    assert [each["path"] for each in twins["pictures"]] == ["a/000.jpg", "b/001.jpg"]
    assert [each["class"] for each in twins["pictures"]] == ["a", "b"]
    assert figures["modes"] == {"JPEG RGB": 2}


def test_nothing_that_can_be_read():
    figures = survey_figures(survey([seen(0, fault="broken")]))
    assert figures["shorter_side"] is figures["mean"] is figures["std"] is None
    assert figures["twins"] == figures["histogram"] == []


def test_what_was_not_compared_is_counted_once():
    even = {"hash": None, "mirrored": None}
    pictures = [seen(0, look=look(0)), seen(1, look=look(1, **even)), seen(2, look=look(1, **even))]
    assert survey(pictures).not_compared == 1
