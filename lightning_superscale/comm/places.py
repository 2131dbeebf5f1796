"""Tells from the frames of a thread the collective that it is in, who called it, and of which weight."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

# The files whose Python code polls this package's own collectives. They import this one, so their paths are given.
OWN_COLLECTIVES = str(Path(__file__).with_name("collectives.py"))
OWN_WAITS = (
    OWN_COLLECTIVES,
    str(Path(__file__).with_name("watch.py")),
    str(Path(__file__).parent.parent / "zero" / "fsdp2" / "gather_order.py"),
)

# Functions of torch.distributed that wait for a collective, whose caller's name says more.
_WAITS = ("", "wrapper", "wait", "wait_tensor", "trigger_wait", "unwrap", "__torch_dispatch__")
_LATE = "a read of a sharded tensor's collective, which every rank must call"

# The file of torch that calls autograd's engine.
_BACKWARD = "torch/autograd/graph.py"

WeightNames = Callable[[], Iterable[tuple[str, Tensor]]]


def main_frame() -> Any:
    """The innermost frame of what the main thread does now; None without one.

    While it waits in backward, that is the frame of the thread in which autograd runs hooks, if there is one: on a GPU
    they do not run in the thread that called backward.
    """
    frames = sys._current_frames()
    frame = frames.get(threading.main_thread().ident or 0)
    if frame is None or not _is_within(frame, _BACKWARD):
        return frame
    # Threads that Python did not start; it knows those that have asked for themselves by this name.
    started = {thread.ident for thread in threading.enumerate() if not thread.name.startswith("Dummy-")}
    return next((other for ident, other in frames.items() if ident not in started), frame)


def foreign_collective(frame: Any, weights: WeightNames = tuple) -> str:
    """The collective of torch.distributed that a thread is in, and its caller's place; "" when it is in none.

    Args:
        frame: the thread's innermost frame.
        weights: gives sharded weights with their names, so that the one that is gathered is named.
    """
    if not is_in_collective(frame):
        return ""
    frame, name, is_sharded = _behind_dispatch(frame), "", False
    inner = []
    while frame is not None and (_is_within(frame, "torch/distributed") or _is_between(frame)):
        inner.append(frame)
        if _is_within(frame, "torch/distributed/tensor/"):
            is_sharded = True
        if not is_sharded and not _is_between(frame):
            name = frame.f_code.co_name if name in _WAITS else name
        frame = frame.f_back
    if frame is None:
        return ""
    place = f"called by {frame.f_code.co_filename}:{frame.f_lineno}"
    if is_sharded:
        return f"{_of_sharded(inner, weights)}, {place}"
    # The result of an earlier operation on a sharded weight, which waits where it is used.
    return f"{_LATE if name in _WAITS else name} {place}"


def _of_sharded(frames: list[Any], weights: WeightNames) -> str:
    """An operation on a DTensor in words: its name, and the weight, where it is one.

    Args:
        frames: those of torch.distributed, innermost first.
    """
    outermost = next(f for f in reversed(frames) if _is_within(f, "torch/distributed/tensor/"))
    name = outermost.f_code.co_name
    name = "an operation" if name.startswith("_") or name in ("dispatch", "wrapper") else name
    held = [value for f in reversed(frames) for value in list(f.f_locals.values()) if isinstance(value, DTensor)]
    known = {id(tensor): fqn for fqn, tensor in weights()} if held else {}
    fqn = next((known[id(tensor)] for tensor in held if id(tensor) in known), None)
    what = "on a sharded tensor" if fqn is None else f"of the sharded weight {fqn!r}"
    return f"{name} {what}, which every rank must call (strategy.full_params() gives whole weights to all)"


def is_in_collective(frame: Any) -> bool:
    """Whether a thread's innermost Python frame is one that calls a collective, or the operator of one."""
    frame = _behind_dispatch(frame)
    if frame is None or _is_within(frame, "torch/distributed/tensor/"):
        return False  # a DTensor's operation on its own part
    return _is_within(frame, "torch/distributed") or frame.f_code.co_filename in OWN_WAITS


def is_leaving(frame: Any) -> bool:
    """Whether a thread ends process groups, which waits for collectives that are under way."""
    while frame is not None:
        if frame.f_code.co_name == "destroy_process_group" and _is_within(frame, "torch/distributed"):
            return True
        frame = frame.f_back
    return False


def _behind_dispatch(frame: Any) -> Any:
    """The innermost frame outside of torch's dispatch of operators: DTensor's collectives are operators."""
    while frame is not None and (_is_within(frame, "torch/_ops.py") or _is_within(frame, "torch/_library/")):
        frame = frame.f_back
    return frame


def _is_within(frame: Any, part: str) -> bool:
    return part in frame.f_code.co_filename.replace(os.sep, "/")


def _is_between(frame: Any) -> bool:
    """Whether a frame is one that lies between an operation on a tensor class and the collective that it needs."""
    return any(
        _is_within(frame, part)
        for part in (
            "torch/autograd/",
            "torch/_ops.py",
            "torch/_library/",
            "torch/utils/_pytree.py",
            "torch/_tensor.py",
        )
    )
