"""Memory traffic of the whole machine, from the counters of its memory controllers (uncore).

The kernel names these events for Intel's server processors. They count for all processes, and only
a privileged one may read them.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from split_affinity.counters.perf_events import close_all, open_event, read_group, why_no_event
from split_affinity.counters.source import Source
from split_affinity.files import read_text
from split_affinity.machine.topology import read_cpus
from split_affinity.options.values import parse_cpu_list

# An event's file in sysfs, by what it counts: of memory controllers, and of those on small
# processors that run by themselves.
EVENT_FILES = {
    "dram_read_bytes": ("cas_count_read", "data_read", "data_reads"),
    "dram_written_bytes": ("cas_count_write", "data_write", "data_writes"),
}
UNITS = {"MiB": 2**20, "KiB": 2**10, "Bytes": 1, "": 64}  # without one: cache lines


def parse_terms(text: str) -> dict[str, int]:
    """The terms of an event or a format, such as `event=0x04,umask=0x03`, as numbers."""
    pairs = re.findall(r"(\w+)(?:=(\w+))?", text)
    return {name: int(value or "1", 0) for name, value in pairs}


def encode_config(terms: dict[str, int], formats: dict[str, str]) -> int:
    """The number of an event: each term's value on the bits that `formats` gives it.

    A format is such as `config:0-7` or `config:0-7,32`. Raises ValueError for terms elsewhere.
    """
    config = 0
    for name, value in terms.items():
        match = re.fullmatch(r"config:([\d,-]+)", formats.get(name, ""))
        if not match:
            raise ValueError(f"no place for {name}")
        for bit in parse_cpu_list(match[1]):  # the same notation
            config |= (value & 1) << bit
            value >>= 1
    return config


def memory_events(root: Path) -> Iterator[tuple[str, tuple[int, int], int, float]]:
    """The machine's events of memory traffic: name, (kind, number), CPU to read on, bytes each."""
    for device in sorted((root / "sys/bus/event_source/devices").glob("uncore_imc*")):
        kind = read_text(device / "type")
        formats = {path.name: read_text(path) for path in (device / "format").glob("*")}
        for name, files in EVENT_FILES.items():
            event = next((file for file in files if read_text(device / "events" / file)), None)
            if not event or not kind.isdecimal():
                continue
            scale = float(read_text(device / f"events/{event}.scale") or 1)
            unit = read_text(device / f"events/{event}.unit")
            terms = parse_terms(read_text(device / "events" / event))
            number = encode_config(terms, formats)
            for cpu in read_cpus(device / "cpumask"):
                yield name, (int(kind), number), cpu, scale * UNITS[unit]


class MemoryTraffic(Source):
    """Bytes that the machine's memory was read and written, by all processes."""

    def __init__(self, root: Path = Path("/")):
        super().__init__()
        self._files: list[tuple[str, int, float]] = []
        self.missing = dict.fromkeys(EVENT_FILES, "no memory controller shows it (uncore_imc)")
        try:
            for name, event, cpu, bytes_each in memory_events(root):
                self._files.append((name, open_event(event, -1, cpu=cpu), bytes_each))
                self.missing.pop(name, None)
        except OSError as error:
            self.close()
            self.missing = dict.fromkeys(EVENT_FILES, why_no_event(error))
        except (ValueError, KeyError, argparse.ArgumentTypeError) as error:
            self.close()
            self.missing = dict.fromkeys(EVENT_FILES, f"unknown form of event: {error}")

    def read(self, lane: str) -> Counter[str]:
        """Bytes so far."""
        total: Counter[str] = Counter()
        for name, file, bytes_each in self._files:
            total[name] += bytes_each * read_group(file)[2]
        return total

    def close(self) -> None:
        """Stop counting."""
        close_all(file for _, file, _ in self._files)
        self._files = []
