"""Summary. Run: python -m pytest tests/reports/test_summary.py"""

import dataclasses

import machines
import pytest
from patching import set_everywhere
from records import PLAN, record, step, summarise

from split_affinity.counters.memory import memory_by_node
from split_affinity.lanes.contention import Contention, mean_contention
from split_affinity.machine.plan import CorePlan, Group, plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.reports.summary import (
    RunStatistics,
    lanes_busy,
    phases_alone,
    time_in_phases_s,
)
from split_affinity.reports.tables import summary_lines
from split_affinity.training.steps import StepResult


def test_a_step_in_metrics():
    counted = {"top1": 3, "top5": 7, "lr": 0.25}
    line = dataclasses.replace(step(3, stray_s=0.25, cpu_s=0.15), **counted).as_metrics()
    expected = {
        "step": 3,
        "loss": 2.0,
        "images": 8,
        "top1": 3,
        "top5": 7,
        "lr": 0.25,
        "step_s": 0.4,
        "forward_s": 0.1,
        "backward_s": 0.2,
        "update_s": 0.05,
        "forward_cpu_s": 0.1,
        "backward_cpu_s": 0.3,
        "update_cpu_s": 0.1,
        "refresh_s": 0.0,
        "refresh_cpu_s": 0.0,
        "reduce_s": 0.0,
        "reduce_cpu_s": 0.0,
        "stray_s": 0.5,
    }
    assert line.pop("type") == "step"
    assert line == pytest.approx(expected)


def contention(end_s, forward=0.0, backward=0.0, stolen=0.0, seconds=1.0):
    """What others took of two lanes in some seconds, by default in one."""
    others = {"forward": forward, "backward": backward}
    return Contention(end_s - seconds, end_s, others, stolen)


def test_a_step_after_which_others_were_looked_for_tells_of_them():
    line = dataclasses.replace(step(3), contention=contention(7.0, 0.25, stolen=0.5)).as_metrics()
    assert line["contention"] == {
        "start_s": 6.0,
        "end_s": 7.0,
        "others": {"forward": 0.25, "backward": 0.0},
        "stolen": 0.5,
    }
    assert "contention" not in step(3).as_metrics()


def test_the_summary():
    slow = [step(number, 9.0, 9.0, 9.0, 30.0) for number in (1, 2)]
    summary = summarise([*slow, *(step(number) for number in range(3, 13))], PLAN)
    assert (summary.steps, summary.warmup_steps, summary.images) == (12, 2, 96)
    assert summary.images_per_s == pytest.approx(8 / 0.4)
    assert summary.median_step_s == pytest.approx(0.4)
    assert (summary.loss_first, summary.loss_last) == (4.0, -7.0)
    assert summary.peak_memory_bytes > 10 * 2**20
    forward, backward, update = summary.phases
    assert (forward.cores, backward.cores, update.cores) == ("0", "1-2", "1-2")
    assert (forward.threads, backward.threads) == (1, 2)
    assert forward.median_ms == pytest.approx(100)
    assert backward.median_ms == backward.p95_ms == pytest.approx(200)
    assert (forward.share, backward.share, update.share) == pytest.approx((0.25, 0.5, 0.125))
    assert summary.no_phase_share == pytest.approx(0.125)
    assert (forward.busy, backward.busy) == pytest.approx((1, 1))
    assert backward.cpu_busy == pytest.approx({0: 0, 1: 1, 2: 1})
    assert backward.seen_on == "1-2"


def test_the_95th_percentile():
    steps = [step(number, forward_s=0.001 * number) for number in range(1, 24)]
    assert summarise(steps, PLAN).phases[0].p95_ms == pytest.approx(22)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (50, 2)])
def test_warm_up_steps(steps, warmup):
    summary = summarise([step(number) for number in range(1, steps + 1)], PLAN)
    assert summary.warmup_steps == warmup


@pytest.mark.parametrize(("steps", "left_out", "median_s"), [(7, 0, 0.9), (10, 4, 0.4)])
def test_profiled_steps_are_left_out_unless_they_are_most(steps, left_out, median_s):
    made = [step(number) for number in range(1, steps + 1)]
    for number in range(1, 6):
        made[number] = dataclasses.replace(made[number], step_s=0.9, profiled=True)
    summary = summarise(made)
    assert (summary.profiled_steps, summary.median_step_s) == (left_out, median_s)
    assert made[1].as_metrics()["profiled"]


def test_a_long_run_keeps_its_latest_steps_only(monkeypatch):
    set_everywhere(monkeypatch, "LATEST_STEPS", 10)
    slow = [step(number, stray_s=0.5, step_s=9.0) for number in range(1, 21)]
    summary = summarise([*slow, *(step(number) for number in range(21, 31))])
    assert (summary.steps, summary.images) == (30, 240)
    assert summary.loss_first == 4.0
    assert summary.median_step_s == pytest.approx(0.4)
    assert summary.images_per_s == pytest.approx(20)
    assert summary.stray_s == pytest.approx(20)


def test_stray_time_counts_warm_up_too():
    summary = summarise([step(1, stray_s=0.5), *(step(n) for n in range(2, 12))], PLAN)
    assert summary.stray_s == pytest.approx(1.0)
    assert [phase.stray_ms for phase in summary.phases] == pytest.approx([0, 1000, 0])
    assert "could leave" in summary_lines(summary)[1]


def spans(*pairs):
    return [record("forward", start_s, end_s - start_s) for start_s, end_s in pairs]


@pytest.mark.parametrize(
    ("pairs", "seconds"),
    [
        ([], 0),
        ([(0, 1), (2, 4)], 3),
        ([(0, 3), (1, 2), (2.5, 5)], 5),
        ([(0, 3), (1, 2), (4, 5)], 4),
    ],
)
def test_seconds_with_at_least_one_phase(pairs, seconds):
    assert time_in_phases_s(spans(*pairs)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("pairs", "alone"),
    [
        ([], []),
        ([(0, 1), (1, 2)], [(0, 1), (1, 2)]),
        ([(0, 3), (1, 2), (4, 5)], [(4, 5)]),
        ([(0, 1), (2, 6), (3, 4), (5, 7), (7, 8)], [(0, 1), (7, 8)]),
    ],
)
def test_phases_that_ran_alone(pairs, alone):
    assert [(r.start_s, r.end_s) for r in phases_alone(spans(*pairs))] == alone


def overlapping_step():
    """Forward of the next batch beside backward; the other lane's time is its own work then."""
    records = (
        record("backward", 0.0, 0.8, other_lane_s=0.3),
        record("refresh", 0.0, 0.1, other_lane_s=0.1),
        record("forward", 0.1, 0.2, other_lane_s=0.2),
        record("update", 0.8, 0.1, other_lane_s=0.007),
    )
    return StepResult(1, 2.0, 8, 1.0, records, (), 0.05)


def test_the_summary_of_overlapping_phases():
    summary = summarise([overlapping_step()])
    assert [phase.phase for phase in summary.phases] == ["forward", "backward", "update", "refresh"]
    assert [phase.cores for phase in summary.phases] == ["0", "1-2", "1-2", "0"]
    assert summary.no_phase_share == pytest.approx(0.1)
    assert summary.busy == pytest.approx({"forward": 0.3, "backward": 0.9})
    assert summary.waiting_s == pytest.approx(0.007), "only the update ran alone"
    assert summary.main_thread_s == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("threads", "cores_used", "busy"),
    [
        (None, 2.0, 1.0),  # a thread for each core, as it is by default
        (None, 1.0, 0.5),
        (1, 1.0, 0.5),
        (3, 3.0, 1.0),
        (4, 4.0, 1.0),
        (4, 2.0, 0.5),
        (9, 4.0, 1.0),
    ],
)
def test_a_second_hardware_thread_does_not_halve_what_is_busy(tmp_path, threads, cores_used, busy):
    """Two groups of two cores with two hardware threads each."""
    root = machines.write_machine(tmp_path, machines.SMT_FAR)
    topology = read_topology(root, frozenset(range(8)))
    settings = Settings(forward_threads=threads, backward_threads=threads)
    plan = plan_cores(topology, settings)
    assert [len(group.cpus) for group in plan.groups] == [4, 4]
    records = (
        record("forward", 0.0, 1.0, cpu_s=cores_used),
        record("backward", 1.0, 3.0, cpu_s=3 * cores_used),
    )
    summary = summarise([StepResult(1, 2.0, 8, 4.0, records)], plan)
    assert [phase.busy for phase in summary.phases] == pytest.approx([busy, busy])
    assert summary.busy == pytest.approx({"forward": busy / 4, "backward": 3 * busy / 4})


def test_a_lane_without_a_split_is_busy_in_all_phases():
    group = Group("all", (0, 1, 2), 3)
    plan = CorePlan("none", group, group, (0,))
    records = [
        dataclasses.replace(one, lane="all")
        for one in (record("forward", 0, 0.3, cpu_s=0.9), record("backward", 0.3, 0.3, cpu_s=0.6))
    ]
    assert lanes_busy(plan, records, 1.0) == pytest.approx({"all": 0.5})


def test_figures_by_cpu_are_summed_up_and_kept_for_the_latest_steps(monkeypatch):
    monkeypatch.setattr("split_affinity.reports.summary.FIGURES_BY_CPU", 45)  # three steps
    run_statistics = RunStatistics(PLAN)
    for number in range(1, 8):
        busy = {0: 0.0, 1: 0.01 * number, 2: 0.02} if number % 2 else {}
        seen = {"seen_on": frozenset({number % 3}), "used_on_s": {1: 0.01}, "cpu_before_s": busy}
        run_statistics.add(step(number, backward_s=0.1, cpu_busy_s=busy, **seen))
    for name in ("cpu_busy_s", "seen_on", "used_on_s"):
        kept = [
            any(getattr(one, name) for one in result.records) for result in run_statistics.latest
        ]
        assert kept == [False] * 4 + [True] * 3
    assert not any(
        one.cpu_before_s for result in list(run_statistics.latest)[:4] for one in result.records
    )
    (backward,) = (each for each in run_statistics.summary().phases if each.phase == "backward")
    # Looked at were both phases, of 0.05 s, of steps 1, 3, 5 and 7.
    assert backward.cpu_busy == pytest.approx({0: 0.0, 1: 0.32 / 0.4, 2: 0.16 / 0.4})
    assert backward.seen_on == "0-2"


def test_the_audit_s_own_cost():
    run_statistics = RunStatistics(PLAN)
    for number in range(1, 6):  # two are warm-up
        run_statistics.add(step(number, step_s=0.5, audit_s=0.005))
    summary = run_statistics.summary()
    assert summary.audit_ms == pytest.approx(1e3 * 2 * 0.005 / 5), "two phases of five have it"
    assert summary.audit_share == pytest.approx(2 * 0.005 / 0.5)
    line = "the audit of where threads ran took 2.00 ms a phase, 2.0% of a step"
    assert summary_lines(summary)[-1] == line


def test_what_others_took_is_a_mean_by_time():
    spans = (
        contention(1.0, 0.4, 0.1),
        contention(5.0, 0.0, 0.1, 0.5, 4.0),
        contention(10.0, 1.0, 0.1, 0, 5),
    )
    whole = mean_contention(spans)
    assert (whole.start_s, whole.end_s) == (0.0, 10.0)
    assert whole.others == pytest.approx({"forward": 0.54, "backward": 0.1})
    assert whole.stolen == pytest.approx(0.2)
    assert mean_contention(spans[:1]) == spans[0]


def test_what_others_took_in_a_long_run_needs_no_more_memory():
    run_statistics = RunStatistics(PLAN)
    for number in range(1, 1001):
        lately = run_statistics.add_contention(
            contention(float(number), 0.3 if number <= 100 else 0.0)
        )
    assert len(run_statistics.looks) < 20
    assert lately.others == {"forward": 0, "backward": 0}
    run_statistics.add(step(1))
    whole = run_statistics.summary().contention
    assert (whole.start_s, whole.end_s) == (0.0, 1000.0)
    assert whole.others == pytest.approx({"forward": 0.03, "backward": 0.0})


def test_a_summary_where_nobody_could_look():
    summary = summarise([step(1)])
    assert summary.contention is None
    assert "other processes" not in "".join(summary_lines(summary))


@pytest.mark.parametrize(
    ("ends_s", "spans"),
    [
        (range(1, 10), [None] * 9),
        (range(1, 14), [None] * 9 + [(0, 10), (0, 11), (1, 12), (2, 13)]),
        ((4, 8, 12, 16), [None, None, (0, 12), (4, 16)]),
        ((30, 60, 61), [(0, 30), (30, 60), (30, 61)]),  # long steps, then a short one
    ],
)
def test_what_others_took_lately(ends_s, spans):
    """Of ten seconds at the least, without what is older."""
    run_statistics, begun_s, found = RunStatistics(PLAN), 0, []
    for end_s in ends_s:
        lately = run_statistics.add_contention(contention(end_s, seconds=end_s - begun_s))
        found.append(lately and (lately.start_s, lately.end_s))
        begun_s = end_s
    assert found == spans


NUMA_MAPS = """\
5602d5920000 default file=/usr/bin/python3.11 mapped=2 N0=2 kernelpagesize_kB=4
5602d592a000 default file=/usr/bin/python3.11 anon=1 dirty=1 active=0 N0=1 kernelpagesize_kB=4
560300000000 default heap anon=262400 dirty=262400 active=0 N0=262144 N1=256 kernelpagesize_kB=4
7f0000000000 default anon=3 dirty=3 N1=3 kernelpagesize_kB=2048
7f1000000000 interleave:0-3 anon=40 dirty=40 N0=10 N1=10 N2=10 N3=10 kernelpagesize_kB=64
7f2000000000 default file=/memfd:batch\\040(deleted) mapped=9 N10=9 kernelpagesize_kB=4
7f3000000000 default
7ffc00000000 default stack anon=5 dirty=5 N10=5 kernelpagesize_kB=4
"""


MEMORY = {
    0: 2**30 + 10 * 2**16,
    1: 2**20 + 3 * 2**21 + 10 * 2**16,
    2: 10 * 2**16,
    3: 10 * 2**16,
    10: 5 * 2**12,
}


@pytest.mark.parametrize(
    ("rows", "maps", "memory"),
    [
        (machines.TWO_SOCKETS, NUMA_MAPS, MEMORY),
        (machines.TWO_SOCKETS, "", {}),
        (machines.TWO_SOCKETS, None, {}),
        (machines.THREE, NUMA_MAPS, {}),
    ],
)
def test_memory_by_node_where_there_are_several(tmp_path, rows, maps, memory):
    """As in the kernel's numa_maps, with pages of three sizes; files are left out."""
    files = {} if maps is None else {"proc/self/numa_maps": maps}
    found = memory_by_node(machines.write_machine(tmp_path, rows, files))
    assert found == memory
    assert list(found) == sorted(found)
