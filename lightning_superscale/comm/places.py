"""Tells from the frames of a thread the collective that it is in, who called it, and of which weight.

A stack is a thread's frames, innermost first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.stacks import is_within, no_collection

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

WeightNames = Callable[[], Iterable[tuple[str, Tensor]]]


def foreign_collective(stack: Sequence[Any], weights: WeightNames = tuple) -> str:
    """The collective of torch.distributed that a thread is in, and its caller's place; "" when it is in none.

    Args:
        stack: the thread's frames.
        weights: gives sharded weights with their names, so that the one that is gathered is named.
    """
    if not is_in_collective(stack):
        return ""
    name, is_sharded = "", False
    inner: list[Any] = []
    for frame in _behind_dispatch(stack):
        if not (is_within(frame, "torch/distributed") or _is_between(frame)):
            place = f"called by {frame.f_code.co_filename}:{frame.f_lineno}"
            if is_sharded:
                return f"{_of_sharded(inner, weights)}, {place}"
            # The result of an earlier operation on a sharded weight, which waits where it is used.
            return f"{_LATE if name in _WAITS else name} {place}"
        inner.append(frame)
        if is_within(frame, "torch/distributed/tensor/"):
            is_sharded = True
        if not is_sharded and not _is_between(frame):
            name = frame.f_code.co_name if name in _WAITS else name
    return ""


def _of_sharded(stack: Sequence[Any], weights: WeightNames) -> str:
    """An operation on a DTensor in words: its name, and the weight, where it is one.

    Args:
        stack: its frames in torch.distributed.
    """
    outermost = next(f for f in reversed(stack) if is_within(f, "torch/distributed/tensor/"))
    name = outermost.f_code.co_name
    name = "an operation" if name.startswith("_") or name in ("dispatch", "wrapper") else name
    with no_collection():
        held = [value for f in reversed(stack) for value in list(f.f_locals.values()) if isinstance(value, DTensor)]
    known = {id(tensor): fqn for fqn, tensor in weights()} if held else {}
    fqn = next((known[id(tensor)] for tensor in held if id(tensor) in known), None)
    what = "on a sharded tensor" if fqn is None else f"of the sharded weight {fqn!r}"
    return f"{name} {what}, which every rank must call (strategy.full_params() gives whole weights to all)"


def is_in_collective(stack: Sequence[Any]) -> bool:
    """Whether a thread's innermost Python frame is one that calls a collective, or the operator of one."""
    frame = next(_behind_dispatch(stack), None)
    if frame is None or is_within(frame, "torch/distributed/tensor/"):
        return False  # a DTensor's operation on its own part
    return is_within(frame, "torch/distributed") or frame.f_code.co_filename in OWN_WAITS


def is_leaving(stack: Sequence[Any]) -> bool:
    """Whether a thread ends process groups, which waits for collectives that are under way."""
    return any(
        frame.f_code.co_name == "destroy_process_group" and is_within(frame, "torch/distributed") for frame in stack
    )


def _behind_dispatch(stack: Sequence[Any]) -> Iterator[Any]:
    """The frames outside of torch's dispatch of operators: DTensor's collectives are operators."""
    return dropwhile(lambda frame: is_within(frame, "torch/_ops.py") or is_within(frame, "torch/_library/"), stack)


def _is_between(frame: Any) -> bool:
    """Whether a frame is one that lies between an operation on a tensor class and the collective that it needs."""
    return any(
        is_within(frame, part)
        for part in (
            "torch/autograd/",
            "torch/_ops.py",
            "torch/_library/",
            "torch/utils/_pytree.py",
            "torch/_tensor.py",
        )
    )
