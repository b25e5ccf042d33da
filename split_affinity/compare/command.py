"""The `compare` command, from its options to what it prints and writes."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator

from split_affinity.compare.curve import Sweep
from split_affinity.compare.loops import ByLane
from split_affinity.compare.report import (
    comparison_json,
    comparison_notes,
    comparison_section,
    comparison_tables,
    draw_comparison,
    split_lines,
)
from split_affinity.compare.rounds import run_rounds
from split_affinity.compare.sweep import check_sweep, sweep
from split_affinity.compare.sweep_picture import draw_sweep
from split_affinity.compare.sweep_report import sweep_csv, sweep_json, sweep_section, sweep_text
from split_affinity.compare.verdict import Comparison
from split_affinity.compare.ways import all_ways, is_loading, way_settings
from split_affinity.errors import RunError, UserError, likely_reason
from split_affinity.files import append_text, write_traceback, write_where_asked
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import Topology
from split_affinity.models.cost import check_memory, measure_model
from split_affinity.models.registry import check_input_shape, check_model_name, meta_model
from split_affinity.options.settings import Settings
from split_affinity.options.values import SWEEP
from split_affinity.reports.log import LOG_HEADER, where_logged
from split_affinity.reports.tables import TIMELINE
from split_affinity.runs.measurement import measured_settings
from split_affinity.runs.setup import check_writable
from split_affinity.terminal import say, say_lines


def compare(settings: Settings, topology: Topology) -> Comparison | Sweep:
    """Run all ways to train in turn, round by round; print and write how they compare."""
    begun_s, asked = time.perf_counter(), settings
    check_comparison(settings, topology)
    sweeps = settings.split == SWEEP
    machine = check_sweep(settings, topology) if sweeps else None
    say(describe_topology(topology))
    settings = measured_settings(settings, topology)
    # Preloaded images of a whole step stay in memory.
    images = settings.batch_size * (1 if is_loading(settings) else settings.accumulate)
    check_memory(settings, topology, images)
    check_writable(settings)
    shape = settings.model, settings.num_classes, settings.image_size
    for chosen in way_settings(settings).values():
        check_input_shape(meta_model(*shape), settings.model, chosen.batch_size, shape[2])
    if sweeps:
        found = sweep(asked, settings, topology, machine, image_flops(settings))
        say("\n" + sweep_text(found))
        write_results(settings, sweep_writers(found))
        return found
    ways = all_ways(settings, topology)
    say_lines(split_lines(ways))
    rounds = run_rounds(ways, topology.online)
    seconds = time.perf_counter() - begun_s
    found = Comparison(asked, settings, topology, ways, rounds, image_flops(settings), seconds)
    say_lines(["", *comparison_notes(found)])
    say("\n".join([*comparison_tables(found), "", found.verdict]))
    write_results(settings, comparison_writers(found))
    return found


def check_comparison(settings: Settings, topology: Topology) -> None:
    """Raise UserError for a system or options that leave nothing to compare."""
    if not topology.has_affinity:
        reason = f"{platform.system()} cannot keep threads on cores"
        if topology.affinity_refused:
            reason = f"the system keeps no thread on cores ({topology.affinity_refused})"
        raise UserError(
            f"compare: {reason}; there is no split to compare, only train --split none works"
        )
    chosen = {
        f"--split {settings.split}": "none" in settings.split.split(","),
        f"--schedule {settings.schedule}": settings.schedule != "sequential",
    }
    for asked, is_wrong in chosen.items():
        if is_wrong:
            raise UserError(f"{asked}: compare runs every schedule beside --split none by itself")
    if settings.epochs and not settings.recipe:
        raise UserError(f"--epochs {settings.epochs}: compare takes --steps, for each way to train")
    check_model_name(settings.model)


def comparison_writers(found: Comparison) -> Iterator[Callable[[], None]]:
    """What writes a comparison's figures, its picture and its section of logs.md."""
    settings = found.settings
    if settings.json:
        yield lambda: write_where_asked(settings.json, comparison_json(found))
    if settings.output_dir:
        yield lambda: draw_comparison(settings.output_dir / TIMELINE, found)
    yield lambda: append_text(settings.log_file, comparison_section(found), LOG_HEADER)


def sweep_writers(found: Sweep) -> Iterator[Callable[[], None]]:
    """What writes a sweep's figures, its picture and its section of logs.md."""
    settings = found.settings
    if settings.json:
        yield lambda: write_where_asked(settings.json, sweep_json(found))
    if settings.csv:
        yield lambda: write_where_asked(settings.csv, sweep_csv(found))
    if settings.output_dir:
        yield lambda: draw_sweep(settings.output_dir, found)
    yield lambda: append_text(settings.log_file, sweep_section(found), LOG_HEADER)


def write_results(settings: Settings, writers: Iterable[Callable[[], None]]) -> None:
    """Write results, each whatever becomes of the others; RunError in the end if any cannot be."""
    reasons = []
    for write in writers:
        try:
            write()
        except RunError as error:
            reasons.append(str(error))
        except Exception as error:
            reasons.append(f"{likely_reason(error)}; {write_traceback(None, error)}")
    if reasons:
        raise RunError("; ".join(reasons))
    say_lines(["", *where_logged(settings.log_file)])


def image_flops(settings: Settings) -> ByLane:
    """The floating-point operations of an image, by phase, those of a teacher included."""
    shape = settings.num_classes, settings.image_size
    flops = measure_model(settings.model, *shape, settings.freeze).flops
    if settings.teacher:
        flops["forward"] += measure_model(settings.teacher, *shape).flops["forward"]
    return flops
