"""phases.csv and the table of counts. Run: python -m pytest tests/reports/test_phases.py"""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
from records import PLAN, record, step, summarise

from split_affinity.errors import UserError
from split_affinity.reports.counts import counts_table
from split_affinity.reports.phases import (
    COLUMNS,
    PHASES_CSV,
    PHASES_PARQUET,
    PhaseFile,
    PhaseOwners,
    check_phases_file,
    phases_file,
)
from split_affinity.training.steps import StepResult
from train_split_affinity import main

COUNTS = {
    "voluntary_switches": 3,
    "involuntary_switches": 1,
    "migrations": 0,
    "minor_faults": 20,
    "major_faults": 0,
    "task_clock_s": 0.2,
    "cycles": 5e8,
    "instructions": 1e9,
    "llc_misses": 2e6,
    "clock_mhz": {0: 2500.0, 1: 800.0},
    "resident_bytes": 2**30,
}


def rows_of(path):
    """The rows of a file, as texts by column."""
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_phase(tmp_path):
    file = PhaseFile(tmp_path, PLAN, "2026-11-28T20:00:00Z")
    busy = {"cpu_busy_s": {0: 0.0, 1: 0.05, 2: 0.06}, "counts": COUNTS, "stray_s": 0.001}
    file.add(dataclasses.replace(step(1, backward_s=0.2, **busy), synced_s=9.25))
    file.add(step(2))
    rows = rows_of(tmp_path / PHASES_CSV)
    assert list(rows[0]) == list(COLUMNS)
    phases = [(row["step"], row["micro_batch"], row["phase"], row["lane"]) for row in rows]
    assert phases[:5] == [
        ("1", "1", "forward", "forward"),
        ("1", "1", "backward", "backward"),
        ("1", "2", "forward", "forward"),
        ("1", "2", "backward", "backward"),
        ("1", "", "update", "backward"),
    ]
    assert [row["step"] for row in rows[5:]] == 5 * ["2"]
    backward = rows[1]
    assert (backward["start_s"], backward["end_s"], backward["step_end_s"]) == ("1", "1.1", "9.25")
    assert (backward["mask"], backward["threads"], backward["seen_on"]) == ("1-2", "2", "1-2")
    assert backward["cpu_busy"] == "0:0 1:0.5 2:0.6"
    assert (backward["stray_s"], backward["rank"]) == ("0.001", "0")
    assert (backward["cycles"], backward["clock_mhz"]) == ("500000000", "0:2500 1:800")
    assert backward["package_j"] == rows[0]["cycles"] == ""


def test_what_was_not_looked_at_is_empty(tmp_path):
    file = PhaseFile(tmp_path, PLAN, "now")
    unseen = record("update", 0.0, 0.1, cpu_busy_s={}, seen_on=frozenset())
    file.add(StepResult(1, 1.0, 8, 0.1, (unseen,)))
    (row,) = rows_of(tmp_path / PHASES_CSV)
    assert {row[name] for name in ("seen_on", "cpu_busy", "minor_faults", "clock_mhz")} == {""}


def test_a_run_that_goes_on_adds_rows_and_others_columns_are_refused(tmp_path):
    for run in ("first", "second"):
        PhaseFile(tmp_path, PLAN, run).add(step(1))
    path = tmp_path / PHASES_CSV
    rows = rows_of(path)
    assert [row["run"] for row in rows] == 5 * ["first"] + 5 * ["second"]
    check_phases_file(path)
    (tmp_path / "nothing.csv").touch()
    check_phases_file(tmp_path / "nothing.csv")
    path.write_text(path.read_text().replace("run,rank", "rank,run", 1))
    with pytest.raises(UserError, match="phases.csv: has other columns than this version writes"):
        check_phases_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="has other columns"):
        check_phases_file(path)


def test_each_rank_has_a_file_of_its_own(tmp_path):
    assert phases_file(tmp_path) == tmp_path / "phases.csv"
    assert phases_file(tmp_path, 3) == tmp_path / "phases-rank3.csv"
    PhaseFile(tmp_path / "elsewhere", PLAN, "now", rank=1).add(step(1))
    assert {row["rank"] for row in rows_of(tmp_path / "elsewhere/phases-rank1.csv")} == {"1"}


def test_the_same_as_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = PhaseFile(tmp_path, PLAN, "2026-11-28T20:00:00Z")
    file.finish()
    assert not (tmp_path / PHASES_PARQUET).exists(), "there is no phase yet"
    file.add(step(1, counts=COUNTS))
    file.add(step(2))
    file.finish()
    table = parquet.read_table(tmp_path / PHASES_PARQUET)
    assert table.column_names == list(COLUMNS)
    rows = table.to_pylist()
    assert len(rows) == 10
    assert (rows[1]["cycles"], rows[1]["minor_faults"], rows[1]["mask"]) == (5e8, 20, "1-2")
    assert (rows[0]["cycles"], rows[0]["clock_mhz"], rows[4]["micro_batch"]) == (None, None, None)
    assert (rows[0]["package_j"], rows[5]["step"]) == (None, 2)


def test_a_forward_phase_that_is_ahead_belongs_to_the_step_that_follows():
    """As `delayed` has it; an epoch begins and ends with an empty pipeline."""
    owners = PhaseOwners()

    def owned(number, *phases):
        records = tuple(record(phase, start_s, 0.1) for start_s, phase in enumerate(phases))
        return [
            (one.phase, step, batch)
            for one, step, batch in owners.of(StepResult(number, 1, 8, 1, records))
        ]

    assert owned(1, "forward", "refresh", "backward", "forward", "update") == [
        ("forward", 1, 1),
        ("refresh", 2, None),
        ("backward", 1, 1),
        ("forward", 2, 1),
        ("update", 1, None),
    ]
    assert owned(2, "backward", "update") == [("backward", 2, 1), ("update", 2, None)]
    assert owned(3, "forward", "backward", "update")[0] == ("forward", 3, 1)


def test_the_table_of_counts_has_what_the_machine_shows():
    steps = [step(number, counts=COUNTS) for number in range(1, 6)]
    table = counts_table(summarise(steps).phases)
    heading, _, forward, backward, _ = table.splitlines()
    assert heading.replace(" ", "") == ("|counted|GHz|IPC|MPKI|switches|migrations|faults|")
    cells = [cell.strip() for cell in backward.strip("|").split("|")]
    assert cells == ["backward", "2.50", "2.00", "2.00", "4.0", "0.00", "20"]
    assert {cell.strip() for cell in forward.strip("|").split("|")[1:]} == {""}
    assert counts_table(summarise([step(1)]).phases) == ""
    everything = COUNTS | {"dram_read_bytes": 1e9, "dram_written_bytes": 5e8, "package_j": 5.0}
    wide = counts_table(summarise([step(1, counts=everything)]).phases)
    assert max(map(len, wide.splitlines())) <= 80
    # Both backward phases, of 0.1 s, were looked at.
    assert wide.splitlines()[3].replace(" ", "") == (
        "|backward|2.50|2.00|2.00|15.0|50.0|4.0|0.00|20|"
    )


def test_the_steps_that_warm_up_do_not_count():
    """They meet the page faults of memory that is used for the first time."""
    cold = COUNTS | {"minor_faults": 10**6}
    steps = [step(n, counts=cold if n < 3 else COUNTS) for n in range(1, 6)]
    (backward,) = (each for each in summarise(steps).phases if each.phase == "backward")
    assert (backward.counts["minor_faults"], backward.looks) == (3 * 2 * 20, 6)
    assert backward.looked_at_s == pytest.approx(0.6)


def test_energy_of_an_image():
    steps = [dataclasses.replace(step(n), energy_j=40.0 + n) for n in range(1, 6)]
    summary = summarise(steps)
    assert summary.joules_per_image == (43 + 44 + 45) / 24
    assert steps[0].as_metrics()["energy_j"] == 41
    assert summarise([step(1)]).joules_per_image is None


@pytest.mark.slow
def test_counting_changes_no_number_and_rows_add_up_to_the_step(tmp_path):
    short = ["--model", "resnet20", "--image-size", "32", "-b", "4", "--steps", "2", "-j", "0"]
    losses = {}
    for name, options in {"without": [], "with": ["--counters"]}.items():
        folder = tmp_path / name
        arguments = [*short, "--output-dir", str(folder), "--log-file", str(tmp_path / "log.md")]
        assert main([*arguments, *options]) == 0
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if line["type"] == "step"]
        losses[name] = [line["loss"] for line in steps]
    assert losses["with"] == losses["without"]
    assert not (tmp_path / "without" / PHASES_CSV).exists()
    rows = rows_of(tmp_path / "with" / PHASES_CSV)
    for line in steps:
        for phase in ("forward", "backward", "update"):
            own = [r for r in rows if (r["phase"], r["step"]) == (phase, str(line["step"]))]
            duration_s = sum(float(row["end_s"]) - float(row["start_s"]) for row in own)
            assert duration_s == pytest.approx(line[f"{phase}_s"], abs=1e-6)
            assert sum(float(row["cpu_s"]) for row in own) == pytest.approx(line[f"{phase}_cpu_s"])
    first = rows[0]
    assert float(first["task_clock_s"] or first["cpu_s"]) == pytest.approx(
        float(first["cpu_s"]), rel=0.2
    )
    assert int(first["voluntary_switches"]) >= 0


@pytest.mark.parametrize("name", [PHASES_CSV, "phases-rank1.csv"])
def test_rows_of_another_version_are_refused_before_anything_is_written(tmp_path, capsys, name):
    """Those of another rank too: it would find out after the others have begun."""
    (tmp_path / name).write_text("step,phase\n1,forward\n")
    options = ["--phases", "--output-dir", str(tmp_path), "--log-file", str(tmp_path / "log.md")]
    assert main(["--model", "resnet20", "--image-size", "32", "--steps", "1", *options]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith(f"{name}: has other columns than this version writes; move it away")
    assert [path.name for path in tmp_path.iterdir()] == [name]
