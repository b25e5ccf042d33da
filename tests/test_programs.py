"""The programs that make data and measure. Run: python -m pytest tests/test_programs.py"""

import re
import runpy
import sys
from pathlib import Path

import pytest
from patching import set_everywhere
from places import ROOT
from torchvision.datasets import CIFAR10

PROGRAMS = {"photos": 6, "cifar": 7}
MEASUREMENTS = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))


def file_of(name):
    folder = "benchmarks" if name in MEASUREMENTS else "tests"
    return ROOT / folder / f"{name}.py"


def run_program(monkeypatch, name, *arguments):
    """A program that stands beside the tests, or measures; its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file_of(name)), run_name="__main__")
        sys.exit(0)
    return ended.value.code


@pytest.mark.parametrize("name", [*PROGRAMS, *MEASUREMENTS])
def test_programs_explain_themselves(in_tmp, capsys, monkeypatch, name):
    assert run_program(monkeypatch, name, "--help") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: {name}.py [-h] ")
    docstring = file_of(name).read_text().partition('"""')[2]
    assert f"\n\n{docstring[:30]}" in captured.out
    assert captured.err == ""
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_beside_the_tests_say_what_they_lack(in_tmp, capsys, monkeypatch, name):
    assert run_program(monkeypatch, name) == 2
    assert "error: the following arguments are required: folder" in capsys.readouterr().err
    assert run_program(monkeypatch, name, "--unknown") == 2
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(("name", "files"), PROGRAMS.items())
def test_programs_beside_the_tests_make_their_data(in_tmp, monkeypatch, name, files):
    count = ["6"] if name == "photos" else []
    assert run_program(monkeypatch, name, "data", *count) == 0
    assert sum(path.is_file() for path in Path("data").rglob("*")) == files


def test_digits_like_cifar10_go_to_the_program_with_its_options(in_tmp, monkeypatch):
    commands = []
    set_everywhere(monkeypatch, "main", lambda arguments: commands.append(arguments) or 3)
    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))  # to be put back
    options = ["--recipe", "cifar10", "--epochs", "2", "--help"]
    assert run_program(monkeypatch, "cifar", "data", *options) == 3
    assert commands == [[*options, "--data-path", "data"]]


def test_each_measurement_has_a_line_and_a_command():
    """In the folder's README, as its docstring says."""
    readme = (ROOT / "benchmarks/README.md").read_text()
    for name in MEASUREMENTS:
        assert f"| [{name}.py]({name}.py) | " in readme
        command = rf"python benchmarks/{name}\.py"
        assert re.search(command, file_of(name).read_text())
        assert re.search(command, readme)
