"""Systems that hide files, or refuse calls.

Run: python -m pytest tests/machine/test_odd_systems.py
"""

import errno
import os
import time
from pathlib import Path

import machines
import psutil
import pytest
from odd_systems import GET_AFFINITY, SET_AFFINITY, run_oddly
from patching import set_everywhere
from places import SCRIPT
from small import TINY, needs_two_cpus, read_metrics

from split_affinity import ALLOWED_CPUS, affinity_refusal, process_cpus
from split_affinity.compare.rounds import free_memory_bytes
from split_affinity.data.loader import open_files
from split_affinity.errors import RunError
from split_affinity.lanes.audit import cpu_busy_s, cpu_times, hidden_figures
from split_affinity.lanes.contention import read_usage
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.topology import read_memory, read_quota, read_topology
from split_affinity.text import format_cpu_list

TWO_STEPS = [SCRIPT, *TINY, "--steps", "2"]
ODD_MOUNTS = [
    "36 24 0:31 / /mnt rw shared:7 - tmpfs  rw,size=1k",  # without a source
    "37 24 0:32 / /mnt/a\\040b rw - tmpfs tmpfs rw",
    "38 24 0:33 / /mnt/\x0b\x0c\x85\u2028 rw - tmpfs \x1c rw",  # what Python takes for line ends
    "39 24 0:34 / /mnt/x rw - fuse.sshfs you@there: rw",
    "40 24 0:35 / /mnt/cut",
    "41",
    "",
]


@pytest.mark.parametrize("odd", ODD_MOUNTS)
def test_odd_mounts_hide_no_limits(tmp_path, odd):
    usual = machines.CGROUP_V2["proc/self/mountinfo"]
    files = machines.CGROUP_V2 | {
        "proc/self/mountinfo": f"{odd}\n{usual}{odd}\n",
        "sys/fs/cgroup/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/memory.max": "1000000\n",
    }
    machines.write_machine(tmp_path, machines.TWO, files)
    assert (read_quota(tmp_path), read_memory(tmp_path)) == (2.5, 1000000)


def test_a_cgroup_below_a_mount_with_blanks(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a b/\x85job\n",
        "proc/self/mountinfo": "35 24 0:30 / /cg\\040roup\\134 rw - cgroup2  rw\n",
        "cg roup\\/a b/\x85job/cpu.max": "150000 100000\n",
    }
    machines.write_files(tmp_path, files)
    assert read_quota(tmp_path) == 1.5


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "0::\n", "\x0b:\n::\n", "0::/batch\nx\n"])
def test_odd_cgroups_are_no_limits(tmp_path, text):
    files = machines.CGROUP_V2 | {"proc/self/cgroup": text}
    machines.write_machine(tmp_path, machines.TWO, files)
    assert read_quota(tmp_path) is None


def test_a_machine_without_any_files(tmp_path):
    topology = read_topology(tmp_path, frozenset({0, 3}))
    assert topology.online == (0, 3)
    assert (topology.cpu_model, topology.quota_cpus) == ("unknown CPU", None)


def warnings_of(done):
    return [line for line in done.stderr.splitlines() if line.startswith("warning: ")]


NO_TIMES = f"/proc/stat shows the times of 0 of {os.cpu_count()} CPUs"


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize(
    ("what", "warned"),
    [
        ("a mount without a source", []),
        ("no /sys", []),
        ("empty /proc/stat", [NO_TIMES]),
        ("no /proc", [NO_TIMES, "/proc/self/task does not show the process's threads"]),
    ],
)
def test_a_run_where_something_is_hidden(in_tmp, what, warned):
    """What cannot be read is missing, and said once; all figures of the training are there."""
    options = ["-j", "1", "--output-dir", "out", "--accumulate", "2", "--schedule", "overlap"]
    done = run_oddly(what, *TWO_STEPS, *options)
    assert done.returncode == 0, done.stderr
    found = warnings_of(done)
    assert len(found) == len(warned)
    for text, start in zip(found, warned, strict=True):
        assert text.startswith(f"warning: {start}")
    assert "finished after 2 of 2 steps" in done.stdout
    _, *steps, summary = read_metrics(in_tmp / "out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(phase["busy"] < 1.5 for phase in summary["phases"]), "each lane's own time"
    seen = "no work strayed" if what != "no /proc" else "stray time unknown: the system does not"
    assert seen in done.stdout
    if NO_TIMES in warned:
        assert summary["contention"] is None


def test_without_proc_no_memory_counts_as_free(monkeypatch, tmp_path):
    """A comparison then gives memory back after each round."""
    assert free_memory_bytes() > 0
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert free_memory_bytes() == 0
    (tmp_path / "meminfo").touch()
    assert free_memory_bytes() == 0


def test_open_files_are_counted_without_proc(monkeypatch, tmp_path):
    assert 3 <= open_files() < 3000
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert 3 <= open_files() < 3000


@pytest.mark.parametrize(
    "text", [None, "", "cpu\n", "cpu 1\ncpu0 1\n", "cpu 1\ncpu0 x y\n", "\n\n"]
)
def test_odd_cpu_times_are_none(monkeypatch, tmp_path, text):
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert cpu_times() == cpu_busy_s() == []
    usage = read_usage()
    assert usage.busy_s == usage.stolen_s == []


@needs_two_cpus
def test_what_is_hidden_is_said_once(monkeypatch, tmp_path, split_plan, one_lane_plan):
    online = read_topology().online
    assert not [*hidden_figures(split_plan, online)]
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    set_everywhere(monkeypatch, "thread_ids", list)
    with Lanes(split_plan, online) as lanes:
        times, threads = lanes.notes
    assert times.startswith(NO_TIMES)
    assert threads == "/proc/self/task does not show the process's threads: stray time is unknown"
    assert [*hidden_figures(one_lane_plan, online)] == [times], "one lane has nowhere to stray"


@needs_two_cpus
def test_the_lanes_own_time_is_told_apart_without_proc(monkeypatch, split_plan):
    """Python's threads have clocks; what is in none of them is that of the phase's workers."""
    with Lanes(split_plan, read_topology().online) as lanes:
        set_everywhere(monkeypatch, "thread_ids", list)
        set_everywhere(monkeypatch, "last_cpu", lambda tid: [][0])
        both = [lane.submit("forward", burn) for lane in (lanes.forward, lanes.backward)]
        [each.result() for each in both]
        records = lanes.take_records()
    for record in records:
        assert 0.05 < record.cpu_s < 0.1
        assert (record.stray_s, record.seen_on) == (0, frozenset())


def burn():
    """Use CPU time, in one thread."""
    start_s = time.thread_time()
    while time.thread_time() - start_s < 0.06:
        pass


# Affinity that a filter of system calls refuses

REFUSED = {
    f"{SET_AFFINITY}={errno.EPERM}": "sched_setaffinity: Operation not permitted",
    f"{SET_AFFINITY},{GET_AFFINITY}={errno.ENOSYS}": "sched_getaffinity: Function not implemented",
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "reason"), REFUSED.items())
def test_one_lane_trains_without_affinity(in_tmp, what, reason):
    options = ["--split", "none", "-j", "1", "--output-dir", "out"]
    done = run_oddly(what, *TWO_STEPS, *options)
    assert done.returncode == 0, done.stderr
    assert f"all       cores {format_cpu_list(ALLOWED_CPUS)}, " in done.stdout
    assert done.stdout.count(f"note: the system keeps no thread on cores ({reason})\n") == 1
    assert "finished after 2 of 2 steps" in done.stdout
    assert not warnings_of(done)
    run, *steps, _ = read_metrics(in_tmp / "out")
    assert run["plan"]["forward"]["cpus"] == sorted(ALLOWED_CPUS)
    assert all(step["stray_s"] == 0 for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ([SCRIPT, *TINY, "--steps", "2"], "--split even"),
        ([SCRIPT, "plan", *TINY, "--split", "none", "--loader-cores", "0"], "--loader-cores"),
    ],
)
def test_a_split_says_why_it_cannot_be(in_tmp, command, asked):
    done = run_oddly(f"{SET_AFFINITY}={errno.EPERM}", *command)
    reason = "the system keeps no thread on cores (sched_setaffinity: Operation not permitted)"
    assert done.stderr == (
        f"train_split_affinity.py: error: {asked}: {reason}; only --split none works\n"
    )
    assert done.returncode == 2
    assert not list(in_tmp.iterdir())


@pytest.mark.slow
def test_a_plan_for_another_machine_needs_no_affinity(in_tmp):
    machines.write_machine(in_tmp / "server", machines.SIXTEEN_CORES)
    done = run_oddly(f"{GET_AFFINITY}={errno.EPERM}", SCRIPT, "plan", *TINY, "--machine", "server")
    assert (done.returncode, done.stderr) == (0, "")
    assert "forward   cores 0-7,16-23, 8 threads: forward pass" in done.stdout


@pytest.mark.slow
def test_predict_needs_no_affinity(in_tmp, photos):
    what = f"{SET_AFFINITY},{GET_AFFINITY}={errno.EPERM}"
    options = [*TINY[:-2], "-j", "1", "--split", "none", "--steps", "1", "--output-dir", "out"]
    assert run_oddly(what, SCRIPT, *options).returncode == 0
    pictures = sorted(photos.rglob("*.jpg"))[:2]
    done = run_oddly(what, SCRIPT, "predict", "--resume", "out/last.pt", *pictures, "-j", "1")
    (note,) = done.stderr.splitlines()
    assert (done.returncode, note.startswith("note: no picture is called unlike ")) == (0, True)
    assert [line for line in done.stdout.splitlines() if line in map(str, pictures)]


@needs_two_cpus
def test_affinity_that_is_refused_later(monkeypatch, split_plan, one_lane_plan):
    """Threads stay where they are; only one that would have to move cannot go on."""

    def refuse(thread, cpus):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with Lanes(split_plan, read_topology().online) as lanes:
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        assert lanes.forward.run("forward", process_cpus) == split_plan.forward.cpu_set
        assert lanes.backward.run("backward", process_cpus) == split_plan.backward.cpu_set
        with Lanes(one_lane_plan, read_topology().online) as single:
            assert single.forward.run("forward", process_cpus) == ALLOWED_CPUS
        with pytest.raises(RunError) as caught, Lanes(split_plan, ()):
            pass
    assert str(caught.value) == (
        f"the system does not keep a thread on cores {split_plan.forward.cpus[0]} any more "
        "(sched_setaffinity: Operation not permitted)"
    )


def test_the_mask_is_read_from_proc_where_the_call_is_refused(monkeypatch):
    def refuse(thread):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    assert process_cpus() == ALLOWED_CPUS
    assert affinity_refusal() == "sched_getaffinity: Function not implemented"
    monkeypatch.setattr(Path, "read_text", lambda self, *args: "Cpus_allowed_list:\t0-2,5,8-9\n")
    assert process_cpus() == {0, 1, 2, 5, 8, 9}
    monkeypatch.setattr(Path, "read_text", lambda self, *args: "")
    assert process_cpus() == frozenset(range(os.cpu_count()))
