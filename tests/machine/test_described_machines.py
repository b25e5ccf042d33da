"""The machines of docs/machines, and what becomes of them in a plan.

Run: python -m pytest tests/machine/test_described_machines.py
"""

from collections import Counter

import machines
import pytest
from places import ROOT

from split_affinity.machine.description import machine_text, read_machine
from split_affinity.machine.plan import Host, plan_cores, rank_topology
from split_affinity.options.settings import Settings
from split_affinity.text import format_cpu_list


def divided(name, **settings):
    """The machine, and the physical cores of its forward and of its backward group."""
    machine = machines.described(name)
    plan = plan_cores(machine, Settings(**settings))
    return machine, *(
        [core for core in machine.cores if group.cpu_set & {*core.cpus}] for group in plan.groups
    )


def count(cores, level):
    """How many of some cores are in each socket, node or L3 domain, or of each speed."""
    return dict(Counter(getattr(core, level) for core in cores))


@pytest.mark.parametrize("path", machines.DESCRIBED, ids=lambda path: path.stem)
def test_described_machines_are_as_plan_records_them(path):
    assert machine_text(read_machine(path)) == path.read_text()
    assert "not recorded" in read_machine(path).cpu_model
    page = (ROOT / "docs/machines/README.md").read_text()
    assert f"| `{path.name}` |" in page
    assert page.count("| `") == len(machines.DESCRIBED) == 5


def test_two_sockets_stay_whole():
    machine, forward, backward = divided("server-two-sockets")
    assert count(forward, "package") == {0: 64}
    assert count(backward, "package") == {1: 64}
    hosts = 8 * [Host("boot", "box", machine, "2.15")]
    shares = [rank_topology(hosts, rank).allowed for rank in range(8)]
    assert format_cpu_list(shares[5]) == "80-95,208-223", "both threads of two whole L3 domains"
    assert {len(core.cpus) for core in machine.cores} == {2}


def test_a_node_for_each_l3_stays_whole():
    _, forward, backward = divided("server-node-per-l3", split="1:3")
    assert count(forward, "node") == {0: 8, 1: 8}
    assert count(backward, "node") == dict.fromkeys(range(2, 8), 8)
    assert all(core.l3 == 8 * core.node for core in (*forward, *backward))


def test_both_groups_have_as_many_fast_cores_and_as_many_slow_ones():
    _, forward, backward = divided("desktop-p-and-e-cores")
    assert count(forward, "capacity") == count(backward, "capacity") == {1024: 4, 512: 8}


def test_siblings_on_a_desktop_stay_together():
    machine = machines.described("desktop-smt")
    plan = plan_cores(machine, Settings())
    assert [str(group) for group in plan.groups] == [
        "cores 0-3,8-11, 4 threads",
        "cores 4-7,12-15, 4 threads",
    ]


def test_a_quota_is_respected():
    machine, forward, backward = divided("container-cpu-quota")
    assert (len(forward), len(backward)) == (3, 3)
    (note,) = plan_cores(machine, Settings()).notes
    assert note == "CPU quota of 6 CPUs: 6 of 32 allowed cores used"
