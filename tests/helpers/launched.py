"""What Lightning's launchers leave in the environment, where a later process would take it for its own launcher's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """While open, DDP may run in this process: LOCAL_RANK, MASTER_PORT and so on are gone afterwards."""
    with mock.patch.dict(os.environ):
        yield
