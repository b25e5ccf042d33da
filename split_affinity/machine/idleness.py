"""How busy each CPU is now, by two looks at /proc/stat: others may be at work there.

The file is read under a root that tests can replace.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

from split_affinity.files import read_text

LOOK_S = 0.2  # 20 ticks


def busy_now(root: Path, online: Iterable[int], look_s: float) -> dict[int, float]:
    """The share of the next `look_s` seconds for which each online CPU works, for anybody; empty
    where /proc/stat does not show all of them, or by numbers of its own (lxcfs).
    """
    stat = root / "proc/stat"
    before = cpu_ticks(read_text(stat))
    if not look_s or not before.keys() >= {*online}:
        return {}
    time.sleep(look_s)
    return busy_shares(before, cpu_ticks(read_text(stat)))


def cpu_ticks(text: str) -> dict[int, tuple[int, int]]:
    """By CPU, the ticks since boot in which it worked, and all of them, from proc_stat(5)."""
    ticks = {}
    for cpu, numbers in re.findall(r"^cpu(\d+)((?: +\d+){4,})$", text, re.MULTILINE):
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in user, too
        counts = [*map(int, numbers.split())][:8]
        ticks[int(cpu)] = sum(counts) - sum(counts[3:5]), sum(counts)
    return ticks


def busy_shares(
    before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]
) -> dict[int, float]:
    """The share of the ticks between two readings in which each CPU worked."""
    return {
        cpu: max(0, after[cpu][0] - worked) / max(1, after[cpu][1] - every)
        for cpu, (worked, every) in before.items()
        if cpu in after
    }
