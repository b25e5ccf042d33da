"""Reports. Run: python -m pytest tests/test_reports.py"""

import contextlib
import dataclasses
import errno
import fcntl
import html.parser
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import signal
import struct
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import cmarkgfm
import machines
import pytest
import torch
from cmarkgfm.cmark import Options
from conftest import read_metrics, scalars_in
from patching import set_everywhere
from PIL import Image
from records import PLAN, record, step, summarise
from tqdm import tqdm

from split_affinity.checkpoints.state import Progress
from split_affinity.data.loader import LoaderDied
from split_affinity.data.pictures import BrokenImage
from split_affinity.errors import RunError, Stopped, UserError, likely_reason
from split_affinity.files import append_text, replace_text
from split_affinity.lanes.audit import placement_warnings
from split_affinity.lanes.contention import Company
from split_affinity.machine.description import draw_plan
from split_affinity.machine.plan import CorePlan, Group, plan_cores
from split_affinity.machine.topology import Core, Topology, host_kind, read_topology
from split_affinity.options.command_line import parse_arguments
from split_affinity.options.settings import Settings, as_options, plain_settings
from split_affinity.options.values import parse_cpu_list
from split_affinity.reports import tables
from split_affinity.reports.confusion import (
    class_lines,
    confused_json,
    confusion_csv,
    confusion_matrix,
    draw_confusion,
    pairs_csv,
    write_confusion,
)
from split_affinity.reports.log import (
    LOG_HEADER,
    LogSection,
    log_heading,
    log_summary,
    picture_footer,
)
from split_affinity.reports.plots import RangeTest, draw_curves, draw_gradients, draw_range_test
from split_affinity.reports.run_report import RunReport
from split_affinity.reports.summary import memory_by_node
from split_affinity.reports.tables import (
    BAR,
    EPOCH_FIELDS,
    RAW_FIELDS,
    bar_text,
    company_texts,
    cpu_table,
    epoch_line,
    memory_lines,
    phase_table,
    result_lines,
    summary_lines,
)
from split_affinity.reports.tensorboard import EventFile
from split_affinity.reports.timeline import Panel, draw_timelines, save_figure
from split_affinity.runs.setup import check_writable
from split_affinity.terminal import lossy_output, say
from split_affinity.text import markdown_table, span_text, utc_now
from split_affinity.training.network import Confusion
from split_affinity.training.update import gradient_warnings


def test_stray_time_above_one_percent_is_a_warning():
    below, above = (record("forward", 0, 1.0, stray_s=stray_s) for stray_s in (0.0099, 0.0101))
    assert not list(placement_warnings(below, PLAN))
    (warning,) = placement_warnings(above, PLAN)
    assert warning == ("forward: 10.1 ms of CPU time strayed from cores 0 in a phase of 1000.0 ms")


def test_a_table():
    assert markdown_table(("a", "long"), [("first", "1"), ("x", "22")]) == (
        "| a     | long |\n| :---- | ---: |\n| first |    1 |\n| x     |   22 |"
    )


def test_the_phase_table():
    rows = phase_table(summarise([step(1)], PLAN)).splitlines()
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


LISTS = "0,2,4,6,8,10,12,14,16,18,20", "1,3,5,7,9,11,13,15,17,19,21"


def test_the_phase_table_of_a_terminal_fits_80_columns():
    """With many cores, and phases of minutes; the cores stand in the plan above it."""
    groups = [
        Group(name, parse_cpu_list(cpus), 64)
        for name, cpus in zip(("forward", "backward"), LISTS, strict=True)
    ]
    plan = CorePlan("lists", *groups, groups[0].cpus)
    seconds = {"forward_s": 99.9, "backward_s": 199.9, "update_s": 9.9, "step_s": 400.0}
    summary = summarise([step(1, **seconds, stray_s=99.0)], plan)
    assert len(phase_table(summary).splitlines()[0]) > 100
    table = phase_table(summary, with_cores=False).splitlines()
    assert table[0] == (
        "| phase    | threads | median ms |   p95 ms | share of step | busy | stray ms |"
    )
    assert table[3] == (
        "| backward |      64 |  199900.0 | 199900.0 |         50.0% |  18% | 198000.0 |"
    )
    assert table[-1] == (
        "| no phase |         |           |          |         74.3% |      |          |"
    )
    assert {len(row) for row in table} == {79}


def test_the_cpu_table_names_busy_and_partly_busy_cpus():
    busy = {0: 0.02, 1: 0.1, 2: 0.04}
    table = cpu_table(summarise([step(1, cpu_busy_s=busy)], PLAN))
    cells = [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")]
    assert cells == ["backward", "1", "0,2", "0:20% 1:100% 2:40%", "1-2"]


def test_unknown_cpu_times_are_called_unknown():
    assert "unknown" in cpu_table(summarise([step(1, cpu_busy_s={})], PLAN))


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


# Files


def small_machine(tmp_path):
    """A topology of three cores, and its plan."""
    root = machines.write_machine(tmp_path, machines.THREE)
    topology = read_topology(root, frozenset(range(3)))
    return topology, plan_cores(topology, Settings())


def test_the_heading_of_the_log(tmp_path):
    topology, plan = small_machine(tmp_path)
    text = log_heading(Settings(), Settings(epochs=2), topology, plan)
    assert re.search(
        r"^## \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ resnet50, sequential, split even$", text, re.M
    )
    machine = "Example CPU @ 3.0GHz: 1 socket, 3 cores, 3 hardware threads; allowed: 0-2"
    for line in (
        f"- machine: {machine}; {host_kind()}",
        "- detected cores: 0-2 (logical CPUs online)",
        "- forward   cores 0, 1 thread: forward pass",
        "- backward  cores 1-2, 2 threads: loss, backpropagation, optimizer step",
        "- loader    cores 0: main thread, 2 loader processes",
        "- settings: `--epochs 2`",
    ):
        assert line in text.splitlines()
    assert "batch_size 32" in text
    assert "torch 2" in text


def test_the_heading_of_a_run_with_the_default_settings_that_goes_on(tmp_path):
    text = log_heading(Settings(), Settings(), *small_machine(tmp_path), resumed_at=7)
    assert re.search(r"Z resnet50, sequential, split even, resumed after step 7$", text, re.M)
    assert "- settings: the defaults\n" in text


def test_the_summary_of_the_log(tmp_path):
    _, plan = small_machine(tmp_path)
    summary = summarise([step(1), step(2)], plan)
    text = log_summary(["best: 1", "outcome: finished"], summary, ["careful"])
    lines = text.splitlines()
    assert lines[:2] == ["- best: 1", "- outcome: finished"]
    assert re.fullmatch(r"- ended: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[2])
    assert lines[3] == "- warning: careful"
    assert [line[2:] for line in lines[4:8]] == summary_lines(summary)
    assert phase_table(summary) in text
    assert cpu_table(summary) in text


def test_the_log_writes_milestones_as_they_were_given():
    topology, settings = read_topology(), Settings(split="none", lr_milestones=(1, 2, 3))
    text = log_heading(settings, settings, topology, PLAN)
    assert "lr_milestones 1,2,3, " in text
    assert "- settings: `--lr-milestones 1,2,3 --split none`\n" in text


def test_the_log_tells_where_memory_is(tmp_path):
    root = machines.write_machine(tmp_path, machines.TWO_SOCKETS)
    topology = read_topology(root, frozenset(range(8)))
    plan = plan_cores(topology, Settings())
    assert [group.cpus for group in plan.groups] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    by_node = {0: 9 * 2**28, 1: 2**28, 2: 2**30}  # a node without cores: memory alone
    places = "node 0 (forward cores) 2.25 GiB, node 1 (backward cores) 0.25 GiB, node 2 1.00 GiB"
    line = f"memory by node, without that of files: {places}"
    assert memory_lines(by_node, topology, plan) == [line]
    assert memory_lines({}, topology, plan) == []


@pytest.mark.parametrize("by_node", [{}, {0: 2**30, 1: 2**29}])
def test_a_run_on_several_nodes_ends_with_where_memory_is(settings, monkeypatch, by_node):
    set_everywhere(monkeypatch, "memory_by_node", lambda: by_node)
    report = report_on(settings)
    report.step(step(1))
    report.finish("finished")
    text = settings.log_file.read_text()
    assert text.count("- memory by node, without that of files: node 0") == bool(by_node)


def test_memory_of_a_node_that_both_lanes_use():
    topology = Topology("", (Core(0, 3, 0, 0, (0,)), Core(0, 3, 0, 1, (1, 2))), *[()] * 4)
    assert memory_lines({3: 2**29}, topology, PLAN) == [
        "memory by node, without that of files: node 3 (forward cores, backward cores) 0.50 GiB"
    ]


def test_the_summary_of_a_run_without_a_step():
    text = log_summary(["outcome: stopped"], None, [])
    assert "- outcome: stopped" in text
    assert "| phase" not in text


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "--model resnet56 --image-size 32 --split 1:2 --model-ema",
        "--lr-milestones 3,5 --no-channels-last --no-tuned-malloc",
        "--forward-cores 0,2-4 --backward-cores 7",
        "--data-path 'my photos' --resume auto --output-dir \"it's\"",
        "--recipe cifar10 --data-path cifar",
        "--recipe cifar10 --data-path cifar --lr 0.05 --output-dir here",
        "--recipe imagenet-full --data-path i --init-from a.pt --no-model-ema",
    ],
)
def test_settings_that_differ_from_the_defaults_as_they_are_typed(typed):
    command, settings = parse_arguments(shlex.split(typed))
    text = as_options(settings)
    assert parse_arguments(shlex.split(text)) == (command, settings)
    flags = [[word for word in shlex.split(each) if word[0] == "-"] for each in (text, typed)]
    assert sorted(flags[0]) == sorted(flags[1])


def test_best_accuracy_and_files(tmp_path):
    progress = Progress()
    assert result_lines(Settings(), progress) == []
    for top1 in (50.0, 98.765, 98.0):
        progress.end_epoch({"val_top1": top1}, keep_best=3)
    for name in ("metrics.jsonl", "last.pt", "curves.png", "best.pt", "mine.txt"):
        (tmp_path / name).touch()
    assert result_lines(Settings(output_dir=tmp_path), progress) == [
        "best validation top-1: 98.77 % in epoch 2",
        f"files in {tmp_path}: best.pt, last.pt, curves.png, metrics.jsonl",
    ]
    _, files = result_lines(Settings(output_dir=tmp_path), progress, ["timeline.png"])
    assert files.endswith(": best.pt, last.pt, curves.png, timeline.png, metrics.jsonl")
    (tmp_path / "tensorboard").mkdir()
    _, files = result_lines(Settings(output_dir=tmp_path), progress)
    assert files.endswith(": best.pt, last.pt, curves.png, metrics.jsonl, tensorboard")


# Files for several runs


class Outline(html.parser.HTMLParser):
    """The parts of a page in order, each with its text: of a list the whole of it."""

    PARTS = "h1", "h2", "p", "ul", "pre", "table", "details", "summary"

    def __init__(self, page):
        super().__init__()
        self.parts, self._open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        if tag in self.PARTS:
            self.parts.append((tag, ""))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            assert self._open, "text outside of any part"
            tag, text = self.parts[-1]
            self.parts[-1] = tag, text + data


def rendered(text):
    """The parts of a log as GitHub's renderer makes them of its Markdown; without its header."""
    page = cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE)
    parts = Outline(page).parts
    assert [tag for tag, _ in parts[:4]] == ["h1", "p", "p", "pre"]
    return parts[4:]


HEAD = ["h2", "ul", "details", "summary", "p"]
TAIL = ["ul", "table", "table"]


def assert_renders(text):
    """No line of an epoch stands elsewhere than in a block of code; gives all such lines."""
    found = []
    for tag, content in rendered(text):
        assert tag in (*HEAD, *TAIL, "pre")
        assert tag == "pre" or "train_loss" not in content
        found += content.splitlines() if tag == "pre" else []
    return found


def test_an_epoch_line_outside_a_block_of_code_is_found():
    for text in (LINE, f"- {LINE}", f"| a |\n| - |\n{LINE}"):
        with pytest.raises(AssertionError):
            assert_renders(f"{LOG_HEADER}\n{text}\n")


def test_a_log_of_several_runs_as_github_renders_it(settings):
    """One with epochs, two at once, one that goes on, one without epochs, one that was killed."""
    settings = dataclasses.replace(settings, output_dir=None)
    one = report_on(settings)
    rows = [epoch_row(epoch, timestamp=f"2025-10-11T14:0{epoch}:00Z") for epoch in range(7)]

    def add(report, row):
        report.epoch(row, [row])

    add(one, rows[0])
    two = report_on(dataclasses.replace(settings, model="resnet18"))
    for report, number in ((two, 1), (one, 2), (two, 3)):
        add(report, rows[number])
    one.step(step(1))
    one.finish("finished")
    add(two, rows[4])
    going_on = report_on(settings, step=12)
    two.step(step(1))
    two.finish("finished")
    add(going_on, rows[5])
    short = report_on(dataclasses.replace(settings, epochs=None, model="resnet34"))
    short.step(step(1))
    add(report_on(dataclasses.replace(settings, model="hybrid")), rows[6])
    short.finish("stopped")
    going_on.finish("an error")
    parts = rendered(settings.log_file.read_text())
    pre, cut_off = [*HEAD, "pre"], [*HEAD, "pre", "ul"]
    assert [tag for tag, _ in parts] == [*pre, *TAIL, *pre, *TAIL, *cut_off, *HEAD, *TAIL, *pre]
    titles = [text.split()[1:] for tag, text in parts if tag == "h2"]
    names = [title[0] for title in titles]
    assert names == ["resnet50,", "resnet18,", "resnet50,", "resnet34,", "hybrid,"]
    assert " ".join(titles[2]).endswith("split even, resumed after step 12")
    blocks = [text.splitlines() for tag, text in parts if tag == "pre"]
    lines = [epoch_line(row) for row in rows]
    assert blocks == [lines[0:3:2], [lines[1], *lines[3:5]], lines[5:6], lines[6:]]
    outcomes = re.findall(r"^outcome: (\w+)", "\n".join(t for _, t in parts), re.M)
    assert outcomes == ["finished", "finished", "an", "stopped"]
    assert all(text.startswith("phase") for tag, text in parts if tag == "table")


def log_on(path, number=0, over_epochs=True):
    """A section of a log, begun."""
    log = LogSection(path, f"\n## run {number}\n\n- settings\n\n", over_epochs)
    log.begin()
    return log


def log_many_epochs(path, number, barrier):
    barrier.wait()
    log = log_on(path, number)
    for epoch in range(100):
        log.add_epoch(f"run {number}, epoch {epoch}, train_loss")
    log.end("- ended\n")


def test_runs_at_once_have_all_their_lines_in_sections_of_their_own(tmp_path):
    path, context = tmp_path / "logs.md", multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    runs = [context.Process(target=log_many_epochs, args=(path, n, barrier)) for n in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    parts = rendered(path.read_text())
    assert [tag for tag, _ in parts] == ["h2", "ul", "pre", "ul"] * 3
    numbers = [text.split()[1] for tag, text in parts if tag == "h2"]
    assert sorted(numbers) == ["0", "1", "2"]
    assert [text.splitlines() for tag, text in parts if tag == "pre"] == [
        [f"run {number}, epoch {epoch}, train_loss" for epoch in range(100)] for number in numbers
    ]


def log_until_killed(path, number):
    log = log_on(path, number)
    for epoch in itertools.count():
        log.add_epoch(f"run {number}, epoch {epoch}, train_loss {'x' * 150}")


def test_a_killed_run_leaves_a_log_that_renders(tmp_path):
    """Whenever that is; the sections of others are whole."""
    path, context = tmp_path / "logs.md", multiprocessing.get_context("fork")
    other = log_on(path, 99)
    for number in range(10):
        run = context.Process(target=log_until_killed, args=(path, number))
        run.start()
        time.sleep(0.02 + 0.005 * number)
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        other.add_epoch(f"run 99, epoch {number}, train_loss")
        lines = assert_renders(path.read_text())
        own = [line for line in lines if line.startswith("run 99")]
        assert own == [f"run 99, epoch {epoch}, train_loss" for epoch in range(number + 1)]
        killed = [line for line in lines if line.startswith(f"run {number},")]
        assert all(re.fullmatch(r"run \d, epoch \d+, train_loss x{150}", line) for line in killed)


def test_a_log_that_the_user_edits_meanwhile(tmp_path):
    path = tmp_path / "logs.md"
    log = log_on(path)
    log.add_epoch("epoch: 1")
    inode = path.stat().st_ino
    text = path.read_text()
    path.write_text(
        "My notes, in front\n" + text.replace("epoch: 1", "epoch: 1  a note") + "Below\n"
    )
    log.add_epoch("epoch: 2")
    log.end("- ended\n")
    text = path.read_text()
    assert text.startswith("My notes, in front\n# Training log\n")
    assert text.endswith("```\nepoch: 1  a note\nepoch: 2\n```\n\n- ended\nBelow\n")
    assert "<!--" not in text
    assert path.stat().st_ino == inode, "whoever waits for the lock of this file must not miss it"


@pytest.mark.parametrize(
    "edit",
    [
        Path.unlink,
        lambda path: path.write_text("mine\n"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    ],
)
def test_a_section_whose_place_has_gone_begins_anew(tmp_path, edit):
    path = tmp_path / "logs.md"
    log = log_on(path)
    log.add_epoch("epoch: 1")
    edit(path)
    before = path.read_bytes().decode() if path.exists() else LOG_HEADER
    log.add_epoch("epoch: 2")
    log.add_epoch("epoch: 3")
    log.end("- ended\n")
    section = "\n## run 0\n\n- settings\n\n"
    assert path.read_bytes().decode() == (
        f"{before}{section}```\nepoch: 2\nepoch: 3\n```\n\n- ended\n"
    )
    edit(path)
    log.end("- ended\n")
    assert path.read_text().endswith(f"{section}- ended\n")


def test_a_log_that_is_a_pipe_is_written_to_in_order(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # so that no opening waits for the other end
    try:
        log = log_on(path)
        log.add_epoch("epoch: 1")
        log.end("- ended\n")
        taken = os.read(descriptor, 2**16).decode()
    finally:
        os.close(descriptor)
    assert taken == (f"{LOG_HEADER}\n## run 0\n\n- settings\n\nepoch: 1\n\n- ended\n"), (
        "without a place to find again"
    )


def test_a_log_that_can_only_be_appended_to(tmp_path, monkeypatch):
    """As one that `chattr +a` protects."""
    path, open_file = tmp_path / "logs.md", Path.open

    def protected(self, mode="r", *args, **kwargs):
        if mode == "r+b":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", protected)
    path.write_text("mine\n")
    log = log_on(path)
    log.add_epoch("epoch: 1")
    log.end("- ended\n")
    assert path.read_text() == "mine\n\n## run 0\n\n- settings\n\nepoch: 1\n\n- ended\n"


@contextlib.contextmanager
def files_up_to(size_bytes):
    """No file can become larger: what was there stays writable, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 10, 49])
@pytest.mark.parametrize("below", [0, 10_000])
def test_no_room_for_another_line_leaves_the_log_as_it_was(tmp_path, room, below):
    path = tmp_path / "logs.md"
    log = log_on(path)
    log.add_epoch("epoch: 1")
    append_text(path, "x" * below)
    before = path.read_bytes()
    with files_up_to(len(before) + room), pytest.raises(RunError, match="cannot be written"):
        log.add_epoch("e" * 49)  # and a line feed
    assert path.read_bytes() == before
    with files_up_to(len(before) + 50):
        log.add_epoch("e" * 49)
    assert path.read_bytes().startswith(
        before[: before.rindex(b"```")] + b"e" * 49 + b"\n```\n<!--"
    )


@pytest.mark.parametrize(
    ("before", "write", "arguments", "meanwhile", "after"),
    [
        ("", append_text, ("mine\n", "head\n"), "head\nother\n", "head\nother\nmine\n"),
        ("a place", replace_text, ("place", "new place"), ", more", "a new place, more"),
    ],
)
def test_writing_waits_for_the_lock(tmp_path, before, write, arguments, meanwhile, after):
    path = tmp_path / "logs.md"
    path.write_text(before)
    writer = threading.Thread(target=write, args=(path, *arguments))
    with path.open("a") as other_run:
        fcntl.flock(other_run, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        other_run.write(meanwhile)
    writer.join(10)
    assert path.read_text() == after


def test_the_latest_text_is_replaced_by_a_shorter_or_a_longer_one(tmp_path):
    path = tmp_path / "logs.md"
    path.write_text("one two one end")
    assert replace_text(path, "one", "a longer one")
    assert path.read_text() == "one two a longer one end"
    assert replace_text(path, "a longer one", "1")
    assert path.read_text() == "one two 1 end"
    assert not replace_text(path, "three", "3")
    assert not replace_text(tmp_path / "none", "three", "3")
    assert path.read_text() == "one two 1 end"
    assert not (tmp_path / "none").exists()


def append_to_all(paths, mark, barrier):
    for path in paths:
        barrier.wait()
        append_text(path, f"<{mark * 20_000}>\n", "header\n")


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


def test_a_log_that_cannot_be_appended_to(tmp_path):
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        append_text(tmp_path, "text")


@pytest.mark.parametrize(
    "settings",
    [
        {"log_file": "{}"},
        {"log_file": "{}/nowhere/logs.md"},
        {"log_file": "{}/file/logs.md"},
        {"output_dir": "{}/file"},
        {"output_dir": "{}/file/below"},
        {"output_dir": "{}/taken"},
        {"output_dir": "{}/taken_too"},
        {"json": "{}/nowhere/c.json"},
        {"log_file": "/proc/logs.md"},
        {"output_dir": "/proc/out"},
    ],
)
def test_places_that_cannot_be_written(tmp_path, settings):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken/metrics.jsonl").mkdir(parents=True)
    (tmp_path / "taken_too/last.pt").mkdir(parents=True)
    ((name, template),) = settings.items()
    path = tmp_path.parent / template.format(tmp_path)
    paths = {"log_file": tmp_path / "logs.md", name: path}
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {path}: cannot be written"):
        check_writable(Settings(**paths))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken", "taken_too"]


@pytest.mark.parametrize("name", ["output_dir", "json"])
def test_files_that_could_be_written_but_not_replaced(tmp_path, monkeypatch, name):
    def no_new_files(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    pictures = "timeline.png", "curves.png", "gradients.png"
    for file in ("metrics.jsonl", "trace.json", "last.pt", "c.json", "logs.md", *pictures):
        (tmp_path / file).write_text("")
    path = {"output_dir": tmp_path, "json": tmp_path / "c.json"}[name]
    monkeypatch.setattr(tempfile, "TemporaryFile", no_new_files)
    with pytest.raises(UserError, match=f" {path}: cannot be written: Permission denied"):
        check_writable(Settings(log_file=tmp_path / "logs.md", **{name: path}))


def test_a_file_where_tensorboard_s_folder_is_to_be(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    settings = Settings(log_file=tmp_path / "logs.md", output_dir=tmp_path)
    check_writable(settings)
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}: cannot be .*: Not a dire"):
        check_writable(dataclasses.replace(settings, tensorboard=True))


def test_checking_leaves_no_trace(tmp_path):
    log = tmp_path / "logs.md"
    check_writable(Settings(log_file=log, output_dir=tmp_path / "a/b"))
    assert not list(tmp_path.iterdir())
    log.write_text("kept")
    check_writable(Settings(log_file=log))
    assert log.read_text() == "kept"


def test_settings_as_json(tmp_path):
    values = plain_settings(Settings(output_dir=tmp_path, forward_cores=(0, 1)))
    assert json.loads(json.dumps(values))["output_dir"] == str(tmp_path)


# Epochs


def epoch_row(epoch=1, **values):
    """The figures of a finished epoch."""
    row = {
        "epoch": epoch,
        "train_loss": 4.512,
        "train_top1": 1.2,
        "train_top5": 5.8,
        "val_loss": 4.389,
        "val_top1": 1.5,
        "val_top5": 6.2,
        "lr": 0.1,
        "gradient_norms": {"stem": 0.5, "fc": 2.0},
        "timestamp": "2025-10-11T14:02:13Z",
    }
    return row | values


NO_VALIDATION = {"val_loss": None, "val_top1": None, "val_top5": None}
LINE = (
    "epoch: 1  train_loss: 4.512  train_top1: 1.2%  train_top5: 5.8%  val_loss: 4.389  "
    "val_top1: 1.5%  val_top5: 6.2%  timestamp: 2025-10-11T14:02:13Z"
)


def test_the_line_of_an_epoch():
    assert epoch_line(epoch_row()) == LINE


def test_the_line_of_an_epoch_without_validation():
    assert epoch_line(epoch_row(12, **NO_VALIDATION)) == (
        "epoch: 12  train_loss: 4.512  train_top1: 1.2%  train_top5: 5.8%  val_loss: -  "
        "val_top1: -  val_top5: -  timestamp: 2025-10-11T14:02:13Z"
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"train_loss": 0.0}, "train_loss: 0.000  "),
        ({"train_loss": 12.34567}, "train_loss: 12.346  "),
        ({"val_top1": 0.0}, "val_top1: 0.0%  "),
        ({"val_top5": 100.0}, "val_top5: 100.0%  "),
        ({"train_top1": 98.76}, "train_top1: 98.8%  "),
    ],
)
def test_the_figures_of_an_epoch_are_rounded(values, text):
    assert text in epoch_line(epoch_row(**values))


FROM_A_LOADER = """Caught {} in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in fetch
{}"""
MEMORY = "out of memory: try a smaller --batch-size (with more --accumulate), or fewer loaders (-j)"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("--lr 7: no"), "--lr 7: no"),
        (BrokenImage("broken image x.jpg: MemoryError"), "broken image x.jpg: MemoryError"),
        (Stopped(15), "stopped by SIGTERM"),
        (MemoryError(), f"{MEMORY} (MemoryError: )"),
        (
            OSError(12, "Cannot allocate memory"),
            f"{MEMORY} (OSError: [Errno 12] Cannot allocate me",
        ),
        (
            RuntimeError(FROM_A_LOADER.format("MemoryError", "MemoryError: of numpy\n")),
            f"{MEMORY} (RuntimeError: MemoryError: of numpy)",
        ),
        (
            LoaderDied(17, -9),
            "a loader was killed, by the system for want of memory perhaps: try fewer loaders (-j) "
            "or a smaller --batch-size (LoaderDied: loader process 17 was ended by SIGKILL)",
        ),
        (LoaderDied(17, -7), "shared memory (/dev/shm) is full: enlarge it (docker run --shm"),
        (OSError(24, "Too many open files"), "too many open files: raise `ulimit -n`, or try"),
        (RuntimeError("can't start new thread"), "no room for another thread: raise the limits"),
        (
            RuntimeError(FROM_A_LOADER.format("KeyError", "KeyError: 'x'\n")),
            "an error that was not foreseen: RuntimeError: KeyError: 'x'",
        ),
        (ZeroDivisionError("a bug\nof two lines"), "an error that was not foreseen: ZeroDivisionE"),
    ],
)
def test_the_likely_reason_of_an_error(error, reason):
    text = likely_reason(error)
    assert text.startswith(reason)
    assert "\n" not in text


def test_the_time_of_day():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


@pytest.fixture
def settings(tmp_path):
    """Those of a run over epochs that writes all it can."""
    return Settings(
        epochs=3,
        accumulate=2,
        image_size=32,
        print_freq=1,
        log_file=tmp_path / "logs.md",
        output_dir=tmp_path / "out",
    )


def report_on(settings, **progress):
    """A report at its beginning; an epoch has ten steps."""
    topology = read_topology()
    return RunReport(settings, topology, PLAN, Progress(**{"epoch_batches": 20} | progress))


def test_what_an_epoch_leaves_in_the_log_and_the_metrics(settings, capsys):
    report = report_on(settings)
    second = epoch_row(2, timestamp="2025-10-11T15:02:13Z", **NO_VALIDATION)
    for history in ([epoch_row()], [epoch_row(), second]):
        report.epoch(history[-1], history)
    log = settings.log_file.read_text()
    assert log.startswith(LOG_HEADER + "\n## ")
    lines = f"```\n{LINE}\n{epoch_line(second)}\n```\n"
    assert re.search(rf"</details>\n\n{re.escape(lines)}<!-- run [0-9a-f]{{16}} .*-->\n$", log)
    assert capsys.readouterr().out == f"{LINE}\n{epoch_line(second)}\n"
    assert read_metrics(settings.output_dir, "epoch") == [
        {"type": "epoch", **epoch_row()},
        {"type": "epoch", **second},
    ]
    assert {path.name for path in settings.output_dir.iterdir()} == {
        "metrics.jsonl",
        "curves.png",
        "gradients.png",
    }


RAW = {"val_raw_loss": 4.1, "val_raw_top1": 2.5, "val_raw_top5": None}


def test_the_raw_figures_of_an_epoch_are_told_beside_those_of_the_moving_average(settings, capsys):
    """The lines of logs.md keep their form."""
    report = report_on(settings)
    report.epoch(epoch_row(**RAW), [epoch_row(**RAW)])
    raw = "val_raw_loss: 4.100  val_raw_top1: 2.5%  val_raw_top5: -"
    assert capsys.readouterr().out == (
        f"{LINE}\nepoch: 1  {raw}  timestamp: 2025-10-11T14:02:13Z\n"
    )
    assert f"\n\n```\n{LINE}\n```\n" in settings.log_file.read_text()
    (row,) = read_metrics(settings.output_dir, "epoch")
    assert row == {"type": "epoch", **epoch_row(), **RAW}


def test_a_picture_that_cannot_be_written_does_not_end_the_run(settings, capsys):
    (settings.output_dir / "curves.png").mkdir(parents=True)
    report = report_on(settings)
    for epoch in (1, 2):
        report.epoch(epoch_row(epoch), [epoch_row()])
    picture = settings.output_dir / "curves.png"
    assert capsys.readouterr().err == (
        f"warning: {picture}: cannot be written: Is a directory\n"
    ), "once"
    assert len(read_metrics(settings.output_dir, "epoch")) == 2
    assert (settings.output_dir / "gradients.png").exists()


def test_the_log_names_the_columns_of_an_epoch():
    columns = "train_loss | train_top1 | train_top5 | val_loss | val_top1 | val_top5 | timestamp"
    assert columns in LOG_HEADER


def test_a_report_of_a_resumed_run(settings):
    report = report_on(settings, step=12, epoch=1, batches=4)
    (run,) = read_metrics(settings.output_dir)
    assert (run["type"], run["resumed_at_step"]) == ("run", 12)
    report.finish("finished")
    assert read_metrics(settings.output_dir, "summary")[0]["outcome"] == (
        "finished after 12 of 30 steps"
    )


@pytest.fixture
def shown(settings):
    """Settings of a run for TensorBoard, and where it writes for that."""
    pytest.importorskip("tensorboard")
    return dataclasses.replace(settings, tensorboard=True), settings.output_dir / "tensorboard"


def test_what_tensorboard_shows_of_a_step(shown):
    settings, folder = shown
    report = report_on(settings)
    result = dataclasses.replace(step(1), top1=2, top5=6, lr=0.25)
    report.step(result)
    values = {
        "step/loss": 4.0,
        "step/top1": 25.0,
        "step/top5": 75.0,
        "step/lr": 0.25,
        "speed/images_per_s": 20.0,
        "speed/step_s": 0.4,
        "speed/forward_s": 0.1,
        "speed/backward_s": 0.2,
        "speed/update_s": 0.05,
    }
    assert scalars_in(folder) == {
        tag: [(1, pytest.approx(value, rel=1e-6))] for tag, value in values.items()
    }


@pytest.mark.parametrize("more", [{}, RAW, NO_VALIDATION])
def test_what_tensorboard_shows_of_an_epoch(shown, more):
    """At the optimizer step that it ends with; without what was not measured."""
    settings, folder = shown
    report = report_on(settings, step=10)
    row = epoch_row(2, **more)
    report.epoch(row, [row])
    names = ["epoch", *EPOCH_FIELDS, *RAW_FIELDS]
    values = {f"epoch/{name}": row[name] for name in names if row.get(name) is not None}
    values |= {"gradients/stem": 0.5, "gradients/fc": 2.0}
    assert len(values) == 9 + 2 * (more == RAW) - 3 * (more == NO_VALIDATION)
    assert scalars_in(folder) == {
        tag: [(10, pytest.approx(value, rel=1e-6))] for tag, value in values.items()
    }


def test_tensorboard_shows_what_was_repeated_after_a_resume_once(shown):
    settings, folder = shown
    for first, last, lr in ((0, 6, 0.1), (4, 8, 0.2), (2, 3, 0.3)):
        report = report_on(settings, step=first)
        for number in range(first + 1, last + 1):
            report.step(dataclasses.replace(step(number), lr=lr))
        steps = [number for number, _ in scalars_in(folder)["step/loss"]]
        assert steps == list(range(1, last + 1)), "none twice, and none missing"
    rates = [round(rate, 6) for _, rate in scalars_in(folder)["step/lr"]]
    assert rates == [0.1, 0.1, 0.3]
    assert len(list(folder.iterdir())) == 3


def test_gradients_beyond_what_tensorboard_can_hold(shown):
    settings, folder = shown
    report = report_on(settings)
    row = epoch_row(gradient_norms={"stem": 1e200})
    report.epoch(row, [row])
    assert scalars_in(folder)["gradients/stem"] == [(0, math.inf)]


def test_no_room_for_tensorboard_ends_no_run_and_leaves_a_file_that_is_whole(
    shown, capsys, monkeypatch
):
    settings, folder = shown
    report = report_on(settings)
    report.step(step(1))
    (file,) = folder.iterdir()
    room = file.stat().st_size + 20
    set_everywhere(monkeypatch, "append_text", lambda *args: None)  # of metrics.jsonl
    with files_up_to(room):
        report.step(step(2))
        report.step(step(3))
    report.step(step(4))
    assert capsys.readouterr().err == f"warning: {file}: cannot be written: File too large\n"
    assert [number for number, _ in scalars_in(folder)["step/loss"]] == [1, 4]


def test_a_file_for_tensorboard_that_could_not_even_begin(shown):
    _, folder = shown
    folder.mkdir(parents=True)
    events = EventFile(folder, 1)
    with files_up_to(30), pytest.raises(RunError, match="cannot be written"):
        events.add(1, {"loss": 2.5})
    events.add(2, {"loss": 1.5})
    assert scalars_in(folder) == {"loss": [(2, 1.5)]}


def test_without_the_option_nothing_is_written_for_tensorboard(settings):
    report = report_on(settings)
    report.step(step(1))
    report.epoch(epoch_row(), [epoch_row()])
    assert not (settings.output_dir / "tensorboard").exists()


def test_warnings_are_shown_once_and_alarms_each_time(settings, capsys):
    report = report_on(settings)
    for _ in range(2):
        report.warn("kind", "of one kind")
        report.alarm("not saved")
    report.finish("finished")
    error, log = capsys.readouterr().err, settings.log_file.read_text()
    assert error == "warning: of one kind\n" + "warning: not saved\n" * 2
    for text in ("of one kind", "not saved"):
        assert log.count(f"- warning: {text}\n") == 1


# Others on the same cores


def company(end_s, stolen=0.0, seconds=1.0, **others):
    """What others took of some lanes in some seconds, by default in one."""
    return Company(end_s - seconds, end_s, others, stolen)


@pytest.mark.parametrize(
    ("company", "texts"),
    [
        (company(1, forward=0.0, backward=0.019), []),
        (
            company(1, forward=0.01, backward=0.47),
            ["other processes took 47 % of the backward cores"],
        ),
        (
            company(1, 0.034, forward=1.0, backward=0.02),
            [
                "other processes took 100 % of the forward cores and 2 % of the backward cores",
                "the hypervisor took 3 %",
            ],
        ),
        (
            company(1, 0.02, all=0.126),
            ["other processes took 13 % of all cores", "the hypervisor took 2 %"],
        ),
    ],
)
def test_what_others_took_in_words(company, texts):
    assert list(company_texts(company, 0.02)) == texts
    summary = dataclasses.replace(summarise([step(1)]), company=company)
    alone = summary_lines(summarise([step(1)]))
    said = ["; ".join(texts)] if texts else []
    assert summary_lines(summary) == [*alone[:-1], *said, alone[-1]]


BESIDE = "every step waits for the slowest of its threads"


@pytest.mark.parametrize(
    ("shares", "warnings"),
    [
        ([{"backward": 0.09}] * 40, []),
        ([{"backward": 0.9}] * 9, []),  # too short a time to tell
        ([{}] * 20 + [{"backward": 0.9}] + [{}] * 20, []),  # a burst
        (
            [{"backward": 0.5, "forward": 0.04}] * 40,
            [f"other processes took 50 % of the backward cores in the latest 10 s: {BESIDE}"],
        ),
        (
            [{}] * 20
            + [{"backward": 1.0, "stolen": 0.2}] * 10
            + [{}] * 20
            + [{"forward": 1.0}] * 20,
            [
                f"other processes took 18 % of the backward cores in the latest 11 s: {BESIDE}",
                f"the hypervisor took 11 % in the latest 11 s: {BESIDE}",
            ],
        ),
    ],
)
def test_others_are_warned_of_once_when_they_begin(settings, capsys, shares, warnings):
    report = report_on(dataclasses.replace(settings, print_freq=1000))
    none = {"forward": 0.0, "backward": 0.0}
    for second, share in enumerate(shares, start=1):
        report.step(dataclasses.replace(step(second), company=company(second, **none | share)))
        report.step(step(second))
    assert capsys.readouterr().err == "".join(f"warning: {text}\n" for text in warnings)
    report.finish("finished")
    log = settings.log_file.read_text()
    assert [line for line in log.splitlines() if BESIDE in line] == [
        f"- warning: {text}" for text in warnings
    ]


def test_others_beside_a_validation_count_too(settings, capsys):
    report = report_on(settings)
    report.step(dataclasses.replace(step(1), company=company(10, forward=0.0, seconds=10)))
    report.company(company(40, forward=0.4, seconds=30))
    report.company(None)
    report.finish("finished")
    shown = capsys.readouterr()
    assert "other processes took 40 % of the forward cores in the latest 30 s: " in shown.err
    assert "other processes took 30 % of the forward cores\n" in shown.out
    (step_line,) = read_metrics(settings.output_dir, "step")
    (summary,) = read_metrics(settings.output_dir, "summary")
    assert step_line["company"]["others"] == {"forward": 0.0}
    assert summary["company"] == {
        "start_s": 0,
        "end_s": 40,
        "others": {"forward": pytest.approx(0.3)},
        "stolen": 0.0,
    }
    assert summary["memory_by_node"] == {
        str(node): size_bytes for node, size_bytes in memory_by_node().items()
    }


# Progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (24 * 3600 - 1, "23h59m"),
        (24 * 3600, "1d00h"),
        (66 * 24 * 3600 + 2 * 3600 + 59, "66d02h"),
    ],
)
def test_a_span_of_time(seconds, text):
    assert span_text(seconds) == text


def longest_step():
    """The longest figures that are plausible."""
    result = step(450_360, forward_s=12.34, backward_s=23.45, step_s=0.8103)
    return dataclasses.replace(result, loss=12.3456, images=1000, top1=1000, top5=1000)


LONGEST = "loss 12.3456, top-1 100.0 %, 1234 img/s"


def drawn_bar(columns, result, steps, left_s):
    """The progress bar on a terminal of so many columns, of which tqdm leaves one free."""
    text = bar_text(result, left_s, columns - 1)
    return tqdm.format_meter(
        result.step, steps, 1.0, ncols=columns - 1, bar_format=BAR, postfix=text
    )


@pytest.mark.parametrize(
    ("columns", "bar", "text"),
    [
        (80, 9, f"{LONGEST}, 23h59m left"),
        (99, 28, f"{LONGEST}, 23h59m left"),
        (100, 3, f"{LONGEST}, fwd 12.34 s, bwd 23.45 s, 23h59m left"),
        (120, 23, f"{LONGEST}, fwd 12.34 s, bwd 23.45 s, 23h59m left"),
    ],
)
def test_the_bar_fits_its_terminal_with_the_longest_figures(columns, bar, text):
    drawn = drawn_bar(columns, longest_step(), 450_360, 24 * 3600 - 1)
    assert drawn == f"|{'█' * bar}| 450360/450360, {text}"
    assert len(drawn) == columns - 1


def test_the_bar_of_a_small_run():
    result = dataclasses.replace(step(20), loss=2.0525, images=32, top1=11)
    assert drawn_bar(80, result, 88, 14.0) == (
        "|█████▍                  | 20/88, loss 2.0525, top-1 34.4 %, 80 img/s, 14s left"
    )


def test_the_line_of_a_step_fits_80_columns_with_the_longest_figures():
    result, left_s = longest_step(), 24 * 3600 - 1
    line = tables.step_line(result, 450_360, left_s)
    assert line == f"step 450360/450360: {LONGEST}, 23h59m left"
    with_epoch = tables.step_line(result, 450_360, left_s, " (epoch 90/90: 59m59s)")
    assert with_epoch == (
        "step 450360/450360: loss 12.3456, 1234 img/s, 23h59m left (epoch 90/90: 59m59s)"
    )
    assert (len(line), len(with_epoch)) == (72, 79)


@contextlib.contextmanager
def terminal(columns):
    """A stream to a terminal, and the function that closes it and gives what was written to it."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def written():
        """The kernel hands on in pieces, and some time later, what is written to a terminal."""
        stream.close()
        pieces = []
        with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
            while piece := os.read(master, 2**16):
                pieces.append(piece)
        return b"".join(pieces).decode().replace("\r\n", "\n")

    with os.fdopen(slave, "w") as stream:
        yield stream, written
    os.close(master)


@pytest.mark.parametrize(("columns", "phases"), [(80, False), (100, True)])
def test_progress_on_a_terminal(settings, monkeypatch, columns, phases):
    with terminal(columns) as (stream, written):
        monkeypatch.setattr(sys, "stderr", stream)
        report = report_on(dataclasses.replace(settings, print_freq=9), step=1, batches=2)
        report.step(step(2, step_s=2.0))
        report._bar.refresh()
        text = written()
    drawn = text.split("\r")
    assert {len(each) for each in drawn if each.strip()} == {columns - 1}
    assert "| 1/30" in drawn[1]
    assert re.search(r"\| 2/30, loss 3\.0000, top-1 0\.0 %, 4 img/s, .*left$", drawn[-1])
    assert ("fwd 0.10 s, bwd 0.20 s" in drawn[-1]) == phases


def test_no_bar_is_drawn_into_a_pipe(settings, capsys):
    report = report_on(settings, step=1, batches=2)
    report.step(step(2))
    report.finish("finished")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("step 2/30: loss 3.0000, 20 img/s, ")


LONG = "one two three four, " * 5 + "a-b/c " + "x" * 60


def test_long_lines_are_broken_at_blanks_on_a_terminal():
    with terminal(40) as (stream, written):
        say(f"  {LONG}\n\nshort\nforward   cores {LISTS[0]}{LISTS[1]}", stream)
        assert written() == (
            "  one two three four, one two three\n"
            "    four, one two three four, one two\n"
            "    three four, one two three four,\n"
            "    a-b/c\n"
            f"    {'x' * 60}\n"
            "\nshort\n"
            f"forward   cores\n    {LISTS[0]}{LISTS[1]}\n"
        )


def test_lines_stay_whole_in_a_pipe(capsys):
    say(LONG)
    assert capsys.readouterr().out == f"{LONG}\n"


@pytest.mark.parametrize(
    ("asked", "progress", "left"),
    [
        ({}, {"step": 2, "batches": 4}, "56s left (epoch 1/3: 16s)"),
        ({}, {"step": 10, "batches": 20}, "40s left (epoch 1/3: 0s)"),
        ({}, {"step": 25, "epoch": 2, "batches": 10}, "10s left (epoch 3/3: 10s)"),
        ({"epochs": None, "steps": 2000}, {"step": 200, "batches": 4}, "1h00m left"),
        ({"epochs": None}, {"step": 49, "batches": 4}, "2s left"),
    ],
)
def test_the_time_left(settings, capsys, asked, progress, left):
    """Steps of 2 s; an epoch has ten of them."""
    report = report_on(dataclasses.replace(settings, **asked), **progress)
    report.step(step(progress["step"], step_s=2.0))
    line = capsys.readouterr().out
    assert line.startswith(f"step {progress['step']}/")
    assert line.endswith(f" 4 img/s, {left}\n")


def test_the_time_left_goes_by_the_median_step(settings, capsys):
    report = report_on(settings, step=2, batches=4)
    for seconds in (2.0, 60.0, 2.0):
        report.step(step(2, step_s=seconds))
    assert capsys.readouterr().out.endswith(" 56s left (epoch 1/3: 16s)\n")


def test_the_time_left_goes_by_the_latest_steps(settings, capsys, monkeypatch):
    """As when images have grown since."""
    set_everywhere(monkeypatch, "RECENT_STEPS", 3)
    report = report_on(settings, step=2, batches=4)
    for seconds in (0.1, 0.1, 0.1, 0.1, 2.0, 2.0):
        report.step(step(2, step_s=seconds))
    assert capsys.readouterr().out.endswith(" 56s left (epoch 1/3: 16s)\n")


def test_a_run_ends_with_its_best_accuracy_and_its_files_then_the_figures(settings, capsys):
    report = report_on(settings, best=[(98.765, 2), (90.0, 1)])
    report.step(step(1))
    capsys.readouterr()
    report.finish("finished")
    out = capsys.readouterr().out.splitlines()
    folder = settings.output_dir
    assert out[:6] == [
        "",
        "best validation top-1: 98.77 % in epoch 2",
        f"files in {folder}: timeline.png, trace.json, metrics.jsonl",
        f"log in {settings.log_file}",
        "",
        "finished after 0 of 30 steps",
    ]
    assert out[6].startswith("20.00 images/s, ")
    assert all(len(line) <= 80 for line in out if line.startswith("|"))
    log = settings.log_file.read_text()
    first, second, third = re.findall(r"^- (best|files|outcome).*$", log, re.M)
    assert (first, second, third) == ("best", "files", "outcome")


def test_the_machine_in_the_metrics(settings, tmp_path, monkeypatch):
    set_everywhere(monkeypatch, "host_kind", lambda: "bare metal")
    memory = {"proc/meminfo": "MemTotal:   1024 kB\n", "proc/cpuinfo": "flags : amx_bf16\n"}
    root = machines.write_machine(tmp_path / "root", machines.TWO_SOCKETS, memory)
    topology = read_topology(root, frozenset(range(6)))
    RunReport(settings, topology, PLAN, Progress(epoch_batches=20))
    (run,) = read_metrics(settings.output_dir)
    assert run["host_kind"] == "bare metal"
    assert run["machine"] == {
        "cpu_model": topology.cpu_model,
        "sockets": 2,
        "cores": 8,
        "logical_cpus": 8,
        "allowed": "0-5",
        "quota_cpus": None,
        "memory_bytes": 2**20,
        "bf16": "amx_bf16",
    }
    assert run["topology"][:2] == [
        {"package": 0, "node": 0, "l3": 0, "core_id": 0, "cpus": [0], "capacity": 1024},
        {"package": 0, "node": 0, "l3": 0, "core_id": 1, "cpus": [2], "capacity": 1024},
    ]
    assert [core["cpus"] for core in run["topology"]] == [[0], [2], [4], [6], [1], [3], [5], [7]]


def test_memory_that_is_not_known_is_null_in_the_metrics(settings):
    topology = dataclasses.replace(read_topology(), memory_bytes=math.inf)
    RunReport(settings, topology, PLAN, Progress(epoch_batches=20))
    assert read_metrics(settings.output_dir)[0]["machine"]["memory_bytes"] is None


# Gradients


@pytest.mark.parametrize(
    ("norm", "warnings"),
    [
        (1e-7, []),
        (0.5, []),
        (1e3, []),
        (9e-8, ["gradients vanish in stem: norm 9.0e-08, below 1e-07"]),
        (0.0, ["gradients vanish in stem: norm 0.0e+00, below 1e-07"]),
        (1001.0, ["gradients explode in stem: norm 1.0e+03, above 1000"]),
        (math.inf, ["gradients explode in stem: norm inf, above 1000"]),
        (math.nan, ["gradients explode in stem: norm nan, above 1000"]),
    ],
)
def test_gradients_that_vanish_or_explode(norm, warnings):
    assert list(gradient_warnings({"stem": norm, "fc": 1.0})) == warnings


def test_gradients_are_warned_of_once_for_each_part_of_the_model(settings, capsys):
    report = report_on(settings)
    history = []
    for epoch, norms in enumerate(
        ({"stem": 1.0, "fc": 1.0}, {"stem": 0.0, "fc": 1.0}, {"stem": 0.0, "fc": 2000.0}), start=1
    ):
        history.append(epoch_row(epoch, gradient_norms=norms))
        report.epoch(history[-1], history)
    report.finish("finished")
    warnings = [
        "epoch 2: gradients vanish in stem: norm 0.0e+00, below 1e-07",
        "epoch 3: gradients explode in fc: norm 2.0e+03, above 1000",
    ]
    assert capsys.readouterr().err == "".join(f"warning: {text}\n" for text in warnings)
    log = settings.log_file.read_text()
    assert all(f"- warning: {text}\n" in log for text in warnings)


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, as well as the files."""
    saved, save = [], save_figure
    set_everywhere(
        monkeypatch, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path))
    )
    return saved


def assert_picture(path):
    """A picture that is not blank."""
    picture = Image.open(path)
    assert picture.width > 300
    assert len(picture.convert("RGB").getcolors(2**24)) > 10


def lines_of(ax):
    """(label, y values) of the curves of some axes, marks of an epoch or a rate left out."""
    curves = (line for line in ax.lines if line.get_linestyle() != "--")
    return {line.get_label(): list(line.get_ydata()) for line in curves}


def test_the_curves(tmp_path, figures):
    second = epoch_row(2, train_loss=3.0, val_loss=3.5, train_top1=9.0, val_top5=20.0, lr=0.01)
    draw_curves(tmp_path / "curves.png", "resnet18, 32 px", [epoch_row(), second])
    assert_picture(tmp_path / "curves.png")
    losses, accuracies, rates = figures[0].axes
    assert lines_of(losses) == {"train loss": [4.512, 3.0], "validation loss": [4.389, 3.5]}
    assert lines_of(accuracies) == {
        "train top-1": [1.2, 9.0],
        "train top-5": [5.8, 5.8],
        "validation top-1": [1.5, 1.5],
        "validation top-5": [6.2, 20.0],
    }
    assert list(rates.lines[0].get_ydata()) == [0.1, 0.01]
    assert list(rates.lines[0].get_xdata()) == [1, 2]
    assert figures[0].get_suptitle() == "resnet18, 32 px"


def best_of(history, tmp_path, figures):
    """Where the best epoch is marked in both upper axes, and its entry in the legend."""
    draw_curves(tmp_path / "curves.png", "title", history)
    losses, accuracies, rates = figures[-1].axes
    marks = [
        [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        for ax in (losses, accuracies, rates)
    ]
    assert marks[0] == marks[1]
    assert not marks[2]
    entries = [text.get_text() for text in accuracies.get_legend().get_texts()]
    return marks[0], [entry for entry in entries if entry.startswith("best")]


@pytest.mark.parametrize(
    ("top1", "marks", "entries"),
    [
        ([1.5], [1], ["best: 1.50 % in epoch 1"]),
        ([1.5, 93.75, 20.0, 93.75], [2], ["best: 93.75 % in epoch 2"]),  # the first, as in best.pt
        ([None, 0.0, None], [2], ["best: 0.00 % in epoch 2"]),
        ([None, None], [], []),
    ],
)
def test_the_best_epoch_is_marked(tmp_path, figures, top1, marks, entries):
    history = [epoch_row(number, val_top1=value) for number, value in enumerate(top1, start=1)]
    assert best_of(history, tmp_path, figures) == (marks, entries)


def test_the_moving_average_s_epoch_is_the_best(tmp_path, figures):
    """As it is for best.pt: raw weights do not count."""
    history = [epoch_row(1, val_top1=80.0, **RAW), epoch_row(2, val_top1=70.0, **RAW)]
    history[1]["val_raw_top1"] = 90.0
    assert best_of(history, tmp_path, figures) == ([1], ["best: 80.00 % in epoch 1"])


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_legends_lie_beside_the_curves(tmp_path, figures, epochs):
    history = [epoch_row(number, **RAW) for number in range(1, epochs + 1)]
    draw_curves(tmp_path / "curves.png", "title", history)
    for ax in figures[0].axes[:2]:
        assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1
    ticks = figures[0].axes[-1].get_xticks()
    assert all(tick == round(tick) for tick in ticks), "there are no halves of epochs"


def test_the_footer_names_machine_and_versions(tmp_path):
    topology = read_topology(machines.write_machine(tmp_path, machines.SMT_FAR))
    footer = picture_footer(topology)
    assert footer.startswith("Example CPU @ 3.0GHz, 4 cores, 8 hardware threads; python ")
    assert f"torch {torch.__version__}, torchvision " in footer
    assert "\n" not in footer


MATRIX = torch.eye(2, dtype=torch.long)
PICTURES = {
    "timeline": lambda *args: draw_timelines(*args, [Panel("", PLAN, [step(1)])], FOOTER),
    "curves": lambda *args: draw_curves(*args, [epoch_row()], FOOTER),
    "gradients": lambda *args: draw_gradients(*args, [epoch_row()], FOOTER),
    "lr": lambda *args: draw_range_test(*args, RangeTest((0.1,), (1.0,), None), FOOTER),
    "confusion": lambda *args: draw_confusion(*args, MATRIX, ["a", "b"], FOOTER),
}
FOOTER = "Example CPU @ 3.0GHz, 64 cores, 128 hardware threads; " + 12 * "a package 1.2.3, "


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_has_its_footer_below_all_else(tmp_path, figures, name):
    PICTURES[name](tmp_path / f"{name}.png", "title")
    upper, lower = figures[0].figure.subfigs
    (text,) = lower.texts
    assert text.get_text().replace("\n", " ") == FOOTER.strip()
    box = text.get_window_extent()
    assert box.x1 <= lower.bbox.x1
    assert 0 <= box.y0 < box.y1 <= upper.bbox.y0 + 1
    assert upper.get_tightbbox().y0 * figures[0].figure.dpi >= upper.bbox.y0 - 1


def test_the_curves_of_one_epoch_without_validation(tmp_path, figures):
    draw_curves(tmp_path / "curves.png", "title", [epoch_row(**NO_VALIDATION)])
    assert_picture(tmp_path / "curves.png")
    losses, accuracies, _ = figures[0].axes
    assert lines_of(losses) == {"train loss": [4.512]}
    assert set(lines_of(accuracies)) == {"train top-1", "train top-5"}


def test_the_curves_of_raw_weights_from_the_epoch_on_that_has_them(tmp_path, figures):
    rows = [epoch_row(), epoch_row(2, **RAW), epoch_row(3, **RAW | {"val_raw_loss": 4.0})]
    draw_curves(tmp_path / "curves.png", "title", rows)
    losses, accuracies, _ = figures[0].axes
    assert lines_of(losses) == {
        "train loss": [4.512] * 3,
        "validation loss": [4.389] * 3,
        "raw validation loss": [None, 4.1, 4.0],
    }
    shown = lines_of(accuracies)
    assert shown["raw validation top-1"] == [None, 2.5, 2.5]
    assert "raw validation top-5" not in shown, "never measured"


def test_the_gradients(tmp_path, figures):
    history = [
        epoch_row(1, gradient_norms={}),
        epoch_row(2, gradient_norms={"stem": 0.0, "fc": 1.0}),
        epoch_row(3, gradient_norms={"stem": 0.5, "fc": 1e200}),
    ]
    draw_gradients(tmp_path / "gradients.png", "title", history)
    assert_picture(tmp_path / "gradients.png")
    (ax,) = figures[0].axes
    assert ax.get_yscale() == "log"
    shown = lines_of(ax)
    assert list(shown) == ["stem", "fc"]
    assert shown["stem"] == pytest.approx([math.nan, math.nan, 0.5], nan_ok=True)
    assert shown["fc"] == pytest.approx([math.nan, 1.0, 1e200], nan_ok=True)


PAIRS = Confusion({(0, 0): 3, (0, 1): 1, (2, 0): 2, (2, 2): 2})
CONFUSION = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
CLASSES = ("bee", "cat", "dog, wet")


def test_a_confusion_matrix_of_counted_pairs():
    assert torch.equal(confusion_matrix(PAIRS, 3), CONFUSION)
    assert confusion_matrix(Confusion(), 2).tolist() == [[0, 0], [0, 0]]


def test_a_confusion_matrix_drawn(tmp_path, figures):
    draw_confusion(tmp_path / "confusion.png", "title", CONFUSION, CLASSES)
    assert_picture(tmp_path / "confusion.png")
    ax = figures[0].axes[0]
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.5, 0, 0.5]]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {(0, 0): "3", (1, 0): "1", (0, 2): "2", (2, 2): "2"}
    assert [label.get_text() for label in ax.get_yticklabels()] == list(CLASSES)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")


def test_names_of_classes_are_no_formulas(tmp_path):
    draw_confusion(tmp_path / "c.png", "", torch.eye(2, dtype=torch.long), ["$x_$", "$^2$"])
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_confusion_matrix_of_many_classes_has_no_room_for_numbers(tmp_path, figures):
    names = [f"class {number}" for number in range(100)]
    draw_confusion(tmp_path / "confusion.png", "title", torch.eye(100).long(), names)
    assert_picture(tmp_path / "confusion.png")
    assert not figures[0].axes[0].texts


def test_a_confusion_matrix_as_text():
    assert confusion_csv(CONFUSION, CLASSES) == (
        'true class,bee,cat,"dog, wet"\nbee,3,1,0\ncat,0,0,0\n"dog, wet",2,0,2\n'
    )


def test_the_accuracy_of_each_class_with_the_worst_first():
    assert class_lines(PAIRS, CLASSES) == [
        "| class    | right | images right | images |\n"
        "| :------- | ----: | -----------: | -----: |\n"
        "| dog, wet | 50.0% |            2 |      4 |\n"
        "| bee      | 75.0% |            3 |      4 |"
    ]


def test_the_accuracy_of_classes_with_long_names_fits_80_columns():
    names = ["n" * 40, "m" * 41, "short"]
    confusion = Confusion({(index, index): 1_281_167 for index in range(3)})
    (table,) = class_lines(confusion, names)
    assert {len(line) for line in table.splitlines()} == {78}
    shown = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert shown == ["m" * 37 + "...", "n" * 40, "short"]


def test_of_many_classes_the_worst_are_shown():
    confusion = Confusion()
    for right in range(40):  # of 40 images each
        confusion.update({(right, right): right, (right, 0): 40 - right})
    table, note = class_lines(confusion, [f"class {number}" for number in range(40)])
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == [f"class {number}" for number in range(1, 31)]
    assert note == "(the worst 30 of 40 classes)"


def test_the_pairs_of_classes_that_are_confused_most():
    """Of equal ones those of the first classes."""
    confusion = PAIRS + Confusion({(1, 0): 1, (2, 1): 1, (1, 1): 9})
    assert pairs_csv(confusion, CLASSES) == (
        "true class,predicted class,images\n"
        '"dog, wet",bee,2\nbee,cat,1\ncat,bee,1\n"dog, wet",cat,1\n'
    )


def test_the_confused_pairs_in_a_file_for_programs_and_people():
    """The direction is kept, and each pair has a line of its own."""
    confusion = PAIRS + Confusion({(1, 0): 1, (1, 1): 5})
    text = confused_json(confusion, ("bee", "château", "dog"), "a.pt")
    assert json.loads(text) == {
        "checkpoint": "a.pt",
        "images": 14,
        "top1": 71.4286,
        "pairs": [
            {"true": "dog", "taken_for": "bee", "images": 2, "share": 0.5},
            {"true": "bee", "taken_for": "château", "images": 1, "share": 0.25},
            {"true": "château", "taken_for": "bee", "images": 1, "share": 0.1667},
        ],
    }
    first, *pairs, last = text.splitlines()
    assert (first, last) == (
        '{"checkpoint": "a.pt", "images": 14, "top1": 71.4286, "pairs": [',
        "]}",
    )
    assert pairs[1] == '{"true": "bee", "taken_for": "château", "images": 1, "share": 0.25},'


def test_without_a_mistake_no_pair_is_confused():
    text = confused_json(Confusion({(0, 0): 3, (2, 2): 1}), CLASSES, "a.pt")
    found = {"checkpoint": "a.pt", "images": 4, "top1": 100.0, "pairs": []}
    assert json.loads(text) == found


def test_of_many_pairs_the_worst_are_written():
    pairs = {(true, true + 1): images for true, images in enumerate(range(2000, 0, -1))}
    lines = pairs_csv(Confusion(pairs), range(2001)).splitlines()
    assert (len(lines), lines[1], lines[-1]) == (1001, "0,1,2000", "999,1000,1001")
    found = json.loads(confused_json(Confusion(pairs), range(2001), ""))["pairs"]
    assert len(found) == 1000
    assert found[-1] == {"true": 999, "taken_for": 1000, "images": 1001, "share": 1.0}


@pytest.mark.parametrize(
    ("largest", "written"),
    [(3, ["confusion.csv", "confusion.png"]), (2, ["confusion-pairs.csv"])],
)
def test_of_too_many_classes_for_a_matrix_the_worst_pairs(
    tmp_path, monkeypatch, capsys, largest, written
):
    set_everywhere(monkeypatch, "LARGEST_MATRIX", largest)
    folder = tmp_path / "out"
    write_confusion(folder, "title", PAIRS, CLASSES, "a.pt")
    assert sorted(path.name for path in folder.iterdir()) == ["confused.json", *written]
    assert (folder / "confused.json").read_text() == (confused_json(PAIRS, CLASSES, "a.pt"))
    text = (folder / written[0]).read_text()
    wide = written[0] == "confusion.csv"
    assert text == (confusion_csv(CONFUSION, CLASSES) if wide else pairs_csv(PAIRS, CLASSES))
    line = (
        f"{folder}/confusion-pairs.csv: the worst confusions; 3 classes are too many for a matrix\n"
    )
    assert capsys.readouterr().out == ("" if wide else line)


def test_a_range_test_drawn(tmp_path, figures):
    result = RangeTest((1e-6, 1e-3, 1.0), (2.0, 1.0, 5.0), 1e-4)
    draw_range_test(tmp_path / "lr.png", "title", result)
    assert_picture(tmp_path / "lr.png")
    (ax,) = figures[0].axes
    assert ax.get_xscale() == "log"
    assert lines_of(ax)["loss, smoothed"] == [2.0, 1.0, 5.0]
    assert list(ax.lines[1].get_xdata()) == [1e-4, 1e-4]
    assert ax.lines[1].get_label() == "suggestion: 0.0001"
    assert ax.get_ylim() == pytest.approx((0.9, 4.0)), "cut off where the loss explodes"


def test_a_run_s_pictures_name_its_machine(settings, tmp_path, monkeypatch):
    calls = {}
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):
        set_everywhere(monkeypatch, name, lambda *args, name=name: calls.update({name: args}))
    report = report_on(dataclasses.replace(settings, output_dir=tmp_path / "out"))
    report.step(step(1))
    report.epoch(epoch_row(), [epoch_row()])
    report.finish("finished")
    footer = picture_footer(read_topology())
    assert [calls[name][-1] for name in sorted(calls)] == [footer] * 3
    (panel,) = calls["draw_timelines"][2]
    assert panel.cores == read_topology().cores


def test_a_range_test_without_an_explosion_is_drawn_whole(tmp_path, figures):
    result = RangeTest((1e-6, 1e-3, 1.0), (2.0, 1.0, 3.5), 1e-4)
    draw_range_test(tmp_path / "lr.png", "title", result)
    low, high = figures[0].axes[0].get_ylim()
    assert low < 1.0
    assert high > 3.5


def test_a_range_test_without_a_suggestion_is_drawn_without_its_line(tmp_path, figures):
    result = RangeTest((1e-6, 1e-3, 1.0), (2.0, 1.9, 3.5), None)
    draw_range_test(tmp_path / "lr.png", "title", result)
    assert_picture(tmp_path / "lr.png")
    (line,) = figures[0].axes[0].lines
    assert line.get_label() == "loss, smoothed"


def test_a_curve_that_cannot_be_written(tmp_path):
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(RunError, match="curves.png: cannot be written: Is a directory"):
        draw_curves(tmp_path / "curves.png", "title", [epoch_row()])


# Output that cannot be written


@contextlib.contextmanager
def piped(monkeypatch):
    """Have a pipe as the process's own standard output; gives the descriptor to read from."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="ascii") as stream, monkeypatch.context() as patch:
        for name in ("stdout", "__stdout__"):
            patch.setattr(sys, name, stream)
        yield reading
        assert sys.stdout is stream
    with contextlib.suppress(OSError):
        os.close(reading)


def test_output_is_taken_as_long_as_somebody_reads_it(monkeypatch):
    with piped(monkeypatch) as pipe:
        sys.stdout.write("before\n")  # and still in its buffer
        with lossy_output():
            say("Bl\u00fcte")
            print("printed")
            assert os.read(pipe, 100) == b"before\nBl\\xfcte\nprinted\n"
            os.close(pipe)
            for _ in range(2):
                say("lost" * 50_000)
            print("lost", end="")


def test_output_beyond_what_a_pipe_holds_is_lost_where_writing_does_not_wait(monkeypatch):
    with piped(monkeypatch) as pipe, lossy_output():
        os.set_blocking(sys.stdout.fileno(), False)
        for _ in range(3):
            say("text" * 50_000)
        assert os.read(pipe, 4) == b"text"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_missing_stream_is_made_up_for_and_missing_again_in_the_end(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with lossy_output():
        say("lost", getattr(sys, name))
    assert getattr(sys, name) is None


def test_streams_of_somebody_else_stay(capsys):
    streams = sys.stdout, sys.stderr
    with lossy_output():
        assert (sys.stdout, sys.stderr) == streams
        print("shown")
    assert capsys.readouterr().out == "shown\n"
