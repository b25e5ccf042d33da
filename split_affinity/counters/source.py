"""What all sources of counters have in common: read before and after a phase of a lane."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Source:
    """Counters of one origin. `missing` says why this machine does not show some, by name."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []  # on what the others count

    def watch(self, lane: str, threads: Iterable[int]) -> None:
        """Count for these threads of a lane, by kernel id, if they make a difference."""

    def read(self, lane: str) -> Any:
        """A reading, to be compared with a later one; none if the later one says all."""

    def between(self, lane: str, before: Any, after: Any) -> dict[str, Any]:
        """What two readings say of the time between them: numbers by name, or by CPU or node. Of
        readings that are sums by name, their differences.
        """
        return {name: after[name] - before[name] for name in after}

    def close(self) -> None:
        """Stop counting."""
