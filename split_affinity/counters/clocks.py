"""The clock of each CPU, as its driver shows it (cpufreq), at the end of a phase."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from split_affinity.counters.source import Source
from split_affinity.files import read_text


class Clocks(Source):
    """Megahertz of the plan's CPUs: those of the phase's lane, and those that wait meanwhile.

    Where a CPU sleeps, drivers show the clock that it had last or would have now. How fast a
    lane's threads really ran is cycles over task clock (PerfEvents).
    """

    def __init__(self, cpus: Iterable[int], root: Path = Path("/")):
        super().__init__()
        folder = root / "sys/devices/system/cpu"
        files = {cpu: folder / f"cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in cpus}
        self._files = {cpu: file for cpu, file in files.items() if read_text(file).isdecimal()}
        self.missing = {} if self._files else {"clock_mhz": "no scaling_cur_freq in cpufreq"}

    def between(self, lane: str, before: None, after: None) -> dict[str, dict[int, float]]:
        """The clocks now."""
        read = {cpu: read_text(file) for cpu, file in self._files.items()}
        clocks = {cpu: int(khz) / 1e3 for cpu, khz in read.items() if khz.isdecimal()}
        return {"clock_mhz": clocks} if clocks else {}
