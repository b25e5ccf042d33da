"""Which cores are taken under a CPU quota: those that are idle now.

Run: python -m pytest tests/machine/test_quota.py
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machines
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_affinity import ALLOWED_CPUS
from split_affinity.machine.description import machine_text, parse_machine, read_machine
from split_affinity.machine.plan import Host, plan_cores, rank_topology, usable_cores
from split_affinity.machine.topology import busy_now, cpu_ticks, cpus_of, read_topology
from split_affinity.options.settings import Settings
from split_affinity.options.values import parse_cpu_list

LINE = "cpu{cpu} {user} 10 20 {idle} 7 1 2 {steal} 0 0"


def stat(ticks, elapsed=20):
    """/proc/stat by CPU: ticks at work since the first look, of those that have gone by."""
    lines = ["cpu  1 2 3 4 5 6 7 0 0 0"]
    for cpu, worked in ticks.items():
        lines.append(LINE.format(cpu=cpu, user=100 + worked, idle=5000 + elapsed - worked, steal=0))
    return "\n".join([*lines, "intr 1 2 3 4 5 6", "ctxt 99", "cpufreq 1 2 3 4 5", ""])


def test_how_busy_cpus_were_between_two_looks(tmp_path, monkeypatch):
    def busy_between(first, later):
        machines.write_files(tmp_path, {"proc/stat": first})
        monkeypatch.setattr(
            time, "sleep", lambda _: machines.write_files(tmp_path, {"proc/stat": later})
        )
        return busy_now(tmp_path, cpu_ticks(first), 0.2)

    first = LINE.format(cpu=3, user=100, idle=5000, steal=1)
    later = LINE.format(cpu=3, user=103, idle=5012, steal=2)
    assert cpu_ticks(f"cpu 9 9 9 9 9\n{first}\n") == {3: (134, 5141)}
    assert busy_between(first, later) == {3: 0.25}
    both, one = "cpu0 5 0 0 4 0\ncpu1 5 0 0 4 0\n", "cpu0 5 0 0 4 0\n"
    assert cpu_ticks(both) == {0: (5, 9), 1: (5, 9)}
    assert busy_between(both, one) == {0: 0.0}, "no tick, and one offline"
    for odd in ("", "cpu", "cpu0", "cpu0 1 2\n", "cpu0 a b c d e\n"):
        assert cpu_ticks(odd) == {}


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """A machine as it is read under a quota, while others are at work: the share of each CPU."""

    def read(rows, quota, ticks, allowed=None, files=None):
        files = (files or {}) | machines.CGROUP_V2
        files |= {"sys/fs/cgroup/cpu.max": f"{round(100000 * quota)} 100000\n"}
        cpus = [row[0] for row in rows]
        every = dict.fromkeys(cpus, 0)
        machines.write_machine(tmp_path, rows, files | {"proc/stat": stat(every, 0)})

        def sleep(time_s):
            assert time_s == 0.2
            (tmp_path / "proc/stat").write_text(stat(every | ticks))

        monkeypatch.setattr(time, "sleep", sleep)
        return read_topology(tmp_path, frozenset(cpus if allowed is None else allowed))

    return read


SIXTEEN = machines.SIXTEEN_CORES  # cores 0 to 7 share a cache, 8 to 15 another; siblings 16 apart


@pytest.mark.parametrize(
    ("rows", "quota", "ticks", "used", "why"),
    [
        (machines.SEVEN, 2, {}, "0-1", "the first, since all are idle"),
        (machines.SEVEN, 2.5, dict.fromkeys(range(7), 2), "0-1", "the first, since all are idle"),
        (machines.SEVEN, 2, {0: 20, 1: 19}, "2-3", "idle now, while others work on 2 cores"),
        (machines.SEVEN, 2, {1: 20}, "0,2", "idle now, while others work on 1 core"),
        (machines.SEVEN, 0.5, {0: 3}, "1", "idle now, while others work on 1 core"),
        (
            machines.SEVEN,
            3,
            {0: 20, 1: 20, 2: 9, 3: 8, 4: 20, 5: 20},
            "2-3,6",
            "the least busy ones, since others work on 6 cores",
        ),
        # A sibling at work makes a core busy; both threads of an idle one are taken.
        (SIXTEEN, 2, {16: 20}, "8-9,24-25", "idle now, while others work on 1 core"),
        # One cache, if one has room; the one with fewer busy cores
        (
            SIXTEEN,
            4,
            {0: 20, 17: 20, 8: 20},
            "9-12,25-28",
            "idle now, while others work on 3 cores",
        ),
        (
            SIXTEEN,
            6,
            dict.fromkeys(range(3), 20) | {8: 20},
            "9-14,25-30",
            "idle now, while others work on 4 cores",
        ),
        # No cache has room, but a socket: its cores are 1, 3, 5 and 7.
        (machines.TWO_SOCKETS, 3, {0: 20}, "1,3,5", "idle now, while others work on 1 core"),
        # No socket has room: those that are idle
        (
            machines.TWO_SOCKETS,
            4,
            {0: 20, 1: 20},
            "2-4,6",
            "idle now, while others work on 2 cores",
        ),
        # Fast cores first
        (machines.HYBRID, 2, {0: 20}, "2-5", "idle now, while others work on 1 core"),
        (
            machines.HYBRID,
            2,
            {0: 20, 2: 20, 5: 20},
            "6-8",
            "idle now, while others work on 3 cores",
        ),
    ],
)
def test_idle_cores_are_taken(seen, rows, quota, ticks, used, why):
    files = machines.HYBRID_FILES if rows is machines.HYBRID else {}
    topology = seen(rows, quota, ticks, files=files)
    assert cpus_of(usable_cores(topology)) == parse_cpu_list(used)
    made = plan_cores(topology, Settings(split="none"))
    assert made.forward.cpus == parse_cpu_list(used)
    (note,) = (each for each in made.notes if each.startswith("CPU quota of "))
    assert note.endswith(f", CPU{'' if used.isdigit() else 's'} {used}: {why}")


def test_only_allowed_cores_are_chosen(seen):
    topology = seen(machines.SEVEN, 2, {3: 20}, allowed=(3, 4, 6))
    assert cpus_of(usable_cores(topology)) == (4, 6)
    assert plan_cores(topology, Settings()).notes == (
        "CPU quota of 2 CPUs: 2 of 3 allowed cores used, CPUs 4,6: idle now, while others work on "
        "1 core",
    )


def test_nobody_looks_where_there_is_no_choice(seen, monkeypatch):
    topology = seen(machines.TWO, 2, {0: 20})
    assert topology.busy == {}
    assert plan_cores(topology, Settings()).notes == ()


def test_cores_given_by_hand_are_not_explained(seen):
    lists = {"forward_cores": (0,), "backward_cores": (5,)}
    (note,) = plan_cores(seen(machines.SEVEN, 2, {0: 20}), Settings(**lists)).notes
    assert note == "CPU quota of 2 CPUs: 2 of 7 allowed cores used"


@pytest.mark.parametrize("text", ["", stat({0: 0, 1: 0}), "cpu0 what\n"])
def test_without_all_times_the_first_are_taken(seen, monkeypatch, tmp_path, text):
    """lxcfs shows as many CPUs as the container has, with numbers of their own."""
    seen(machines.SEVEN, 2, {0: 20})
    (tmp_path / "proc/stat").write_text(text)
    topology = read_topology(tmp_path, frozenset(range(7)))
    assert topology.busy == {}
    assert cpus_of(usable_cores(topology)) == (0, 1)


def test_a_machine_in_a_file_has_no_idleness(seen, tmp_path):
    topology = seen(machines.SEVEN, 2, {0: 20})
    assert topology.busy[0] == 1
    described = parse_machine(machine_text(topology))
    assert described == topology
    assert described.busy == read_machine(tmp_path).busy == {}
    assert cpus_of(usable_cores(read_machine(tmp_path))) == (0, 1)


def test_ranks_choose_disjoint_cores_by_what_the_first_one_saw(seen):
    first = seen(SIXTEEN, 4, {0: 20})
    other = dataclasses.replace(first, busy=first.busy | {9: 1.0, 12: 1.0})
    hosts = [Host("boot", "server", each, "2.14") for each in (first, other)]
    shares = [cpus_of(usable_cores(rank_topology(hosts, rank))) for rank in (0, 1)]
    assert shares == [(8, 9, 24, 25), (10, 11, 26, 27)]


@functools.cache
def made_up(name):
    """A stored machine without a quota."""
    rows = getattr(machines, name)
    with tempfile.TemporaryDirectory() as folder:
        root = machines.write_machine(Path(folder), rows)
        return read_topology(root, frozenset(row[0] for row in rows))


@settings(max_examples=50)
@given(st.data())
def test_properties_of_the_choice(data):
    names = st.sampled_from(["SIXTEEN_CORES", "TWO_SOCKETS", "TWO_SOCKETS_SMT"])
    topology = made_up(data.draw(names))
    shares = st.sampled_from((0.0, 0.05, 0.3, 1.0))
    busy = {cpu: data.draw(shares) for cpu in topology.online}
    quota = data.draw(st.integers(1, len(topology.cores)))
    topology = dataclasses.replace(topology, busy=busy, quota_cpus=quota)
    used = usable_cores(topology)
    assert len(used) == quota
    assert used == sorted(set(used) & set(topology.cores)), "whole cores, each once"
    load = {core: max(busy[cpu] for cpu in core.cpus) for core in topology.cores}
    left = [load[core] for core in topology.cores if core not in used]
    taken = [load[core] for core in used]
    if max(taken) > 0.1:
        assert max(taken) <= min(each for each in [*left, 2.0] if each > 0.1)
        assert all(each > 0.1 for each in left), "no idle core is left"
    idle = [core for core in topology.cores if load[core] <= 0.1]
    for level in ("l3", "package"):
        domains = [[c for c in idle if getattr(c, level) == name] for name in range(-1, 65)]
        if len(idle) < len(topology.cores) and max(map(len, domains)) >= quota:
            assert len({getattr(core, level) for core in used}) == 1, f"one {level}"


@pytest.mark.alone
def test_a_busy_cpu_of_this_machine_is_seen():
    cpu = max(ALLOWED_CPUS)
    place = functools.partial(os.sched_setaffinity, 0, {cpu})
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=place) as process:
        shares = busy_now(Path("/"), read_topology().online, 0.5)
        process.kill()
    assert shares[cpu] > 0.8
    assert all(0 <= share <= 1 for share in shares.values())
