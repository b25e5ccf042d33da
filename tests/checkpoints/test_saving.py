"""Saving: killed at any moment, on disks that take no more.

Run: python -m pytest tests/checkpoints/test_saving.py
"""

import contextlib
import errno
import functools
import io
import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from limits import files_up_to
from patching import set_everywhere
from saved_runs import (
    interrupt,
    output,
    picture,
    raise_,
    save_epochs,
    step_of,
    tiny_run,
    tiny_train_state,
    train_state_on,
)
from small import TINY
from torch import nn

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.state import Progress, read_checkpoint
from split_affinity.errors import RunError, Stopped
from split_affinity.files import append_text, write_where_asked, write_whole
from split_affinity.reports.log import LogSection
from split_affinity.reports.run_report import RunReport
from split_affinity.runs import evaluation
from split_affinity.training.update import TrainState
from train_split_affinity import main

# Killed inside a save


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it reaches the disk."""


def kill_at(patch, operation):
    """Kill this process, as far as the disk can tell, at the n-th thing that is done to files;
    what torch saves then is written by half.
    """
    left = itertools.count(operation - 1, -1)

    def mortal(real, last_words=None):
        def call(*args):
            remaining = next(left)
            if remaining == 0 and last_words:
                last_words(*args)
            if remaining <= 0:
                raise Killed
            return real(*args)

        return call

    def half(state, file):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])

    save = torch.save
    patch.setattr(torch, "save", mortal(save, half))
    for name in ("fsync", "replace", "rename", "unlink", "link"):
        patch.setattr(os, name, mortal(getattr(os, name)))


def at_each_operation(tmp_path, prepare, save):
    """Yield the folder that a kill at each operation of a save leaves, until none is left to do."""
    for operation in itertools.count(1):
        folder = tmp_path / str(operation)
        folder.mkdir()
        checkpoints = Checkpoints(tiny_run(folder, keep_best=2), pytest.fail)
        progress = prepare(checkpoints)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, operation)
            try:
                save(checkpoints, progress)
            except Killed:
                pass
            else:
                assert operation > 4
                return
        yield folder


def test_killed_at_any_moment_of_a_save(tmp_path):
    """Epochs 1 and 2 are saved whole, and epoch 3, the best, by a process that is killed."""

    def prepare(checkpoints):
        return save_epochs(checkpoints, Progress(), [50.0, 40.0])

    def save(checkpoints, progress):
        save_epochs(checkpoints, progress, [60.0])

    seen = set()
    for folder in at_each_operation(tmp_path, prepare, save):
        for path in folder.glob("*.pt"):
            read_checkpoint(path)
        warnings = []
        checkpoints = Checkpoints(tiny_run(folder, keep_best=2), warnings.append)
        path, state = checkpoints.newest_good()
        seen.add((path.name, state["progress"]["step"]))
        progress = Progress(**state["progress"])
        progress.step += 1
        progress.batches = 1
        checkpoints.save(tiny_train_state(), progress)
        assert step_of(folder) == state["progress"]["step"] + 1, "what is left does not disturb"
        assert warnings == []
    assert seen == {("last.pt", 20), ("previous.pt", 20), ("last.pt", 30)}


def test_killed_at_any_moment_of_the_save_after_a_damaged_one(tmp_path):
    """The good one before it must not be given up before there is a new one."""

    def prepare(checkpoints):
        for step in (1, 2):
            checkpoints.save(tiny_train_state(), Progress(step=step))
        (checkpoints.folder / "last.pt").write_bytes(b"damaged")
        return Progress(step=2)

    def save(checkpoints, progress):
        checkpoints.save(tiny_train_state(), Progress(step=3))

    for folder in at_each_operation(tmp_path, prepare, save):
        checkpoints = Checkpoints(tiny_run(folder), lambda text: None)
        assert checkpoints.newest_good()[1]["progress"]["step"] in (1, 3)


def test_names_that_a_kill_kept_from_being_given(in_tmp, monkeypatch, train):
    """Epoch 1 is the best one, and its file is what a run of weeks is made for."""
    with monkeypatch.context() as patch:
        set_everywhere(patch, "link_file", functools.partial(raise_, Killed()))
        with pytest.raises(Killed):
            train(in_tmp / "out", save_freq=1)
    assert [path.name for path in (in_tmp / "out").glob("*.pt")] == ["last.pt"]
    interrupt(monkeypatch, "update", [1])
    with pytest.raises(Stopped):
        train(in_tmp / "out", save_freq=1, resume=Path("auto"))
    for name in ("best.pt", "best-0001.pt", "epoch-0001.pt"):
        assert step_of(in_tmp / "out", name) == 3


# Disks that take no more


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch):
    warnings = []
    checkpoints = Checkpoints(tiny_run(tmp_path), warnings.append)
    for step in (1, 2):
        checkpoints.save(tiny_train_state(), Progress(step=step))
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", functools.partial(raise_, no_space))
        checkpoints.save(tiny_train_state(), Progress(step=3))
    assert warnings == [
        f"{tmp_path / 'last.pt'}: not saved: No space left on device; earlier checkpoints "
        "are untouched"
    ]
    assert (step_of(tmp_path), step_of(tmp_path, "previous.pt")) == (2, 1)
    assert not list(tmp_path.glob("*.tmp"))
    checkpoints.save(tiny_train_state(), Progress(step=3))
    assert (step_of(tmp_path), step_of(tmp_path, "previous.pt")) == (3, 2)


def test_a_limit_on_the_size_of_files_costs_no_checkpoint(tmp_path):
    """As `ulimit -f` sets it, or some clusters do."""
    warnings = []
    checkpoints = Checkpoints(tiny_run(tmp_path), warnings.append)
    checkpoints.save(tiny_train_state(), Progress(step=1))
    with files_up_to(1000):
        checkpoints.save(tiny_train_state(), Progress(step=2))
    (told,) = warnings
    assert told.startswith(f"{tmp_path / 'last.pt'}: not saved: ")
    assert told.endswith("; earlier checkpoints are untouched")
    assert step_of(tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp"))
    checkpoints.save(tiny_train_state(), Progress(step=3))
    assert (step_of(tmp_path), step_of(tmp_path, "previous.pt")) == (3, 1)


def test_a_clock_that_jumps_back_changes_nothing(tmp_path):
    """The newest is known by its name, not by its time."""
    checkpoints = Checkpoints(tiny_run(tmp_path), pytest.fail)
    for step in (1, 2):
        checkpoints.save(tiny_train_state(), Progress(step=step))
        os.utime(tmp_path / "last.pt", (2e9 - 1e8 * step,) * 2)
    assert checkpoints.newest_good()[0].name == "last.pt"
    assert (step_of(tmp_path), step_of(tmp_path, "previous.pt")) == (2, 1)


def patch_from_epoch_2(monkeypatch, patch, owner, error):
    """Have a function fail once the second epoch is finished: `patch` puts another in its place."""
    finish_epoch = evaluation.finish_epoch

    def finish(run, progress, report):
        finish_epoch(run, progress, report)
        if progress.epoch == 2:
            patch(*owner, functools.partial(raise_, error))

    set_everywhere(monkeypatch, "finish_epoch", finish)


@pytest.mark.parametrize(
    ("broken", "number", "reason"),
    [
        ("fsync", errno.EIO, "Input/output error"),
        ("save", errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_fails_while_the_run_goes_on(
    in_tmp, monkeypatch, capsys, arguments, broken, number, reason
):
    error = OSError(number, os.strerror(number))
    owner = os if broken == "fsync" else torch, broken
    patch_from_epoch_2(monkeypatch, monkeypatch.setattr, owner, error)
    assert main([*arguments, *output(in_tmp / "out")]) == 0
    captured = capsys.readouterr()
    assert f"last.pt: not saved: {reason}; earlier checkpoints are untouched" in captured.err
    assert "finished after 6 of 6 steps" in captured.out
    assert step_of(in_tmp / "out") == 3
    assert step_of(in_tmp / "out", "best.pt") == 3


def test_a_name_that_cannot_be_given_is_told(in_tmp, monkeypatch, capsys, arguments):
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    patch = functools.partial(set_everywhere, monkeypatch)
    patch_from_epoch_2(monkeypatch, patch, ["link_file"], error)
    options = [*arguments, *output(in_tmp / "out"), "--keep-best", "2"]
    assert main(options) == 0
    told = capsys.readouterr().err
    assert step_of(in_tmp / "out") == 6
    assert "best-0002.pt" in told
    assert "Disk quota exceeded" in told
    assert "last.pt: not saved" not in told


def test_a_written_file_that_reads_differently_is_not_kept(tmp_path, monkeypatch):
    """What the disk made of it is looked at before the name is given."""
    warnings = []
    checkpoints = Checkpoints(tiny_run(tmp_path), warnings.append)
    checkpoints.save(tiny_train_state(), Progress(step=1))
    fsync = os.fsync

    def forgetful(descriptor):
        os.pwrite(descriptor, bytes(100), 100)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", forgetful)
    checkpoints.save(tiny_train_state(), Progress(step=2))
    assert len(warnings) == 1
    assert "last.pt: not saved: " in warnings[0]
    assert "damaged" in warnings[0]
    assert os.listdir(tmp_path) == ["last.pt"]
    assert step_of(tmp_path) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB; unmounted in the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk):
    """Leave a disk no room at all."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_disk_that_fills_up(small_disk, capsys):
    """There is room for three checkpoints of 5.8 MB, and from step 5 on for two."""
    options = [*TINY, "--save-steps", "1", "--log-file", str(small_disk.parent / "logs.md")]
    options += ["--output-dir", str(small_disk / "out")]
    assert main([*options, "--steps", "4"]) == 0
    assert capsys.readouterr().err == ""
    (small_disk / "filler").write_bytes(bytes(8_000_000))
    options += ["--steps", "8", "--resume", "auto"]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert captured.err.count("last.pt: not saved: ") == 5, "after each step, and in the end"
    assert captured.err.count("; earlier checkpoints are untouched\n") == 5
    assert "finished after 8 of 8 steps" in captured.out
    assert step_of(small_disk / "out") == 4
    assert step_of(small_disk / "out", "previous.pt") == 3
    (small_disk / "filler").unlink()
    assert main(options) == 0
    assert step_of(small_disk / "out") == 8


def test_a_full_disk_is_called_full(small_disk):
    """torch's own message, of a larger file, is of unexpected positions."""
    (small_disk / "filler").write_bytes(bytes(20_000_000))
    warnings = []
    train_state = train_state_on(nn.Linear(2000, 1000))
    Checkpoints(tiny_run(small_disk), warnings.append).save(train_state, Progress(step=1))
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_nothing_at_all(small_disk, monkeypatch, capsys, arguments, trouble):
    """Not even a line of metrics: going on or not, the run says why, and loses nothing."""
    folder = small_disk / "out"
    options = [*arguments, "--output-dir", str(folder), "--save-steps", "1"]
    options += ["--log-file", str(small_disk.parent / "logs.md")]
    update, steps = TrainState.update, itertools.count(1)

    def spoil(self, *args):
        if next(steps) == 3:
            if trouble == "full":
                fill(small_disk)
            else:
                for kind in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
                    subprocess.run(["mount", *kind, str(folder)], check=True)
        update(self, *args)

    monkeypatch.setattr(TrainState, "update", spoil)
    main(options)
    if trouble == "read-only":
        subprocess.run(["umount", str(folder)], check=True)
    reason = "No space left" if trouble == "full" else "Read-only file system"
    assert reason in capsys.readouterr().err
    assert (step_of(folder), step_of(folder, "previous.pt")) == (2, 1)


WRITERS = {
    "whole.png": picture,
    "whole.json": lambda path: write_whole(path, "text" * 3000),
    "appended.md": lambda path: append_text(path, "text" * 3000, "header"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_has_whole_files_or_none(small_disk, name):
    """What was there before stays, though its room would do for a part of the new file."""
    (small_disk / "earlier").mkdir()
    earlier = small_disk / "earlier" / name
    earlier.write_text("earlier")
    fill(small_disk)
    for path in (small_disk / name, earlier):
        with pytest.raises(RunError, match=f"{path}: cannot be written: No space left"):
            WRITERS[name](path)
    assert earlier.read_text() == "earlier"
    left = {path.name: path.stat().st_size for path in small_disk.iterdir()}
    assert left.pop(name, 0) == 0 if name == "appended.md" else name not in left
    assert left.keys() == {"earlier", "filler"}
    assert [path.name for path in earlier.parent.iterdir()] == [name]
    (small_disk / "filler").unlink()
    WRITERS[name](earlier)
    assert earlier.stat().st_size > 4096


def test_a_full_disk_leaves_the_log_as_it_was(small_disk):
    path = small_disk / "logs.md"
    log = LogSection(path, "\n## heading\n\n", 2)
    log.begin()
    log.add_epoch("epoch: 1")
    before = path.read_text()
    fill(small_disk)
    with pytest.raises(RunError, match=f"{path}: cannot be written: No space left"):
        log.add_epoch("x" * 9000)
    assert path.read_text() == before
    (small_disk / "filler").unlink()
    log.add_epoch("epoch: 2")
    log.end("ended\n")
    assert path.read_text().endswith("\n```\nepoch: 1\nepoch: 2\n```\n\nended\n")


def test_the_report_of_a_run_on_a_full_disk(small_disk, monkeypatch, capsys):
    folder, finish = small_disk / "out", RunReport.finish
    folder.mkdir()
    for name in ("timeline.png", "trace.json"):
        (folder / name).write_text("earlier")
    monkeypatch.setattr(RunReport, "finish", lambda *args: (fill(small_disk), finish(*args)))
    set_everywhere(monkeypatch, "draw_timelines", lambda path, *_: picture(path))
    options = ["--log-file", str(small_disk.parent / "logs.md"), "--output-dir", str(folder)]
    assert main([*TINY, "--steps", "8", *options]) == 0
    error = capsys.readouterr().err
    for name in ("timeline.png", "trace.json"):
        assert f"warning: {folder / name}: cannot be written: No space left on device\n" in error
        assert (folder / name).read_text() == "earlier"
    names = {path.name for path in folder.iterdir()}
    assert names == {"last.pt", "metrics.jsonl", "timeline.png", "trace.json"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "c.json", tmp_path / "elsewhere/file"
    link.symlink_to("elsewhere/file")
    for text in ("new", "newer"):
        write_where_asked(link, text)
        assert (link.is_symlink(), file.read_text()) == (True, text)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_pipe_is_written_to():
    reading, writing = os.pipe()
    write_where_asked(Path(f"/dev/fd/{writing}"), "text\n")
    assert os.read(reading, 100) == b"text\n"
    os.close(reading)
    os.close(writing)
