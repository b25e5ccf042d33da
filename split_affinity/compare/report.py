"""A comparison as tables, as a section of logs.md, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from split_affinity.checkpoints.state import versions
from split_affinity.compare.loops import ByLane
from split_affinity.compare.rounds import Round, disturbance, rounds_used
from split_affinity.compare.verdict import Comparison
from split_affinity.compare.ways import ROUNDS, Way, halved_step, is_loading, way_of_rank
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import split_name
from split_affinity.options.settings import as_options, plain_settings
from split_affinity.reports.log import (
    folded_settings,
    folder_items,
    log_section,
    machine_item,
    picture_footer,
    settings_item,
)
from split_affinity.reports.tables import describe_run
from split_affinity.reports.timeline import Panel, draw_timelines, steps_to_draw
from split_affinity.text import folded, in_markdown, markdown_table, plural, speed_text


def comparison_notes(found: Comparison) -> list[str]:
    """What has been compared, and which rounds others disturbed, in sentences."""
    rows, settings = found.rows, found.settings
    flags = "bf16" if settings.precision == "bf16" else "fp32"
    images, own_loaders = "loaded beforehand", ""
    if is_loading(settings):
        images = f"loaded meanwhile, by {plural(settings.workers, 'process')} a way"
        own_loaders = ", with loaders of its own"
    ranks = ""
    if any(row.ranks > 1 for row in rows):
        ranks = f"; ranks: data parallelism, a process on each group of the split{own_loaders}"
    about = (
        f"{describe_run(settings)}; {plural(len(rows[0].to_none_rounds), 'round')}, images "
        f"{images}; plain: a PyTorch loop in its defaults, {found.plain}: with the flags of other "
        f"trainers ({flags}, channels_last){ranks}"
    )
    fused = ", ".join(row.way for row in rows if row.fused) or "no way"
    return [about, f"batch norm is fused in {fused}", *disturbance_lines(found.rounds)]


def disturbance_lines(rounds: Sequence[Round]) -> Iterator[str]:
    """Which rounds others disturbed, and what has become of them."""
    used = rounds_used(rounds)
    for index, each in enumerate(rounds):
        share, text = disturbance(each)
        fate = "kept, for want of an undisturbed one" if index in used else "left out"
        if share:
            yield f"round {index + 1} was disturbed: {text}; {fate}"


def comparison_tables(found: Comparison) -> list[str]:
    """Speeds, use of the machine, and rates, in tables of 80 columns; the cores: split_lines."""
    speeds, uses, rates = [], [], []
    for row in found.rows:
        low, high = map(speed_text, row.images_per_s_range)
        bound = ""
        if row.bound_images_per_s:
            bound = f"{speed_text(row.bound_images_per_s)} ({row.bound_share:.0%})"
        ratios = f"{row.to_none:.2f}", f"{row.to_plain:.2f}"
        speeds.append((row.way, speed_text(row.images_per_s), f"{low}-{high}", *ratios, bound))
        memory, stray = f"{row.peak_memory_bytes / 2**30:.2f}", f"{1e3 * row.stray_s:.1f}"
        uses.append((row.way, row.batches, lanes_text(row.busy, "{:.0%}"), memory, stray))
        rate = lanes_text(row.matrix_gflops, "{:.0f}")
        share = lanes_text(row.matrix_share, "{:.0%}")
        rates.append((row.way, f"{row.gflops:.0f}", rate, share))
    tables = {
        ("way", "img/s", "range", "to none", f"to {found.plain}", "of bound"): speeds,
        ("way", "batches", "busy", "peak GiB", "stray ms"): uses,
        ("way", "GFLOP/s", "matrix GFLOP/s", "share of matrix rate"): rates,
    }
    return [f"\n{markdown_table(header, cells)}" for header, cells in tables.items()]


def lanes_text(figures: ByLane, pattern: str) -> str:
    """A figure of each lane, in one cell of a table."""
    return " + ".join(map(pattern.format, figures.values())) or "-"


def comparison_section(found: Comparison) -> str:
    """A comparison's section of logs.md."""
    settings = found.settings
    items = (
        machine_item(found.topology),
        *map(in_markdown, split_lines(found.ways)),
        *folder_items(settings.output_dir, settings.log_file),
        settings_item(f"compare {as_options(found.asked)}".strip()),
        *map(in_markdown, comparison_notes(found)),
        f"took {found.seconds / 60:.1f} minutes",
    )
    speeds, *others = (table.strip("\n") for table in comparison_tables(found))
    more = folded("busy cores, memory and rates", "\n\n".join(others))
    title = f"compare, {settings.model}, split {split_name(settings)}"
    return log_section(title, items, speeds, found.verdict, more, folded_settings(settings))


def rounds_figures(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The speeds in all rounds, and who disturbed them, as JSON types."""
    used = rounds_used(rounds)
    return [
        {
            "round": index + 1,
            "images_per_s": {way: result.images_per_s for way, result in each.items()},
            "disturbance": disturbance(each)[1] or None,
            "counts": index in used,
        }
        for index, each in enumerate(rounds)
    ]


def comparison_json(found: Comparison) -> str:
    """A comparison for programs."""
    figures = {
        "machine": describe_topology(found.topology),
        "versions": versions(),
        "settings": plain_settings(found.settings),
        "plans": {way.name: dataclasses.asdict(way.plan) for way in found.ways},
        "ways": [dataclasses.asdict(row) for row in found.rows],
        "rounds": rounds_figures(found.rounds),
        "seconds": found.seconds,
        "verdict": found.verdict,
    }
    return json.dumps(figures, indent=1, allow_nan=False) + "\n"


def draw_comparison(path: Path, found: Comparison) -> None:
    """Draw steps of the seventh round: a panel for each way with lanes, or each of its ranks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    panels = []
    for way, row in zip(found.ways, found.rows, strict=True):
        if way.plain:
            continue
        title = f"{row.way}: {row.images_per_s:.1f} images/s, {row.batches} images a step"
        shown = steps_to_draw(found.rounds[ROUNDS - 1][row.way].steps)
        zero_s = min(record.start_s for step in shown for record in step.records)
        for rank in range(way.ranks):
            plan = way_of_rank(way, rank).plan
            lanes = {group.name for group in plan.groups}
            steps = []
            for step in shown:
                own = tuple(record for record in step.records if record.lane in lanes)
                steps.append(dataclasses.replace(step, records=own))
            panel = Panel("" if rank else title, plan, steps, found.topology.cores, zero_s=zero_s)
            panels.append(panel)
    draw_timelines(path, describe_run(found.settings), panels, picture_footer(found.topology))


def split_lines(ways: Sequence[Way]) -> Iterator[str]:
    """The cores of each split, and what the user should know about them."""
    ranked = {way.settings.split for way in ways if way.ranks > 1} | {"none"}
    on_lanes = [way for way in ways if not way.plain and way.ranks == 1]
    for split, way in {way.settings.split: way for way in on_lanes}.items():
        plan, settings = way.plan, way.settings
        groups = "; ".join(f"{group.name} {group}" for group in plan.groups)
        yield f"split {plan.split}: {groups}"
        if split in ranked:
            continue
        reason = f"the {settings.accumulate} x {settings.batch_size} images of a step"
        reason += " cannot be halved"
        if plan.forward.cpus == plan.backward.cpus:
            reason = "both groups are the same core"
        elif halved_step(settings):
            reason = "this build of torch has no gloo to connect them"
        yield f"note: no ranks beside split {plan.split}: {reason}"
    for note in dict.fromkeys(note for way in ways for note in way.plan.notes):
        yield f"note: {note}"
