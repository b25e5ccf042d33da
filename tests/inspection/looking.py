"""Pictures and looks that the tests of inspection share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from split_affinity.inspection.looks import Look, look_at
from split_affinity.inspection.survey import TRAIN, Seen, Survey

SIDE = 213  # of the parts of a photograph: 427 x 640 pixels have six


def parts_of_photographs() -> list[Image.Image]:
    """Twelve pictures that are all different, of scikit-learn's two photographs."""
    parts = []
    for pixels in load_sample_images().images:
        picture = Image.fromarray(pixels)
        for left in (0, SIDE, 2 * SIDE):
            parts += [picture.crop((left, top, left + SIDE, top + SIDE)) for top in (0, SIDE)]
    return parts


def noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A picture of coarse noise."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def look(seed: int, **changes: object) -> Look:
    """A look at a picture of noise; the `changes` are of what was seen."""
    found = look_at(noise(seed), "RGB", "JPEG", with_crops=False)
    return Look(**(vars(found) | changes))


def seen(
    number: int, label: int = 0, part: str = TRAIN, look: Look | None = None, fault: str = ""
) -> Seen:
    """A picture of the data, broken without a look."""
    return Seen(f"{'abc'[label]}/{number:03}.jpg", label, part, number, look, fault)


def survey(pictures: list[Seen], image_size: int = 64, **changes: object) -> Survey:
    """Pictures of three classes."""
    return Survey("photos", ("a", "b", "c"), pictures, image_size, **changes)


def save(picture: Image.Image, path: Path, **options: object) -> Path:
    """Write a picture, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path
