"""Reads what another thread does now from its Python frames, while it goes on.

[Note: A still stack] Before Python 3.12 an allocation may collect garbage, and a finalizer that it runs may give up the
interpreter's lock. `frame.f_back`, `frame.f_locals` and `sys._current_frames()` allocate: were garbage collected there,
the other thread could leave the frame that is being read, whose memory then holds something else (seen on 3.11: an
attribute of a dict that stood in the place of a frame, segmentation faults). So no garbage is collected by itself while
frames are read. The thresholds do that, not `gc.disable`, since programs that turn collection off and on for themselves
ask `gc.isenabled`.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_COLLECTS_WHILE_IT_ALLOCATES = sys.version_info < (3, 12)
# The file of torch that calls autograd's engine.
_BACKWARD = "torch/autograd/graph.py"

_reading = threading.RLock()


@contextmanager
def no_collection() -> Iterator[None]:
    """While open, no thread collects garbage by itself; one that asks for it with `gc.collect()` does."""
    if not _COLLECTS_WHILE_IT_ALLOCATES:
        yield
        return
    with _reading:
        thresholds = gc.get_threshold()
        gc.set_threshold(0)
        try:
            yield
        finally:
            if gc.get_threshold()[0] == 0:  # else somebody has set others meanwhile
                gc.set_threshold(*thresholds)


if hasattr(os, "register_at_fork"):  # a child that is forked meanwhile would never collect
    os.register_at_fork(before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release)


def main_stack() -> tuple[Any, ...]:
    """The frames of what the main thread does now, innermost first; empty without one.

    While it waits in backward, those of the thread in which autograd runs hooks, if there is one: on a GPU they do not
    run in the thread that called backward.
    """
    with no_collection():
        frames = sys._current_frames()
        frame = frames.get(threading.main_thread().ident or 0)
        if frame is not None and is_within(frame, _BACKWARD):
            # Threads that Python did not start; it knows those that have asked for themselves by this name.
            started = {thread.ident for thread in threading.enumerate() if not thread.name.startswith("Dummy-")}
            frame = next((other for ident, other in frames.items() if ident not in started), frame)
        # It holds this function's own frame, which would keep it, and every frame in it with all that they hold, until
        # garbage is collected: tensors of a step, steps later.
        del frames
        stack = []
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
    return tuple(stack)


def is_within(frame: Any, part: str) -> bool:
    """Whether a frame's file has `part` in its path, which is written with "/"."""
    return part in frame.f_code.co_filename.replace(os.sep, "/")
