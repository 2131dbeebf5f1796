"""Lets a part of a program compute whole sequences on every rank, as without sequence parallelism."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_local = threading.local()


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Within it, this thread's layers do not take a rank's part of the batch: a frozen teacher sees all tokens.

    Results are whole and plain, and may be combined with tokens that are shared. Every rank computes them.
    """
    before = getattr(_local, "depth", 0)
    _local.depth = before + 1
    try:
        yield
    finally:
        _local.depth = before


def are_whole() -> bool:
    """Whether this thread is within `whole_sequences()`."""
    return getattr(_local, "depth", 0) > 0
