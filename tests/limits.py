"""Limits of this process, for a while."""

import contextlib
import resource


@contextlib.contextmanager
def files_up_to(size_bytes):
    """No file can become larger: what was there stays writable, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
