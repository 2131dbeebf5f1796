"""What torch's allocator on the CPU says of the memory of a span of work: the peak of a "device" that is a CPU."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import lightning as L
from torch.profiler import ProfilerActivity, profile, record_function

_SPAN = "the span of tests/helpers/allocations.py"


class Allocations:
    """Profiles the allocator while it is open. Host memory that this package maps itself is not the allocator's.

    The profiler sees what the calling thread and autograd's allocate and free, not other threads.

    Attributes:
        peak: most bytes at a time, within the span of a `SpanOfSteps`, of tensors made since it was opened.
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
        memory = [event for event in events if event.get("name") == "[memory]"]
        first = memory[0]["args"]
        before = first["Total Allocated"] - first["Bytes"]
        inside = [e for e in memory if span["ts"] <= e["ts"] <= span["ts"] + span["dur"]]
        self.peak = max(event["args"]["Total Allocated"] for event in inside) - before


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
