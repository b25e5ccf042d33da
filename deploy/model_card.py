"""The model card: what a model is, how good it is, how it came about and how it is used, in
Markdown, below the header that Hugging Face reads.
"""

from __future__ import annotations

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
from split_affinity.reports.tables import tells_top5, without_top5
from split_affinity.text import code_span, shown

TEMPLATE = "model_card.md.jinja"
CLASSES_TO_LIST = 100
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


def header(title: str, data_name: str, row: dict[str, Any] | None) -> ModelCardData:
    """What Hugging Face reads of a card; `row` are the figures, if there are any. There is no
    license in it: that is for the owner of the pictures and the weights to say.
    """
    results = []
    if row:
        task = {"task_type": "image-classification", "dataset_type": "imagefolder"}
        results = [
            EvalResult(
                **task,
                dataset_name=data_name,
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(row[key] / 100, 6),
            )
            for name, key in (("top-1", "val_top1"), ("top-5", "val_top5"))
            if key in row
        ]
    return ModelCardData(
        model_name=title,
        library_name="onnx",
        pipeline_tag="image-classification",
        tags=["image-classification", "cpu", "train_split_affinity"],
        metrics=["accuracy"],
        eval_results=results or None,
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


def build_card(
    checkpoint: cp.Checkpoint, data: ImageData, files: Sequence[tuple[Path, str]], speed: str
) -> tuple[str, str]:
    """A model card's header and its body. `files` are those exported, each with what it is for;
    `speed` is what was measured of them, in Markdown, or empty.
    """
    row, images, classes = validation_row(checkpoint), len(data.val), checkpoint.classes
    if row and not tells_top5(len(classes)):
        row = without_top5(row)
    settings = checkpoint.trained.settings
    place = settings_to_go_on(checkpoint.state).data_path
    data_name = settings.dataset or (place.name if place else "images")
    title = f"{settings.model} on {data_name}"
    ends = Share(round(row["val_top1"] * images / 100), images).ends if row else ()
    body = template().render(
        title=title,
        model=settings.model,
        parameters=sum(weight.numel() for weight in checkpoint.model.parameters()),
        classes=classes[:CLASSES_TO_LIST],
        class_count=len(classes),
        guessing=100 / len(classes),
        row=row,
        interval=[100 * end for end in ends],
        images=images,
        data_name=data_name,
        ready=checkpoint.trained.ready,
        files=[(file.name, about, f"{file.stat().st_size / 1e6:,.1f} MB") for file, about in files],
        speed=speed,
        **told_of_training(checkpoint, data),
    )
    return f"---\n{header(shown(title), shown(data_name), row).to_yaml()}\n---\n", body
