"""Drawings of machines and plans. Run: python -m pytest tests/machine/test_drawing.py"""

import dataclasses

import machines
import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_affinity.machine.drawing import draw_plan, short_list
from split_affinity.machine.plan import Host, plan_cores, rank_topology
from split_affinity.machine.topology import Core, read_topology
from split_affinity.options.settings import Settings
from split_affinity.options.values import parse_cpu_list

# Drawing


def draw(tmp_path, rows, allowed, settings=None, files=None, columns=4):
    machines.write_machine(tmp_path, rows, files)
    topology = read_topology(tmp_path, frozenset(allowed))
    plan = plan_cores(topology, settings or Settings())
    return draw_plan(topology, plan, columns=columns)


def test_drawing_sockets_and_threads(tmp_path):
    drawing = draw(tmp_path, machines.SMT_FAR, [0, 1, 2, 4, 6])
    assert drawing == (
        "socket 0, node 0, L3 of CPU 0\n"
        "  core   0  1  2  3\n"
        "  cpu   F0 B1 B2 x3\n"
        "  cpu   F4 x5 B6 x7\n"
        "  F forward, B backward, - not used, x not allowed"
    )


def test_drawing_kinds_and_wrapping(tmp_path):
    drawing = draw(tmp_path, machines.HYBRID, range(12), files=machines.HYBRID_FILES)
    assert drawing.splitlines()[1:] == [
        "  core    0   1   2   3",
        "  kind    P   P   P   P",
        "  cpu    F0  F2  B4  B6",
        "  cpu    F1  F3  B5  B7",
        "  core    8   9  10  11",
        "  kind    E   E   E   E",
        "  cpu    F8  F9 B10 B11",
        "  F forward, B backward, - not used, x not allowed",
    ]


def test_drawing_sixteen_cores(tmp_path):
    drawing = draw(tmp_path, machines.SIXTEEN_CORES, range(32), columns=16)
    assert drawing.splitlines() == [
        "socket 0, node 0, L3 of CPU 0",
        "  core    0   1   2   3   4   5   6   7",
        "  cpu    F0  F1  F2  F3  F4  F5  F6  F7",
        "  cpu   F16 F17 F18 F19 F20 F21 F22 F23",
        "socket 0, node 0, L3 of CPU 8",
        "  core    8   9  10  11  12  13  14  15",
        "  cpu    B8  B9 B10 B11 B12 B13 B14 B15",
        "  cpu   B24 B25 B26 B27 B28 B29 B30 B31",
        "  F forward, B backward, - not used, x not allowed",
    ]


@pytest.mark.parametrize(
    ("count", "first", "lines"),  # cores of one domain; the first CPU; how many in each line
    [
        (16, 0, [16]),
        (16, 100, [8, 8]),
        (16, 1000, [8, 8]),
        (15, 1000, [8, 7]),
    ],
)
def test_no_line_of_a_drawing_is_wider_than_80(tmp_path, count, first, lines):
    rows = [(first + cpu, 0, 0, 0, cpu) for cpu in range(count)]
    allowed = [row[0] for row in rows]
    drawing = draw(tmp_path, rows, allowed, columns=16).splitlines()
    assert max(map(len, drawing)) <= 80
    assert [len(line.split()) - 1 for line in drawing if line.startswith("  cpu")] == lines


def test_drawing_both_groups_on_one_core_and_unused_cores(tmp_path):
    files = machines.CGROUP_V2 | {"sys/fs/cgroup/cpu.max": "100000 100000\n"}
    assert "  cpu   FB0  -1  -2" in draw(tmp_path, machines.THREE, [0, 1, 2], files=files)


# Folded, above 16 cores


def folded(machine, ranks=1, **settings):
    """The lines of a drawing, and the text of each column."""
    hosts = ranks * [Host("boot", "box", machine, "2.15")]
    shares = [rank_topology(hosts, rank) for rank in range(ranks)] if ranks > 1 else [machine]
    lines = draw_plan(machine, *(plan_cores(each, Settings(**settings)) for each in shares))
    assert max(map(len, lines.splitlines())) <= 80
    header, *rows, legend = lines.splitlines()
    assert legend.startswith("  F forward, B backward, - not used, x not allowed")
    return header, rows


def test_a_server_of_128_cores_has_a_line_for_each_cache():
    header, rows = folded(machines.described("server-two-sockets"))
    assert header == "socket  node  L3 of    cores  CPUs"
    assert len(rows) == 16
    assert rows[1] == "0       0     CPU 8    8-15   F 8-15,136-143"
    assert rows[15] == "1       1     CPU 120  56-63  B 120-127,248-255"


def test_folded_ranks_kinds_and_what_is_not_used():
    header, rows = folded(machines.described("server-two-sockets"), ranks=64)
    assert header.split()[-3:] == ["cores", "rank", "CPUs"]
    assert rows[1].endswith("8-15   4-7    F 8-14:2,136-142:2 B 9-15:2,137-143:2")
    header, rows = folded(machines.described("desktop-p-and-e-cores"))
    assert [row.split()[4] for row in rows] == ["P", "E"]
    assert rows[1].endswith("E     32-47   F 16-23 B 24-31")
    quota = dataclasses.replace(machines.described("container-cpu-quota"), allowed=range(60))
    assert folded(quota)[1][0].endswith("  F 0-2,32-34 B 3-5,35-37 - 6-31,38-59 x 60-63")


def test_too_many_lines_are_folded_once_more():
    """32 L3 domains, as many nodes: where neighbours are used alike, or else by socket."""
    cores = [Core(cpu // 64, cpu // 4, cpu // 4 * 4, cpu % 64, (cpu,)) for cpu in range(128)]
    server = dataclasses.replace(
        machines.described("server-node-per-l3"),
        cores=tuple(cores),
        allowed=frozenset(range(128)),
    )
    header, lines = folded(server, split="1:3")
    assert lines == [
        "0       0-7    CPU 0-28 (8)     0-31   F 0-31",
        "0       8-15   CPU 32-60 (8)    32-63  B 32-63",
        "1       16-31  CPU 64-124 (16)  0-63   B 64-127",
    ]
    _, lines = folded(server, ranks=64)
    assert len([line for line in lines if line[:2].strip()]) == 2
    uneven = frozenset(cpu for cpu in range(128) if cpu % 3 == 0 or cpu % 7 == 0)
    _, lines = folded(dataclasses.replace(server, allowed=uneven), split="none")
    assert len(lines) > 2, "lists are broken at commas, not cut"


@given(st.sets(st.integers(0, 40)))
def test_short_lists_say_the_same(numbers):
    assert not numbers or {*parse_cpu_list(short_list(numbers))} == numbers
    assert short_list([0, 1, 4, 5, 7, 9, 11]) == "0-1,4-5,7-11:2"
