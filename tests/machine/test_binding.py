"""A libgomp that was there before Python began.

Run: python -m pytest tests/machine/test_binding.py
"""

import ctypes.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from places import ROOT, SCRIPT
from processes import run_script
from small import TINY, needs_two_cpus, read_metrics

from split_affinity import ALLOWED_CPUS
from split_affinity.machine import binding as module
from split_affinity.machine.binding import (
    binding_variables,
    libgomp_places,
    lists_cpus,
    unbound_ancestor,
)
from split_affinity.text import format_cpu_list

BUNDLED = sorted(Path(torch.__file__).parent.parent.glob("torch*/**/libgomp*.so*"))
LIBGOMP = ctypes.util.find_library("gomp") or next(map(str, BUNDLED), None)
ALL = format_cpu_list(ALLOWED_CPUS)

pytestmark = [
    pytest.mark.skipif(not LIBGOMP, reason="needs libgomp"),
    needs_two_cpus,
]
PLAN = ["plan", *TINY]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_PROC_BIND": "true"},
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores", "OMP_DYNAMIC": "true"},
        {"GOMP_CPU_AFFINITY": ALL},
    ],
)
def test_the_program_begins_anew_without_the_variables(in_tmp, variables):
    options = [*TINY, "-j", "1", "--steps", "2", "--output-dir", "out"]
    done = run_script(*options, LD_PRELOAD=LIBGOMP, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loading PyTorch") == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert sorted(warnings) == [
        f"warning: {name}={value} is ignored: lanes have their own threads"
        for name, value in sorted(variables.items())
    ]
    run, *steps, summary = read_metrics(in_tmp / "out")
    cpus = run["plan"]["forward"]["cpus"] + run["plan"]["backward"]["cpus"]
    assert sorted(cpus) == sorted(ALLOWED_CPUS)
    assert summary["stray_s"] == 0
    seen = {phase["phase"]: phase["seen_on"] for phase in summary["phases"]}
    assert seen["forward"] != seen["backward"]


@pytest.mark.parametrize(
    "variables",
    [{"GOMP_CPU_AFFINITY": str(max(ALLOWED_CPUS))}, {"OMP_PLACES": "threads(1)"}],
)
def test_a_mask_that_nobody_knows_any_more(in_tmp, variables):
    """Both groups would share the one core that is left."""
    ((name, value),) = variables.items()
    done = run_script(*TINY, "--steps", "1", LD_PRELOAD=LIBGOMP, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"train_split_affinity.py: error: {name}={value}: by it libgomp")
    assert done.stderr.endswith(f"; unset {name}\n")
    assert done.stderr.count("\n") == 1
    assert not list(in_tmp.iterdir())


def bound(command, **options):
    """A process that libgomp binds as it begins."""
    environment = os.environ | {"LD_PRELOAD": LIBGOMP, "OMP_PROC_BIND": "true"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, **options
    )


def test_as_a_module_with_options_and_standard_input(in_tmp):
    command = [sys.executable, "-X", "utf8", "-m", "split_affinity", *PLAN, "--data-path", "a b"]
    done = bound(command, cwd=ROOT, input="unread")
    assert done.returncode == 0, done.stderr
    assert f"allowed: {ALL}" in done.stdout
    assert "--data-path 'a b'" in done.stdout


@pytest.mark.parametrize("last", ["", "; true"])
def test_below_a_shell_that_has_been_bound(in_tmp, last):
    """It becomes the program, or starts it: either way it hands its mask on."""
    done = bound(["sh", "-c", f"'{sys.executable}' '{SCRIPT}' plan --split none{last}"])
    assert "OMP_PROC_BIND=true: by it libgomp" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == (0 if last else 2)


def test_below_a_torchrun_that_has_been_bound(in_tmp):
    """It loads torch, which brings libgomp: no LD_PRELOAD is needed for that."""
    torchrun = Path(sysconfig.get_path("scripts"), "torchrun")
    command = [torchrun, "--nproc-per-node", "2", SCRIPT, *TINY, "--steps", "1"]
    environment = os.environ | {"OMP_PROC_BIND": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train_split_affinity.py")]
    assert len(said) == 1, done.stderr
    assert "error: OMP_PROC_BIND=true: by it libgomp" in said[0]


def test_help_and_wrong_options_need_nothing(in_tmp):
    place = str(max(ALLOWED_CPUS))
    for options, code in ((["--help"], 0), (["--stepz", "3"], 2)):
        done = run_script(*options, LD_PRELOAD=LIBGOMP, GOMP_CPU_AFFINITY=place)
        assert done.returncode == code
        assert "GOMP" not in done.stderr


def test_it_begins_anew_once_at_most(monkeypatch):
    begun = []
    monkeypatch.setattr(module, "VARIABLES_HERE", {"OMP_PROC_BIND": "true"})
    monkeypatch.setattr(module, "loaded_libgomp", lambda process: "/lib/libgomp.so.1")
    monkeypatch.setattr(module, "libgomp_places", lambda library: [{cpu} for cpu in ALLOWED_CPUS])
    monkeypatch.setattr(module, "unbound_ancestor", lambda variables: (os.getpid(), False))
    monkeypatch.setattr(os, "execve", lambda *args: begun.append(args))
    module.begin_anew()
    ((path, command, environment),) = begun
    assert path == command[0] == sys.executable
    assert command[1:] == sys.orig_argv[1:]
    monkeypatch.setattr(module, "BEGUN_ANEW", "OMP_PROC_BIND=true")
    with pytest.raises(module.UserError, match="unset OMP_PROC_BIND"):
        module.begin_anew()
    assert len(begun) == 1
    monkeypatch.setattr(module, "VARIABLES_HERE", {"KMP_AFFINITY": "compact"})
    module.begin_anew()
    assert len(begun) == 1


def test_which_variables_bind_and_which_list_cpus():
    assert binding_variables({"OMP_DYNAMIC": "true"}) == {}
    assert binding_variables({"OMP_PROC_BIND": "FALSE", "OMP_PLACES": "cores"}) == {}
    assert binding_variables({"OMP_PLACES": "cores", "OMP_DYNAMIC": "1"}) == {"OMP_PLACES": "cores"}
    for places in ("cores", " sockets ", "LL_CACHES", ""):
        assert not lists_cpus({"OMP_PLACES": places})
    for places in ("cores(4)", "{0},{1}", "{0}:4:2", "0-3"):
        assert lists_cpus({"OMP_PLACES": places})
    assert lists_cpus({"GOMP_CPU_AFFINITY": "0-3"})
    assert not lists_cpus({"OMP_PROC_BIND": "true"})


def test_where_nothing_is_bound(monkeypatch):
    assert libgomp_places("") == libgomp_places("/nowhere/libgomp.so.1") == []
    assert unbound_ancestor(["OMP_PROC_BIND"]) == (os.getppid(), False)
