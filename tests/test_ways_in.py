"""Ways to start the program beside the script of a clone: installed, as one file, by other start
methods of Python. Run: python -m pytest tests/test_ways_in.py
"""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT, SCRIPT
from small import read_metrics

import train_split_affinity as script

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

TORCHRUN = Path(sysconfig.get_path("scripts"), "torchrun")
TINY = "--model squeezenet1_1 --image-size 32 -b 2 --num-classes 3".split()


def run(*command, **options):
    """A process that has to end well; what it printed."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    """The program as one file, made as docs/install.md says, where no clone is near."""
    folder = tmp_path_factory.mktemp("server")
    page = (ROOT / "docs/install.md").read_text()
    (commands,) = re.findall(r"^```\n(rm .*?zipapp.*?)^```", page, re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / "train_split_affinity.py", folder)
    shutil.copytree(
        ROOT / "split_affinity",
        folder / "split_affinity",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    run("bash", "-euc", commands, cwd=folder)
    made = tmp_path_factory.mktemp("elsewhere") / "train_split_affinity.pyz"
    shutil.move(folder / made.name, made)
    shutil.rmtree(folder)
    return made


@pytest.mark.slow
def test_one_file_plans(pyz):
    printed = run(sys.executable, pyz, "plan", *TINY, cwd=pyz.parent)
    assert "model squeezenet1_1" in printed
    assert printed.splitlines()[0].startswith("plan --model squeezenet1_1 ")


def test_one_file_is_executable(pyz):
    assert os.access(pyz, os.X_OK)
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_one_file_ends_with_the_exit_code(pyz):
    done = subprocess.run([sys.executable, pyz, "--stepz", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train_split_affinity.py: error: unrecognized arguments: --stepz")


@pytest.mark.slow
def test_one_file_trains_with_loaders(pyz, photos, tmp_path):
    options = [*TINY, "--data-path", photos, "-j", "2", "--steps", "2", "--output-dir", "out"]
    printed = run(sys.executable, pyz, *options, cwd=tmp_path)
    assert "finished after 2 of 2 steps" in printed
    printed = run(sys.executable, pyz, "--resume", "out/last.pt", "--steps", "3", cwd=tmp_path)
    assert "resumed from out/last.pt, after step 2" in printed


@pytest.mark.slow
def test_one_file_compares_in_processes_of_its_own(pyz, tmp_path):
    options = [*TINY, "--quick", "--steps", "1", "-j", "0", "--json", "compared.json"]
    printed = run(sys.executable, pyz, "compare", *options, cwd=tmp_path)
    found = json.loads((tmp_path / "compared.json").read_text())
    assert {"plain", "none"} <= {way["way"] for way in found["ways"]}
    assert found["verdict"] in printed  # where others disturb it, that there is none


@pytest.mark.slow
def test_one_file_is_launched_by_torchrun(pyz, tmp_path):
    options = [*TINY, "--split", "none", "-j", "1", "--steps", "2"]
    printed = run(TORCHRUN, "--nproc-per-node", "2", pyz, *options, cwd=tmp_path)
    assert "finished after 2 of 2 steps" in printed
    assert printed.count("loading PyTorch") == 1


def test_the_script_alone_is_not_enough(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, tmp_path / SCRIPT.name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    error = "error: the folder split_affinity is not beside it"
    assert done.stderr == f"{tmp_path / SCRIPT.name}: {error}\n"


STARTED = """
import multiprocessing, sys
from train_split_affinity import main
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_loaders_under_each_start_method(photos, tmp_path):
    """Python 3.14 starts them by a forkserver. They make the same batches."""
    (tmp_path / "started.py").write_text(STARTED)
    options = [*TINY, "--data-path", photos, "-j", "2", "--steps", "3", "--output-dir", "out"]
    options += ["--auto-augment", "ra", "--mixup-alpha", "0.2", "--lr", "0.001"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def losses(method):
        folder = tmp_path / method
        folder.mkdir()
        command = [sys.executable, tmp_path / "started.py", method, *options]
        assert "finished after 3 of 3 steps" in run(*command, cwd=folder, env=environment)
        return [step["loss"] for step in read_metrics(folder / "out", "step")]

    with ThreadPoolExecutor() as threads:  # all at once, since most of it is loading PyTorch
        fork, forkserver, spawn = threads.map(losses, ("fork", "forkserver", "spawn"))
    assert fork == forkserver == spawn
    assert len(fork) == 3


def requirements(text):
    """The requirements of a file or of a list, without comments and without other files."""
    lines = (line.partition("#")[0].strip() for line in text)
    return {str(Requirement(line)) for line in lines if line and not line.startswith("-r")}


def test_extras_are_the_requirement_files():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    deploy = requirements((ROOT / "deploy/requirements.txt").read_text().splitlines())
    tests = requirements((ROOT / "tests/requirements.txt").read_text().splitlines())
    assert requirements(extras["deploy"]) == deploy
    names = "test", "heic", "timm", "tensorboard", "parquet"
    assert requirements(line for name in names for line in extras[name]) == tests


def test_ci_runs_each_test_once():
    """By the README's command, with the options of pyproject.toml, or by a call of its own."""
    usual = re.findall(r"-m '([^']+)'", (ROOT / "pyproject.toml").read_text())
    script = (ROOT / ".ci/run").read_text()
    others = re.findall(r'-m pytest .*-m "?([a-z ]+)"?$', script, re.MULTILINE)
    for slow, alone in itertools.product((False, True), repeat=2):
        marked = {"slow": slow, "alone": alone}
        chosen = [each for each in usual + others if eval(each, marked)]
        assert len(chosen) == 1, (marked, chosen)
    # The tests of deploy/ have one call, which leaves out nothing.
    for file in (ROOT / "tests/deploy").glob("*.py"):
        assert not re.search(r"mark\.(slow|alone)", file.read_text()), file


def test_readme_prints_the_commands_that_work():
    readme = (ROOT / "README.md").read_text()
    setup = "python3 -m venv .venv && .venv/bin/pip install -r"
    script = ".venv/bin/python train_split_affinity.py --batch-size 32 --steps 50"
    assert f"{setup} requirements.txt && {script}\n" in readme
    assert f"{setup} tests/requirements.txt && .venv/bin/python -m pytest\n" in readme


def script_metadata(text):
    """The TOML in a script's comments, found as PEP 723 has it found."""
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = (match for match in re.finditer(block, text) if match["type"] == "script")
    lines = found["content"].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


def test_the_script_says_what_it_needs():
    """As requirements.txt and the README say it, for `uv run` and the like."""
    text = SCRIPT.read_text()
    metadata = script_metadata(text)
    required = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in required]
    assert metadata["dependencies"] == [line for line in lines if line]
    least = metadata["requires-python"].removeprefix(">=")
    assert f"Python {least} or newer" in (ROOT / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == metadata["requires-python"]
    assert project["tool"]["ruff"]["target-version"] == f"py{least.replace('.', '')}"
    assert text.startswith("#!/usr/bin/env python3\n# /// script\n")
    assert ast.get_docstring(ast.parse(text)) == script.__doc__.rstrip(), "which still stands first"


def test_the_script_asks_for_the_build_of_pytorch_that_the_readme_names():
    uv = script_metadata(SCRIPT.read_text())["tool"]["uv"]
    (index,) = uv["index"]
    assert f"torch torchvision --index-url {index['url']}\n" in ((ROOT / "README.md").read_text())
    assert index["explicit"], "other packages come from where they always do"
    assert uv["sources"] == dict.fromkeys(("torch", "torchvision"), {"index": index["name"]})
