"""What options name and is not there, without PyTorch.

Run: python -m pytest tests/options/test_existence.py
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from places import SCRIPT

from split_affinity.data.image_folder import PictureFolder
from split_affinity.models.registry import OWN_MODELS, classifier_names
from split_affinity.options import existence
from split_affinity.options.existence import OWN_NAMES, torchvision_names
from train_split_affinity import main

LONG = "n" * 300
TOO_LONG = "File name too long"


def test_the_names_are_those_that_the_packages_have():
    assert tuple(OWN_MODELS) == OWN_NAMES
    assert [*OWN_NAMES, *sorted(torchvision_names())] == classifier_names()


@pytest.mark.parametrize("source", [None, "nothing of the kind"])
def test_a_torchvision_that_cannot_be_read_is_left_for_later(tmp_path, monkeypatch, source):
    package = tmp_path / "torchvision"
    if source:
        (package / "models").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "models/resnet.py").write_text(source)
    found = SimpleNamespace(origin=str(package / "__init__.py")) if source else None
    monkeypatch.setattr(existence.importlib.util, "find_spec", lambda name: found)
    assert torchvision_names() == []


MISSING = [
    (["--resume", "no.pt"], "no.pt: no such checkpoint"),
    (["predict", "a.jpg", "--resume", "no.pt"], "no.pt: no such checkpoint"),
    (["predict", "no.jpg", "--weights", "DEFAULT"], "no.jpg: no such file or folder"),
    (["--model", "resnet5"], "--model resnet5: unknown; did you mean resnet56"),
    (["--data-path", "no"], "--data-path no does not exist; give an image folder"),
    (
        ["--data-path", ".", "--class-weights", "balance"],
        "--class-weights balance: cannot be read: No such file or directory; did you mean balanced",
    ),
    (["--init-from", "no.pt"], "--init-from no.pt: cannot be read: No such file or directory"),
    (["--log-file", "no/logs.md"], "--log-file no/logs.md: cannot be written: No such file"),
    (["--data-path", LONG], f"--data-path {LONG}: cannot be read: {TOO_LONG}"),
    (["--output-dir", LONG], f"--output-dir {LONG}: cannot be written: {TOO_LONG}"),
    (
        ["--output-dir", LONG, "--resume", "auto"],
        f"--output-dir {LONG}: cannot be written: {TOO_LONG}",
    ),
    (["--log-file", LONG], f"--log-file {LONG}: cannot be written: {TOO_LONG}"),
    (["--resume", LONG], f"{LONG}: cannot be read: {TOO_LONG}"),
    (["compare", "--json", LONG], f"--json {LONG}: cannot be written: {TOO_LONG}"),
    (["predict", LONG, "--weights", "DEFAULT"], f"{LONG}: {TOO_LONG}"),
    (["--output-dir", "link"], "--output-dir link: cannot be written: link is a link to nowhere"),
    (["--output-dir", "link/a"], "--output-dir link/a: cannot be written: link is a link to no"),
]


@pytest.mark.parametrize(("arguments", "message"), MISSING)
def test_what_is_missing_is_told_before_pytorch_is_loaded(in_tmp, arguments, message):
    (in_tmp / "link").symlink_to("nowhere")
    command = [sys.executable, "-X", "importtime", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"train_split_affinity.py: error: {message}")
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| torch", "| numpy"))]
    assert [path.name for path in in_tmp.iterdir()] == ["link"]


def forbid(monkeypatch, path):
    """A folder that this process may not go through; root may go through all."""
    real = os.scandir

    def scandir(place="."):
        if os.fspath(place) == str(path):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("part", [".", "train", "train/flower"])
def test_a_folder_of_images_that_may_not_be_read(in_tmp, monkeypatch, capsys, photos, part):
    assert PictureFolder(photos / "train").classes == ["flower", "temple"]
    forbid(monkeypatch, photos / part)
    assert main(["--data-path", str(photos), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: --data-path {photos}: ")
    assert "Permission denied" in error
    assert error.count("\n") == 1
    assert not list(in_tmp.iterdir())
