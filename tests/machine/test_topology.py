"""Topology and core plan, on stored machines.

Run: python -m pytest tests/machine/test_topology.py
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import machines
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_affinity import ALLOWED_CPUS
from split_affinity.errors import UserError
from split_affinity.machine.description import (
    describe_plan,
    machine_text,
    parse_machine,
    read_machine,
)
from split_affinity.machine.plan import (
    Host,
    choose_cores,
    forward_count,
    fullest_subset,
    loader_count,
    plan_cores,
    rank_topology,
    share_by_kind,
    share_out,
    usable_cores,
)
from split_affinity.machine.topology import (
    Core,
    Topology,
    cpus_of,
    host_kind,
    read_quota,
    read_topology,
)
from split_affinity.options.settings import Settings
from split_affinity.text import format_cpu_list


def read(root, rows, allowed=None, files=None, offline=""):
    """The topology of a stored machine."""
    machines.write_machine(root, rows, files, offline)
    cpus = allowed if allowed is not None else [row[0] for row in rows]
    return read_topology(root, frozenset(cpus))


def plan(topology, **settings):
    return plan_cores(topology, Settings(**settings))


def groups(topology, **settings):
    """(forward CPUs, backward CPUs) of a plan."""
    made = plan(topology, **settings)
    return made.forward.cpus, made.backward.cpus


# Reading


def test_reads_a_machine(tmp_path):
    topology = read(tmp_path, machines.TWO_SOCKETS, offline="8-9")
    assert topology.cpu_model == "Example CPU @ 3.0GHz"
    assert topology.online == tuple(range(8))
    assert topology.offline == {8, 9}
    assert topology.cores[0] == Core(package=0, node=0, l3=0, core_id=0, cpus=(0,))
    assert topology.cores[-1] == Core(package=1, node=1, l3=5, core_id=3, cpus=(7,))
    assert topology.quota_cpus is None


def test_siblings_become_one_core(tmp_path):
    topology = read(tmp_path, machines.SMT_FAR)
    assert [core.cpus for core in topology.cores] == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(("split", "cores"), [("even", (2, 2)), ("1:3", (1, 3)), ("none", (4,))])
def test_a_group_knows_its_physical_cores(tmp_path, split, cores):
    made = plan(read(tmp_path, machines.SMT_FAR), split=split)
    assert tuple(group.cores for group in made.groups) == cores
    assert tuple(len(group.cpus) for group in made.groups) == tuple(2 * count for count in cores)


def test_an_offline_sibling_is_no_part_of_its_core(tmp_path):
    rows = [row for row in machines.SMT_FAR if row[0] != 5]
    topology = read(
        tmp_path,
        rows,
        files={"sys/devices/system/cpu/cpu1/topology/thread_siblings_list": "1,5\n"},
        offline="5",
    )
    assert [core.cpus for core in topology.cores] == [(0, 4), (1,), (2, 6), (3, 7)]


def test_without_sysfs_every_allowed_cpu_is_a_core(tmp_path):
    topology = read_topology(tmp_path, frozenset({0, 1, 2}))
    assert [core.cpus for core in topology.cores] == [(0,), (1,), (2,)]


def test_this_machine_can_be_read():
    topology = read_topology()
    assert topology.allowed == ALLOWED_CPUS
    assert topology.allowed <= set(topology.online)


QUOTA_V2 = {"sys/fs/cgroup/batch/job7/cpu.max": "250000 100000\n"}
QUOTA_V1 = {
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (machines.CGROUP_V2 | QUOTA_V2, 2.5),
        (machines.CGROUP_V2 | {"sys/fs/cgroup/batch/job7/cpu.max": "max 100000\n"}, None),
        (machines.CGROUP_V2 | QUOTA_V2 | {"sys/fs/cgroup/batch/cpu.max": "50000 100000\n"}, 0.5),
        (machines.CGROUP_V2 | {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (machines.CGROUP_V1 | QUOTA_V1, 1.5),
        (
            machines.CGROUP_V1 | QUOTA_V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"},
            None,
        ),
        ({"proc/self/cgroup": "0::/../outside\n"} | QUOTA_V2, None),
        ({}, None),
    ],
)
def test_reads_cpu_quotas(tmp_path, files, quota):
    assert read(tmp_path, machines.SEVEN, files=files).quota_cpus == quota


MEMINFO = {
    "proc/meminfo": "MemTotal:        4194304 kB\nMemFree:  9 kB\nSwapTotal:  1024 kB\n"
    "HugePages_Total:       7\n"
}
MEMORY_V1 = "sys/fs/cgroup/memory/memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("files", "memory_bytes"),
    [
        (MEMINFO, 2**32),
        (MEMINFO | machines.CGROUP_V2 | {"sys/fs/cgroup/batch/memory.max": f"{2**30}\n"}, 2**30),
        (MEMINFO | machines.CGROUP_V2 | {"sys/fs/cgroup/batch/memory.max": "max\n"}, 2**32),
        (MEMINFO | machines.CGROUP_V1 | {MEMORY_V1: f"{2**31}\n"}, 2**31),
        (MEMINFO | machines.CGROUP_V1 | {MEMORY_V1: "9223372036854771712\n"}, 2**32),
        (MEMINFO | {"proc/self/cgroup": "0::/../outside\n"}, 2**32),
        ({}, math.inf),
    ],
)
def test_reads_memory_limits_to_which_swap_adds(tmp_path, files, memory_bytes):
    swap_bytes = 2**20 if files else 0
    topology = read(tmp_path, machines.SEVEN, files=files)
    assert topology.memory_bytes == memory_bytes + swap_bytes


def test_reads_the_memory_of_this_machine():
    memory_bytes = read_topology().memory_bytes
    assert psutil.Process().memory_info().rss < memory_bytes
    assert memory_bytes <= psutil.virtual_memory().total + psutil.swap_memory().total


# Even split


@pytest.mark.parametrize(
    ("rows", "forward", "backward"),
    [
        (machines.TWO, (0,), (1,)),
        (machines.THREE, (0,), (1, 2)),
        (machines.SEVEN, (0, 1, 2), (3, 4, 5, 6)),
        (machines.SMT_FAR, (0, 1, 4, 5), (2, 3, 6, 7)),
        (machines.TWO_SOCKETS, (0, 2, 4, 6), (1, 3, 5, 7)),
    ],
)
def test_even_split(tmp_path, rows, forward, backward):
    assert groups(read(tmp_path, rows)) == (forward, backward)


def test_one_core_is_shared_and_said_so(tmp_path):
    made = plan(read(tmp_path, machines.ONE))
    assert made.forward.cpus == made.backward.cpus == (0,)
    assert made.forward is not made.backward
    assert made.notes == ("one core: both groups share it, nothing is separated",)


def test_one_core_with_two_threads_is_divided_into_them(tmp_path):
    made = plan(read(tmp_path, machines.ONE_CORE_TWO_THREADS))
    assert (made.forward.cpus, made.backward.cpus) == ((0,), (1,))
    assert (made.forward.threads, made.backward.threads) == (1, 1)
    assert "is in both groups" in made.notes[0]


def test_threads_count_cores_not_hardware_threads(tmp_path):
    made = plan(read(tmp_path, machines.SMT_FAR), split="1:3")
    assert (made.forward.threads, made.backward.threads) == (1, 3)
    assert made.forward.cpus == (0, 4)


def test_fast_and_slow_cores_are_shared_out(tmp_path):
    topology = read(tmp_path, machines.HYBRID, files=machines.HYBRID_FILES)
    assert groups(topology) == ((0, 1, 2, 3, 8, 9), (4, 5, 6, 7, 10, 11))


def test_the_backward_group_gets_the_odd_fast_core(tmp_path):
    rows = machines.HYBRID[:6] + machines.HYBRID[8:11]  # three fast cores, three slow ones
    topology = read(tmp_path, rows, files=machines.HYBRID_FILES)
    assert groups(topology) == ((0, 1, 8, 9), (2, 3, 4, 5, 10))


def test_arm_capacities_tell_kinds_apart(tmp_path):
    topology = read(tmp_path, machines.BIG_LITTLE, files=machines.BIG_LITTLE_FILES)
    assert groups(topology) == ((0, 2), (1, 3))


# Restrictions


def test_only_allowed_cpus_are_used(tmp_path):
    topology = read(tmp_path, machines.SMT_FAR, allowed=[1, 2, 5, 7])
    made = plan(topology)
    assert (made.forward.cpus, made.backward.cpus) == ((1, 5), (2, 7))
    assert (made.forward.threads, made.backward.threads) == (1, 2)


def test_a_restricted_set_keeps_sockets_whole(tmp_path):
    topology = read(tmp_path, machines.TWO_SOCKETS, allowed=[0, 2, 1, 3, 5, 7])
    assert groups(topology, split="2:1") == ((1, 3, 5, 7), (0, 2))


def test_names_of_mounts_need_not_be_utf_8(tmp_path):
    read(tmp_path, machines.SEVEN, files=machines.CGROUP_V2 | QUOTA_V2)
    mounts = tmp_path / "proc/self/mountinfo"
    mounts.write_bytes(b"36 24 0:31 / /caf\xe9 rw - tmpfs tmpfs rw\n" + mounts.read_bytes())
    assert read_quota(tmp_path) == 2.5


@pytest.mark.parametrize(
    ("quota", "forward", "backward"),
    [
        ("250000", (0,), (1,)),
        ("100000", (0,), (0,)),
        ("20000", (0,), (0,)),
        ("700000", (0, 1, 2), (3, 4, 5, 6)),
    ],
)
def test_a_quota_limits_the_cores(tmp_path, quota, forward, backward):
    files = machines.CGROUP_V2 | {"sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    assert groups(read(tmp_path, machines.SEVEN, files=files)) == (forward, backward)


def test_a_quota_is_said(tmp_path):
    topology = read(tmp_path, machines.SEVEN, files=machines.CGROUP_V2 | QUOTA_V2)
    assert plan(topology).notes == ("CPU quota of 2.5 CPUs: 2 of 7 allowed cores used",)


def test_a_quota_leaves_the_fast_cores(tmp_path):
    files = machines.HYBRID_FILES | machines.CGROUP_V2 | QUOTA_V2
    topology = read(tmp_path, machines.HYBRID, files=files)
    assert groups(topology) == ((0, 1), (2, 3))


# Ratios, lists, one lane


@pytest.mark.parametrize(
    ("count", "ratio", "forward"),
    [
        (2, (1, 1), 1),
        (3, (1, 1), 1),
        (7, (1, 1), 3),
        (8, (1, 1), 4),
        (2, (1, 2), 1),
        (3, (1, 2), 1),
        (6, (1, 2), 2),
        (8, (1, 2), 3),
        (16, (1, 2), 5),
        (16, (1, 3), 4),
        (2, (1, 99), 1),
        (2, (99, 1), 1),
        (8, (99, 1), 7),
    ],
)
def test_ratios_are_rounded_to_cores(count, ratio, forward):
    assert forward_count(count, *ratio) == forward


@pytest.mark.parametrize(
    ("rows", "split", "notes"),
    [
        (machines.TWO, "1:3", ("split 1:3 of 2 cores became 1:1",)),
        (machines.TWO, "2:2", ()),
        (machines.THREE, "1:2", ()),
        (machines.THREE, "1:99", ("split 1:99 of 3 cores became 1:2",)),
        (machines.SEVEN, "1:1", ("split 1:1 of 7 cores became 3:4",)),
        (machines.SEVEN, "even", ()),  # an odd core goes to the backward group
        (machines.SEVEN, "none", ()),
        (machines.SMT_FAR, "2:6", ()),
        (machines.SMT_FAR, "2:1", ("split 2:1 of 4 cores became 3:1",)),
        (machines.ONE, "1:3", ("one core: both groups share it, nothing is separated",)),
    ],
)
def test_what_became_of_a_ratio_is_said(tmp_path, rows, split, notes):
    assert plan(read(tmp_path, rows), split=split).notes == notes


def test_what_became_of_a_ratio_in_one_core(tmp_path):
    topology = read(tmp_path, machines.ONE_CORE_TWO_THREADS)
    first, _ = plan(topology, split="1:3").notes
    assert first == "split 1:3 of 2 hardware threads became 1:1"
    assert len(plan(topology, split="1:1").notes) == 1


def test_a_ratio_within_a_quota(tmp_path):
    files = machines.CGROUP_V2 | QUOTA_V2
    notes = plan(read(tmp_path, machines.SEVEN, files=files), split="1:2").notes
    assert "split 1:2 of 2 cores became 1:1" in notes


@pytest.mark.parametrize(
    ("cores", "loaders"), [(1, 2), (16, 2), (23, 2), (24, 3), (100, 12), (128, 16), (1024, 16)]
)
def test_loaders_follow_the_cores_of_a_large_machine(cores, loaders):
    assert loader_count(Settings(), cores) == loaders
    assert [loader_count(Settings(workers=asked), cores) for asked in (0, 1, 99)] == [0, 1, 99]


def test_each_rank_has_the_loaders_of_its_share():
    machine = machines.described("server-two-sockets")
    hosts = 4 * [Host("boot", "box", machine, "2.15")]
    made = [plan(machine), plan(rank_topology(hosts, 3)), plan(machine, split="none")]
    made.append(plan(machine, forward_cores=(0, 1), backward_cores=(2, 3)))
    assert [each.cores for each in made] == [128, 32, 128, 4]
    words = [describe_plan(each, Settings())[-1].rpartition(", ")[2] for each in made]
    assert words == [f"{count} loader processes" for count in (16, 4, 16, 2)]


def test_split_none_is_one_lane_over_all_cores(tmp_path):
    made = plan(read(tmp_path, machines.SMT_FAR), split="none")
    assert made.forward is made.backward
    assert made.forward.cpus == tuple(range(8))
    assert made.forward.threads == 4
    assert len(made.groups) == 1


def test_lists_are_taken_as_given(tmp_path):
    made = plan(
        read(tmp_path, machines.SEVEN),
        forward_cores=(1, 3),
        backward_cores=(0, 2, 5),
        loader_cores=(6,),
        forward_threads=5,
    )
    assert made.split == "lists"
    assert (made.forward.cpus, made.backward.cpus) == ((1, 3), (0, 2, 5))
    assert made.loader_cpus == (6,)
    assert (made.forward.threads, made.backward.threads) == (5, 3)
    assert made.notes == ("forward: 5 threads on 2 CPUs",)


def test_lists_that_share_a_core_are_noted(tmp_path):
    made = plan(read(tmp_path, machines.SMT_FAR), forward_cores=(0, 1), backward_cores=(4, 2))
    assert made.notes == (
        "core 0 of socket 0 (CPUs 0,4) is in both groups, by different hardware threads",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forward_cores": (0,)}, "--forward-cores 0 needs --backward-cores"),
        ({"backward_cores": (0, 1)}, "--backward-cores 0-1 needs --forward-cores"),
        ({"forward_cores": (0, 1), "backward_cores": (1, 2)}, "overlap in 1"),
        ({"forward_cores": (0,), "backward_cores": (3,)}, "CPU 3 is not allowed.*allowed: 0-2"),
        ({"forward_cores": (0,), "backward_cores": (7,)}, "CPU 7 is offline.*allowed: 0-2"),
        ({"forward_cores": (0,), "backward_cores": (50,)}, "CPU 50 is not in this machine"),
        ({"loader_cores": (3,)}, "--loader-cores 3: CPU 3 is not allowed"),
        (
            {"forward_cores": (0,), "backward_cores": (1,), "split": "1:2"},
            "--split 1:2 contradicts",
        ),
        ({"forward_cores": (0,), "backward_cores": (1,), "split": "none"}, "contradicts"),
        ({"split": "none", "forward_threads": 1, "backward_threads": 2}, "has one lane"),
    ],
)
def test_impossible_requests(tmp_path, settings, message):
    topology = read(tmp_path, machines.SEVEN, allowed=[0, 1, 2], offline="7")
    with pytest.raises(UserError, match=message):
        plan(topology, **settings)


def test_without_thread_affinity_only_one_lane_works():
    cores = tuple(Core(0, 0, -1, cpu, (cpu,)) for cpu in range(4))
    topology = Topology("Apple", cores, frozenset(), frozenset(range(4)), None, has_affinity=False)
    assert plan(topology, split="none").forward.cpus == (0, 1, 2, 3)
    for settings in ({}, {"split": "1:2"}, {"split": "none", "loader_cores": (0,)}):
        with pytest.raises(UserError, match="only --split none works"):
            plan(topology, **settings)


# Properties


@st.composite
def topologies(draw):
    """Machines of up to 2 sockets x 3 L3 domains x 4 cores x 2 threads, partly allowed."""
    sockets, domains = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    threads = draw(st.integers(1, 2))
    places = [
        (socket, domain, core)
        for socket, domain in itertools.product(range(sockets), range(domains))
        for core in range(draw(st.integers(1, 4)))
    ]
    kinds = draw(st.sampled_from([(1024,), (1024, 512)]))
    cores = tuple(
        Core(
            package=socket,
            node=socket,
            l3=100 * socket + domain,
            core_id=number,
            cpus=tuple(number + len(places) * thread for thread in range(threads)),
            capacity=draw(st.sampled_from(kinds)),
        )
        for number, (socket, domain, _) in enumerate(places)
    )
    every = [cpu for core in cores for cpu in core.cpus]
    allowed = draw(st.sets(st.sampled_from(every), min_size=1))
    quota = draw(st.none() | st.floats(0.1, 30))
    return Topology("any", tuple(sorted(cores)), frozenset(), frozenset(allowed), quota, True)


ratios = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(topologies(), ratios)
def test_properties_of_a_split(topology, ratio):
    made = plan(topology, split=f"{ratio[0]}:{ratio[1]}")
    forward, backward = set(made.forward.cpus), set(made.backward.cpus)
    usable = usable_cores(topology)
    assert forward and backward
    assert forward | backward == set(cpus_of(usable)) <= topology.allowed
    assert made.forward.threads <= len(forward) and made.backward.threads <= len(backward)
    if len(usable) > 1:
        assert not forward & backward
        for core in topology.cores:
            assert not (forward & set(core.cpus) and backward & set(core.cpus))
        assert made.forward.threads == forward_count(len(usable), *ratio)
        assert made.forward.threads + made.backward.threads == len(usable)
    elif len(forward | backward) > 1:
        assert not forward & backward
    else:
        assert forward == backward


@given(topologies(), ratios)
def test_both_groups_have_the_same_mix(topology, ratio):
    usable = usable_cores(topology)
    if len(usable) < 2:
        return
    count = forward_count(len(usable), *ratio)
    for kind, share in share_by_kind(usable, count):
        assert abs(share - len(kind) * count / len(usable)) < 1


@given(topologies(), st.data())
def test_no_more_domains_are_split_than_one_at_each_level(topology, data):
    cores = topology.cores
    count = data.draw(st.integers(0, len(cores)))
    chosen = choose_cores(cores, count)
    assert len(set(chosen)) == count
    for level in ("package", "l3"):
        whole_or_none = 0
        places = {getattr(core, level) for core in cores}
        for place in places:
            inside = [core for core in cores if getattr(core, level) == place]
            whole_or_none += sum(core in chosen for core in inside) in (0, len(inside))
        assert whole_or_none >= len(places) - 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 40))
def test_the_fullest_subset_is_the_fullest(sizes, limit):
    subset = fullest_subset(sizes, limit)
    best = max(
        total
        for length in range(len(sizes) + 1)
        for chosen in itertools.combinations(sizes, length)
        if (total := sum(chosen)) <= limit
    )
    assert sum(sizes[index] for index in subset) == best
    assert len(set(subset)) == len(subset)


# Ranks


def shares(topology, ranks):
    """The CPUs of each of so many ranks on one machine, as lists."""
    hosts = ranks * [Host("boot", "box", topology, "2.15")]
    allowed = (rank_topology(hosts, rank).allowed for rank in range(ranks))
    return [format_cpu_list(cpus) for cpus in allowed]


def of_ranks(topology, ranks, **settings):
    """(forward CPUs, backward CPUs) of each of so many ranks."""
    hosts = ranks * [Host("boot", "box", topology, "2.15")]
    return [groups(rank_topology(hosts, rank), **settings) for rank in range(ranks)]


def test_ranks_get_whole_sockets_and_caches(tmp_path):
    server = read(tmp_path, machines.TWO_SOCKETS_SMT)
    assert shares(server, 2) == ["0-15,32-47", "16-31,48-63"]
    assert shares(server, 4) == ["0-7,32-39", "8-15,40-47", "16-23,48-55", "24-31,56-63"]
    assert [tuple(map(format_cpu_list, pair)) for pair in of_ranks(server, 2)] == [
        ("0-7,32-39", "8-15,40-47"),
        ("16-23,48-55", "24-31,56-63"),
    ], "inside its share each rank has a split of whole caches"
    assert [tuple(map(format_cpu_list, pair)) for pair in of_ranks(server, 4)][3] == (
        "24-27,56-59",
        "28-31,60-63",
    )
    assert [list(map(len, pair)) for pair in of_ranks(server, 2, split="1:3")] == 2 * [[8, 24]]


def test_ranks_get_the_same_mix_of_fast_and_slow_cores(tmp_path):
    hybrid = read(tmp_path, machines.HYBRID, files=machines.HYBRID_FILES)
    assert shares(hybrid, 2) == ["0-3,8-9", "4-7,10-11"]
    assert shares(hybrid, 4) == ["0-1,8", "2-3,9", "4-5,10", "6-7,11"]


def test_ranks_share_a_quota_out(tmp_path):
    quota = {**machines.CGROUP_V2, "sys/fs/cgroup/batch/job7/cpu.max": "650000 100000"}
    server = read(tmp_path, machines.TWO_SOCKETS, files=quota)
    assert shares(server, 2) == ["0-1,3", "2,4,6"], "of four and two cores: one has to cross"
    assert shares(server, 6) == ["0", "2", "4", "6", "1", "3"]
    with pytest.raises(UserError, match=r"7 ranks on box: more than its 6 cores .* CPU quota"):
        shares(server, 7)


def test_more_ranks_than_cores(tmp_path):
    machine = read(tmp_path, machines.SMT_FAR, allowed=[0, 1, 4])
    assert shares(machine, 2) == ["0,4", "1"]
    message = (
        r"3 ranks on box: more than its 2 cores that can be used \(allowed: 0-1,4\); start fewer"
    )
    with pytest.raises(UserError, match=message):
        shares(machine, 3)


def test_masks_that_a_launcher_has_set_stay(tmp_path):
    """Of three ranks that are bound, two to the same socket; and others on another machine."""
    server = read(tmp_path, machines.TWO_SOCKETS)
    first, second = frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})
    hosts = [
        Host(kernel, "box", dataclasses.replace(server, allowed=allowed), "2.15")
        for kernel, allowed in (
            ("a", first),
            ("a", second),
            ("a", second),
            ("b", first),
            ("b", first),
        )
    ]
    found = [set(rank_topology(hosts, rank).allowed) for rank in range(5)]
    assert found == [{0, 2, 4, 6}, {1, 3}, {5, 7}, {0, 2}, {4, 6}]
    quota = [
        dataclasses.replace(host, topology=dataclasses.replace(host.topology, quota_cpus=6.0))
        for host in hosts
    ]
    assert [len(rank_topology(quota, rank).allowed) for rank in range(5)] == [2, 2, 2, 2, 2]


def test_ranks_compute_bfloat16_only_if_all_can(tmp_path):
    able = dataclasses.replace(read(tmp_path, machines.TWO), bf16="amx_bf16")
    hosts = [Host(name, name, able, "2.15") for name in "ab"]
    assert rank_topology(hosts, 0).bf16 == "amx_bf16"
    hosts[1] = dataclasses.replace(hosts[1], topology=dataclasses.replace(able, bf16=""))
    assert rank_topology(hosts, 0).bf16 == ""


@given(topologies(), st.integers(1, 9))
def test_properties_of_shares(topology, ranks):
    cores = usable_cores(topology)
    if ranks > len(cores):
        with pytest.raises(UserError, match=f"{ranks} ranks"):
            shares(topology, ranks)
        return
    parts = share_out(cores, ranks)
    assert sorted(core for part in parts for core in part) == sorted(cores)
    sizes = list(map(len, parts))
    assert max(sizes) - min(sizes) <= 1
    for capacity in {core.capacity for core in cores}:
        kinds = [sum(core.capacity == capacity for core in part) for part in parts]
        assert max(kinds) - min(kinds) <= 2


def test_a_broken_sysfs_is_no_reason_to_fail(tmp_path):
    root = machines.write_machine(tmp_path, machines.TWO)
    for name in ("physical_package_id", "core_id"):
        Path(root / f"sys/devices/system/cpu/cpu1/topology/{name}").write_text("-1\n")
    topology = read_topology(root, frozenset({0, 1}))
    assert [core.package for core in topology.cores] == [0, 0]
    assert groups(topology) == ((0,), (1,))


# Descriptions of machines

DESCRIPTION = """\
{
 "format": "train_split_affinity machine",
 "version": 1,
 "cpu_model": "Example CPU @ 3.0GHz",
 "cores": [
  {
   "package": 0,
   "node": 0,
   "l3": 0,
   "core_id": 0,
   "cpus": "0-1",
   "capacity": 1024
  }
 ],
 "offline": "7-8",
 "allowed": "0-1",
 "quota_cpus": null,
 "has_affinity": true,
 "bf16": "",
 "memory_bytes": null
}
"""


def test_how_a_machine_is_described(tmp_path):
    topology = read(tmp_path, machines.ONE_CORE_TWO_THREADS, offline="7-8")
    assert machine_text(topology) == DESCRIPTION


@given(topologies(), st.sampled_from(("", "amx_bf16")), st.just(math.inf) | st.integers(1, 2**60))
def test_a_described_machine_is_the_same_machine(topology, bf16, memory_bytes):
    topology = dataclasses.replace(topology, bf16=bf16, memory_bytes=memory_bytes)
    assert parse_machine(machine_text(topology)) == topology


def test_memory_is_described_to_the_byte():
    for memory_bytes in (2**53 + 1, 2**60 - 1):  # which no float is
        topology = parse_machine(described(memory_bytes=memory_bytes))
        assert topology.memory_bytes == memory_bytes


def test_a_machine_from_a_folder_or_from_a_file(tmp_path):
    """All CPUs of a folder's machine may be used, whatever this process may use, and whatever this
    system can do.
    """
    root = machines.write_machine(tmp_path / "server", machines.TWO_SOCKETS, offline="8-10")
    topology = read_machine(root)
    assert topology == dataclasses.replace(
        read_topology(root, frozenset(range(8))), has_affinity=True
    )
    assert groups(topology) == ((0, 2, 4, 6), (1, 3, 5, 7))
    file = tmp_path / "server.json"
    file.write_text(machine_text(topology))
    assert read_machine(file) == topology


def test_the_name_of_another_machine_s_processor_is_not_guessed(tmp_path):
    root = machines.write_machine(tmp_path, machines.TWO)
    (root / "proc/cpuinfo").unlink()
    assert read_machine(root).cpu_model == "unknown CPU"


def described(**changes):
    """The description with some fields changed; ... leaves a field out."""
    values = json.loads(DESCRIPTION) | changes
    return json.dumps({name: value for name, value in values.items() if value is not ...})


CORE = json.loads(DESCRIPTION)["cores"][0]
NO_DESCRIPTION = "not a machine's description, as plan --record writes it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", NO_DESCRIPTION),
        ("0-3", NO_DESCRIPTION),
        ("[]", NO_DESCRIPTION),
        ("[" * 100_000, NO_DESCRIPTION),
        ('{"type": "run"}', NO_DESCRIPTION),
        (described(version=2), "a description of version 2; this program reads version 1"),
        (described(version=...), "a description of version None; this program reads version 1"),
        (described(cores=...), "no list of cores"),
        (described(cores=[]), "no list of cores"),
        (described(cores="0-3"), "no list of cores"),
        (described(cores=[CORE, 5]), "cores[1]: no package"),
        (described(cores=[CORE | {"cpus": "1-0"}]), "cores[0]: cpus: '1-0' runs backwards: write"),
        (described(cores=[CORE | {"cpus": [0, 1]}]), "cores[0]: cpus: '[0, 1]' is not a core list"),
        (described(cores=[CORE | {"node": -1}]), "cores[0]: node: '-1' is not a whole number from"),
        (described(cores=[CORE | {"l3": None}]), "cores[0]: l3: 'null' is not a whole number from"),
        (described(cores=[CORE | {"core_id": 1.5}]), "cores[0]: core_id: '1.5' is not a whole"),
        (described(cores=[CORE | {"capacity": 0}]), "cores[0]: capacity: '0' is not a whole"),
        (described(cores=[CORE, CORE]), "CPU 0 is in 2 cores"),
        (described(cpu_model=...), "no cpu_model"),
        (described(offline="x"), "offline: 'x' is not a core list"),
        (described(allowed=""), "allowed: '' is not a core list"),
        (described(allowed="1-3"), "allowed: no core has 2-3"),
        (described(quota_cpus=0), "quota_cpus: '0' is not a number above 0, or null"),
        (described(quota_cpus=math.nan), "quota_cpus: 'NaN' is not a number above 0, or null"),
        (described(has_affinity="maybe"), "has_affinity: 'maybe' is not 'true' or 'false'"),
        (described(bf16="avx2"), "bf16: 'avx2' is not '' or 'amx_bf16' or 'avx512_bf16' or 'bf16'"),
        (described(memory_bytes=True), "memory_bytes: 'true' is not a number above 0, or null"),
        (described(memory_bytes=10**400), "is not a number above 0, or null"),
    ],
)
def test_what_is_no_description_of_a_machine(tmp_path, text, message):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_machine(tmp_path / "m.json")
    assert str(caught.value).startswith(f"--machine {tmp_path}/m.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_files_that_show_no_machine(tmp_path):
    missing, empty, damaged = tmp_path / "missing", tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    online = machines.write_machine(damaged, machines.TWO) / "sys/devices/system/cpu/online"
    online.write_text("many\n")
    binary = tmp_path / "last.pt"
    binary.write_bytes(bytes(range(256)))
    for path, reason in {
        missing: "cannot be read: No such file or directory",
        empty: "a folder without sys/devices/system/cpu/online",
        damaged: "'many' is not a core list such as 0-3,8-11 or 0-15:2",
        binary: NO_DESCRIPTION,
    }.items():
        with pytest.raises(UserError) as caught:
            read_machine(path)
        assert str(caught.value) == f"--machine {path}: {reason}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", "amx_bf16"),
        ("flags\t\t: fpu avx512f avx512_bf16", "avx512_bf16"),
        ("Features\t: fp asimd bf16 i8mm", "bf16"),
        ("flags\t\t: fpu avx2 bf16_not_quite", ""),
        ("flags\t\t: ", ""),
        ("", ""),
    ],
)
def test_native_bfloat16(tmp_path, line, found):
    files = {"proc/cpuinfo": f"processor\t: 0\nmodel name\t: Example\n{line}\nbugs\t\t: bf16\n"}
    machines.write_machine(tmp_path, machines.TWO, files)
    assert read_topology(tmp_path, frozenset({0, 1})).bf16 == found


# Hosts

VIRTUAL = {"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu hypervisor avx2\n"}
METAL = {"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx2\nbugs\t\t: hypervisor\n"}
ARM = {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\n"}


def dmi(vendor, product):
    return {"sys/class/dmi/id/sys_vendor": vendor, "sys/class/dmi/id/product_name": product}


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, "unknown"),
        (METAL, "bare metal"),
        (VIRTUAL, "virtual machine"),
        (METAL | dmi("Google", "Google Compute Engine"), "bare metal"),
        (ARM, "bare metal"),
        (ARM | dmi("QEMU", "KVM Virtual Machine"), "virtual machine"),
        (ARM | dmi("Amazon EC2", "m7g.large"), "virtual machine"),
        (ARM | dmi("Amazon EC2", "m7g.metal"), "bare metal"),
        (ARM | {"sys/hypervisor/type": "xen\n"}, "virtual machine"),
        (METAL | {".dockerenv": ""}, "container (docker) on bare metal"),
        (VIRTUAL | {".dockerenv": ""}, "container (docker) in a virtual machine"),
        (METAL | {"run/.containerenv": ""}, "container (podman) on bare metal"),
        (METAL | {".singularity.d/runscript": ""}, "container (apptainer) on bare metal"),
        (
            VIRTUAL | {"run/secrets/kubernetes.io/serviceaccount/token": "x", ".dockerenv": ""},
            "container (kubernetes) in a virtual machine",
        ),
        (METAL | machines.CGROUP_V1, "container (docker) on bare metal"),
        (METAL | machines.CGROUP_V2, "bare metal"),
        (
            METAL | {"proc/self/cgroup": "0::/kubepods.slice/kubepods-pod1.slice\n"},
            "container (kubernetes) on bare metal",
        ),
        (
            METAL | {"proc/self/cgroup": "0::/machine/libpod-1a2b\n"},
            "container (podman) on bare metal",
        ),
        (METAL | {"proc/self/cgroup": "0::/lxc/box\n"}, "container (lxc) on bare metal"),
        (METAL | {"proc/self/cgroup": "0::/system.slice/docker.service\n"}, "bare metal"),
        (METAL | {"proc/self/cgroup": "0::/user.slice/dockerfan\n"}, "bare metal"),
    ],
)
def test_the_kind_of_host(tmp_path, files, kind):
    machines.write_files(tmp_path, files)
    assert host_kind(tmp_path) == kind
