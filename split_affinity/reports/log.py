"""Sections of logs.md: of a training, and of a checkpoint that was tested."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from split_affinity.checkpoints.state import versions
from split_affinity.files import append_text, can_be_edited, replace_text
from split_affinity.machine.description import describe_plan, describe_topology
from split_affinity.machine.plan import CorePlan
from split_affinity.machine.topology import Topology, host_kind
from split_affinity.options.settings import Settings, as_options, plain_settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks, machines_of, rank_lines
from split_affinity.reports.counts import counts_table
from split_affinity.reports.summary import Summary
from split_affinity.reports.tables import cpu_table, phase_table, summary_lines
from split_affinity.text import (
    FOLD_END,
    code_span,
    fold_start,
    folded,
    format_cpu_list,
    in_markdown,
    option_text,
    plural,
    shown,
    utc_now,
)
from split_affinity.training.steps import Run

# A section is to be read at a glance: of what is longer than this, the rest is folded.
EPOCHS_SHOWN, RANKS_SHOWN, WARNINGS_SHOWN = 10, 4, 3
LARGE_LOG_BYTES = 2**20
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

The line of an epoch is written when the epoch is finished; notes are yours to add, behind it say:

```
epoch: 12  train_loss: 0.040  train_top1: 98.8%  train_top5: 99.9%  val_loss: 0.020  \
val_top1: 99.4%  val_top5: 100.0%  timestamp: 2026-11-21T18:38:18Z
```
"""


def picture_footer(topology: Topology) -> str:
    """The machine and the versions, in a line below a picture."""
    threads, cores = len(topology.online), len(topology.cores)
    machine = f"{topology.cpu_model}, {plural(cores, 'core')}, {plural(threads, 'hardware thread')}"
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return shown(f"{machine}; {used}")


def log_section(title: str, items: Iterable[str], *below: str) -> str:
    """A section: heading, list, and what stands below that, all Markdown but for the title."""
    listed = "\n".join(f"- {item}" for item in items)
    return "\n\n".join([f"\n## {utc_now()} {in_markdown(title)}", listed, *below]) + "\n"


def first_lines(lines: Iterable[str], count: int, what: str) -> tuple[list[str], list[str]]:
    """The first of some lines as Markdown; and what stands below, with the others folded."""
    lines = [*map(in_markdown, lines)]
    rest = "\n".join(f"- {line}" for line in lines[count:])
    return lines[:count], [folded(plural(len(lines) - count, what), rest)] if rest else []


def first_warnings(warned: Iterable[str]) -> tuple[list[str], list[str]]:
    """The first warnings as Markdown; and what stands below, with the others folded."""
    lines = (f"warning: {text}" for text in warned)
    return first_lines(lines, WARNINGS_SHOWN, "more warning")


def machine_item(topology: Topology, ranks: Ranks = ONE_PROCESS) -> str:
    """The machine, or those of all ranks, as an item of a section."""
    machines = [text for text, _, _ in machines_of(ranks)] or [describe_topology(topology)]
    return in_markdown(f"machine: {'; '.join(machines)}; {host_kind()}")


def folder_items(folder: Path | None, log: Path) -> list[str]:
    """An item with a link from the log to the output folder, if there is one."""
    if not folder:
        return []
    name, path = code_span(str(folder)), os.path.relpath(folder, log.parent)
    if log.is_file() or not log.exists():  # from a pipe no link leads anywhere
        name = f"[{name}]({urllib.parse.quote(os.fsencode(path))})"
    return [f"output folder: {name}"]


def settings_item(options: str) -> str:
    """What was typed, as an item of a section."""
    return f"settings: {code_span(options) if options else 'the defaults'}"


def folded_settings(settings: Settings) -> str:
    """The versions and all settings in force."""
    used = [f"{name} {version}" for name, version in versions().items()]
    in_force = []
    for key, value in plain_settings(settings).items():
        if value is not None:
            text = format_cpu_list(value) if key.endswith("_cores") else option_text(value)
            in_force.append(f"{key} {text}")
    texts = (in_markdown(", ".join(words)) for words in (used, in_force))
    return folded("versions, and all settings in force", "\n\n".join(texts))


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
    own = describe_plan(plan, settings)
    cores, more = first_lines(rank_lines(ranks) or own, max(RANKS_SHOWN, len(own)), "more rank")
    items = [
        machine_item(topology, ranks),
        f"detected cores: {format_cpu_list(topology.online)} (logical CPUs online)",
        *cores,
        *folder_items(settings.output_dir, settings.log_file),
        settings_item(as_options(asked)),
    ]
    return log_section(title, items, *more, folded_settings(settings)) + "\n"


def log_summary(
    results: Iterable[str],
    summary: Summary | None,
    warned: Iterable[str],
    of_ranks: str = "",
) -> str:
    """The end of a run's section of logs.md; without figures if no step was finished."""
    warnings, more = first_warnings(warned)
    lines = [*map(in_markdown, [*results, f"ended: {utc_now()}"]), *warnings]
    if summary:
        lines += map(in_markdown, summary_lines(summary))
        cpus = folded("CPUs that were busy in each phase", cpu_table(summary))
        tables = filter(None, [phase_table(summary), counts_table(summary.phases)])
        more = [*tables, *more, cpus, *filter(None, [of_ranks])]
    return "\n\n".join(["\n".join(f"- {line}" for line in lines), *more]) + "\n"


def tested_section(
    run: Run, asked: Settings, results: Iterable[str], warned: Iterable[str], tables: Iterable[str]
) -> str:
    """The section of a checkpoint that was tested: what came of it, and `tables` in Markdown."""
    groups = "; ".join(f"{group.name} {group}" for group in run.plan.groups)
    own = [f"split {run.plan.split}: {groups}"]
    cores, ranks = first_lines(rank_lines(run.ranks) or own, RANKS_SHOWN, "more rank")
    warnings, more = first_warnings(warned)
    items = [
        machine_item(run.topology, run.ranks),
        *cores,
        *folder_items(run.settings.output_dir, run.settings.log_file),
        settings_item(as_options(asked)),
        *map(in_markdown, results),
        *warnings,
    ]
    below = *tables, *more, *ranks, folded_settings(run.settings)
    return log_section(f"{run.settings.model}, tested", items, *below)


def where_logged(log: Path) -> list[str]:
    """The line that names the log, and one that says how to begin another if it has grown large."""
    lines = [f"log in {log}"]
    with contextlib.suppress(OSError):
        size_bytes = log.stat().st_size
        if size_bytes > LARGE_LOG_BYTES:
            size = f"{size_bytes / 2**20:.1f} MiB"
            lines.append(f"note: {log} has {size}; another name as --log-file begins a new one")
    return lines


class LogSection:
    """A run's section of logs.md: a heading, a line for each epoch, a summary in the end.

    A hidden comment keeps the place where the section goes on: meanwhile another run may have begun
    its section below, and you may have edited the file. If the comment has gone, the section begins
    once more at the end of the file.
    """

    def __init__(self, path: Path, heading: str, epochs: int):
        """`epochs` are those to come, at most; 0 if steps are counted."""
        self._path, self._heading, self._epochs = path, heading, epochs
        self._opening, self._closing = FENCE, FENCE
        if epochs > EPOCHS_SHOWN:
            self._opening = fold_start(f"the epochs, up to {epochs}") + FENCE
            self._closing = f"{FENCE.strip()}{FOLD_END}\n"
        self._place = f"<!-- run {os.urandom(8).hex()} goes on here -->\n"
        self._edited = can_be_edited(path)

    def begin(self) -> None:
        """Write the heading, and an empty block for the lines of epochs."""
        block = (self._opening + self._closing if self._epochs else "") + self._place
        append_text(self._path, self._heading + (block if self._edited else ""), LOG_HEADER)

    def add_epoch(self, line: str) -> None:
        """Write a line, below those before it."""
        end = self._closing + self._place
        self._go_on(end, f"{line}\n{end}", f"{line}\n\n", f"{self._opening}{line}\n{end}")

    def end(self, summary: str) -> None:
        """Write the summary."""
        self._go_on(self._place, f"\n{summary}", summary, summary)

    def _go_on(self, place: str, text: str, appended: str, anew: str) -> None:
        """Put text at its place; append it to a file without one, or begin the section anew."""
        if not self._edited:
            append_text(self._path, appended)
        elif not replace_text(self._path, place, text):
            append_text(self._path, self._heading + anew, LOG_HEADER)
