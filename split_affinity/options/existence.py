"""What options name and does not exist: files, folders and models, without PyTorch."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from split_affinity.options.contradictions import is_name
from split_affinity.options.settings import BALANCED, Settings
from split_affinity.text import did_you_mean

TIMM = "timm/"  # the names of timm's models begin with it here
OWN_NAMES = ("resnet20", "resnet56", "hybrid", "hybrid-light", "hybrid-heavy")


def missing_early(command: str, settings: Settings, rank: int = 0) -> Iterator[str]:
    """What is wrong with names of models, files and folders, except for timm's models.

    The same messages would come after PyTorch is loaded.
    """
    names = torchvision_names()
    for flag, name in (("--model", settings.model), ("--teacher", settings.teacher)):
        if name and names and not name.startswith(TIMM):
            yield from unknown_model(name, [*OWN_NAMES, *names], flag)
    resume, weights = settings.resume, settings.teacher_weights
    # Rank 0 may be the only one that has the checkpoint.
    if not rank and resume not in (None, Path("auto")) and (fault := fault_of(resume)):
        reason = "no such checkpoint" if is_nowhere(fault) else f"cannot be read: {fault.strerror}"
        yield f"{resume}: {reason}"
    files = {"--machine": settings.machine, "--simulate": settings.simulate}
    if not resume:
        files["--init-from"] = settings.init_from
    if weights and not is_name(weights) and not settings.test_only:
        files["--teacher-weights"] = Path(weights)
    if settings.class_weights not in (None, BALANCED) and not settings.test_only:
        files["--class-weights"] = Path(settings.class_weights)
    for flag, path in files.items():
        if path and (fault := fault_of(path)):
            hint = did_you_mean(str(path), [BALANCED]) if flag == "--class-weights" else ""
            yield f"{flag} {path}: cannot be read: {fault.strerror}{hint}"
    yield from missing_places(command, settings, rank)


def missing_places(command: str, settings: Settings, rank: int = 0) -> Iterator[str]:
    """What is wrong with the places where a command reads images, or writes."""
    for text in settings.pictures:
        if not glob.has_magic(text) and (fault := fault_of(Path(text))):
            reason = "no such file or folder" if is_nowhere(fault) else fault.strerror
            yield f"{text}: {reason}"
    path = settings.data_path
    if path and command not in ("predict", "plan") and (fault := fault_of(path)):
        if not is_nowhere(fault):
            yield f"--data-path {path}: cannot be read: {fault.strerror}"
        elif not (settings.dataset or settings.download):  # these make it, or explain it later
            yield f"--data-path {path} does not exist; give an image folder: DIR/<class>/*.jpg"
    if rank:
        return  # only rank 0 writes
    trains, folder = command in ("train", "find-lr", "compare"), settings.output_dir
    files = {"--log-file": settings.log_file if trains else None}
    files |= {"--json": settings.json, "--csv": settings.csv, "--record": settings.record}
    for flag, path in files.items():
        for place in (path.parent, path) if path else ():
            fault = fault_of(place)
            made = place == path or (flag == "--log-file" and is_made_for(path, folder))
            if fault and not (made and is_nowhere(fault)):
                yield f"{flag} {path}: cannot be written: {fault.strerror}"
                break
    fault = fault_of(folder) if folder else None
    if fault and not is_nowhere(fault):
        yield f"--output-dir {folder}: cannot be written: {fault.strerror}"
    elif fault and trains:  # the folder will be made, unless a link leads nowhere
        for place in (folder, *folder.parents):
            if place.is_symlink() and not place.exists():
                reason = f"{place} is a link to {place.readlink()}, which does not exist"
                yield f"--output-dir {folder}: cannot be written: {reason}"


def is_made_for(log: Path, folder: Path | None) -> bool:
    """Whether a log lies in an output folder that is not there yet, and will be made."""
    inside = folder is not None and log.parent.absolute() == folder.absolute()
    return inside and is_nowhere(fault_of(folder))


def fault_of(path: Path) -> OSError | None:
    """Why a file cannot be looked at, or a folder not be listed and entered."""
    try:
        if path.is_dir():
            os.scandir(path).close()
            path = path / "."  # to enter it takes another permission than to list it
        path.stat()
    except OSError as error:
        return error
    return None


def is_nowhere(fault: OSError | None) -> bool:
    """Whether the reason is that nothing is there."""
    return isinstance(fault, (FileNotFoundError, NotADirectoryError))


def unknown_model(name: str, names: Collection[str], flag: str) -> Iterator[str]:
    """What is wrong with a model's name if it is none of `names`, with those most like it."""
    if name not in names:
        hint = did_you_mean(name, names, 0.4) or "; any torchvision classifier will do"
        yield f"{flag} {name}: unknown{hint}"


def torchvision_names() -> list[str]:
    """The names of torchvision's classifiers from its source; none if that cannot be found."""
    found = importlib.util.find_spec("torchvision")
    if not found or not found.origin:
        return []
    pattern = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    names: list[str] = []
    try:
        for file in sorted((Path(found.origin).parent / "models").glob("*.py")):
            names += pattern.findall(file.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return names if "resnet50" in names else []
