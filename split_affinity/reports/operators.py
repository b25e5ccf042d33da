"""Operators of profiled steps as tables, and as operators.csv. Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

from split_affinity.text import csv_text, markdown_table, plural
from split_affinity.training.operators import ENGINE, OUTSIDE, REST, OperatorTime, OperatorTimes
from split_affinity.training.steps import PHASES

OPERATORS_CSV = "operators.csv"
NAMESPACES = ENGINE, "aten::", "torch::autograd::"  # left out in tables
SMALLEST_SHARE = 0.005  # of a phase; kinds below that are a row together
GROUPS_SHOWN = 24
LONGEST_NAME = 32  # of an operator in a table of 80 columns

NOT_PROFILED = "no operators: --operators begins with the third step, and the run had none"


def operators_csv(of_ranks: Sequence[OperatorTimes]) -> str:
    """operators.csv: a row for each operator of a phase and a layer group, of each rank."""
    fields = [each.name for each in dataclasses.fields(OperatorTime)]
    header = ["rank", *fields[:5], "calls_per_step", "self_ms_per_step", "total_ms_per_step"]
    rows = [
        (rank, *dataclasses.astuple(row)[:5], f"{row.calls:g}", *times)
        for rank, each in enumerate(of_ranks)
        for row in each.rows
        for times in [(f"{row.self_ms:.4f}", f"{row.total_ms:.4f}")]
    ]
    return csv_text([header, *rows])


def kind_table(times: OperatorTimes, phase: str) -> str:
    """A phase by kinds of operators, with the largest operator of each kind, in 80 columns."""
    rows = times.of_phase(phase)
    phase_ms = sum(row.self_ms for row in rows)
    by_kind: Counter[str] = Counter()
    by_name: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_kind[row.kind] += row.self_ms
        by_name[row.kind][row.operator] += row.self_ms
    for kind in [*by_kind]:
        if kind not in (REST, OUTSIDE) and by_kind[kind] < SMALLEST_SHARE * phase_ms:
            by_kind[REST] += by_kind.pop(kind)
            by_name[REST] += by_name[kind]
    last = [(kind, by_kind.pop(kind)) for kind in (REST, OUTSIDE) if kind in by_kind]
    table = []
    for kind, kind_ms in [*by_kind.most_common(), *last]:
        largest = max(by_name[kind].items(), key=lambda each: each[1], default=("", 0))[0]
        table.append((kind, f"{kind_ms:.1f}", share_text(kind_ms, phase_ms), short_name(largest)))
    table.append((f"all of {phase}", f"{phase_ms:.1f}", "", ""))
    return markdown_table((phase, "ms a step", "share", "the largest of them"), table)


def share_text(part: float, whole: float) -> str:
    """A share in percent."""
    return f"{part / whole:.1%}" if whole else "-"


def short_name(operator: str) -> str:
    """An operator's name for a narrow column."""
    for namespace in NAMESPACES:
        operator = operator.removeprefix(namespace)
    return operator if len(operator) <= LONGEST_NAME else f"{operator[: LONGEST_NAME - 3]}..."


def group_table(times: OperatorTimes) -> str:
    """Each layer group, forward and backward, in the order of the model."""
    passes = ("forward", "backward")
    by_group: dict[str, dict[str, float]] = {phase: Counter() for phase in passes}
    for row in times.rows:
        if row.phase in passes:
            by_group[row.phase][row.layer_group or OUTSIDE] += row.self_ms
    groups = list(dict.fromkeys([*by_group["forward"], *by_group["backward"]]))
    groups = [*(each for each in groups if each != OUTSIDE), OUTSIDE]
    total_ms = {phase: sum(by_group[phase].values()) for phase in passes}

    def cells(parts: Sequence[str]) -> list[str]:
        found_ms = {phase: sum(by_group[phase][part] for part in parts) for phase in passes}
        row = []
        for phase in passes:
            has = any(part in by_group[phase] for part in parts)
            share = share_text(found_ms[phase], total_ms[phase])
            row += [f"{found_ms[phase]:.1f}", share] if has else ["-", "-"]
        forward_ms, backward_ms = found_ms.values()
        return [*row, f"{backward_ms / forward_ms:.2f}" if min(found_ms.values()) >= 0.05 else "-"]

    shown, others = groups, []
    if len(groups) > GROUPS_SHOWN:
        largest = sorted(groups, key=lambda each: -sum(by_group[phase][each] for phase in passes))
        others = [each for each in largest[GROUPS_SHOWN:] if each != OUTSIDE]
        shown = [each for each in groups if each not in others]
    table = [(group, *cells([group])) for group in shown]
    if others:
        table.insert(-1, (plural(len(others), "other group"), *cells(others)))
    table.append(("all", *cells(groups)))
    header = ("layer group", "forward ms", "share", "backward ms", "share", "bwd/fwd")
    return markdown_table(header, table)


def phase_rows(times: OperatorTimes) -> str:
    """The phases: their lanes, how much of them operators explain, and the memory they touch."""
    table = []
    for lane, phase in times.phases():
        rows = times.of_phase(phase)
        phase_ms = sum(row.self_ms for row in rows)
        outside_ms = sum(row.self_ms for row in rows if row.kind == OUTSIDE)
        sizes = [each.size_bytes for each in times.touched if each.phase == phase]
        known = [size for size in sizes if size is not None]
        touched = f"{max(known) / 2**20:,.0f}" if known and len(known) == len(sizes) else "-"
        in_operators = share_text(phase_ms - outside_ms, phase_ms)
        table.append((phase, lane, f"{phase_ms:.1f}", in_operators, touched))
    header = ("phase", "lane", "ms a step", "in operators", "touches, MiB")
    return markdown_table(header, table)


def describe_operators(times: OperatorTimes, median_step_s: float, ranks: int = 1) -> list[str]:
    """What was profiled, in a sentence or two; of several ranks the first one."""
    steps = f"steps {times.first} to {times.last}" if times.steps > 1 else f"step {times.first}"
    steps += " of rank 0" if ranks > 1 else ""
    texts = [
        f"operators of {steps}, under PyTorch's profiler: {times.step_ms:.1f} ms a step (the "
        f"median of the run is {1e3 * median_step_s:.1f} ms)"
    ]
    beside = {each.phase for each in times.touched if each.size_bytes is None}
    if times.untouched:
        texts.append(f"memory that phases touch: unknown ({times.untouched})")
    elif beside:
        phases = ", ".join(phase for phase in PHASES if phase in beside)
        texts.append(
            f"memory that phases touch: unknown of what ran beside another phase ({phases}); with "
            "--schedule sequential each runs alone"
        )
    return texts


def operator_tables(times: OperatorTimes) -> str:
    """All tables of a rank."""
    kinds = [kind_table(times, phase) for _, phase in times.phases()]
    return "\n\n".join([phase_rows(times), *kinds, group_table(times)])
