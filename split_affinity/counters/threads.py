"""Context switches, page faults and migrations of a lane's threads, from the kernel's files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from split_affinity.counters.source import Source
from split_affinity.files import read_text

# Names in /proc/PID/task/TID/sched, which tells of migrations too, and in status, for kernels
# that are built without it.
SCHED_NAMES = {
    "nr_voluntary_switches": "voluntary_switches",
    "nr_involuntary_switches": "involuntary_switches",
    "se.nr_migrations": "migrations",
}
STATUS_NAMES = {
    "voluntary_ctxt_switches": "voluntary_switches",
    "nonvoluntary_ctxt_switches": "involuntary_switches",
}
STAT_FIELDS = {"minor_faults": 10, "major_faults": 12}  # by their numbers in proc_pid_stat(5)


def thread_counts(task: Path) -> dict[str, int]:
    """What a thread has counted since it began, by name; what the system hides is missing.

    `task` is its folder, such as /proc/self/task/17.
    """
    counts = named_numbers(read_text(task / "sched"), SCHED_NAMES)
    if not counts:
        counts = named_numbers(read_text(task / "status"), STATUS_NAMES)
    # The name of a thread, in brackets, may have blanks and brackets itself.
    fields = read_text(task / "stat").rpartition(")")[2].split()
    if len(fields) > 10:
        counts |= {name: int(fields[number - 3]) for name, number in STAT_FIELDS.items()}
    return counts


def named_numbers(text: str, names: dict[str, str]) -> dict[str, int]:
    """The numbers of lines `name : number`, by the names that they are given here."""
    lines = re.findall(r"^([\w.]+)\s*:\s*(\d+)$", text, re.MULTILINE)
    return {names[name]: int(number) for name, number in lines if name in names}


class ThreadCounts(Source):
    """Sums over a lane's threads: how often they were switched out, moved, or met a page fault."""

    def __init__(self, tasks: Path = Path("/proc/self/task")):
        super().__init__()
        self._tasks = tasks
        self._threads: dict[str, list[int]] = {}  # by lane

    def watch(self, lane: str, threads: Iterable[int]) -> None:
        """Count for these threads of a lane, by kernel id."""
        self._threads[lane] = list(threads)
        for thread in self._threads[lane]:
            shown = thread_counts(self._tasks / str(thread))
            self.missing |= dict.fromkeys(
                {*SCHED_NAMES.values(), *STAT_FIELDS} - shown.keys(), "not in /proc/self/task"
            )

    def read(self, lane: str) -> Counter[str]:
        """The sums so far."""
        total: Counter[str] = Counter()
        for thread in self._threads.get(lane, ()):
            total.update(thread_counts(self._tasks / str(thread)))
        return total
