"""Copies of checkpoints at another address, made in the background."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from pathlib import Path
from typing import Any

import fsspec

from split_affinity.errors import UserError, one_line
from split_affinity.text import CHAINED, plural, without_login, without_logins

UPLOAD_ATTEMPTS, LAST_UPLOADS_S = 3, 60
ANSWER_S = 60  # time limit of an answer,
SLOWEST_BYTES_PER_S = 1e5  # to which this adds for the size of a file


def check_address(url: str) -> None:
    """Raise UserError for a protocol that fsspec cannot use, or a port that is no number."""
    parts = CHAINED.split(url)
    for part in parts:
        scheme, separator, _ = part.partition("://")
        known = separator or (len(parts) > 1 and re.fullmatch(r"\w+", part))
        try:
            filesystem = fsspec.get_filesystem_class(scheme if known else "file")
        except Exception as error:  # of a package that cannot be imported: any
            raise UserError(f"--mirror {without_login(url)}: {one_line(error)}") from None
        try:
            filesystem._get_kwargs_from_urls(part)
        except ValueError:  # its text may have part of a password
            remedy = "in a user or a password, write / ? # @ : as %2F %3F %23 %40 %3A"
            reason = f"no address of {scheme}: {remedy}"
            raise UserError(f"--mirror {without_login(url)}: {reason}") from None


class Mirror:
    """Copies files to an address of fsspec, and removes them there, in the background.

    It works on one file at a time. A waiting file is copied as it is when its turn comes.
    `messages` collects what failed. Whatever the other side does, it neither ends nor holds a run.
    """

    def __init__(self, url: str):
        check_address(url)
        self._url = url
        self._place: tuple[Any, str] | None = None  # file system and folder, once connected
        self.messages: list[str] = []
        self._queue: queue.Queue[tuple[str, Path] | None] = queue.Queue()
        self._waiting: list[tuple[str, Path]] = []
        self._running: list[tuple[str, Path]] = []
        self._unanswered: Future | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def copy(self, path: Path) -> None:
        """Copy a file soon."""
        self._add("copied", path)

    def remove(self, path: Path) -> None:
        """Remove the copy of a file soon."""
        self._add("removed", path)

    def close(self) -> None:
        """Wait for the rest, but no longer than a minute."""
        self._queue.put(None)
        self._thread.join(LAST_UPLOADS_S)
        left = (*self._running, *self._waiting) if self._thread.is_alive() else ()
        for done in dict.fromkeys(done for done, _ in left):
            names = ", ".join(sorted({path.name for each, path in left if each == done}))
            self.messages.append(f"mirror: {names} not {done} within {LAST_UPLOADS_S} s")

    def _add(self, done: str, path: Path) -> None:
        if (done, path) not in self._waiting:
            self._waiting.append((done, path))
            self._queue.put((done, path))

    def _work(self) -> None:
        """Do one job after the other, in up to UPLOAD_ATTEMPTS each."""
        while job := self._queue.get():
            self._running = [job]
            self._waiting.remove(job)
            done, path = job
            for attempt in range(1, UPLOAD_ATTEMPTS + 1):
                try:
                    fault = self._try(self._upload if done == "copied" else self._delete, path)
                    break
                except Exception as error:  # whatever the other side raises
                    self._place = None  # the connection may be lost: make another one
                    reason = without_logins(one_line(error))
                    fault = f"in {plural(UPLOAD_ATTEMPTS, 'attempt')}: {reason}"
                if attempt < UPLOAD_ATTEMPTS:
                    time.sleep(attempt)
            if fault:
                self.messages.append(f"mirror: {path.name} not {done} {fault}")

    def _try(self, act: Callable[[Path], None], path: Path) -> str:
        """Do something in a thread of its own, within limits; returns why it was given up, if so.

        Nothing else begins while a thread gives no answer: what it still sends would get into the
        next copy.
        """
        if self._unanswered and not self._unanswered.done():
            return f"since {without_login(self._url)} gives no answer"
        limit_s = ANSWER_S + (path.stat().st_size if path.exists() else 0) / SLOWEST_BYTES_PER_S
        answer: Future = Future()

        def work() -> None:
            try:
                answer.set_result(act(path))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=work, name="mirror at work", daemon=True).start()
        try:
            answer.exception(limit_s)
        except NotDone:
            self._unanswered, self._place = answer, None
            return f"within {limit_s:.3g} s: {without_login(self._url)} gives no answer"
        answer.result()
        return ""

    def _connected(self) -> tuple[Any, str]:
        """The file system and the folder of the address."""
        if not self._place:
            self._place = fsspec.core.url_to_fs(self._url)
        return self._place

    def _upload(self, path: Path) -> None:
        """Copy a file, under another name first: the other side never has half a file."""
        if path.exists():  # still among the best, say
            filesystem, root = self._connected()
            target = f"{root}/{path.name}"
            filesystem.makedirs(root, exist_ok=True)
            filesystem.put_file(str(path), target + ".part")
            filesystem.mv(target + ".part", target)

    def _delete(self, path: Path) -> None:
        filesystem, root = self._connected()
        if filesystem.exists(target := f"{root}/{path.name}"):
            filesystem.rm_file(target)
