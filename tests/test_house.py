"""The house itself: files that stay small, and what importing them does. import-linter checks the
floors (pyproject.toml). Run: python -m pytest tests/test_house.py
"""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
from places import ROOT, SCRIPT

MODULES = sorted((ROOT / "split_affinity").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
IMPORTABLE = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in MODULES
    if file.name != "__init__.py"
]
TOLD_IN_A_SENTENCE = ("start.py", "__main__.py")
# What the lanes have instead, and what libgomp would do to the main thread as torch is imported.
DROPPED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0"}


def lines_of(file):
    return len(file.read_text().splitlines())


def test_the_map_names_every_file_in_its_own_words():
    """docs/house.md has each file with the first paragraph of its docstring."""
    text = (ROOT / "docs/house.md").read_text()
    listed = re.findall(r"^\| \[\S+\]\(\.\./(split_affinity/\S+)\) \| (.*) \|$", text, re.MULTILINE)
    words = {
        str(file.relative_to(ROOT)): " ".join(
            ast.get_docstring(ast.parse(file.read_text())).partition("\n\n")[0].split()
        )
        for file in MODULES
        if file.name not in ("__init__.py", *TOLD_IN_A_SENTENCE)
    }
    assert dict(listed) == words


def test_files_can_be_entered():
    assert lines_of(SCRIPT) <= 400, "the story"
    assert [file for file in MODULES if lines_of(file) > 500] == []
    assert [file for file in TESTS if lines_of(file) > 1000] == []


def test_no_file_is_named_for_nothing():
    vague = {"utils", "util", "misc", "helpers", "common", "core", "base"}
    assert [file for file in (*MODULES, *TESTS) if file.stem in vague] == []


@pytest.mark.parametrize("file", MODULES, ids=lambda file: "/".join(file.parts[-2:]))
def test_each_module_says_what_it_is_for(file):
    empty = file.name == "__init__.py" and file.parent != ROOT / "split_affinity"
    if empty:
        assert file.read_text() == ""
    else:
        assert ast.get_docstring(ast.parse(file.read_text()))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "--help"], ["--version"], ["--list-data-sets"], ["--stepz", "3"]],
    ids=" ".join,
)
@pytest.mark.parametrize("program", [[str(SCRIPT)], ["-m", "split_affinity"]], ids=["script", "-m"])
def test_what_needs_no_pytorch_does_not_load_it(program, arguments):
    command = [sys.executable, "-X", "importtime", *program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    loaded = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert done.returncode == (2 if "--stepz" in arguments else 0)
    assert "split_affinity.options.settings" in loaded
    assert not {"torch", "torchvision", "numpy", "PIL", "psutil", "tqdm"} & loaded


# Imports each module in a process that knows none of them, and asks what the environment is when it
# asks for torch, which it does not get.
FIRST_IMPORT = """
import importlib, json, os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append(sorted(DROPPED & os.environ.keys()))
            raise ImportError("torch is not wanted here")
sys.meta_path.insert(0, Watch())
names, DROPPED, found = json.loads(sys.argv[1]), set(json.loads(sys.argv[2])), {}
for name in names:
    for known in [each for each in sys.modules if each.startswith(("split_affinity", "train_"))]:
        del sys.modules[known]
    os.environ.update(dict.fromkeys(DROPPED, "1"))
    seen = []
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert seen, (name, error)
    found[name] = seen
print(json.dumps(found))
"""


def test_variables_of_openmp_are_dropped_before_torch_whichever_module_comes_first():
    names = [*IMPORTABLE, "train_split_affinity"]
    arguments = [json.dumps(names), json.dumps(sorted(DROPPED))]
    command = [sys.executable, "-c", FIRST_IMPORT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == set(names)
    assert all(still_there == [] for seen in found.values() for still_there in seen)
    asked = {name for name, seen in found.items() if seen}
    assert {"train_split_affinity", "split_affinity.lanes.lane"} <= asked
    assert not any(name.startswith("split_affinity.options") for name in asked)


def on_terminal(command, **options):
    """What a process with standard error on a terminal prints there."""
    main_end, its_end = os.openpty()
    with os.fdopen(main_end, "rb", buffering=0) as screen:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=its_end, **options)
        os.close(its_end)
        printed = b""
        with contextlib.suppress(OSError):  # Linux's answer once nobody holds the other end
            while part := screen.read(4096):
                printed += part
    return done.stdout.decode(), printed.decode().replace("\r\n", "\n")


def test_the_first_line_says_what_was_asked_for(tmp_path):
    """It is there before PyTorch is, of which there is none here. What other programs may read has
    it on a terminal alone.
    """
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    for name in ("a b.jpg", "c.pt"):
        (tmp_path / name).touch()
    place = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}, "timeout": 60}
    loading = "; loading PyTorch, which takes some seconds"
    train = [sys.executable, SCRIPT, "--batch-size", "32", "--steps", "50"]
    done = subprocess.run(train, capture_output=True, text=True, **place)
    assert done.returncode == 2
    assert done.stdout == f"train --batch-size 32 --steps 50{loading}\n"
    assert done.stderr.count("\n") == 1
    assert "cannot load torch" in done.stderr
    predict = [sys.executable, SCRIPT, "predict", "a b.jpg", "--resume", "c.pt"]
    done = subprocess.run(predict, capture_output=True, text=True, **place)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "cannot load torch" in done.stderr
    stdout, screen = on_terminal(predict, **place)
    assert stdout == ""
    assert " ".join(screen.split()).startswith(f"predict 'a b.jpg' --resume c.pt{loading} ")
