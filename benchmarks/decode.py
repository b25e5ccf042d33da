"""What does it take to decode a photograph: which decoder, and at which part of its size?

    python benchmarks/decode.py

Makes photographs of 12, 3 and 0.2 megapixels from scikit-learn's two sample images, enlarged, with
some noise, so that the large ones have 3 MB as those of a phone. Each decoder that is installed
(simplejpeg and PyTurboJPEG may be) decodes all of them on one thread, round by round. Printed is
the CPU time of one picture in milliseconds: the median of the rounds, and their range. The last
lines are whole training samples (crop of 224 px, normalised), as the loaders make them.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity.data.decoding import SCALES, picture_reader
from split_affinity.data.pictures import ImageData
from split_affinity.data.transforms import training_transform
from split_affinity.options.settings import Settings
from split_affinity.text import markdown_table

# Megapixels, sides in pixels, deviation of the noise.
SIZES = (("12", (4000, 3000), 6), ("3", (2000, 1500), 4), ("0.2", (500, 375), 1))
ROUND_S = 0.3  # a round of small pictures repeats them for so long

Decoder = Callable[[str, bytes], object]


def make_pictures(folder: Path, sides: tuple[int, int], noise: float) -> list[str]:
    """The paths of two photographs that were enlarged."""
    from sklearn.datasets import load_sample_images

    draw, paths = np.random.default_rng(0), []
    for number, pixels in enumerate(load_sample_images().images):
        values = np.asarray(Image.fromarray(pixels).resize(sides, Image.Resampling.LANCZOS))
        values = values + draw.normal(0, noise, values.shape)
        path = folder / f"{sides[0]}-{number}.jpg"
        Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(path, quality=92)
        paths.append(str(path))
    return paths


def by_pillow(scale: int, path: str, content: bytes) -> None:
    """Pillow, at one part in `scale` of the sides."""
    with Image.open(path) as picture:
        if scale > 1:
            picture.draft(None, (picture.width // scale, picture.height // scale))
        picture.load()


def by_torchvision(path: str, content: bytes) -> None:
    """torchvision, which knows no other size."""
    torchvision.io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def by_simplejpeg(scale: int, path: str, content: bytes) -> None:
    """simplejpeg, at one part in `scale` of the sides."""
    import simplejpeg

    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    least = {"min_height": height // scale, "min_width": width // scale, "min_factor": 1}
    simplejpeg.decode_jpeg(content, **(least if scale > 1 else {}))


def by_turbojpeg(decoder: object, scale: int, path: str, content: bytes) -> None:
    """PyTurboJPEG, at one part in `scale` of the sides."""
    decoder.decode(content, scaling_factor=(1, scale))


def as_sample(transform: Callable, read: Callable, path: str, content: bytes) -> None:
    """A training sample, as a loader makes it."""
    transform(read(path))


def decoders() -> dict[str, Decoder]:
    """What is installed, by its name in the table."""
    found: dict[str, Decoder] = {}
    scales = (1, *reversed(SCALES))
    for scale in scales:
        found[f"Pillow, 1/{scale}"] = partial(by_pillow, scale)
    found["torchvision, 1/1"] = by_torchvision
    for name in ("simplejpeg", "turbojpeg"):
        try:
            module = importlib.import_module(name)
            decode = by_simplejpeg
            if name == "turbojpeg":
                decode = partial(by_turbojpeg, module.TurboJPEG())
        except (ImportError, RuntimeError, OSError) as error:  # without the system's library
            print(f"{name} is left out: {error}")
            continue
        found |= {f"{name}, 1/{scale}": partial(decode, scale) for scale in scales}
    transform = training_transform(ImageData("folder", None, None, ("a", "b")), Settings(), 224)
    for full in (True, False):
        name = f"sample{', --full-decode' if full else ''}"
        found[name] = partial(as_sample, transform, picture_reader(full))
    return found


def cpu_ms(decode: Decoder, pictures: list[tuple[str, bytes]]) -> float:
    """CPU time of one picture in milliseconds."""
    begin_s, count, enough_s = time.process_time(), 0, time.perf_counter() + ROUND_S
    while not count or time.perf_counter() < enough_s:
        for path, content in pictures:
            decode(path, content)
            count += 1
    return 1e3 * (time.process_time() - begin_s) / count


def main(rounds: int) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found = decoders()
    rows = {name: [name] for name in found}
    with tempfile.TemporaryDirectory() as folder:
        for _, sides, noise in SIZES:
            paths = make_pictures(Path(folder), sides, noise)
            pictures = [(path, Path(path).read_bytes()) for path in paths]
            taken: dict[str, list[float]] = {name: [] for name in found}
            for turn in range(rounds + 1):
                for name, decode in found.items():
                    torch.manual_seed(turn)  # the same crops for all
                    ms = cpu_ms(decode, pictures)
                    if turn:  # the first one warms up
                        taken[name].append(ms)
            for name, each in taken.items():
                median = statistics.median(each)
                rows[name].append(f"{median:.3g} ({min(each):.3g}-{max(each):.3g})")
    head = ["ms of one core", *(f"{size} megapixels" for size, _, _ in SIZES)]
    print(markdown_table(head, [*rows.values()]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed (default: 5)")
    main(parser.parse_args().rounds)
