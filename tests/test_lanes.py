"""Lanes and the audit, read from /proc. Run: python -m pytest tests/test_lanes.py"""

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import needs_two_cpus

import train_split_affinity as tsa

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    needs_two_cpus,
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
    return {tid: frozenset(os.sched_getaffinity(tid)) for tid in tsa.thread_ids()}


@pytest.fixture
def lanes(split_plan):
    with tsa.Lanes(split_plan, tsa.read_topology().online) as lanes:
        yield lanes


def test_the_thread_clock_is_that_of_the_thread():
    time.sleep(0.01)
    before_ns = time.thread_time_ns()
    clock_ns = tsa.thread_cpu_ns(threading.get_native_id())
    assert before_ns <= clock_ns <= time.thread_time_ns()


def test_a_team_is_born_inside_its_group(split_plan):
    for group in split_plan.groups:
        before = set(tsa.thread_ids())
        lane = tsa.Lane(group, tsa.Audit(()))
        born = set(tsa.thread_ids()) - before
        assert len(born) == 2, "the lane's thread and one OpenMP worker"
        assert {masks()[tid] for tid in born} == {frozenset(group.cpus)}
        assert lane.notes == []
        lane.close()


def test_a_lane_s_thread_is_never_elsewhere(split_plan, monkeypatch):
    first_masks = {}

    def confine(cpus, confine=tsa.confine_thread):
        first_masks.setdefault(threading.get_native_id(), tsa.process_cpus())
        return confine(cpus)

    monkeypatch.setattr(tsa, "confine_thread", confine)
    with tsa.Lanes(split_plan, ()) as lanes:
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
        assert set(record.cpu_busy_s) == set(tsa.read_topology().online)
    assert forward.end_s <= backward.start_s
    assert not list(tsa.placement_warnings(forward, split_plan))
    assert not list(tsa.placement_warnings(backward, split_plan))


def test_both_threads_of_a_team_work(lanes, split_plan):
    used = {}

    def watched(conv, images):
        before = tsa.thread_clocks_ns()
        convolve(conv, images)
        after = tsa.thread_clocks_ns()
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
    before = tsa.thread_clocks_ns()
    backpropagate(output)
    return audit.attribute(group_b, before, tsa.thread_clocks_ns())


def test_the_audit_sees_the_naive_way_leak(two_groups):
    with ThreadPoolExecutor(1) as executor:
        used = executor.submit(naive, *two_groups, tsa.Audit(())).result()
    total_s = used["cpu_s"] + used["stray_s"] + used["python_s"]
    assert used["stray_s"] > 0.2 * total_s, "about half of the time is the worker's"


@pytest.fixture
def forward_worker(request, split_plan):
    """The one OpenMP worker of the forward lane; teams of earlier tests may live on."""
    before = set(tsa.thread_ids())
    request.getfixturevalue("lanes")
    python = {thread.native_id for thread in threading.enumerate()}
    mask = frozenset(split_plan.forward.cpus)
    born = set(tsa.thread_ids()) - before - python
    (worker,) = (tid for tid in born if masks()[tid] == mask)
    return worker


def test_the_audit_counts_a_thread_born_within_the_phase(forward_worker, split_plan):
    """All of its time is the phase's: it has no reading from before."""
    worker, mask = forward_worker, frozenset(split_plan.forward.cpus)
    audit = tsa.Audit(())
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
    monkeypatch.setattr(tsa, "LOOK_SHARE", share)
    for phase in ("backward", "update") * 3:
        lanes.backward.run(phase, convolve, *make_conv(), 1)
    records = lanes.take_records()
    assert [bool(record.cpu_busy_s) for record in records] == looks
    assert [bool(record.seen_on) for record in records] == looks
    for record in records:
        assert record.cpu_s > 0
        assert record.mask is lanes.backward.group.cpu_set, "one for all"
        assert record.audit_s > 0


def test_clocks_of_known_threads_are_those_of_all(monkeypatch):
    """Threads are listed again if one has come or gone, or one for another."""
    listed, listing = [], tsa.thread_ids
    monkeypatch.setattr(tsa, "thread_ids", lambda: (listed.append(1), listing())[1])

    def start():
        leave = threading.Event()
        thread = threading.Thread(target=leave.wait)
        thread.start()
        return thread, leave

    def end(thread, leave):
        leave.set()
        thread.join()
        while thread.native_id in listing():  # the kernel's thread may outlive Python's
            time.sleep(0.001)

    first = start()
    known = tsa.thread_clocks_ns()
    assert tsa.thread_clocks_ns(known).keys() == known.keys() == set(listing())
    assert len(listed) == 1
    second = start()
    more = tsa.thread_clocks_ns(known)
    assert more.keys() - known.keys() == {second[0].native_id}
    end(*second)
    third = start()
    replaced = tsa.thread_clocks_ns(more)
    assert second[0].native_id not in replaced
    assert third[0].native_id in replaced
    end(*third)
    assert tsa.thread_clocks_ns(replaced).keys() == known.keys()
    assert len(listed) == 4
    end(*first)


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
    (warning,) = tsa.placement_warnings(record, split_plan)
    assert "ms of CPU time strayed" in warning


def test_a_lane_returns_to_its_group(lanes, split_plan):
    lanes.forward.call(lambda: None)
    lane_thread = lanes.forward.call(threading.get_native_id)
    os.sched_setaffinity(lane_thread, tsa.ALLOWED_CPUS)
    lanes.forward.run("forward", lambda: None)
    (record,) = lanes.take_records()
    assert record.mask == frozenset(split_plan.forward.cpus) == masks()[lane_thread]


def test_a_mask_that_the_system_cut_is_reported(split_plan):
    both = tuple(sorted(tsa.ALLOWED_CPUS))
    plan = tsa.CorePlan("none", *[tsa.Group("all", both, 2)] * 2, both)
    record = tsa.PhaseRecord(
        "forward", "all", 0.0, 1.0, frozenset(both[:1]), {}, 1.0, 0.0, 0.0, 0.0, frozenset()
    )
    (warning,) = tsa.placement_warnings(record, plan)
    assert "allows only cores" in warning


def test_a_group_without_any_allowed_cpu_is_an_error():
    with pytest.raises(tsa.RunError, match="allows none of the cores 4000, only"):
        tsa.Lane(tsa.Group("forward", (4000,), 1), tsa.Audit(()))
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
        "forward": tsa.Group("forward", (0, 1), 2),
        "backward": tsa.Group("backward", (2, 3), 2),
        None: None,
    }
    found = tsa.thread_role(frozenset(mask), groups["backward"], groups[team], is_python)
    assert found == role


def test_one_lane_serves_both_names(one_lane_plan):
    with tsa.Lanes(one_lane_plan, ()) as lanes:
        assert lanes.forward is lanes.backward
        lanes.forward.run("forward", convolve, *make_conv())
        (record,) = lanes.take_records()
        assert (record.stray_s, record.other_lane_s) == (0, 0)
        assert lanes.take_records() == ()


def test_an_exception_keeps_its_traceback_and_ends_both_lanes(split_plan):
    def fail():
        raise ValueError("from inside the phase")

    before = set(tsa.thread_ids())
    with pytest.raises(ValueError, match="inside") as caught, tsa.Lanes(split_plan, ()) as lanes:
        assert len(set(tsa.thread_ids()) - before) == 4
        lanes.backward.run("backward", fail)
    assert caught.traceback[-1].name == "fail"
    deadline_s = time.monotonic() + 5
    while set(tsa.thread_ids()) - before and time.monotonic() < deadline_s:
        time.sleep(0.01)  # OpenMP ends a team's workers after its master
    assert not set(tsa.thread_ids()) - before


def test_leaving_waits_for_the_running_phase_and_drops_the_queue(split_plan):
    done = []
    with tsa.Lanes(split_plan, ()) as lanes:
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
    lane = tsa.Lane(two_groups[0], tsa.Audit(()))
    lane.close()
    assert lane.notes == ["forward lane: OpenMP started 1 thread, not 2 (is OMP_THREAD_LIMIT set?)"]


@pytest.mark.parametrize("plan", ["split_plan", "one_lane_plan"])
def test_a_plan_in_force_has_the_threads_that_openmp_gave(monkeypatch, request, plan):
    asked = request.getfixturevalue(plan)
    with tsa.Lanes(asked, ()) as lanes:
        assert lanes.plan == asked
    monkeypatch.setattr(torch, "zeros", lambda *size: torch.ones(1))
    with tsa.Lanes(asked, ()) as lanes:
        assert [group.threads for group in lanes.plan.groups] == [1] * len(asked.groups)
        assert [group.cpus for group in lanes.plan.groups] == [group.cpus for group in asked.groups]
        assert lanes.forward.call(torch.get_num_threads) == 1
        assert lanes.backward.call(torch.get_num_threads) == 1


PAGE_FAULTS = """
import resource, sys, torch
import train_split_affinity as tsa
if sys.argv[1] == "tuned":
    assert tsa.tune_allocator() == ""
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
    monkeypatch.setattr(tsa.ctypes, "CDLL", None)
    assert "known for glibc alone" in tsa.tune_allocator()
