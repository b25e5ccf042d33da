"""The same picture twice: exactly, nearly, or mirrored. Pure, from looks alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from split_affinity.inspection.looks import HASH_SIDE, SMALL_SIDE_PX, Look

BITS = HASH_SIDE**2
# Bits of the hash that may differ. Small pictures have few details, and their hashes are closer;
# benchmarks/twins.py has the figures behind both.
NEAR_BITS, NEAR_BITS_IF_SMALL, NEAR_BITS_OF_CROPS = 56, 26, 50
# Pictures: the time grows with the square of their number.
MOST_COMPARED, MOST_CROPPED = 60_000, 10_000
BLOCK_PAIRS, CROPS_BLOCK = 2**24, 1024  # pairs, and pictures with crops, compared at a time


@dataclass(frozen=True)
class Twins:
    """Pictures that are the same, by their places in what was looked at."""

    pictures: tuple[int, ...]
    exact: bool  # all of them, to the pixel
    between_parts: bool  # some are to train, some to validate
    between_classes: bool


def find_twins(
    looks: Sequence[Look | None], classes: Sequence[int], parts: Sequence[str]
) -> list[Twins]:
    """All groups of pictures that are the same, the worst kinds first.

    `classes` and `parts` are those of each picture; a look that is None is at none. Each picture of
    a group is near another one of it.
    """
    found = []
    for places in group_pictures(looks):
        digests = {looks[place].digest for place in places}
        between_parts = len({parts[place] for place in places}) > 1
        between_classes = len({classes[place] for place in places}) > 1
        found.append(Twins(tuple(places), len(digests) == 1, between_parts, between_classes))
    return sorted(
        found, key=lambda one: (not one.between_classes, not one.between_parts, not one.exact)
    )


def group_pictures(looks: Sequence[Look | None]) -> list[list[int]]:
    """The places of pictures that are the same, in groups of two or more."""
    same: dict[bytes, list[int]] = {}  # by digest
    for place, look in enumerate(looks):
        if look is not None:
            same.setdefault(look.digest, []).append(place)
    firsts = compared(looks)
    near: dict[int, list[int]] = {}  # by group; what is not compared has a group of its own
    for first, group in zip(firsts, near_groups([looks[place] for place in firsts]), strict=True):
        near.setdefault(group, []).append(first)
    joined = {looks[place].digest for places in near.values() for place in places}
    groups = [[looks[place].digest for place in places] for places in near.values()]
    groups += [[digest] for digest in same if digest not in joined]
    places = (sorted(place for digest in group for place in same[digest]) for group in groups)
    return sorted(group for group in places if len(group) > 1)


def compared(looks: Sequence[Look | None]) -> list[int]:
    """The places of the pictures to compare, one of each that are exactly the same.

    There are none if they would be too many.
    """
    firsts: dict[bytes, int] = {}
    for place, look in enumerate(looks):
        if look is not None and look.hash is not None:
            firsts.setdefault(look.digest, place)
    return list(firsts.values()) if len(firsts) <= MOST_COMPARED else []


def near_groups(looks: Sequence[Look]) -> list[int]:
    """The number of the group of each look, by hashes that are near."""
    own = np.arange(len(looks))
    groups = own
    if len(looks) < 2:
        return groups.tolist()
    from scipy.sparse import coo_matrix  # it is there where hashes are: imagehash brings it
    from scipy.sparse.csgraph import connected_components

    for pairs in itertools.chain(near_pairs(looks), near_crops(looks)):
        # The groups so far are links too: a picture and the first of its group.
        first, second = np.concatenate([pairs, np.stack([groups, own], 1)]).T
        links = coo_matrix((np.ones(len(first)), (first, second)), 2 * (len(looks),))
        labels = connected_components(links, directed=False)[1]
        groups = np.unique(labels, return_index=True)[1][labels]
    return groups.tolist()


def near_pairs(looks: Sequence[Look]) -> Iterator[np.ndarray]:
    """Places of pictures that are near each other, or one of them mirrored, (pairs, 2)."""
    signs = signs_of(look.hash for look in looks)
    mirrored = signs_of(look.mirrored for look in looks)
    limits = torch.tensor([near_bits(look) for look in looks])
    rows = max(1, BLOCK_PAIRS // len(looks))
    for start in range(0, len(looks), rows):
        some = slice(start, start + rows)
        # Bits that agree count 1, others -1.
        agree = torch.maximum(signs[some] @ signs[start:].T, signs[some] @ mirrored[start:].T)
        limit = torch.minimum(limits[some, None], limits[None, start:])
        yield ((BITS - agree) / 2 <= limit).triu(1).nonzero().numpy() + start


def near_crops(looks: Sequence[Look]) -> Iterator[np.ndarray]:
    """Places of a picture a part of which is near another picture, and of that, (pairs, 2)."""
    places = np.array([place for place, look in enumerate(looks) if look.crops])
    if not 2 <= len(places) <= MOST_CROPPED:
        return
    signs = signs_of(looks[place].hash for place in places)
    for start in range(0, len(places), CROPS_BLOCK):
        some = places[start : start + CROPS_BLOCK]
        crops = signs_of(looks[place].crops for place in some).view(len(some), -1, BITS)
        for number in range(crops.shape[1]):
            near = (BITS - crops[:, number] @ signs.T) / 2 <= NEAR_BITS_OF_CROPS
            near.diagonal(start)[: len(some)] = False  # each with itself
            if near.any():
                first, second = near.nonzero().T.numpy()
                yield np.stack([some[first], places[second]], 1)


def signs_of(hashes: Iterable[bytes]) -> torch.Tensor:
    """The bits of hashes as 1 and -1, (hashes, bits)."""
    packed = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, BITS // 8)
    return torch.from_numpy(np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1)


def near_bits(look: Look) -> int:
    """How many bits of a hash may differ in a picture that is nearly the same."""
    return NEAR_BITS_IF_SMALL if look.shorter_side < SMALL_SIDE_PX else NEAR_BITS
