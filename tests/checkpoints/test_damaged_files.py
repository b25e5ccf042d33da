"""Damaged and foreign files. Run: python -m pytest tests/checkpoints/test_damaged_files.py"""

import hashlib
import io
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved_runs import (
    NO_MEMORY,
    contents,
    differences,
    fail_at,
    output,
    save_epochs,
    state_of,
    tiny_run,
)
from torch import nn

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.state import (
    CHECKPOINT_FORMAT,
    SEAL_BYTES,
    BadCheckpoint,
    Progress,
    read_checkpoint,
    seal,
)
from split_affinity.training.network import Network
from train_split_affinity import main

# Damaged and foreign files


def saved_by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def plain_zip(good):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    return file.getvalue()


def sealed(content):
    return content + seal(hashlib.sha256(content))


def changed_state(good, change):
    """A checkpoint with another content, as sound as any."""
    state = torch.load(io.BytesIO(good), weights_only=True)
    change(state)
    return sealed(saved_by_torch(state))


def flipped(content, position, bit):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def other_bit(part):
    """Change the lowest bit of the byte that comes after those bytes."""
    return lambda good: flipped(good, good.index(part) + len(part), 0)


def bit_of_a_weight(good):
    weight = torch.load(io.BytesIO(good), weights_only=True)["model"]["1.running_mean"]
    return other_bit(weight.numpy().tobytes()[:-1])(good)


def folder_for_a_weight(good):
    """In the archive's directory, call the entry with a weight's values a folder. The archive's own
    checksums still fit, and torch.load gives a tensor of whatever its memory held before.
    """
    entry = good.index(b"/data/0", good.index(b"PK\x01\x02")) - len("archive")
    damaged = flipped(good, entry - 8, 4)
    assert zipfile.ZipFile(io.BytesIO(damaged)).testzip() is None
    assert list(torch.load(io.BytesIO(damaged), weights_only=True)) == list(
        torch.load(io.BytesIO(good), weights_only=True)
    )
    return damaged


DAMAGES = {
    "empty": lambda good: b"",
    "one byte": lambda good: good[:1],
    "cut in half": lambda good: good[: len(good) // 2],
    "cut at the end": lambda good: good[:-1],
    "garbage": lambda good: b"no checkpoint " * 1000,
    "zeros": lambda good: bytes(len(good)),
    "a bit of the format": other_bit(b"train_split"),
    "a bit of a number": other_bit(b"loss_sum"),
    "a bit of a weight": bit_of_a_weight,
    "a bit of the archive's directory": folder_for_a_weight,
    "a bit of the seal": lambda good: flipped(good, len(good) - 10, 0),
    "no seal": lambda good: good[:-SEAL_BYTES],
    "a seal alone": lambda good: sealed(b""),
    "weights alone": lambda good: saved_by_torch(nn.Linear(2, 2).state_dict()),
    "sealed weights": lambda good: sealed(saved_by_torch(nn.Linear(2, 2).state_dict())),
    "a tensor": lambda good: sealed(saved_by_torch(torch.zeros(3))),
    "a whole model": lambda good: sealed(saved_by_torch(nn.Linear(2, 2))),
    "a class": lambda good: sealed(saved_by_torch({"format": CHECKPOINT_FORMAT, "path": Path()})),
    "a zip file": plain_zip,
    "a sealed zip file": lambda good: sealed(plain_zip(good)),
    "a pickle": lambda good: sealed(pickle.dumps({"format": CHECKPOINT_FORMAT}, 2)),
    "another format": lambda good: sealed(saved_by_torch({"format": "train_split_affinity 2"})),
    "a missing key": lambda good: changed_state(good, lambda state: state.pop("optimizer")),
    "an unknown key": lambda good: changed_state(good, lambda state: state.update(later=1)),
    "progress with a missing key": lambda good: changed_state(
        good, lambda state: state["progress"].pop("loss_sum")
    ),
    "progress with an unknown key": lambda good: changed_state(
        good, lambda state: state["progress"].update(later=1)
    ),
    "no progress": lambda good: changed_state(good, lambda state: state.update(progress=None)),
    "a weight that is no number": lambda good: changed_state(
        good, lambda state: state["model"]["0.weight"][3, 2, 1].fill_(math.nan)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files(copied, damage):
    """Named in one line; under auto the one before it is used."""
    bad = copied / "last.pt"
    content = damage(bad.read_bytes())
    bad.unlink()  # best.pt may be the same file
    bad.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=f"^{bad}: .") as caught:
        read_checkpoint(bad)
    assert "\n" not in str(caught.value)
    warnings = []
    path, state = Checkpoints(tiny_run(copied), warnings.append).newest_good()
    assert path == copied / "previous.pt"
    assert state["progress"]["epoch"] == 1
    assert warnings == [f"{caught.value}; the one before it is tried"]


def test_a_file_with_a_class_runs_none_of_its_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "last.pt").write_bytes(sealed(saved_by_torch(Bomb())))
    with pytest.raises(BadCheckpoint, match="plain data: .*getattr, which is not run$"):
        read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop("flow"), "flow is missing"),
        (lambda state: state.update(later=1), "later is unknown to this version"),
        (lambda state: state["progress"].pop("step"), "progress.step is missing"),
        (lambda state: state["progress"].update(x=1), "progress.x is unknown to this version"),
        (
            lambda state: state.update(format="train_split_affinity 12"),
            "made by a newer version of this program (format 12; this one: 1)",
        ),
        (
            lambda state: state.update(format="another 2"),
            "no checkpoint of this program (train_split_affinity 1)",
        ),
        (
            lambda state: state["model"]["1.running_var"].fill_(math.inf),
            "model.1.running_var holds values that are infinite or no numbers: the run had "
            "diverged",
        ),
    ],
)
def test_what_is_wrong_with_a_state(copied, capsys, arguments, change, fault):
    path = copied / "last.pt"
    content = changed_state(path.read_bytes(), change)
    path.unlink()
    path.write_bytes(content)
    assert main([*arguments, *output(copied), "--resume", str(path)]) == 2
    assert capsys.readouterr().err == f"train_split_affinity.py: error: {path}: {fault}\n"


def test_a_state_that_fits_no_optimizer_is_one_line(copied, capsys, arguments):
    path = copied / "last.pt"
    content = changed_state(
        path.read_bytes(), lambda state: state["optimizer"]["param_groups"].pop()
    )
    path.unlink()
    path.write_bytes(content)
    assert main([*arguments, *output(copied), "--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: {path} does not fit --model small")
    assert error.count("\n") == 1


def test_a_state_that_memory_cannot_hold_does_not_misfit(copied, capsys, arguments, monkeypatch):
    fail_at(monkeypatch, Network, "step_end", 1, NO_MEMORY)
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 2
    assert "error: not enough memory: can't allocate memory: " in capsys.readouterr().err


def test_checkpoints_from_before_the_data_was_saved(copied, arguments, trained, in_tmp):
    path = copied / "last.pt"
    content = changed_state(path.read_bytes(), lambda state: state.pop("data"))
    path.unlink()
    path.write_bytes(content)
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 0
    assert main([*arguments, "--test-only", "--resume", str(path)]) == 0


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_found(trained, part, bit):
    """Wherever it is."""
    good = (trained / "previous.pt").read_bytes()
    path = trained.parent / "flipped.pt"
    path.write_bytes(flipped(good, int(part * len(good)), bit))
    with pytest.raises(BadCheckpoint, match=f"^{path}: damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_torch_reads_a_checkpoint_as_it_is(trained):
    """The seal is no obstacle to who wants the weights without this program."""
    state = torch.load(trained / "last.pt", weights_only=True)
    assert differences(state, state_of(trained)) == []


@pytest.mark.parametrize("name", ["last.pt", "nowhere.pt", "."])
def test_resuming_a_bad_file_is_an_error(copied, capsys, arguments, name):
    path = copied / name
    (copied / "last.pt").write_bytes(b"damaged")
    before = contents(copied)
    assert main([*arguments, *output(copied), "--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: {path}: ")
    assert error.count("\n") == 1
    assert contents(copied) == before


def test_auto_names_the_damaged_one_and_goes_on_from_the_one_before(
    copied, trained, capsys, arguments
):
    (copied / "last.pt").unlink()
    (copied / "last.pt").write_bytes(b"damaged")
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {copied / 'last.pt'}: damaged, or no checkpoint")
    assert captured.err.count("\n") == 1
    assert f"resumed from {copied / 'previous.pt'}, after step 3\n" in captured.out
    assert differences(state_of(copied), state_of(trained)) == []


def test_auto_uses_the_newest_that_is_left(tmp_path):
    warnings = []
    checkpoints = Checkpoints(tiny_run(tmp_path, save_freq=2), warnings.append)
    save_epochs(checkpoints, Progress(), [50.0, 40.0, 30.0, 20.0, 10.0])
    for name, used in (
        ("last.pt", "previous.pt"),
        ("previous.pt", "epoch-0004.pt"),
        ("epoch-0004.pt", "best-0002.pt"),
        ("best-0002.pt", "epoch-0002.pt"),
    ):
        path = tmp_path / name
        path.unlink()
        path.write_bytes(b"damaged")
        warnings.clear()
        assert checkpoints.newest_good()[0].name == used
        assert path.name in warnings[-1]


def test_auto_with_nothing_good_left(copied, capsys, arguments):
    for path in copied.glob("*.pt"):
        path.write_bytes(b"damaged")
    before = contents(copied)
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_split_affinity.py: error: --resume auto: no good checkpoint; ")
    assert str(copied) in error
    assert contents(copied) == before


@pytest.mark.parametrize("exists", [True, False])
def test_auto_without_checkpoints_begins_anew(tmp_path, exists):
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "last.pt.tmp").write_bytes(b"half of a")
    assert Checkpoints(tiny_run(folder), pytest.fail).newest_good() is None
