"""Records the times of a step's work, in lanes: a timeline is open for a step and the forward after it, for instance.

A closed timeline costs its users one look at a flag. Host work is timed by the host's clock. Work on a CUDA device is
bracketed by events on its stream, which the host waits for only when the recording ends. Stalls are always counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal, get_args

import torch

Lane = Literal[
    "forward",
    "backward",
    "device to host",
    "host sums",
    "host optimizer",
    "verdict",
    "host to device",
    "device optimizer",
    "selection",
    "wait for host",
]
LANES: tuple[Lane, ...] = get_args(Lane)


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on a lane of the timeline.

    Attributes:
        start, end: seconds since the recording began.
        nbytes: bytes that the work moved; 0 for work that moves none.
    """

    lane: str
    name: str
    start: float
    end: float
    nbytes: int = 0


class DeviceWaits:
    """Measures what a CUDA stream spends between a backward and the next step's forward, and at gates within that.

    The host never waits: pairs of events are recorded around both, in one step when asked, and read when the device
    has passed the last of them. Without a CUDA device it does nothing.

    Args:
        stream: returns the stream that the model's work is queued on; None without a CUDA device.
        make_event: makes an event that times.
    """

    def __init__(
        self,
        stream: Callable[[], torch.cuda.Stream] | None,
        make_event: Callable[[], torch.cuda.Event] | None = None,
    ) -> None:
        self._stream = stream
        self._make_event = make_event or _event
        self._is_asked = self._is_in_forward = False
        self._start: tuple[torch.cuda.Event, int] | None = None
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def ask(self) -> None:
        """Measure the next step whose backward ends from now on, and the forward after it."""
        if self._stream is not None and not self._pairs:
            self._is_asked = True

    def end_backward(self, num_steps: int) -> None:
        """Note that a backward is queued, after `num_steps` optimizer steps."""
        if self._is_asked:
            self._start = (self._recorded(), num_steps)

    def begin_forward(self, num_steps: int) -> None:
        """Note that a forward is about to be queued: it is the next step's if there are more steps than before."""
        if self._start is not None and num_steps > self._start[1]:
            self._pairs.append((self._start[0], self._recorded()))
            self._start, self._is_asked, self._is_in_forward = None, False, True

    def end_forward(self) -> None:
        """Note that the forward is queued."""
        self._is_in_forward = False

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """A context that queues waits for new weights."""
        if not self._is_in_forward:
            yield
            return
        start = self._recorded()
        try:
            yield
        finally:
            self._pairs.append((start, self._recorded()))

    def take(self) -> float | None:
        """Seconds of the step that was measured last; None where none was since, or the device is not there yet."""
        if self._is_in_forward or not self._pairs:
            return None
        is_passed: bool = self._pairs[-1][1].query()  # type: ignore[no-untyped-call]
        if not is_passed:
            return None
        pairs, self._pairs = self._pairs, []
        milliseconds: list[float] = [start.elapsed_time(end) for start, end in pairs]
        return sum(milliseconds) / 1e3

    def _recorded(self) -> torch.cuda.Event:
        if self._stream is None:
            raise AssertionError("only waits of a CUDA device are measured by events")
        event = self._make_event()
        event.record(self._stream())
        return event


class Timeline:
    """Records spans from any thread while it is open.

    Args:
        device: the device that the model runs on.

    Attributes:
        is_open: whether it records now.
        is_cuda: whether device work is timed by events on a stream.
        stalled_seconds: seconds of all `stalled` contexts so far.
        waits: measures waits of the device, open or not.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_open = False
        self.is_cuda = device.type == "cuda"
        self.stalled_seconds = 0.0
        self.waits = DeviceWaits((lambda: torch.cuda.current_stream(device)) if self.is_cuda else None)
        self._device = device
        self._lock = threading.Lock()
        self._start = 0.0
        self._base: torch.cuda.Event | None = None
        self._spans: list[Span] = []
        self._on_device: list[tuple[Lane, str, torch.cuda.Event, torch.cuda.Event, int]] = []

    def open(self) -> None:
        """Begin to record. Blocks until a CUDA device is idle, so that its clock and the host's begin together."""
        if self.is_cuda:
            torch.cuda.synchronize(self._device)
            self._base = _event()
            self._base.record(torch.cuda.current_stream(self._device))
            self._base.synchronize()
        self._start = perf_counter()
        self.is_open = True

    def close(self) -> list[Span]:
        """End the recording; returns the spans in order of their start. Blocks until a CUDA device is idle."""
        self.is_open = False
        if self.is_cuda:
            torch.cuda.synchronize(self._device)
        with self._lock:
            spans, self._spans = self._spans, []
            on_device, self._on_device = self._on_device, []
        for lane, name, start, end, nbytes in on_device:
            if self._base is None:
                raise AssertionError("device work was recorded before the recording began")
            first, last = (self._base.elapsed_time(event) / 1e3 for event in (start, end))
            spans.append(Span(lane, name, first, last, nbytes))
        return sorted(spans, key=lambda span: (span.start, span.end))

    @contextlib.contextmanager
    def host(self, lane: Lane, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the calling thread's time in the context as one span."""
        if not self.is_open:
            yield
            return
        start = perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start, perf_counter(), nbytes)

    @contextlib.contextmanager
    def stalled(self, name: str) -> Iterator[None]:
        """Count the time in the context as a stall: the calling thread runs the model, and it waits for the host.

        Stalls are not nested. On a CUDA device, work that was queued before may still run meanwhile.
        """
        start = perf_counter()
        try:
            with self.host("wait for host", name):
                yield
        finally:
            with self._lock:
                self.stalled_seconds += perf_counter() - start

    def add(self, lane: Lane, name: str, start: float, end: float, nbytes: int = 0) -> None:
        """Record host work that is over; `start` and `end` are times of `time.perf_counter()`."""
        with self._lock:
            self._spans.append(Span(lane, name, start - self._start, end - self._start, nbytes))

    @contextlib.contextmanager
    def device(self, lane: Lane, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the work that the context queues on the device's current stream; on a CPU, the time in the context."""
        if not self.is_open or not self.is_cuda:
            with self.host(lane, name, nbytes):
                yield
            return
        stream, start, end = torch.cuda.current_stream(self._device), _event(), _event()
        start.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            with self._lock:
                self._on_device.append((lane, name, start, end, nbytes))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


# A timeline that is never opened, for code that is given none.
UNTIMED = Timeline(torch.device("cpu"))


def chrome_trace(spans: list[Span], *, rank: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Spans in the Trace Event Format, which chrome://tracing and Perfetto open.

    Args:
        rank: the process id of the events.
        facts: entries for "superscale", beside the spans themselves.
    """
    lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}},
    ]
    for number, lane in enumerate(lanes):
        events.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": number, "args": {"name": lane}})
        events.append(
            {"name": "thread_sort_index", "ph": "M", "pid": rank, "tid": number, "args": {"sort_index": number}}
        )
    for span in spans:
        events.append(
            {
                "name": span.name,
                "cat": span.lane,
                "ph": "X",
                "pid": rank,
                "tid": lanes.index(span.lane),  # type: ignore[arg-type]
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"bytes": span.nbytes} if span.nbytes else {},
            }
        )
    return {"traceEvents": events, "superscale": {**facts, "spans": [asdict(span) for span in spans]}}
