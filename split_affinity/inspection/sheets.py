"""Some pictures of each class, as they are and as augmentation shows them to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from split_affinity.data.decoding import decoded
from split_affinity.data.pictures import BrokenImage, ImageData, kept_apart
from split_affinity.data.samples import Samples
from split_affinity.data.transforms import as_picture, transform_of_epoch
from split_affinity.inspection.survey import TRAIN, Seen, Survey
from split_affinity.options.settings import Settings
from split_affinity.reports.page import data_uri

PER_CLASS = 6  # pictures
SHOWN_CLASSES = 30
SHOWN_TWINS, SHOWN_OF_TWINS = 24, 4  # groups of pictures that are the same, and of each
THUMBNAIL_PX = 160  # longer side


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI, and what it is."""

    picture: str
    path: str
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """Pictures of a class, and the same as the model sees them in the first epoch."""

    name: str
    pictures: Sequence[Thumbnail]
    augmented: Sequence[Thumbnail]


def spread(items: Sequence[Seen], count: int) -> list[Seen]:
    """Some of many, from all over the list."""
    return [items[place * len(items) // count] for place in range(min(count, len(items)))]


def class_sheets(survey: Survey, data: ImageData, settings: Settings) -> list[Sheet]:
    """A sheet for each of the first classes; what cannot be read is left out."""
    of_class: dict[int, list[Seen]] = {}
    for each in survey.of_part(TRAIN):
        if each.look:
            of_class.setdefault(each.label, []).append(each)
    sheets = []
    for label, pictures in sorted(of_class.items())[:SHOWN_CLASSES]:
        chosen = spread(pictures, PER_CLASS)
        shown = [Thumbnail(thumbnail(data, each), each.path, size_text(each)) for each in chosen]
        seen = [Thumbnail(each, "") for each in augmented(data, settings, chosen)]
        sheets.append(Sheet(survey.classes[label], shown, seen))
    return sheets


def twin_pictures(survey: Survey, data: ImageData) -> list[list[Thumbnail]]:
    """The first groups of pictures that are the same, to be looked at side by side."""
    groups = []
    for twins in survey.twins[:SHOWN_TWINS]:
        seen = [survey.seen[place] for place in twins.pictures[:SHOWN_OF_TWINS]]
        groups.append(
            [
                Thumbnail(
                    thumbnail(data, each),
                    each.path,
                    f"{survey.classes[each.label]}, {each.part}, {size_text(each)}",
                )
                for each in seen
            ]
        )
    return groups


def size_text(seen: Seen) -> str:
    """A picture's size in pixels."""
    return " × ".join(map(str, seen.look.size)) if seen.look else ""


def thumbnail(data: ImageData, seen: Seen) -> str:
    """A small picture of its whole, as a data URI; small ones keep their pixels."""
    pictures = data.train if seen.part == TRAIN or kept_apart(data) else data.val
    try:
        picture = decoded(pictures[seen.index][0]).copy()
    except BrokenImage:  # it was there a moment ago
        return ""
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return data_uri(picture)


def augmented(data: ImageData, settings: Settings, pictures: Sequence[Seen]) -> Iterator[str]:
    """Pictures to train as the model sees them in the first epoch, as data URIs."""
    samples = Samples(data.train, settings.seed, partial(transform_of_epoch, data, settings))
    ready = data.native.overruled(settings)
    for each in pictures:
        loaded = samples[[(1, each.index)]]
        if loaded.batch:
            picture = as_picture(loaded.batch[0][0], ready)
            picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
            yield data_uri(picture)
