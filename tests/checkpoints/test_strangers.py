"""Checkpoints that somebody else has made: whole, sealed, and not honest.

Run: python -m pytest tests/checkpoints/test_strangers.py
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from forging import sealed
from places import ROOT
from saved_runs import contents, output, state_of, step_of

from split_affinity.checkpoints.state import BadCheckpoint, read_checkpoint, seal
from split_affinity.options.saved import BEGUN, FIELDS, LEFT, SHOWN, TAKEN
from train_split_affinity import main

FORGERIES, MOST_BYTES = 300, 1e9


def forge(folder, change, name="last.pt"):
    """Change what a checkpoint holds, and seal it again."""
    path = folder / name
    state = torch.load(path, weights_only=True)
    change(state)
    path.unlink()  # best.pt may be the same file
    path.write_bytes(sealed(state))
    return path


def in_settings(**values):
    """A change of settings, in force and asked for."""
    return lambda state: [state[name].update(values) for name in ("settings", "asked")]


@pytest.mark.slow
def test_forged_checkpoints(trained, tmp_path):
    """Whatever part of a checkpoint is replaced, left out, added or blown up: one line, code 2,
    nothing written, and little memory.
    """
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "tests"))
    command = [sys.executable, Path(__file__).parent / "forging.py", trained / "last.pt", tmp_path]
    done = subprocess.run(
        [*map(str, command), str(FORGERIES)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    *rows, last = map(json.loads, done.stdout.splitlines())
    assert len(rows) == FORGERIES
    for row in rows:
        assert (row["code"], row["touched"]) == (2, []), row
        assert row["said"].startswith("train_split_affinity.py: error: "), row
        assert row["said"].count("\n") == 1, row
    assert last["peak_bytes"] < MOST_BYTES


def test_every_setting_is_either_brought_along_or_left():
    """Whoever adds an option decides which."""
    kinds = TAKEN, SHOWN, LEFT, BEGUN
    assert frozenset().union(*kinds) == FIELDS.keys()
    assert sum(map(len, kinds)) == len(FIELDS)
    for name in TAKEN:
        assert FIELDS[name].metadata["argument"].get("type") is not Path, name


def test_no_checkpoint_chooses_a_file_to_write(copied, in_tmp, capsys):
    """A log of that name would be run when Python starts the next time."""
    evil = in_tmp / "site-packages/evil.pth"
    evil.parent.mkdir()
    evil.write_text("import site\n")
    forge(copied, in_settings(log_file=str(evil), output_dir=str(evil.parent), json=str(evil)))
    assert main(["--resume", str(copied / "last.pt"), "--epochs", "3", "-j", "0"]) == 0
    assert contents(evil.parent) == {"evil.pth": b"import site\n"}
    assert step_of(copied) == 9
    assert Path("logs.md").exists()


def test_no_checkpoint_chooses_an_address(copied, in_tmp, capsys):
    (in_tmp / "mirror").mkdir()
    forge(copied, in_settings(mirror=f"file://{in_tmp / 'mirror'}", tensorboard=True, workers=9))
    assert main(["--resume", str(copied / "last.pt"), "--epochs", "3"]) == 0
    assert not list((in_tmp / "mirror").iterdir())
    ending = ": not taken from a checkpoint; give them again, if wanted"
    lines = capsys.readouterr().out.splitlines()
    (told,) = (line.removesuffix(ending) for line in lines if line.endswith(ending))
    assert set(told.split(", ")) == {"--log-file", "--mirror", "--tensorboard", "--workers"}
    assert not (copied / "tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "fp32\n# forged\n![](http://x/y.png)"),
        ("model", "resnet18\n# forged"),
        ("batch_size", 2**40),
        ("mean", (0.5, 0.5)),
        ("lr", float("nan")),
        ("forward_cores", "0-99999999"),
    ],
)
def test_settings_are_read_as_if_they_were_typed(copied, in_tmp, capsys, name, value):
    path = forge(copied, in_settings(**{name: value}))
    before = contents(copied)
    assert main(["--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: {path}: settings.{name}: ")
    assert error.count("\n") == 1
    assert contents(copied) == before
    assert not list(in_tmp.iterdir())


def test_a_file_that_is_read_has_to_be_named_again(copied, capsys):
    path = forge(copied, in_settings(teacher_weights="/etc/passwd", teacher="small"))
    assert main(["--resume", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: {path}: its run had --teacher-weights /etc/passwd; no "
        "checkpoint says which files are read: give that again\n"
    )


def test_the_images_of_a_checkpoint_are_read_alone(copied, in_tmp, capsys):
    """Digits would be written where there is nothing yet."""
    path = forge(copied, in_settings(dataset="digits", data_path=str(in_tmp / "new/place")))
    assert main(["--resume", str(path)]) == 2
    assert "its images are no longer in" in capsys.readouterr().err
    assert not list(in_tmp.iterdir())


def test_more_threads_than_cpus_are_not_taken(copied, in_tmp, capsys):
    path = forge(copied, in_settings(forward_threads=2**20, backward_threads=2**20))
    assert main(["--resume", str(path), "--epochs", "3"]) == 0
    assert state_of(copied)["settings"]["forward_threads"] < 2**20


def test_an_archive_that_grows_is_not_unpacked(tmp_path):
    """torch.load would: 40 KB to 40 MB here, and to as much as there is."""
    whole, packed = io.BytesIO(), io.BytesIO()
    torch.save({"format": "train_split_affinity 1", "x": torch.zeros(10**7)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w", 8) as small:
        for name in archive.namelist():
            small.writestr(name, archive.read(name))
    content = packed.getvalue()
    path = tmp_path / "last.pt"
    path.write_bytes(content + seal(hashlib.sha256(content)))
    with pytest.raises(BadCheckpoint, match=r"its entries claim 4\d{7} bytes, and it has \d{5}$"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", ["of another program", "sealed"])
def test_weights_that_claim_more_than_there_is(copied, in_tmp, capsys, arguments, kind):
    """13 TB of them, of which the file has four bytes."""
    vast = torch.zeros(1).expand(10**12, 3)
    if kind == "sealed":
        path = forge(copied, lambda state: state["model"].update({"0.weight": vast}))
    else:
        path = in_tmp / "weights.pth"
        torch.save({"0.weight": vast}, path)
    assert main([*arguments, "--init-from", str(path), *output(in_tmp / "out")]) == 2
    error = capsys.readouterr().err
    assert "0.weight claims 12000000000000 bytes, of which the file has 4\n" in error
    assert not (in_tmp / "out").exists()
