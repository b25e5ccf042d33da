"""Reports. Run: python -m pytest tests/test_reports.py"""

import fcntl
import json
import multiprocessing
import re
import threading

import machines
import pytest
from records import PLAN, record, step, summarise

import train_split_affinity as tsa
from train_split_affinity import Settings


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
        {"json": "{}/nowhere/c.json"},
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
