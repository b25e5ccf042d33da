"""How a run is set up: data, loaders, lanes, model, and the settings that are then in force."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from split_affinity.checkpoints.folder import LAST
from split_affinity.data.classes import with_known_classes
from split_affinity.data.dataset import (
    describe_data,
    describe_epoch,
    fitted_batch,
    open_data,
    suspicions,
)
from split_affinity.data.pictures import ImageData, derived_seed
from split_affinity.errors import UserError
from split_affinity.files import check_appendable, followed, write_whole
from split_affinity.lanes.lane import Lanes, tune_allocator
from split_affinity.machine.plan import CorePlan, loader_count
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import Topology
from split_affinity.models.cost import check_memory
from split_affinity.models.freezing import freeze
from split_affinity.models.registry import check_model_name
from split_affinity.options.contradictions import resizing_contradictions
from split_affinity.options.data_sets import VAL_SHARE
from split_affinity.options.existence import is_made_for
from split_affinity.options.settings import ReportSettings, Settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks
from split_affinity.reports.contents import SUBSET
from split_affinity.reports.operators import OPERATORS_CSV
from split_affinity.reports.phases import OF_OTHER_RANKS, PHASES_CSV, check_phases_file
from split_affinity.reports.tables import CURVES, GRADIENTS, METRICS, TENSORBOARD, TIMELINE, TRACE
from split_affinity.runs.fusing import fuse_where_it_pays
from split_affinity.runs.starting_weights import build_teacher, starting_model, teacher_name
from split_affinity.terminal import say_lines
from split_affinity.training.network import Network, build_loss
from split_affinity.training.optimizer import (
    build_lr_scheduler,
    build_optimizer,
)
from split_affinity.training.profiling import all_threads
from split_affinity.training.steps import Run
from split_affinity.training.update import GradientNorms, TrainState, build_average


def check_writable(settings: ReportSettings) -> None:
    """Raise UserError unless log, output folder and --json can be written. Leaves no trace."""
    log, output = settings.log_file, settings.output_dir
    flag = f"--log-file {log}"
    try:
        if not is_made_for(log, output):
            check_appendable(log, log.parent, any_kind=True)
        if output:
            flag = f"--output-dir {output}"
            existing = next(path for path in (output, *output.absolute().parents) if path.exists())
            tempfile.TemporaryFile(dir=existing).close()  # files are replaced by new ones
            profiled = [OPERATORS_CSV] if settings.operators else []
            for name in (METRICS, TIMELINE, TRACE, CURVES, GRADIENTS, LAST, *profiled):
                check_appendable(output / name, existing)
            if settings.phases or settings.counters:
                check_appendable(output / PHASES_CSV, existing)
                for path in (*output.glob(PHASES_CSV), *output.glob(OF_OTHER_RANKS)):
                    check_phases_file(path)
            if settings.tensorboard and os.path.lexists(output / TENSORBOARD):
                if (output / TENSORBOARD).is_symlink():
                    raise OSError(errno.ELOOP, f"{TENSORBOARD} is a link, which is not followed")
                tempfile.TemporaryFile(dir=output / TENSORBOARD).close()
    except OSError as error:
        raise UserError(f"{flag}: cannot be written: {error.strerror}") from None
    check_place("--json", settings.json)


def check_place(flag: str, path: Path | None) -> None:
    """Raise UserError unless the file that an option names can be written. Leaves no trace."""
    try:
        if path:
            check_appendable(followed(path), path.parent, any_kind=True)
        if path and path.is_file():
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from None


def build_train_state(
    settings: Settings,
    lanes: Lanes,
    epoch_steps: int = 1,
    all_steps: int = 1,
    classes: Sequence[str] = (),
    ranks: Ranks = ONE_PROCESS,
    class_weights: Sequence[float] | None = None,
) -> TrainState:
    """Model and optimizer, each built on the lane that uses it first.

    The learning rate runs over `all_steps` optimizer steps, `epoch_steps` in each epoch. `classes`
    are those of the data: trained weights may know others.
    """
    in_loss = torch.tensor(class_weights) if class_weights else None
    model, note = lanes.forward.call(starting_model, settings, classes)
    optimizer = lanes.backward.call(build_optimizer, model, settings)
    shape = settings.model, settings.num_classes, settings.image_size
    network = Network(
        model,
        build_loss(settings.label_smoothing, in_loss),
        settings.accumulate,
        bf16=settings.precision == "bf16",
        channels_last=settings.channels_last,
        fold_norm=settings.fold_norm,
        ranks=ranks.size,
        class_weights=in_loss,
        note=note,
        teacher=lanes.forward.call(build_teacher, settings, classes),
        frozen=freeze(model, settings.freeze, *shape),
    )
    network.fusing = lanes.forward.call(fuse_where_it_pays, network, settings)
    return TrainState(
        network,
        optimizer,
        scheduler=build_lr_scheduler(optimizer, settings, epoch_steps, all_steps),
        average=lanes.backward.call(build_average, model, settings),
        gradient_norms=GradientNorms(model) if settings.epochs else None,
        clip_grad_norm=settings.clip_grad_norm,
        grads_to_none=settings.grads_to_none,
        ranks=ranks,
    )


def settings_in_force(
    settings: Settings, topology: Topology, data: ImageData, **others: Any
) -> Settings:
    """The settings with everything decided that you left open, and with the `others` replaced."""
    return dataclasses.replace(
        settings,
        batch_size=fitted_batch(settings, len(data.chosen)),
        fit_batch=False,
        teacher=teacher_name(settings),
        num_classes=settings.num_classes or len(data.classes),
        precision=choose_precision(settings, topology)[0],
        **vars(data.native.overruled(settings)),
        **others,
    )


def check_run(
    settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks
) -> tuple[Settings, ImageData, list[str]]:
    """The settings in force, the data, and notes for you. Raises UserError for a run that cannot
    be, before anything is written.
    """
    check_model_name(settings.model)
    if settings.operators:
        all_threads()
    data = open_data(settings)
    for message in resizing_contradictions(settings, data.native.image_size):
        raise UserError(message)
    check_validation(settings, data)
    if not ranks.rank:
        check_writable(settings)
    left_out = [] if settings.test_only else describe_epoch(settings, len(data.chosen))
    say_lines([*describe_data(data), *left_out, *suspicions(data, settings)])
    notes = [unvalidated(settings)] if settings.epochs and data.val is None else []
    if settings.test_only and settings.weights:
        data = with_known_classes(data, settings)
    note = tune_allocator() if settings.tuned_malloc else ""
    notes += [note] if note else []
    tuned = settings.tuned_malloc and not note
    others = {"loader_cores": plan.loader_cpus, "tuned_malloc": tuned}
    others |= {"workers": loader_count(settings, plan.cores)}
    settings = settings_in_force(settings, topology, data, **others)
    check_memory(settings, topology, settings.batch_size)
    return settings, data, notes


def unvalidated(settings: Settings) -> str:
    """What a training without validation images lacks, and how it gets some."""
    remedy = f"; --val-share {VAL_SHARE:g} keeps a fifth" if settings.data_path else ""
    return f"nothing validates: no best.pt, no report{remedy}"


def check_validation(settings: Settings, data: ImageData) -> None:
    """Raise UserError for options that need validation images, if there are none."""
    wanted = {
        "--test-only": settings.test_only,
        f"--early-stopping {settings.early_stopping}": settings.early_stopping,
        f"--target-top1 {settings.target_top1}": settings.target_top1,
    }
    for flag, value in wanted.items():
        if value and data.val is None:
            places = "DIR/val/<class>/*.jpg, or --val-share"
            raise UserError(f"{flag} needs validation images ({places})")


def start_with_same_weights(run: Run) -> None:
    """Give all ranks the weights of rank 0; each draws random numbers of its own from here on."""
    train_state, ranks = run.train_state, run.ranks
    first_weights = ranks.on_rank_0(train_state.network.model.state_dict)
    into = [
        train_state.network.model.state_dict(),
        *([train_state.average.values] if train_state.average else []),
    ]
    for tensors, (name, value) in itertools.product(into, first_weights.items()):
        tensors[name].copy_(value)
    if ranks.rank:
        torch.manual_seed(derived_seed(run.settings.seed, "rank", ranks.rank))


def check_subset(run: Run, resumed: bool) -> None:
    """Write the choice of --subset into the output folder. Raises UserError if a resumed run
    chooses other images.
    """
    settings = run.settings
    if settings.subset == 1 or not settings.output_dir or run.ranks.rank:
        return
    path = settings.output_dir / SUBSET
    chosen = {"subset": settings.subset, "seed": settings.seed, "indices": run.data.chosen}
    text = json.dumps(chosen) + "\n"
    if resumed and path.is_file() and path.read_bytes() != text.encode():
        raise UserError(f"{path}: not the images that --subset {settings.subset:g} chooses now")
    write_whole(path, text)


def check_same_images(
    ranks: Ranks, fingerprint: str | None, class_weights: Sequence[float] | None = None
) -> None:
    """Raise UserError unless the images of all ranks have the same names and sizes, and their
    classes the same weights in the loss.
    """
    for rank, found in enumerate(every := ranks.gather_objects((fingerprint, class_weights))):
        if found == every[0]:
            continue
        where = f"rank {rank} on {ranks.hosts[rank].name}"
        if found[0] != every[0][0]:
            remedy = "the same names and sizes are needed below --data-path"
            raise UserError(f"the images of {where} are not those of rank 0: {remedy}")
        raise UserError(f"the --class-weights of {where} are not those of rank 0")
