"""The link between a device and its host: asynchronous copies each way, every byte counted.

A CPU "device" has a link too. It copies for real, so that schedules, counts and lifetimes are the same
code everywhere and can be tested without a GPU.

[Note: Casts of the device] What crosses has the dtype of the host's end. Where that is fp32 and the device's end has
16 bits, the device casts: exactly on the way to the host, to nearest even on the way back, as the host's kernel does.
On CUDA it casts in the stream of the copy, where the fp32 tensor is made too and freed at once: the next copy of that
stream takes its place, so that the device holds no more fp32 than one copy's each way, and no weight is written
before the fence that the copy waits for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_superscale.ops.cpu.flat import submit_copy
from lightning_superscale.ops.events import Done, Event, FutureEvent, StreamEvent
from lightning_superscale.ops.types import WEIGHT_DTYPES
from lightning_superscale.timeline import UNTIMED, Timeline


@dataclass(slots=True)
class LinkBytes:
    """Bytes that crossed the link since it was opened."""

    d2h: int = 0
    h2d: int = 0


LinkEvent = Event[None]
"""Completion of one copy: `wait` orders what runs next on the *device* after it, `synchronize` the host."""


class LinkFence(Protocol):
    """A point of the device's work that later copies can be ordered after."""

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let a stream go on only after it."""


class Link(Protocol):
    """Copies between one device and the host. Source and destination must stay alive until the copy is done.

    Both ends have one shape and dtype, or the host's is fp32 and the device's bf16 or fp16, which the device casts.
    """

    bytes: LinkBytes

    def d2h(self, dst: Tensor, src: Tensor) -> LinkEvent:
        """Start copying `src` (device) to `dst` (host); `src` is ready where the current stream is now."""

    def fence(self) -> LinkFence | None:
        """What the current stream has queued until now; None where there is no stream."""

    def h2d(self, dst: Tensor, src: Tensor, after: LinkFence | None = None) -> LinkEvent:
        """Start copying `src` (host, complete) to `dst` (device).

        Args:
            after: what may still read the old content of `dst`; None: what the current stream has queued. A
                thread that does not run the model gives the fence of the one that does.
        """

    def needs_pinned_host(self) -> bool:
        """Whether copies overlap only if the host side is page-locked."""


def _check(host: Tensor, device: Tensor) -> int:
    """Returns: bytes that cross the link."""
    is_cast = host.dtype == torch.float32 and device.dtype in WEIGHT_DTYPES
    if host.shape != device.shape or (host.dtype != device.dtype and not is_cast):
        raise ValueError(
            "a link copies like to like, or casts between fp32 on the host and 16 bits on the device: the host's end "
            f"is {tuple(host.shape)} {host.dtype}, the device's {tuple(device.shape)} {device.dtype}"
        )
    return host.nbytes


class CpuLink:
    """Host memory on both sides. Gradients go at once, while they are warm; weights come from a worker thread."""

    def __init__(self, timeline: Timeline = UNTIMED) -> None:
        self.bytes = LinkBytes()
        self._timeline = timeline
        # While a timeline records, uploads run here, because a thread of the pool does not tell when it began. Those
        # that are cast run here always: the pool copies bytes.
        self._timed = ThreadPoolExecutor(1, "lightning-superscale link")

    def d2h(self, dst: Tensor, src: Tensor) -> LinkEvent:
        nbytes = _check(host=dst, device=src)
        self.bytes.d2h += nbytes
        with self._timeline.host("device to host", "gradients", nbytes):
            dst.copy_(src)
        return Done(None)

    def fence(self) -> None:
        return None

    def h2d(self, dst: Tensor, src: Tensor, after: LinkFence | None = None) -> LinkEvent:
        nbytes = _check(host=src, device=dst)
        self.bytes.h2d += nbytes
        if not self._timeline.is_open and dst.dtype == src.dtype:
            return submit_copy(dst, src)
        return FutureEvent(self._timed.submit(self._copy, dst, src, nbytes))

    def _copy(self, dst: Tensor, src: Tensor, nbytes: int) -> None:
        with self._timeline.host("host to device", "weights", nbytes):
            dst.copy_(src)

    def needs_pinned_host(self) -> bool:
        return False


class CudaLink:
    """One CUDA device: a stream for each direction, so that copies overlap compute and one another."""

    def __init__(self, device: torch.device, timeline: Timeline = UNTIMED) -> None:
        self.bytes = LinkBytes()
        self._timeline = timeline
        self._device = device
        self._d2h_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._h2d_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def d2h(self, dst: Tensor, src: Tensor) -> LinkEvent:
        nbytes = _check(host=dst, device=src)
        self.bytes.d2h += nbytes
        stream = self._d2h_stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), self._timeline.device("device to host", "gradients", nbytes):
            dst.copy_(src.to(dst.dtype), non_blocking=True)
        # The caching allocator must not hand src's memory out before this stream has read it.
        src.record_stream(stream)
        return StreamEvent(stream, keep=src)

    def fence(self) -> LinkFence:
        return StreamEvent(torch.cuda.current_stream(self._device))

    def h2d(self, dst: Tensor, src: Tensor, after: LinkFence | None = None) -> LinkEvent:
        nbytes = _check(host=src, device=dst)
        self.bytes.h2d += nbytes
        stream = self._h2d_stream
        # Earlier kernels may still read the weights that this copy replaces.
        (after or self.fence()).wait(stream)
        with torch.cuda.stream(stream), self._timeline.device("host to device", "weights", nbytes):
            # In one call torch would cast on the host. The landing place is this stream's, so it needs no fence.
            landed = dst if dst.dtype == src.dtype else torch.empty_like(dst, dtype=src.dtype)
            landed.copy_(src, non_blocking=True)
            if landed is not dst:
                dst.copy_(landed)
        return StreamEvent(stream, keep=src)

    def needs_pinned_host(self) -> bool:
        return True


def link_for(device: torch.device, timeline: Timeline = UNTIMED) -> Link:
    """The link of a device; its copies go into `timeline`.

    Raises:
        ValueError: a device type without one.
    """
    if device.type == "cpu":
        return CpuLink(timeline)
    if device.type == "cuda":
        return CudaLink(device, timeline)
    raise ValueError(f"there is no link to a {device.type!r} device; expected 'cpu' or 'cuda'")
