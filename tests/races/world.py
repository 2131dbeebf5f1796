"""Everything that the checker knows: actors, memory, who touched it when, and the races that were found.

[Note: What a race is] Two accesses to overlapping bytes, at least one of them a write, are a race if neither happened
before the other. So are: giving memory of a host buffer back (unmapping it) while a stream may still use it, and giving
device memory back to the caching allocator while another stream than the one that owns it may still use it. The
allocator hands such memory out at once to later work of the owning stream, and knows of other streams' work by
`record_stream` only.

[Note: Which memory is the host's] All tensors are torch's CPU tensors. Which of them play device memory follows from
how they came to be: host buffers and what is computed from host memory alone is the host's, all else the device's.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_superscale.torch_private import storage_id_of
from tests.races.clocks import Actor, Clock, join

PACKAGE = "lightning_superscale/"


@dataclass(frozen=True, slots=True)
class Access:
    """One access to a range of bytes of one allocation."""

    start: int
    stop: int
    actor: str
    time: int
    is_write: bool
    where: str


@dataclass(slots=True, eq=False)
class Allocation:
    """Memory of one storage.

    Attributes:
        owner: the stream that took it from the caching allocator; the thread that made it, for host memory.
        recorded: streams of `record_stream`.
        is_pinned: whether it is page-locked host memory, whose release waits for the device.
    """

    is_on_host: bool
    owner: Actor
    where: str
    is_pinned: bool = False
    accesses: list[Access] = field(default_factory=list)
    recorded: list[Actor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Race:
    """One kind of race: what is not ordered, at which two places."""

    what: str
    now: str
    before: str

    def __str__(self) -> str:
        return f"{self.what}\n      now:    {self.now}\n      before: {self.before}"


class World:
    """Records accesses and reports races. Any thread may call it.

    Attributes:
        races: every kind that was found, with how often.
        num_accesses: accesses that were compared.
        queries: what `event.query()` answers about work that is not known to be over: "random", "yes" or "no".
        streams: every stream there is.
        issued: the device's collectives in the order of their start: the number of the group, and what each rank sent.
        allocated: bytes of device memory that are taken now.
        peak: the most that were taken at one time.
    """

    def __init__(self, queries: str = "random") -> None:
        self.lock = threading.RLock()
        self.races: dict[Race, int] = {}
        self.num_accesses = 0
        self.queries = queries
        self.allocated = self.peak = 0
        self.compute: Actor = Actor("the stream that computes")
        self._local = threading.local()
        self.streams: list[Actor] = []
        self.issued: list[tuple[int, list[int]]] = []
        self._memory: dict[int, Allocation] = {}
        self._finalizers: dict[int, weakref.finalize] = {}
        self._dice = 1
        self._num_actors = 0

    # Actors

    @property
    def thread(self) -> Actor:
        """The calling thread."""
        actor = getattr(self._local, "actor", None)
        if actor is None:
            actor = self._local.actor = Actor(self.new_name(f"thread {threading.current_thread().name}"))
        return actor

    @property
    def stream(self) -> Actor:
        """The calling thread's current stream."""
        return getattr(self._local, "stream", None) or self.compute

    def new_name(self, kind: str) -> str:
        """A name that no other actor has."""
        with self.lock:
            self._num_actors += 1
            return f"{kind} {self._num_actors}"

    @contextlib.contextmanager
    def on_stream(self, stream: Actor | None) -> Iterator[None]:
        """Let the calling thread's work go to a stream."""
        before = getattr(self._local, "stream", None)
        self._local.stream = stream or before
        try:
            yield
        finally:
            self._local.stream = before

    def launch(self, stream: Actor) -> None:
        """The calling thread gives a stream work, which runs after all that the thread has seen."""
        join(stream.clock, self.thread.clock)

    def is_query_true(self) -> bool:
        if self.queries != "random":
            return self.queries == "yes"
        with self.lock:
            self._dice = (self._dice * 1103515245 + 12345) & 0x7FFFFFFF
            return (self._dice >> 16) % 2 == 0

    # Memory

    @contextlib.contextmanager
    def making_host_memory(self) -> Iterator[None]:
        """While open, new tensors of the calling thread are the host's."""
        self._local.host_depth = getattr(self._local, "host_depth", 0) + 1
        try:
            yield
        finally:
            self._local.host_depth -= 1

    @property
    def makes_host_memory(self) -> bool:
        return getattr(self._local, "host_depth", 0) > 0

    def is_known(self, tensor: Tensor) -> bool:
        return storage_id_of(tensor.untyped_storage()) in self._memory

    def allocation_of(self, tensor: Tensor, where: str = "") -> Allocation:
        """The memory that a tensor views; new memory is taken now."""
        storage = tensor.untyped_storage()
        key = storage_id_of(storage)
        with self.lock:
            known = self._memory.get(key)
            if known is None:
                is_on_host = self.makes_host_memory
                known = Allocation(is_on_host, self.thread if is_on_host else self.stream, where)
                self._memory[key] = known
                finalizer = self._finalizers[key] = weakref.finalize(storage, self._freed, key, storage.nbytes())
                finalizer.atexit = False
                if not is_on_host:
                    self.take(known, storage.nbytes())
            return known

    def take(self, allocation: Allocation, nbytes: int) -> None:
        """The current stream takes device memory, whose earlier users the allocator knows in this stream only."""
        with self.lock:
            stream = allocation.owner = self.stream
            allocation.recorded = []
            self.launch(stream)
            allocation.accesses = [Access(0, 1 << 60, stream.name, stream.tick(), True, f"taken: {allocation.where}")]
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)

    def _freed(self, key: int, nbytes: int) -> None:
        with self.lock:
            known = self._memory.pop(key, None)
            self._finalizers.pop(key, None)
            if known is not None:
                self.give_back(known, nbytes, f"freed: {known.where}")

    def give_back(self, allocation: Allocation, nbytes: int, where: str) -> None:
        """Memory goes back to the allocator, or is unmapped."""
        with self.lock:
            clock: Clock = dict(self.thread.clock)
            if not allocation.is_on_host:
                self.allocated -= nbytes
                for actor in (allocation.owner, *allocation.recorded):
                    join(clock, actor.clock)
            if allocation.is_pinned:
                for actor in self.streams:
                    join(clock, actor.clock)
            for access in allocation.accesses:
                if clock.get(access.actor, 0) < access.time:
                    what = "host memory is freed" if allocation.is_on_host else "device memory is given back"
                    self.report(f"{what} while {_kind(access.actor)} may use it", where, access.where)
            allocation.accesses = []

    def touch(
        self, actor: Actor, reads: Sequence[Tensor], writes: Sequence[Tensor], where: str, *, time: int | None = None
    ) -> None:
        """One deed of an actor reads and writes tensors."""
        with self.lock:
            now = actor.tick() if time is None else time
            for is_write, tensors in ((False, reads), (True, writes)):
                for tensor in tensors:
                    span = _span(tensor)
                    if span is not None:
                        known = self.allocation_of(tensor, where)
                        self._access(known, Access(*span, actor.name, now, is_write, where), actor)

    def _access(self, allocation: Allocation, new: Access, actor: Actor) -> None:
        self.num_accesses += 1
        for old in allocation.accesses:
            overlaps = old.start < new.stop and new.start < old.stop
            if overlaps and (old.is_write or new.is_write) and not actor.knows(old.actor, old.time):
                verbs = ["write" if access.is_write else "read" for access in (new, old)]
                self.report(
                    f"a {verbs[0]} by {_kind(new.actor)} is not ordered after a {verbs[1]} by {_kind(old.actor)}",
                    new.where,
                    old.where,
                )
        if new.is_write:  # what it covers and is known to be over can be in no further race that this one is not in
            allocation.accesses = [
                old
                for old in allocation.accesses
                if not (new.start <= old.start and old.stop <= new.stop and actor.knows(old.actor, old.time))
            ]
        else:
            allocation.accesses = [
                old
                for old in allocation.accesses
                if not (old.actor == new.actor and not old.is_write and new.start <= old.start and old.stop <= new.stop)
            ]
        allocation.accesses.append(new)

    def report(self, what: str, now: str, before: str) -> None:
        race = Race(what, now, before)
        self.races[race] = self.races.get(race, 0) + 1

    def close(self) -> None:
        """Forget all memory, so that nothing is reported any more."""
        with self.lock:
            for finalizer in self._finalizers.values():
                finalizer.detach()
            self._finalizers.clear()
            self._memory.clear()


def where_am_i(what: str) -> str:
    """The innermost line of the package that runs, or the model's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name and "/tests/" not in name:
            return f"{what} in {name.rsplit(PACKAGE, 1)[1]}, {frame.f_code.co_qualname}"
        frame = frame.f_back
    return f"{what} of the model"


def _kind(actor: str) -> str:
    """An actor's name without its number, so that equal races count as one."""
    return " ".join(word for word in actor.split() if not word.isdigit())


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """The bytes of its storage that a tensor views; None where it has no elements."""
    if tensor.numel() == 0:
        return None
    itemsize = tensor.element_size()
    start = tensor.storage_offset() * itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * itemsize


def is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided
