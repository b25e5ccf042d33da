"""The `data` command: a look at all pictures before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from split_affinity import PROGRAM, __version__
from split_affinity.data.dataset import (
    choose_images,
    describe_data,
    find_data,
    with_native,
    with_validation,
)
from split_affinity.data.loader import Loader
from split_affinity.data.pictures import ImageData, kept_apart
from split_affinity.data.samples import EpochOrder
from split_affinity.errors import UserError
from split_affinity.files import check_appendable, write_whole
from split_affinity.inspection.findings import advised, find
from split_affinity.inspection.looks import Look, Looks, can_compare
from split_affinity.inspection.sheets import class_sheets, size_text, twin_pictures
from split_affinity.inspection.survey import TRAIN, VALIDATION, Seen, Survey, survey_figures
from split_affinity.inspection.twins import MOST_CROPPED
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import Topology
from split_affinity.options.recipes import survey_folder
from split_affinity.options.settings import Settings, as_options
from split_affinity.reports.page import SMALL_PX, Finding, page_template
from split_affinity.reports.page import SURVEY_PAGE as PAGE
from split_affinity.signals import StopRequest
from split_affinity.terminal import say_lines
from split_affinity.text import markdown_table, plural, readable, utc_now

FIGURES, TEMPLATE = "data.json", "data.html.jinja"
PICTURES_AT_ONCE = 8  # that a process looks at before it answers
ROWS_SHOWN = 20  # classes on the screen


@dataclass(frozen=True)
class Inspected:
    """What was seen, and the settings of the training that it suggests."""

    survey: Survey
    advised: Settings


def inspect(settings: Settings, topology: Topology) -> Inspected:
    """The `data` command: look at all pictures, print and write what was seen, and what to do."""
    data = with_validation(with_native(find_data(settings), settings), settings)
    data = dataclasses.replace(data, chosen=choose_images(data, settings))
    check_folder(settings.output_dir)
    say_lines(describe_data(data))
    survey = Survey(
        name_of(settings),
        data.classes,
        look_at_all(data, settings, topology),
        data.native.overruled(settings).image_size,
        [(kind, path_below(path, settings.data_path)) for kind, path in data.left_out],
        can_compare(),
    )
    findings, figures = find(survey, settings), survey_figures(survey)
    say_lines(["", *survey_lines(survey, figures), "", *finding_lines(findings)])
    train = training_settings(advised(survey, settings))
    write_survey(survey, data, settings, figures, findings, train)
    say_lines(["", f"files in {settings.output_dir}: {PAGE}, {FIGURES}"])
    return Inspected(survey, train)


def name_of(settings: Settings) -> str:
    """The name of the data, without the folders above it."""
    return readable(settings.dataset or survey_folder(settings.data_path).name)


def training_settings(settings: Settings) -> Settings:
    """The same settings for a training, which writes into a folder named after the data."""
    return dataclasses.replace(settings, output_dir=Path("out") / name_of(settings))


def path_below(path: str, folder: Path | None) -> str:
    """A path below the data's folder, to be shown."""
    with contextlib.suppress(ValueError):
        path = os.fspath(Path(path).relative_to(folder or ""))
    return readable(path)


def check_folder(folder: Path) -> None:
    """Raise UserError unless files can be written into a folder, which is made later."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        for name in (PAGE, FIGURES):
            check_appendable(folder / name, existing)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written: {error.strerror}") from None


def look_at_all(data: ImageData, settings: Settings, topology: Topology) -> list[Seen]:
    """A look at every picture, by one process for each core."""
    plan = plan_cores(topology, dataclasses.replace(settings, split="none", schedule="sequential"))
    cpus, stop = plan.forward.cpus, StopRequest()
    kept = set(kept_apart(data))
    parts = [(TRAIN, data.train)]
    if data.val is not None and not kept:
        parts.append((VALIDATION, data.val))
    total = sum(len(pictures) for _, pictures in parts)
    with_crops = total <= MOST_CROPPED
    tqdm.monitor_interval = 0  # no thread beside the processes
    seen = []
    with stop, tqdm(total=total, unit=" pictures", leave=False, disable=None) as bar:
        for part, pictures in parts:
            labels, root = pictures.targets, settings.data_path
            samples = getattr(pictures, "samples", ())
            for index, look in look_at_part(
                Looks(pictures, with_crops), cpus, plan.forward.threads, stop
            ):
                file = samples[index][0] if samples else f"{part} {index}"
                of_part = VALIDATION if index in kept else part
                path, found = path_below(file, root), (look, "")
                if isinstance(look, str):  # it is broken
                    why = look.removeprefix(f"broken image {file}: ")
                    found = None, readable(why.replace(file, path))
                seen.append(Seen(path, int(labels[index]), of_part, index, *found))
                bar.update()
    return seen


def look_at_part(
    looks: Looks, cpus: Sequence[int], processes: int, stop: StopRequest
) -> Iterator[tuple[int, Look | str]]:
    """The index of each picture with a look at it, or why it is broken."""
    order = EpochOrder(range(len(looks)), PICTURES_AT_ONCE, None)
    processes = min(processes, len(order))
    loader = Loader(looks, order, cpus, processes if processes > 1 else 0, 0, stop.check)
    order.begin(1)
    with contextlib.closing(loader):
        for some in loader:
            stop.check()
            yield from some


def survey_lines(survey: Survey, figures: dict[str, Any]) -> Iterator[str]:
    """What was seen, for the screen."""
    rows = sorted(survey.rows, key=lambda row: row.train)[:ROWS_SHOWN]
    cells = [
        (row.name, str(row.train), str(row.validation), f"{row.median_side or 0:g} px")
        for row in rows
    ]
    yield from markdown_table(("class", "train", "validate", "median side"), cells).split("\n")
    if len(rows) < len(survey.rows):
        yield f"(the {len(rows)} of {len(survey.rows)} classes with fewest pictures)"
    yield ""
    if sides := figures["shorter_side"]:
        yield (
            f"sizes     shorter side {sides['median']:g} px (median), {sides['smallest']} to "
            f"{sides['largest']}; {plural(len(survey.turned), 'picture')} turned by EXIF data"
        )
        kinds = (f"{kind} {pictures}" for kind, pictures in survey.modes.items())
        yield f"files     {', '.join(kinds)}"
    if survey.colours:
        mean, deviation = (",".join(f"{each:.3f}" for each in part) for part in survey.colours)
        yield f"colours   --mean {mean} --std {deviation}"
    alike = len(survey.twins)
    beside = f"; {survey.not_compared} not compared" if survey.not_compared else ""
    yield f"twins     {plural(alike, 'picture')} there twice or more, exactly or nearly{beside}"


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """What to do, for the screen."""
    for each in findings:
        yield f"- {each.title}: {each.figures}"
        if each.to_do:
            yield f"  -> {each.to_do}"


def write_survey(
    survey: Survey,
    data: ImageData,
    settings: Settings,
    figures: dict[str, Any],
    findings: Sequence[Finding],
    train: Settings,
) -> None:
    """Write data.json and data.html. Raises RunError."""
    # Others may read the files: they do not tell where things lie here.
    train = dataclasses.replace(train, data_path=train.data_path and Path(train.data_path.name))
    command = f"python {PROGRAM} {as_options(train)}"
    in_force = dataclasses.replace(settings, **vars(data.native.overruled(settings)))
    folder, version, made_at = settings.output_dir, f"{PROGRAM} {__version__}", utc_now()
    all_figures = figures | {
        "findings": [dataclasses.asdict(each) for each in findings],
        "next": command,
        "made_by": version,
        "made_at": made_at,
    }
    page = page_template(TEMPLATE, __package__).render(
        name=survey.name,
        count=len(survey.seen),
        figures=figures,
        findings=findings,
        to_do=sum(bool(each.to_do) for each in findings),
        next=command,
        twins=twin_pictures(survey, data),
        sheets=class_sheets(survey, data, in_force),
        image_size=survey.image_size,
        recipe=settings.recipe,
        small=survey.image_size <= SMALL_PX,
        most=max((bar.pictures for bar in survey.bars), default=0),
        broken=[f"{each.path}: {each.fault}" for each in survey.broken],
        tiny=[size_line(each) for each in survey.tiny],
        huge=[size_line(each) for each in survey.huge],
        left_out=[f"{path} ({kind})" for kind, path in survey.left_out],
        made_by=version,
        made_at=made_at,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FIGURES, json.dumps(all_figures, indent=1) + "\n")
    write_whole(folder / PAGE, readable(page))


def size_line(seen: Seen) -> str:
    """A picture's path and its size in pixels."""
    return f"{seen.path}: {size_text(seen)}"
