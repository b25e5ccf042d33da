"""The `predict` command: what a trained model takes pictures for."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.resume import find_resumed, fit_errors
from split_affinity.checkpoints.state import (
    SavedState,
    preprocessing_of,
    read_checkpoint,
    saved_settings,
    versions,
)
from split_affinity.data.classes import named_classes
from split_affinity.data.loader import Loader, picture_loader
from split_affinity.data.pictures import (
    HEIF,
    HEIF_REMEDY,
    find_pictures,
    heif_pictures,
    unreadable_heif,
)
from split_affinity.data.samples import Batch
from split_affinity.errors import RunError, UserError, memory_errors
from split_affinity.files import write_where_asked
from split_affinity.lanes.lane import Lanes, coordinating, tune_allocator
from split_affinity.machine.plan import loader_count, plan_cores
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import Topology
from split_affinity.models.pretrained import Preprocessing, find_weights
from split_affinity.models.registry import build_model, check_model_name
from split_affinity.models.weights import versioned
from split_affinity.options.settings import Settings, settings_of
from split_affinity.runs.setup import check_place
from split_affinity.runs.starting_weights import starting_model
from split_affinity.runs.unlike import UNLIKE, Threshold, describe_unlike, find_threshold
from split_affinity.signals import StopRequest
from split_affinity.terminal import say, warn
from split_affinity.text import csv_text, plural, readable, shown
from split_affinity.training.network import LIKENESS, Network

ANSWERS = 5  # classes that predict names
MANY_PICTURES = 100  # take long enough to show how far it is


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, and what it needs to be used."""

    model: nn.Module  # with the moving average of the weights, if there is one
    classes: Sequence[str]
    ready: Preprocessing
    settings: Settings
    path: Path | None = None  # of its checkpoint
    threshold: Threshold | None = None  # of pictures unlike all that it learnt
    no_threshold: str = ""  # why its checkpoint gives none


def load_trained(path: Path, overruling: Settings = Settings()) -> Trained:
    """A checkpoint's model, to use it; how pictures are made ready can be overruled.

    Raises BadCheckpoint, or UserError for a size that does not fit.
    """
    return trained_model(path, read_checkpoint(path), overruling)


def trained_model(path: Path, saved: SavedState, overruling: Settings) -> Trained:
    """The model of a saved saved, to use it; see `load_trained`."""
    validated = preprocessing_of(saved)
    ready = validated.overruled(overruling)
    settings = dataclasses.replace(settings_of(saved_settings(saved)), **vars(ready))
    check_model_name(settings.model)
    with fit_errors(path, settings):
        model = build_model(settings.model, settings.num_classes, settings.image_size)
        model.load_state_dict(versioned(saved["average"] or saved["model"], model))
    names = (saved.get("data") or {}).get("classes", ())
    threshold, reason = find_threshold(saved)
    if threshold and ready != validated:
        threshold, reason = None, "pictures are made ready in another way than for its validation"
    classes = named_classes(names, settings.num_classes)
    return Trained(model.eval(), classes, ready, settings, path, threshold, reason)


def load_asked_model(settings: Settings) -> Trained:
    """The model that `--weights` or `--resume` names."""
    if settings.weights:
        check_model_name(settings.model)
        known = find_weights(settings.model, settings.weights)
        ready = known.native.overruled(settings)
        settings = dataclasses.replace(settings, num_classes=len(known.classes), **vars(ready))
        model, _ = starting_model(settings, known.classes)
        return Trained(model.eval(), known.classes, ready, settings)
    found = find_resumed(settings, Checkpoints(dataclasses.replace(settings, mirror=None), warn))
    if not found:
        raise UserError(f"--resume auto: no checkpoint in {settings.output_dir}")
    return trained_model(*found, settings)


@dataclass(frozen=True)
class Answer:
    """What a model takes a picture for: the likeliest classes, with their probabilities.

    `unlike` says whether it is unlike all of them; None if the model has no threshold for that.
    """

    path: str
    classes: Sequence[str]
    probabilities: Sequence[float]
    unlike: bool | None = None

    def __str__(self) -> str:
        pairs = zip(self.probabilities, self.classes, strict=True)
        first = f"{self.path}: {UNLIKE}" if self.unlike else self.path
        lines = [first, *(f"{100 * share:10.2f} %  {name}" for share, name in pairs)]
        return "\n".join(map(shown, lines))


def class_probabilities(network: Network, batch: Batch) -> dict[int, torch.Tensor]:
    """For each picture of a batch, by its number, the probabilities of all classes, (classes,)."""
    with torch.inference_mode():
        logits, numbers = network.forward(batch)
        return dict(zip(numbers.tolist(), logits.softmax(1), strict=True))


def likeliest_classes(
    shares: torch.Tensor, classes: Sequence[str], path: str, threshold: Threshold | None = None
) -> Answer:
    """A picture's answer, from the probabilities of all classes."""
    order = shares.argsort(descending=True, stable=True)[:ANSWERS].tolist()
    found = [shares[i].item() for i in order]
    unlike = threshold.is_unlike(found[0]) if threshold else None
    return Answer(readable(path), [classes[i] for i in order], found, unlike)


@memory_errors()
def set_up_prediction(
    stack: contextlib.ExitStack,
    settings: Settings,
    topology: Topology,
    paths: Sequence[str],
    stop: StopRequest,
) -> tuple[Trained, Loader, Callable[[Batch], dict[int, torch.Tensor]]]:
    """A trained model, a loader of pictures, and the model's probabilities for a batch of them."""
    if settings.split == "even" and not topology.has_affinity:  # the default, which cannot be here
        settings = dataclasses.replace(settings, split="none")
    plan = plan_cores(topology, settings)
    stack.enter_context(coordinating(settings, plan))
    if settings.tuned_malloc:
        tune_allocator()
    trained = load_asked_model(settings)
    if settings.channels_last:
        trained.model.to(memory_format=torch.channels_last)
    settings = dataclasses.replace(settings, workers=loader_count(settings, plan.cores))
    loader = picture_loader(paths, trained.ready, settings, plan.loader_cpus, stop.check)
    stack.callback(loader.close)
    lanes = stack.enter_context(Lanes(plan, topology.online))
    stack.enter_context(stop)
    how = {name: getattr(settings, name) for name in ("channels_last", "fold_norm")}
    bf16 = settings.precision == "bf16"
    network = Network(trained.model, nn.CrossEntropyLoss(), bf16=bf16, **how)
    network.view = network.folded(trained.model)
    return trained, loader, partial(lanes.forward.call, class_probabilities, network)


def find_asked(texts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The pictures, why folders cannot be read, and HEIC pictures that cannot be opened here.

    Raises UserError if there are no others.
    """
    found = [find_pictures(text) for text in texts]
    paths = [path for pictures, _ in found for path in pictures]
    unread = list(dict.fromkeys(text for _, unread in found for text in unread))
    unreadable = dict.fromkeys(unreadable_heif(paths))
    left, heif = [path for path in paths if path not in unreadable], list(unreadable)
    if not left:
        alone = f"{heif[0]}: {HEIF} ({HEIF_REMEDY})"
        raise UserError(heif_pictures(len(heif)) if heif[1:] else alone)
    return left, unread, heif


def unlike_note(trained: Trained, answers: Sequence[Answer]) -> str:
    """What to say, once, of pictures that are unlike all classes, if anything."""
    if trained.no_threshold:
        return f"no picture is called {UNLIKE}: {trained.no_threshold}"
    unlike = sum(bool(each.unlike) for each in answers)
    return describe_unlike(unlike, len(answers), trained.threshold) if unlike else ""


def predict(settings: Settings, topology: Topology) -> list[Answer]:
    """The `predict` command: print the likeliest classes of pictures, and write them.

    Raises RunError, in the end, if some pictures or folders cannot be read.
    """
    paths, unread_folders, heif = find_asked(settings.pictures)
    check_place("--json", settings.json)
    check_place("--csv", settings.csv)
    precision = choose_precision(settings, topology)[0]
    settings = dataclasses.replace(settings, precision=precision)
    results: list[Answer | str] = []  # in the order of the pictures; a text: it is broken
    stop = StopRequest()
    tqdm.monitor_interval = 0  # as in a run: no thread beside the lanes
    hidden = len(paths) < MANY_PICTURES or None  # None: unless it is seen on a terminal
    bar = tqdm(total=len(paths), unit=" pictures", leave=False, disable=hidden)
    with contextlib.ExitStack() as stack, bar:
        trained, loader, ask = set_up_prediction(stack, settings, topology, paths, stop)
        for loaded in loader:
            stop.check()
            shares, broken = ask(loaded.batch) if loaded.batch else {}, iter(loaded.broken)
            for number in range(len(results), len(results) + len(shares) + len(loaded.broken)):
                if number in shares:
                    asked = shares[number], trained.classes, paths[number], trained.threshold
                    results.append(likeliest_classes(*asked))
                    say(str(results[-1]))
                else:  # those left out of a batch are named in its order
                    results.append(next(broken))
            for text in loaded.broken:
                warn(text)
            bar.update(len(shares) + len(loaded.broken))
    for text in unread_folders:
        warn(text)
    answers = [each for each in results if isinstance(each, Answer)]
    missing = [text for text in results if isinstance(text, str)]
    count = len(missing)
    without = [(path, f"{path}: {HEIF} ({HEIF_REMEDY})") for path in heif]
    missing += [*unread_folders, *(text for _, text in without)]
    if settings.json:
        write_where_asked(settings.json, answers_json(settings, trained, answers, missing))
    if settings.csv:
        others = [*(("", text) for text in unread_folders), *without]
        write_where_asked(settings.csv, answers_csv([*zip(paths, results, strict=True), *others]))
    if note := unlike_note(trained, answers):
        say(shown(f"note: {note}"), sys.stderr)
    failed = [f"{count} of {plural(len(paths), 'picture')}"] if count else []
    failed += [plural(len(unread_folders), "folder")] if unread_folders else []
    failed += [heif_pictures(len(heif))] if heif else []
    if failed:
        raise RunError(f"{' and '.join(failed)} cannot be read")
    return answers


def answers_json(
    settings: Settings, trained: Trained, answers: Sequence[Answer], broken: Sequence[str]
) -> str:
    """Answers for programs, with the model and the preprocessing."""
    figures = {
        "checkpoint": trained.path and readable(str(trained.path)),
        "weights": settings.weights,
        "model": trained.settings.model,
        "preprocessing": vars(trained.ready),
        "precision": settings.precision,
        "versions": versions(),
        "threshold": trained.threshold and vars(trained.threshold) | {"score": LIKENESS},
        "pictures": [vars(each) for each in answers],
        "broken": [readable(text) for text in broken],
    }
    return json.dumps(figures, indent=1) + "\n"


def answers_csv(rows: Sequence[tuple[str, Answer | str]]) -> str:
    """A row for each path with its answer, or with the error in its place."""
    most = max((len(each.classes) for _, each in rows if isinstance(each, Answer)), default=1)
    columns = [
        f"{name} {place}" for place in range(2, most + 1) for name in ("class", "probability")
    ]
    table = [["picture", "class", "probability", "unlike", *columns, "error"]]
    for path, answer in rows:
        if isinstance(answer, str):
            table.append([path, *[""] * (len(columns) + 3), answer])
            continue
        pairs = zip(answer.classes, answer.probabilities, strict=True)
        (first, share), *others = [(name, f"{part:.6f}") for name, part in pairs]
        unlike = "" if answer.unlike is None else str(answer.unlike).lower()
        table.append([path, first, share, unlike, *itertools.chain(*others), ""])
    return csv_text(table)
