"""Plays NCCL over gloo: each process group has a stream of its own, and waiting for a collective orders streams."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from lightning_superscale.comm import collectives
from tests.races.streams import Event, Stream
from tests.races.world import World, where_am_i

_LIMIT_S = 60.0
# Under another name, because collectives are issued in comm/collectives.py only: this is what it issues them to.
_REAL: Any = sys.modules["torch.distributed"]


class Group:
    """A process group: its collectives run one after the other, beside the thread that issues them."""

    def __init__(self, world: World) -> None:
        self.stream = Stream(world, world.new_name("collectives"))
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def run(self, call: Callable[[], object]) -> threading.Event:
        """Run a call after those before it; the result is set when it is over."""
        is_over = threading.Event()
        self._calls.put((call, is_over))
        return is_over

    def _run(self) -> None:
        while True:
            call, is_over = self._calls.get()
            call()
            is_over.set()


class Work:
    """The handle of a collective. Keeps its tensors until somebody waited for it, as NCCL's does."""

    def __init__(self, event: Event, is_over: threading.Event, tensors: list[Tensor]) -> None:
        self._event, self._is_over, self._tensors = event, is_over, tensors

    def wait(self, _timeout: Any = None) -> None:
        assert self._is_over.wait(_LIMIT_S)  # the values have to be there; by the clocks the host waits not
        self._event.wait()
        self._tensors = []

    def is_completed(self) -> bool:
        return self._event.query()


class Distributed:
    """torch.distributed, whose collectives of device memory run in streams."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._groups: dict[int, Group] = {}  # groups of the control plane, which is gloo's, are not here

    def __getattr__(self, name: str) -> Any:
        return getattr(_REAL, name)

    def get_backend_config(self, group: Any = None) -> str:
        self._groups.setdefault(id(group), Group(self._world))
        return "cpu:nccl"

    def _run(self, call: Callable[[], object], reads: list[Tensor], writes: list[Tensor], group: Any) -> Work:
        world = self._world
        with world.lock:
            played = self._groups[id(group)]
            world.issued.append((list(self._groups).index(id(group)), [t.numel() for t in reads]))
            stream = played.stream
            stream.wait_stream(world.stream)
            world.touch(stream, reads, writes, where_am_i("a collective"))
            event = stream.record_event()
        return Work(event, played.run(call), [*reads, *writes])

    def reduce_scatter_tensor(self, out: Tensor, packed: Tensor, *, group: Any, async_op: bool) -> Work:
        def call() -> None:
            _REAL.reduce_scatter_tensor(out, packed, group=group)

        return self._run(call, [packed], [out], group)

    def all_gather(self, packed: Tensor, own: Tensor, *, group: Any, async_op: bool) -> Work:
        def call() -> None:
            rows = packed.view(-1, own.numel())
            _REAL.all_gather(list(rows.unbind()), own.clone(), group=group)

        return self._run(call, [own], [packed], group)

    def broadcast(self, tensor: Tensor, source: int, *, group: Any) -> None:
        def call() -> None:
            _REAL.broadcast(tensor, source, group=group)

        self._run(call, [tensor], [tensor], group).wait()

    def all_reduce(self, tensor: Tensor, *args: Any, group: Any, async_op: bool = False, **options: Any) -> Any:
        if id(group) not in self._groups:
            return _REAL.all_reduce(tensor, *args, group=group, async_op=async_op, **options)

        def call() -> None:
            _REAL.all_reduce(tensor, *args, group=group, **options)

        work = self._run(call, [tensor], [tensor], group)
        if not async_op:
            work.wait()
            return None
        return work


def play_nccl(patch: pytest.MonkeyPatch, world: World) -> None:
    played = Distributed(world)
    patch.setattr(collectives, "dist", played)
    patch.setattr(collectives, "_ALL_GATHER", played.all_gather)
