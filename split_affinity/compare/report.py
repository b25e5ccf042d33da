"""A comparison as tables, as a section of logs.md, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from split_affinity.checkpoints.state import versions
from split_affinity.compare.loops import ByLane, Round
from split_affinity.compare.rounds import disturbance, part_note, rounds_used
from split_affinity.compare.verdict import Compared, Comparison
from split_affinity.compare.ways import ROUNDS, Way, is_loading, of_one_rank, why_no_ranks
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import split_name
from split_affinity.machine.topology import host_kind
from split_affinity.options.settings import as_options, plain_settings
from split_affinity.reports.log import picture_footer
from split_affinity.reports.tables import describe_run
from split_affinity.reports.timeline import Panel, draw_timelines, steps_to_draw
from split_affinity.text import code_span, in_markdown, markdown_table, plural, speed_text, utc_now


def comparison_notes(found: Comparison) -> list[str]:
    """What has been compared, and which rounds others disturbed, in sentences."""
    rows = found.rows
    pairs = zip(rows, found.ways, strict=True)
    parts = {row.way: (row.timed_batches, way.settings.accumulate) for row, way in pairs}
    flags = "bf16" if found.settings.precision == "bf16" else "fp32"
    images = "loaded beforehand"
    if is_loading(found.settings):
        images = f"loaded meanwhile, by {plural(found.settings.workers, 'process')} a way"
    ranks = ""
    if any(row.ranks > 1 for row in rows):
        each = ", with loaders of its own" if is_loading(found.settings) else ""
        ranks = f"; ranks: data parallelism, a process on each group of the split{each}"
    about = (
        f"{describe_run(found.settings)}; {plural(len(rows[0].to_none_rounds), 'round')}, images "
        f"{images}; plain: a PyTorch loop in its defaults, {found.plain}: with the flags of other "
        f"trainers ({flags}, channels_last){ranks}{part_note(parts)}"
    )
    return [about, *disturbance_lines(found.rounds)]


def disturbance_lines(rounds: dict[str, list[Round]]) -> Iterator[str]:
    """Which rounds others disturbed, and what has become of them."""
    used = rounds_used(rounds)
    for index in range(len(next(iter(rounds.values())))):
        share, text = disturbance(rounds, index)
        fate = "kept, for want of an undisturbed one" if index in used else "left out"
        if share:
            yield f"round {index + 1} was disturbed: {text}; {fate}"


def tables_of(found: Comparison) -> list[str]:
    """The tables of a comparison, which 80 columns hold, each after an empty line."""
    tables = speed_table(found), placement_table(found.rows), rate_table(found.rows)
    return [f"\n{table}" for table in tables]


def speed_table(found: Comparison) -> str:
    """How fast the ways are; a bound with the share of it that is reached."""
    cells = []
    for row in found.rows:
        low, high = map(speed_text, row.images_per_s_range)
        bound = ""
        if row.bound_images_per_s:
            bound = f"{speed_text(row.bound_images_per_s)} ({row.bound_share:.0%})"
        ratios = f"{row.to_none:.2f}", f"{row.to_plain:.2f}"
        cells.append((row.way, speed_text(row.images_per_s), f"{low}-{high}", *ratios, bound))
    return markdown_table(
        ("way", "img/s", "range", "to none", f"to {found.plain}", "of bound"), cells
    )


def placement_table(rows: Sequence[Compared]) -> str:
    """What the ways use of the machine; their cores are told before (see split_lines)."""
    cells = []
    for row in rows:
        memory, stray = f"{row.peak_memory_bytes / 2**30:.2f}", f"{1e3 * row.stray_s:.1f}"
        cells.append((row.way, row.batches, lanes_text(row.busy, "{:.0%}"), memory, stray))
    return markdown_table(("way", "batches", "busy", "peak GiB", "stray ms"), cells)


def rate_table(rows: Sequence[Compared]) -> str:
    """What the ways compute, beside what large matrix products reach on their cores."""
    cells = []
    for row in rows:
        rate = lanes_text(row.matrix_gflops, "{:.0f}")
        share = lanes_text(row.matrix_share, "{:.0%}")
        cells.append((row.way, f"{row.gflops:.0f}", rate, share))
    return markdown_table(("way", "GFLOP/s", "matrix GFLOP/s", "share of matrix rate"), cells)


def lanes_text(figures: ByLane, pattern: str) -> str:
    """A figure of each lane, in one cell of a table."""
    return " + ".join(map(pattern.format, figures.values())) or "-"


def comparison_section(found: Comparison) -> str:
    """A comparison's section of logs.md."""
    versions_used = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = (
        in_markdown(f"machine: {describe_topology(found.topology)}; {host_kind()}"),
        *map(in_markdown, split_lines(found.ways)),
        f"settings: {code_span(f'compare {as_options(found.asked)}')}",
        in_markdown(f"versions: {versions_used}"),
        *map(in_markdown, comparison_notes(found)),
        f"took {found.seconds / 60:.1f} minutes",
    )
    title = f"compare, {found.settings.model}, split {split_name(found.settings)}"
    heading = f"\n## {utc_now()} {in_markdown(title)}\n"
    items = "\n".join(f"- {line}" for line in lines)
    return "\n".join([heading, items, *tables_of(found), "", found.verdict]) + "\n"


def comparison_json(found: Comparison) -> str:
    """A comparison for programs."""
    used = rounds_used(found.rounds)
    rounds = [
        {
            "round": index + 1,
            "images_per_s": {way: each[index].images_per_s for way, each in found.rounds.items()},
            "disturbance": disturbance(found.rounds, index)[1] or None,
            "counts": index in used,
        }
        for index in range(len(found.rounds["none"]))
    ]
    figures = {
        "machine": describe_topology(found.topology),
        "versions": versions(),
        "settings": plain_settings(found.settings),
        "plans": {way.name: dataclasses.asdict(way.plan) for way in found.ways},
        "ways": [dataclasses.asdict(row) for row in found.rows],
        "rounds": rounds,
        "seconds": found.seconds,
        "verdict": found.verdict,
    }
    return json.dumps(figures, indent=1, allow_nan=False) + "\n"


def draw_comparison(path: Path, found: Comparison) -> None:
    """The timelines of one lane and of the schedules in the seventh round, over the same span of
    time, in which each has a whole step. Makes the folder if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    panels = []
    for way, row in zip(found.ways, found.rows, strict=True):
        if not way.plain:
            title = f"{row.way}: {row.images_per_s:.1f} images/s, {row.batches} images a step"
            steps = steps_to_draw(found.rounds[row.way][ROUNDS - 1].steps)
            panels += panels_of(way, Panel(title, way.plan, steps, found.topology.cores))
    footer = picture_footer(found.topology)
    draw_timelines(path, describe_run(found.settings), panels, footer)


def panels_of(way: Way, panel: Panel) -> Iterator[Panel]:
    """A panel of a way, or one for each of its ranks, whose micro-batches are counted each."""
    zero_s = panel.records[0].start_s
    for rank in range(way.ranks):
        plan = of_one_rank(way, rank).plan
        lanes = {group.name for group in plan.groups}
        steps = [
            dataclasses.replace(step, records=tuple(r for r in step.records if r.lane in lanes))
            for step in panel.steps
        ]
        title = panel.title if not rank else ""
        yield dataclasses.replace(panel, title=title, plan=plan, steps=steps, zero_s=zero_s)


def split_lines(ways: Sequence[Way]) -> Iterator[str]:
    """The cores of each split, and what the user should know about them."""
    ranked = {way.settings.split for way in ways if way.ranks > 1} | {"none"}
    on_lanes = [way for way in ways if not way.plain and way.ranks == 1]
    for split, way in {way.settings.split: way for way in on_lanes}.items():
        groups = "; ".join(f"{group.name} {group}" for group in way.plan.groups)
        yield f"split {way.plan.split}: {groups}"
        if split not in ranked:
            yield f"note: no ranks beside split {way.plan.split}: {why_no_ranks(way)}"
    for note in dict.fromkeys(note for way in ways for note in way.plan.notes):
        yield f"note: {note}"
