"""Which changes to a picture the command `data` sees through, and which it does not.

    python benchmarks/twins.py FOLDER

Each picture of the folder (a large one is cut into tiles, so that few are enough) is changed in
many ways. A changed one is found if `data` would name it and its original as the same. Pairs of
different pictures that it would name, wrongly, are counted too.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from split_affinity.data.pictures import find_pictures, load_image
from split_affinity.inspection.looks import Look, look_at
from split_affinity.inspection.twins import group_pictures
from split_affinity.text import markdown_table, percent, plural

TILE_PX = 240
Change = Callable[[Image.Image], Image.Image]


def saved_again(quality: int) -> Change:
    """As a JPEG of a quality."""

    def change(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def resized(times: float) -> Change:
    """With so many times the sides."""
    return lambda picture: picture.resize([max(1, round(side * times)) for side in picture.size])


def enhanced(kind: type, factor: float) -> Change:
    """Brighter, of more contrast, or more colourful by a factor."""
    return lambda picture: kind(picture).enhance(factor)


def cropped(kept: float) -> Change:
    """A part with so much of both sides, from anywhere in the picture."""

    def change(picture: Image.Image) -> Image.Image:
        draw = random.Random(picture.tobytes()[:1000])
        width, height = (int(side * kept) for side in picture.size)
        left, top = draw.randint(0, picture.width - width), draw.randint(0, picture.height - height)
        return picture.crop((left, top, left + width, top + height))

    return change


def captioned(picture: Image.Image) -> Image.Image:
    """With a line of text near its lower edge."""
    picture = picture.copy()
    size = max(8, picture.height // 12)
    place = size // 2, picture.height - 3 * size // 2
    ImageDraw.Draw(picture).text(place, "(c) A. Photographer", fill="white", font_size=size)
    return picture


def framed(picture: Image.Image) -> Image.Image:
    """With a black border of 3 % of its width."""
    return ImageOps.expand(picture, max(1, picture.width * 3 // 100), "black")


CHANGES: dict[str, Change] = {
    "copied": lambda picture: picture.copy(),
    "saved as JPEG, quality 90": saved_again(90),
    "saved as JPEG, quality 50": saved_again(50),
    "saved as JPEG, quality 10": saved_again(10),
    "half the size": resized(1 / 2),
    "a quarter of the size": resized(1 / 4),
    "twice the size": resized(2),
    "made square of 4:3": lambda picture: picture.resize((picture.width, picture.height * 3 // 4)),
    "brightness -50 %": enhanced(ImageEnhance.Brightness, 0.5),
    "brightness +20 %": enhanced(ImageEnhance.Brightness, 1.2),
    "brightness +50 %": enhanced(ImageEnhance.Brightness, 1.5),
    "contrast -30 %": enhanced(ImageEnhance.Contrast, 0.7),
    "contrast +30 %": enhanced(ImageEnhance.Contrast, 1.3),
    "grey": lambda picture: ImageOps.grayscale(picture).convert("RGB"),
    "blurred by 2 px": lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
    "with a caption": captioned,
    "mirrored": ImageOps.mirror,
    "cropped to 98 % of its sides": cropped(0.98),
    "cropped to 95 %": cropped(0.95),
    "cropped to 90 %": cropped(0.90),
    "cropped to 80 %": cropped(0.80),
    "tilted by 2 degrees": lambda picture: picture.rotate(2, Image.Resampling.BICUBIC),
    "with a border of 3 %": framed,
    "turned by 90 degrees": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
}


def tiles(picture: Image.Image) -> list[Image.Image]:
    """A picture cut into squares, those that are whole; itself if it is smaller."""
    places = [range(0, side - TILE_PX + 1, TILE_PX) for side in picture.size]
    boxes = [(left, top, left + TILE_PX, top + TILE_PX) for left in places[0] for top in places[1]]
    return [picture.crop(box) for box in boxes] or [picture]


def are_twins(first: Look, second: Look) -> bool:
    """Whether `data` would name two pictures as the same."""
    return bool(group_pictures([first, second]))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", help="pictures that are all different")
    asked = parser.parse_args(argv)
    pictures = [tile for path in find_pictures(asked.folder)[0] for tile in tiles(load_image(path))]
    looks = [look_at(picture, "RGB") for picture in pictures]
    print(f"{plural(len(pictures), 'picture')}\n")
    rows = []
    for name, change in CHANGES.items():
        pairs = zip(looks, pictures, strict=True)
        found = sum(are_twins(look, look_at(change(each), "RGB")) for look, each in pairs)
        rows.append((name, percent(found / len(pictures))))
    print(markdown_table(("change", "found"), rows))
    wrong = sum(len(group) - 1 for group in group_pictures(looks))
    pairs = len(looks) * (len(looks) - 1) // 2
    print(f"\nwrongly joined: {wrong} of {plural(pairs, 'pair')} of different pictures")


if __name__ == "__main__":
    main()
