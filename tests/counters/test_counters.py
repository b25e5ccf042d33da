"""What is counted in a phase. Run: python -m pytest tests/counters

Hardware that this machine lacks is shown by files as the kernel writes them, and by counters that
tests open in place of perf_event_open.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from split_affinity.counters import dram, perf_events
from split_affinity.counters.clocks import Clocks
from split_affinity.counters.counters import Counters, open_counters
from split_affinity.counters.dram import MemoryTraffic, encode_config, memory_events, parse_terms
from split_affinity.counters.energy import Energy
from split_affinity.counters.memory import Memory
from split_affinity.counters.perf_events import HARDWARE_EVENTS, PerfEvents
from split_affinity.counters.threads import ThreadCounts, thread_counts
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.options.settings import Settings

SCHED = """python (17, #threads: 9)
-------------------------------------------------------------------
se.exec_start                                :      62087357.921371
se.nr_migrations                             :                    3
nr_switches                                  :                   12
nr_voluntary_switches                        :                    7
nr_involuntary_switches                      :                    5
"""
STATUS = "Name:\tpython\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t5\n"
STAT = "17 (a) (b) c) S 1 17 17 0 -1 4194304 120 0 4 0 9 1 0 0 20 0 9 0 100 1000 200\n"


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of small files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_counts_of_a_thread_from_the_kernel_s_files(tmp_path):
    faults = {"minor_faults": 120, "major_faults": 4}
    switches = {"voluntary_switches": 7, "involuntary_switches": 5}
    write(tmp_path, {"1/sched": SCHED, "1/status": STATUS, "1/stat": STAT})
    assert thread_counts(tmp_path / "1") == {**switches, "migrations": 3, **faults}
    write(tmp_path, {"2/status": STATUS, "2/stat": STAT})  # a kernel without SCHED_DEBUG
    assert thread_counts(tmp_path / "2") == switches | faults
    write(tmp_path, {"3/stat": "17 (python"})
    assert thread_counts(tmp_path / "3") == thread_counts(tmp_path / "4") == {}
    counts = ThreadCounts(tmp_path)
    counts.watch("forward", [1, 2])
    assert counts.missing == {"migrations": "not in /proc/self/task"}
    before = counts.read("forward")
    write(tmp_path, {"1/sched": SCHED.replace("  7\n", " 10\n")})
    between = counts.between("forward", before, counts.read("forward"))
    assert between["voluntary_switches"] == 3
    assert between["minor_faults"] == 0


def count_in_a_thread(source, work):
    """What a source counts for a thread of its own that works; and the seconds of its CPU clock."""
    found = {}

    def run() -> None:
        source.watch("forward", [threading.get_native_id()])
        before, start_s = source.read("forward"), time.thread_time()
        work()
        after, end_s = source.read("forward"), time.thread_time()
        found["counts"] = source.between("forward", before, after), end_s - start_s

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    source.close()
    return found["counts"]


def test_sleeps_are_voluntary_switches_and_new_memory_brings_page_faults():
    def work() -> None:
        for _ in range(20):
            time.sleep(0.0005)
        bytes(64 * 2**20).count(1)

    counts, _ = count_in_a_thread(ThreadCounts(), work)
    assert counts["voluntary_switches"] >= 20
    assert 100 <= counts["minor_faults"] <= 20_000
    assert counts["major_faults"] >= 0


def test_the_task_clock_is_the_thread_s_cpu_clock():
    def work() -> None:
        start_s = time.thread_time()
        while time.thread_time() < start_s + 0.05:
            pass

    events = PerfEvents()
    if "task_clock_s" in events.missing:
        pytest.skip(events.missing["task_clock_s"])
    counts, cpu_s = count_in_a_thread(events, work)
    assert counts["task_clock_s"] == pytest.approx(cpu_s, abs=0.005)
    assert counts.keys() == {"task_clock_s", *HARDWARE_EVENTS} - events.missing.keys()


class Kernel:
    """Stands in for perf_event_open: events that some machine has, and what their files say."""

    def __init__(self, monkeypatch, refused: dict[tuple[int, int], int]):
        self.refused, self.groups, self.opened = refused, {}, []
        for module in (perf_events, dram):
            monkeypatch.setattr(module, "open_event", self.open_event)
            monkeypatch.setattr(module, "read_group", lambda file: self.groups[file])

    def open_event(self, event, thread, leader=-1, flags=0, cpu=-1) -> int:
        code = self.refused.get(event)
        if code and not (code == errno.EACCES and flags & perf_events.EXCLUDE_KERNEL):
            raise OSError(code, os.strerror(code))
        file = os.open(os.devnull, os.O_RDONLY)
        self.opened.append((event, thread, leader, cpu))
        self.groups[file] = (0, 0, 0)
        if leader >= 0:
            self.groups[leader] += (0,)
        return file


CYCLES, INSTRUCTIONS, MISSES = HARDWARE_EVENTS.values()


def test_hardware_events_of_a_lane_are_summed_over_its_threads(monkeypatch):
    kernel = Kernel(monkeypatch, {})
    events = PerfEvents()
    kernel.opened.clear()
    events.watch("forward", [11, 12])
    assert [thread for _, thread, _, _ in kernel.opened] == 4 * [11] + 4 * [12]
    clock, cycles = [group.files[0] for group in events._groups["forward"][:2]]
    leaders = [leader for _, _, leader, _ in kernel.opened[:4]]
    assert leaders == [-1, -1, cycles, cycles]
    readings = [(0, 0, 0), (0, 0, 0, 0, 0)]
    # The first thread's events were on the counters for half of the time.
    after = [(4, 4, 2_000_000_000), (8, 4, 100, 50, 3), (4, 4, 10**9), (4, 4, 1000, 500, 30)]
    assert events.between("forward", 2 * readings, after) == {
        "task_clock_s": 3.0,
        "cycles": 1200.0,
        "instructions": 600.0,
        "llc_misses": 36.0,
    }
    after[1] = (8, 0, 0, 0, 0)  # none was free for them: a sum without them would be wrong
    assert events.between("forward", 2 * readings, after) == {"task_clock_s": 3.0}
    events.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(clock)


@pytest.mark.parametrize(
    ("refused", "missing", "notes"),
    [
        (
            {MISSES: errno.ENOENT},
            {"llc_misses": "this processor, or its hypervisor, shows none"},
            0,
        ),
        (
            dict.fromkeys(HARDWARE_EVENTS.values(), errno.EOPNOTSUPP),
            dict.fromkeys(HARDWARE_EVENTS, "this processor, or its hypervisor, shows none"),
            0,
        ),
        (  # kernel.perf_event_paranoid 2
            {perf_events.TASK_CLOCK: errno.EACCES, CYCLES: errno.EACCES},
            {},
            1,
        ),
        (  # Docker's seccomp profile
            dict.fromkeys([perf_events.TASK_CLOCK, *HARDWARE_EVENTS.values()], errno.EPERM),
            dict.fromkeys(
                [*HARDWARE_EVENTS, "task_clock_s"],
                "not allowed (kernel.perf_event_paranoid, or the container's seccomp profile)",
            ),
            0,
        ),
        (
            dict.fromkeys([perf_events.TASK_CLOCK, *HARDWARE_EVENTS.values()], errno.ENOSYS),
            dict.fromkeys([*HARDWARE_EVENTS, "task_clock_s"], "the system has no perf_event_open"),
            0,
        ),
    ],
    ids=["no cache event", "virtual machine", "paranoid", "seccomp", "no call"],
)
def test_what_a_machine_does_not_show_is_said_by_name(monkeypatch, refused, missing, notes):
    Kernel(monkeypatch, refused)
    events = PerfEvents()
    events.watch("forward", [1])
    assert events.missing == missing
    assert len(events.notes) == notes
    assert not any("kernel" not in note for note in events.notes)
    shown = events.between("forward", *2 * [events.read("forward")])
    assert not shown.keys() & missing.keys()
    events.close()


def test_many_threads_do_not_take_all_open_files(monkeypatch):
    kernel = Kernel(monkeypatch, {})
    monkeypatch.setattr(perf_events.resource, "getrlimit", lambda _: (1024, 4096))
    events = PerfEvents()
    kernel.opened.clear()
    events.watch("forward", range(1, 257))
    assert kernel.opened == []
    assert events.missing["cycles"] == "needs 1024 open files; see ulimit -n"
    assert events.between("forward", *2 * [events.read("forward")]) == {}


def test_p_and_e_cores_have_events_of_their_own(monkeypatch, tmp_path):
    devices = "sys/bus/event_source/devices"
    root = write(tmp_path, {f"{devices}/cpu_core/type": "4", f"{devices}/cpu_atom/type": "10"})
    kernel = Kernel(monkeypatch, {})
    events = PerfEvents(root)
    kernel.opened.clear()
    events.watch("forward", [1])
    configs = [config for (kind, config), *_ in kernel.opened if kind == perf_events.HARDWARE]
    assert configs == [4 << 32, 4 << 32 | 1, 10 << 32, 10 << 32 | 1]
    before = [(0, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)]
    after = [(9, 9, 9), (9, 6, 60, 6, 1), (9, 3, 20, 2, 1)]  # each ran for its part of the time
    counted = events.between("forward", before, after)
    assert (counted["cycles"], counted["instructions"]) == (80, 8)
    events.close()


def test_a_reading_of_a_group():
    outer, inner = os.pipe()
    os.write(inner, struct.pack("=QQQQQ", 2, 100, 50, 7, 8))
    assert perf_events.read_group(outer) == (100, 50, 7, 8)
    os.close(outer)
    os.close(inner)


IMC = "sys/bus/event_source/devices/uncore_imc"
MEMORY_CONTROLLERS = {
    f"{IMC}_{number}/{name}": text
    for number in range(2)
    for name, text in {
        "type": f"{20 + number}\n",
        "cpumask": "0,28\n",
        "format/event": "config:0-7\n",
        "format/umask": "config:8-15\n",
        "format/edge": "config:18\n",
        "events/cas_count_read": "event=0x04,umask=0x03\n",
        "events/cas_count_read.scale": "6.103515625e-5\n",
        "events/cas_count_read.unit": "MiB\n",
        "events/cas_count_write": "event=0x04,umask=0x0c\n",
        "events/cas_count_write.scale": "6.103515625e-5\n",
        "events/cas_count_write.unit": "MiB\n",
    }.items()
}


def test_events_of_memory_controllers_as_the_kernel_names_them(monkeypatch, tmp_path):
    root = write(tmp_path, MEMORY_CONTROLLERS)
    found = list(memory_events(root))
    assert len(found) == 8, "two controllers, reads and writes, on a CPU of each socket"
    assert found[0] == ("dram_read_bytes", (20, 0x0304), 0, 64.0)
    assert found[3] == ("dram_written_bytes", (20, 0x0C04), 28, 64.0)
    kernel = Kernel(monkeypatch, {})
    traffic = MemoryTraffic(root)
    assert traffic.missing == {}
    assert {cpu for *_, cpu in kernel.opened} == {0, 28}
    before = traffic.read("forward")
    for file in kernel.groups:
        kernel.groups[file] = (5, 5, 1000)
    bytes_read = 4 * 64 * 1000
    assert traffic.between("forward", before, traffic.read("forward")) == {
        "dram_read_bytes": bytes_read,
        "dram_written_bytes": bytes_read,
    }
    traffic.close()


@pytest.mark.parametrize(
    ("files", "refused", "reason"),
    [
        ({}, {}, "no memory controller shows it (uncore_imc)"),
        (MEMORY_CONTROLLERS, {(20, 0x0304): errno.EACCES}, "not allowed"),
        (MEMORY_CONTROLLERS | {f"{IMC}_0/format/umask": "config1:0-7"}, {}, "no place for umask"),
        (MEMORY_CONTROLLERS | {f"{IMC}_0/events/cas_count_read.unit": "furlongs"}, {}, "unknown"),
        (MEMORY_CONTROLLERS | {f"{IMC}_0/events/cas_count_read.scale": "x"}, {}, "unknown form"),
        (MEMORY_CONTROLLERS | {f"{IMC}_0/format/event": "config:7-0"}, {}, "unknown form"),
    ],
)
def test_memory_traffic_that_cannot_be_counted(monkeypatch, tmp_path, files, refused, reason):
    kernel = Kernel(monkeypatch, refused)
    traffic = MemoryTraffic(write(tmp_path, files))
    assert all(reason in text for text in traffic.missing.values())
    assert traffic.missing.keys() == {"dram_read_bytes", "dram_written_bytes"}
    assert traffic.between("all", *2 * [traffic.read("all")]) == {}
    for file in kernel.groups:  # nothing stays open
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_the_number_of_an_event():
    assert parse_terms("event=0x04,umask=0x03,edge") == {"event": 4, "umask": 3, "edge": 1}
    formats = {"event": "config:0-7,32", "edge": "config:18"}
    assert encode_config({"event": 0x1FF, "edge": 1}, formats) == 0xFF | 1 << 32 | 1 << 18


RAPL = "sys/class/powercap/intel-rapl:"
SOCKETS = {
    f"{RAPL}0/name": "package-0\n",
    f"{RAPL}0/energy_uj": "262143000000\n",
    f"{RAPL}0/max_energy_range_uj": "262143328850\n",
    f"{RAPL}0:0/name": "dram\n",
    f"{RAPL}0:0/energy_uj": "1000000\n",
    f"{RAPL}0:0/max_energy_range_uj": "65712999613\n",
    f"{RAPL}0:1/name": "core\n",  # a part of the package
    f"{RAPL}0:1/energy_uj": "5\n",
    f"{RAPL}0:1/max_energy_range_uj": "65712999613\n",
    f"{RAPL}1/name": "package-1\n",
    f"{RAPL}1/energy_uj": "7000000\n",
    f"{RAPL}1/max_energy_range_uj": "262143328850\n",
    f"{RAPL}2/name": "psys\n",  # all of the machine, the rest of the board too
    f"{RAPL}2/energy_uj": "9\n",
    f"{RAPL}2/max_energy_range_uj": "262143328850\n",
}


def test_joules_of_all_sockets_and_their_memory(tmp_path):
    energy = Energy(write(tmp_path, SOCKETS))
    counters, before = Counters([energy]), energy.read()
    assert counters.step_energy_j() is None, "there is nothing to compare with yet"
    write(tmp_path, {f"{RAPL}0/energy_uj": "671150", f"{RAPL}1/energy_uj": "9500000"})
    write(tmp_path, {f"{RAPL}0:0/energy_uj": "1250000"})
    # The first socket's counter has begun anew.
    assert energy.between("", before, energy.read()) == {"package_j": 3.5, "dram_j": 0.25}
    assert counters.step_energy_j() == 3.75
    assert counters.step_energy_j() == 0
    assert counters.notes() == []


def test_energy_that_only_root_may_read(tmp_path):
    energy = Energy(write(tmp_path, {**SOCKETS, f"{RAPL}1/energy_uj": ""}))
    assert energy.missing == {"package_j": "energy_uj cannot be read: root may, others may not"}
    assert energy.between("", energy.read(), energy.read()) == {"dram_j": 0}
    assert Counters([energy]).step_energy_j() is None
    nothing = Energy(tmp_path / "nowhere")
    assert nothing.missing.keys() == {"package_j", "dram_j"}
    assert nothing.between("", nothing.read(), nothing.read()) == {}


def test_clocks_at_the_end_of_a_phase(tmp_path):
    clock = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"
    write(tmp_path, {clock.format(0): "3100000", clock.format(2): "800000"})
    clocks = Clocks([0, 1, 2], tmp_path)
    assert clocks.missing == {}
    assert clocks.between("all", None, None) == {"clock_mhz": {0: 3100.0, 2: 800.0}}
    assert Clocks([0], tmp_path / "nowhere").missing.keys() == {"clock_mhz"}


def test_memory_by_node_is_counted_rarely(tmp_path):
    maps = "7f00 default anon=3 dirty=3 N0=2 N1=1 kernelpagesize_kB=4\n"
    nodes = {f"sys/devices/system/node/node{number}/cpulist": "0" for number in range(2)}
    write(tmp_path, {"proc/self/numa_maps": maps, "proc/self/statm": "900 100 5", **nodes})
    memory = Memory(tmp_path)
    first, second = (memory.between("all", None, None) for _ in range(2))
    assert first["node_bytes"] == {0: 2 * 4096, 1: 4096}
    assert first["resident_bytes"] == 100 * os.sysconf("SC_PAGE_SIZE")
    assert second.keys() == {"resident_bytes"}


def test_which_counters_the_options_ask_for():
    group = Group("all", (0,), 1)
    plan = CorePlan("none", group, group, (0,))
    assert not open_counters(Settings(), plan)
    rows = open_counters(Settings(phases=True), plan)
    rows.watch("all", [os.getpid()])
    counted = rows.between("all", rows.read("all"), rows.read("all"))
    assert {"voluntary_switches", "resident_bytes"} <= counted.keys()
    assert not counted.keys() & {*HARDWARE_EVENTS, "task_clock_s", "clock_mhz", "package_j"}
    with_hardware = open_counters(Settings(counters=True), plan)
    with_hardware.watch("all", [os.getpid()])
    notes = " ".join(with_hardware.notes())
    for name in ("cycles", "package_j", "dram_read_bytes", "clock_mhz"):
        readings = [with_hardware.read("all"), with_hardware.read("all")]
        assert (name in with_hardware.between("all", *readings)) != (name in notes)
    with_hardware.close()
