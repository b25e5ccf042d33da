"""A sweep as tables, as a section of logs.md, as CSV and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from split_affinity.checkpoints.state import versions
from split_affinity.compare.curve import Sweep
from split_affinity.compare.ratios import RULED_OUT, Point
from split_affinity.compare.report import disturbance_lines, rounds_figures
from split_affinity.compare.simulation import ASSUMPTIONS, LAWS, limited_phases
from split_affinity.compare.ways import ROUNDS, is_loading
from split_affinity.machine.description import describe_topology, machine_text
from split_affinity.machine.plan import usable_cores
from split_affinity.machine.topology import Topology
from split_affinity.options.settings import as_options, plain_settings
from split_affinity.reports.log import (
    folded_settings,
    folder_items,
    log_section,
    machine_item,
    settings_item,
)
from split_affinity.reports.tables import describe_run
from split_affinity.text import (
    csv_text,
    folded,
    in_markdown,
    markdown_table,
    plural,
    shown,
    speed_text,
)

NOT_MEASURED = "SIMULATED, not measured"
CHECKED = "Amdahl's law through phases on one and two cores, beside what was measured"


def sweep_notes(found: Sweep) -> Iterator[str]:
    """What has been swept, which rounds others disturbed, and what the figures mean."""
    settings, images = found.settings, "loaded beforehand"
    if is_loading(settings):
        images = f"loaded meanwhile, by {plural(settings.workers, 'process')} a way"
    plain = found.points[1].way
    yield (
        f"{describe_run(settings)}; {plural(ROUNDS, 'round')} of each ratio, images {images}; "
        f"{plain}: a PyTorch loop with the flags of other trainers, channels_last among them; "
        "ranks: data parallelism, a process on each group of the split"
    )
    for ratio, block in found.blocks.items():
        for line in disturbance_lines(block.rounds):
            yield f"ratio {ratio}: {line}"
    for point in on_all_cores(found.points):
        low, high = map(speed_text, point.images_per_s_range)
        to_none = "" if point.way == "none" else f", {point.to_none:.2f} of none"
        yield f"{point.way}: {speed_text(point.images_per_s)} images/s ({low}-{high}){to_none}"
    yield "below: images/s, and in brackets the speed relative to none in the same rounds"
    if found.ruled_out:
        yield "*: ruled out by its bound, which is the figure; it was not run"


def sweep_text(found: Sweep) -> str:
    """All that is printed of a sweep once it is done."""
    parts = [*map(shown, sweep_notes(found)), "", ratio_table(found), "", CHECKED]
    for table in check_tables(found):
        parts += [table, ""]
    parts.append(found.verdict)
    if found.machine:
        parts += ["", *map(shown, simulation_notes(found))]
        for table in simulation_tables(found):
            parts += ["", table]
    return "\n".join(parts)


def on_all_cores(points: Sequence[Point]) -> list[Point]:
    """The points without a ratio: one lane, and the plain loop."""
    return [point for point in points if not point.ratio]


def ratio_table(found: Sweep) -> str:
    """The speeds of each ratio's ways, a row for each ratio."""
    ways = [way for way in found.ways if way != "none"]
    cells = {(point.way, point.ratio): point_text(point) for point in found.points}
    rows = [
        (str(ratio), f"{ratio.share:.0%}", *(cells.get((way, ratio), "") for way in ways))
        for ratio in found.ratios
    ]
    return markdown_table(("cores", "forward", *ways), rows)


def point_text(point: Point) -> str:
    """A point's speed and ratio, or the bound that ruled it out."""
    if point.kind == RULED_OUT:
        return f"{speed_text(point.bound_images_per_s)}* ({point.bound_to_none:.2f})"
    return f"{speed_text(point.images_per_s)} ({point.to_none:.2f})"


def check_tables(found: Sweep) -> Iterator[str]:
    """How far Amdahl's law is from what was measured: speeds, and phases on more than two cores."""
    rows = []
    for point in found.points:
        if point.images_per_s and point.simulated_images_per_s:
            error = point.simulated_images_per_s / point.images_per_s - 1
            speeds = map(speed_text, (point.simulated_images_per_s, point.images_per_s))
            name = f"{point.way} {point.ratio}" if point.ratio else point.way
            rows.append((name, *speeds, f"{error:+.0%}"))
    yield markdown_table(("way", "by the law, images/s", "measured", "error"), rows)
    rows = [
        (
            f"{each.phase} of {each.batch_size} images",
            str(each.cores),
            f"{each.simulated_s:.3f}",
            f"{each.measured_s:.3f}",
            f"{each.error:+.0%}",
        )
        for each in found.law_checks
        if each.phase in ("forward", "backward")
    ]
    if rows:
        yield markdown_table(("phase", "cores", "by the law, s", "measured", "error"), rows)


def simulation_notes(found: Sweep) -> list[str]:
    """Which machine is simulated, and what is assumed."""
    machine = describe_topology(found.machine)
    assumed = (f"assumed: {text}" for text in ASSUMPTIONS)
    limited = (f"note: {text}" for text in limited_phases(found.scaling))
    return [f"{NOT_MEASURED}: {machine}", *assumed, *limited]


def simulation_tables(found: Sweep) -> Iterator[str]:
    """The best ratio of each way on the simulated machine, a table for each law."""
    for kind in LAWS:
        rows = []
        for point in best_points(found.simulated, kind):
            low, high = map(speed_text, point.images_per_s_range)
            least, most = point.to_none_range
            to_none = f"{point.to_none:.2f} ({least:.2f}-{most:.2f})"
            ratio = str(point.ratio or "all cores")
            speed = speed_text(point.images_per_s)
            rows.append((point.way, ratio, speed, f"{low}-{high}", to_none))
        yield markdown_table((kind, "best ratio", "images/s", "band", "to none"), rows)


def best_points(points: Sequence[Point], kind: str) -> list[Point]:
    """The fastest point of each way by a law, in the order of the ways."""
    best: dict[str, Point] = {}
    for point in points:
        if point.kind == kind:
            fastest = max(best.get(point.way, point), point, key=lambda each: each.images_per_s)
            best[point.way] = fastest
    return list(best.values())


def sweep_section(found: Sweep) -> str:
    """A sweep's section of logs.md."""
    settings = found.settings
    items = (
        machine_item(found.topology),
        *folder_items(settings.output_dir, settings.log_file),
        settings_item(f"compare {as_options(found.asked)}".strip()),
        *map(in_markdown, sweep_notes(found)),
        f"took {found.seconds / 60:.1f} minutes",
    )
    title = f"compare, {settings.model}, split sweep"
    checks = folded(CHECKED, "\n\n".join(check_tables(found)))
    below = [ratio_table(found), found.verdict, checks]
    if found.machine:
        title += f", {NOT_MEASURED}"
        notes = "\n".join(f"- {in_markdown(note)}" for note in simulation_notes(found))
        below = [notes, *simulation_tables(found), "On this machine, measured:", *below]
    return log_section(title, items, *below, folded_settings(settings))


def sweep_rows(found: Sweep) -> Iterator[dict[str, Any]]:
    """The points as rows, those of this machine first; all have all columns, None for nothing."""
    places = [(found.topology, found.points)]
    if found.machine:
        places.append((found.machine, found.simulated))
    for machine, points in places:
        yield from (point_row(machine, point) for point in points)


def point_row(machine: Topology, point: Point) -> dict[str, Any]:
    """A point as a row."""
    ratio, times = point.ratio, point.times
    low, high = point.images_per_s_range or (None, None)
    least, most = point.to_none_range or (None, None)
    return {
        "machine": machine.cpu_model,
        "kind": point.kind,
        "way": point.way,
        "cores": len(usable_cores(machine)),
        "forward_cores": ratio.forward if ratio else None,
        "backward_cores": ratio.backward if ratio else None,
        "forward_share": ratio.share if ratio else None,
        "images_per_s": point.images_per_s,
        "images_per_s_low": low,
        "images_per_s_high": high,
        "to_none": point.to_none,
        "to_none_low": least,
        "to_none_high": most,
        "bound_images_per_s": point.bound_images_per_s,
        "bound_to_none": point.bound_to_none,
        "simulated_images_per_s": point.simulated_images_per_s,
        "forward_s": times.forward_s if times else None,
        "backward_s": times.backward_s if times else None,
        "update_s": times.update_s if times else None,
        "refresh_s": times.refresh_s if times else None,
    }


def sweep_csv(found: Sweep) -> str:
    """The curve as a table, a row for each way at each ratio."""
    rows = list(sweep_rows(found))
    return csv_text([list(rows[0]), *(list(row.values()) for row in rows)])


def sweep_json(found: Sweep) -> str:
    """A sweep for programs."""
    timed = [
        {"batch_size": batch_size, "cores": cores, **dataclasses.asdict(each)}
        for batch_size, sizes in found.timed.items()
        for cores, rounds in sizes.items()
        for each in rounds
    ]
    checks = [{**dataclasses.asdict(each), "error": each.error} for each in found.law_checks]
    figures = {
        "machine": describe_topology(found.topology),
        "versions": versions(),
        "settings": plain_settings(found.settings),
        "points": list(sweep_rows(found)),
        "phases_alone": timed,
        "law_checks": checks,
        "ratios": [
            {
                "ratio": str(ratio),
                "ways": [dataclasses.asdict(row) for row in block.rows],
                "rounds": rounds_figures(block.rounds),
                "seconds": block.seconds,
            }
            for ratio, block in found.blocks.items()
        ],
        "simulated": {
            "machine": json.loads(machine_text(found.machine)),
            "assumptions": ASSUMPTIONS,
            "limited": list(limited_phases(found.scaling)),
        }
        if found.machine
        else None,
        "seconds": found.seconds,
        "verdict": found.verdict,
    }
    return json.dumps(figures, indent=1, allow_nan=False) + "\n"
