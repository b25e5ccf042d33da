"""logs.md, and files that are written. Run: python -m pytest tests/reports/test_log.py"""

import dataclasses
import errno
import fcntl
import html
import html.parser
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import cmarkgfm
import machines
import pytest
from cmarkgfm.cmark import Options
from limits import files_up_to
from made_up import LINE, epoch_row, report_on
from patching import set_everywhere
from places import ROOT
from records import PLAN, step, summarise
from rendered import lines_of_page, page_of

from split_affinity.checkpoints.state import Progress
from split_affinity.errors import RunError, UserError
from split_affinity.files import append_text, replace_text
from split_affinity.machine.plan import Host, plan_cores
from split_affinity.machine.topology import Core, Topology, host_kind, read_topology
from split_affinity.options.commands import parse_arguments
from split_affinity.options.existence import missing_places
from split_affinity.options.settings import Settings, as_options, plain_settings
from split_affinity.ranks.ranks import Ranks
from split_affinity.reports.contents import files_line, own_files
from split_affinity.reports.log import (
    LOG_HEADER,
    LogSection,
    log_heading,
    log_summary,
    where_logged,
)
from split_affinity.reports.tables import (
    cpu_table,
    epoch_line,
    memory_lines,
    phase_table,
    result_lines,
    summary_lines,
    tables_of_ranks,
)
from split_affinity.runs.setup import check_writable

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
    assert result_lines(progress) == []
    for top1 in (50.0, 98.765, 98.0):
        progress.end_epoch({"val_top1": top1}, keep_best=3)
    assert result_lines(progress) == ["best validation top-1: 98.77 % in epoch 2"]
    assert own_files(tmp_path / "nowhere") == []
    for name in ("metrics.jsonl", "last.pt", "curves.png", "best.pt", "mine.txt"):
        (tmp_path / name).touch()
    assert own_files(tmp_path) == ["best.pt", "last.pt", "curves.png", "metrics.jsonl"]
    assert files_line(tmp_path, ["best.pt", "last.pt"]) == f"files in {tmp_path}: best.pt, last.pt"
    (tmp_path / "tensorboard").mkdir()
    assert own_files(tmp_path, ["timeline.png"]) == (
        "best.pt last.pt curves.png timeline.png metrics.jsonl tensorboard".split()
    )


def test_the_files_of_an_output_folder_are_those_of_the_program(tmp_path):
    """All that it may have written there, in an order that is no alphabet's, and of nobody else."""
    names = """best.pt best-0008.pt best-0010.pt best-12345.pt last.pt previous.pt epoch-0005.pt
        epoch-0010.pt curves.png gradients.png timeline.png trace.json metrics.jsonl phases.csv
        phases.parquet operators.csv subset.json confusion.png confusion.csv confusion-pairs.csv
        confused.json lr.png""".split()
    names.append("traceback.txt")
    strangers = """best-8.pt best-0001.pt.tmp best-holiday.pt epoch-0001.png my-last.pt notes.md
        confusion.txt .lock worst-0008.pt""".split()
    for name in sorted([*names, *strangers]):
        (tmp_path / name).touch()
    assert own_files(tmp_path) == names
    for epoch in range(15, 101, 5):
        (tmp_path / f"epoch-{epoch:04}.pt").touch()
    few = [name for name in names if not name.startswith("epoch")]
    few.insert(few.index("curves.png"), "epoch-0005.pt to epoch-0100.pt (20 files)")
    assert own_files(tmp_path) == few


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


HEAD = ["h2", "ul", "details", "summary", "p", "p"]
TAIL = ["ul", "table", "details", "summary", "table"]


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


def log_on(path, number=0, epochs=1):
    """A section of a log, begun."""
    log = LogSection(path, f"\n## run {number}\n\n- settings\n\n", epochs)
    log.begin()
    return log


EPOCHS_OPEN = 10  # as many are seen at once, of more none


@pytest.mark.parametrize("epochs", [1, EPOCHS_OPEN, EPOCHS_OPEN + 1, 300])
def test_the_section_of_a_run_is_read_at_a_glance(settings, epochs):
    """However long it was, with many warnings; its cores and the phase table are seen."""
    report = report_on(dataclasses.replace(settings, epochs=epochs, output_dir=None))
    for epoch in range(1, epochs + 1):
        report.epoch(epoch_row(epoch), [epoch_row(epoch)])
    for number in range(9):
        report.warn(str(number), f"warning {number} " + "in many words " * 8)
    report.step(step(1))
    text = settings.log_file.read_text()
    assert text.count("train_loss") == epochs + 1, "a killed run's lines are there, too"
    report.finish("finished")
    section = settings.log_file.read_text().removeprefix(LOG_HEADER)
    assert lines_of_page(section) < 40
    tags = [tag for tag, _ in rendered(settings.log_file.read_text())]
    folded = ["details", "summary"] if epochs > EPOCHS_OPEN else []
    more = ["details", "summary", "ul"]
    assert tags == [*HEAD, *folded, "pre", "ul", "table", *more, *TAIL[2:]]
    assert section.count("warning: ") == 9
    seen = section.partition("<details>")[0]
    assert "\n- forward   cores 0, 1 thread: forward pass\n" in seen


def test_the_section_of_many_ranks_is_read_at_a_glance(settings):
    hosts = [Host("kernel", f"host {rank}", read_topology(), "2.0") for rank in range(64)]
    ranks = Ranks()
    ranks.size, ranks.hosts, ranks.plans = 64, hosts, [PLAN] * 64
    summary = dataclasses.replace(summarise([step(1)]), waited_s=(0.0,) * 64)
    text = log_heading(settings, settings, read_topology(), PLAN, ranks=ranks)
    text += log_summary(["outcome: finished"], summary, [], tables_of_ranks(hosts, [summary] * 64))
    assert all(f"- rank {rank} on host {rank}: forward cores 0" in text for rank in range(64))
    seen = text.partition("<details>")[0]
    assert "- rank 0 on host 0: forward cores 0" in seen
    assert lines_of_page(text) < 40
    assert page_of(text).tags.count("table") == 1 + 2 * 64


def test_a_section_leads_to_its_output_folder(tmp_path):
    """From where the log is; whatever the folder is called, it is nothing but a link's name."""
    settings = Settings(output_dir=tmp_path / "my_out](x) <b>`", log_file=tmp_path / "logs/log.md")
    (line,) = re.findall("^- output folder.*$", heading_of(settings), re.M)
    page = cmarkgfm.github_flavored_markdown_to_html(line, Options.CMARK_OPT_UNSAFE)
    assert page.count("<a href") == 1
    assert '<a href="../my_out%5D%28x%29%20%3Cb%3E%60">' in page
    assert html.escape(str(settings.output_dir)) in page
    folder = dataclasses.replace(settings, output_dir=tmp_path / "logs")
    assert f"\n- output folder: [`{tmp_path}/logs`](.)\n" in heading_of(folder)
    pipe = dataclasses.replace(settings, output_dir=Path("out"), log_file=Path(os.devnull))
    assert "\n- output folder: `out`\n" in heading_of(pipe)
    assert "output folder" not in heading_of(dataclasses.replace(settings, output_dir=None))


def heading_of(settings):
    return log_heading(settings, settings, read_topology(), PLAN)


def test_a_large_log_is_said_to_be_large(tmp_path, monkeypatch):
    path = tmp_path / "logs.md"
    assert where_logged(path) == [f"log in {path}"]
    path.write_bytes(b"x" * 2**20)
    assert where_logged(path) == [f"log in {path}"]
    append_text(path, "x" * 2**19)
    assert where_logged(path) == [
        f"log in {path}",
        f"note: {path} has 1.5 MiB; another name as --log-file begins a new one",
    ]


def test_the_log_of_the_repository_is_one_without_runs():
    """Yours has the sections of your runs; what git has must never change again."""
    assert (ROOT / "logs.md").read_text().partition("\n## 2")[0] == LOG_HEADER
    kept = subprocess.run(["git", "show", ":logs.md"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode == 0:  # no archive without history
        assert kept.stdout == LOG_HEADER


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
    path, open_file = tmp_path / "logs.md", os.open

    def protected(file, flags, *args, **kwargs):
        if file == path and flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return open_file(file, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", protected)
    path.write_text("mine\n")
    log = log_on(path)
    log.add_epoch("epoch: 1")
    log.end("- ended\n")
    assert path.read_text() == "mine\n\n## run 0\n\n- settings\n\nepoch: 1\n\n- ended\n"


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


def test_a_log_in_an_output_folder_that_will_be_made(tmp_path):
    folder = tmp_path / "out/photos"
    settings = Settings(log_file=folder / "log.md", output_dir=folder)
    check_writable(settings)
    assert [*missing_places("train", settings)] == []
    assert not list(tmp_path.iterdir())
    for other in (tmp_path / "out", folder / "below", None):
        elsewhere = dataclasses.replace(settings, output_dir=other)
        message = f"--log-file {settings.log_file}: cannot be written: No such file or directory"
        assert [*missing_places("train", elsewhere)] == [message]
        with pytest.raises(UserError, match=message):
            check_writable(elsewhere)


def test_settings_as_json(tmp_path):
    values = plain_settings(Settings(output_dir=tmp_path, forward_cores=(0, 1)))
    assert json.loads(json.dumps(values))["output_dir"] == str(tmp_path)
