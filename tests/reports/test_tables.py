"""Tables of a summary. Run: python -m pytest tests/reports/test_tables.py"""

import dataclasses

from made_up import LISTS
from records import PLAN, record, step, summarise
from rendered import page_of

from split_affinity.lanes.audit import placement_warnings
from split_affinity.machine.plan import CorePlan, Group, Host
from split_affinity.machine.topology import read_topology
from split_affinity.options.values import parse_cpu_list
from split_affinity.reports.tables import cpu_table, phase_table, tables_of_ranks
from split_affinity.text import markdown_table


def test_stray_time_above_one_percent_is_a_warning():
    below, above = (record("forward", 0, 1.0, stray_s=stray_s) for stray_s in (0.0099, 0.0101))
    assert not list(placement_warnings(below, PLAN))
    (warning,) = placement_warnings(above, PLAN)
    assert warning == ("forward: 10.1 ms of CPU time strayed from cores 0 in a phase of 1000.0 ms")


def test_a_table():
    assert markdown_table(("a", "long"), [("first", "1"), ("x", "22")]) == (
        "| a     | long |\n| :---- | ---: |\n| first |    1 |\n| x     |   22 |"
    )


def test_the_phase_table():
    rows = phase_table(summarise([step(1)], PLAN)).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == [
        "phase",
        "cores",
        "threads",
        "median ms",
        "p95 ms",
        "share of step",
        "busy",
        "stray ms",
    ]
    assert cells[3] == ["backward", "1-2", "2", "200.0", "200.0", "50.0%", "100%", "0.0"]
    assert cells[5][:1] + cells[5][5:6] == ["no phase (data, hand-over)", "12.5%"]


def test_the_phase_table_of_a_terminal_fits_80_columns():
    """With many cores, and phases of minutes; the cores stand in the plan above it."""
    groups = [
        Group(name, parse_cpu_list(cpus), 64)
        for name, cpus in zip(("forward", "backward"), LISTS, strict=True)
    ]
    plan = CorePlan("lists", *groups, groups[0].cpus)
    seconds = {"forward_s": 99.9, "backward_s": 199.9, "update_s": 9.9, "step_s": 400.0}
    summary = summarise([step(1, **seconds, stray_s=99.0)], plan)
    assert len(phase_table(summary).splitlines()[0]) > 100
    table = phase_table(summary, with_cores=False).splitlines()
    assert table[0] == (
        "| phase    | threads | median ms |   p95 ms | share of step | busy | stray ms |"
    )
    assert table[3] == (
        "| backward |      64 |  199900.0 | 199900.0 |         50.0% |  18% | 198000.0 |"
    )
    assert table[-1] == (
        "| no phase |         |           |          |         74.3% |      |          |"
    )
    assert {len(row) for row in table} == {79}


def test_the_cpu_table_names_busy_and_partly_busy_cpus():
    busy = {0: 0.02, 1: 0.1, 2: 0.04}
    table = cpu_table(summarise([step(1, cpu_busy_s=busy)], PLAN))
    cells = [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")]
    assert cells == ["backward", "1", "0,2", "0:20% 1:100% 2:40%", "1-2"]


def test_unknown_cpu_times_are_called_unknown():
    assert "unknown" in cpu_table(summarise([step(1, cpu_busy_s={})], PLAN))


def test_the_name_of_a_rank_s_machine_is_no_markdown_and_no_html():
    name = "a|b</summary>\n# heading <img src=x>"
    hosts = [Host("kernel", name, read_topology(), "2.0")] * 2
    summary = dataclasses.replace(summarise([step(1)], PLAN), waited_s=(0.0, 0.1))
    tags = page_of(tables_of_ranks(hosts, [summary] * 2)).tags
    assert tags.count("table") == 3
    assert tags.count("summary") == 2
    assert not {"h1", "img"} & {*tags}
