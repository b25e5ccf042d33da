"""A machine and a plan of its cores, in words, and as files: for `plan --machine`, for programs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from split_affinity.errors import UserError
from split_affinity.machine.plan import CorePlan, Group, loader_count
from split_affinity.machine.topology import (
    BF16_FLAGS,
    Core,
    Topology,
    machine_values,
    read_cpus,
    read_topology,
)
from split_affinity.options.settings import DataSettings
from split_affinity.options.values import COUNT, COUNT_FROM_0, number, parse_cpu_list, whole_number
from split_affinity.text import format_cpu_list, plural, shown

MACHINE_FORMAT, MACHINE_VERSION = "train_split_affinity machine", 1
PLAN_FORMAT, PLAN_VERSION = "train_split_affinity plan", 1


def one_of(choices: dict[str, Any]) -> Callable[[str], Any]:
    """A parser of some names, to their values."""

    def parse(text: str) -> Any:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(map(repr, choices))}")
        return choices[text]

    return parse


def number_or(nothing: float | None) -> Callable[[str], float | None]:
    """A parser of numbers above 0, and of null for `nothing`."""

    def exact(text: str) -> float:
        return int(text) if text.isdigit() else float(text)  # no float has all digits of memory

    largest = sys.float_info.max
    parse = number("a number above 0, or null", lambda value: 0 < value <= largest, exact)
    return lambda text: nothing if text == "null" else parse(text)


# How the fields of a machine's description are read (see Core and Topology).
CORE_FIELDS = {
    "package": COUNT_FROM_0,
    "node": COUNT_FROM_0,
    "l3": whole_number(-1),
    "core_id": COUNT_FROM_0,
    "cpus": parse_cpu_list,
    "capacity": COUNT,
}
MACHINE_FIELDS = {
    "cpu_model": str,
    "offline": lambda text: frozenset(() if text == "none" else parse_cpu_list(text)),
    "allowed": lambda text: frozenset(parse_cpu_list(text)),
    "quota_cpus": number_or(None),
    "has_affinity": one_of({"true": True, "false": False}),
    "bf16": one_of({name: name for name in ("", *BF16_FLAGS)}),
    "memory_bytes": number_or(math.inf),
}


def machine_text(topology: Topology) -> str:
    """A machine's description in JSON: all that a plan depends on, CPUs as lists."""
    values = {"format": MACHINE_FORMAT, "version": MACHINE_VERSION, **dataclasses.asdict(topology)}
    del values["affinity_refused"], values["busy"], values["recorded_in"]  # of the moment
    for core in values["cores"]:
        core["cpus"] = format_cpu_list(core["cpus"])
    if topology.memory_bytes == math.inf:
        values["memory_bytes"] = None  # JSON has no infinity
    return json.dumps(values, indent=1, default=format_cpu_list) + "\n"


def parse_machine(text: str) -> Topology:
    """The inverse of `machine_text`. Raises ArgumentTypeError for any other text."""
    values = None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
    if not isinstance(values, dict) or values.get("format") != MACHINE_FORMAT:
        raise argparse.ArgumentTypeError("not a machine's description, as plan --record writes it")
    version, rows = values.get("version"), values.get("cores")
    if version != MACHINE_VERSION:
        known = f"this program reads version {MACHINE_VERSION}"
        raise argparse.ArgumentTypeError(f"a description of version {version}; {known}")
    if not isinstance(rows, list) or not rows:
        raise argparse.ArgumentTypeError("no list of cores")
    fields = [parse_fields(row, CORE_FIELDS, f"cores[{n}]: ") for n, row in enumerate(rows)]
    cores = tuple(sorted(Core(**each) for each in fields))
    topology = Topology(cores=cores, **parse_fields(values, MACHINE_FIELDS))
    cpu, count = Counter(topology.online).most_common(1)[0]
    if count > 1:
        raise argparse.ArgumentTypeError(f"CPU {cpu} is in {count} cores")
    if unknown := topology.allowed.difference(topology.online):
        raise argparse.ArgumentTypeError(f"allowed: no core has {format_cpu_list(unknown)}")
    return topology


def parse_fields(
    values: Any, parsers: dict[str, Callable[[str], Any]], where: str = ""
) -> dict[str, Any]:
    """The fields of a JSON object, each through its parser. Raises ArgumentTypeError."""
    fields = {}
    for name, parse in parsers.items():
        if not isinstance(values, dict) or name not in values:
            raise argparse.ArgumentTypeError(f"{where}no {name}")
        value = values[name]
        try:
            fields[name] = parse(value if isinstance(value, str) else json.dumps(value))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{where}{name}: {error}") from None
    return fields


def read_machine(path: Path, flag: str = "--machine") -> Topology:
    """The machine that a file describes, or a folder with its system files as they are below /.

    All CPUs of a folder's machine count as allowed. Raises UserError for anything else; `flag` is
    the option that names the path.
    """
    try:
        name = shown(path.resolve().name or str(path))
        if not path.is_dir():
            machine = parse_machine(path.read_text("utf-8", "replace"))
            return dataclasses.replace(machine, recorded_in=name)
        online = frozenset(read_cpus(path / "sys/devices/system/cpu/online"))
        if online:
            there = read_topology(path, online, look_s=0)
            changes = {"has_affinity": True, "affinity_refused": "", "recorded_in": name}
            return dataclasses.replace(there, **changes)
        reason = "a folder without sys/devices/system/cpu/online"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except (ValueError, argparse.ArgumentTypeError) as error:
        reason = str(error)
    raise UserError(f"{flag} {path}: {reason}")


def plan_text(
    machines: Sequence[Topology],
    plans: Sequence[tuple[int, CorePlan]],
    settings: DataSettings,
    precision: tuple[str, str],
) -> str:
    """A plan in JSON, for programs: the machines, then the plan of each rank, in order.

    `plans` has with each the number of its machine; `precision` is the one in force, and why.
    """
    ranks = [
        {
            "rank": rank,
            "machine": number,
            "split": plan.split,
            "groups": [group_values(group, machines[number]) for group in plan.groups],
            "loaders": loader_count(settings, plan.cores),
            "loader_cpus": plan.loader_cpus,
            "notes": plan.notes,
            "measured": {cores: vars(times) for cores, times in plan.measured.items()},
        }
        for rank, (number, plan) in enumerate(plans)
    ]
    found = map(machine_values, machines)
    values = {
        "format": PLAN_FORMAT,
        "version": PLAN_VERSION,
        "machines": [{**values["machine"], "topology": values["topology"]} for values in found],
        "precision": precision[0],
        "precision_reason": precision[1],
        "ranks": ranks,
    }
    return json.dumps(values, indent=1) + "\n"


def group_values(group: Group, topology: Topology) -> dict[str, Any]:
    """A group as JSON types, with its physical cores in each socket, node and L3 domain."""
    cores = [core for core in topology.cores if group.cpu_set & {*core.cpus}]
    known_l3 = [core for core in cores if core.l3 >= 0]
    return {
        "name": group.name,
        "cpus": group.cpus,
        "threads": group.threads,
        "cores": group.cores,
        "cores_by_socket": Counter(core.package for core in cores),
        "cores_by_node": Counter(core.node for core in cores),
        "cores_by_l3": Counter(core.l3 for core in known_l3),
        "cores_by_capacity": Counter(core.capacity for core in cores),
    }


def describe_topology(topology: Topology) -> str:
    """The machine in one line."""
    sockets = plural(len({core.package for core in topology.cores}), "socket")
    threads = plural(len(topology.online), "hardware thread")
    quota = f", CPU quota {topology.quota_cpus:g}" if topology.quota_cpus is not None else ""
    return (
        f"{shown(topology.cpu_model)}: {sockets}, {plural(len(topology.cores), 'core')}, {threads};"
        f" allowed: {format_cpu_list(topology.allowed)}{quota}"
    )


def describe_plan(plan: CorePlan, settings: DataSettings) -> list[str]:
    """The allocation, a line for each group, then the notes."""
    tasks = {
        "forward": "forward pass",
        "backward": "loss, backpropagation, optimizer step",
        "all": "every phase, nothing is split",
    }
    lines = [f"{group.name:9} {group}: {tasks[group.name]}" for group in plan.groups]
    loaders = plural(loader_count(settings, plan.cores), "loader process")
    lines.append(f"loader    cores {format_cpu_list(plan.loader_cpus)}: main thread, {loaders}")
    return lines + [f"note: {note}" for note in plan.notes]
