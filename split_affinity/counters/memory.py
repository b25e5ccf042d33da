"""Memory of this process: how much is in use, and in which NUMA nodes it lies."""

from __future__ import annotations

import re
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

from split_affinity.counters.source import Source
from split_affinity.files import read_text

NODE_SHARE = 0.002  # of the time may go into counting pages by node


def memory_by_node(root: Path = Path("/")) -> dict[int, int]:
    """Bytes of this process's memory in each NUMA node, without files; empty with a single node.

    Weights, gradients and activations count; libraries, and batches from loader processes, do not.
    Activations count between steps too, if the allocator keeps freed memory (see tune_allocator).
    The kernel goes through all pages for this: do not ask in every step.
    """
    if len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return {}
    counted: Counter[int] = Counter()
    for line in read_text(root / "proc/self/numa_maps").splitlines():
        page_kib = re.search(r" kernelpagesize_kB=(\d+)", line)
        if page_kib and " file=" not in line:
            for node, pages in re.findall(r" N(\d+)=(\d+)", line):
                counted[int(node)] += 1024 * int(page_kib[1]) * int(pages)
    return dict(sorted(counted.items()))


class Memory(Source):
    """Resident bytes at the end of a phase; by node as often as that costs next to nothing."""

    def __init__(self, root: Path = Path("/")):
        super().__init__()
        self._root = root
        self._nodes_at_s = 0.0  # when to count pages by node again
        self._has_nodes = bool(memory_by_node(root))

    def between(self, lane: str, before: None, after: None) -> dict[str, Any]:
        """The memory now."""
        found: dict[str, Any] = {}
        pages = read_text(self._root / "proc/self/statm").split()
        if len(pages) > 1:
            found["resident_bytes"] = int(pages[1]) * resource.getpagesize()
        start_s = time.perf_counter()
        if self._has_nodes and start_s >= self._nodes_at_s:
            found["node_bytes"] = memory_by_node(self._root)
            end_s = time.perf_counter()
            self._nodes_at_s = end_s + (end_s - start_s) / NODE_SHARE
        return found
