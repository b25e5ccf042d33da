"""What options name and is not there: files, folders and models, looked for without PyTorch."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from split_affinity.options.contradictions import is_name
from split_affinity.options.settings import Settings
from split_affinity.text import nearest

TIMM = "timm/"  # what the names of timm's models begin with here
OWN_NAMES = ("resnet20", "resnet56", "hybrid", "hybrid-light", "hybrid-heavy")


def missing_early(command: str, settings: Settings, rank: int = 0) -> Iterator[str]:
    """What is wrong with models, files and folders of those names, as far as a look tells that: all
    that would be said in the same words once PyTorch is there, but for timm's models.
    """
    names = torchvision_names()
    for flag, name in (("--model", settings.model), ("--teacher", settings.teacher)):
        if name and names and not name.startswith(TIMM):
            yield from unknown_model(name, [*OWN_NAMES, *names], flag)
    if not rank:  # which may alone have the checkpoint
        yield from missing_checkpoint(settings)
    yield from missing_weights(settings)
    yield from missing_places(command, settings, rank)


def missing_places(command: str, settings: Settings, rank: int = 0) -> Iterator[str]:
    """What is wrong with the places that a command reads images from, and those it writes to."""
    yield from missing_images(command, settings)
    if not rank:  # which alone writes
        yield from missing_outputs(command, settings)


def fault_of(path: Path) -> OSError | None:
    """Why a file cannot be looked at, or a folder not be gone through, if so."""
    try:
        if path.is_dir():
            os.scandir(path).close()
            path = path / "."  # to get there takes another permission than to list names
        path.stat()
    except OSError as error:
        return error
    return None


def is_nowhere(fault: OSError) -> bool:
    """Whether there is nothing, and no other reason."""
    return isinstance(fault, (FileNotFoundError, NotADirectoryError))


def missing_checkpoint(settings: Settings) -> Iterator[str]:
    """What is wrong with the file of `--resume`."""
    path = settings.resume
    if path not in (None, Path("auto")) and (fault := fault_of(path)):
        reason = "no such checkpoint" if is_nowhere(fault) else f"cannot be read: {fault.strerror}"
        yield f"{path}: {reason}"


def missing_weights(settings: Settings) -> Iterator[str]:
    """What is wrong with files of weights, or of a machine."""
    weights = settings.teacher_weights
    begins = settings.init_from if not settings.resume else None
    teacher = Path(weights) if weights and not is_name(weights) and not settings.test_only else None
    files = {"--init-from": begins, "--teacher-weights": teacher, "--machine": settings.machine}
    for flag, path in files.items():
        if path and (fault := fault_of(path)):
            yield f"{flag} {path}: cannot be read: {fault.strerror}"


def missing_images(command: str, settings: Settings) -> Iterator[str]:
    """What is wrong with pictures to ask for, or with the folder of a data set."""
    for text in settings.pictures:
        if not glob.has_magic(text) and (fault := fault_of(Path(text))):
            reason = "no such file or folder" if is_nowhere(fault) else fault.strerror
            yield f"{text}: {reason}"
    path, later = settings.data_path, settings.dataset or settings.download  # may be made, or told
    fault = fault_of(path) if path and command not in ("predict", "plan") else None
    if fault and is_nowhere(fault) and not later:
        yield f"--data-path {path} does not exist; give an image folder: DIR/<class>/*.jpg"
    elif fault and not is_nowhere(fault):
        yield f"--data-path {path}: cannot be read: {fault.strerror}"


def missing_outputs(command: str, settings: Settings) -> Iterator[str]:
    """What cannot be written of what a command writes, whatever is in its folder."""
    trains, folder = command in ("train", "find-lr", "compare"), settings.output_dir
    files = {"--log-file": settings.log_file if trains else None}
    files |= {"--json": settings.json, "--record": settings.record}
    for flag, path in files.items():
        if path and (fault := fault_of(path.parent) or long_name(path)):
            yield f"{flag} {path}: cannot be written: {fault.strerror}"
    if folder and (fault := fault_of(folder)) and (trains or not is_nowhere(fault)):
        if not is_nowhere(fault):
            yield f"--output-dir {folder}: cannot be written: {fault.strerror}"
        for place in (folder, *folder.parents) if is_nowhere(fault) else ():
            if place.is_symlink() and not place.exists():
                reason = f"{place} is a link to {place.readlink()}, which does not exist"
                yield f"--output-dir {folder}: cannot be written: {reason}"


def long_name(path: Path) -> OSError | None:
    """Why there can be no file of that name, if so."""
    fault = fault_of(path)
    return fault if fault and not is_nowhere(fault) else None


def unknown_model(name: str, names: Collection[str], flag: str) -> Iterator[str]:
    """What is wrong with a model's name, and which are most like it, if it is none of `names`."""
    if name not in names:
        hint = nearest(name, names, 0.4) or "; any torchvision classifier will do"
        yield f"{flag} {name}: unknown{hint}"


def torchvision_names() -> list[str]:
    """The names of torchvision's classifiers, as its source has them; none if that is not there, or
    is not as it was.
    """
    found = importlib.util.find_spec("torchvision")
    place = Path(found.origin).parent / "models" if found and found.origin else Path()
    known = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    names: list[str] = []
    try:
        for file in sorted(place.glob("*.py")) if place.name else ():
            names += known.findall(file.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return names if "resnet50" in names else []
