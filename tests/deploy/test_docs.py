"""The pages' commands of deploy/. Run: python -m pytest tests/deploy/test_docs.py

Each runs as printed, but for what makes it short; tests/test_docs.py has those of the trainer.
"""

import re
import shlex
import shutil

import export
import pytest
import report
import speed
from checkpoint import HERE

ROOT = HERE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"report": report.main, "export": export.main}


def printed_commands() -> list[tuple[str, str]]:
    """The program and the arguments of each command, once, in the order of the pages."""
    pattern = re.compile(r"^(?:\.venv/bin/)?python deploy/(\w+)\.py (.*)$", re.MULTILINE)
    found = (pattern.findall(page.read_text()) for page in PAGES)
    return list(dict.fromkeys(command for commands in found for command in commands))


def test_the_pages_have_commands():
    assert {program for program, _ in printed_commands()} == set(PROGRAMS)


@pytest.mark.parametrize("command", printed_commands(), ids=" ".join)
def test_a_printed_command_runs(command, best, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(best.parent, "out/digits")
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "TURN_S", 0.01)
    program, arguments = command
    short = ["--formats", "onnx"] if program == "export" else ["--per-class", "0"]
    assert PROGRAMS[program]([*shlex.split(arguments), *short]) == 0, capsys.readouterr().err
