"""A plan as a drawing of the machine: core by core, or folded where there are many."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from split_affinity.machine.plan import CorePlan
from split_affinity.machine.topology import Core, Topology, cpus_of
from split_affinity.text import format_cpu_list

WIDTH = 80
MOST_CORES_IN_GRID = 16
MOST_LINES = 24  # of a folded drawing: a screen of 40 has the rest of what plan prints, too
LEGEND = "  F forward, B backward, - not used, x not allowed"


def draw_plan(topology: Topology, *plans: CorePlan, columns: int = 16, first: int = 0) -> str:
    """The machine and who uses it, as a grid, or folded if it has more than 16 cores.

    With several plans, those of the `first` rank and of the ranks that follow, it says which rank
    uses what. A line has at most 80 characters, and in a grid `columns` cores.
    """
    if is_folded(topology):
        lines = folded_lines(topology, plans, first)
    else:
        lines = grid_lines(topology, plans, columns, first)
    drawing = "\n".join([*lines, LEGEND])
    return drawing + ("; 0-6:2 stands for 0,2,4,6" if ":" in drawing else "")


def is_folded(topology: Topology) -> bool:
    """Whether a machine has too many cores to show each."""
    return len(topology.cores) > MOST_CORES_IN_GRID


def grid_lines(
    topology: Topology, plans: Sequence[CorePlan], columns: int, first: int
) -> Iterator[str]:
    """A grid for each L3 domain, a column per core.

    Rows are the core's number, its kind if there are several, the ranks that use it if there are
    several plans, and its hardware threads.
    """
    kind_of = kinds_of(topology)
    titles = ["core"] + ["kind"] * bool(kind_of) + ["rank"] * (len(plans) > 1)
    cells_of = {}
    for core in topology.cores:
        cells = [str(core.core_id)]
        cells += [kind_of[core.capacity]] if kind_of else []
        cells += [ranks_of([core], plans, first)] if len(plans) > 1 else []
        cells_of[core] = cells + [f"{mark_of(cpu, topology, plans)}{cpu}" for cpu in core.cpus]
    width = 1 + max(len(cell) for cells in cells_of.values() for cell in cells)
    columns = min(columns, (WIDTH - 7) // width)
    domains = itertools.groupby(topology.cores, lambda core: (core.package, core.node, core.l3))
    for (package, node, l3), group in domains:
        yield f"socket {package}, node {node}" + (f", L3 of CPU {l3}" if l3 >= 0 else "")
        cores = list(group)
        step = math.ceil(len(cores) / math.ceil(len(cores) / columns))  # lines of equal length
        for start in range(0, len(cores), step):
            part = [cells_of[core] for core in cores[start : start + step]]
            for row, cells in enumerate(itertools.zip_longest(*part, fillvalue="")):
                title = titles[row] if row < len(titles) else "cpu"
                yield f"  {title:5}" + "".join(f"{cell:>{width}}" for cell in cells)


def folded_lines(topology: Topology, plans: Sequence[CorePlan], first: int) -> Iterator[str]:
    """A table with a line for each L3 domain, and in it for each kind of core."""
    kind_of = kinds_of(topology)
    rows = [["socket", "node", "L3 of", "kind", "cores", "rank", "CPUs"]]
    for cores in folded_groups(topology, plans):
        caches = sorted({core.l3 for core in cores if core.l3 >= 0})
        cache = f"CPU {caches[0]}" if caches else ""
        if len(caches) > 1:
            cache = f"CPU {caches[0]}-{caches[-1]} ({len(caches)})"
        row = [
            str(cores[0].package),
            format_cpu_list({core.node for core in cores}),
            cache,
            kind_of.get(cores[0].capacity, ""),
            short_list(core.core_id for core in cores),
            ranks_of(cores, plans, first) if len(plans) > 1 else "",
            marked_cpus(cores, topology, plans),
        ]
        rows.append(row)
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns[:-1]]
    for *cells, cpus in zip(*columns, strict=True):
        padded = (f"{cell:{width}}  " for cell, width in zip(cells, widths, strict=True))
        start = "".join(padded)
        # textwrap breaks lines at blanks: a list may be broken behind each comma.
        for part in textwrap.wrap(cpus.replace(",", ", "), max(20, WIDTH - len(start))):
            yield start + part.replace(", ", ",")
            start = " " * len(start)


def folded_groups(topology: Topology, plans: Sequence[CorePlan]) -> list[list[Core]]:
    """The cores that share a line of a folded drawing.

    They are those of a kind in an L3 domain. If that makes too many lines, they are those of
    neighbouring domains that are used alike, or else those of a kind in a socket.
    """

    def domain(core: Core) -> tuple[int, ...]:
        return core.package, core.node, core.l3, -core.capacity

    def socket(core: Core) -> tuple[int, ...]:
        return core.package, -core.capacity

    cores = sorted(topology.cores, key=lambda core: (domain(core), core.core_id))
    domains = [list(group) for _, group in itertools.groupby(cores, domain)]
    if len(domains) <= MOST_LINES:
        return domains
    use_of = {
        domain(cores[0]): (
            ranks_of(cores, plans),
            {mark_of(cpu, topology, plans) for cpu in cpus_of(cores)},
        )
        for cores in domains
    }
    alike = itertools.groupby(cores, lambda core: (socket(core), use_of[domain(core)]))
    groups = [list(group) for _, group in alike]
    if len(groups) <= MOST_LINES:
        return groups
    cores.sort(key=lambda core: (socket(core), core.core_id))
    return [list(group) for _, group in itertools.groupby(cores, socket)]


def kinds_of(topology: Topology) -> dict[int, str]:
    """What cores of each capacity are called; empty if there is a single kind."""
    capacities = sorted({core.capacity for core in topology.cores}, reverse=True)
    kinds = "PE" if len(capacities) == 2 else map(str, capacities)
    return dict(zip(capacities, kinds, strict=True)) if len(capacities) > 1 else {}


def ranks_of(cores: Sequence[Core], plans: Sequence[CorePlan], first: int = 0) -> str:
    """The ranks that use some cores; `-` for none."""
    cpus = {*cpus_of(cores)}
    used = [plan.forward.cpu_set | plan.backward.cpu_set for plan in plans]
    ranks = [first + number for number, own in enumerate(used) if own & cpus]
    return format_cpu_list(ranks) if ranks else "-"


def mark_of(cpu: int, topology: Topology, plans: Sequence[CorePlan]) -> str:
    """Who uses a CPU: `F`, `B`, `FB`, `-` for nobody, or `x` if it is not allowed."""
    mark = "F" if any(cpu in plan.forward.cpu_set for plan in plans) else ""
    mark += "B" if any(cpu in plan.backward.cpu_set for plan in plans) else ""
    return mark or ("-" if cpu in topology.allowed else "x")


def marked_cpus(cores: Sequence[Core], topology: Topology, plans: Sequence[CorePlan]) -> str:
    """The CPUs of some cores by who uses them: `F 0-3,8-11 B 4-7,12-15`."""
    by_mark: dict[str, list[int]] = {mark: [] for mark in ("F", "B", "FB", "-", "x")}
    for cpu in cpus_of(cores):
        by_mark[mark_of(cpu, topology, plans)].append(cpu)
    return " ".join(f"{mark} {short_list(cpus)}" for mark, cpus in by_mark.items() if cpus)


def short_list(numbers: Iterable[int]) -> str:
    """A list that `--forward-cores` takes too, in ranges and steps: `0-3,8-14:2`."""
    left, parts = sorted(numbers), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = next((n for n, each in enumerate(left) if each != left[0] + n * step), len(left))
        if step > 1 and count < 3:
            count = 1
        first, last = left[0], left[count - 1]
        parts.append(
            f"{first}-{last}" + (f":{step}" if step > 1 else "") if count > 1 else f"{first}"
        )
        left = left[count:]
    return ",".join(parts)
