"""Tables of operators. Run: python -m pytest tests/reports/test_operator_tables.py"""

import csv
import dataclasses

from profiled import made_up_times

from split_affinity.reports.operators import (
    GROUPS_SHOWN,
    describe_operators,
    group_table,
    kind_table,
    operator_tables,
    operators_csv,
    short_name,
)
from split_affinity.training.operators import OUTSIDE, REST, OperatorTime, OperatorTimes, Touched


def test_tables_of_operators():
    alone = 2 * (Touched("forward", "forward", 3 * 2**20),)
    times = dataclasses.replace(made_up_times(), touched=alone, untouched="")
    text = operator_tables(times)
    assert max(map(len, text.splitlines())) <= 80
    for line in [
        "| forward  |  forward |     100.0 |        53.5% |            3 |",
        "| update   | backward |      50.0 |         0.0% |            - |",
        "| convolution forward  |      40.0 | 40.0% |              conv2d |",
        "| all of backward      |     200.0 |       |                      |",
        "| input                |        5.0 |   5.0% |           - |      - |       - |",
        "| conv1                |       40.5 |  40.5% |        66.0 |  33.0% |    1.63 |",
        "| outside of operators |       46.5 |  46.5% |       107.0 |  53.5% |    2.30 |",
        "| all                  |      100.0 | 100.0% |       200.0 | 100.0% |    2.00 |",
    ]:
        assert line in text
    (line,) = describe_operators(times, 0.3)
    assert line.startswith(
        "operators of step 3, under PyTorch's profiler: 400.0 ms a step (the med"
    )
    beside = dataclasses.replace(times, touched=(Touched("forward", "forward", None),))
    assert "ran beside another phase (forward)" in describe_operators(beside, 0.3)[1]
    unknown = dataclasses.replace(times, touched=(), untouched="no step was left")
    assert describe_operators(unknown, 0.3)[1].endswith("unknown (no step was left)")


def test_all_operators_of_all_ranks_are_in_the_file():
    times = made_up_times()
    rows = list(csv.DictReader(operators_csv([times, times]).splitlines()))
    assert len(rows) == 2 * len(times.rows)
    assert {row["rank"] for row in rows} == {"0", "1"}
    (row,) = (row for row in rows[: len(times.rows)] if row["operator"] == "aten::conv2d")
    assert row == {
        "rank": "0",
        "lane": "forward",
        "phase": "forward",
        "layer_group": "conv1",
        "operator": "aten::conv2d",
        "kind": "convolution forward",
        "calls_per_step": "1",
        "self_ms_per_step": "30.0000",
        "total_ms_per_step": "40.0000",
    }


def test_small_kinds_and_small_groups_are_put_together():
    def row(group, kind, self_ms):
        return OperatorTime("all", "forward", group, "aten::" + 40 * "x", kind, 1, self_ms, self_ms)

    groups = [row(f"layer{number}", "additions", 1.0 + number) for number in range(30)]
    rest = row("", "attention", 0.5), row("layer0", REST, 2.0), row("", OUTSIDE, 10.0)
    times = OperatorTimes(3, 5, 500.0, (*groups, *rest))
    table = kind_table(times, "forward")
    assert "attention" not in table
    assert f"| {REST}      |       2.5 |" in table
    assert short_name("aten::" + 40 * "x") == 29 * "x" + "..."
    lines = group_table(times).splitlines()[2:]
    assert len(lines) == GROUPS_SHOWN + 2
    assert lines[0].startswith("| layer7 ")
    assert lines[-3].startswith("| 7 other groups")
