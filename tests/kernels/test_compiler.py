"""Compiling on the user's machine: without a compiler, with a broken one, in foreign folders."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch  # noqa: F401  its OpenMP is what libraries are to find
from places import ROOT

from split_affinity.kernels import compiler
from split_affinity.kernels.compiler import CannotCompile, cache_folder, load_library

NAME = "fused_norm.c"
LOAD = f"""
import torch
from split_affinity.kernels.compiler import load_library
print(load_library("{NAME}").fused_norm_room(16, 1))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler, "compiler_options", lambda: ["-O0", "-fPIC", "-shared"])  # fast
    return tmp_path / "train-split-affinity"


@pytest.fixture
def calls(monkeypatch):
    """The commands given to the compiler."""
    found, run = [], compiler.run_compiler
    monkeypatch.setattr(
        compiler, "run_compiler", lambda command: (found.append(command), run(command))[1]
    )
    return found


def compiled(calls):
    """How often a source was compiled."""
    return sum("-shared" in call for call in calls)


def works(library):
    library.fused_norm_room.restype = ctypes.c_int64
    return library.fused_norm_room(ctypes.c_int64(16), ctypes.c_int64(1)) > 0


def test_a_library_is_compiled_once(cache, calls):
    assert works(load_library(NAME))
    assert works(load_library(NAME))
    assert compiled(calls) == 1
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0


def test_another_compiler_or_cpu_makes_another_library(cache, calls, monkeypatch):
    load_library(NAME)
    monkeypatch.setattr(compiler, "compiler_options", lambda: ["-O0", "-g", "-fPIC", "-shared"])
    load_library(NAME)
    assert compiled(calls) == 2
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_library_is_made_anew(cache, calls, tmp_path, monkeypatch):
    load_library(NAME)
    (file,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # a loaded one stays loaded
    file = tmp_path / "other" / cache.name / file.name
    file.parent.mkdir(0o700, parents=True)
    file.write_bytes(b"\x7fELF, but no more")
    assert works(load_library(NAME))
    assert compiled(calls) == 2
    assert file.stat().st_size > 10_000


def test_a_link_in_place_of_the_library_is_not_followed(cache, calls, tmp_path):
    load_library(NAME)
    (file,) = cache.iterdir()
    target = tmp_path / "elsewhere.so"
    file.rename(target)
    file.symlink_to(target)
    before = target.read_bytes()
    assert works(load_library(NAME))
    assert compiled(calls) == 2
    assert not file.is_symlink()
    assert target.read_bytes() == before


@pytest.mark.parametrize("way", ["open to others", "a link", "a file", "no folder possible"])
def test_a_folder_that_is_not_private_is_not_used(cache, calls, way, tmp_path, monkeypatch):
    if way == "open to others":
        cache.mkdir()
        cache.chmod(0o770)
    elif way == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "other")
    elif way == "a file":
        cache.write_text("")
    else:
        (tmp_path / "plain").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    with pytest.raises(OSError):  # noqa: PT011
        cache_folder()
    assert works(load_library(NAME))
    assert compiled(calls) == 1
    assert [each for each in tmp_path.rglob("*") if each.suffix in (".so", ".c")] == []


def test_a_full_disk_costs_the_cache_alone(cache, calls, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler, "keep_library", full)
    assert works(load_library(NAME))


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit 1", "cc fails: it fails"),
        ("echo 'x.c:1: error: no such \x1b[31mthing' >&2; exit 1", r"no such \\x1b"),
        (
            '[ $1 = --version ] && exit; while [ $1 != -o ]; do shift; done; echo nonsense > "$2"',
            "cannot be (loaded|read)|fails",
        ),
        ("sleep 60", "takes more than"),
        ("[ $1 = --version ]", "cc fails"),
    ],
    ids=["fails", "escapes", "garbage", "hangs", "compiles nothing"],
)
def test_a_broken_compiler(cache, tmp_path, monkeypatch, text, reason):
    monkeypatch.setenv("CC", script(tmp_path / "cc", text))
    monkeypatch.setattr(compiler, "COMPILING_S", 0.3)
    with pytest.raises(CannotCompile, match=reason) as caught:
        load_library(NAME)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_no_compiler(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCompile, match=r"there is no C compiler \(cc, gcc, clang\)"):
        load_library(NAME)
    monkeypatch.setenv("CC", "my-cc -m64")
    with pytest.raises(CannotCompile, match=r"there is no C compiler \(my-cc\)"):
        load_library(NAME)


def test_no_openmp_but_that_of_pytorch(cache, monkeypatch):
    """Another one would start threads of its own, on other cores perhaps."""
    monkeypatch.setattr(compiler.torch, "__file__", os.fspath(cache / "torch" / "__init__.py"))
    with pytest.raises(CannotCompile, match="OpenMP that PyTorch runs with"):
        load_library(NAME)


@pytest.mark.slow
def test_in_one_file(cache, tmp_path):
    """The C file is read from the .pyz, too."""
    packed = shutil.make_archive(str(tmp_path / "program"), "zip", ROOT, "split_affinity")
    environment = os.environ | {"PYTHONPATH": packed}
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_processes_that_compile_at_once(cache):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    ends = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ends
    assert len({printed for printed, _ in ends}) == 1
    assert [file.suffix for file in cache.iterdir()] == [".so"]
