"""Does a core clock down while its lane waits, and what does that cost when it works again?

    python benchmarks/clock.py

Needs no counters, and no rights: it times a chain of multiplications, each of which waits for the
one before, so that a piece of it takes a fixed number of cycles. A thread on one core waits for as
long as a lane may, then times one piece after the other. Meanwhile another core computes, as the
other lane does, or nothing runs. Printed is how fast the first pieces are beside those in the end,
when the core has worked for a while: 1.00 says that it has lost nothing. Medians of the rounds, and
their range. Where the system shows cycles, `--counters` gives the clock itself.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity import ALLOWED_CPUS
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import read_topology
from split_affinity.text import markdown_table

CHAIN = """
unsigned long chain(unsigned long count) {
    unsigned long value = count;
    while (count--) value = value * 6364136223846793005UL + 1442695040888963407UL;
    return value;
}
"""
WAITS_MS = (0, 5, 50, 500, 2000)
PIECE_S, PIECES = 0.0005, 200  # 100 ms of work after each wait
FIRST = {"first 0.5 ms": slice(0, 1), "first 5 ms": slice(0, 10), "first 20 ms": slice(0, 40)}
SETTLED = slice(PIECES // 2, PIECES)


def load_chain(folder: str) -> ctypes._CFuncPtr:
    """The chain of multiplications, as the machine's C compiler makes it."""
    source, library = Path(folder) / "chain.c", Path(folder) / "chain.so"
    source.write_text(CHAIN)
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        raise SystemExit("clock.py: needs a C compiler (apt install gcc)")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).chain  # it runs without the interpreter's lock
    function.argtypes, function.restype = [ctypes.c_ulong], ctypes.c_ulong
    return function


def pieces_s(chain: ctypes._CFuncPtr, count: int) -> list[float]:
    """Seconds of one piece after the other."""
    times_s = [time.perf_counter()]
    for _ in range(PIECES):
        chain(count)
        times_s.append(time.perf_counter())
    return [after - before for before, after in zip(times_s, times_s[1:], strict=False)]


def speeds_after(
    chain: ctypes._CFuncPtr, count: int, wait_ms: float, other: int | None
) -> dict[str, float]:
    """The speed of the first pieces after a wait, beside that of the last ones.

    The fastest half of each counts: a piece in which the thread lost its core says nothing.
    """
    done = threading.Event()

    def compute() -> None:
        os.sched_setaffinity(0, {other})
        while not done.is_set():
            chain(count)

    thread = threading.Thread(target=compute)
    if other is not None:
        thread.start()
    time.sleep(wait_ms / 1e3)
    times_s = pieces_s(chain, count)
    done.set()
    if other is not None:
        thread.join()

    def typical_s(part: slice) -> float:
        ordered = sorted(times_s[part])
        return statistics.fmean(ordered[: max(1, len(ordered) // 2)])

    settled_s = typical_s(SETTLED)
    return {name: settled_s / typical_s(part) for name, part in FIRST.items()}


def main() -> None:
    """Measure, and print a table for a busy and for an idle neighbour."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    given = parser.parse_args()
    topology = read_topology()
    cores = [core.cpus[0] for core in topology.cores if core.cpus[0] in ALLOWED_CPUS]
    own, other = cores[-1], cores[0] if len(cores) > 1 else None
    print(describe_topology(topology))
    with tempfile.TemporaryDirectory() as folder:
        chain = load_chain(folder)
        os.sched_setaffinity(0, {own})
        start_s = time.perf_counter()
        chain(10**8)
        count = int(10**8 * PIECE_S / (time.perf_counter() - start_s))
        for neighbour in dict.fromkeys((other, None)):
            rows = []
            kind = f"core {neighbour} computes" if neighbour is not None else "nothing else runs"
            for wait_ms in WAITS_MS:
                rounds = [
                    speeds_after(chain, count, wait_ms, neighbour) for _ in range(given.rounds)
                ]
                cells = []
                for name in FIRST:
                    values = [each[name] for each in rounds]
                    middle = statistics.median(values)
                    cells.append(f"{middle:.3f} ({min(values):.2f} to {max(values):.2f})")
                rows.append((f"{wait_ms} ms", *cells))
            print(f"\nspeed of core {own} after it has waited, while {kind}")
            print(markdown_table(("waited", *FIRST), rows))


if __name__ == "__main__":
    main()
