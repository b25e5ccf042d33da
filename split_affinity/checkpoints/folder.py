"""The checkpoints of an output folder: saved, kept, removed, and copied to a mirror."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from split_affinity.checkpoints.mirror import Mirror
from split_affinity.checkpoints.schema import check_content
from split_affinity.checkpoints.state import (
    BadCheckpoint,
    Progress,
    SavedState,
    make_state,
    read_checkpoint,
    verify_checkpoint,
    write_verified,
)
from split_affinity.files import LOCK, flush_folder, link_file, lock_folder, why_not_saved
from split_affinity.options.settings import Settings
from split_affinity.options.values import Values
from split_affinity.ranks.ranks import ONE_PROCESS, RankLost, Ranks
from split_affinity.training.update import RankState, TrainState

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
NAMED_BY_EPOCH = re.compile(r"(best|epoch)-(\d{4,})\.pt")


class Checkpoints:
    """The checkpoints of an output folder.

    `last.pt` is the newest, `previous.pt` the one before it. `best-EPOCH.pt` have the best top-1,
    `best.pt` is the first of these. `epoch-EPOCH.pt` are kept for good. A state is written once;
    its other names are links to the same file. Of several ranks, only rank 0 writes.
    """

    def __init__(
        self,
        settings: Settings,
        warn: Callable[[str], None],
        data: SavedState | None = None,
        asked: Values | None = None,
        ranks: Ranks = ONE_PROCESS,
    ):
        self.folder = settings.output_dir
        self.warn = warn
        self.data = data
        self._settings, self.asked, self._ranks = settings, asked, ranks
        self._saved_at: tuple[int, int] | None = None  # step and epoch of the newest state
        self._lock: io.FileIO | None = None
        self._mirror = Mirror(settings.mirror) if settings.mirror and not ranks.rank else None

    def lock(self, make: bool = False) -> None:
        """Lock the folder until `close`. Raises UserError if another process has it."""
        if self._ranks.rank:
            return
        if make and self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock or not self.folder or not self.folder.is_dir():
            return
        try:
            self._lock = lock_folder(self.folder)
        except OSError as error:
            reason = f"{self.folder} cannot be locked ({error.strerror})"
            self.warn(f"{reason}: see to it that no other run is started there")

    def save(self, train_state: TrainState, progress: Progress) -> None:
        """Save the state of a run; if that fails, warn and leave earlier files as they are."""
        now = progress.step, progress.epoch
        if not self.folder or not progress.step or now == self._saved_at:
            return
        several = self._ranks.size > 1
        try:
            rank_states = self._ranks.gather_objects(train_state.rank_state()) if several else ()
            written = not self._ranks.rank and self._write(train_state, progress, rank_states)
            if any(self._ranks.gather_objects(written)):
                self._saved_at = now
        except RankLost as error:
            self.warn(f"{self.folder / LAST}: not saved: {error}")
        self._warn_of_mirror()

    def _write(
        self, train_state: TrainState, progress: Progress, rank_states: Sequence[RankState]
    ) -> bool:
        """Write a state under all its names; if that fails, warn and return False."""
        temporary, last = self.folder / f"{LAST}.tmp", self.folder / LAST
        try:
            saved = make_state(
                self._settings, train_state, progress, self.data, self.asked, rank_states
            )
            check_content(saved)
            write_verified(temporary, saved)
            with contextlib.suppress(BadCheckpoint):
                verify_checkpoint(last)  # a damaged one must not replace a good previous.pt
                last.replace(self.folder / PREVIOUS)
            temporary.replace(last)
            flush_folder(self.folder)
        except Exception as error:  # of the disk, of torch, or for want of memory
            reason = why_not_saved(error)
            self.warn(f"{last}: not saved: {reason}; earlier checkpoints are untouched")
            return False
        self.keep(last, progress)
        if self._mirror:
            self._mirror.copy(last)
        return True

    def keep(self, source: Path, progress: Progress) -> None:
        """At the end of an epoch, link its state to its names; drop what was best before."""
        if not progress.epoch or progress.batches or self._ranks.rank:
            return
        names = [f"best-{epoch:04}.pt" for _, epoch in progress.best if epoch == progress.epoch]
        if self._settings.save_freq and progress.epoch % self._settings.save_freq == 0:
            names.append(f"epoch-{progress.epoch:04}.pt")
        best = [self.folder / f"best-{epoch:04}.pt" for _, epoch in progress.best]
        try:
            for name in names:
                link_file(source, self.folder / name)
            if best and best[0].exists():
                link_file(best[0], self.folder / BEST)
            for epoch, path in self._named_by_epoch():
                if path.name.startswith("best") and path not in best and epoch <= progress.epoch:
                    path.unlink()
                    if self._mirror:
                        self._mirror.remove(path)
        except OSError as error:
            text = ", ".join([*names, BEST])
            self.warn(f"{self.folder}: {text} could not all be made: {why_not_saved(error)}")
        for name in (BEST, *names) if self._mirror else ():
            if (self.folder / name).exists():
                self._mirror.copy(self.folder / name)

    def newest_good(self) -> tuple[Path, SavedState] | None:
        """The newest whole state; None without files. Raises BadCheckpoint if all are damaged."""
        paths = [self.folder / LAST, self.folder / PREVIOUS]
        paths += [path for _, path in self._named_by_epoch()]
        bad = ""
        for path in filter(Path.exists, paths):
            try:
                return path, read_checkpoint(path)
            except BadCheckpoint as error:
                bad = str(error)
                self.warn(f"{error}; the one before it is tried")
        if bad:
            raise BadCheckpoint(f"--resume auto: no good checkpoint; {bad}")
        return None

    def exist(self) -> bool:
        """Whether a run has saved something here."""
        if not self.folder:
            return False
        names = (LAST, PREVIOUS, BEST)
        return any((self.folder / name).exists() for name in names) or bool(self._named_by_epoch())

    def close(self) -> None:
        """Wait a while for the mirror, and unlock the folder."""
        if self._mirror:
            self._mirror.close()
            self._warn_of_mirror()
        if self._lock:
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()
            self._lock.close()
            self._lock = None

    def _named_by_epoch(self) -> list[tuple[int, Path]]:
        """Epoch and path of the files that are named by an epoch, the newest first."""
        matches = ((NAMED_BY_EPOCH.fullmatch(path.name), path) for path in self.folder.glob("*.pt"))
        found = [(int(match[2]), path) for match, path in matches if match]
        return sorted(found, key=lambda one: (-one[0], one[1]))

    def _warn_of_mirror(self) -> None:
        while self._mirror and self._mirror.messages:
            self.warn(self._mirror.messages.pop(0))
