"""Keeps the inputs of checkpointed blocks in host memory between forward and backward, and brings them back in time.

[Note: Activation offload] A checkpointed block keeps its inputs, H * e bytes per token and block (e: bytes of an
element), which grow with depth while everything else of a long sample exists once. Here they lie in host memory: their
copies run while forward goes on, and in backward those of the next blocks come while a block is recomputed. So the
device has the inputs of `num_in_flight` blocks on either way, however many blocks there are, and the host H * e bytes
per token and block. Bits are those of a run without.

[Note: Freed before it is copied] A copy to the host reads memory that forward lets go of meanwhile, and the allocator
gives it to nobody before the copy is done. If copies are slower than forward, ever more memory waits like that. So the
host waits, before it launches a block, until no more than `num_in_flight` blocks' copies are under way; the device
still has those blocks' work queued.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.cpu.memory import HostBuffer
from lightning_superscale.ops.events import Event, note_use
from lightning_superscale.sequence.memory.boundary import boundary_hooks
from lightning_superscale.sequence.memory.host_pool import Buffer, HostPool

NUM_IN_FLIGHT = 2


class Fence(Protocol):
    """A point of the device's work that a copy is ordered after."""

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let the later work of a stream run only after this point."""


class ActivationLink(Protocol):
    """What offloading needs of the link between a device and its host."""

    def d2h(self, dst: Tensor, src: Tensor) -> Event[None]:
        """Start copying `src` (device) to `dst` (host), after the work that the current stream has queued."""

    def h2d(self, dst: Tensor, src: Tensor, after: Fence | None = None) -> Event[None]:
        """Start copying `src` (host) to `dst` (device), after a point of the device's work."""

    def allocating(self) -> AbstractContextManager[object]:
        """While open, memory is allocated for, and work is queued on, the stream of `h2d`."""

    def needs_pinned_host(self) -> bool:
        """Whether copies overlap only if the host side is page-locked."""


class Codec(Protocol):
    """Turns a boundary activation into tensors that are kept in its place."""

    def encode(self, block: int, tensor: Tensor) -> list[Tensor]:
        """What is kept of an input of block number `block`."""

    def decode(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The activation, in its own dtype."""


class OffloadReport(NamedTuple):
    """What crossed the link for activations.

    Attributes:
        bytes_out: bytes copied to the host.
        bytes_in: bytes copied back.
        host_bytes: host memory that is held for them.
        num_blocks_in: how often a block's inputs came back.
        num_not_ahead: how often their copy was not under way yet when they were needed; the last block's of a backward
            never is.
    """

    bytes_out: int
    bytes_in: int
    host_bytes: int
    num_blocks_in: int
    num_not_ahead: int


class ActivationOffload:
    """Keeps boundary activations in host memory; see [Note: Activation offload]. Satisfies `BoundaryStore`.

    Args:
        link: copies between the blocks' device and the host, and counts every byte.
        device: the blocks' device, with its index.
        num_in_flight: number of blocks whose copies may be under way, in forward to the host, and in backward ahead of
            the block that is recomputed.
        codec: keeps activations in fewer bits; None keeps them as they are.
        make: makes host memory; None makes it page-locked where the link needs it.

    Raises:
        SuperScaleError: `num_in_flight` is no positive number.
    """

    def __init__(
        self,
        link: ActivationLink,
        device: torch.device,
        *,
        num_in_flight: int = NUM_IN_FLIGHT,
        codec: Codec | None = None,
        make: Callable[[int], Buffer] | None = None,
    ) -> None:
        if isinstance(num_in_flight, bool) or not isinstance(num_in_flight, int) or num_in_flight < 1:
            raise SuperScaleError(
                f"activation offload: num_in_flight is a number of blocks of at least 1; found {num_in_flight!r}."
            )
        self._link = link
        self._num_in_flight = num_in_flight
        self._codec = codec
        pinned = partial(HostBuffer, pin=link.needs_pinned_host(), device=device.index or 0, in_forks=False)
        self._pool = HostPool(make or pinned)
        self._leaving: deque[tuple[int, Event[None]]] = deque()
        self._last: weakref.ref[_SavedBlock] | None = None
        self._num_calls = self._bytes_out = self._bytes_in = self._num_blocks_in = self._num_not_ahead = 0

    def report(self) -> OffloadReport:
        """Counts since this object was made."""
        held = self._pool.held_bytes
        return OffloadReport(self._bytes_out, self._bytes_in, held, self._num_blocks_in, self._num_not_ahead)

    def forget(self) -> None:
        """Count anew, as if this object had just been made."""
        self._num_calls = self._bytes_out = self._bytes_in = self._num_blocks_in = self._num_not_ahead = 0

    @property
    def lent_bytes(self) -> int:
        """Host memory of activations that some graph still needs."""
        return self._pool.lent_bytes

    @contextmanager
    def saving(self, block: int, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Let a block save its inputs in host memory; see `BoundaryStore`."""
        last = None if self._last is None else self._last()
        # Blocks of another forward come back in another backward, if at all.
        self._num_calls += 1
        before = self._last if last is not None and last.block < block else None
        saved = _SavedBlock(block, self._num_calls, before)
        self._last = weakref.ref(saved)
        with boundary_hooks(inputs, partial(self._pack, saved), self._unpack):
            yield

    def close(self) -> None:
        """Wait for copies under way, and give the host memory back that no graph needs any more."""
        while self._leaving:
            self._leaving.popleft()[1].synchronize()
        self._pool.clear()

    @torch.no_grad()
    def _pack(self, saved: _SavedBlock, tensor: Tensor) -> _OnHost:
        while self._leaving and self._leaving[0][0] <= saved.call - self._num_in_flight:
            self._leaving.popleft()[1].synchronize()  # [Note: Freed before it is copied]
        kept = [tensor] if self._codec is None else self._codec.encode(saved.block, tensor)
        parts = []
        for part in kept:
            buffer = self._pool.take(part.nbytes)
            host = buffer.tensor(part.dtype, part.numel()).view(part.shape)
            event = self._link.d2h(host, part)
            self._leaving.append((saved.call, event))
            self._bytes_out += part.nbytes
            parts.append(_Part(buffer, host, event))
        on_host = _OnHost(saved, parts, tensor, self._link, self._pool)
        saved.inputs.append(weakref.ref(on_host))
        return on_host

    @torch.no_grad()
    def _unpack(self, on_host: _OnHost) -> Tensor:
        is_ahead = on_host.is_arriving
        self._bytes_in += on_host.start()
        self._num_blocks_in += 1
        self._num_not_ahead += not is_ahead
        saved: _SavedBlock | None = on_host.saved
        for _ in range(self._num_in_flight):
            saved = None if saved is None or saved.before is None else saved.before()
            if saved is None:
                break
            for reference in saved.inputs:
                other = reference()
                if other is not None:
                    self._bytes_in += other.start()
        return on_host.finish(None if self._codec is None else self._codec.decode)


class _SavedBlock:
    """The saved inputs of one call of a block.

    Attributes:
        block: number of the block.
        call: number of the call, among all calls of blocks.
        before: the call of the block before it in the same forward.
        inputs: its boundary activations; the graph owns them.
    """

    def __init__(self, block: int, call: int, before: weakref.ref[_SavedBlock] | None) -> None:
        self.block = block
        self.call = call
        self.before = before
        self.inputs: list[weakref.ref[_OnHost]] = []


class _Part(NamedTuple):
    buffer: Buffer
    host: Tensor
    has_left: Event[None]


class _NewMemory:
    """The fence of a copy into memory that the stream of the copy has just allocated: no other stream uses it."""

    def wait(self, stream: torch.cuda.Stream) -> None:
        return


class _OnHost:
    """A boundary activation in host memory, which is lent to it until the graph drops it.

    Attributes:
        saved: the block's call that it is an input of.
    """

    def __init__(
        self, saved: _SavedBlock, parts: list[_Part], tensor: Tensor, link: ActivationLink, pool: HostPool
    ) -> None:
        self.saved = saved
        self._parts = parts
        self._dtype, self._device = tensor.dtype, tensor.device
        self._strides = None if tensor.is_contiguous() else tensor.stride()
        self._link = link
        self._pool = pool
        self._arriving: list[tuple[Tensor, Event[None]]] | None = None

    @property
    def is_arriving(self) -> bool:
        return self._arriving is not None

    def start(self) -> int:
        """Start the copy to the device, unless it is under way; returns the bytes of a copy that was started."""
        if self._arriving is not None:
            return 0
        self._arriving = []
        with self._link.allocating():
            for part in self._parts:
                part.has_left.wait()  # orders this stream's copy after it; the host does not wait
                target = torch.empty(part.host.shape, dtype=part.host.dtype, device=self._device)
                self._arriving.append((target, self._link.h2d(target, part.host, _NewMemory())))
        return sum(part.host.nbytes for part in self._parts)

    def finish(self, decode: Callable[[Sequence[Tensor], torch.dtype], Tensor] | None) -> Tensor:
        """The activation on the device, for later work of the current stream. Another backward copies it anew."""
        if self._arriving is None:
            raise AssertionError("an activation is used before its copy was started")
        arrived, self._arriving = self._arriving, None
        for target, event in arrived:
            event.wait()
            note_use(target)
        tensors = [target for target, _ in arrived]
        tensor = tensors[0] if decode is None else decode(tensors, self._dtype)
        if self._strides is None:
            return tensor
        strided = torch.empty_strided(tensor.shape, self._strides, dtype=tensor.dtype, device=tensor.device)
        return strided.copy_(tensor)

    def __del__(self) -> None:
        # What comes to the buffers next is ordered after the current stream, so after a copy that nobody waited for.
        for _, event in self._arriving or ():
            event.wait()
        for part in self._parts:
            self._pool.put_back(part.buffer)
