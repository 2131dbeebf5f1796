"""One protocol for all work that is under way: copies, collectives, updates, steps of another thread.

[Note: Events] An event stands for work that was issued. It has four verbs, which mean the same in every class that has
them:

    wait()          orders later work after this work: on the current stream where the work runs on a device,
                    otherwise in the calling thread, which blocks meanwhile. Returns the work's result, if it has one.
    synchronize()   the calling thread blocks until the work is complete.
    is_waitable()   `wait` would not block the calling thread.
    is_complete()   `synchronize` would not block the calling thread.

`wait` raises what the work raised; so does `synchronize`. Any thread may call each of them, any number of times, unless
a class says otherwise. Complete work is waitable. Where there is no stream, waitable work is complete too: there `wait`
and `synchronize` are the same, and so are the two questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

# Types of devices whose work runs in streams, beside the host. tests/races adds "cpu", and plays such a device there.
STREAMED_DEVICE_TYPES = frozenset({"cuda"})


def has_streams(device: torch.device) -> bool:
    """Whether work on a device runs in streams, so that a call returns before its work is done."""
    return device.type in STREAMED_DEVICE_TYPES


def note_use(tensor: Tensor) -> None:
    """Say that the current stream has used memory that another stream owns, before the last reference to it is dropped.

    The caching allocator gives freed memory to the next work of the stream that owns it, and knows of no other stream.
    """
    if has_streams(tensor.device):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Waitable(Protocol[T_co]):
    """The half of an event that orders work; see [Note: Events]."""

    def wait(self) -> T_co:
        """Order later work after this work; returns the work's result."""

    def is_waitable(self) -> bool:
        """Whether `wait` would not block the calling thread."""


class Event(Waitable[T_co], Protocol[T_co]):
    """Completion of work that was issued; see [Note: Events]."""

    def synchronize(self) -> None:
        """Block the calling thread until the work is complete."""

    def is_complete(self) -> bool:
        """Whether `synchronize` would not block the calling thread."""


class Done(Generic[T]):
    """Work that was complete when its call returned: waitable and complete from the start."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        return self._result

    def synchronize(self) -> None:
        return

    def is_waitable(self) -> bool:
        return True

    def is_complete(self) -> bool:
        return True


class FutureEvent(Generic[T]):
    """Work of another Python thread: waitable and complete once that thread has done it, or failed."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def wait(self) -> T:
        return self._future.result()

    def synchronize(self) -> None:
        self._future.result()

    def is_waitable(self) -> bool:
        return self._future.done()

    def is_complete(self) -> bool:
        return self._future.done()


class AllOf:
    """Several pieces of work: waitable, or complete, once each of them is."""

    def __init__(self, events: Sequence[Event[object]]) -> None:
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            event.wait()

    def synchronize(self) -> None:
        for event in self._events:
            event.synchronize()

    def is_waitable(self) -> bool:
        return all(event.is_waitable() for event in self._events)

    def is_complete(self) -> bool:
        return all(event.is_complete() for event in self._events)


class StreamEvent:
    """All that a CUDA stream has been given until now: waitable at once, complete when the device has done it.

    Args:
        stream: the stream whose work is meant.
        keep: an object that lives as long as this event, such as a tensor that the stream still reads.
    """

    def __init__(self, stream: torch.cuda.Stream, keep: object = None) -> None:
        self._keep = keep
        self._device = stream.device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Let a stream go on only after the work; None for the current one. The host does not block."""
        (stream or torch.cuda.current_stream()).wait_event(self._event)

    def synchronize(self) -> None:
        with torch.cuda.device(self._device):  # on a thread's first call CUDA makes a context on its current device
            self._event.synchronize()

    def is_waitable(self) -> bool:
        return True

    def is_complete(self) -> bool:
        with torch.cuda.device(self._device):
            return bool(self._event.query())  # type: ignore[no-untyped-call]
