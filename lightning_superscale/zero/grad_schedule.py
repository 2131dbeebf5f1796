"""A state that lasts as long as a `with` is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Flag:
    """True while some `raised()` is open; they may be nested."""

    def __init__(self) -> None:
        self._num_open = 0

    def __bool__(self) -> bool:
        return self._num_open > 0

    @contextmanager
    def raised(self) -> Iterator[None]:
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
