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
from split_affinity.reports.contents import files_line, own_files
from split_affinity.reports.counts import counts_table
from split_affinity.reports.log import (
    LogSection,
    log_heading,
    log_summary,
    picture_footer,
    where_logged,
)
from split_affinity.reports.operators import (
    NOT_PROFILED,
    OPERATORS_CSV,
    describe_operators,
    operator_tables,
    operators_csv,
)
from split_affinity.reports.phases import PhaseFile
from split_affinity.reports.plots import draw_curves, draw_gradients
from split_affinity.reports.summary import RunStatistics, Summary
from split_affinity.reports.tables import (
    BAR,
    CURVES,
    GRADIENTS,
    METRICS,
    RAW_FIELDS,
    TENSORBOARD,
    TIMELINE,
    TRACE,
    WIDE_COLUMNS,
    contention_texts,
    describe_run,
    epoch_line,
    memory_lines,
    phase_table,
    rank_table,
    result_lines,
    step_figures,
    summary_lines,
    tables_of_ranks,
    tells_top5,
    without_top5,
)
from split_affinity.reports.tensorboard import EventFile, epoch_scalars, step_scalars
from split_affinity.reports.timeline import Panel, draw_timelines, steps_to_draw
from split_affinity.reports.trace import trace_of_ranks
from split_affinity.terminal import say, say_lines, warn
from split_affinity.text import folded, plural, shown, span_text, utc_now
from split_affinity.training.operators import OperatorTimes
from split_affinity.training.optimizer import steps_in_epoch, total_steps
from split_affinity.training.profiling import OperatorWatch
from split_affinity.training.steps import StepResult
from split_affinity.training.update import gradient_warnings

RECENT_STEPS = 100  # go into the time that is left; the median of thousands would take longer
STEPS_OF_RANKS = 50  # the latest, which trace.json has of several ranks
RANKS_TO_DRAW, RANKS_WITH_CORES = 16, 4  # in timeline.png; and with rows of their cores


@dataclass(frozen=True)
class RankFigures:
    """The figures of one rank at the end of a run; `steps` are the latest ones."""

    summary: Summary | None
    warnings: Sequence[str]
    steps: Sequence[StepResult]
    looks: Sequence[Contention]
    operators: OperatorTimes | None = None


def by_one_clock(every: Sequence[RankFigures]) -> list[RankFigures]:
    """The figures of all ranks with their times by the clock of rank 0."""

    def shift(spans: Iterable[Any], by_s: float) -> tuple[Any, ...]:
        return tuple(
            dataclasses.replace(span, start_s=span.start_s + by_s, end_s=span.end_s + by_s)
            for span in spans
        )

    aligned = []
    for figures in every:
        # A step ends when all ranks have heard of each other: `synced_s` is the same moment.
        pairs = zip(every[0].steps, figures.steps, strict=True)
        by_s = statistics.median(first.synced_s - own.synced_s for first, own in pairs)
        steps = [
            dataclasses.replace(
                step, records=shift(step.records, by_s), loads=shift(step.loads, by_s)
            )
            for step in figures.steps
        ]
        looks = shift(figures.looks, by_s)
        aligned.append(dataclasses.replace(figures, steps=steps, looks=looks))
    return aligned


def rank_panels(ranks: Ranks, every: Sequence[RankFigures], count: int, what: str) -> list[Panel]:
    """A panel for each of the first ranks with its latest steps, all times by one clock."""
    latest = [figures.steps[-count:] for figures in every[:RANKS_TO_DRAW]]
    zero_s = min(record.start_s for steps in latest for step in steps for record in step.records)
    panels = []
    for rank, steps in enumerate(latest):
        plan, host = ranks.plans[rank], ranks.hosts[rank]
        title = f"rank {rank} on {host.name}" + ("" if rank else f": {what}")
        lanes_only = ranks.size > RANKS_WITH_CORES
        looks = every[rank].looks
        panels.append(Panel(title, plan, steps, host.topology.cores, looks, zero_s, lanes_only))
    return panels


class RunReport:
    """Prints and writes the figures of one run while it goes on, and when it ends.

    Of several ranks the first does; the others only warn about their own cores. metrics.jsonl is
    continued if it exists: every run begins with its own line of type "run". A file that cannot be
    written, on a full disk say, is a warning: the run goes on.
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
        """`asked` are the settings as typed, before open ones were decided."""
        self._settings, self._topology, self._plan = settings, topology, plan
        self._progress, self._ranks = progress, ranks
        self._total = total_steps(settings, progress.epoch_batches)
        self._statistics = RunStatistics(plan, loads_images=bool(settings.data_path))
        self.watch: OperatorWatch | None = None
        self._warnings: dict[str, str] = {}  # by kind: each kind is shown once
        if settings.output_dir and not ranks.rank:
            settings.output_dir.mkdir(parents=True, exist_ok=True)
        tqdm.monitor_interval = 0  # its watching thread would use CPU time on some core
        look = {"bar_format": BAR, "dynamic_ncols": True, "disable": True if ranks.rank else None}
        self._bar = tqdm(total=self._total, initial=progress.step, **look)
        run = {"settings": plain_settings(settings), "plan": dataclasses.asdict(plan)}
        run |= {"resumed_at_step": progress.step, "versions": versions(), **rank_metrics(ranks)}
        self._write_metrics({"type": "run", **run, **machine_metrics(topology)})
        self._events: EventFile | None = None
        self._phases: PhaseFile | None = None
        if settings.output_dir and (settings.phases or settings.counters):
            self._phases = PhaseFile(settings.output_dir, plan, utc_now(), ranks.rank)
        if settings.tensorboard and not ranks.rank:
            self._events = EventFile(settings.output_dir / TENSORBOARD, progress.step + 1)
        heading = log_heading(settings, asked or settings, topology, plan, progress.step, ranks)
        # At least one, for the block of a run that was asked for fewer epochs than it has made.
        epochs = max(1, settings.epochs - progress.epoch) if settings.epochs else 0
        self._log = LogSection(settings.log_file, heading, epochs)
        self._write(self._log.begin)

    def warn(self, kind: str, text: str, own: bool = False) -> None:
        """Show the first warning of a kind, and keep it for the log; each rank shows its `own`."""
        rank = self._ranks.rank
        if own and self._ranks.size > 1:
            text = f"rank {rank}: {text}"
        if kind not in self._warnings:
            self._warnings[kind] = text
            if own or not rank:
                warn(text)

    def alarm(self, text: str) -> None:
        """Show a warning every time, and keep it for the log."""
        self._warnings[text] = text
        if not self._ranks.rank:
            warn(text)

    def check_placement(self, records: Iterable[PhaseRecord]) -> None:
        """Warn of threads that were not where they belong."""
        for record in records:
            for number, text in enumerate(placement_warnings(record, self._plan)):
                self.warn(f"{record.phase} {number}", text, own=True)

    def contention(self, contention: Contention | None) -> None:
        """Take in a look at contention, if there was one; warn when it begins to be large."""
        lately = self._statistics.add_contention(contention) if contention else None
        if lately:
            latest = f"in the latest {lately.end_s - lately.start_s:.0f} s"
            slower = "every step waits for the slowest of its threads"
            for text in contention_texts(lately, CONTENTION_SHARE):
                self.warn(text.partition(" took")[0], f"{text} {latest}: {slower}", own=True)

    def bad_images(self, bad: BadImages) -> None:
        """Warn of broken images that were left out."""
        for text in bad.messages:
            self.warn(text, f"{text}: left out")

    def step(self, result: StepResult) -> None:
        """Take in one finished step."""
        self._statistics.add(result)
        self._write_metrics(result.as_metrics())
        if self._phases:
            self._write(self._phases.add, result, own=True)
        if self._events:
            self._write(self._events.add, result.step, step_scalars(result))
        self.check_placement(result.records)
        self.contention(result.contention)
        recent = itertools.islice(reversed(self._statistics.latest), RECENT_STEPS)
        step_s = statistics.median(step.step_s for step in recent)
        left_s = step_s * (self._total - result.step)  # validation is not counted
        wide = (self._bar.format_dict["ncols"] or 0) >= WIDE_COLUMNS
        self._bar.set_postfix_str(step_figures(result, left_s, phases=wide), refresh=False)
        self._bar.update()
        if result.step % self._settings.print_freq == 0:
            progress, epochs, epoch = self._progress, self._settings.epochs, ""
            if epochs:
                left = steps_in_epoch(self._settings, progress.epoch_batches - progress.batches)
                epoch = f"epoch {progress.epoch + 1}/{epochs}: {span_text(step_s * left)}"
            say(f"step {result.step}/{self._total}: {step_figures(result, left_s, epoch)}")

    def epoch(self, row: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
        """Take in the figures of a finished epoch; `history` has those of all epochs."""
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
            if not tells_top5(self._settings.num_classes):
                history = [*map(without_top5, history)]
            best = self._progress.best
            self._write(draw_curves, folder / CURVES, title, history, footer, best)
            self._write(draw_gradients, folder / GRADIENTS, title, history, footer)

    def finish(self, outcome: str, together: bool = True) -> None:
        """Print the summary, end log and metrics, draw; with all ranks if they end `together`."""
        self._bar.close()
        if self._phases:
            self._write(self._phases.finish, own=True)
        every = self._gather(together)
        if self._ranks.rank:
            return
        step, total = self._progress.step, self._total
        done = f"{step} of {plural(total, 'step')}"
        if step > total:  # a run that goes on with fewer epochs than it has made
            done = f"{plural(step, 'step')}; {total} were asked for"
        outcome = shown(f"{outcome} after {done}")
        summary, folder = every[0].summary, self._settings.output_dir
        results, files = result_lines(self._progress), []
        if folder:
            to_come = (TIMELINE, TRACE) if summary else ()
            to_come += (OPERATORS_CSV,) if every[0].operators else ()
            files = own_files(folder, to_come=to_come)
        said = [files_line(folder, files)] if files else []
        say_lines(["", *results, *said, *where_logged(self._settings.log_file), "", outcome])
        results += [f"files: {', '.join(files)}"] if files else []
        results.append(f"outcome: {outcome}")
        metrics, of_ranks = {"type": "summary", "outcome": outcome}, ""
        if summary:
            tables = [*summary_lines(summary), "", phase_table(summary, with_cores=False)]
            if counted := counts_table(summary.phases):
                tables += ["", counted]
            metrics |= dataclasses.asdict(summary)
            if len(every) > 1:
                hosts, summaries = self._ranks.hosts, [each.summary for each in every]
                tables += ["", rank_table(hosts, summaries)]
                of_ranks = tables_of_ranks(hosts, summaries)
                metrics["ranks"] = [dataclasses.asdict(each) for each in summaries]
            say("\n".join(tables))
            of_ranks += self._say_operators(every)
            results += memory_lines(summary.memory_by_node, self._topology, self._plan)
        self._write_metrics(metrics)
        warned = dict.fromkeys(text for each in every for text in each.warnings)
        self._write(self._log.end, log_summary(results, summary, warned, of_ranks))
        if summary and folder:
            self._draw(every)

    def _gather(self, together: bool) -> list[RankFigures]:
        """The figures of all ranks, or of this one alone if it ends by itself or lost another."""
        own = RankFigures(
            summary=self._statistics.summary() if self._statistics.steps else None,
            warnings=list(self._warnings.values()),
            steps=list(self._statistics.latest)[-STEPS_OF_RANKS:],
            looks=self._statistics.looks,
            operators=self.watch.times if self.watch else None,
        )
        if together:
            with contextlib.suppress(RankLost):
                return self._ranks.gather_objects(own)
        return [own]

    def _say_operators(self, every: Sequence[RankFigures]) -> str:
        """Print the operators of rank 0, write those of all ranks; returns what the log has."""
        found, folder = [each.operators for each in every], self._settings.output_dir
        if not found[0]:
            if self.watch and self.watch.wanted:
                say_lines(["", NOT_PROFILED])
            return ""
        lines = describe_operators(found[0], every[0].summary.median_step_s, len(every))
        tables = operator_tables(found[0])
        say("\n".join(["", *lines, "", tables]))
        if folder:
            self._write(write_whole, folder / OPERATORS_CSV, operators_csv(found))
        return folded(lines[0], "\n\n".join([*lines[1:], tables]))

    def _draw(self, every: Sequence[RankFigures]) -> None:
        """timeline.png and trace.json of the latest steps, in place of those of an earlier run."""
        latest, folder = list(self._statistics.latest), self._settings.output_dir
        drawn = steps_to_draw(latest)
        what = f"{self._settings.schedule}, steps {drawn[0].step} to {drawn[-1].step}"
        what += f", split {self._plan.split}"
        if len(every) == 1:
            plans, steps_by_rank = [self._plan], [latest]
            panels = [Panel(what, self._plan, drawn, self._topology.cores, self._statistics.looks)]
        else:
            every, plans = by_one_clock(every), self._ranks.plans
            steps_by_rank = [each.steps for each in every]
            panels = rank_panels(self._ranks, every, len(drawn), what)
        title, footer = describe_run(self._settings), picture_footer(self._topology)
        self._write(draw_timelines, folder / TIMELINE, title, panels, footer)
        trace = trace_of_ranks(plans, steps_by_rank, title)
        self._write(write_whole, folder / TRACE, json.dumps(trace))

    def _write_metrics(self, line: dict[str, Any]) -> None:
        if self._settings.output_dir:
            text = json.dumps(line, allow_nan=False) + "\n"
            self._write(append_text, self._settings.output_dir / METRICS, text)

    def _write(self, function: Callable[..., None], *args: Any, own: bool = False) -> None:
        """Write something, on the first rank, or each rank its `own`; a failure is a warning."""
        if self._ranks.rank and not own:
            return
        try:
            function(*args)
        except Exception as error:  # no report is worth the run
            self.warn(likely_reason(error), likely_reason(error))
