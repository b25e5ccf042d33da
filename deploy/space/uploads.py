"""Which files visitors may have looked at: those that they uploaded, and the page's own examples.
Of anything else on this machine, or on another one, nothing is opened.
"""

from __future__ import annotations

import io
import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import Unusable

LARGEST_BYTES = 20_000_000
READ_S = 10  # for reading and decoding a picture
# A pipe or a device without a writer shall not block, nor a link lead elsewhere (not on Windows).
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
ELSEWHERE = re.compile(r"/file[=/]+https?:", re.IGNORECASE)


class InTime(io.BytesIO):
    """The bytes of a file, which can be read for READ_S seconds: decoders that ask for the next
    part of a picture later than that end with Unusable.
    """

    def __init__(self, data: bytes):
        super().__init__(data)
        self._end_s = time.monotonic() + READ_S

    def read(self, size: int | None = -1) -> bytes:
        """As of any file."""
        if time.monotonic() > self._end_s:
            raise Unusable("The picture takes too long to read. Please save it anew, say as PNG.")
        return super().read(size)


def is_within(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path lies in one of some folders, by its name alone."""
    return any(path.is_relative_to(folder) for folder in folders)


def read_upload(path: str, folders: Sequence[Path]) -> InTime:
    """The content of a regular file in one of the folders, which no link leads out of. Raises
    Unusable for any other; which of them are there it does not tell.
    """
    refused = Unusable("Only a picture that was uploaded here can be looked at.")
    try:
        named = Path(os.path.abspath(path))  # noqa: PTH100 (nothing out there is asked yet)
        place = named.parent.resolve() / named.name
        inside = is_within(named, folders) and is_within(place, [f.resolve() for f in folders])
        if not inside:
            raise refused
        with os.fdopen(os.open(place, FLAGS), "rb") as file:
            known = os.fstat(file.fileno())
            if not stat.S_ISREG(known.st_mode) or known.st_size > LARGEST_BYTES:
                raise refused
            return InTime(file.read(LARGEST_BYTES))
    except (OSError, ValueError):
        raise refused from None


class NothingFromElsewhere:
    """A layer around the page's server that refuses Gradio's service of fetching addresses."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] == "http" and ELSEWHERE.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send(
                {"type": "http.response.body", "body": b"Nothing is fetched from elsewhere."}
            )
        else:
            await self._app(scope, receive, send)
