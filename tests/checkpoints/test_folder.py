"""What is kept in an output folder, and whose it is.

Run: python -m pytest tests/checkpoints/test_folder.py
"""

import csv
import errno
import fcntl
import functools
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
from patching import set_everywhere
from places import SCRIPT
from saved_runs import (
    contents,
    differences,
    metrics,
    output,
    raise_,
    row_of,
    save_epochs,
    state_of,
    step_of,
    tiny_run,
    tiny_train_state,
)
from small import TINY

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.state import Progress
from split_affinity.errors import UserError
from split_affinity.files import LOCK, lock_folder
from split_affinity.options.settings import Settings
from split_affinity.reports.tables import result_lines
from train_split_affinity import main

# Evaluating a checkpoint


def test_test_only_gives_the_figures_of_the_epoch(trained, in_tmp, capsys, arguments):
    options = [*arguments, "--test-only", "--resume", str(trained / "last.pt")]
    assert main([*options, *output(in_tmp / "out")]) == 0
    printed = capsys.readouterr().out
    row = state_of(trained)["progress"]["history"][-1]
    assert f"{trained / 'last.pt'}: epoch 2, step 6\n" in printed
    precision = state_of(trained)["settings"]["precision"]
    assert (  # no top-5 of two classes
        f"12 images: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} % "
        f"(12 of the images were trained on), computed in {precision}\n"
        "raw, without the moving average: "
        f"loss {row['val_raw_loss']:.4f}, top-1 {row['val_raw_top1']:.2f} %\n" in printed
    )
    with (in_tmp / "out/confusion.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["true class", "flower", "temple"]
    assert [name for name, *_ in rows] == ["flower", "temple"]
    counts = [list(map(int, cells)) for _, *cells in rows]
    assert [sum(row) for row in counts] == [6, 6]
    assert counts[0][0] + counts[1][1] == round(row["val_top1"] * 12 / 100)
    assert sorted(path.name for path in (in_tmp / "out").iterdir()) == [
        "confused.json",
        "confusion.csv",
        "confusion.png",
    ]
    confused = json.loads((in_tmp / "out/confused.json").read_text())
    pairs = {(pair["true"], pair["taken_for"]): pair["images"] for pair in confused.pop("pairs")}
    wrong = {("flower", "temple"): counts[0][1], ("temple", "flower"): counts[1][0]}
    assert pairs == {pair: images for pair, images in wrong.items() if images}
    top1 = round(row["val_top1"], 4)
    assert confused == {"checkpoint": str(trained / "last.pt"), "images": 12, "top1": top1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "squeezenet1_1"], "--model squeezenet1_1: {} has small"),
        (["--num-classes", "5"], "--num-classes 5: {} has 2"),
    ],
)
def test_test_only_of_another_model(trained, capsys, arguments, changes, message):
    path = trained / "last.pt"
    assert main([*arguments, "--test-only", "--resume", str(path), *changes]) == 2
    error = f"train_split_affinity.py: error: {message.format(path)}\n"
    assert capsys.readouterr().err == error


def test_test_only_without_a_checkpoint(in_tmp, capsys, arguments):
    options = [*arguments, "--test-only", *output(in_tmp / "out")]
    assert main([*options, "--resume", "auto"]) == 2
    assert f"--test-only: no checkpoint in {in_tmp / 'out'}" in capsys.readouterr().err
    assert main([*options, "--resume", "nowhere.pt"]) == 2
    assert "error: nowhere.pt: no such checkpoint" in capsys.readouterr().err
    assert not list(in_tmp.iterdir())


# The names in the folder


@pytest.mark.parametrize("links", [True, False])
def test_which_checkpoints_are_kept(tmp_path, monkeypatch, links):
    """Of equal accuracies the earlier epoch is the better one."""
    if not links:  # some network disks
        error = OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", functools.partial(raise_, error))
    checkpoints = Checkpoints(tiny_run(tmp_path, keep_best=2, save_freq=3), pytest.fail)
    progress = Progress()
    for top1, best, kept in (
        (50.0, 1, ["best-0001.pt"]),
        (70.0, 2, ["best-0001.pt", "best-0002.pt"]),
        (60.0, 2, ["best-0002.pt", "best-0003.pt", "epoch-0003.pt"]),
        (70.0, 2, ["best-0002.pt", "best-0004.pt", "epoch-0003.pt"]),
        (20.0, 2, ["best-0002.pt", "best-0004.pt", "epoch-0003.pt"]),
        (80.0, 6, ["best-0002.pt", "best-0006.pt", "epoch-0003.pt", "epoch-0006.pt"]),
    ):
        progress.step += 10
        progress.end_epoch(row_of(progress.epoch + 1, top1), 2)
        checkpoints.save(tiny_train_state(), progress)
        epoch = progress.epoch
        expected = kept + ["best.pt", "last.pt"] + ["previous.pt"] * (epoch > 1)
        assert sorted(path.name for path in tmp_path.glob("*.pt")) == sorted(expected)
        assert step_of(tmp_path) == 10 * epoch
        assert step_of(tmp_path, "best.pt") == 10 * best
        for name in kept:
            assert step_of(tmp_path, name) == 10 * int(name[-7:-3])
        if epoch > 1:
            assert step_of(tmp_path, "previous.pt") == 10 * (epoch - 1)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt") == links


def test_of_equal_accuracies_the_lower_loss_is_kept(tmp_path):
    checkpoints = Checkpoints(tiny_run(tmp_path, keep_best=1), pytest.fail)
    progress = Progress()
    for loss, best in ((0.5, 1), (0.4, 2), (0.6, 2), (None, 2)):
        progress.step += 10
        progress.end_epoch(row_of(progress.epoch + 1, 70.0, val_loss=loss), 1)
        checkpoints.save(tiny_train_state(), progress)
        assert step_of(tmp_path, "best.pt") == 10 * best
        assert [path.name for path in tmp_path.glob("best-*")] == [f"best-000{best}.pt"]
    assert result_lines(progress) == ["best validation top-1: 70.00 % in epoch 2"]


def test_from_epoch_10000_on(tmp_path):
    """Names get a digit more, and count as the others do."""
    checkpoints = Checkpoints(tiny_run(tmp_path, keep_best=2, save_freq=1), pytest.fail)
    progress = Progress(epoch=9997)
    save_epochs(checkpoints, progress, [30.0, 20.0, 40.0, 50.0])
    best = sorted(path.name for path in tmp_path.glob("best-*"))
    assert best == ["best-10000.pt", "best-10001.pt"]
    for name in ("last.pt", "previous.pt", "epoch-10001.pt", "best-10001.pt"):
        (tmp_path / name).unlink()
    assert checkpoints.newest_good()[0].name == "best-10000.pt"
    (tmp_path / "best-10000.pt").unlink()
    assert checkpoints.newest_good()[0].name == "epoch-10000.pt"


def test_the_best_of_later_epochs_outlive_a_run_that_goes_on_from_an_earlier_one(tmp_path):
    """They are no longer in its list, but nobody asked for their removal."""
    checkpoints = Checkpoints(tiny_run(tmp_path, keep_best=1, save_freq=1), pytest.fail)
    save_epochs(checkpoints, Progress(), [50.0, 60.0, 70.0])
    progress = Progress(**state_of(tmp_path, "epoch-0001.pt")["progress"])
    save_epochs(checkpoints, progress, [40.0])
    assert (tmp_path / "best-0003.pt").exists()
    save_epochs(checkpoints, progress, [30.0])
    assert not (tmp_path / "best-0003.pt").exists(), "that was epoch 3 of this run, and no best"


def test_no_other_names_are_left(tmp_path):
    """The best epoch stays the same here: rename(2) between links to one file does nothing."""
    checkpoints = Checkpoints(tiny_run(tmp_path, save_freq=1), pytest.fail)
    save_epochs(checkpoints, Progress(), [50.0, 40.0])
    assert not list(tmp_path.glob("*.tmp"))


def test_saves_within_an_epoch_leave_the_best_alone(tmp_path):
    checkpoints = Checkpoints(tiny_run(tmp_path, save_freq=1), pytest.fail)
    progress = save_epochs(checkpoints, Progress(), [50.0])
    for _ in range(3):
        progress.add_step(images=4, loss=1.0, top1=1, top5=2, batches=1)
        checkpoints.save(tiny_train_state(), progress)
    names = ["best-0001.pt", "best.pt", "epoch-0001.pt", "last.pt", "previous.pt"]
    assert sorted(os.listdir(tmp_path)) == names
    steps = {"best.pt": 10, "epoch-0001.pt": 10, "last.pt": 13, "previous.pt": 12}
    for name, step in steps.items():
        assert step_of(tmp_path, name) == step


def test_files_of_other_names_are_left_alone(tmp_path):
    for name in ("best-mine.pt", "notes-1.txt"):
        (tmp_path / name).write_bytes(b"mine")
    checkpoints = Checkpoints(tiny_run(tmp_path, keep_best=1), pytest.fail)
    save_epochs(checkpoints, Progress(), [50.0, 60.0])
    for name in ("best-mine.pt", "notes-1.txt"):
        assert (tmp_path / name).read_bytes() == b"mine"


def test_a_state_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tiny_run(tmp_path), pytest.fail)
    progress = Progress(step=1)
    for _ in range(2):
        checkpoints.save(tiny_train_state(), progress)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_no_validation_means_no_best(tmp_path):
    checkpoints = Checkpoints(tiny_run(tmp_path, save_freq=2), pytest.fail)
    save_epochs(checkpoints, Progress(), [None, None])
    assert sorted(os.listdir(tmp_path)) == ["epoch-0002.pt", "last.pt", "previous.pt"]


def test_without_a_folder_nothing_is_saved(in_tmp):
    Checkpoints(Settings(), pytest.fail).save(tiny_train_state(), Progress(step=1))
    assert not list(in_tmp.iterdir())


# A folder belongs to one running process


def test_a_folder_belongs_to_one_process(tmp_path):
    folder = tmp_path / "out"
    first, second = (Checkpoints(tiny_run(folder), pytest.fail) for _ in range(2))
    first.lock()
    assert not folder.exists(), "nothing is made before the run is known to begin"
    first.lock(make=True)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            second.lock(make=True)
        assert str(caught.value).startswith(
            f"--output-dir {folder}: process {os.getpid()} on {platform.node()} is training there"
        )
    second.close()
    with pytest.raises(UserError):
        second.lock()
    first.close()
    assert not list(folder.iterdir())
    second.lock()
    second.close()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The one that had it ends between our opening the file and our locking it."""
    first = lock_folder(tmp_path)
    flock, calls = fcntl.flock, itertools.count(1)

    def late(file, operation):
        if next(calls) == 1:
            (tmp_path / LOCK).unlink()
            first.close()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_folder(tmp_path):
        assert next(calls) == 3
        with pytest.raises(UserError):
            lock_folder(tmp_path)


def test_a_file_system_without_locks_is_told(in_tmp, monkeypatch, capsys, arguments):
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def no_lock(file, operation):
        raise error

    monkeypatch.setattr(fcntl, "flock", no_lock)
    set_everywhere(monkeypatch, "WITHOUT_LOCK", set())
    assert main([*arguments, "--epochs", "1", *output(in_tmp / "out")]) == 0
    assert capsys.readouterr().err == (
        f"warning: {in_tmp / 'out'} cannot be locked (No locks available): see to it that no "
        f"other run is started there\nwarning: {in_tmp / 'logs.md'}: its file system has no locks "
        "(No locks available): it is written without a lock\n"
    )
    assert len(metrics(in_tmp / "out", "step")) == 3
    assert "images/s" in (in_tmp / "logs.md").read_text()
    assert step_of(in_tmp / "out") == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_second_run_is_refused_until_the_first_one_is_killed(
    in_tmp, photos, capsys, monkeypatch, workers
):
    """Its loader processes may outlive it for some seconds."""
    options = [*TINY, "-j", workers, "--data-path", str(photos), *output(in_tmp / "out")]
    options += ["--save-steps", "1", "--print-freq", "1", "--resume", "auto", "--steps"]
    with subprocess.Popen(
        [sys.executable, SCRIPT, *options, "100000"], stdout=subprocess.PIPE, text=True
    ) as process:
        next(line for line in process.stdout if line.startswith("step 2/"))
        before = (in_tmp / "out/metrics.jsonl").read_text()
        assert main([*options, "4"]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"train_split_affinity.py: error: --output-dir {in_tmp / 'out'}: process {process.pid} "
            f"on {platform.node()} is training there; wait for its end, or choose another folder\n"
        )
        process.kill()
        process.wait()
        assert (in_tmp / "out/metrics.jsonl").read_text().startswith(before)
        _, state = Checkpoints(tiny_run(in_tmp / "out"), pytest.fail).newest_good()
        assert main([*options, str(state["progress"]["step"] + 1)]) == 0


# New runs


@pytest.mark.parametrize("left", ["last.pt", "previous.pt", "best.pt", "best-0001.pt"])
def test_going_on_elsewhere_does_not_take_the_place_of_another_run(
    copied, trained, arguments, capsys, left
):
    """Nor of what is left of one."""
    for path in copied.glob("*.pt"):
        path.unlink()
    shutil.copy(trained / "last.pt", copied / left)
    before = contents(copied)
    resumed = str(trained / "previous.pt")
    assert main([*arguments, *output(copied), "--resume", resumed]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: --resume {resumed}: --output-dir {copied} has the "
        "checkpoints of another run: go on with that by --resume auto, or choose another folder\n"
    )
    assert contents(copied) == before


def test_going_on_in_a_folder_of_its_own(trained, in_tmp, arguments):
    resumed = str(trained / "previous.pt")
    assert main([*arguments, *output(in_tmp / "new"), "--resume", resumed]) == 0
    assert differences(state_of(in_tmp / "new"), state_of(trained)) == []


def test_a_new_run_does_not_take_the_place_of_an_earlier_one(copied, arguments, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert main([*arguments, *output(copied)]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: --output-dir {copied} has the checkpoints of an earlier "
        "run: go on with it by --resume auto, or choose another folder\n"
    )
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_one_command_starts_from_weights_and_goes_on_after_a_kill(trained, in_tmp, arguments):
    options = ["--init-from", str(trained / "last.pt"), "--resume", "auto", *output(in_tmp / "out")]
    assert main([*arguments, *options, "--steps", "3"]) == 0
    assert main([*arguments, *options]) == 0
    assert step_of(in_tmp / "out") == 6


def test_a_recipe_that_needs_weights_does_not_start_without(in_tmp, arguments, capsys):
    recipe = ["--recipe", "imagenet-full", "--resume", "auto", *output(in_tmp / "out")]
    assert (
        main([*arguments, *recipe, *"--accumulate 1 --drop-path 0 --lr-warmup-epochs 0".split()])
        == 2
    )
    text = f"starts from trained weights, and {in_tmp / 'out'} has none: give --init-from PATH"
    assert text in capsys.readouterr().err
    assert not list(in_tmp.iterdir())
