"""Do the rows of phases.csv say what the kernel's own trace of its scheduler says?

A check of half a minute, not a test. Needs root and perf.

    python benchmarks/kernel_trace.py --schedule overlap --accumulate 2

Trains a small model for some steps under `perf record -e sched:sched_switch`, by the clock that
phases.csv has. For one phase of each kind it prints both sides: CPU time of the lane's threads, the
CPUs where they ran, how often they were switched out, and who else ran on these CPUs. Any option of
training can be given.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from split_affinity.options.values import parse_cpu_list
from split_affinity.text import format_cpu_list, markdown_table

DEFAULTS = "--model resnet18 --image-size 64 --batch-size 32 --steps 8".split()
EVENTS = ["-e", "sched:sched_switch", "-e", "sched:sched_migrate_task", "-k", "mono", "-a"]
SWITCH = re.compile(
    r"\[(?P<cpu>\d+)\] +(?P<at_s>[\d.]+): +sched:sched_switch: prev_comm=(?P<name>.+) "
    r"prev_pid=(?P<thread>\d+) prev_prio=\d+ prev_state=(?P<state>\S+) ==> .* "
    r"next_pid=(?P<next>\d+)"
)
MOVE = re.compile(r"(?P<at_s>[\d.]+): +sched:sched_migrate_task: .* pid=(?P<thread>\d+) ")


@dataclass
class Seen:
    """What the kernel's trace has of a lane's threads between two moments."""

    on_cpu_s: Counter[int] = field(default_factory=Counter)  # by CPU
    others_s: Counter[str] = field(default_factory=Counter)  # by name, on the CPUs of the mask
    voluntary: int = 0
    involuntary: int = 0
    moves: int = 0


def runs_of(lines: list[str]) -> Iterator[tuple[int, int, str, float, float, str]]:
    """Each time that a thread had a CPU: the CPU, its id and name, from when to when, its state
    at the end (R: it would have gone on).
    """
    since: dict[int, float] = {}
    for line in lines:
        if match := SWITCH.search(line):
            cpu, at_s = int(match["cpu"]), float(match["at_s"])
            if cpu in since:
                yield cpu, int(match["thread"]), match["name"], since[cpu], at_s, match["state"]
            since[cpu] = at_s


def look(lines: list[str], threads: set[int], row: dict[str, str]) -> Seen:
    """What the trace has of a lane's threads during a phase."""
    start_s, end_s = float(row["start_s"]), float(row["end_s"])
    seen, mask = Seen(), parse_cpu_list(row["mask"])
    for cpu, thread, name, from_s, to_s, state in runs_of(lines):
        inside_s = min(to_s, end_s) - max(from_s, start_s)
        if inside_s <= 0:
            continue
        if thread in threads:
            seen.on_cpu_s[cpu] += inside_s
            if start_s <= to_s <= end_s:
                seen.involuntary += state.startswith("R")
                seen.voluntary += not state.startswith("R")
        elif thread and cpu in mask:
            seen.others_s[name] += inside_s
    for match in filter(None, map(MOVE.search, lines)):
        inside = start_s <= float(match["at_s"]) <= end_s
        seen.moves += inside and int(match["thread"]) in threads
    return seen


def train_under_perf(folder: Path, options: list[str]) -> tuple[list[str], dict[int, str]]:
    """The kernel's trace of a training as lines, and the mask of each of its threads by id."""
    command = [sys.executable, str(ROOT / "train_split_affinity.py"), *DEFAULTS, *options]
    command += ["--phases", "--output-dir", str(folder / "out"), "--log-file", os.devnull]
    data = folder / "perf.data"
    recorder = ["perf", "record", "-q", *EVENTS, "-m", "4096", "-o", str(data), "--"]
    masks: dict[int, str] = {}
    with subprocess.Popen([*recorder, *command], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for child in psutil.Process(process.pid).children():
                for task in Path(f"/proc/{child.pid}/task").glob("*"):
                    # The main thread coordinates; all others of this process compute.
                    if int(task.name) != child.pid:
                        status = (task / "status").read_text()
                        masks[int(task.name)] = status.split("Cpus_allowed_list:\t")[1].split()[0]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    script = ["perf", "script", "-i", str(data), "--ns", "-F", "comm,tid,cpu,time,event,trace"]
    return subprocess.check_output(script, text=True, stderr=subprocess.DEVNULL).splitlines(), masks


def main(options: list[str]) -> None:
    """Train, and print both sides of one phase of each kind."""
    if "--help" in options:
        print(f"usage: {Path(__file__).name} [-h] [options of training ...]\n\n{__doc__ or ''}")
        raise SystemExit(0)
    if os.geteuid() or not shutil.which("perf"):
        raise SystemExit("kernel_trace.py: needs root, and perf (apt install linux-perf)")
    with tempfile.TemporaryDirectory() as name:
        lines, masks = train_under_perf(Path(name), options)
        with (Path(name) / "out/phases.csv").open() as file:
            rows = list(csv.DictReader(file))
    looked_at = [row for row in rows if row["voluntary_switches"]]
    for phase in dict.fromkeys(row["phase"] for row in looked_at):
        row = [each for each in looked_at if each["phase"] == phase][-1]
        threads = {thread for thread, mask in masks.items() if mask == row["mask"]}
        seen = look(lines, threads, row)
        span_ms = 1e3 * (float(row["end_s"]) - float(row["start_s"]))
        print(f"\n{phase} of step {row['step']} on cores {row['mask']}, {span_ms:.3f} ms")
        others = ", ".join(f"{who} {1e3 * s:.3f} ms" for who, s in seen.others_s.most_common(4))
        pairs = [
            (
                "CPU time, ms",
                f"{1e3 * float(row['cpu_s']):.3f}",
                f"{1e3 * seen.on_cpu_s.total():.3f}",
            ),
            ("CPUs", row["seen_on"], format_cpu_list(seen.on_cpu_s)),
            ("voluntary switches", row["voluntary_switches"], seen.voluntary),
            ("involuntary switches", row["involuntary_switches"], seen.involuntary),
            ("migrations", row["migrations"], seen.moves),
            ("busy by CPU", row["cpu_busy"], f"others there: {others or 'nobody'}"),
        ]
        print(
            markdown_table(("", "phases.csv", "kernel"), [tuple(map(str, pair)) for pair in pairs])
        )


if __name__ == "__main__":
    main(sys.argv[1:])
