"""Figures as text: the phase table, the summary, a step's and an epoch's line. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from split_affinity.checkpoints.state import Progress
from split_affinity.lanes.contention import CONTENTION_SHARE, Contention
from split_affinity.machine.plan import CorePlan, Host
from split_affinity.machine.topology import Topology, cpus_of
from split_affinity.options.settings import Settings
from split_affinity.reports.loading import loading_lines
from split_affinity.reports.summary import Summary
from split_affinity.text import folded, format_cpu_list, markdown_table, plural, span_text
from split_affinity.training.steps import PHASES, StepResult

CONTENTION_IN_SUMMARY = 0.02  # below that it may be the error of the clocks
METRICS, TIMELINE, TRACE = "metrics.jsonl", "timeline.png", "trace.json"
CURVES, GRADIENTS, RANGE_PLOT = "curves.png", "gradients.png", "lr.png"
SWEEP_PLOT, SIMULATED_PLOT = "sweep.png", "sweep-simulated.png"
TENSORBOARD = "tensorboard"

EPOCH_FIELDS = ("train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5")
RAW_FIELDS = ("val_raw_loss", "val_raw_top1", "val_raw_top5")
PARTS = {"train": "train", "val": "validation", "val_raw": "raw validation"}  # of these, in words

BAR = "|{bar}| {n_fmt}/{total_fmt}{postfix}"  # for tqdm
WIDE_COLUMNS = 99  # have room for the phases' times; tqdm leaves one column of a terminal free


def phase_table(summary: Summary, with_cores: bool = True) -> str:
    """The per-phase table; without the cores it fits 80 columns."""
    figures = ("median ms", "p95 ms", "share of step", "busy", "stray ms")
    rows = [("phase", "cores", "threads", *figures)]
    for phase in summary.phases:
        median, p95 = f"{phase.median_ms:.1f}", f"{phase.p95_ms:.1f}"
        stray = f"{phase.stray_ms:.1f}" if summary.threads_seen else "-"
        threads, share, busy = str(phase.threads), f"{phase.share:.1%}", f"{phase.busy:.0%}"
        rows.append((phase.phase, phase.cores, threads, median, p95, share, busy, stray))
    rest = "no phase (data, hand-over)" if with_cores else "no phase"
    rows.append((rest, "", "", "", "", f"{summary.no_phase_share:.1%}", "", ""))
    if not with_cores:
        rows = [(phase, *others) for phase, _, *others in rows]
    return markdown_table(rows[0], rows[1:])


def cpu_table(summary: Summary) -> str:
    """Which logical CPUs were busy in each phase, with anything on the machine."""
    rows = []
    for phase in summary.phases:
        busy = [cpu for cpu, share in phase.cpu_busy.items() if share >= 0.5]
        partly = [cpu for cpu, share in phase.cpu_busy.items() if 0.05 <= share < 0.5]
        each = " ".join(f"{cpu}:{share:.0%}" for cpu, share in phase.cpu_busy.items()) or "unknown"
        lists = format_cpu_list(busy), format_cpu_list(partly)
        seen_on = phase.seen_on if summary.threads_seen else "unknown"
        rows.append((phase.phase, *lists, each, seen_on))
    header = ("phase", "busy (50 % or more)", "partly (5 to 50 %)", "each CPU", "threads seen on")
    return markdown_table(header, rows)


def contention_texts(contention: Contention, least: float) -> Iterator[str]:
    """The contention by other processes and by the hypervisor, as far as it is `least` or more."""
    shares = []
    for lane, share in contention.others.items():
        if share >= least:
            cores = "all cores" if lane == "all" else f"the {lane} cores"
            shares.append(f"{100 * share:.0f} % of {cores}")
    if shares:
        yield f"other processes took {' and '.join(shares)}"
    if contention.stolen >= least:
        yield f"the hypervisor took {100 * contention.stolen:.0f} %"


def disturbance(contention: Contention | None) -> str:
    """What is to be said beside a run's speeds if others took so much that these do not count."""
    if contention is None or not any(contention_texts(contention, CONTENTION_SHARE)):
        return ""
    taken = "; ".join(contention_texts(contention, CONTENTION_IN_SUMMARY))
    return f"{taken}: these speeds and times do not count"


def memory_lines(by_node: dict[int, int], topology: Topology, plan: CorePlan) -> list[str]:
    """A line about memory by NUMA node, with the lanes that have cores there; none if unknown."""
    places = []
    for node, size_bytes in by_node.items():
        cpus = {*cpus_of(core for core in topology.cores if core.node == node)}
        lanes = [f"{group.name} cores" for group in plan.groups if cpus & group.cpu_set]
        where = f" ({', '.join(lanes)})" if lanes else ""
        places.append(f"node {node}{where} {size_bytes / 2**30:.2f} GiB")
    return [f"memory by node, without that of files: {', '.join(places)}"] if places else []


def summary_lines(summary: Summary) -> list[str]:
    """Throughput, memory and placement in sentences."""
    strayed = "some work could leave the phase's cores" if summary.stray_s else "no work strayed"
    stray = f"{1e3 * summary.stray_s:.1f} ms: {strayed}"
    if not summary.threads_seen:
        stray = "unknown: the system does not show threads"
    busy = ", ".join(f"{name} cores {share:.0%}" for name, share in summary.busy.items())
    left_out = plural(summary.warmup_steps, "warm-up step")
    if summary.profiled_steps:
        left_out += f" and {plural(summary.profiled_steps, 'profiled one')}"
    beside = f"main thread {summary.main_thread_s:.2f} s"
    if summary.waiting_s >= 0.005:
        beside += f", waiting threads of the other lane {summary.waiting_s:.2f} s"
    lines = [
        f"{summary.images_per_s:.2f} images/s, {summary.median_step_s:.3f} s a step (median), "
        f"{left_out} left out; "
        f"loss {summary.loss_first:.4f} first, {summary.loss_last:.4f} last",
        f"peak memory {summary.peak_memory_bytes / 2**30:.2f} GiB, loader processes not counted; "
        f"stray time {stray}",
        f"busy over whole steps: {busy}; CPU time beside that: {beside}",
    ]
    if summary.joules_per_image is not None:
        lines.append(f"energy of the whole machine: {summary.joules_per_image:.2f} J an image")
    lines[1:1] = loading_lines(summary.loading)
    if disturbed := disturbance(summary.contention):
        lines.insert(1, disturbed)
    elif summary.contention:
        texts = list(contention_texts(summary.contention, CONTENTION_IN_SUMMARY))
        lines += ["; ".join(texts)] if texts else []
    lines.append(
        f"the audit of where threads ran took {summary.audit_ms:.2f} ms a phase, "
        f"{summary.audit_share:.1%} of a step"
    )
    return lines


def epoch_line(row: dict[str, Any], names: Sequence[str] = EPOCH_FIELDS) -> str:
    """A finished epoch as a line of logs.md; `-` for what was not measured."""
    cells = [f"epoch: {row['epoch']}"]
    for name in names:
        form = "{:.3f}" if name.endswith("loss") else "{:.1f}%"
        cells.append(f"{name}: {'-' if row[name] is None else form.format(row[name])}")
    return "  ".join([*cells, f"timestamp: {row['timestamp']}"])


def tells_top5(classes: int | None) -> bool:
    """Whether top-5 says anything: of five classes or fewer the right one always is among them."""
    return classes is None or classes > 5


def without_top5(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of an epoch but for top-5."""
    return {name: value for name, value in row.items() if not name.endswith("top5")}


def describe_run(settings: Settings) -> str:
    """What a run trains, in a line."""
    batches = f"{settings.batch_size} images"
    if settings.accumulate > 1:
        batches = f"{settings.accumulate} batches of {batches}"
    if settings.ranks > 1:
        batches = f"{settings.ranks} ranks with {batches}"
    text = f"{settings.model}, {settings.image_size} px, {batches} a step, {settings.precision}"
    return text + (f", taught by {settings.teacher}" if settings.teacher else "")


def rank_table(hosts: Sequence[Host], summaries: Sequence[Summary]) -> str:
    """Each rank's phases, and how long it waited for the slowest rank, in 80 columns."""
    phases = [phase for phase in PHASES if any(each.phase == phase for each in summaries[0].phases)]
    rows = []
    for rank, (host, summary) in enumerate(zip(hosts, summaries, strict=True)):
        median_ms = {each.phase: f"{each.median_ms:.1f}" for each in summary.phases}
        waited = f"{1e3 * summary.waited_s[rank]:.1f}"
        stray = f"{1e3 * summary.stray_s:.1f}" if summary.threads_seen else "-"
        name = textwrap.shorten(host.name, 14, placeholder="...") if " " in host.name else host.name
        times = [median_ms.get(phase, "-") for phase in phases]
        rows.append((f"{rank} {name[:14]}", *times, waited, stray))
    return markdown_table(("rank, ms a step", *phases, "waited", "stray"), rows)


def tables_of_ranks(hosts: Sequence[Host], summaries: Sequence[Summary]) -> str:
    """The tables for logs.md beside those of the first rank, folded, and again by rank."""
    parts = [rank_table(hosts, summaries)]
    for rank, summary in enumerate(summaries[1:], 1):
        tables = f"{phase_table(summary)}\n\n{cpu_table(summary)}"
        parts.append(folded(f"rank {rank} on {hosts[rank].name}", tables))
    return folded("all ranks", "\n\n".join(parts))


def result_lines(progress: Progress) -> list[str]:
    """The best accuracy, if there was a validation."""
    best = progress.best[:1]
    return [f"best validation top-1: {top1:.2f} % in epoch {epoch}" for top1, epoch in best]


def step_figures(result: StepResult, left_s: float, epoch: str = "", phases: bool = False) -> str:
    """A step's figures, for the progress bar and for a line that also tells about the `epoch`."""
    figures = [f"loss {result.loss:.4f}"]
    if not epoch:  # 80 columns have no room for both, and the line of an epoch has the top-1
        figures.append(f"top-1 {100 * result.top1 / result.images:.1f} %")
    figures.append(f"{result.images / result.step_s:.4g} img/s")
    if phases:
        figures.append(f"fwd {result.total('duration_s', 'forward'):.2f} s")
        figures.append(f"bwd {result.total('duration_s', 'backward'):.2f} s")
    figures.append(f"{span_text(left_s)} left")
    return ", ".join(figures) + (f" ({epoch})" if epoch else "")
