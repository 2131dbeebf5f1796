"""The link between a device and its host: asynchronous copies each way, every byte counted.

A CPU "device" has a link too. It copies for real, so that schedules, counts and lifetimes are the same
code everywhere and can be tested without a GPU.

[Note: Casts of the device] The bytes that cross the link have the dtype of the host's end. Where that is fp32 and the
device's end has 16 bits, the device casts: exactly on the way to the host, to nearest even on the way back, as the
host's kernel does. On CUDA it casts in the stream of the copy, where the fp32 tensor is allocated too and freed at
once: the stream's next copy reuses its memory, so that the device holds one copy's fp32 tensor each way at most, and
no weight is written before the fence that the copy waits for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.cpu.flat import submit_copy
from lightning_superscale.ops.cpu.pool import default_pool
from lightning_superscale.ops.events import Done, Event, FutureEvent, StreamEvent, has_streams
from lightning_superscale.ops.types import WEIGHT_DTYPES
from lightning_superscale.timeline import UNTIMED, Timeline

Copied = Literal["gradients", "weights", "activations"]
"""What a copy is of, for counters and timelines."""


@dataclass(slots=True)
class LinkBytes:
    """Bytes that crossed the link since it was opened, those of activations among them."""

    d2h: int = 0
    h2d: int = 0
    activations_d2h: int = 0
    activations_h2d: int = 0

    def count_d2h(self, nbytes: int, what: Copied) -> None:
        """Count a copy to the host."""
        self.d2h += nbytes
        self.activations_d2h += nbytes if what == "activations" else 0

    def count_h2d(self, nbytes: int, what: Copied) -> None:
        """Count a copy to the device."""
        self.h2d += nbytes
        self.activations_h2d += nbytes if what == "activations" else 0


LinkEvent = Event[None]
"""Completion of one copy: `wait` orders the *device's* later work after it, `synchronize` blocks the host."""


class LinkFence(Protocol):
    """A point of the device's work that later copies can be ordered after."""

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let the later work of a stream run only after this point."""


class Link(Protocol):
    """Copies between one device and the host. Source and destination must stay alive until the copy is complete.

    Both ends have one shape and dtype, or the host's is fp32 and the device's bf16 or fp16, and the device casts.

    Attributes:
        bytes: the bytes that crossed so far.
    """

    bytes: LinkBytes

    def d2h(self, dst: Tensor, src: Tensor, what: Copied = "gradients") -> LinkEvent:
        """Start copying `src` (device) to `dst` (host), after the work that the current stream has queued.

        Raises:
            ValueError: the shapes differ, or the dtypes are no pair that a link copies.
        """

    def fence(self) -> LinkFence | None:
        """The point after all work that the current stream has queued; None where there is no stream."""

    def h2d(self, dst: Tensor, src: Tensor, after: LinkFence | None = None, what: Copied = "weights") -> LinkEvent:
        """Start copying `src` (host, complete) to `dst` (device).

        Args:
            after: the point after all work that may read the old content of `dst`; None for that of the current
                stream. A thread that does not run the model passes a fence of the thread that does.

        Raises:
            ValueError: the shapes differ, or the dtypes are no pair that a link copies.
        """

    def drain(self) -> None:
        """Block the host until every copy that was started is complete, also those whose events an interrupt lost."""

    def allocating(self) -> AbstractContextManager[object]:
        """While open, any thread may allocate device memory for the destination of an `h2d`.

        On CUDA the memory belongs to the stream of those copies. The thread that runs the model says that it used the
        memory before it lets go of it (`ops.events.note_use`).
        """

    def needs_pinned_host(self) -> bool:
        """Whether copies overlap only if the host side is page-locked."""


def _check(host: Tensor, device: Tensor) -> int:
    """Refuse ends that a link can't copy; returns the bytes that cross it."""
    is_cast = host.dtype == torch.float32 and device.dtype in WEIGHT_DTYPES
    if host.shape != device.shape or (host.dtype != device.dtype and not is_cast):
        raise ValueError(
            "a link copies like to like, or casts between fp32 on the host and 16 bits on the device: the host's end "
            f"is {tuple(host.shape)} {host.dtype}, the device's {tuple(device.shape)} {device.dtype}"
        )
    return host.nbytes


def _refuse_capture(what: str) -> None:
    """Refuse a copy that a CUDA graph would record, to repeat it with memory that is another's by then.

    Raises:
        SuperScaleError: a capture is under way.
    """
    if torch.cuda.is_current_stream_capturing():
        raise SuperScaleError(
            f"a CUDA graph is being captured, and {what} falls into the capture; expected none while optimizer states "
            "or weights are in host memory, because each step waits for the host. Capture forward alone, without the "
            "parameters' backward, or keep everything on the device (strategy='superscale')."
        )


class CpuLink:
    """The link of a CPU device: host memory on both sides. Satisfies `Link`.

    Gradients are copied at once, while they are in the cache; weights are copied by other threads.
    """

    def __init__(self, timeline: Timeline = UNTIMED) -> None:
        self.bytes = LinkBytes()
        self._timeline = timeline
        # Uploads run on this thread while a timeline records, because a thread of the pool does not tell when it began.
        # Uploads with a cast always do: the pool copies bytes.
        self._timed = ThreadPoolExecutor(1, "lightning-superscale link")

    def d2h(self, dst: Tensor, src: Tensor, what: Copied = "gradients") -> LinkEvent:
        nbytes = _check(host=dst, device=src)
        self.bytes.count_d2h(nbytes, what)
        with self._timeline.host("device to host", what, nbytes):
            dst.copy_(src)
        return Done(None)

    def fence(self) -> None:
        return None

    def h2d(self, dst: Tensor, src: Tensor, after: LinkFence | None = None, what: Copied = "weights") -> LinkEvent:
        nbytes = _check(host=src, device=dst)
        self.bytes.count_h2d(nbytes, what)
        if not self._timeline.is_open and dst.dtype == src.dtype:
            return submit_copy(dst, src)
        return FutureEvent(self._timed.submit(self._copy, dst, src, nbytes, what))

    def drain(self) -> None:
        default_pool().drain()
        self._timed.submit(int).result()  # the only thread takes it last

    def allocating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _copy(self, dst: Tensor, src: Tensor, nbytes: int, what: Copied) -> None:
        with self._timeline.host("host to device", what, nbytes):
            dst.copy_(src)

    def needs_pinned_host(self) -> bool:
        return False


class CudaLink:
    """The link of a CUDA device, with a stream for each direction, so that copies overlap compute and one another.

    Satisfies `Link`.
    """

    def __init__(self, device: torch.device, timeline: Timeline = UNTIMED) -> None:
        self.bytes = LinkBytes()
        self._timeline = timeline
        self._device = device
        self._d2h_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._h2d_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def d2h(self, dst: Tensor, src: Tensor, what: Copied = "gradients") -> LinkEvent:
        nbytes = _check(host=dst, device=src)
        _refuse_capture(f"a copy of {what} to the host")
        self.bytes.count_d2h(nbytes, what)
        stream = self._d2h_stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), self._timeline.device("device to host", what, nbytes):
            dst.copy_(src.to(dst.dtype), non_blocking=True)
        # The caching allocator must not hand src's memory out before this stream has read it.
        src.record_stream(stream)
        return StreamEvent(stream)  # it may live until the step, and keeps no gradient on the device until then

    def fence(self) -> LinkFence:
        return StreamEvent(torch.cuda.current_stream(self._device))

    def h2d(self, dst: Tensor, src: Tensor, after: LinkFence | None = None, what: Copied = "weights") -> LinkEvent:
        nbytes = _check(host=src, device=dst)
        _refuse_capture(f"a copy of {what} to the device")
        self.bytes.count_h2d(nbytes, what)
        stream = self._h2d_stream
        # Earlier kernels may still read the weights that this copy replaces.
        (after or self.fence()).wait(stream)
        with torch.cuda.stream(stream), self._timeline.device("host to device", what, nbytes):
            # In one call torch would cast on the host. `landed` is this stream's own memory, so it needs no fence.
            landed = dst if dst.dtype == src.dtype else torch.empty_like(dst, dtype=src.dtype)
            landed.copy_(src, non_blocking=True)
            if landed is not dst:
                dst.copy_(landed)
        return StreamEvent(stream, keep=src)

    def drain(self) -> None:
        for stream in (self._d2h_stream, self._h2d_stream):
            stream.synchronize()

    def allocating(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._h2d_stream)

    def needs_pinned_host(self) -> bool:
        return True


def link_for(device: torch.device, timeline: Timeline = UNTIMED) -> Link:
    """The link of a device, which records its copies in `timeline`.

    Raises:
        ValueError: the device is neither a CPU nor CUDA.
    """
    if has_streams(device):
        return CudaLink(device, timeline)
    if device.type == "cpu":
        return CpuLink(timeline)
    raise ValueError(f"there is no link to a {device.type!r} device; expected 'cpu' or 'cuda'")
