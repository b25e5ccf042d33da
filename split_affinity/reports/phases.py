"""What each phase did, a row for each: phases.csv, and the same as phases.parquet."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from split_affinity.counters.counters import OF_THREADS, STATES, SUMS
from split_affinity.errors import UserError
from split_affinity.files import append_text, write_whole
from split_affinity.lanes.audit import PhaseRecord
from split_affinity.machine.plan import CorePlan
from split_affinity.reports.timeline import by_start
from split_affinity.text import csv_text, format_cpu_list
from split_affinity.training.steps import StepResult

PHASES_CSV, PHASES_PARQUET = "phases.csv", "phases.parquet"
OF_OTHER_RANKS = "phases-rank[0-9]*.csv"
WHAT = ("run", "rank", "step", "micro_batch", "phase", "lane", "threads", "mask")
TIMES = ("start_s", "end_s", "step_end_s", "profiled")
CPU_TIMES = ("cpu_s", "stray_s", "other_lane_s", "python_s", "audit_s")
LOOKED_AT = ("seen_on", "cpu_busy")
COLUMNS = (*WHAT, *TIMES, *CPU_TIMES, *LOOKED_AT, *SUMS, *STATES)
# Kinds of columns for Parquet; all others are numbers with a fraction.
TEXTS = ("run", "phase", "lane", "mask", *LOOKED_AT, "clock_mhz", "node_bytes")
OF_A_ROW = "rank", "step", "micro_batch", "threads", "profiled"
WHOLE_NUMBERS = *OF_A_ROW, "resident_bytes", *OF_THREADS


class PhaseOwners:
    """Tells for which step and micro-batch each phase worked, step by step.

    A step's records are the phases that ended in it. `delayed` has begun the next step by then: it
    has refreshed a copy for it, and the first micro-batch has gone forward.
    """

    def __init__(self, ahead: int = 0):
        """`ahead` forward phases of the first step ran before it."""
        self._ahead = ahead

    def of(self, step: StepResult) -> Iterator[tuple[PhaseRecord, int, int | None]]:
        """The step's phases by start time, each with a step and, if it has one, a micro-batch."""
        batches = sum(record.phase == "backward" for record in step.records)
        number = {"forward": self._ahead, "backward": 0}
        for record in by_start(step.records):
            if record.phase in number and batches:
                later, batch = divmod(number[record.phase], batches)
                number[record.phase] += 1
                yield record, step.step + later, 1 + batch
            else:
                yield record, step.step + (record.phase == "refresh"), None
        self._ahead = max(0, number["forward"] - batches)


def phase_row(record: PhaseRecord, plan: CorePlan) -> dict[str, Any]:
    """A phase's columns, but for those of its run and step. What was not looked at is missing."""
    row = {name: getattr(record, name) for name in ("phase", "lane", "start_s", "end_s")}
    row |= {"threads": plan.group(record.lane).threads, "mask": format_cpu_list(record.mask)}
    row |= {name: getattr(record, name) for name in CPU_TIMES}
    if record.seen_on:
        row["seen_on"] = format_cpu_list(record.seen_on)
    duration_s = record.duration_s
    if record.cpu_busy_s and duration_s:
        shares = {cpu: min(1.0, busy_s / duration_s) for cpu, busy_s in record.cpu_busy_s.items()}
        row["cpu_busy"] = shares
    return row | record.counts


def cell(value: Any) -> Any:
    """A value as it is written: seconds to the nanosecond; figures by CPU as `0:0.98 1:0.02`."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{each:.6g}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return value


HEADER = csv_text([COLUMNS])


def phases_file(folder: Path, rank: int = 0, name: str = PHASES_CSV) -> Path:
    """Where a rank writes its phases: each rank has a file of its own."""
    stem, dot, kind = name.partition(".")
    return folder / (f"{stem}-rank{rank}{dot}{kind}" if rank else name)


def check_phases_file(path: Path) -> None:
    """Raise UserError if rows cannot be added to a file: it has other columns. OSError too."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline(2 * len(HEADER))
    if first not in ("", HEADER):
        raise UserError(f"{path}: has other columns than this version writes; move it away")


class PhaseFile:
    """The rows of one rank in phases.csv, step by step; those of earlier runs stay before them."""

    def __init__(self, folder: Path, plan: CorePlan, begun: str, rank: int = 0):
        """`begun` is when the run began: it tells the rows of several runs apart."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._table = (
            phases_file(folder, rank, name) for name in (PHASES_CSV, PHASES_PARQUET)
        )
        self._plan, self._owners = plan, PhaseOwners()
        self._run = {"run": begun, "rank": rank}

    def add(self, step: StepResult) -> None:
        """Write the phases of a step. Raises RunError if that fails."""
        lines = []
        for record, number, batch in self._owners.of(step):
            row = phase_row(record, self._plan) | self._run | {"step": number}
            row |= {"micro_batch": batch, "step_end_s": step.synced_s}
            row["profiled"] = int(step.profiled)
            lines.append([cell(row.get(name)) for name in COLUMNS])
        append_text(self._path, csv_text(lines), HEADER)

    def finish(self) -> None:
        """Write all rows of the file as Parquet, if pyarrow is installed and there are any."""
        try:
            from pyarrow import csv as arrow_csv
            from pyarrow import float64, int64, parquet, string
        except ImportError:
            return
        if not self._path.exists():
            return
        kinds = dict.fromkeys(COLUMNS, float64())
        kinds |= dict.fromkeys(TEXTS, string()) | dict.fromkeys(WHOLE_NUMBERS, int64())
        options = arrow_csv.ConvertOptions(column_types=kinds, strings_can_be_null=True)
        table = arrow_csv.read_csv(self._path, convert_options=options)
        data = io.BytesIO()
        parquet.write_table(table, data)
        write_whole(self._table, data.getvalue())
