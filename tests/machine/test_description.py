"""Drawings of machines and plans. Run: python -m pytest tests/machine/test_description.py"""

import machines
import pytest

from split_affinity.machine.description import draw_plan
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings

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


def test_drawing_a_server_of_128_cores(tmp_path):
    lines = draw(tmp_path, machines.TWO_SOCKETS_128, range(128), columns=16).splitlines()
    assert len(lines) == 16 * 3 + 1
    assert lines[:3] == [
        "socket 0, node 0, L3 of CPU 0",
        "  core     0    1    2    3    4    5    6    7",
        "  cpu     F0   F1   F2   F3   F4   F5   F6   F7",
    ]
    assert lines[-4:-1] == [
        "socket 1, node 1, L3 of CPU 120",
        "  core    56   57   58   59   60   61   62   63",
        "  cpu   B120 B121 B122 B123 B124 B125 B126 B127",
    ]


@pytest.mark.parametrize(
    ("count", "first", "lines"),  # cores of one domain; the first CPU; how many in each line
    [
        (16, 0, [16]),
        (18, 0, [9, 9]),
        (16, 100, [8, 8]),
        (16, 1000, [8, 8]),
        (64, 100, [13] * 4 + [12]),
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
