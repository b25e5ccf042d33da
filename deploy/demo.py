"""Write the files of a demo page, ready to start here or to push as a Hugging Face Space."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import checkpoint as cp
from formats import FORMATS, INT8_ABOUT, INT8_FILE
from model_card import license_keys

from split_affinity.text import in_markdown, plural, readable

with cp.needed_packages():
    from huggingface_hub import SpaceCard, SpaceCardData
    from PIL import Image

SOURCE = cp.HERE / "space"
PROGRAM = {
    "app.py": "the demo page, which it starts",
    "answers.py": "its answers",
    "pictures.py": "how it makes pictures ready",
    "threads.py": "with how many threads it computes",
    "uploads.py": "which files it may open",
    "page.css": "how it looks",
    "requirements.txt": "packages that it needs",
}
MODELS = {FORMATS["onnx"].file: FORMATS["onnx"].about, INT8_FILE: INT8_ABOUT}
EXAMPLES = "examples"
LARGEST_EXAMPLE_PX = 1024
LARGE_FILES = "".join(
    f"{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("*.onnx", "*.png", "*.jpg")
)
ENVIRONMENT = ".venv"  # of the page, in its folder, from which it is not uploaded
LOCAL = f"{ENVIRONMENT}/\n__pycache__/\n"
UPLOAD = """
## This page

Here, in this folder, with packages of its own (Gradio asks for an older Pillow than others do):

```
{start}
```

As a Hugging Face Space, after `pip install huggingface_hub` and `hf auth login`, in this folder:

```
{publish}
```

The page's own program (`app.py` and what it imports) has the MIT license, that of
train_split_affinity.py. This says nothing of the model, nor of pictures.
"""
LINK_FILE = "hf_space_link.txt"
LINK = """\
Once the page is uploaded, put its address here in place of these lines, such as
https://huggingface.co/spaces/USER/NAME
"""


def start_commands(folder: Path) -> list[str]:
    """Commands that start the page in a folder, with packages of its own: beside those of the
    trainer, Gradio would put an older Pillow in place of theirs.
    """
    venv, needed, program = (
        shlex.quote(str(folder / name)) for name in (ENVIRONMENT, "requirements.txt", "app.py")
    )
    install, start = f"{venv}/bin/pip install -r {needed}", f"{venv}/bin/python {program}"
    return [f"python3 -m venv {venv}", install, start]


def publish_commands(folder: Path, hf: str = "hf") -> list[str]:
    """Commands that push the page in a folder as a Space; `hf` is huggingface_hub's program, as it
    is typed.
    """
    kind, place = "--repo-type space", shlex.quote(str(folder))
    left_out = " ".join(f"--exclude {each}" for each in (LINK_FILE, f"'{ENVIRONMENT}/*'"))
    return [
        f"{hf} repos create USER/NAME {kind} --space-sdk gradio",
        f"{hf} upload USER/NAME {place} . {kind} {left_out}",
    ]


def write_program(
    folder: Path, exported: Path, pictures: Sequence[tuple[str, Image.Image]]
) -> None:
    """Write the demo page of the models in the folder `exported`, without its README, into an empty
    folder. `pictures` are examples (RGB) with their classes; there may be none.
    """
    for name in PROGRAM:
        shutil.copyfile(SOURCE / name, folder / name)
    for name in MODELS:
        if (exported / name).exists():
            shutil.copyfile(exported / name, folder / name)
    files = {".gitattributes": LARGE_FILES, ".gitignore": LOCAL, LINK_FILE: LINK}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if pictures:
        write_examples(folder / EXAMPLES, pictures)


def contents(folder: Path, before: Path) -> list[tuple[str, int, str]]:
    """The files of a page, for its card: name, bytes, and what each is for. `before` is the folder
    that it will be put into, which may exist: example pictures of other names stay there.
    """
    about = MODELS | PROGRAM | {LINK_FILE: "where the page is, once it is uploaded"}
    found = [(name, folder / name, told) for name, told in about.items()]
    told = [(name, path.stat().st_size, text) for name, path, text in found if path.exists()]
    places = (before / EXAMPLES, folder / EXAMPLES)
    if pictures := {each.name: each for place in places for each in place.glob("*")}:
        size_bytes = sum(each.stat().st_size for each in pictures.values())
        told.append((f"{EXAMPLES}/", size_bytes, f"{plural(len(pictures), 'picture')} to try"))
    return told


def write_read_me(folder: Path, title: str, card: str, license_name: str | None = None) -> None:
    """Write the page's README: a header that Hugging Face reads, the title, which the page shows as
    well, the model card (Markdown without a header), and how the page is started and uploaded.
    """
    title = one_line(title)
    header = SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="indigo",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=gradio_version(),
        app_file="app.py",
        pinned=False,
        **license_keys(license_name),
    )
    body = card.strip()
    if not body.startswith("# "):
        body = f"# {in_markdown(title)}\n\n{body}"
    start, publish = map("\n".join, (start_commands(Path()), publish_commands(Path())))
    end = UPLOAD.format(start=start, publish=publish)
    text = str(SpaceCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n{end}"))
    (folder / "README.md").write_text(text, encoding="utf-8")


def one_line(text: str) -> str:
    """Text without line breaks and other characters that do not show."""
    return " ".join("".join(c if c.isprintable() else " " for c in readable(text)).split())


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
