"""Write the files of a demo page, ready to start here or to push as a Hugging Face Space."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import checkpoint as cp

from split_affinity.text import in_markdown, readable

with cp.needed_packages():
    from huggingface_hub import SpaceCard, SpaceCardData
    from PIL import Image

SOURCE = cp.HERE / "space"
PROGRAM = "app.py", "answers.py", "pictures.py", "threads.py", "uploads.py", "requirements.txt"
MODELS = "model.onnx", "model.int8.onnx"
LARGEST_EXAMPLE_PX = 1024
LARGE_FILES = "".join(
    f"{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("*.onnx", "*.png", "*.jpg")
)
UPLOAD = """
## This page

Here: `pip install -r requirements.txt && python app.py`, and open the address that it prints.

As a Hugging Face Space, after `pip install huggingface_hub` and `hf auth login`, in this folder:

```
hf repos create USER/NAME --repo-type space --space-sdk gradio
hf upload USER/NAME . . --repo-type space --exclude hf_space_link.txt
```
"""
LINK = """\
Once the page is uploaded, put its address here in place of these lines, such as
https://huggingface.co/spaces/USER/NAME
"""


def write_space(
    folder: Path,
    exported: Path,
    card: str,
    pictures: Sequence[tuple[str, Image.Image]],
    title: str,
) -> None:
    """Write the demo page of the models in the folder `exported` into an empty folder. `card` is
    the model card, Markdown without a header; `pictures` are examples (RGB) with their classes.
    """
    for name in PROGRAM:
        shutil.copyfile(SOURCE / name, folder / name)
    for name in MODELS:
        if (exported / name).exists():
            shutil.copyfile(exported / name, folder / name)
    files = {
        "README.md": read_me(one_line(title), card),
        ".gitattributes": LARGE_FILES,
        "hf_space_link.txt": LINK,
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_examples(folder / "examples", pictures)


def one_line(text: str) -> str:
    """Text without line breaks and other characters that do not show."""
    return " ".join("".join(c if c.isprintable() else " " for c in readable(text)).split())


def read_me(title: str, card: str) -> str:
    """The page's README: a header that Hugging Face reads, the title, which the page shows as well,
    the model card, and how the page is uploaded.
    """
    header = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=gradio_version(),
        app_file="app.py",
        pinned=False,
        license="mit",
    )
    body = card.strip()
    if not body.startswith("# "):
        body = f"# {in_markdown(title)}\n\n{body}"
    return str(SpaceCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n{UPLOAD}"))


def gradio_version() -> str:
    """The version of Gradio that is installed, or else the lowest that is safe for the page."""
    text = (SOURCE / "requirements.txt").read_text()
    known = [re.search(r"^gradio>=([\d.]+)", text, re.MULTILINE)[1]]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        known.append(importlib.metadata.version("gradio"))
    return max(known, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


def write_examples(folder: Path, pictures: Sequence[tuple[str, Image.Image]]) -> None:
    """Write example pictures into a new folder, each under its number and what of its class's name
    every file system takes; small ones as PNG, as they are.
    """
    folder.mkdir()
    for number, (name, picture) in enumerate(pictures, 1):
        is_small = max(picture.size) <= LARGEST_EXAMPLE_PX // 4
        safe = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
        path = folder / f"{number:02}-{safe}".rstrip("-")
        picture = picture.convert("RGB")
        picture.thumbnail((LARGEST_EXAMPLE_PX, LARGEST_EXAMPLE_PX))
        picture.save(f"{path}.{'png' if is_small else 'jpg'}", quality=92)
