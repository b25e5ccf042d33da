"""The data of a run: found, divided into training and validation images, described."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from split_affinity.data.class_weights import find_class_weights, weights_text
from split_affinity.data.classes import confused_classes
from split_affinity.data.decoding import picture_reader
from split_affinity.data.image_folder import folder_data
from split_affinity.data.named import CIFAR10_FOLDER, named_data, synthetic_data
from split_affinity.data.pictures import HEIF, ImageData, derived_seed, heif_pictures, kept_apart
from split_affinity.errors import UserError
from split_affinity.models.pretrained import find_weights
from split_affinity.options.data_sets import VAL_SHARE
from split_affinity.options.recipes import recipe_defaults, survey_folder
from split_affinity.options.settings import Settings, batches_in_step, images_in_step
from split_affinity.text import plural

# What makes a second look worth while: classes that differ so many times, or have so few images,
# and kinds of what is left out.
UNEVEN, FEW_IMAGES = 3, 5
STRANGE = ("other file", "classless image", "repeated image")


def find_data(settings: Settings) -> ImageData:
    """The data of `--data-path`, a `--dataset` or an image folder; without it, synthetic images."""
    name, path = settings.dataset, settings.data_path
    if path is None:
        return synthetic_data(settings)
    if path.name == CIFAR10_FOLDER:
        path = path.parent
    if not name and (settings.download or (path / CIFAR10_FOLDER).is_dir()):
        name = "cifar10"
    read = picture_reader(settings.full_decode)
    return named_data(name, path, settings.download, read) if name else folder_data(path, read)


def open_data(settings: Settings) -> ImageData:
    """The data, with images chosen to train and to validate; UserError if too few for a step."""
    path = settings.data_path
    data = with_validation(with_native(find_data(settings), settings), settings)
    found = len(data.classes)
    if settings.num_classes and settings.num_classes < found:
        raise UserError(f"--num-classes {settings.num_classes}: {path} has {found} classes")
    confused, chosen = confused_classes(settings, data.classes), choose_images(data, settings)
    data = dataclasses.replace(data, confused=confused, chosen=chosen)
    settings = dataclasses.replace(settings, batch_size=fitted_batch(settings, len(chosen)))
    if len(chosen) < images_in_step(settings):
        step, remedy = f"--batch-size {settings.batch_size}", "lower -b"
        if settings.accumulate > 1:
            step, remedy = f"{step} --accumulate {settings.accumulate}", f"{remedy} or --accumulate"
        step += f" on {settings.ranks} ranks" if settings.ranks > 1 else ""
        count = plural(len(chosen), "image")
        raise UserError(f"{step}: {path} has only {count} to train on: {remedy}")
    return dataclasses.replace(data, class_weights=find_class_weights(settings, data))


def with_native(data: ImageData, settings: Settings) -> ImageData:
    """The data, with pictures made ready as the trained weights want them, if there are any."""
    if not settings.weights:
        return data
    return dataclasses.replace(data, native=find_weights(settings.model, settings.weights).native)


def draw_of_each_class(
    targets: Sequence[int], among: Iterable[int], seed: int, count_of: Callable[[int], int]
) -> list[int]:
    """Indices drawn from `among`: of a class with n images there, `count_of(n)`."""
    of_class: dict[int, list[int]] = {}
    for index in among:
        of_class.setdefault(targets[index], []).append(index)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for _, indices in sorted(of_class.items()):
        order = torch.randperm(len(indices), generator=generator).tolist()
        chosen += [indices[place] for place in order[: count_of(len(indices))]]
    return sorted(chosen)


def with_validation(data: ImageData, settings: Settings) -> ImageData:
    """The data with `--val-share` of each class kept apart: one image or more, but never all.

    A recipe's share gives way to images that are there to validate with; any other is a UserError.
    """
    share = settings.val_share
    of_recipe = recipe_defaults(settings.recipe).get("val_share") if settings.recipe else None
    if share and share != of_recipe and data.val:
        count = plural(len(data.val), "image")
        reason = f"{settings.data_path} has {count} to validate with; leave it out"
        raise UserError(f"--val-share {share:g}: {reason}")
    if share is None and settings.dataset:
        share = VAL_SHARE
    if not share or data.val:
        return data
    targets, seed = data.train.targets, derived_seed(settings.seed, "val")
    kept = draw_of_each_class(
        targets, range(len(targets)), seed, lambda n: min(max(1, round(share * n)), n - 1)
    )
    if not kept:
        raise UserError(f"--val-share {share:g}: no class of {settings.data_path} has two images")
    return dataclasses.replace(data, val=Subset(data.train, kept))


def choose_images(data: ImageData, settings: Settings) -> list[int]:
    """Indices of the images to train on: `--subset` of each class, chosen by seed and labels."""
    kept = set(kept_apart(data))
    rest = [index for index in range(len(data.train)) if index not in kept]
    if settings.subset == 1:
        return rest
    seed = derived_seed(settings.seed, "subset")
    share = settings.subset
    return draw_of_each_class(data.train.targets, rest, seed, lambda n: max(1, round(share * n)))


FEW = 0.01  # of the images: as many may be left out of an epoch


def fitted_batch(settings: Settings, images: int) -> int:
    """The batch size in force: with `--fit-batch` the largest that leaves few images out.

    That is `--batch-size`, or less if the images of an epoch are no multiple of a step's, down to
    half of it. If each leaves out more than a hundredth, it is the one that leaves out the fewest.
    """
    if not settings.fit_batch:
        return settings.batch_size
    batches = batches_in_step(settings)
    largest = max(1, min(settings.batch_size, images // batches))
    least = max(min(2, largest), (largest + 1) // 2)  # BatchNorm needs two images
    sizes = range(largest, least - 1, -1)
    fits = (size for size in sizes if images % (size * batches) <= FEW * images)
    return next(fits, min(sizes, key=lambda size: images % (size * batches)))


def describe_epoch(settings: Settings, images: int) -> list[str]:
    """Lines on the images that whole steps leave out of each epoch, and on a batch fitted to them.

    `settings` are those as typed.
    """
    if not settings.data_path:
        return []
    size = fitted_batch(settings, images)
    step = images_in_step(dataclasses.replace(settings, batch_size=size))
    lines, out = [], images % step
    if size != settings.batch_size:
        lines.append(f"note      {size} images in a batch, not {settings.batch_size}, fit better")
    if out and step <= images:
        others = dataclasses.replace(settings, fit_batch=True)
        remedy, better = "", fitted_batch(others, images)
        rest = images % images_in_step(dataclasses.replace(settings, batch_size=better))
        if out > FEW * images and rest < out:
            remedy = f": -b {better} " + (f"leaves out {rest}" if rest else "uses all")
        lines.append(f"note      {out} of {images} are left out of each epoch{remedy}")
    return lines


def describe_images(data: ImageData) -> dict[str, Any]:
    """What a checkpoint says of its data, in plain types.

    The fingerprint is of the names and sizes of the files to train on, and of which are kept apart.
    """
    samples = getattr(data.train, "samples", ())
    paths = [(index, samples[index][0]) for index in data.chosen] if samples else []
    files = ((index, os.path.relpath(path, data.train.root), path) for index, path in paths)
    confused = [data.classes[number] for number in data.confused or ()]
    weights = [*(data.class_weights or ())][: len(data.classes)]
    return {
        "classes": list(data.classes),
        **({"confused": confused} if confused else {}),
        **({"class_weights": weights} if weights else {}),
        "images": len(data.chosen),
        "fingerprint": fingerprint(files, kept_apart(data)),
    }


def fingerprint(files: Iterable[tuple[int, str, str]], kept: Sequence[int] = ()) -> str:
    """A digest of numbers, names and sizes of files, and of the numbers that are kept apart.

    `files` are numbers, names to take in, and paths.
    """
    digest = hashlib.sha256()
    for number, name, path in files:
        size = Path(path).stat().st_size if Path(path).exists() else 0  # 0 for a broken link
        digest.update(os.fsencode(f"{number} {name} {size}\n"))
    if kept:
        digest.update(repr(kept).encode())
    return digest.hexdigest()


def describe_data(data: ImageData) -> list[str]:
    """Lines on the images that were found, and on what was left out."""
    if data.kind == "synthetic":
        images, classes = plural(len(data.train), "image"), plural(len(data.classes), "class")
        some = f"{data.train.patterns} of " if data.train.patterns < len(data.classes) else ""
        return [f"data      synthetic: {images} of {some}{classes}, a noisy pattern for each"]
    kept = kept_apart(data)
    all_images = len(data.train) - len(kept)
    part = f"{len(data.chosen)} of " if len(data.chosen) < all_images else ""
    classes = textwrap.shorten(", ".join(data.classes), 60, placeholder=" ...")
    where = f" in {data.val.root}" if data.kind == "folder" and data.val and not kept else ""
    if kept:
        where = f" ({len(kept) / len(data.train):.2g} of each class) kept apart"
    val = f"{len(data.val)}{where} to validate with" if data.val else "none to validate with"
    lines = [
        f"data      {part}{plural(all_images, 'image')} of "
        f"{plural(len(data.classes), 'class')} ({classes}) to train on, {val}",
    ]
    alone = {*data.train.targets}.difference(data.train.targets[index] for index in kept)
    if kept and alone:
        names = textwrap.shorten(", ".join(data.classes[each] for each in sorted(alone)), 60)
        count = plural(len(alone), "class")
        lines.append(f"note      the only image of {count} ({names}) is trained on")
    if data.confused is not None:
        names = ", ".join(data.classes[number] for number in data.confused)
        names = textwrap.shorten(names, 60, placeholder=" ...")
        count = f"{plural(len(data.confused), 'class')} ({names})" if names else "no class"
        lines.append(f"confused  {count} with a stronger RandAugment")
    if data.class_weights:
        lines.append(f"weights   {weights_text(data.class_weights, data.classes)} in the loss")
    kinds: dict[str, list[str]] = {}
    for kind, path in data.left_out:
        kinds.setdefault(kind, []).append(path)
    texts = [
        heif_pictures(len(paths))
        if kind == HEIF
        else f"{plural(len(paths), kind)} ({paths[0]}{', ...' if paths[1:] else ''})"
        for kind, paths in kinds.items()
    ]
    if texts:
        lines.append(f"left out  {', '.join(texts)}")
    return lines


def suspicions(data: ImageData, settings: Settings) -> list[str]:
    """A line on what looks wrong at first sight, and the command that looks closer; none if that
    was run.
    """
    place = settings.data_path
    if data.kind != "folder" or place is None or survey_folder(place).is_dir():
        return []
    counts = Counter(data.train.targets[index] for index in data.chosen)
    found = []
    most, fewest = max(counts, key=counts.get), min(counts, key=counts.get)
    if counts[most] >= UNEVEN * counts[fewest]:
        pair = f"{data.classes[most]} as of {data.classes[fewest]}"
        found.append(f"{counts[most] / counts[fewest]:.1f} times as many images of {pair}")
    if few := [data.classes[each] for each, count in counts.items() if count < FEW_IMAGES]:
        found.append(f"fewer than {FEW_IMAGES} images of {few[0]}")
    if strange := [path for kind, path in data.left_out if kind in STRANGE]:
        found.append(f"{plural(len(strange), 'thing')} among the images that are none")
    return [f"look      {', '.join(found)}: `data {place}` tells more"] if found else []
