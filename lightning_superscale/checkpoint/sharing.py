"""Segments that several ranks want: read by one, sent to the others, in rounds that overlap.

[Note: Rounds] While the messages of one round travel, the next one is read and packed, and the one before is scattered.
Each of the three has its own part of the memory. Who reads a segment packs and scatters it at once, while it is in the
core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_superscale.checkpoint.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.filling import Buffers, Filling, Others
from lightning_superscale.checkpoint.reshard import ALIGN_BYTES, Parcel, Segment, pack, rounds_of
from lightning_superscale.comm.collectives import exchange
from lightning_superscale.comm.mesh import DataMesh

_ROUNDS_IN_MEMORY = 3


class Sharing:
    """Reads and exchanges parcels, to fill what ranks asked for ([Note: Rounds]).

    Args:
        read: fills the beginning of a buffer with a segment's bytes, verified; how many these are.
        errors: takes what goes wrong here, for the caller to tell all ranks once nobody waits any more.
    """

    def __init__(
        self,
        mesh: DataMesh,
        mine: Filling,
        others: Others,
        read: Callable[[Segment, Tensor], int],
        threads: ThreadPoolExecutor,
        errors: list[Exception],
    ) -> None:
        self._mesh = mesh
        self._rank = mesh.world.rank
        self._mine = mine
        self._others = others
        self._read = read
        self._threads = threads
        self._errors = errors
        self._buffers = Buffers(mine.is_pinned)

    def run(self, parcels: Sequence[Parcel]) -> int:
        """Bytes that this rank read. Every rank calls it, with the same parcels.

        A rank that can't read sends what it has, so that nobody waits, and adds its error to `errors`.
        """
        planned = rounds_of(parcels)
        room = max((sum(_aligned(parcel.held(self._rank)) for parcel in those) for those in planned), default=0)
        shape = (min(len(planned), _ROUNDS_IN_MEMORY), room)
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=self._mine.is_pinned)
        rounds: list[_Round] = []
        nbytes = 0
        for i in range(len(planned)):
            for j in range(len(rounds), min(i + 2, len(planned))):
                if j >= _ROUNDS_IN_MEMORY:
                    self._finish(rounds[j - _ROUNDS_IN_MEMORY].scattering)  # its memory is taken over
                rounds.append(self._begin(planned[j], memory[j % _ROUNDS_IN_MEMORY]))
            now = rounds[i]
            nbytes += self._finish(now.reading)
            exchange(self._mesh, now.sent, now.received, "the exchange of a checkpoint's blocks")
            now.scattering = [self._threads.submit(self._scatter, *arrived) for arrived in now.arrivals]
        for last in rounds[-_ROUNDS_IN_MEMORY:]:
            self._finish(last.scattering)
        return nbytes

    def _begin(self, parcels: Sequence[Parcel], memory: Tensor) -> _Round:
        """Divide the memory among a round's messages, and start to read what this rank sends."""
        begun, used = _Round(), 0

        def take(nbytes: int) -> Tensor:
            nonlocal used
            start, used = used, used + _aligned(nbytes)
            return memory[start : start + nbytes]

        for parcel in parcels:
            reader, nbytes = parcel.segment.reader, parcel.nbytes
            if reader != self._rank:
                if nbytes[self._rank]:
                    message = take(nbytes[self._rank])
                    begun.received.append((message, reader))
                    begun.arrivals.append((parcel, message))
                continue
            getters = [rank for rank, count in enumerate(nbytes) if count]
            if parcel.is_whole:
                whole = take(max(nbytes))
                begun.sent.append((whole, getters))
                begun.reading.append(self._threads.submit(self._read_whole, parcel.segment, whole))
            else:
                messages = [(take(nbytes[rank]), rank) for rank in getters]
                begun.sent += [(message, [rank]) for message, rank in messages]
                begun.reading.append(self._threads.submit(self._read_and_pack, parcel.segment, messages))
        return begun

    def _read_whole(self, segment: Segment, message: Tensor) -> int:
        nbytes = self._read(segment, message)
        self._mine.scatter(segment, message)
        return nbytes

    def _read_and_pack(self, segment: Segment, messages: Sequence[tuple[Tensor, int]]) -> int:
        with self._buffers.take() as buffer:
            nbytes = self._read(segment, buffer)
            data = buffer[:nbytes]
            for message, rank in messages:
                pack(self._others.windows(rank, segment), data, segment.first * BLOCK_BYTES, message)
            self._mine.scatter(segment, data)
        return nbytes

    def _scatter(self, parcel: Parcel, message: Tensor) -> int:
        if not self._errors:
            (self._mine.scatter if parcel.is_whole else self._mine.scatter_packed)(parcel.segment, message)
        return 0

    def _finish(self, tasks: list[Future[int]]) -> int:
        total = 0
        for task in tasks:
            try:
                total += task.result()
            except Exception as error:
                self._errors.append(error)
        tasks.clear()
        return total


class _Round:
    """Parcels that travel at once, as one rank sees them."""

    def __init__(self) -> None:
        self.sent: list[tuple[Tensor, list[int]]] = []
        self.received: list[tuple[Tensor, int]] = []
        self.arrivals: list[tuple[Parcel, Tensor]] = []
        self.reading: list[Future[int]] = []
        self.scattering: list[Future[int]] = []


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
