"""Segments that several ranks want: one of the ranks reads each and sends it to the others, in rounds that overlap.

[Note: Rounds] While the messages of one round travel, the next one is read and packed, and the one before is scattered.
Each of the three has its own part of the memory. The thread that reads a segment packs and scatters it at once, while
it is in the core's cache.

[Note: One host] Ranks of one host don't send. Each reads into memory that all of them map, they agree that a round is
read, and the others scatter from it. A rank agrees only once it has scattered the round before, so after the agreement
the memory of that round is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES
from lightning_superscale.checkpoint.load import segments
from lightning_superscale.checkpoint.load.scatter import Buffers, Filling, Others
from lightning_superscale.checkpoint.load.segments import ALIGN_BYTES, Segment, Transfer, pack, rounds_of
from lightning_superscale.comm.collectives import control_max, exchange
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.comm.shared_memory import map_host_memory

_ROUNDS_IN_MEMORY = 3
_WHAT = "the exchange of a checkpoint's blocks"

Read = Callable[[Segment, Tensor], int]


class _Round:
    """One rank's work in a round: the messages that it sends and receives, and its reads and copies in flight."""

    def __init__(self) -> None:
        self.sent: list[tuple[Tensor, list[int]]] = []
        self.received: list[tuple[Tensor, int]] = []
        self.arrivals: list[tuple[Transfer, Tensor]] = []
        self.reading: list[Future[int]] = []
        self.scattering: list[Future[int]] = []


class Sharing:
    """Reads and exchanges segments, to fill the requests of all ranks ([Note: Rounds]).

    Args:
        mesh: the ranks that read together.
        mine: this rank's requests.
        read: fills the beginning of a flat uint8 buffer with a segment's bytes, verified, and returns their number.
        threads: threads that read and scatter.
        errors: takes this rank's errors, for the caller to raise on all ranks once no rank waits for another.
    """

    def __init__(
        self, mesh: DataMesh, mine: Filling, read: Read, threads: ThreadPoolExecutor, errors: list[Exception]
    ) -> None:
        self._mesh = mesh
        self._rank = mesh.world.rank
        self._mine = mine
        self._read = read
        self._threads = threads
        self._errors = errors

    def run_mapped(self, transfers: Sequence[Transfer]) -> int | None:
        """Read shared segments into memory that all ranks map, and fill requests ([Note: One host]).

        Every rank calls it. A rank that can't read adds its error to `errors` and goes on, so that no rank waits.

        Args:
            transfers: results of `mapped_transfer_of`, the same on every rank.

        Returns:
            Bytes that this rank read; None, and nothing was done, where ranks can't map one another's memory.
        """
        world_size = self._mesh.world.size
        # Rounds are small, so that caches hold the bytes that one core wrote until another reads them.
        rounds = rounds_of(transfers, segments.ROUND_BYTES // 4, is_mapped=True)
        room = max((_room(those, rank, is_mapped=True) for those in rounds for rank in range(world_size)), default=0)
        num_areas = min(len(rounds), _ROUNDS_IN_MEMORY)
        memory = map_host_memory(self._mesh, num_areas * room)
        if memory is None:
            return None
        areas = [[whole[i * room : (i + 1) * room] for whole in memory] for i in range(num_areas)]
        nbytes, last = 0, _Round()
        coming = self._begin_mapped(rounds[0], areas[0])
        for i in range(len(rounds)):
            now = coming
            if i + 1 < len(rounds):
                coming = self._begin_mapped(rounds[i + 1], areas[(i + 1) % num_areas])
            nbytes += self._finish(now.reading)
            self._finish(last.scattering)
            control_max(self._mesh, torch.zeros(1), _WHAT)
            self._scatter_arrivals(now)
            last = now
        self._finish(last.scattering)
        return nbytes

    def run(self, transfers: Sequence[Transfer], others: Others) -> int:
        """Read shared segments, send them to the ranks that want them, and fill requests ([Note: Rounds]).

        Every rank calls it. A rank that can't read sends its memory as it is, so that no rank waits, and adds its error
        to `errors`.

        Args:
            transfers: results of `transfer_of`, the same on every rank.
            others: the other ranks' read items.

        Returns:
            Bytes that this rank read.
        """
        planned = rounds_of(transfers)
        room = max((_room(those, self._rank) for those in planned), default=0)
        shape = (min(len(planned), _ROUNDS_IN_MEMORY), room)
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=self._mine.is_pinned)
        buffers = Buffers(self._mine.is_pinned)
        rounds: list[_Round] = []
        nbytes = 0
        for i in range(len(planned)):
            for j in range(len(rounds), min(i + 2, len(planned))):
                if j >= _ROUNDS_IN_MEMORY:
                    self._finish(rounds[j - _ROUNDS_IN_MEMORY].scattering)  # round j takes over its memory
                rounds.append(self._begin(planned[j], memory[j % _ROUNDS_IN_MEMORY], others, buffers))
            now = rounds[i]
            nbytes += self._finish(now.reading)
            exchange(self._mesh, now.sent, now.received, _WHAT)
            self._scatter_arrivals(now)
        for last in rounds[-_ROUNDS_IN_MEMORY:]:
            self._finish(last.scattering)
        return nbytes

    def _begin_mapped(self, transfers: Sequence[Transfer], area: Sequence[Tensor]) -> _Round:
        """Place a round's segments in the memory of their readers, and start to read this rank's segments."""
        begun, used = _Round(), [0] * len(area)
        for transfer in transfers:
            reader = transfer.segment.reader
            start, used[reader] = used[reader], used[reader] + _aligned(transfer.held(reader))
            message = area[reader][start : start + transfer.held(reader)]
            if reader == self._rank:
                begun.reading.append(self._threads.submit(self._read_whole, transfer.segment, message))
            elif transfer.nbytes[self._rank]:
                begun.arrivals.append((transfer, message))
        return begun

    def _begin(self, transfers: Sequence[Transfer], memory: Tensor, others: Others, buffers: Buffers) -> _Round:
        """Divide the memory among a round's messages, and start to read the segments that this rank sends."""
        begun, used = _Round(), 0

        def take(nbytes: int) -> Tensor:
            nonlocal used
            start, used = used, used + _aligned(nbytes)
            return memory[start : start + nbytes]

        for transfer in transfers:
            reader, nbytes = transfer.segment.reader, transfer.nbytes
            if reader != self._rank:
                if nbytes[self._rank]:
                    message = take(nbytes[self._rank])
                    begun.received.append((message, reader))
                    begun.arrivals.append((transfer, message))
                continue
            getters = [rank for rank, count in enumerate(nbytes) if count]
            if transfer.is_whole:
                whole = take(max(nbytes))
                begun.sent.append((whole, getters))
                begun.reading.append(self._threads.submit(self._read_whole, transfer.segment, whole))
            else:
                messages = [(take(nbytes[rank]), rank) for rank in getters]
                begun.sent += [(message, [rank]) for message, rank in messages]
                reading = self._threads.submit(self._read_and_pack, transfer.segment, messages, others, buffers)
                begun.reading.append(reading)
        return begun

    def _read_whole(self, segment: Segment, message: Tensor) -> int:
        nbytes = self._read(segment, message)
        self._mine.scatter(segment, message)
        return nbytes

    def _read_and_pack(
        self, segment: Segment, messages: Sequence[tuple[Tensor, int]], others: Others, buffers: Buffers
    ) -> int:
        with buffers.take() as buffer:
            nbytes = self._read(segment, buffer)
            data = buffer[:nbytes]
            for message, rank in messages:
                pack(others.parts_of(rank, segment), data, segment.first * BLOCK_BYTES, message)
            self._mine.scatter(segment, data)
        return nbytes

    def _scatter_arrivals(self, now: _Round) -> None:
        now.scattering = [self._threads.submit(self._scatter, *arrived) for arrived in now.arrivals]

    def _scatter(self, transfer: Transfer, message: Tensor) -> int:
        if not self._errors:
            (self._mine.scatter if transfer.is_whole else self._mine.scatter_packed)(transfer.segment, message)
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


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def _room(transfers: Sequence[Transfer], rank: int, *, is_mapped: bool = False) -> int:
    """Bytes of a rank's memory that a round's messages take; of mapped memory, those that the rank reads itself."""
    return sum(_aligned(each.held(rank)) for each in transfers if not is_mapped or each.segment.reader == rank)
