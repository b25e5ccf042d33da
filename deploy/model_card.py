"""The model card: what a model is, how good it is, how it came about and how it is used, in
Markdown, below the header that Hugging Face reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint as cp
import jinja2
from figures import Share
from huggingface_hub import EvalResult, ModelCardData

from split_affinity.checkpoints.state import settings_to_go_on
from split_affinity.data.pictures import ImageData
from split_affinity.options.recipes import recipe_defaults
from split_affinity.options.settings import BALANCED, Settings, as_options
from split_affinity.reports.tables import tells_top5
from split_affinity.text import code_span, did_you_mean, shown

TEMPLATE = "model_card.md.jinja"
CLASSES_TO_LIST = 100
# As Hugging Face names them; others of its list, and others altogether, are OTHER.
LICENSES = (
    *(
        "apache-2.0",
        "mit",
        "bsd-3-clause",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
        "openrail",
    ),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0"),
    "cc-by-nc-nd-4.0",
)
OTHER = "other:"
# Settings that name a place on the machine that trained: nobody else's business.
PLACES = (
    "data_path",
    "output_dir",
    "log_file",
    "mirror",
    "teacher_weights",
    "augment_confused",
    "resume",
)


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, in a line: names of classes come from folders."""
    line = html.escape(" ".join(shown(str(text)).split()), quote=False)
    line = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", line)
    return re.sub(r"^(\d+)\.", r"\1\\.", line)  # no list


def parse_license(text: str) -> str:
    """A license's name: one that Hugging Face knows, or another one behind `other:`."""
    if text in LICENSES or re.fullmatch(rf"{OTHER}[a-z0-9][a-z0-9.-]{{0,59}}", text):
        return text
    known = f"choose from {', '.join(LICENSES)}, or {OTHER}NAME, of small letters, digits, - and ."
    raise argparse.ArgumentTypeError(
        f"no license {text!r} is known{did_you_mean(text, LICENSES)} ({known})"
    )


def license_keys(name: str | None) -> dict[str, str]:
    """What the header that Hugging Face reads has of a license; nothing without one."""
    if name and name.startswith(OTHER):
        return {"license": "other", "license_name": name.removeprefix(OTHER)}
    return {"license": name} if name else {}


def validation_row(checkpoint: cp.Checkpoint) -> dict[str, Any] | None:
    """The figures of the epoch that a checkpoint was saved after: a row of its history. None for
    one from the middle of an epoch, or of a run that did not validate.
    """
    progress = checkpoint.state["progress"]
    row = progress["history"][-1] if progress["history"] else None
    return row if row and not progress["batches"] and row["val_top1"] is not None else None


def recipe(given: Settings) -> str:
    """The options of the training as they are typed, without the machine's own folders."""
    defaults = Settings()
    if given.recipe:
        defaults = dataclasses.replace(defaults, **recipe_defaults(given.recipe))
    public = {name: getattr(defaults, name) for name in PLACES}
    if given.class_weights != BALANCED:
        public["class_weights"] = None  # a file
    if given.init_from:
        public["init_from"] = Path(given.init_from.name)
    return as_options(cp.public_settings(dataclasses.replace(given, **public)))


def figures_of(row: dict[str, Any], class_count: int) -> dict[str, float]:
    """The accuracies that say something, in percent, by name."""
    best = {"top-5": row["val_top5"]} if tells_top5(class_count) else {}
    return {"top-1": row["val_top1"], **best}


def header(
    title: str, data_name: str, figures: dict[str, float], license_name: str | None
) -> ModelCardData:
    """What Hugging Face reads of a card; `figures` are accuracies in percent, if there are any. The
    owner of the pictures and the weights says which license is in it, or none.
    """
    results = []
    if figures:
        task = {"task_type": "image-classification", "dataset_type": "imagefolder"}
        results = [
            EvalResult(
                **task,
                dataset_name=data_name,
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(value / 100, 6),
            )
            for name, value in figures.items()
        ]
    return ModelCardData(
        model_name=title,
        library_name="onnx",
        pipeline_tag="image-classification",
        tags=["image-classification", "cpu", "train_split_affinity"],
        metrics=["accuracy"],
        eval_results=results or None,
        **license_keys(license_name),
    )


def template() -> jinja2.Template:
    """The card's template; names of classes and of data are to be led through `markdown`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(cp.HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is not HTML
    )
    environment.filters |= {"markdown": escaped, "code": code_span}
    return environment.get_template(TEMPLATE)


def told_of_training(checkpoint: cp.Checkpoint, data: ImageData) -> dict[str, Any]:
    """What the card says of how the model came about."""
    state, given = checkpoint.state, cp.settings_as_given(checkpoint.state, data.native)
    names = "torch", "torchvision"
    return {
        "train_images": (state.get("data") or {}).get("images"),
        "epochs": state["progress"]["epoch"],
        "steps": state["progress"]["step"],
        "recipe": recipe(given),
        "precision": checkpoint.trained.settings.precision,
        "averaged": state["average"] is not None,
        "versions": {name: state["versions"][name] for name in names},
    }


def size_text(size_bytes: int) -> str:
    """The size of a file, for people."""
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"


def build_card(
    checkpoint: cp.Checkpoint,
    data: ImageData,
    files: Sequence[tuple[str, int, str]],
    speed: str,
    license_name: str | None = None,
) -> tuple[str, str]:
    """A model card's header and its body. `files` are those beside it: name, bytes, and what it is
    for. `speed` is what was measured of models, in Markdown, or empty.
    """
    row, images, classes = validation_row(checkpoint), len(data.val), checkpoint.classes
    settings = checkpoint.trained.settings
    place = settings_to_go_on(checkpoint.state).data_path
    data_name = settings.dataset or (place.name if place else "images")
    title = f"{settings.model} on {data_name}"
    ends = Share(round(row["val_top1"] * images / 100), images).ends if row else ()
    figures = figures_of(row, len(classes)) if row else {}
    body = template().render(
        title=title,
        model=settings.model,
        parameters=sum(weight.numel() for weight in checkpoint.model.parameters()),
        classes=classes[:CLASSES_TO_LIST],
        class_count=len(classes),
        guessing=100 / len(classes),
        row=row,
        figures=figures,
        interval=[100 * end for end in ends],
        images=images,
        data_name=data_name,
        ready=checkpoint.trained.ready,
        files=[(name, about, size_text(size_bytes)) for name, size_bytes, about in files],
        has_onnx="model.onnx" in {name for name, *_ in files},
        license_name=license_name and license_name.removeprefix(OTHER),
        speed=speed,
        **told_of_training(checkpoint, data),
    )
    told = header(shown(title), shown(data_name), figures, license_name)
    return f"---\n{told.to_yaml()}\n---\n", body
