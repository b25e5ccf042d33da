"""What was counted in the phases of a run, as a table of rates. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from split_affinity.reports.summary import PhaseSummary
from split_affinity.text import markdown_table


@dataclass(frozen=True)
class Rate:
    """A column: the sum of some counts over another one, times a factor."""

    title: str
    counts: tuple[str, ...]
    over: str
    factor: float = 1.0
    form: str = ".2f"

    def cell(self, values: dict[str, float]) -> str:
        """The rate as text; empty if the machine does not show it."""
        if not values.get(self.over) or not values.keys() >= {*self.counts}:
            return ""
        total = sum(values[name] for name in self.counts)
        return format(self.factor * total / values[self.over], self.form)


# Of the lane's threads: the clock that they really had, instructions per cycle, misses of the last
# cache per thousand instructions. Of the whole machine: memory traffic, power. Of the threads
# again, in a phase: how often they were switched out or moved, and page faults.
RATES = (
    Rate("GHz", ("cycles",), "task_clock_s", 1e-9),
    Rate("IPC", ("instructions",), "cycles"),
    Rate("MPKI", ("llc_misses",), "instructions", 1e3),
    Rate("GB/s", ("dram_read_bytes", "dram_written_bytes"), "looked_at_s", 1e-9, ".1f"),
    Rate("W", ("package_j",), "looked_at_s", form=".1f"),
    Rate("switches", ("voluntary_switches", "involuntary_switches"), "looks", form=".1f"),
    Rate("migrations", ("migrations",), "looks"),
    Rate("faults", ("minor_faults", "major_faults"), "looks", form=".0f"),
)


def counts_table(phases: Sequence[PhaseSummary]) -> str:
    """What was counted in each phase, in 80 columns; columns that the machine does not show are
    left out, and nothing remains if nothing was counted.
    """
    rows = []
    for phase in phases:
        values = phase.counts | {"looks": phase.looks, "looked_at_s": phase.looked_at_s}
        rows.append([phase.phase, *(rate.cell(values) for rate in RATES)])
    shown = [column for column in range(len(RATES)) if any(row[1 + column] for row in rows)]
    if not shown:
        return ""
    titles = (RATES[column].title for column in shown)
    cells = [(row[0], *(row[1 + column] for column in shown)) for row in rows]
    return markdown_table(("counted", *titles), cells)
