"""Write a checkpoint's model into files that run without its training script.

    python deploy/export.py out/digits/best.pt --output-dir exported
    python deploy/export.py out/digits/best.pt --output-dir exported --int8 --space hf_space

Every file is loaded again in a process of its own and compared with the checkpoint's model on real
images; files are put into the folder when all of them are right. Each has in it how pictures are
made ready and what the classes are called. The folder's README.md is a model card.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpoint as cp  # first: it finds the package that the others import from

# isort: split
from split_affinity.data.decoding import decoded
from split_affinity.data.pictures import BrokenImage, ImageData
from split_affinity.errors import RunError, Stopped, UserError, one_line
from split_affinity.options.values import whole_number
from split_affinity.terminal import say, say_lines
from split_affinity.text import plural

with cp.needed_packages():
    import demo
    import int8
    import model_card
    import numpy as np
    import speed
    import torch
    from formats import FORMATS, INT8_ABOUT, INT8_FILE
    from PIL import Image

LARGEST_DIFFERENCE = 1e-3  # of logits, relative to the largest of them
COMPARED_IMAGES = 64
EXAMPLES_AT_MOST = 100
PAGE = "hf_space"  # the folder of a page that is proposed


# ---- The comparison with the checkpoint's model --------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Validation images that every file is compared on: `images` (n, 3, size, size), made ready,
    and the model's own `logits` (n, classes) of them.
    """

    images: torch.Tensor
    logits: torch.Tensor


def spread(count: int, most: int) -> range:
    """At most so many indices, spread evenly over `count`."""
    return range(0, count, max(1, -(-count // most)))


def sample_images(checkpoint: cp.Checkpoint, data: ImageData, batch_size: int) -> Sample:
    """Validation images, spread evenly over all of them, and the logits of the model."""
    chosen = spread(len(data.val), COMPARED_IMAGES)
    images = torch.cat([each for each, _ in cp.batches(checkpoint, data.val, chosen, batch_size)])
    with torch.inference_mode():
        logits = torch.cat([checkpoint.model(each) for each in images.split(batch_size)])
    return Sample(images, logits)


def compare_logits(what: str, logits: torch.Tensor, sample: Sample) -> str:
    """In words how far a file's logits are from the model's. Raises RunError if that is more than
    rounding: another top-1, or a difference of a thousandth of the largest logit.
    """
    scale = sample.logits.abs().max().item() or 1.0
    difference = (logits - sample.logits).abs().max().item() / scale
    count, top1 = len(logits), sample.logits.argmax(1)
    others = (logits.argmax(1) != top1).nonzero().flatten()
    text = f"top-1 of {count - len(others)} of {plural(count, 'image')} equal, "
    text += f"largest difference {difference:.1e} of the largest logit"
    # Two classes of equal probability, to rounding, may change places.
    ties = torch.isclose(
        sample.logits[others, logits.argmax(1)[others]],
        sample.logits[others, top1[others]],
        rtol=0,
        atol=1e-5 * scale,
    )
    if not difference <= LARGEST_DIFFERENCE or not ties.all():
        raise RunError(f"{what}: {text}: not the model that was trained; nothing is kept")
    return text


def logits_elsewhere(kind: str, path: Path, images: torch.Tensor) -> torch.Tensor:
    """What a file makes of images, loaded in a process of its own. Raises RunError."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(given, images.numpy())
        command = [sys.executable, cp.HERE / "loading.py", kind, path, given, made]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RunError(f"{path.name}: cannot be loaded again: {reason}; nothing is kept")
        return torch.from_numpy(np.load(made))


def first_cause(error: BaseException) -> BaseException:
    """What an error came of in the end: exporters wrap the reason in what they were about."""
    while error.__cause__:
        error = error.__cause__
    return error


def write_format(kind: str, checkpoint: cp.Checkpoint, folder: Path, sample: Sample) -> str:
    """Write a file of one kind, and compare it. Raises RunError for a model that the format cannot
    hold, or if it is not the same.
    """
    path = folder / FORMATS[kind].file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about their own making
            FORMATS[kind].write(checkpoint, path)
    except Stopped:
        raise
    except Exception as error:  # PyTorch raises many kinds
        cause = first_cause(error)
        if isinstance(cause, MemoryError):
            raise cause from None  # whatever the model is
        model, reason = checkpoint.trained.settings.model, one_line(cause)
        raise RunError(f"{model} cannot be written as {kind}: {reason}; nothing is kept") from error
    return compare_logits(path.name, logits_elsewhere(kind, path, sample.images), sample)


# ---- A folder ------------------------------------------------------------------------------------


@contextlib.contextmanager
def filled(folder: Path, flag: str) -> Iterator[Path]:
    """An empty folder, whose files are put into `folder` in the end, in place of those of the same
    names; nothing is left of it, nor of folders made for it, if it does not come to that.

    Raises UserError for a folder that cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        except OSError as error:
            raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}") from None
        try:
            yield staged
            for file in sorted(each for each in staged.rglob("*") if each.is_file()):
                target = folder / file.relative_to(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        finally:
            shutil.rmtree(staged)
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                each.rmdir()


def calibration_images(
    checkpoint: cp.Checkpoint, data: ImageData, count: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Batches of training images, spread evenly over all, made ready as for validation."""
    chosen = [data.chosen[place] for place in spread(len(data.chosen), count)]
    for images, _ in cp.batches(checkpoint, data.train, chosen, batch_size):
        yield images.numpy()


def example_pictures(data: ImageData, count: int) -> list[tuple[str, Image.Image]]:
    """Validation pictures with the names of their classes: one of each of some classes, spread
    evenly over all, or several of each if there are fewer classes; none that cannot be read.
    """
    by_class: dict[int, list[int]] = {}
    for index, target in enumerate(cp.true_classes(data.val)):
        by_class.setdefault(target, []).append(index)
    first, *more = itertools.zip_longest(*(by_class[target] for target in sorted(by_class)))
    chosen = [first[place] for place in spread(len(first), count)]
    pictures = []
    for index in itertools.chain(chosen, *more):
        if index is None or len(pictures) == count:
            continue
        with contextlib.suppress(BrokenImage):
            picture, target = data.val[index]
            pictures.append((data.classes[target], decoded(picture)))
    return pictures


# ---- The command ---------------------------------------------------------------------------------


def parse_formats(text: str) -> tuple[str, ...]:
    """Names of formats, separated by commas; ONNX first, which other files are made of."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(
                f"no format {name!r} (choose from {', '.join(FORMATS)})"
            )
    return tuple(name for name in FORMATS if name in names)


def parse_examples(text: str) -> int:
    """How many example pictures a page has: a number, or 0 for `none`."""
    return 0 if text == "none" else whole_number(1, EXAMPLES_AT_MOST)(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cp.common_parser((__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="the folder for the files"
    )
    parser.add_argument(
        "--formats",
        type=parse_formats,
        default=",".join(FORMATS),
        metavar="LIST",
        help="the kinds of files, separated by commas (%(default)s)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help=f"also {INT8_FILE}, quantised, and what that costs and brings",
    )
    parser.add_argument(
        "--calibrate",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="training images to find the ranges of int8 with (%(default)s)",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="time torch.compile too, which takes minutes"
    )
    parser.add_argument(
        "--space",
        type=Path,
        metavar="DIR",
        help="also a folder with a demo page, ready to be pushed as a Hugging Face Space",
    )
    parser.add_argument(
        "--examples",
        type=parse_examples,
        metavar="N",
        help="validation pictures in that folder, for everybody to see: a number, or none (none)",
    )
    parser.add_argument(
        "--license",
        type=model_card.parse_license,
        metavar="NAME",
        help="the license of the weights for the cards, such as apache-2.0, or other:NAME; "
        "without it they say that it is open",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked against each other. Raises UserError."""
    asked = build_parser().parse_args(argv)
    for flag, needs in (("--int8", asked.int8), ("--space", asked.space)):
        if needs and "onnx" not in asked.formats:
            raise UserError(f"--formats {','.join(asked.formats)}: {flag} needs onnx among them")
    if asked.compiled and not asked.int8:
        raise UserError("--compiled: there is a comparison of speeds with --int8 alone")
    if asked.examples is not None and not asked.space:
        raise UserError(f"--examples {asked.examples or 'none'}: needs --space, the page's folder")
    if asked.space and asked.space.resolve() == asked.output_dir.resolve():
        raise UserError(f"--space {asked.space}: has to be another folder than --output-dir")
    return asked


def quantised(
    asked: argparse.Namespace, checkpoint: cp.Checkpoint, data: ImageData, folder: Path
) -> str:
    """Write the int8 file, and say what it costs and brings."""
    source, target = folder / FORMATS["onnx"].file, folder / INT8_FILE
    images = calibration_images(checkpoint, data, asked.calibrate, asked.batch_size)
    int8.quantize(source, target, images)
    say(f"{INT8_FILE}: calibrated; now every way to run the model is tested and timed")
    options = {"batch_size": asked.batch_size, "compiled": asked.compiled}
    return speed.compare(checkpoint, data, source, target, **options).text()


def export(
    asked: argparse.Namespace, checkpoint: cp.Checkpoint, data: ImageData, folder: Path
) -> str:
    """Write all files into an empty folder, the model card last, and say so; returns what was
    measured of them.
    """
    sample = sample_images(checkpoint, data, asked.batch_size)
    files = []
    for kind in asked.formats:
        say(f"{FORMATS[kind].file}: {write_format(kind, checkpoint, folder, sample)}")
        files.append((FORMATS[kind].file, FORMATS[kind].about))
    measured = ""
    if asked.int8:
        measured = quantised(asked, checkpoint, data, folder)
        say(f"\n{measured}\n")
        files.append((INT8_FILE, INT8_ABOUT))
    listed = [(name, (folder / name).stat().st_size, about) for name, about in files]
    header, card = model_card.build_card(checkpoint, data, listed, measured, asked.license)
    (folder / "README.md").write_text(header + card, encoding="utf-8")
    return measured


def write_page(
    asked: argparse.Namespace,
    checkpoint: cp.Checkpoint,
    data: ImageData,
    folders: tuple[Path, Path],
    measured: str,
) -> int:
    """Write a demo page of the files in the first of two folders into the second, which is empty;
    returns how many example pictures it has.
    """
    exported, page = folders
    pictures = example_pictures(data, asked.examples) if asked.examples else []
    demo.write_program(page, exported, pictures)
    listed = demo.contents(page, asked.space)
    _, card = model_card.build_card(checkpoint, data, listed, measured, asked.license)
    title = f"{checkpoint.trained.settings.model}: {', '.join(checkpoint.classes[:3])}"
    demo.write_read_me(page, title, card, asked.license)
    return len(pictures)


# ---- What is said in the end ---------------------------------------------------------------------


def from_here(path: Path) -> str:
    """A file's or program's path as it can be typed here."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 (a Python that is a link stays one)
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def told_of_files(folder: Path, made: Collection[str]) -> Iterator[str]:
    """What is in the folder, and what of it is none of the files `made` now."""
    yield f"files in {folder}: {', '.join(each.name for each in sorted(folder.iterdir()))}"
    known = {INT8_FILE, *(each.file for each in FORMATS.values())}
    if old := sorted(name for name in known.difference(made) if (folder / name).exists()):
        yield f"of an earlier export, and not in README.md: {', '.join(old)}"


def told_of_page(page: Path, examples: int) -> Iterator[str]:
    """Whether visitors see pictures, how the page is started, and how it is published."""
    place = shlex.quote(str(page))
    seen = len([*(page / demo.EXAMPLES).glob("*")])
    told = "none; --examples 5 puts five of your validation pictures"
    if examples:
        told = f"{examples} of your validation pictures"
    if seen > examples:
        told = f"{plural(seen, 'picture')}, {seen - examples} of them from before,"
    told += f" {'in' if seen else 'into'} {place}/, where everybody can see them"
    yield f"demo page in {page}; examples: {told}"
    yield f"next: {' && '.join(demo.start_commands(page))}"
    hf = Path(sys.executable).with_name("hf")
    program = from_here(hf) if hf.exists() else "hf"
    yield f"to publish it, after {program} auth login:"
    yield from (f"    {each}" for each in demo.publish_commands(page, program))


def proposed_page(argv: Sequence[str]) -> str:
    """The same command with a demo page, which is the next thing to try."""
    python, script = from_here(Path(sys.executable)), from_here(cp.HERE / "export.py")
    return f"next: {python} {script} {shlex.join([*argv, '--space', PAGE])}"


@cp.program
def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint."""
    asked = parse_arguments(argv)
    checkpoint = cp.read_checkpoint(asked.checkpoint)
    data = cp.open_images(checkpoint, asked.data_path)
    cp.use_allowed_cores()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(filled(asked.output_dir, "--output-dir"))
        page = asked.space and stack.enter_context(filled(asked.space, "--space"))
        measured = export(asked, checkpoint, data, folder)
        made = {each.name for each in folder.iterdir()}
        if page:
            examples = write_page(asked, checkpoint, data, (folder, page), measured)
    say_lines(told_of_files(asked.output_dir, made))
    if page:
        if not asked.int8:  # one of an earlier time would answer as another model
            (asked.space / INT8_FILE).unlink(missing_ok=True)
        say_lines(told_of_page(asked.space, examples))
    elif "onnx" in asked.formats and asked.output_dir.resolve() != Path(PAGE).resolve():
        say_lines([proposed_page(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
