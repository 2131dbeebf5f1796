"""Disks and stores that fail: an error or an interrupt at any one operation, before or after it is done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from lightning_superscale.checkpoint.storage import local
from tests.helpers.crashes import CALLS


def _always(*_: Any) -> bool:
    return True


class Fault:
    """Counts operations, and raises at one of them.

    Args:
        at: number of the operation, from 1; None counts only.
        make: makes the exception.
        is_after: whether the operation is done first.
        is_lasting: whether all later operations fail too.
    """

    def __init__(
        self, at: int | None, make: Callable[[], BaseException], *, is_after: bool = False, is_lasting: bool = False
    ) -> None:
        self.count = 0
        self.renames: list[int] = []  # which of the operations change names
        self._at = at
        self._make = make
        self._is_after = is_after
        self._is_lasting = is_lasting

    def wrapped(
        self, call: Callable[..., Any], is_counted: Callable[..., bool] = _always, *, is_rename: bool = False
    ) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not is_counted(*args):
                return call(*args, **kwargs)
            self.count += 1
            if is_rename:
                self.renames.append(self.count)
            is_now = self._at is not None and (self.count == self._at or (self._is_lasting and self.count > self._at))
            if is_now and not self._is_after:
                raise self._make()
            answer = call(*args, **kwargs)
            if is_now:
                raise self._make()
            return answer

        return counted


def io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


KINDS: dict[str, dict[str, Any]] = {
    "error": {"make": io_error},
    "error afterwards": {"make": io_error, "is_after": True},
    "interrupt": {"make": KeyboardInterrupt},
    "interrupt afterwards": {"make": KeyboardInterrupt, "is_after": True},
    "dead from then on": {"make": io_error, "is_lasting": True},
}


@contextmanager
def faulty_disk(fault: Fault, *, can_exchange: bool) -> Iterator[None]:
    """Every operation that changes a local disk goes through the fault.

    Args:
        can_exchange: whether names can be swapped.
    """
    plain = {name: getattr(os, name) for name in CALLS}
    exchange = local.exchange
    try:
        for name, call in plain.items():
            is_counted = (lambda _, flags, *__: bool(flags & os.O_CREAT)) if name == "open" else _always
            is_rename = name in ("rename", "replace", "symlink")
            setattr(os, name, fault.wrapped(call, is_counted, is_rename=is_rename))
        local.exchange = fault.wrapped(exchange, is_rename=True) if can_exchange else lambda one, other: False
        yield
    finally:
        for name, call in plain.items():
            setattr(os, name, call)
        local.exchange = exchange


STORE_CALLS = ("pipe_file", "rm_file", "cat_file", "find", "ls", "isfile")


@contextmanager
def faulty_store(fault: Fault) -> Iterator[None]:
    """Every request to fsspec's memory store goes through the fault, with those that open and close objects."""
    plain = {name: getattr(MemoryFileSystem, name) for name in (*STORE_CALLS, "_open")}
    try:
        for name, call in plain.items():
            setattr(MemoryFileSystem, name, fault.wrapped(call))
        yield
    finally:
        for name, call in plain.items():
            setattr(MemoryFileSystem, name, call)
