"""The operator's threads under gcc's sanitizers: no races, nothing beyond an array's end."""

import os
import shutil
import subprocess

import pytest
from places import ROOT

SOURCES = ROOT / "split_affinity" / "kernels"
# A thread sums the rows of another part as well: the sanitizer has to notice.
RACE = "int64_t begin = first_of(job->rows, job, part)", "int64_t begin = 0"


def build(folder, sanitizer):
    """The program of threads.c; skips the test if gcc has no such sanitizer."""
    gcc = shutil.which("gcc")
    if not gcc:
        pytest.skip("gcc is not installed")
    shutil.copy(ROOT / "tests" / "kernels" / "threads.c", folder)
    command = [gcc, "-O1", "-g", "-std=gnu11", "-Wno-psabi", f"-fsanitize={sanitizer}", "threads.c"]
    done = subprocess.run([*command, "-lm", "-pthread"], cwd=folder, capture_output=True, text=True)
    if "cannot find" in done.stderr:
        pytest.skip(f"gcc has no sanitizer {sanitizer}")
    assert done.returncode == 0, done.stderr
    return folder / "a.out"


def run(program):
    first = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=200, env=first)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_nothing_is_found(tmp_path, sanitizer):
    shutil.copy(SOURCES / "fused_norm.c", tmp_path)
    code, errors = run(build(tmp_path, sanitizer))
    assert (code, errors) == (0, "")


@pytest.mark.slow
def test_a_race_would_be_found(tmp_path):
    text = (SOURCES / "fused_norm.c").read_text()
    assert RACE[0] in text
    (tmp_path / "fused_norm.c").write_text(text.replace(*RACE))
    code, errors = run(build(tmp_path, "thread"))
    assert code != 0
    assert "data race" in errors
