"""Progress on the screen, and the end of a run.

Run: python -m pytest tests/reports/test_progress.py
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import re
import struct
import sys
import termios

import machines
import pytest
from made_up import LISTS, report_on
from patching import set_everywhere
from records import PLAN, step
from small import read_metrics
from tqdm import tqdm

from split_affinity.checkpoints.state import Progress
from split_affinity.machine.topology import read_topology
from split_affinity.reports.run_report import RunReport
from split_affinity.reports.tables import BAR, WIDE_COLUMNS, step_figures
from split_affinity.terminal import say, silenced_output, warn
from split_affinity.text import span_text

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
    text = step_figures(result, left_s, phases=columns - 1 >= WIDE_COLUMNS)
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
    line = f"step 450360/450360: {step_figures(result, left_s)}"
    assert line == f"step 450360/450360: {LONGEST}, 23h59m left"
    with_epoch = f"step 450360/450360: {step_figures(result, left_s, 'epoch 90/90: 59m59s')}"
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


def test_what_a_silent_rank_says_is_not_printed_into_the_bar_of_the_first(monkeypatch):
    """They are two processes on a terminal."""
    with terminal(80) as (stream, written):
        monkeypatch.setattr(sys, "stderr", stream)
        stream.write("\r|████  | 135/400, 19s left")  # of another process, which ends no line
        stream.flush()
        with silenced_output():
            warn("of a rank, " + 10 * "in many words ")
            print("partly, ", end="", file=sys.stderr)
            print("then whole", file=sys.stderr)
        stream.write("\r|████  | 136/400, 18s left")
        stream.flush()
        assert sys.stderr is stream
        lines = written().split("\n")
    bar, clear = "\r|████  | 135/400, 19s left", "\r\x1b[K"
    assert lines[0].startswith(f"{bar}{clear}warning: of a rank, in many words")
    assert lines[1].strip().startswith(("in", "many", "words"))
    assert lines[-2:] == [f"{clear}partly, then whole", "\r|████  | 136/400, 18s left"]
    assert sum(line.count(clear) for line in lines) == 2


def test_a_silent_rank_steers_nothing_but_a_terminal(capsys):
    with silenced_output():
        warn("of a rank")
    assert capsys.readouterr().err == "warning: of a rank\n"


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
