"""Reports. Run: python -m pytest tests/test_reports.py"""

import fcntl
import json
import multiprocessing
import re
import threading

import machines
import pytest

import train_split_affinity as tsa
from train_split_affinity import CorePlan, Group, PhaseRecord, Settings, StepResult

PLAN = CorePlan("even", Group("forward", (0,), 1), Group("backward", (1, 2), 2), (0,))


def record(phase, start_s, duration_s, **used):
    """A phase that kept its cores busy all the time."""
    group = PLAN.forward if phase == "forward" else PLAN.backward
    values = {
        "mask": frozenset(group.cpus),
        "cpu_busy_s": {cpu: duration_s if cpu in group.cpus else 0.0 for cpu in range(3)},
        "cpu_s": duration_s * len(group.cpus),
        "stray_s": 0.0,
        "other_lane_s": 0.0,
        "python_s": 0.0,
        "seen_on": frozenset(group.cpus),
    }
    return PhaseRecord(phase, group.name, start_s, start_s + duration_s, **(values | used))


def step(number, forward_s=0.1, backward_s=0.2, update_s=0.05, step_s=0.4, **used):
    """A step of two micro-batches."""
    records = (
        record("forward", 0.0, forward_s / 2),
        record("backward", 1.0, backward_s / 2, **used),
        record("forward", 2.0, forward_s / 2),
        record("backward", 3.0, backward_s / 2, **used),
        record("update", 4.0, update_s),
    )
    return StepResult(number, 5.0 - number, 8, step_s, records)


def summarise(steps, plan=PLAN):
    tally = tsa.Tally(plan)
    for result in steps:
        tally.add(result)
    return tally.summary()


def test_a_step_in_metrics():
    line = step(3, stray_s=0.25, cpu_s=0.15).as_metrics()
    expected = {
        "step": 3,
        "loss": 2.0,
        "images": 8,
        "step_s": 0.4,
        "forward_s": 0.1,
        "backward_s": 0.2,
        "update_s": 0.05,
        "forward_cpu_s": 0.1,
        "backward_cpu_s": 0.3,
        "update_cpu_s": 0.1,
        "stray_s": 0.5,
    }
    assert line.pop("type") == "step"
    assert line == pytest.approx(expected)


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


def test_a_long_run_keeps_its_latest_steps_only(monkeypatch):
    monkeypatch.setattr(tsa, "LATEST_STEPS", 10)
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
    assert "could leave" in tsa.summary_lines(summary)[1]


def test_stray_time_above_one_percent_is_a_warning():
    below, above = (record("forward", 0, 1.0, stray_s=stray_s) for stray_s in (0.0099, 0.0101))
    assert not list(tsa.placement_warnings(below, PLAN))
    (warning,) = tsa.placement_warnings(above, PLAN)
    assert warning == ("forward: 10.1 ms of CPU time strayed from cores 0 in a phase of 1000.0 ms")


def test_a_table():
    assert tsa.markdown_table(("a", "long"), [("first", "1"), ("x", "22")]) == (
        "| a     | long |\n| :---- | ---: |\n| first |    1 |\n| x     |   22 |"
    )


def test_the_phase_table():
    rows = tsa.phase_table(summarise([step(1)], PLAN)).splitlines()
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


def test_the_cpu_table_names_busy_and_partly_busy_cpus():
    busy = {0: 0.02, 1: 0.1, 2: 0.04}
    table = tsa.cpu_table(summarise([step(1, cpu_busy_s=busy)], PLAN))
    cells = [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")]
    assert cells == ["backward", "1", "0,2", "0:20% 1:100% 2:40%", "1-2"]


def test_unknown_cpu_times_are_called_unknown():
    assert "unknown" in tsa.cpu_table(summarise([step(1, cpu_busy_s={})], PLAN))


# Drawing


def draw(tmp_path, rows, allowed, settings=None, files=None):
    machines.write_machine(tmp_path, rows, files)
    topology = tsa.read_topology(tmp_path, frozenset(allowed))
    return tsa.draw_plan(topology, tsa.plan_cores(topology, settings or Settings()), columns=4)


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


def test_drawing_both_groups_on_one_core_and_unused_cores(tmp_path):
    files = machines.CGROUP_V2 | {"sys/fs/cgroup/cpu.max": "100000 100000\n"}
    assert "  cpu   FB0  -1  -2" in draw(tmp_path, machines.THREE, [0, 1, 2], files=files)


# Files


def test_the_log_section(tmp_path):
    topology = tsa.read_topology(
        machines.write_machine(tmp_path, machines.THREE), frozenset(range(3))
    )
    plan = tsa.plan_cores(topology, Settings())
    summary = summarise([step(1), step(2)], plan)
    text = tsa.log_section(Settings(), topology, plan, "finished", summary, ["careful"])
    assert re.search(
        r"^## \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ resnet50, sequential, split even$", text, re.M
    )
    for line in (
        "- outcome: finished",
        "- machine: Example CPU @ 3.0GHz: 1 socket, 3 cores, 3 hardware threads; allowed: 0-2",
        "- detected cores: 0-2 (logical CPUs online)",
        "- forward   cores 0, 1 thread: forward pass",
        "- backward  cores 1-2, 2 threads: loss, backpropagation, optimizer step",
        "- loader    cores 0: main thread, 2 loader processes",
        "- warning: careful",
    ):
        assert line in text.splitlines()
    assert "batch_size 32" in text
    assert "torch 2" in text
    assert tsa.phase_table(summary) in text
    assert tsa.cpu_table(summary) in text


def test_the_log_section_of_a_run_without_a_step():
    topology = tsa.read_topology()
    plan = tsa.plan_cores(topology, Settings(split="none"))
    text = tsa.log_section(Settings(split="none"), topology, plan, "stopped", None, [])
    assert "- outcome: stopped" in text
    assert "| phase" not in text


def append_to_all(paths, mark, barrier):
    for path in paths:
        barrier.wait()
        tsa.append_text(path, f"<{mark * 20_000}>\n", "header\n")


def test_two_runs_at_once_leave_one_header_and_two_whole_sections(tmp_path):
    paths = [tmp_path / f"{number}.md" for number in range(300)]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=append_to_all, args=(paths, mark, barrier)) for mark in "ab"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for path in paths:
        header, *sections = path.read_text().splitlines()
        assert header == "header"
        assert sorted(sections) == ["<" + "a" * 20_000 + ">", "<" + "b" * 20_000 + ">"]


def test_appending_waits_for_the_lock(tmp_path):
    path = tmp_path / "logs.md"
    writer = threading.Thread(target=tsa.append_text, args=(path, "section\n", "header\n"))
    with path.open("a") as other_run:
        fcntl.flock(other_run, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        other_run.write("header\nother section\n")
    writer.join(10)
    assert path.read_text() == "header\nother section\nsection\n"


def test_a_log_that_cannot_be_appended_to(tmp_path):
    with pytest.raises(tsa.RunError, match="cannot be written: Is a directory"):
        tsa.append_text(tmp_path, "text")


@pytest.mark.parametrize(
    "settings",
    [
        {"log_file": "{}"},
        {"log_file": "{}/nowhere/logs.md"},
        {"log_file": "{}/file/logs.md"},
        {"output_dir": "{}/file"},
        {"output_dir": "{}/file/below"},
        {"output_dir": "{}/taken"},
        {"log_file": "/proc/logs.md"},
        {"output_dir": "/proc/out"},
    ],
)
def test_places_that_cannot_be_written(tmp_path, settings):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken/metrics.jsonl").mkdir(parents=True)
    ((name, template),) = settings.items()
    path = tmp_path.parent / template.format(tmp_path)
    paths = {"log_file": tmp_path / "logs.md", name: path}
    with pytest.raises(
        tsa.UserError, match=f"--{name.replace('_', '-')} {path}: cannot be written"
    ):
        tsa.check_writable(Settings(**paths))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "taken"]


def test_checking_leaves_no_trace(tmp_path):
    log = tmp_path / "logs.md"
    tsa.check_writable(Settings(log_file=log, output_dir=tmp_path / "a/b"))
    assert not list(tmp_path.iterdir())
    log.write_text("kept")
    tsa.check_writable(Settings(log_file=log))
    assert log.read_text() == "kept"


def test_settings_as_json(tmp_path):
    values = tsa.plain_settings(Settings(output_dir=tmp_path, forward_cores=(0, 1)))
    assert json.loads(json.dumps(values))["output_dir"] == str(tmp_path)
