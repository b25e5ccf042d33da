"""The pages' commands of deploy/. Run: python -m pytest tests/deploy/test_docs.py

Each runs as printed, but for what makes it short; tests/test_docs.py has those of the trainer, and
tests/readme.py those of the README.
"""

import re
import shlex
import shutil
from pathlib import Path

import demo
import export
import pytest
import report
import speed
from checkpoint import HERE

ROOT = HERE.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
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
    assert not Path("hf_space/examples").exists()  # nobody asked for them


def test_no_command_installs_the_pages_packages_beside_the_trainers():
    """Gradio would put an older Pillow in place of theirs."""
    told = export.told_of_page(Path("hf_space"), 0), demo.start_commands(Path())
    texts = [page.read_text() for page in PAGES] + ["\n".join(lines) for lines in told]
    found = re.findall(r"(\S*)pip install -r (\S*)requirements\.txt", "\n".join(texts))
    pages = [(pip, folder) for pip, folder in found if folder in ("", "hf_space/")]
    assert {*pages} == {(".venv/bin/", ""), ("hf_space/.venv/bin/", "hf_space/")}
    assert not [folder for _, folder in found if folder.endswith("space/") and folder[:3] != "hf_"]
