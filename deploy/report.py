"""Write what a checkpoint's model has learnt as one HTML file that can be opened anywhere.

    python deploy/report.py out/digits/best.pt --output report.html

The validation images go through the model once, in fp32: how good it is and how sure of that one
can be, which classes it confuses, what in a picture speaks for a class (Grad-CAM), how it was
trained, and what to do next. Pictures, style and script are inside the file; nothing is loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint as cp  # first: it finds the package that the others import from

# isort: split
import advice
import charts
import feature_maps
import figures
import next_steps
import run_records

from split_affinity.checkpoints.state import SavedState, best_epoch, saved_settings, versions
from split_affinity.data.pictures import ImageData
from split_affinity.data.transforms import as_picture
from split_affinity.errors import UserError
from split_affinity.files import check_appendable, followed, write_where_asked
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.settings import as_options
from split_affinity.options.values import whole_number
from split_affinity.reports.confusion import confused_json, images_by_class, worst_pairs
from split_affinity.reports.page import SMALL_PX, data_uri, page_template
from split_affinity.reports.tables import METRICS, PARTS
from split_affinity.runs.evaluation import warn_of_known_images
from split_affinity.terminal import say, say_lines
from split_affinity.text import option_text, plural, readable, utc_now
from split_affinity.training.network import Confusion

with cp.needed_packages():
    import heat_maps
    import jinja2
    import torch
    from PIL import Image
    from torch.utils.data import Dataset, Subset
    from tqdm import tqdm

TEMPLATE = "report.html.jinja"
PER_CLASS = 20  # at most, or the file gets too large to be sent
SHOWN_CLASSES, SHOWN_PAIRS, SHOWN_OF_PAIR = 20, 6, 3
MATRIX_CLASSES, LISTED_CLASSES = 20, 1000
THUMBNAIL_PX = 160


# ---- What the model makes of the validation images -----------------------------------------------


def judge_images(checkpoint: cp.Checkpoint, pictures: Dataset, batch_size: int) -> figures.Judged:
    """What the model makes of all pictures that can be read, in fp32."""
    true, parts = torch.tensor(cp.true_classes(pictures)), []
    bar = tqdm(total=len(pictures), unit=" images", leave=False, disable=None)
    with bar, torch.inference_mode():
        for images, numbers in cp.batches(checkpoint, pictures, range(len(pictures)), batch_size):
            parts.append(figures.judge(checkpoint.model(images), true[numbers], numbers))
            bar.update(len(images))
    return figures.combine_judged(parts)


def find_layer(
    checkpoint: cp.Checkpoint, asked: str | None
) -> tuple[feature_maps.MapLayer | None, str]:
    """The layer that heat maps are made of, or else why there are none. Raises UserError for one
    that was asked for and will not do.
    """
    try:
        return feature_maps.find_map_layer(checkpoint, asked), ""
    except UserError as error:
        if asked:
            raise
        return None, str(error)


# ---- Pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A picture in the report: data URIs of what the model saw and of what spoke for the classes
    named beside, the right and the predicted class with their probabilities, and its file.
    """

    picture: str
    overlays: Sequence[tuple[str, str]]
    true: str
    predicted: str
    p_true: float
    p_predicted: float
    place: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is."""
        return self.true == self.predicted


def thumbnail(picture: Image.Image) -> Image.Image:
    """A picture of about the size that it is shown in; the pixels of small ones stay visible."""
    times = THUMBNAIL_PX // picture.width
    if times:
        return picture.resize((times * picture.width,) * 2, Image.Resampling.NEAREST)
    return picture.resize((THUMBNAIL_PX,) * 2, Image.Resampling.LANCZOS)


def place_of(pictures: Dataset, number: int) -> str:
    """A picture's file, with the folder that it is in; empty if it is not in a file of its own."""
    if isinstance(pictures, Subset):
        return place_of(pictures.dataset, pictures.indices[number])
    samples = getattr(pictures, "samples", ())
    return "/".join(Path(samples[number][0]).parts[-2:]) if samples else ""


@dataclass(frozen=True)
class Gallery:
    """What pictures of the report are made from; without a layer there are no heat maps."""

    checkpoint: cp.Checkpoint
    pictures: Dataset
    judged: figures.Judged
    layer: feature_maps.MapLayer | None

    def show(self, rows: Iterable[int], batch_size: int) -> dict[int, Shown]:
        """The pictures of these rows of what was judged, by row."""
        row_of = {self.judged.numbers[row].item(): row for row in rows}
        shown: dict[int, Shown] = {}
        if not row_of:
            return shown
        with tqdm(total=len(row_of), unit=" heat maps", leave=False, disable=None) as bar:
            chosen = sorted(row_of)
            for images, numbers in cp.batches(self.checkpoint, self.pictures, chosen, batch_size):
                batch = [row_of[number] for number in numbers.tolist()]
                shown |= self._show_batch(images, batch)
                bar.update(len(batch))
        return shown

    def _show_batch(self, images: torch.Tensor, rows: Sequence[int]) -> dict[int, Shown]:
        """The pictures of images (n, 3, size, size), each with a heat map for the predicted class,
        and for the right one if that is another.
        """
        seen = [as_picture(image, self.checkpoint.trained.ready) for image in images]
        overlays: dict[int, list[tuple[str, str]]] = {row: [] for row in rows}
        if self.layer:
            asked = [(at, each) for at, row in enumerate(rows) for each in self._classes_of(row)]
            places, classes = zip(*asked, strict=True)
            model, repeated = self.checkpoint.model, images[list(places)]
            maps = heat_maps.grad_cam(model, self.layer, repeated, classes)
            for place, index, each in zip(places, classes, maps, strict=True):
                drawn = self._overlay(seen[place], each)
                overlays[rows[place]].append((self.checkpoint.classes[index], drawn))
        return {row: self._shown(row, seen[at], overlays[row]) for at, row in enumerate(rows)}

    def _classes_of(self, row: int) -> list[int]:
        """The predicted and the right class, once if they are the same."""
        return list(dict.fromkeys((int(self.judged.predicted[row]), int(self.judged.true[row]))))

    def _overlay(self, picture: Image.Image, found: torch.Tensor) -> str:
        """A picture with its heat map (grid, grid) as a data URI; empty if nothing is warm."""
        base = thumbnail(picture)
        warmth = heat_maps.heat(found[None], base.width)[0]
        return data_uri(heat_maps.overlay(base, warmth)) if warmth.any() else ""

    def _shown(self, row: int, picture: Image.Image, overlays: Sequence[tuple[str, str]]) -> Shown:
        """A picture with all that is said of it."""
        judged, classes = self.judged, self.checkpoint.classes
        return Shown(
            data_uri(picture if picture.width <= SMALL_PX else thumbnail(picture)),
            overlays,
            classes[judged.true[row]],
            classes[judged.predicted[row]],
            judged.p_true[row].item(),
            judged.p_predicted[row].item(),
            place_of(self.pictures, int(judged.numbers[row])),
        )


@dataclass(frozen=True)
class OfClass:
    """A class with its best and its worst predictions, as rows of what was judged."""

    figures: figures.ClassFigures
    best: Sequence[int]
    worst: Sequence[int]


@dataclass(frozen=True)
class OfPair:
    """Two classes that were confused: the `true` one was taken for another in a share of its
    images; some of them, as rows of what was judged.
    """

    true: str
    taken_for: str
    share: figures.Share
    rows: Sequence[int]


def pictures_of_classes(
    judged: figures.Judged, found: Sequence[figures.ClassFigures], per_class: int
) -> list[OfClass]:
    """What to show of each class, of many classes those with the lowest accuracy, in their own
    order.
    """
    if not per_class:
        return []
    worst = [each for each in found if each.recall][:SHOWN_CLASSES]
    chosen = sorted(worst, key=lambda each: each.index)
    return [
        OfClass(each, *figures.best_and_worst(judged, each.index, per_class)) for each in chosen
    ]


def pictures_of_pairs(
    judged: figures.Judged, confusion: Confusion, classes: Sequence[str]
) -> list[OfPair]:
    """What to show of the pairs that were confused most."""
    totals = images_by_class(confusion)
    return [
        OfPair(
            classes[true],
            classes[taken],
            figures.Share(images, totals[true]),
            figures.confused_rows(judged, true, taken, SHOWN_OF_PAIR),
        )
        for (true, taken), images in worst_pairs(confusion)[:SHOWN_PAIRS]
    ]


# ---- The training --------------------------------------------------------------------------------


def settings_in_force(state: SavedState) -> dict[str, str]:
    """All settings that have a value, as text."""
    values = saved_settings(state).items()
    return {name: option_text(cp.public(value)) for name, value in values if value is not None}


def curves_of(history: advice.History, best: int | None) -> list[charts.Chart]:
    """Losses, accuracies and learning rate by epoch."""
    epochs = [row["epoch"] for row in history]

    def series(suffix: str) -> dict[str, charts.Values]:
        return {
            words: [row.get(f"{part}_{suffix}") for row in history] for part, words in PARTS.items()
        }

    rates = {"learning rate": [row["lr"] for row in history]}
    made = (
        charts.line_chart("Loss", epochs, series("loss"), best),
        charts.line_chart("Right answers, %", epochs, series("top1"), best, most=100),
        charts.line_chart("Learning rate", epochs, rates, best),
    )
    return list(filter(None, made))


def findings_of(
    checkpoint: cp.Checkpoint,
    judged: figures.Judged,
    by_class: Sequence[figures.ClassFigures],
    confused: Path | None,
) -> list[advice.Finding]:
    """What to do next."""
    settings = checkpoint.trained.settings
    scores = figures.scores_of(judged, len(checkpoint.classes))
    history, best = (checkpoint.state["progress"][name] for name in ("history", "best"))
    written = confused and str(cp.public(confused))
    confusion = figures.confusion_of(judged)
    found = [
        advice.judge_fit(history, settings, best),
        advice.weak_classes(by_class, scores),
        advice.pairs_to_augment(confusion, checkpoint.classes, written, settings),
        advice.judge_calibration(figures.calibration_of(judged), scores, settings),
        advice.sure_mistakes(judged),
    ]
    return advice.in_order(scores, by_class, found)


# ---- The page ------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Versions of what this report was made with."""
    names = "captum", "torchmetrics", "scipy", "jinja2"
    return versions() | {name: importlib.metadata.version(name) for name in names}


def matrix_of(confusion: Confusion, classes: Sequence[str]) -> dict[str, Any]:
    """What can be read of the confusion matrix: the classes that it shows, and for each a row of
    (images, share of the class's images) by predicted class, the last cell for all others.
    """
    shown = figures.readable_matrix(confusion, len(classes), MATRIX_CLASSES)
    totals, rows = images_by_class(confusion), []
    for true in shown:
        counts = [confusion[true, predicted] for predicted in shown]
        counts.append(totals[true] - sum(counts))
        rows.append([(images, round(images / max(1, totals[true]), 3)) for images in counts])
    return {"names": [classes[each] for each in shown], "rows": rows}


def told_of_pictures(
    gallery: Gallery, by_class: Sequence[figures.ClassFigures], asked: argparse.Namespace
) -> dict[str, Any]:
    """What the page shows in pictures."""
    judged, classes = gallery.judged, gallery.checkpoint.classes
    of_classes = pictures_of_classes(judged, by_class, asked.per_class)
    of_pairs = pictures_of_pairs(judged, figures.confusion_of(judged), classes)
    rows = {row for each in of_classes for row in (*each.best, *each.worst)}
    rows.update(row for each in of_pairs for row in each.rows)
    shown = gallery.show(rows, asked.batch_size)
    return {"of_classes": of_classes, "of_pairs": of_pairs, "shown": shown, "layer": gallery.layer}


def told_of_scores(
    judged: figures.Judged, by_class: Sequence[figures.ClassFigures], classes: Sequence[str]
) -> dict[str, Any]:
    """What the page says of how good the model is."""
    calibration = figures.calibration_of(judged)
    return {
        "scores": figures.scores_of(judged, len(classes)),
        "by_class": by_class[:LISTED_CLASSES],
        "calibration": calibration,
        "reliability": charts.reliability(calibration),
        "matrix": matrix_of(figures.confusion_of(judged), classes),
    }


def told_of_training(
    checkpoint: cp.Checkpoint, native: Preprocessing, recorded: run_records.Recorded | None
) -> dict[str, Any]:
    """What the page says of the training."""
    state, history = checkpoint.state, checkpoint.state["progress"]["history"]
    best = best_epoch(history, state["progress"]["best"])
    weights = (state.get("data") or {}).get("class_weights", ())
    return {
        "class_weights": dict(enumerate(weights)),
        "settings": cp.public_settings(checkpoint.trained.settings),
        "progress": state["progress"],
        "is_average": state["average"] is not None,
        "best": best,
        "curves": curves_of(history, best and best["epoch"]),
        "given": as_options(cp.public_settings(cp.settings_as_given(state, native))),
        "in_force": settings_in_force(state),
        "recorded": recorded,
        "versions": state["versions"],
        "own_versions": package_versions(),
    }


def template() -> jinja2.Template:
    """The page's template."""
    return page_template(TEMPLATE, cp.HERE)


def render(
    gallery: Gallery,
    data: ImageData,
    recorded: run_records.Recorded | None,
    why_no_layer: str,
    asked: Any,
) -> str:
    """The report as HTML."""
    checkpoint, judged = gallery.checkpoint, gallery.judged
    by_class = figures.class_figures(judged, checkpoint.classes)
    return template().render(
        path=cp.public(asked.checkpoint),
        data=data,
        classes=checkpoint.classes,
        images=len(judged),
        unread=len(data.val) - len(judged),
        findings=findings_of(checkpoint, judged, by_class, asked.confused),
        why_no_layer=why_no_layer,
        small=checkpoint.trained.ready.image_size <= SMALL_PX,
        made_at=utc_now(),
        **told_of_scores(judged, by_class, checkpoint.classes),
        **told_of_pictures(gallery, by_class, asked),
        **told_of_training(checkpoint, data.native, recorded),
    )


def check_place(flag: str, path: Path, checkpoint: Path) -> None:
    """Raise UserError if a file cannot be written there, or is the checkpoint; leaves no trace."""
    try:
        if path.exists() and path.samefile(checkpoint):
            raise UserError(f"{flag} {path}: is the checkpoint")
        check_appendable(followed(path), path.parent, any_kind=True)
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from None


def check_places(asked: argparse.Namespace) -> None:
    """Raise UserError if what is asked for cannot be written."""
    check_place("--output", asked.output, asked.checkpoint)
    if asked.confused:
        check_place("--confused", asked.confused, asked.checkpoint)
        if asked.confused.resolve() == asked.output.resolve():
            raise UserError(f"--confused {asked.confused}: is the file of --output")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cp.common_parser((__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="PATH",
        help="the HTML file (%(default)s)",
    )
    parser.add_argument(
        "--per-class",
        type=whole_number(0, PER_CLASS),
        default=1,
        metavar="N",
        help=f"best and worst predictions of each class, up to {PER_CLASS} each (%(default)s)",
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="layer that heat maps are made of, as the model names it, such as layer3 "
        "(by itself: its last feature map)",
    )
    parser.add_argument(
        "--confused",
        type=Path,
        metavar="PATH",
        help="also write the confused pairs, for --augment-confused of the training",
    )
    parser.add_argument("--open", action="store_true", help="then open the page in a browser")
    return parser


def write_files(page: str, judged: figures.Judged, classes: Sequence[str], asked: Any) -> None:
    """Write what was asked for, and say so."""
    if asked.confused:
        confusion, name = figures.confusion_of(judged), readable(str(cp.public(asked.checkpoint)))
        write_where_asked(asked.confused, confused_json(confusion, classes, name))
        say_lines([f"{asked.confused}: the confused pairs, for --augment-confused"])
    content = readable(page).encode()
    write_where_asked(asked.output, content)
    say_lines([f"{asked.output}: {len(content) / 2**20:.1f} MiB"])


@cp.program
def main(argv: Sequence[str] | None = None) -> None:
    """Report on a checkpoint."""
    asked = build_parser().parse_args(argv)
    check_places(asked)
    checkpoint = cp.read_checkpoint(asked.checkpoint)
    metrics, model = checkpoint.path.parent / METRICS, checkpoint.trained.settings.model
    recorded = run_records.recorded_run(metrics, model)
    data = cp.open_images(checkpoint, asked.data_path)
    layer, why_no_layer = find_layer(checkpoint, asked.layer)
    warn_of_known_images(checkpoint.path, checkpoint.state, data)
    cp.use_allowed_cores()
    checkpoint.model.to(memory_format=torch.channels_last)  # quicker, and as in training
    judged = judge_images(checkpoint, data.val, asked.batch_size)
    scores = figures.scores_of(judged, len(checkpoint.classes))
    top5 = f", top-5 {100 * scores.top5.value:.2f} %" if scores.top5 else ""
    told = f"loss {scores.loss:.4f}, top-1 {100 * scores.top1.value:.2f} %{top5}"
    say(f"{plural(len(judged), 'image')}: {told}, computed in fp32")
    gallery = Gallery(checkpoint, data.val, judged, layer)
    page = render(gallery, data, recorded, why_no_layer, asked)
    write_files(page, judged, checkpoint.classes, asked)
    if asked.open:
        next_steps.open_page(asked.output)
    moved = ["--data-path", asked.data_path] if asked.data_path else []
    exporting = [asked.checkpoint, *moved, "--output-dir", "exported"]
    say_lines([f"next: {next_steps.sibling_command('export.py', *exporting)}"])


if __name__ == "__main__":
    raise SystemExit(main())
