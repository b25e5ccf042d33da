"""What every lane and core did when, as a picture."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections import Counter
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
SHORT_PHASE_S = 0.05  # five of the ticks in which the kernel counts a CPU's time


@dataclass(frozen=True)
class Row:
    """A row of a timeline: the phases of a group's lane, or how busy some of its CPUs were."""

    label: str
    group: Group
    cpus: tuple[int, ...] = ()

    def share(self, busy_s: dict[int, float], elapsed_s: float) -> float:
        """The share of the time during which the row's CPUs were busy; of several, the mean over
        what the group can use of them (see Group.busy).
        """
        total_s = sum(busy_s.get(cpu, 0.0) for cpu in self.cpus)
        if len(self.cpus) == 1:
            return min(1.0, total_s / elapsed_s)
        part = len(self.cpus) / len(self.group.cpus)
        return min(1.0, self.group.busy(total_s / part, elapsed_s))


@dataclass(frozen=True)
class Panel:
    """One timeline of a picture: the lanes of a plan during some steps, on the machine's `cores`
    (to be known if the plan has many CPUs). `looks` at what others took are those of a whole run:
    a few steps may be too short for one. It begins with the first phase, unless `zero_s` says when;
    `lanes_only` leaves the rows of CPUs out.
    """

    title: str
    plan: CorePlan
    steps: Sequence[StepResult]
    cores: Sequence[Core] = ()
    looks: Sequence[Contention] = ()
    zero_s: float | None = None
    lanes_only: bool = False

    @property
    def contentions(self) -> Sequence[Contention]:
        """What others took of the cores meanwhile."""
        return self.looks or [step.contention for step in self.steps if step.contention]

    @property
    def records(self) -> list[PhaseRecord]:
        """The steps' phases by start time."""
        return by_start(record for step in self.steps for record in step.records)

    @property
    def span_s(self) -> float:
        """Seconds from the first phase's start to the last one's end."""
        return extent_s(self.records)

    @property
    def step_s(self) -> float:
        """The same of the longest step."""
        return max(extent_s(step.records) for step in self.steps)


def by_start(records: Iterable[PhaseRecord]) -> list[PhaseRecord]:
    """Phases by start time."""
    return sorted(records, key=lambda record: record.start_s)


def extent_s(records: Collection[PhaseRecord]) -> float:
    """Seconds from the first phase's start to the last one's end."""
    starts, ends = zip(*((record.start_s, record.end_s) for record in records), strict=True)
    return max(ends) - min(starts)


def steps_to_draw(steps: Sequence[StepResult]) -> Sequence[StepResult]:
    """The latest steps, as many as a picture can show: three at most, one at the least."""
    phases = itertools.accumulate(len(step.records) for step in reversed(steps))
    count = sum(so_far <= PHASES_TO_DRAW for so_far in phases)
    return steps[-max(1, min(STEPS_TO_DRAW, count)) :]


def number_batches(records: Sequence[PhaseRecord]) -> list[int | None]:
    """For each phase, by start time, the number of its micro-batch; None for those without one.

    Backward phases count up. Each takes the output of one forward phase, in the same order; if the
    first backward phase has none before it, its forward phase lies before all of these, and that
    alone: no schedule keeps more than one output waiting.
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


def owned_phases(steps: Sequence[StepResult]) -> Iterator[tuple[PhaseRecord, dict[str, int]]]:
    """The phases by start time, each with the optimizer step, and the micro-batch within that, for
    which it worked.

    A step's records are of the phases that ended in it. `delayed` has then begun the next one: it
    has refreshed a copy for it, and its first micro-batch has gone forward.
    """
    owners = [
        (step.step, number)
        for step in steps
        for number in range(1, 1 + sum(record.phase == "backward" for record in step.records))
    ]
    owners.append((steps[-1].step + 1, 1))
    step_of = {id(record): step.step for step in steps for record in step.records}
    records = by_start(record for step in steps for record in step.records)
    for record, number in zip(records, number_batches(records), strict=True):
        if number:
            step, micro_batch = owners[number - 1]
            yield record, {"step": step, "micro_batch": micro_batch}
        else:
            yield record, {"step": step_of[id(record)] + (record.phase == "refresh")}


def panel_rows(panel: Panel) -> list[Row]:
    """A row for each lane, and below it those of its group's CPUs: one each, or, if there are more
    than 16 in the plan, one for those that share an L3 cache; for a NUMA node if there are more
    than 16 caches; else for the whole group.
    """
    used = {cpu for group in panel.plan.groups for cpu in group.cpus}
    homes = [(cpu, core) for core in panel.cores for cpu in core.cpus]
    levels = (
        {cpu: f"core {cpu}" for cpu in used},
        {cpu: f"L3 of CPU {core.l3}" for cpu, core in homes if core.l3 >= 0},
        {cpu: f"node {core.node}" for cpu, core in homes},
        dict.fromkeys(used, "all"),
    )
    complete = (level for level in levels if level.keys() >= used)
    home = next(each for each in complete if len({each[cpu] for cpu in used}) <= ROWS_TO_DRAW)
    rows = []
    for group in panel.plan.groups:
        rows.append(Row(f"{group.name} lane", group))
        parts: dict[str, list[int]] = {}
        for cpu in group.cpus:
            parts.setdefault(home[cpu], []).append(cpu)
        for name, cpus in () if panel.lanes_only else parts.items():
            cores = f"cores {format_cpu_list(cpus)}"
            cores = cores if len(cores) <= 30 else f"{len(cpus)} CPUs"
            rows.append(Row(name if home is levels[0] else f"{name}: {cores}", group, tuple(cpus)))
    return rows


def draw_timelines(path: Path, title: str, panels: Sequence[Panel], footer: str = "") -> None:
    """Draw panels one above the other, all over the same span of time: that of the shortest, but in
    any case a whole step of each.

    Each lane has a row with its phases, numbered by micro-batch, and rows of its CPUs (see
    panel_rows, cpu_bars); a strip above it marks when others took some of its cores.
    """
    from matplotlib.patches import Patch

    shortest_s = min(panel.span_s for panel in panels)
    span_s = max(shortest_s, *(panel.step_s for panel in panels))
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
    figure.suptitle(shown(title), fontsize=10, parse_math=False)
    save_figure(figure, path)


def new_figure(width_inches: float, height_inches: float, footer: str = "") -> Any:
    """An empty picture, or, with a footer in small print, the part of one above that. matplotlib is
    imported where it is used, since many runs draw nothing.
    """
    from matplotlib.figure import Figure

    lines = textwrap.wrap(footer, int(19 * width_inches))
    heights = height_inches, 0.05 + 0.12 * len(lines)
    figure = Figure(figsize=(width_inches, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=heights)
    style = {"fontsize": 6.5, "color": "#555555", "va": "top", "parse_math": False}
    lower.text(0.1 / width_inches, 1, "\n".join(lines), **style)
    return upper


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture in place of what was there. Raises RunError when it cannot be written."""
    picture = io.BytesIO()
    figure.figure.savefig(picture, dpi=110, format=path.suffix[1:])
    write_whole(path, picture.getvalue())


@dataclass(frozen=True)
class Bar:
    """A rectangle of a timeline: what it stands for, from when to when, where in its row's height
    (0 is the middle, rows count downwards), and a text in it.
    """

    key: str
    start_s: float
    end_s: float
    top: float = -0.36
    height: float = 0.81
    text: str = ""
    alpha: float = 1.0


def lane_bars(
    lane: str, contentions: Iterable[Contention], records: Sequence[PhaseRecord]
) -> list[Bar]:
    """The phases of a lane, and strips above them where others took some of its cores."""
    bars = [
        Bar(record.phase, record.start_s, record.end_s, text=str(number or ""))
        for record, number in zip(records, number_batches(records), strict=True)
        if record.lane == lane
    ]
    for contention in contentions:
        shares = {OTHERS: contention.others.get(lane, 0.0), STOLEN: contention.stolen}
        for (key, share), top in zip(shares.items(), (-0.5, -0.43), strict=True):
            if share >= CONTENTION_SHARE:
                bars.append(Bar(key, contention.start_s, contention.end_s, top, 0.07))
    return bars


def busy_in_phase(
    record: PhaseRecord, cpus: Sequence[int]
) -> tuple[dict[int, float], dict[int, float] | None]:
    """Seconds for which each CPU of a phase's group was busy with the phase, and with something
    else; None where that is unknown.

    The clocks of the phase's own threads know every microsecond, but not on which CPU it was: their
    time counts where they were last seen, which is exact on a single CPU, and for threads that have
    not moved. The kernel counts the time of a CPU for whatever ran there, in ticks too coarse for a
    short phase; in others its count holds, and own time that cannot have been where it was last
    seen is taken from what seems to be something else. Without a closer look, the threads' time is
    spread over the CPUs.
    """
    spread_s = dict.fromkeys(cpus, record.cpu_s / len(cpus))
    if not record.cpu_busy_s or record.duration_s < SHORT_PHASE_S:
        return with_room(record.used_on_s or spread_s, cpus, record.duration_s), None
    own_s = {cpu: min(record.used_on_s.get(cpu, 0.0), record.cpu_busy_s[cpu]) for cpu in cpus}
    rest_s = {cpu: record.cpu_busy_s[cpu] - own_s[cpu] for cpu in cpus}
    moved = (record.cpu_s - sum(own_s.values())) / (sum(rest_s.values()) or 1.0)
    others_s = {cpu: max(0.0, 1 - moved) * rest_s[cpu] for cpu in cpus}
    return {cpu: record.cpu_busy_s[cpu] - others_s[cpu] for cpu in cpus}, others_s


def with_room(busy_s: dict[int, float], cpus: Sequence[int], duration_s: float) -> dict[int, float]:
    """Seconds by CPU, of which none has more than the phase lasted: threads that have moved are all
    seen where they were last, and what cannot have been there was where there was room.
    """
    most_s = {cpu: min(busy_s.get(cpu, 0.0), duration_s) for cpu in cpus}
    beyond_s = sum(busy_s.values()) - sum(most_s.values())
    room_s = len(cpus) * duration_s - sum(most_s.values())
    if beyond_s <= 0:
        return busy_s
    part = min(1.0, beyond_s / room_s) if room_s > 0 else 0.0
    return {cpu: own_s + part * (duration_s - own_s) for cpu, own_s in most_s.items()}


def stacked(
    start_s: float, end_s: float, shares: dict[str, float], idle: bool = True, alpha: float = 1.0
) -> Iterator[Bar]:
    """Bars for shares of a row's time, one upon the other; the rest was `idle`, or is unknown."""
    if idle:
        yield Bar(IDLE, start_s, end_s, -0.35, 0.7)
    top = 0.35
    for key, share in shares.items():
        top -= 0.7 * share
        if share > 0:
            yield Bar(key, start_s, end_s, top, 0.7 * share, alpha=alpha)


def busy_between_phases(row: Row, records: Sequence[PhaseRecord]) -> Iterator[Bar]:
    """How busy a row's CPUs were while their own lane had no phase, as far as the closer looks at
    any lane's phases tell, which read at both ends how long each CPU had worked since boot.
    """
    readings = []
    for record in (one for one in records if one.cpu_before_s):
        before_s = record.cpu_before_s
        after_s = {cpu: before_s[cpu] + busy_s for cpu, busy_s in record.cpu_busy_s.items()}
        readings += [(record.start_s, before_s), (record.end_s, after_s)]
    readings.sort(key=lambda reading: reading[0])
    own = ((one.start_s, one.end_s) for one in records if one.lane == row.group.name)
    edges = [-math.inf, *itertools.chain.from_iterable(own), math.inf]
    for gap in zip(edges[::2], edges[1::2], strict=True):
        inside = [reading for reading in readings if gap[0] <= reading[0] <= gap[1]]
        for (start_s, before_s), (end_s, after_s) in itertools.pairwise(spaced(inside)):
            worked_s = {cpu: after_s[cpu] - before_s[cpu] for cpu in row.cpus}
            yield from stacked(start_s, end_s, {ELSE: row.share(worked_s, end_s - start_s)})


def spaced(readings: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Of readings by time those that are so far apart that the kernel's ticks do not matter, the
    last one among them; none where they are all too close.
    """
    chosen = list(readings[:1])
    for reading in readings[1:]:
        if reading[0] - chosen[-1][0] >= SHORT_PHASE_S:
            chosen.append(reading)
    if len(chosen) > 1:
        chosen[-1] = readings[-1]
    return chosen


def cpu_bars(row: Row, records: Sequence[PhaseRecord]) -> Iterator[Bar]:
    """How busy a row's CPUs were, in their lane's phases and between them. Where nobody looked on
    which of its CPUs a lane was, its mean is shown, pale.
    """
    for record in (one for one in records if one.lane == row.group.name):
        own_s, others_s = busy_in_phase(record, row.group.cpus)
        all_s = Counter(own_s) + Counter(others_s)
        own, both = (row.share(busy_s, record.duration_s) for busy_s in (own_s, all_s))
        known = bool(record.cpu_busy_s or record.used_on_s) or row.cpus == row.group.cpus
        shares, alpha = {record.phase: own, ELSE: both - own}, 1.0 if known else 0.4
        yield from stacked(record.start_s, record.end_s, shares, others_s is not None, alpha)
    yield from busy_between_phases(row, records)


def draw_panel(ax: Any, panel: Panel, span_s: float) -> None:
    """Draw one panel on its axes; what lies outside the span is cut off."""
    rows, records = panel_rows(panel), panel.records
    zero_s = records[0].start_s if panel.zero_s is None else panel.zero_s
    for y, row in enumerate(rows):
        lane = row.group.name
        bars = cpu_bars(row, records) if row.cpus else lane_bars(lane, panel.contentions, records)
        for bar in bars:
            if zero_s < bar.end_s and bar.start_s < zero_s + span_s:
                draw_bar(ax, y, bar, zero_s, span_s)
    size = 8 if len(rows) <= 12 else 6.5
    ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=size)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, span_s)
    ax.set_title(shown(panel.title), loc="left", fontsize=9, parse_math=False)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(left=False)


def draw_bar(ax: Any, y: int, bar: Bar, zero_s: float, span_s: float) -> None:
    """Draw a bar in row `y`; its text if there is room for it."""
    start_s, duration_s = bar.start_s - zero_s, bar.end_s - bar.start_s
    place = (y + bar.top, bar.height)
    look = {"color": COLOURS[bar.key], "label": bar.key, "alpha": bar.alpha}
    look |= {"edgecolor": "white", "linewidth": 0.6 if bar.text else 0}
    ax.broken_barh([(start_s, duration_s)], place, **look)
    middle_s = start_s + duration_s / 2
    if bar.text and duration_s > 0.012 * span_s and middle_s < span_s:
        style = {"ha": "center", "va": "center", "color": "white", "fontsize": 9}
        ax.text(middle_s, y + bar.top + bar.height / 2, bar.text, **style)
