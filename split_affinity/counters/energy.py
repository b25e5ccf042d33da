"""Energy that the machine's processors and their memory took, from RAPL's counters (powercap)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from split_affinity.counters.source import Source
from split_affinity.files import read_text

# Zones by their names: all of a socket, and the memory behind it.
ZONES = {"package": "package_j", "dram": "dram_j"}


@dataclass(frozen=True)
class Zone:
    """A counter of RAPL."""

    name: str  # as in ZONES
    file: Path
    range_uj: int  # from which it begins at 0 again


def energy_zones(root: Path) -> list[Zone]:
    """The counters of all sockets. AMD's processors have them under the same names."""
    zones = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        kind = read_text(folder / "name").partition("-")[0]
        most = read_text(folder / "max_energy_range_uj")
        if kind in ZONES and most.isdecimal():
            zones.append(Zone(ZONES[kind], folder / "energy_uj", int(most)))
    return zones


class Energy(Source):
    """Joules of the whole machine, by all processes; RAPL counts about once in a millisecond."""

    def __init__(self, root: Path = Path("/")):
        super().__init__()
        self._zones = energy_zones(root)
        self.missing = dict.fromkeys(ZONES.values(), "no RAPL in /sys/class/powercap")
        for zone in self._zones:
            if read_text(zone.file).isdecimal():
                self.missing.pop(zone.name, None)
            else:
                self.missing[zone.name] = "energy_uj cannot be read: root may, others may not"
        self._zones = [zone for zone in self._zones if zone.name not in self.missing]

    def read(self, lane: str = "") -> tuple[int, ...]:
        """Microjoules of each counter so far."""
        return tuple(int(read_text(zone.file) or 0) for zone in self._zones)

    def between(
        self, lane: str, before: tuple[int, ...], after: tuple[int, ...]
    ) -> dict[str, float]:
        """Joules between two readings, in which a counter begins anew once at the most."""
        total: Counter[str] = Counter()
        for zone, first, last in zip(self._zones, before, after, strict=True):
            used_uj = last - first if last >= first else last - first + zone.range_uj
            total[zone.name] += used_uj / 1e6
        return dict(total)
