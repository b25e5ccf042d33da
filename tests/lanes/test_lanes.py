"""Lanes and the audit, read from /proc. Run: python -m pytest tests/lanes/test_lanes.py"""

import contextlib
import ctypes
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from patching import set_everywhere
from places import ROOT
from small import needs_two_cpus

from split_affinity import ALLOWED_CPUS, process_cpus
from split_affinity.errors import RunError
from split_affinity.lanes.audit import (
    Audit,
    PhaseRecord,
    children_cpu_ns,
    placement_warnings,
    process_cpu_ns,
    thread_clocks_ns,
    thread_cpu_ns,
    thread_ids,
    thread_role,
)
from split_affinity.lanes.contention import (
    ContentionMonitor,
    Usage,
    contention_between,
    own_time_s,
    subtract_own_time,
)
from split_affinity.lanes.lane import Lane, Lanes, confine_thread, tune_allocator
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.machine.topology import read_topology
from split_affinity.runs.measurement import MeasuringProcess

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    needs_two_cpus,
    pytest.mark.alone,
]


def make_conv():
    """A convolution and its input, large enough for a team of two threads."""
    return torch.nn.Conv2d(16, 32, 3), torch.randn(8, 16, 64, 64)


def convolve(conv, images, times=10):
    """Forward passes; the output of the last, with its graph."""
    for _ in range(times):
        output = conv(images)
    return output


def backpropagate(output, times=3):
    for _ in range(times):
        output.sum().backward(retain_graph=True)


def masks():
    return {tid: frozenset(os.sched_getaffinity(tid)) for tid in thread_ids()}


@pytest.fixture
def lanes(split_plan):
    with Lanes(split_plan, read_topology().online) as lanes:
        yield lanes


def test_the_thread_clock_is_that_of_the_thread():
    time.sleep(0.01)
    before_ns = time.thread_time_ns()
    clock_ns = thread_cpu_ns(threading.get_native_id())
    assert before_ns <= clock_ns <= time.thread_time_ns()


def test_a_team_is_born_inside_its_group(split_plan):
    for group in split_plan.groups:
        before = set(thread_ids())
        lane = Lane(group, Audit(()))
        born = set(thread_ids()) - before
        assert len(born) == 2, "the lane's thread and one OpenMP worker"
        assert {masks()[tid] for tid in born} == {frozenset(group.cpus)}
        assert lane.notes == []
        lane.close()


def test_a_lane_s_thread_is_never_elsewhere(split_plan, monkeypatch):
    first_masks = {}

    def confine(cpus, confine=confine_thread):
        first_masks.setdefault(threading.get_native_id(), process_cpus())
        return confine(cpus)

    set_everywhere(monkeypatch, "confine_thread", confine)
    with Lanes(split_plan, ()) as lanes:
        for lane in (lanes.forward, lanes.backward):
            born_on = first_masks[lane.call(threading.get_native_id)]
            assert born_on == frozenset(lane.group.cpus)


def test_work_stays_inside_the_groups(lanes, split_plan):
    conv, images = make_conv()
    output = lanes.forward.run("forward", convolve, conv, images)
    lanes.backward.run("backward", backpropagate, output)
    forward, backward = lanes.take_records()
    for record, group in ((forward, split_plan.forward), (backward, split_plan.backward)):
        assert record.lane == group.name
        assert record.mask == record.seen_on == frozenset(group.cpus)
        assert record.stray_s == 0
        assert 0 < record.cpu_s < record.duration_s + 0.01, "one CPU has no more to give"
        assert set(record.cpu_busy_s) == set(read_topology().online)
        assert record.used_on_s == {group.cpus[0]: pytest.approx(record.cpu_s)}, "on its only CPU"
    assert forward.end_s <= backward.start_s
    for cpu, before_s in forward.cpu_before_s.items():
        after_s = before_s + forward.cpu_busy_s[cpu]
        assert 0 < before_s <= after_s <= backward.cpu_before_s[cpu] + 0.02, "one clock for all"
    assert not list(placement_warnings(forward, split_plan))
    assert not list(placement_warnings(backward, split_plan))


def test_both_threads_of_a_team_work(lanes, split_plan):
    used = {}

    def watched(conv, images):
        before = thread_clocks_ns()
        convolve(conv, images)
        after = thread_clocks_ns()
        used.update({tid: after[tid] - before.get(tid, 0) for tid in after})

    lanes.forward.run("forward", watched, *make_conv())
    here = {tid for tid, mask in masks().items() if mask == frozenset(split_plan.forward.cpus)}
    assert sum(used[tid] > 1e6 for tid in here) == 2


def naive(group_a, group_b, audit):
    """What does not work: one thread that moves itself, its OpenMP worker staying behind."""
    conv, images = make_conv()
    os.sched_setaffinity(0, group_a.cpus)
    torch.set_num_threads(2)
    output = convolve(conv, images)
    os.sched_setaffinity(0, group_b.cpus)
    before = thread_clocks_ns()
    backpropagate(output)
    return audit.attribute(group_b, before, thread_clocks_ns())


def test_the_audit_sees_the_naive_way_leak(two_groups):
    with ThreadPoolExecutor(1) as executor:
        used = executor.submit(naive, *two_groups, Audit(())).result()
    total_s = used["cpu_s"] + used["stray_s"] + used["python_s"]
    assert used["stray_s"] > 0.2 * total_s, "about half of the time is the worker's"


@pytest.fixture
def forward_worker(request, split_plan):
    """The one OpenMP worker of the forward lane; teams of earlier tests may live on."""
    before = set(thread_ids())
    request.getfixturevalue("lanes")
    python = {thread.native_id for thread in threading.enumerate()}
    mask = frozenset(split_plan.forward.cpus)
    born = set(thread_ids()) - before - python
    (worker,) = (tid for tid in born if masks()[tid] == mask)
    return worker


def test_the_audit_tells_how_long_threads_were_busy_where_they_were_last_seen(
    split_plan, monkeypatch
):
    """Two threads on one CPU, and one elsewhere; none of them is Python's."""
    tids = range(10**8, 10**8 + 3)
    cpu_of = dict(zip(tids, (0, 0, 4), strict=True))
    set_everywhere(monkeypatch, "last_cpu", cpu_of.get)
    group = split_plan.forward
    monkeypatch.setattr(os, "sched_getaffinity", lambda tid: set(group.cpus))
    before = dict.fromkeys(tids, 1_000_000_000)
    after = dict(zip(tids, (3_000_000_000, 1_500_000_000, 1_250_000_000), strict=True))
    used = Audit(()).attribute(group, before, after)
    assert used["used_on_s"] == {0: 2.5, 4: 0.25}
    assert used["seen_on"] == {0, 4}
    assert used["cpu_s"] == 2.75
    assert "used_on_s" not in Audit(()).attribute(group, before, after, look=False)


def test_the_audit_counts_a_thread_born_within_the_phase(forward_worker, split_plan):
    """All of its time is the phase's: it has no reading from before."""
    worker, mask = forward_worker, frozenset(split_plan.forward.cpus)
    audit = Audit(())
    inside = audit.attribute(split_plan.forward, {}, {worker: 5_000_000})
    assert (inside["cpu_s"], inside["stray_s"], inside["seen_on"]) == (0.005, 0, mask)
    outside = audit.attribute(split_plan.backward, {}, {worker: 5_000_000})
    assert (outside["cpu_s"], outside["stray_s"]) == (0, 0.005)
    later = audit.attribute(split_plan.forward, {worker: 5_000_000}, {worker: 7_000_000})
    assert later["cpu_s"] == 0.002


@pytest.mark.parametrize(
    ("share", "looks"), [(1e9, [True] * 6), (1e-9, [True, True] + [False] * 4)]
)
def test_the_audit_looks_closely_as_often_as_it_may_cost(share, looks, lanes, monkeypatch):
    """At each kind of phase by itself, so that a short one is not always passed over."""
    set_everywhere(monkeypatch, "LOOK_SHARE", share)
    for phase in ("backward", "update") * 3:
        lanes.backward.run(phase, convolve, *make_conv(), 1)
    records = lanes.take_records()
    assert [bool(record.cpu_busy_s) for record in records] == looks
    assert [bool(record.seen_on) for record in records] == looks
    assert [bool(record.used_on_s) for record in records] == looks
    assert [bool(record.cpu_before_s) for record in records] == looks
    for record in records:
        assert record.cpu_s > 0
        assert record.mask is lanes.backward.group.cpu_set, "one for all"
        assert record.audit_s > 0


def clocks_of_threads_that_come_and_go():
    """In a process whose threads are these alone: None, then how often all were listed."""
    yield
    listed, listing = [], thread_ids
    listed_too = lambda: (listed.append(1), listing())[1]  # noqa: E731
    set_everywhere(pytest.MonkeyPatch(), "thread_ids", listed_too)

    def start():
        leave = threading.Event()
        thread = threading.Thread(target=leave.wait, daemon=True)
        thread.start()
        return thread, leave

    def end(thread, leave):
        leave.set()
        thread.join()
        while thread.native_id in listing():  # the kernel's thread may outlive Python's
            time.sleep(0.001)

    first = start()
    known = thread_clocks_ns()
    assert thread_clocks_ns(known).keys() == known.keys() == set(listing())
    assert len(listed) == 1
    second = start()
    more = thread_clocks_ns(known)
    assert more.keys() - known.keys() == {second[0].native_id}
    end(*second)
    third = start()
    replaced = thread_clocks_ns(more)
    assert second[0].native_id not in replaced
    assert third[0].native_id in replaced
    end(*third)
    assert thread_clocks_ns(replaced).keys() == known.keys()
    end(*first)
    yield len(listed)


def test_clocks_of_known_threads_are_those_of_all():
    """Threads are listed again if one has come or gone, or one for another."""
    process = MeasuringProcess(lambda: None, clocks_of_threads_that_come_and_go)
    with contextlib.closing(process):
        next(process)
        assert next(process) == 4


def test_the_audit_sees_a_worker_that_was_moved_away(lanes, split_plan):
    conv, images = make_conv()
    moved = set(split_plan.backward.cpus)
    for tid, mask in masks().items():
        is_worker = tid not in {thread.native_id for thread in threading.enumerate()}
        if is_worker and mask == frozenset(split_plan.forward.cpus):
            os.sched_setaffinity(tid, moved)
    lanes.forward.run("forward", convolve, conv, images)
    (record,) = lanes.take_records()
    assert record.stray_s > 0.2 * record.cpu_s
    (warning,) = placement_warnings(record, split_plan)
    assert "ms of CPU time strayed" in warning


def test_a_lane_returns_to_its_group(lanes, split_plan):
    lanes.forward.call(lambda: None)
    lane_thread = lanes.forward.call(threading.get_native_id)
    os.sched_setaffinity(lane_thread, ALLOWED_CPUS)
    lanes.forward.run("forward", lambda: None)
    (record,) = lanes.take_records()
    assert record.mask == frozenset(split_plan.forward.cpus) == masks()[lane_thread]


def test_a_mask_that_the_system_cut_is_reported(split_plan):
    both = tuple(sorted(ALLOWED_CPUS))
    plan = CorePlan("none", *[Group("all", both, 2)] * 2, both)
    record = PhaseRecord(
        "forward", "all", 0.0, 1.0, frozenset(both[:1]), {}, 1.0, 0.0, 0.0, 0.0, frozenset()
    )
    (warning,) = placement_warnings(record, plan)
    assert "allows only cores" in warning


def test_a_group_without_any_allowed_cpu_is_an_error():
    with pytest.raises(RunError, match="allows none of the cores 4000, only"):
        Lane(Group("forward", (4000,), 1), Audit(()))
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


@pytest.mark.parametrize(
    ("mask", "team", "is_python", "role"),
    [
        ({2}, None, False, "cpu_s"),
        ({2, 3}, None, False, "cpu_s"),
        ({1}, None, False, "stray_s"),
        ({1, 2}, None, False, "stray_s"),
        ({2}, "backward", False, "cpu_s"),
        ({1}, "backward", False, "stray_s"),
        ({0}, "forward", False, "other_lane_s"),
        ({0, 1}, "forward", False, "other_lane_s"),
        ({0, 2}, "forward", False, "stray_s"),
        ({2}, "forward", False, "stray_s"),
        ({0}, None, True, "python_s"),
        ({2}, None, True, "python_s"),
    ],
)
def test_whose_time_it_is(mask, team, is_python, role):
    groups = {
        "forward": Group("forward", (0, 1), 2),
        "backward": Group("backward", (2, 3), 2),
        None: None,
    }
    found = thread_role(frozenset(mask), groups["backward"], groups[team], is_python)
    assert found == role


def test_one_lane_serves_both_names(one_lane_plan):
    with Lanes(one_lane_plan, ()) as lanes:
        assert lanes.forward is lanes.backward
        lanes.forward.run("forward", convolve, *make_conv())
        (record,) = lanes.take_records()
        assert (record.stray_s, record.other_lane_s) == (0, 0)
        assert lanes.take_records() == ()


def test_an_exception_keeps_its_traceback_and_ends_both_lanes(split_plan):
    def fail():
        raise ValueError("from inside the phase")

    before = set(thread_ids())
    with pytest.raises(ValueError, match="inside") as caught, Lanes(split_plan, ()) as lanes:
        assert len(set(thread_ids()) - before) == 4
        lanes.backward.run("backward", fail)
    assert caught.traceback[-1].name == "fail"
    deadline_s = time.monotonic() + 5
    while set(thread_ids()) - before and time.monotonic() < deadline_s:
        time.sleep(0.01)  # OpenMP ends a team's workers after its master
    assert not set(thread_ids()) - before


def test_leaving_waits_for_the_running_phase_and_drops_the_queue(split_plan):
    done = []
    with Lanes(split_plan, ()) as lanes:
        started = threading.Event()

        def slow():
            started.set()
            time.sleep(0.1)
            done.append("first")

        lanes.forward.submit("forward", slow)
        queued = lanes.forward.submit("forward", done.append, "second")
        started.wait()
    assert done == ["first"]
    assert queued.cancelled()


def test_a_team_that_is_too_small_is_noted(monkeypatch, two_groups):
    monkeypatch.setattr(torch, "zeros", lambda *size: torch.ones(1))  # no parallel operation
    lane = Lane(two_groups[0], Audit(()))
    lane.close()
    assert lane.notes == ["forward lane: OpenMP started 1 thread, not 2 (is OMP_THREAD_LIMIT set?)"]


@pytest.mark.parametrize("plan", ["split_plan", "one_lane_plan"])
def test_a_plan_in_force_has_the_threads_that_openmp_gave(monkeypatch, request, plan):
    asked = request.getfixturevalue(plan)
    with Lanes(asked, ()) as lanes:
        assert lanes.plan == asked
    monkeypatch.setattr(torch, "zeros", lambda *size: torch.ones(1))
    with Lanes(asked, ()) as lanes:
        assert [group.threads for group in lanes.plan.groups] == [1] * len(asked.groups)
        assert [group.cpus for group in lanes.plan.groups] == [group.cpus for group in asked.groups]
        assert lanes.forward.call(torch.get_num_threads) == 1
        assert lanes.backward.call(torch.get_num_threads) == 1


PAGE_FAULTS = """
import resource, sys, torch
from split_affinity.lanes.lane import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator() == ""
def use_memory():
    # 40 MiB each: above the 32 MiB up to which glibc may learn to keep freed memory by itself.
    buffers = [torch.ones(10 * 2**20) for _ in range(3)]
for _ in range(3):
    use_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_tuned_allocator_keeps_its_memory():
    faults = {
        kind: int(subprocess.check_output([sys.executable, "-c", PAGE_FAULTS, kind], cwd=ROOT))
        for kind in ("tuned", "default")
    }
    assert faults["tuned"] < faults["default"] / 20, faults


def test_without_glibc_the_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert "known for glibc alone" in tune_allocator()


# Who else was there?


def burn(seconds):
    """Use CPU time, whatever else runs on the machine; returns the process's own so far."""
    until_s = time.process_time() + seconds
    while time.process_time() < until_s:
        pass
    return time.process_time()


def burning_child(pipe):
    pipe.send(burn(0.1))
    pipe.recv()


def test_the_time_of_children_counts_while_they_live_and_when_they_have_ended():
    context = multiprocessing.get_context("fork")
    pipe, other_end = context.Pipe()
    before_ns = children_cpu_ns()
    child = context.Process(target=burning_child, args=(other_end,))
    child.start()
    used_s = pipe.recv()
    alive_ns = children_cpu_ns()
    assert 0.1 <= used_s <= (alive_ns - before_ns) / 1e9 < used_s + 0.1
    pipe.send("go")
    child.join()
    assert -1e6 < children_cpu_ns() - alive_ns < 1e8, "neither lost nor counted twice"
    with pytest.raises(OSError):
        process_cpu_ns(child.pid)


def usage(at_s=0.0, busy_s=(0.0,) * 4, stolen_s=(0.0,) * 4, threads_s=(), process_s=0, loaders_s=0):
    """A reading of a machine with four logical CPUs; threads are numbered from 1."""
    threads_ns = {tid: int(1e9 * used_s) for tid, used_s in enumerate(threads_s, start=1)}
    own_ns = int(1e9 * (process_s or sum(threads_s))), int(1e9 * loaders_s)
    return Usage(at_s, list(busy_s), list(stolen_s), threads_ns, *own_ns)


def test_the_own_time_by_where_it_can_have_been(monkeypatch):
    def mask_of(tid):
        if tid == 4:
            raise ProcessLookupError
        return {0} if tid == 1 else {1, 2}

    monkeypatch.setattr(os, "sched_getaffinity", mask_of)
    before = usage(threads_s=(5.0, 5.0), process_s=12.0, loaders_s=1.0)
    after = usage(threads_s=(6.0, 7.0, 0.5, 9.0), process_s=25.0, loaders_s=1.25)
    assert own_time_s(before, after, (0, 3), range(4)) == {
        frozenset({0}): 1.0,
        frozenset({1, 2}): 2.5,  # of a thread from before, and of one that was born since
        frozenset({0, 3}): 0.25,
        frozenset(range(4)): 9.5,  # of the thread that ended just now, and of one long before that
    }


@pytest.mark.parametrize(
    ("own_s", "left_s"),
    [
        ({}, [1.0, 3.0, 2.0]),
        ({"0": 0.25, "12": 2.5}, [0.75, 0.5, 2.0]),
        ({"0": 1.5}, [0.0, 3.0, 2.0]),  # clocks are not exact
        ({"1": 1.0, "2": 1.0}, [1.0, 1.0, 2.0]),
        ({"01": 2.0}, [0.5, 1.5, 2.0]),  # in proportion to what is left
        ({"01": 2.0, "0": 1.0}, [0.0, 1.0, 2.0]),  # to what the surer time leaves
        ({"123": 1.0, "0": 0.5}, [0.5, 2.4, 1.6]),
        ({"0123": 7.0}, [0.0, 0.0, 0.0]),
        ({"0123": 1.5, "3": 2.0, "01": 2.0}, [0.125, 0.375, 0.0]),
        ({"9": 7.0}, [1.0, 3.0, 2.0]),
    ],
)
def test_what_is_left_without_the_own_time(own_s, left_s):
    busy_s = {frozenset({0}): 1.0, frozenset({1, 2}): 3.0, frozenset({3}): 2.0}
    masks = {frozenset(map(int, mask)): used_s for mask, used_s in own_s.items()}
    assert list(subtract_own_time(busy_s, masks).values()) == pytest.approx(left_s)


@pytest.fixture
def three_cpus_used(monkeypatch):
    """A plan for CPUs 0 to 2 of 4; threads 1 and 2 are those of its lanes."""
    masks = {1: {0}, 2: {1, 2}}
    monkeypatch.setattr(os, "sched_getaffinity", masks.get)
    groups = Group("forward", (0,), 1), Group("backward", (1, 2), 2, 2)
    return CorePlan("lists", *groups, (0,))


@pytest.mark.parametrize(
    ("busy_s", "stolen_s", "threads_s", "loaders_s", "others", "stolen"),
    [
        ((4, 8, 6, 9), (0, 0, 0, 9), (3, 14), 1, (0, 0), 0),
        ((4, 8, 6, 9), (1.5, 0, 0, 0), (3, 14), 0, (0.1, 0), 0.05),
        ((4, 8, 6, 9), (0, 3, 3, 0), (1, 6), 1, (0.2, 0.4), 0.2),
        ((10, 10, 10, 0), (0, 0, 0, 0), (0, 0), 0, (1, 1), 0),
        ((10.1, 10, 10, 0), (11, 11, 11, 0), (0, 30), 0, (1, 0), 1),
    ],
)
def test_what_others_took_in_ten_seconds(
    three_cpus_used, busy_s, stolen_s, threads_s, loaders_s, others, stolen
):
    before = usage(5.0, (1, 2, 3, 4), (1, 1, 1, 1), (0, 0))
    after = [1 + busy_s[0], 2 + busy_s[1], 3 + busy_s[2], 4 + busy_s[3]]
    after = usage(15.0, after, [1 + each for each in stolen_s], threads_s, loaders_s=loaders_s)
    contention = contention_between(three_cpus_used, range(4), before, after)
    assert (contention.start_s, contention.end_s) == (5.0, 15.0)
    lanes = ("forward", "backward")
    assert contention.others == pytest.approx(dict(zip(lanes, others, strict=True)))
    assert contention.stolen == pytest.approx(stolen)


def test_the_share_is_of_what_a_lane_can_use(monkeypatch):
    """Two hardware threads a core: work on one of them is work on the core."""
    monkeypatch.setattr(os, "sched_getaffinity", {1: set(range(4))}.get)
    group = Group("all", (0, 1, 2, 3), 2, 2)
    plan = CorePlan("none", group, group, group.cpus)
    after = usage(1.0, (1.0, 1.0, 0.5, 0.0), threads_s=(2.0,))
    assert contention_between(plan, range(4), usage(), after).others == pytest.approx({"all": 0.25})


def test_lanes_that_share_their_only_cpu_share_their_contention(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", {1: {0}}.get)
    plan = CorePlan("even", Group("forward", (0,), 1), Group("backward", (0,), 1), (0,))
    after = usage(1.0, (0.75, 0.0, 0.0, 0.0), threads_s=(0.5,))
    others = contention_between(plan, range(4), usage(), after).others
    assert others == {"forward": 0.25, "backward": 0.25}


def test_nothing_is_claimed_where_the_system_hides_something(three_cpus_used, monkeypatch):
    before, after = usage(), usage(1.0, (1.0,) * 4)
    assert contention_between(three_cpus_used, range(4), before, after)
    assert contention_between(three_cpus_used, range(5), before, after) is None
    assert contention_between(three_cpus_used, (), before, after) is None
    monkeypatch.delattr(os, "sched_getaffinity")
    assert contention_between(three_cpus_used, range(4), before, after) is None


@pytest.mark.parametrize(
    ("cost_s", "least_s", "ends_s"),
    [
        (0.001, {}, [1, 2, 3, 4]),
        (0.001, {"least_s": 0.2}, [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
        (0.001, {"least_s": 1.7}, [2, 4]),
        (0.014, {}, [1, 2.5, 4]),  # the cost of the first look is known from then on
        (0.019, {"least_s": 0.2}, [0.5, 2.5]),
        (0.019, {"least_s": 0}, [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
    ],
)
def test_looks_come_as_often_as_they_may_cost(
    three_cpus_used, monkeypatch, cost_s, least_s, ends_s
):
    clock = SimpleNamespace(now_s=0.0)

    def read(known=()):
        at_s, clock.now_s = clock.now_s, clock.now_s + cost_s
        return usage(at_s)

    set_everywhere(monkeypatch, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    set_everywhere(monkeypatch, "read_usage", read)
    monitor, seen = ContentionMonitor(three_cpus_used, range(4)), []
    for half_seconds in range(1, 9):
        clock.now_s = half_seconds / 2
        seen.append(monitor.look(**least_s))
    seen = list(filter(None, seen))
    assert [each.end_s for each in seen] == ends_s
    assert [each.start_s for each in seen] == [0, *ends_s[:-1]], "without a gap"


def test_others_are_seen_and_the_own_work_is_not_blamed_on_them(lanes, split_plan):
    (cpu,) = split_plan.backward.cpus
    place = partial(os.sched_setaffinity, 0, {cpu})
    stranger = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(stranger, preexec_fn=place) as process:
        lanes.monitor.look(0)
        time.sleep(0.5)
        idle = lanes.monitor.look(0)
        used_s = -lanes.backward.call(time.thread_time)
        while used_s + lanes.backward.call(time.thread_time) < 0.25:
            lanes.backward.run("backward", burn, 0.05)
        used_s += lanes.backward.call(time.thread_time)
        working = lanes.monitor.look(0)
        process.kill()
    assert idle.others["backward"] > 0.8
    for each in (idle, working):
        assert each.end_s > each.start_s
        assert 0 <= each.others["forward"] <= 1
        assert 0 <= each.stolen <= 1
    own = used_s / (working.end_s - working.start_s)
    assert working.others["backward"] == pytest.approx(1 - own - working.stolen, abs=0.15)
