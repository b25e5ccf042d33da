"""Whether the images that a checkpoint is tested on are among those that it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from split_affinity.checkpoints.state import SavedState, saved_settings
from split_affinity.data.dataset import (
    choose_images,
    describe_images,
    fingerprint,
    with_validation,
)
from split_affinity.data.pictures import ImageData, kept_apart
from split_affinity.errors import UserError
from split_affinity.options.settings import settings_of
from split_affinity.terminal import warn
from split_affinity.text import plural

MOST_COMPARED = 20_000  # files whose contents are read


def warn_of_known_images(path: Path, saved: SavedState, data: ImageData) -> int:
    """Warn if a checkpoint was, or may have been, trained on images that it is tested on.

    Returns how many it surely was trained on.
    """
    known = known_images(saved, data)
    if known:
        count = plural(len(data.val), "image")
        which = f"all of these {count}" if known == len(data.val) else f"{known} of these {count}"
        warn(
            f"{path} was trained on {which}: the figures do not say how good it is; test it on "
            "images that it has never seen"
        )
    elif known is None and kept_apart(data):
        asked = "--seed, --val-share and --subset"
        warn(f"{path} was trained on other images than {asked} leave: it may know some of these")
    return known or 0


def known_images(saved: SavedState, data: ImageData) -> int | None:
    """How many of the validation images a checkpoint was trained on, or None.

    None means that it is not known: names and sizes of files are not those of the run. Then other
    images were trained on, or the same ones elsewhere.
    """
    trained_on = (saved.get("data") or {}).get("fingerprint")
    if not getattr(data.train, "samples", ()):  # nothing tells images apart that are not in files
        same = trained_on == describe_images(data)["fingerprint"]
        return 0 if same or not kept_apart(data) else None
    settings = settings_of(saved_settings(saved))
    whole = dataclasses.replace(data, val=None if kept_apart(data) else data.val)
    try:
        then = with_validation(whole, settings)
    except UserError:  # it was validated otherwise than these data can be
        then = whole
    chosen = choose_images(then, settings)
    if trained_on == describe_images(dataclasses.replace(then, chosen=chosen))["fingerprint"]:
        if kept := kept_apart(data):
            return len({*chosen} & {*kept})
        return same_files([data.train.samples[index][0] for index in chosen], files_of(data.val))
    if not kept_apart(data) and trained_on == fingerprint(both_parts(data)):
        return len(data.val)
    return None


def files_of(pictures: object) -> list[str]:
    """The files of a data set, none if they are not in files."""
    return [path for path, _ in getattr(pictures, "samples", ())]


def both_parts(data: ImageData) -> Iterator[tuple[int, str, str]]:
    """The files to train and to validate as if they were of one folder: number, name, path."""
    found = [
        (label, os.path.relpath(path, part.root), path)
        for part in (data.train, data.val)
        for path, label in getattr(part, "samples", ())
    ]
    return ((number, name, path) for number, (_, name, path) in enumerate(sorted(found)))


def same_files(trained: Sequence[str], tested: Sequence[str]) -> int:
    """How many of the tested files are trained ones too: the same file, or a copy of it.

    Copies are looked for as long as few enough files have the same size as another.
    """
    real = {os.path.realpath(path) for path in trained}
    linked = [path for path in tested if os.path.realpath(path) in real]
    others = {*tested}.difference(linked)
    sizes = {path: size_of(path) for path in (*trained, *others)}
    alike = {sizes[path] for path in trained} & {sizes[path] for path in others} - {0}
    to_read = [path for path in sizes if sizes[path] in alike]
    if len(to_read) > MOST_COMPARED:
        return len(linked)
    contents = {path: hashlib.sha256(Path(path).read_bytes()).digest() for path in to_read}
    seen = {contents[path] for path in trained if path in contents}
    return len(linked) + sum(contents.get(path) in seen for path in others)


def size_of(path: str) -> int:
    """The size of a file in bytes; 0 for a broken link."""
    return Path(path).stat().st_size if Path(path).exists() else 0
