"""What torch's allocator on the CPU says of the memory of a span of work: the peak of a "device" that is a CPU.

[Note: Memory within an operation] What a kernel allocates and frees before it returns depends on the instructions of
the CPU: oneDNN packs a product's operands for AVX-512 without bf16, and took 3.7 MB beside 23 for it where AVX2 took
none. No tensor lives there, and it is left out, so that a measurement says the same on every machine.
"""

from __future__ import annotations

import functools
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, record_function

_SPAN = "the span of tests/helpers/allocations.py"


class Allocations:
    """Profiles the allocator while it is open. Host memory that this package maps itself is not the allocator's.

    The profiler sees what the calling thread and autograd's allocate and free, not other threads.

    Attributes:
        peak: most bytes at a time, within the span of a `SpanOfSteps`, of tensors made since it was opened; without
            [Note: Memory within an operation].
    """

    peak = 0

    def __enter__(self) -> Allocations:
        gc.collect()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        if error[0] is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        span = next(event for event in events if event.get("name") == _SPAN)
        end = span["ts"] + span["dur"]
        self.peak = max(alive for at, alive in _alive(events) if span["ts"] <= at <= end)


class SpanOfSteps(L.Callback):
    """The span from the start of one batch to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.first:
            self._span = record_function(_SPAN)
            self._span.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.last:
            self._span.__exit__(None, None, None)


def _alive(events: list[dict[str, Any]]) -> Iterator[tuple[float, int]]:
    """Bytes that are alive after each allocation and release, with its time."""
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    within = _operations_around(changes, events)
    made: dict[int, int] = {}  # by address, the place of its allocation
    freed: dict[int, int] = {}  # by the place of a release, that of its allocation
    for i, change in enumerate(changes):
        address = change["args"]["Addr"]
        if address in made:  # an address that is given out again was freed by a thread that the profiler doesn't see
            freed[i] = made.pop(address)
        if change["args"]["Bytes"] > 0:
            made[address] = i
    temporary = {start for end, start in freed.items() if within[start] == within[end] is not None}
    alive = 0
    for i, change in enumerate(changes):
        size = change["args"]["Bytes"]
        if i in freed and freed[i] not in temporary:
            alive -= changes[freed[i]]["args"]["Bytes"]
        if size > 0 and i not in temporary:
            alive += size
        yield change["ts"], alive


def _operations_around(changes: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[int | None]:
    """For each change the outermost operation around it, as a number; None for none."""
    operations = sorted(
        (e for e in events if e.get("cat") == "cpu_op" and _is_one_operation(e["name"])), key=lambda event: event["ts"]
    )
    around: list[int | None] = []
    coming, open_until = 0, float("-inf")
    inside: int | None = None
    for change in changes:
        while coming < len(operations) and operations[coming]["ts"] <= change["ts"]:
            if operations[coming]["ts"] > open_until:
                inside, open_until = coming, operations[coming]["ts"] + operations[coming]["dur"]
            coming += 1
        around.append(inside if change["ts"] <= open_until else None)
    return around


def _is_one_operation(name: str) -> bool:
    """Whether autograd records an operation as one; others are made of some that it records."""
    return name.startswith("aten::") and name not in _made_of_others()


@functools.cache
def _made_of_others() -> frozenset[str]:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    return frozenset(name.partition(".")[0] for name in registered)
