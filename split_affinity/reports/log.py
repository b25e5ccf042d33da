"""A run's section of logs.md."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from split_affinity.checkpoints.state import versions
from split_affinity.files import append_text, can_be_edited, replace_text
from split_affinity.machine.description import describe_plan, describe_topology
from split_affinity.machine.plan import CorePlan
from split_affinity.machine.topology import Topology, host_kind
from split_affinity.options.settings import Settings, as_options, plain_settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks, machines_of, rank_lines
from split_affinity.reports.summary import Summary
from split_affinity.reports.tables import cpu_table, phase_table, summary_lines
from split_affinity.text import (
    code_span,
    format_cpu_list,
    in_markdown,
    option_text,
    plural,
    shown,
    utc_now,
)

FENCE = "```\n"
LOG_HEADER = """\
# Training log

`train_split_affinity.py` writes a section for each run: core allocation and settings when it
begins, a line for each epoch, and in the end what came of it and what every phase took. Times are
wall-clock, in milliseconds per optimizer step; *busy* is the CPU time of a phase's threads as a
share of the time of its physical cores (of as many hardware threads, where a phase has more threads
than cores); *stray* is CPU time, in total, of compute threads that may run outside the phase's
cores. Where phases overlap, their shares of a step add up to more than 100 %. Speeds and shares of
a long run are those of its latest 2,000 steps.

The line of an epoch is written when the epoch is finished; notes are yours to add:

```
epoch | train_loss | train_top1 | train_top5 | val_loss | val_top1 | val_top5 | timestamp | notes
```
"""


def picture_footer(topology: Topology) -> str:
    """The machine and the versions, in a line below a picture."""
    threads, cores = len(topology.online), len(topology.cores)
    machine = f"{topology.cpu_model}, {plural(cores, 'core')}, {plural(threads, 'hardware thread')}"
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return shown(f"{machine}; {used}")


def log_heading(
    settings: Settings,
    asked: Settings,
    topology: Topology,
    plan: CorePlan,
    resumed_at: int = 0,
    ranks: Ranks = ONE_PROCESS,
) -> str:
    """The beginning of a run's section of logs.md: `settings` in force, and those `asked` for."""
    title = f"{settings.model}, {settings.schedule}, split {plan.split}"
    title += f", {ranks.size} ranks" if ranks.size > 1 else ""
    title += f", resumed after step {resumed_at}" if resumed_at else ""
    machines = [text for text, _, _ in machines_of(ranks)] or [describe_topology(topology)]
    lines = [
        f"machine: {'; '.join(machines)}; {host_kind()}",
        f"detected cores: {format_cpu_list(topology.online)} (logical CPUs online)",
        *(rank_lines(ranks) or describe_plan(plan, settings)),
        f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
    ]
    options = as_options(asked)
    lines = [
        *map(in_markdown, lines),
        f"settings: {code_span(options) if options else 'the defaults'}",
    ]
    items = "\n".join(f"- {line}" for line in lines)
    in_force = []
    for key, value in plain_settings(settings).items():
        if value is not None:
            text = format_cpu_list(value) if key.endswith("_cores") else option_text(value)
            in_force.append(f"{key} {text}")
    all_settings = in_markdown(", ".join(in_force))
    folded = f"<details><summary>all settings in force</summary>\n\n{all_settings}\n\n</details>"
    return f"\n## {utc_now()} {in_markdown(title)}\n\n{items}\n\n{folded}\n\n"


def log_summary(
    results: Iterable[str],
    summary: Summary | None,
    warned: Iterable[str],
    tables_of_ranks: Sequence[str] = (),
) -> str:
    """The end of a run's section of logs.md; without figures if no step was finished."""
    lines = [*results, f"ended: {utc_now()}", *(f"warning: {text}" for text in warned)]
    tables = []
    if summary:
        lines += summary_lines(summary)
        tables = ["", phase_table(summary), "", cpu_table(summary), *tables_of_ranks]
    return "\n".join([*(f"- {in_markdown(line)}" for line in lines), *tables]) + "\n"


class LogSection:
    """A run's section of logs.md: a heading, a line for each epoch, a summary in the end.

    A hidden comment keeps the place where the section goes on: meanwhile another run may have begun
    its section below, and you may have edited the file. If the comment has gone, the section begins
    once more at the end of the file.
    """

    def __init__(self, path: Path, heading: str, over_epochs: bool):
        self._path, self._heading, self._over_epochs = path, heading, over_epochs
        self._place = f"<!-- run {os.urandom(8).hex()} goes on here -->\n"
        self._edited = can_be_edited(path)

    def begin(self) -> None:
        """Write the heading, and an empty block for the lines of epochs."""
        block = (2 * FENCE if self._over_epochs else "") + self._place
        append_text(self._path, self._heading + (block if self._edited else ""), LOG_HEADER)

    def add_epoch(self, line: str) -> None:
        """Write a line, below those before it."""
        end = FENCE + self._place
        self._go_on(end, f"{line}\n{end}", f"{line}\n\n", f"{FENCE}{line}\n{end}")

    def end(self, summary: str) -> None:
        """Write the summary."""
        self._go_on(self._place, f"\n{summary}", summary, summary)

    def _go_on(self, place: str, text: str, appended: str, anew: str) -> None:
        """Put text at its place; append it to a file without one, or begin the section anew."""
        if not self._edited:
            append_text(self._path, appended)
        elif not replace_text(self._path, place, text):
            append_text(self._path, self._heading + anew, LOG_HEADER)
