"""What a run shows and writes. Run: python -m pytest tests/reports/test_run_report.py"""

import dataclasses
import math
import re

import pytest
from limits import files_up_to
from made_up import LINE, NO_VALIDATION, RAW, epoch_row, report_on
from patching import set_everywhere
from records import step, summarise
from small import read_metrics, scalars_in

from split_affinity.counters.memory import memory_by_node
from split_affinity.data.loader import LoaderDied
from split_affinity.data.pictures import BrokenImage
from split_affinity.errors import RunError, Stopped, UserError, likely_reason
from split_affinity.lanes.contention import Contention
from split_affinity.reports.log import LOG_HEADER
from split_affinity.reports.tables import (
    EPOCH_FIELDS,
    RAW_FIELDS,
    contention_texts,
    epoch_line,
    summary_lines,
)
from split_affinity.reports.tensorboard import EventFile
from split_affinity.text import utc_now


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


def test_the_log_shows_the_line_of_an_epoch_as_it_is_written():
    (line,) = re.findall(r"^```\n(.*)\n```$", LOG_HEADER, re.M)
    found = dict(re.findall(r"(\w+): ([\d.]+)%?  ", line))
    row = {name: float(found[name]) for name in EPOCH_FIELDS}
    assert epoch_line({"epoch": 12, **row, "timestamp": "2026-11-21T18:38:18Z"}) == line


def test_a_report_of_a_resumed_run(settings):
    report = report_on(settings, step=12, epoch=1, batches=4)
    (run,) = read_metrics(settings.output_dir)
    assert (run["type"], run["resumed_at_step"]) == ("run", 12)
    report.finish("finished")
    assert read_metrics(settings.output_dir, "summary")[0]["outcome"] == (
        "finished after 12 of 30 steps"
    )


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


def contention(end_s, stolen=0.0, seconds=1.0, **others):
    """What others took of some lanes in some seconds, by default in one."""
    return Contention(end_s - seconds, end_s, others, stolen)


@pytest.mark.parametrize(
    ("contention", "texts"),
    [
        (contention(1, forward=0.0, backward=0.019), []),
        (
            contention(1, forward=0.01, backward=0.47),
            ["other processes took 47 % of the backward cores"],
        ),
        (
            contention(1, 0.034, forward=1.0, backward=0.02),
            [
                "other processes took 100 % of the forward cores and 2 % of the backward cores",
                "the hypervisor took 3 %",
            ],
        ),
        (
            contention(1, 0.021, all=0.09),
            ["other processes took 9 % of all cores", "the hypervisor took 2 %"],
        ),
        (
            contention(1, 0.02, all=0.126),
            ["other processes took 13 % of all cores", "the hypervisor took 2 %"],
        ),
    ],
)
def test_what_others_took_in_words(contention, texts):
    assert list(contention_texts(contention, 0.02)) == texts
    summary = dataclasses.replace(summarise([step(1)]), contention=contention)
    alone = summary_lines(summarise([step(1)]))
    said = "; ".join(texts)
    if any(share >= 0.1 for share in contention.others.values()):  # beside the speed
        expected = [alone[0], f"{said}: these speeds and times do not count", *alone[1:]]
    else:
        expected = [*alone[:-1], said, alone[-1]] if said else alone
    assert summary_lines(summary) == expected


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
        report.step(
            dataclasses.replace(step(second), contention=contention(second, **none | share))
        )
        report.step(step(second))
    assert capsys.readouterr().err == "".join(f"warning: {text}\n" for text in warnings)
    report.finish("finished")
    log = settings.log_file.read_text()
    assert [line for line in log.splitlines() if BESIDE in line] == [
        f"- warning: {text}" for text in warnings
    ]


def test_others_beside_a_validation_count_too(settings, capsys):
    report = report_on(settings)
    report.step(dataclasses.replace(step(1), contention=contention(10, forward=0.0, seconds=10)))
    report.contention(contention(40, forward=0.4, seconds=30))
    report.contention(None)
    report.finish("finished")
    shown = capsys.readouterr()
    assert "other processes took 40 % of the forward cores in the latest 30 s: " in shown.err
    assert "other processes took 30 % of the forward cores: these speeds and times do" in shown.out
    (step_line,) = read_metrics(settings.output_dir, "step")
    (summary,) = read_metrics(settings.output_dir, "summary")
    assert step_line["contention"]["others"] == {"forward": 0.0}
    assert summary["contention"] == {
        "start_s": 0,
        "end_s": 40,
        "others": {"forward": pytest.approx(0.3)},
        "stolen": 0.0,
    }
    assert summary["memory_by_node"] == {
        str(node): size_bytes for node, size_bytes in memory_by_node().items()
    }
