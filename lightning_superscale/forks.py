"""Tells a process that was forked from a training process that it is not the one that trains.

[Note: Forks] A fork copies memory and no threads. In the child, locks may be held by threads that do not exist, work
that was queued is never done, and process groups share their connections with the parent. So what trains has an
`Origin`, and in a child of the process that made it, every use of it is an error. Objects that the child makes itself
work. At the end of such a child Python would destroy process groups and wait for their threads; it is ended by SIGALRM.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import weakref

from lightning_superscale.errors import SuperScaleError

# Seconds that a forked process may take to end, once its code is done.
_LEAVE_S = 5


class Origin:
    """The process that made an object, which no process that is forked from it may use.

    Args:
        is_bound: False for an object that any process may take over, as ranks take what their launcher's process made.

    Attributes:
        is_here: whether this process made the object.
    """

    def __init__(self, *, is_bound: bool = True) -> None:
        self.is_here = True
        self._pid = os.getpid()
        if is_bound:
            _origins.add(self)

    def check(self, what: str) -> None:
        """Refuse to go on in a forked process.

        Args:
            what: names what it does, for the error.

        Raises:
            SuperScaleError: this process was forked from the one that made this.
        """
        if not self.is_here:
            raise SuperScaleError(
                f"process {os.getpid()} was forked from process {self._pid} while that trained, and can't do {what}: "
                "threads, locks and process groups do not survive os.fork(). Do it in the parent, or start the child "
                "with subprocess or multiprocessing's 'spawn' and give it a checkpoint."
            )


_origins: weakref.WeakSet[Origin] = weakref.WeakSet()


def _in_child() -> None:
    origins = list(_origins)
    for origin in origins:
        origin.is_here = False
    if origins:
        atexit.register(_end_soon)


def _end_soon() -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LEAVE_S)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
