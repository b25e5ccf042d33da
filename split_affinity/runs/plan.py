"""What `plan` shows, of the cores and of the model, and `--list-models`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from split_affinity.data.dataset import (
    describe_data,
    describe_epoch,
    fitted_batch,
    open_data,
    suspicions,
)
from split_affinity.data.named import SYNTHETIC_CLASSES
from split_affinity.errors import RunError, UserError
from split_affinity.files import write_where_asked
from split_affinity.machine.description import (
    describe_plan,
    describe_topology,
    machine_text,
    plan_text,
)
from split_affinity.machine.drawing import draw_plan, is_folded
from split_affinity.machine.plan import CorePlan, rank_topology, this_host
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import Topology
from split_affinity.models.cost import describe_model, describe_teacher
from split_affinity.models.pretrained import describe_weights, find_weights, largest_size
from split_affinity.models.registry import TIMM, check_model_name, classifier_names, parameter_count
from split_affinity.options.commands import installed_version
from split_affinity.options.data_sets import NAMED_DATA
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks, machines_of, rank_lines
from split_affinity.runs.measurement import plan_for
from split_affinity.runs.setup import check_place
from split_affinity.runs.starting_weights import teacher_name
from split_affinity.terminal import say, say_lines

# With a folded drawing, a line for each of many ranks would leave nothing of it on a screen.
MOST_RANKS_TOLD, RANKS_TOLD_OF_MORE = 4, 2


def decide_plan(settings: Settings, topology: Topology, ranks: Ranks) -> tuple[CorePlan, Ranks]:
    """The plan of this rank, and all ranks, which have theirs.

    `plan --ranks 4` shows four ranks of one machine, though nobody has started them.
    """
    if settings.ranks > ranks.size:
        ranks = Ranks()
        host = dataclasses.replace(this_host(topology), name=topology.name)
        ranks.hosts = settings.ranks * [host]
        shares = (rank_topology(ranks.hosts, rank) for rank in range(settings.ranks))
        ranks.plans = [plan_for(settings, share) for share in shares]
        return ranks.plans[0], ranks
    with ranks.together():
        plan = plan_for(settings, topology)
    ranks.introduce(plan)
    return plan, ranks


def plan_lines(settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks) -> list[str]:
    """The machine and how its cores are divided, drawn and in words; with ranks, each machine."""
    if not ranks.hosts:
        drawing = draw_plan(topology, plan)
        return [describe_topology(topology), drawing, *describe_plan(plan, settings)]
    lines, about = [], rank_lines(ranks)
    for text, machine, there in machines_of(ranks):
        plans = [ranks.plans[rank] for rank in there]
        lines += [text, draw_plan(machine, *plans, first=there[0])]
    if is_folded(topology) and len(about) > MOST_RANKS_TOLD:
        more = len(about) - RANKS_TOLD_OF_MORE
        about[RANKS_TOLD_OF_MORE:] = [f"{more} more ranks: plan --json FILE has them all"]
    return lines + about


def print_model(
    settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks = ONE_PROCESS
) -> None:
    """Print what `plan` shows beside the cores, the data and the model; write what it can write."""
    check_model_name(settings.model)
    for flag, place in (("--json", settings.json), ("--record", settings.record)):
        check_place(flag, place)
    path, classes, native_size = settings.data_path, SYNTHETIC_CLASSES, 224
    if name := settings.dataset:
        named = NAMED_DATA[name]
        classes, native_size = named.classes, named.preprocessing.get("image_size", native_size)
    if settings.weights:
        known = find_weights(settings.model, settings.weights)
        native_size = known.native.image_size
        say(describe_weights(known))
    exists = path and (path.exists() or settings.download)
    if exists:
        data = open_data(settings)
        classes, native_size = len(data.classes), data.native.image_size
        count = len(data.chosen)
        lines = describe_data(data), describe_epoch(settings, count), suspicions(data, settings)
        say_lines(itertools.chain(*lines))
        settings = dataclasses.replace(settings, batch_size=fitted_batch(settings, count))
    shape = settings.num_classes or classes, largest_size(settings, native_size)
    if path and not exists:
        instead = f"{shape[0]} classes, {shape[1]} px taken instead"
        say_lines([f"note: {path} does not exist yet: {instead}"])
    say_lines(describe_model(settings, *shape))
    if teacher := teacher_name(settings):
        say(describe_teacher(teacher, *shape))
    if settings.json and not ranks.rank:
        write_for_plan("--json", settings.json, plan_json(settings, topology, plan, ranks))
        say_lines([f"plan written to {settings.json}"])
    if settings.record and not ranks.rank:
        write_for_plan("--record", settings.record, machine_text(topology))
        say_lines([f"machine recorded in {settings.record}"])


def plan_json(settings: Settings, topology: Topology, plan: CorePlan, ranks: Ranks) -> str:
    """The plan of all ranks in JSON, without the name of a file that describes the machine."""
    topology = dataclasses.replace(topology, recorded_in="")
    machines, plans = [topology], [(0, plan)]
    if ranks.hosts:
        machines = [machine for _, machine, _ in machines_of(ranks)]
        number_of = {
            rank: number
            for number, (_, _, there) in enumerate(machines_of(ranks))
            for rank in there
        }
        plans = [(number_of[rank], each) for rank, each in enumerate(ranks.plans)]
    return plan_text(machines, plans, settings, choose_precision(settings, topology))


def write_for_plan(flag: str, path: Path, text: str) -> None:
    """Write to a place that the user has named. Raises UserError."""
    try:
        write_where_asked(path, text)
    except RunError as error:
        raise UserError(f"{flag} {error}") from None


def list_models(settings: Settings, topology: Topology) -> None:
    """Print the models' names, with their parameters for 1000 classes; timm's in one line."""
    say(f"{'model':24} {'parameters':>13}")
    for name in classifier_names():
        say(f"{name:24} {parameter_count(name):>13,}")
    say(f"{TIMM + 'NAME':24} those of timm {installed_version('timm')}")
