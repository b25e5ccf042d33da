"""--test-only. Run: python -m pytest tests/runs/test_evaluation.py"""

import functools
import re
import shutil
from pathlib import Path

import pytest
from rendered import lines_of_page
from small import TINY, read_metrics

from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.own import Hybrid
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.commands import parse_arguments
from train_split_affinity import main, train


def test_test_only(in_tmp, photos_with_val, capsys):
    arguments = [*TINY, "--data-path", str(photos_with_val), "--output-dir", "out"]
    assert main([*arguments, "--epochs", "1"]) == 0
    (row,) = read_metrics(Path("out"), "epoch")
    before = {path: path.stat().st_mtime_ns for path in in_tmp.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*arguments, "--test-only", "--resume", "auto"]) == 0
    captured = capsys.readouterr()
    assert "out/last.pt: epoch 1, step 6\n" in captured.out
    assert f"12 images: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %" in captured.out
    assert "| class" in captured.out
    assert "moving average" not in captured.out
    known = "out/last.pt was trained on all of these 12 images: the figures do not say how good"
    assert captured.err.startswith(f"warning: {known}"), "train and val are copies"
    assert captured.err.count("\n") == 1
    after = {path: path.stat().st_mtime_ns for path in in_tmp.rglob("*") if path.is_file()}
    names = ["confusion.png", "confusion.csv", "confused.json"]
    assert {path.name for path in after.keys() - before.keys()} == {*names}
    assert f"\n\nfiles in out: {', '.join(names)}\nlog in logs.md\n" in captured.out
    log, earlier = in_tmp / "logs.md", before.pop(in_tmp / "logs.md")
    assert earlier < after[log]
    assert before.items() <= after.items(), "nothing else is touched"
    section = log.read_text().rpartition("\n## ")[2]
    assert re.match(r"\S+Z squeezenet1_1, tested\n\n- machine: ", section)
    assert "\n- tested: out/last.pt: epoch 1, step 6; 32 px, " in section
    assert f"\n- 12 images: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %" in section
    assert "\n- output folder: [`out`](out)\n" in section
    assert f"\n- files: {', '.join(names)}\n" in section
    (table,) = re.findall(r"\n\n(\| class.*?)\n\n", captured.out, re.S)
    assert f"\n\n{table}\n\n<details>" in section
    assert lines_of_page(f"## {section}") < 40


def test_test_only_tells_of_broken_images(in_tmp, photos_with_val, tmp_path, capsys):
    data = shutil.copytree(photos_with_val, tmp_path / "data")
    arguments = [*TINY, "--data-path", str(data), "--output-dir", "out"]
    assert main([*arguments, "--steps", "1"]) == 0
    broken = data / "val/flower/0001.jpg"
    broken.write_bytes(b"no picture")
    options = ["--test-only", "--resume", "auto", "--max-bad-images", "1"]
    assert main([*arguments, *options]) == 0
    captured = capsys.readouterr()
    assert "\n11 images: loss " in captured.out
    assert "no confusion matrix" not in captured.out
    assert f"broken image {broken}: " in captured.err


def test_test_only_says_that_no_matrix_is_drawn_without_a_folder(in_tmp, photos_with_val, capsys):
    arguments = [*TINY, "--data-path", str(photos_with_val)]
    assert main([*arguments, "--steps", "1", "--output-dir", "out"]) == 0
    before = sorted(in_tmp.rglob("*"))
    resumed = ["--test-only", "--resume", "out/last.pt"]
    _, settings = parse_arguments([*arguments, *resumed])
    topology = read_topology()
    train(settings, topology, plan_cores(topology, settings))
    note = "\nnote: no confusion matrix is drawn without --output-dir\n"
    assert capsys.readouterr().out.endswith(note)
    assert sorted(in_tmp.rglob("*")) == before
    assert main([*arguments, *resumed]) == 0
    assert note not in capsys.readouterr().out, "as the saved run had a folder"
    assert {path.name for path in in_tmp.rglob("*")} >= {"confusion.csv", "confusion.png"}


@pytest.mark.parametrize("options", [["--test-only"], ["--epochs", "2"]])
def test_a_checkpoint_for_another_image_size(in_tmp, photos_with_val, capsys, monkeypatch, options):
    """Positions of a transformer are made for one size."""
    tiny = functools.partial(Hybrid, channels=(8, 16, 24, 32), width=32, blocks=1)
    monkeypatch.setitem(OWN_MODELS, "hybrid", tiny)
    arguments = ["--model", "hybrid", "-b", "4", "-j", "0", "--epochs", "1"]
    arguments += ["--data-path", str(photos_with_val), "--output-dir", "out"]
    assert main([*arguments, "--image-size", "32"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--image-size", "64", "--resume", "auto", *options]) == 2
    error = capsys.readouterr().err
    assert "--image-size 64" in error
    assert error.count("\n") == 1


def test_test_only_needs_validation_images(in_tmp, photos, capsys):
    arguments = [*TINY, "--data-path", str(photos), "--output-dir", "out"]
    assert main([*arguments, "--steps", "1"]) == 0
    assert main([*arguments, "--test-only", "--resume", "auto"]) == 2
    assert capsys.readouterr().err == (
        "train_split_affinity.py: error: --test-only needs validation images "
        "(DIR/val/<class>/*.jpg, or --val-share)\n"
    )
