"""What every lane and core did when, as a picture."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_affinity.files import write_whole
from split_affinity.lanes.audit import PhaseRecord
from split_affinity.lanes.contention import CONTENTION_SHARE, Contention
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.machine.topology import Core
from split_affinity.reports.summary import STEPS_TO_DRAW
from split_affinity.text import format_cpu_list, shown
from split_affinity.training.steps import StepResult

COLOURS = {"forward": "#4477aa", "backward": "#cc6677", "reduce": "#aa3377", "update": "#228833"}
COLOURS |= {"refresh": "#ddaa33"}
ELSE, IDLE = "busy with something else", "core idle"
OTHERS = f"other processes took {100 * CONTENTION_SHARE:g} % or more"
STOLEN = f"the hypervisor took {100 * CONTENTION_SHARE:g} % or more"
COLOURS |= {ELSE: "#8f8f8f", IDLE: "#e9e9e9", OTHERS: "#8b0000", STOLEN: "#ee7733"}
EXPLANATION = (
    "height in a core's row: share of the time that the core was busy "
    "(pale: mean of its lane's cores); white: not measured"
)
PHASES_TO_DRAW = 40
ROWS_TO_DRAW = 16  # of cores; the lanes have rows of their own
TITLE_SHARE = 0.97  # of a picture's width, at most
SHORT_PHASE_S = 0.05  # five of the ticks in which the kernel counts a CPU's time


@dataclass(frozen=True)
class Row:
    """A row of a timeline: the phases of a group's lane, or how busy some of its CPUs were."""

    label: str
    group: Group
    cpus: tuple[int, ...] = ()

    def share(self, busy_s: dict[int, float], elapsed_s: float) -> float:
        """The share of the time that the CPUs were busy, 1 at most; of several see Group.busy."""
        total_s = sum(busy_s.get(cpu, 0.0) for cpu in self.cpus)
        if len(self.cpus) == 1:
            return min(1.0, total_s / elapsed_s)
        part = len(self.cpus) / len(self.group.cpus)
        return min(1.0, self.group.busy(total_s / part, elapsed_s))


@dataclass(frozen=True)
class Panel:
    """One timeline of a picture: the lanes of a plan during some steps."""

    title: str
    plan: CorePlan
    steps: Sequence[StepResult]
    cores: Sequence[Core] = ()  # of the machine; they name the rows if the plan has many CPUs
    looks: Sequence[Contention] = ()  # lately: a few steps may be too short for one
    zero_s: float | None = None  # where the time begins; None: with the first phase
    lanes_only: bool = False  # no rows of CPUs

    @property
    def contentions(self) -> Sequence[Contention]:
        """The looks at contention, those of the steps if there are no others."""
        return self.looks or [step.contention for step in self.steps if step.contention]

    @property
    def records(self) -> list[PhaseRecord]:
        """The steps' phases by start time."""
        return by_start(record for step in self.steps for record in step.records)


def by_start(records: Iterable[PhaseRecord]) -> list[PhaseRecord]:
    """Phases by start time."""
    return sorted(records, key=lambda record: record.start_s)


def extent_s(records: Collection[PhaseRecord]) -> float:
    """Seconds from the first phase's start to the last one's end."""
    return max(one.end_s for one in records) - min(one.start_s for one in records)


def steps_to_draw(steps: Sequence[StepResult]) -> Sequence[StepResult]:
    """The latest steps: at most three, at most 40 phases, but at least one step."""
    phases = itertools.accumulate(len(step.records) for step in reversed(steps))
    count = sum(so_far <= PHASES_TO_DRAW for so_far in phases)
    return steps[-max(1, min(STEPS_TO_DRAW, count)) :]


def number_batches(records: Sequence[PhaseRecord]) -> list[int | None]:
    """For each phase, by start time, the number of its micro-batch; None for those without one.

    Backward phases count up, and forward phases come in the same order. If a backward phase comes
    first, one forward phase, its own, ran before all of these: a schedule keeps at most one output
    waiting.
    """
    backward_s = min((one.start_s for one in records if one.phase == "backward"), default=math.inf)
    forward_s = min((one.end_s for one in records if one.phase == "forward"), default=math.inf)
    count = {"backward": 0, "forward": int(backward_s < forward_s)}
    numbers: list[int | None] = []
    for record in records:
        if record.phase in count:
            count[record.phase] += 1
        numbers.append(count.get(record.phase))
    return numbers


def panel_rows(panel: Panel) -> list[Row]:
    """A row for each lane, and below it rows for the CPUs of its group.

    Each row has one CPU. If the plan has more than 16, a row has those that share an L3 cache; with
    more than 16 caches, those of a NUMA node; else the whole group.
    """
    used = {cpu for group in panel.plan.groups for cpu in group.cpus}
    homes = [(cpu, core) for core in panel.cores for cpu in core.cpus]
    single = {cpu: f"core {cpu}" for cpu in used}
    caches = {cpu: f"L3 of CPU {core.l3}" for cpu, core in homes if core.l3 >= 0}
    nodes = {cpu: f"node {core.node}" for cpu, core in homes}
    for names in (single, caches, nodes, dict.fromkeys(used, "all")):
        if names.keys() >= used and len({names[cpu] for cpu in used}) <= ROWS_TO_DRAW:
            break
    rows = []
    for group in panel.plan.groups:
        rows.append(Row(f"{group.name} lane", group))
        if panel.lanes_only:
            continue
        cpus_by_name = defaultdict(list)
        for cpu in group.cpus:
            cpus_by_name[names[cpu]].append(cpu)
        for name, cpus in cpus_by_name.items():
            cores = f"cores {format_cpu_list(cpus)}"
            cores = cores if len(cores) <= 30 else f"{len(cpus)} CPUs"
            rows.append(Row(name if names is single else f"{name}: {cores}", group, tuple(cpus)))
    return rows


def draw_timelines(path: Path, title: str, panels: Sequence[Panel], footer: str = "") -> None:
    """Draw panels one above the other, over the same span of time."""
    from matplotlib.patches import Patch

    span_s = max(
        min(extent_s(panel.records) for panel in panels),
        *(extent_s(step.records) for panel in panels for step in panel.steps),  # whole steps
    )
    rows = [len(panel_rows(panel)) for panel in panels]
    row_inches = 0.3 if max(rows) <= 12 else 0.2
    heights = [row_inches * count + 0.5 for count in rows]
    figure = new_figure(12, sum(heights) + 1.4, footer)
    axes = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel, span_s)
    axes[-1].set_xlabel("seconds")
    drawn = {label for ax in axes for label in ax.get_legend_handles_labels()[1]}
    patches = [Patch(color=COLOURS[key], label=key) for key in COLOURS if key in drawn]
    columns = len(patches) if len(patches) <= 6 else 4
    style = {"ncols": columns, "frameon": False, "fontsize": 9, "title_fontsize": 9}
    figure.legend(handles=patches, title=EXPLANATION, loc="outside lower center", **style)
    write_title(figure, title)
    save_figure(figure, path)


def new_figure(width_inches: float, height_inches: float, footer: str = "") -> Any:
    """An empty picture; with a footer in small print, the part above that."""
    from matplotlib.figure import Figure  # here, since many runs draw nothing

    lines = textwrap.wrap(footer, int(19 * width_inches))
    heights = height_inches, 0.05 + 0.12 * len(lines)
    figure = Figure(figsize=(width_inches, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=heights)
    style = {"fontsize": 6.5, "color": "#555555", "va": "top", "parse_math": False}
    lower.text(0.1 / width_inches, 1, "\n".join(lines), **style)
    return upper


def write_title(figure: Any, title: str) -> None:
    """Write a title above a picture, in as many lines as its width needs."""
    text = figure.suptitle(shown(title), fontsize=10, parse_math=False)
    wrap_text(text, TITLE_SHARE * figure.bbox.width)


def wrap_text(text: Any, room_px: float) -> None:
    """Break a text of matplotlib's into as many lines as it takes to be no wider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(text.figure.figure).get_renderer()
    whole = text.get_text()
    letters = len(whole)
    while (width_px := text.get_window_extent(renderer).width) > room_px and letters > 1:
        letters = min(letters - 1, max(1, int(letters * room_px / width_px)))
        text.set_text("\n".join(textwrap.wrap(whole, letters)))


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture in place of what was there. Raises RunError if that fails."""
    picture = io.BytesIO()
    figure.figure.savefig(picture, dpi=110, format=path.suffix[1:])
    write_whole(path, picture.getvalue())


def draw_panel(ax: Any, panel: Panel, span_s: float) -> None:
    """Draw one panel on its axes, without what lies outside the span."""
    rows, records = panel_rows(panel), panel.records
    zero_s = records[0].start_s if panel.zero_s is None else panel.zero_s
    for y, row in enumerate(rows):
        if row.cpus:
            bars = core_bars(row, records)
        else:
            bars = lane_bars(row.group.name, panel.contentions, records)
        for bar in bars:
            if zero_s < bar.end_s and bar.start_s < zero_s + span_s:
                draw_bar(ax, y, bar, zero_s, span_s)
    size = 8 if len(rows) <= 12 else 6.5
    ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=size)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, span_s)
    title = ax.set_title(shown(panel.title), loc="left", fontsize=9, parse_math=False)
    wrap_text(title, ax.bbox.width)  # less than it gets in the end
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)


@dataclass(frozen=True)
class Bar:
    """A rectangle in a row of a timeline, in the colour of its key."""

    key: str
    start_s: float
    end_s: float
    top: float = -0.36  # from the row's middle downwards; a row is 1 high
    height: float = 0.81
    text: str = ""
    alpha: float = 1.0


def draw_bar(ax: Any, y: int, bar: Bar, zero_s: float, span_s: float) -> None:
    """Draw a bar in row `y`, with its text if there is room."""
    start_s, duration_s = bar.start_s - zero_s, bar.end_s - bar.start_s
    look = {"color": COLOURS[bar.key], "label": bar.key, "alpha": bar.alpha}
    look |= {"edgecolor": "white", "linewidth": 0.6 if bar.text else 0}
    ax.broken_barh([(start_s, duration_s)], (y + bar.top, bar.height), **look)
    middle_s = start_s + duration_s / 2
    if bar.text and duration_s > 0.012 * span_s and middle_s < span_s:
        style = {"ha": "center", "va": "center", "color": "white", "fontsize": 9}
        ax.text(middle_s, y + bar.top + bar.height / 2, bar.text, **style)


def lane_bars(
    lane: str, contentions: Iterable[Contention], records: Sequence[PhaseRecord]
) -> Iterator[Bar]:
    """The phases of a lane, and above them strips that mark contention for its cores."""
    for record, number in zip(records, number_batches(records), strict=True):
        if record.lane == lane:
            yield Bar(record.phase, record.start_s, record.end_s, text=str(number or ""))
    for each in contentions:
        if each.others.get(lane, 0.0) >= CONTENTION_SHARE:
            yield Bar(OTHERS, each.start_s, each.end_s, top=-0.5, height=0.07)
        if each.stolen >= CONTENTION_SHARE:
            yield Bar(STOLEN, each.start_s, each.end_s, top=-0.43, height=0.07)


def core_bars(row: Row, records: Sequence[PhaseRecord]) -> Iterator[Bar]:
    """How busy the CPUs of a row were, in the phases of their lane and between them."""
    for record in records:
        if record.lane == row.group.name:
            own_s, others_s = busy_in_phase(record, row.group.cpus)
            own = row.share(own_s, record.duration_s)
            both = row.share(Counter(own_s) + Counter(others_s), record.duration_s)
            known = record.cpu_busy_s or record.used_on_s or row.cpus == row.group.cpus
            yield from stack_bars(
                record.start_s,
                record.end_s,
                {record.phase: own, ELSE: both - own},
                idle=others_s is not None,
                alpha=1.0 if known else 0.4,  # pale: the mean of the lane's cores
            )
    yield from bars_between_phases(row, records)


def stack_bars(
    start_s: float, end_s: float, shares: dict[str, float], idle: bool = True, alpha: float = 1.0
) -> Iterator[Bar]:
    """Bars for shares of a span of time, one upon the other; the rest is `idle`, or unknown."""
    if idle:
        yield Bar(IDLE, start_s, end_s, -0.35, 0.7)
    top = 0.35
    for key, share in shares.items():
        top -= 0.7 * share
        if share > 0:
            yield Bar(key, start_s, end_s, top, 0.7 * share, alpha=alpha)


def busy_in_phase(
    record: PhaseRecord, cpus: Sequence[int]
) -> tuple[dict[int, float], dict[int, float] | None]:
    """Seconds that each CPU of a group was busy with a phase, and with something else, or None.

    A thread's clock is exact, but tells only on which CPU the thread was last seen. The kernel
    counts what each CPU did for anybody, in ticks too coarse for a short phase. Where the kernel's
    count is missing or too coarse, the threads' clocks have to do, and the rest is unknown.
    """
    if not record.cpu_busy_s or record.duration_s < SHORT_PHASE_S:
        duration_s = record.duration_s
        busy_s = record.used_on_s or dict.fromkeys(cpus, record.cpu_s / len(cpus))
        most_s = {cpu: min(busy_s.get(cpu, 0.0), duration_s) for cpu in cpus}
        beyond_s = sum(busy_s.values()) - sum(most_s.values())
        if beyond_s <= 0:
            return busy_s, None
        # No CPU worked longer than the phase: a thread has moved, and was also where there is room.
        room_s = len(cpus) * duration_s - sum(most_s.values())
        part = min(1.0, beyond_s / room_s) if room_s > 0 else 0.0
        return {cpu: own_s + part * (duration_s - own_s) for cpu, own_s in most_s.items()}, None
    own_s = {cpu: min(record.used_on_s.get(cpu, 0.0), record.cpu_busy_s[cpu]) for cpu in cpus}
    rest_s = {cpu: record.cpu_busy_s[cpu] - own_s[cpu] for cpu in cpus}
    # A thread that has moved worked elsewhere too: its time is part of what seems to be others'.
    moved = (record.cpu_s - sum(own_s.values())) / (sum(rest_s.values()) or 1.0)
    others_s = {cpu: max(0.0, 1 - moved) * rest_s[cpu] for cpu in cpus}
    return {cpu: record.cpu_busy_s[cpu] - others_s[cpu] for cpu in cpus}, others_s


def bars_between_phases(row: Row, records: Sequence[PhaseRecord]) -> Iterator[Bar]:
    """How busy the CPUs of a row were while their own lane had no phase.

    The audit's closer looks at any lane tell it.
    """
    readings = busy_readings(records)
    own = [record for record in records if record.lane == row.group.name]
    begins_s = [-math.inf, *(record.end_s for record in own)]
    ends_s = [*(record.start_s for record in own), math.inf]
    for begin_s, end_s in zip(begins_s, ends_s, strict=True):
        inside = [reading for reading in readings if begin_s <= reading[0] <= end_s]
        for (start_s, before_s), (stop_s, after_s) in itertools.pairwise(readings_apart(inside)):
            worked_s = {cpu: after_s[cpu] - before_s[cpu] for cpu in row.cpus}
            yield from stack_bars(start_s, stop_s, {ELSE: row.share(worked_s, stop_s - start_s)})


def busy_readings(records: Iterable[PhaseRecord]) -> list[tuple[float, dict[int, float]]]:
    """How long each CPU had worked since boot, at both ends of each closer look, by time."""
    readings = []
    for record in records:
        if before_s := record.cpu_before_s:
            after_s = {cpu: before_s[cpu] + busy_s for cpu, busy_s in record.cpu_busy_s.items()}
            readings += [(record.start_s, before_s), (record.end_s, after_s)]
    return sorted(readings, key=lambda reading: reading[0])


def readings_apart(readings: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """The readings that are far enough apart for the kernel's ticks, up to the last one."""
    chosen = list(readings[:1])
    for reading in readings[1:]:
        if reading[0] - chosen[-1][0] >= SHORT_PHASE_S:
            chosen.append(reading)
    if len(chosen) > 1:
        chosen[-1] = readings[-1]
    return chosen
