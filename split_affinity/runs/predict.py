"""The `predict` command: what a trained model takes pictures for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from split_affinity.data.pictures import find_pictures
from split_affinity.data.samples import Batch
from split_affinity.errors import RunError, UserError, memory_errors
from split_affinity.files import write_where_asked
from split_affinity.lanes.lane import Lanes, coordinating, tune_allocator
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import Topology
from split_affinity.models.pretrained import Preprocessing, find_weights
from split_affinity.models.registry import build_model, check_model_name
from split_affinity.models.weights import versioned
from split_affinity.options.settings import Settings, settings_of
from split_affinity.runs.setup import check_json
from split_affinity.runs.starting_weights import starting_model
from split_affinity.signals import StopRequest
from split_affinity.terminal import say, warn
from split_affinity.text import plural, readable, shown
from split_affinity.training.network import Network

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


def load_trained(path: Path, overruling: Settings = Settings()) -> Trained:
    """A checkpoint's model, to use it; how pictures are made ready can be overruled.

    Raises BadCheckpoint, or UserError for a size that does not fit.
    """
    return trained_model(path, read_checkpoint(path), overruling)


def trained_model(path: Path, saved: SavedState, overruling: Settings) -> Trained:
    """The model of a saved saved, to use it; see `load_trained`."""
    ready = preprocessing_of(saved).overruled(overruling)
    settings = dataclasses.replace(settings_of(saved_settings(saved)), **vars(ready))
    check_model_name(settings.model)
    with fit_errors(path, settings):
        model = build_model(settings.model, settings.num_classes, settings.image_size)
        model.load_state_dict(versioned(saved["average"] or saved["model"], model))
    names = (saved.get("data") or {}).get("classes", ())
    return Trained(model.eval(), named_classes(names, settings.num_classes), ready, settings, path)


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
    """What a model takes a picture for: the likeliest classes, with their probabilities."""

    path: str
    classes: Sequence[str]
    probabilities: Sequence[float]

    def __str__(self) -> str:
        pairs = zip(self.probabilities, self.classes, strict=True)
        lines = [self.path, *(f"{100 * share:10.2f} %  {name}" for share, name in pairs)]
        return "\n".join(map(shown, lines))


def class_probabilities(network: Network, batch: Batch) -> dict[int, torch.Tensor]:
    """For each picture of a batch, by its number, the probabilities of all classes, (classes,)."""
    with torch.inference_mode():
        logits, numbers = network.forward(batch)
        return dict(zip(numbers.tolist(), logits.softmax(1), strict=True))


def likeliest_classes(shares: torch.Tensor, classes: Sequence[str], path: str) -> Answer:
    """A picture's answer, from the probabilities of all classes."""
    order = shares.argsort(descending=True, stable=True)[:ANSWERS].tolist()
    return Answer(readable(path), [classes[i] for i in order], [shares[i].item() for i in order])


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
    loader = picture_loader(paths, trained.ready, settings, plan.loader_cpus, stop.check)
    stack.callback(loader.close)
    lanes = stack.enter_context(Lanes(plan, topology.online))
    stack.enter_context(stop)
    how = {name: getattr(settings, name) for name in ("channels_last", "fold_norm")}
    bf16 = settings.precision == "bf16"
    network = Network(trained.model, nn.CrossEntropyLoss(), bf16=bf16, **how)
    network.view = network.folded(trained.model)
    return trained, loader, partial(lanes.forward.call, class_probabilities, network)


def predict(settings: Settings, topology: Topology) -> list[Answer]:
    """The `predict` command: print the likeliest classes of pictures, and write them.

    Raises RunError, in the end, if some pictures or folders cannot be read.
    """
    found = [find_pictures(text) for text in settings.pictures]
    paths = [path for pictures, _ in found for path in pictures]
    unread_folders = list(dict.fromkeys(text for _, unread in found for text in unread))
    check_json(settings.json)
    precision = choose_precision(settings, topology)[0]
    settings = dataclasses.replace(settings, precision=precision)
    answers, broken, stop = [], [], StopRequest()
    tqdm.monitor_interval = 0  # as in a run: no thread beside the lanes
    hidden = len(paths) < MANY_PICTURES or None  # None: unless it is seen on a terminal
    bar = tqdm(total=len(paths), unit=" pictures", leave=False, disable=hidden)
    with contextlib.ExitStack() as stack, bar:
        trained, loader, ask = set_up_prediction(stack, settings, topology, paths, stop)
        for loaded in loader:
            stop.check()
            shares = ask(loaded.batch) if loaded.batch else {}
            for number, each in shares.items():
                answers.append(likeliest_classes(each, trained.classes, paths[number]))
                say(str(answers[-1]))
            for text in loaded.broken:
                warn(text)
            broken += loaded.broken
            bar.update(len(shares) + len(loaded.broken))
    for text in unread_folders:
        warn(text)
    if settings.json:
        missing = [*broken, *unread_folders]
        write_where_asked(settings.json, answers_json(settings, trained, answers, missing))
    failed = [f"{len(broken)} of {plural(len(paths), 'picture')}"] if broken else []
    failed += [plural(len(unread_folders), "folder")] if unread_folders else []
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
        "pictures": [vars(each) for each in answers],
        "broken": [readable(text) for text in broken],
    }
    return json.dumps(figures, indent=1) + "\n"
