"""The same picture twice. Run: python -m pytest tests/inspection/test_twins.py"""

import itertools

import pytest
from looking import look, parts_of_photographs
from twins import CHANGES

from split_affinity.inspection import twins
from split_affinity.inspection.looks import look_at
from split_affinity.inspection.twins import find_twins, group_pictures

# Of twelve pictures, how many are found at least. benchmarks/twins.py has more of them.
FOUND = {
    "copied": 12,
    "saved as JPEG, quality 50": 12,
    "half the size": 12,
    "brightness +20 %": 12,
    "contrast -30 %": 12,
    "grey": 12,
    "mirrored": 12,
    "cropped to 95 %": 11,
    "cropped to 90 %": 9,
    "with a border of 3 %": 11,
}
NOT_FOUND = ("turned by 90 degrees",)


@pytest.fixture(scope="module")
def originals():
    pictures = parts_of_photographs()
    return pictures, [look_at(each, "RGB") for each in pictures]


def test_different_pictures_are_not_the_same(originals):
    assert group_pictures(originals[1]) == []


@pytest.mark.parametrize("change", FOUND)
def test_changed_pictures_are_found(originals, change):
    pictures, looks = originals
    with_crops = change.startswith(("cropped", "with a border"))
    changed = [look_at(CHANGES[change](each), "RGB", with_crops=with_crops) for each in pictures]
    groups = group_pictures([*looks, *changed])
    right = [group for group in groups if group[1] == group[0] + len(pictures)]
    assert len(right) >= FOUND[change]
    assert all(len(group) == 2 for group in groups), "no picture is joined with another"


@pytest.mark.parametrize("change", NOT_FOUND)
def test_what_is_not_found_is_known(originals, change):
    pictures, looks = originals
    changed = [look_at(CHANGES[change](each), "RGB") for each in pictures]
    assert group_pictures([*looks, *changed]) == []


def flipped(found, bits):
    """A look whose hash differs in the first bits."""
    whole, rest = divmod(bits, 8)
    mask = bytes([255] * whole + [(0xFF00 >> rest) & 255]) + bytes(32)
    changed = bytes(a ^ b for a, b in zip(found.hash, mask, strict=False))
    return look(0, digest=bytes([bits]), hash=changed, size=found.size)


@pytest.mark.parametrize(("side", "limit"), [(64, twins.NEAR_BITS), (63, twins.NEAR_BITS_IF_SMALL)])
def test_the_limit_is_exact(side, limit):
    first = look(0, size=(90, side))
    assert group_pictures([first, flipped(first, limit)]) == [[0, 1]]
    assert group_pictures([first, flipped(first, limit + 1)]) == []


def test_small_pictures_are_compared_more_strictly_with_large_ones():
    small, large = look(0, size=(90, 63)), look(0, size=(90, 64))
    near = flipped(small, twins.NEAR_BITS_IF_SMALL + 1)
    assert group_pictures([large, near]) == []


def test_groups_are_chains(monkeypatch):
    first = look(0, size=(90, 64))
    chain = [first, *(flipped(first, bits) for bits in (50, 100, 150))]
    for block in (1, 2**24):
        monkeypatch.setattr(twins, "BLOCK_PAIRS", block)
        assert group_pictures(chain) == [[0, 1, 2, 3]]
        assert group_pictures([chain[0], chain[3]]) == []


def test_blocks_of_crops_find_the_same(originals, monkeypatch):
    pictures, looks = originals
    some = [
        *looks[:4],
        *(look_at(CHANGES["cropped to 90 %"](each), "RGB") for each in pictures[:4]),
    ]
    whole = group_pictures(some)
    monkeypatch.setattr(twins, "CROPS_BLOCK", 3)
    assert group_pictures(some) == whole
    monkeypatch.setattr(twins, "MOST_CROPPED", 7)
    assert group_pictures(some) == []


def test_exact_copies_are_found_without_hashes():
    looks = [look(number % 2, hash=None, mirrored=None) for number in range(5)]
    assert group_pictures([*looks, None]) == [[0, 2, 4], [1, 3]]


def test_too_many_pictures_are_compared_exactly_alone(monkeypatch):
    first = look(0)
    looks = [first, flipped(first, 1), first]
    assert group_pictures(looks) == [[0, 1, 2]]
    monkeypatch.setattr(twins, "MOST_COMPARED", 1)
    assert group_pictures(looks) == [[0, 2]]


def test_kinds_come_in_the_order_of_their_weight():
    looks = [look(number // 2) for number in range(8)]
    near = flipped(look(9), 1)
    looks += [look(9), near]
    classes = [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    parts = ["train", "train", "train", "train", "train", "val", "train", "val", "train", "train"]
    found = find_twins(looks, classes, parts)
    kinds = [
        (each.pictures, each.between_classes, each.between_parts, each.exact) for each in found
    ]
    assert kinds == [
        ((6, 7), True, True, True),
        ((2, 3), True, False, True),
        ((4, 5), False, True, True),
        ((0, 1), False, False, True),
        ((8, 9), False, False, False),
    ]


def test_order_does_not_matter(originals):
    pictures, looks = originals
    looks = [*looks[:3], look_at(CHANGES["grey"](pictures[1]), "RGB")]
    for order in itertools.permutations(range(4)):
        shuffled = [looks[place] for place in order]
        expected = sorted([order.index(1), order.index(3)])
        assert group_pictures(shuffled) == [expected]
