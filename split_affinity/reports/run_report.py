"""Everything that one run shows and writes while it goes on, and when it ends.

The other files of this folder turn figures into text and pictures; this one decides when.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from split_affinity.checkpoints.state import Progress, versions
from split_affinity.data.loader import BadImages
from split_affinity.errors import likely_reason
from split_affinity.files import append_text, write_whole
from split_affinity.lanes.audit import PhaseRecord, placement_warnings
from split_affinity.lanes.contention import CONTENTION_SHARE, Contention
from split_affinity.machine.plan import CorePlan
from split_affinity.machine.topology import Topology, machine_metrics
from split_affinity.options.settings import Settings, plain_settings
from split_affinity.ranks.ranks import ONE_PROCESS, RankLost, Ranks, rank_metrics
from split_affinity.reports.log import LogSection, log_heading, log_summary, picture_footer
from split_affinity.reports.plots import draw_curves, draw_gradients
from split_affinity.reports.summary import RunStatistics, Summary
from split_affinity.reports.tables import (
    BAR,
    CURVES,
    GRADIENTS,
    METRICS,
    RAW_FIELDS,
    RECENT_STEPS,
    TENSORBOARD,
    TIMELINE,
    TRACE,
    bar_text,
    contention_texts,
    describe_run,
    epoch_line,
    memory_lines,
    phase_table,
    rank_table,
    result_lines,
    step_line,
    summary_lines,
    tables_of_ranks,
)
from split_affinity.reports.tensorboard import EventFile, epoch_scalars, step_scalars
from split_affinity.reports.timeline import Panel, draw_timelines, steps_to_draw
from split_affinity.reports.trace import by_one_clock, trace_events, trace_of_ranks
from split_affinity.terminal import say, say_lines, warn
from split_affinity.text import plural, shown, span_text
from split_affinity.training.optimizer import steps_in_epoch, total_steps
from split_affinity.training.steps import StepResult
from split_affinity.training.update import gradient_warnings

STEPS_OF_RANKS = 50  # the latest, which trace.json has of several ranks
RANKS_TO_DRAW, RANKS_WITH_CORES = 16, 4  # in timeline.png; and with rows of their cores


@dataclass(frozen=True)
class RankFigures:
    """What a rank has to tell at the end of a run; `steps` are the latest ones."""

    summary: Summary | None
    warnings: Sequence[str]
    steps: Sequence[StepResult]
    looks: Sequence[Contention]


def rank_panels(
    what: str,
    ranks: Ranks,
    every: Sequence[RankFigures],
    steps_by_rank: Sequence[Sequence[StepResult]],
    count: int,
) -> list[Panel]:
    """A panel for the latest steps, `count` of them, of each rank, all by one clock; of many ranks
    the first ones, without rows of cores.
    """
    latest = [steps[-count:] for steps in steps_by_rank][:RANKS_TO_DRAW]
    zero_s = min(record.start_s for steps in latest for step in steps for record in step.records)
    panels = []
    for rank, steps in enumerate(latest):
        plan, host = ranks.plans[rank], ranks.hosts[rank]
        title = f"rank {rank} on {host.name}" + ("" if rank else f": {what}")
        ahead_s = steps[-1].synced_s - every[rank].steps[-1].synced_s
        looks = [
            dataclasses.replace(each, start_s=each.start_s + ahead_s, end_s=each.end_s + ahead_s)
            for each in every[rank].looks
        ]
        lanes_only = ranks.size > RANKS_WITH_CORES
        panels.append(Panel(title, plan, steps, host.topology.cores, looks, zero_s, lanes_only))
    return panels


class RunReport:
    """Everything that one run shows and writes while it goes on, and when it ends.

    metrics.jsonl is continued if it exists: every run begins with its own line of type "run". What
    cannot be written, on a full disk say, is warned of, and the run goes on.
    """

    def __init__(
        self,
        settings: Settings,
        topology: Topology,
        plan: CorePlan,
        progress: Progress,
        asked: Settings | None = None,
        ranks: Ranks = ONE_PROCESS,
    ):
        """`asked` are the settings as they were before what they leave open was decided. All but
        the first of the `ranks` are silent, but for what is wrong with their own cores.
        """
        self._settings, self._topology, self._plan = settings, topology, plan
        self._progress, self._ranks = progress, ranks
        self._total = total_steps(settings, progress.epoch_batches)
        self._statistics = RunStatistics(plan)
        self._warnings: dict[str, str] = {}  # by kind: each kind is shown once
        if settings.output_dir and not ranks.rank:
            settings.output_dir.mkdir(parents=True, exist_ok=True)
        run = {"settings": plain_settings(settings), "plan": dataclasses.asdict(plan)}
        run |= {"resumed_at_step": progress.step, "versions": versions(), **rank_metrics(ranks)}
        tqdm.monitor_interval = 0  # its watching thread would use CPU time on some core
        look = {"bar_format": BAR, "dynamic_ncols": True, "disable": True if ranks.rank else None}
        self._bar = tqdm(total=self._total, initial=progress.step, **look)
        self._write_metrics({"type": "run", **run, **machine_metrics(topology)})
        self._events: EventFile | None = None
        if settings.tensorboard and not ranks.rank:
            self._events = EventFile(settings.output_dir / TENSORBOARD, progress.step + 1)
        heading = log_heading(settings, asked or settings, topology, plan, progress.step, ranks)
        self._log = LogSection(settings.log_file, heading, bool(settings.epochs))
        self._write(self._log.begin)

    def warn(self, kind: str, text: str, own: bool = False) -> None:
        """Show a warning on the screen, the first of its kind, and keep it for the log; of other
        ranks than the first only what is their `own`.
        """
        rank = self._ranks.rank
        if own and self._ranks.size > 1:
            text = f"rank {rank}: {text}"
        if kind not in self._warnings:
            self._warnings[kind] = text
            if own or not rank:
                warn(text)

    def alarm(self, text: str) -> None:
        """Show a warning every time that it arises, and keep it for the log."""
        self._warnings[text] = text
        if not self._ranks.rank:
            warn(text)

    def check_placement(self, records: Iterable[PhaseRecord]) -> None:
        """Warn of threads that were not where they belong."""
        for record in records:
            for number, text in enumerate(placement_warnings(record, self._plan)):
                self.warn(f"{record.phase} {number}", text, own=True)

    def contention(self, contention: Contention | None) -> None:
        """Take in what others took of the cores, if they were looked for; warn when that begins."""
        if not contention:
            return
        lately = self._statistics.add_contention(contention)
        for text in contention_texts(lately, CONTENTION_SHARE) if lately else ():
            latest = f"in the latest {lately.end_s - lately.start_s:.0f} s"
            slower = "every step waits for the slowest of its threads"
            self.warn(text.partition(" took")[0], f"{text} {latest}: {slower}", own=True)

    def bad_images(self, bad: BadImages) -> None:
        """Warn of broken images that were left out."""
        for text in bad.messages:
            self.warn(text, f"{text}: left out")

    def step(self, result: StepResult) -> None:
        """Take in one finished step."""
        self._statistics.add(result)
        self._write_metrics(result.as_metrics())
        if self._events:
            self._write(self._events.add, result.step, step_scalars(result))
        self.check_placement(result.records)
        self.contention(result.contention)
        recent = itertools.islice(reversed(self._statistics.latest), RECENT_STEPS)
        step_s = statistics.median(step.step_s for step in recent)
        left_s = step_s * (self._total - result.step)  # validation is not counted
        columns = self._bar.format_dict["ncols"] or 0
        self._bar.set_postfix_str(bar_text(result, left_s, columns), refresh=False)
        self._bar.update()
        if result.step % self._settings.print_freq == 0:
            say(step_line(result, self._total, left_s, self._epoch_left(step_s)))

    def _epoch_left(self, step_s: float) -> str:
        """The running epoch, and the time that is left of it; empty where the run has none."""
        progress, epochs = self._progress, self._settings.epochs
        if not epochs:
            return ""
        steps = steps_in_epoch(self._settings, progress.epoch_batches - progress.batches)
        return f" (epoch {progress.epoch + 1}/{epochs}: {span_text(step_s * steps)})"

    def epoch(self, row: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
        """Take in the figures of a finished epoch; `history` has those of all."""
        say(epoch_line(row))
        if RAW_FIELDS[0] in row:
            say(epoch_line(row, RAW_FIELDS))
        self._write_metrics({"type": "epoch", **row})
        if self._events:
            self._write(self._events.add, self._progress.step, epoch_scalars(row))
        self._write(self._log.add_epoch, epoch_line(row))
        for text in gradient_warnings(row["gradient_norms"]):
            self.warn(text.partition(":")[0], f"epoch {row['epoch']}: {text}")
        folder, title = self._settings.output_dir, describe_run(self._settings)
        if folder:
            footer = picture_footer(self._topology)
            self._write(draw_curves, folder / CURVES, title, history, footer)
            self._write(draw_gradients, folder / GRADIENTS, title, history, footer)

    def _figures(self) -> RankFigures:
        """What this rank has to tell."""
        steps = itertools.islice(reversed(self._statistics.latest), STEPS_OF_RANKS)
        summary = self._statistics.summary() if self._statistics.steps else None
        warned = list(self._warnings.values())
        return RankFigures(summary, warned, [*steps][::-1], self._statistics.looks)

    def _gather(self) -> list[RankFigures]:
        """What all ranks have to tell; if one of them has gone meanwhile, what this one has."""
        if self._ranks.size > 1:
            with contextlib.suppress(RankLost):
                return self._ranks.exchange(self._figures())
        return [self._figures()]

    def finish(self, outcome: str, together: bool = True) -> None:
        """Print the summary, end the log and the metrics, draw; with those of the other ranks, if
        these end `together` with this one.
        """
        self._bar.close()
        every = self._gather() if together else [self._figures()]
        if self._ranks.rank:
            return
        step, total = self._progress.step, self._total
        done = f"{step} of {plural(total, 'step')}"
        if step > total:  # of a run that goes on with fewer epochs than it has made
            done = f"{plural(step, 'step')}; {total} were asked for"
        outcome = shown(f"{outcome} after {done}")
        summary, hosts = every[0].summary, self._ranks.hosts
        results = result_lines(self._settings, self._progress, (TIMELINE, TRACE) if summary else ())
        tables = [*summary_lines(summary), "", phase_table(summary, False)] if summary else []
        several = [each.summary for each in every] if summary and len(every) > 1 else []
        tables += ["", rank_table(hosts, several)] if several else []
        say_lines(["", *results, f"log in {self._settings.log_file}", "", outcome])
        if tables:
            say("\n".join(tables))
        figures = dataclasses.asdict(summary) if summary else {}
        figures |= {"ranks": list(map(dataclasses.asdict, several))} if several else {}
        self._write_metrics({"type": "summary", "outcome": outcome, **figures})
        results.append(f"outcome: {outcome}")
        if summary:
            results += memory_lines(summary.memory_by_node, self._topology, self._plan)
        warned = dict.fromkeys(text for each in every for text in each.warnings)
        others = tables_of_ranks(hosts, several) if several else ()
        self._write(self._log.end, log_summary(results, summary, warned, others))
        if summary and self._settings.output_dir:
            self._draw(every)

    def _draw(self, every: Sequence[RankFigures]) -> None:
        """timeline.png and trace.json of the latest steps, in place of those of an earlier run."""
        steps, folder = list(self._statistics.latest), self._settings.output_dir
        drawn = steps_to_draw(steps)
        what = f"steps {drawn[0].step} to {drawn[-1].step}, split {self._plan.split}"
        what = f"{self._settings.schedule}, {what}"
        panels = [Panel(what, self._plan, drawn, self._topology.cores, self._statistics.looks)]
        trace = partial(trace_events, self._plan, steps)
        if len(every) > 1:
            aligned = by_one_clock([each.steps for each in every])
            panels = rank_panels(what, self._ranks, every, aligned, len(drawn))
            trace = partial(trace_of_ranks, self._ranks.plans, aligned)
        title, footer = describe_run(self._settings), picture_footer(self._topology)
        self._write(draw_timelines, folder / TIMELINE, title, panels, footer)
        self._write(write_whole, folder / TRACE, json.dumps(trace()))

    def _write_metrics(self, line: dict[str, Any]) -> None:
        if self._settings.output_dir:
            text = json.dumps(line, allow_nan=False) + "\n"
            self._write(append_text, self._settings.output_dir / METRICS, text)

    def _write(self, function: Callable[..., None], *args: Any) -> None:
        """Write something, on the first rank; if that fails, warn."""
        if self._ranks.rank:
            return
        try:
            function(*args)
        except Exception as error:  # no report is worth the run
            self.warn(likely_reason(error), likely_reason(error))
