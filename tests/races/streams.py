"""Stand-ins for torch.cuda's streams and events, which order work and run nothing."""

from __future__ import annotations

from typing import Any

import torch

from tests.races.clocks import Actor, Clock, join
from tests.races.world import World

# An event that was asked so often says that it is over: some code polls.
_MOST_QUERIES = 3


class Stream(Actor):
    """Stands in for torch.cuda.Stream."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name)
        self._world = world
        world.streams.append(self)
        self.device = torch.device("cpu")
        self.cuda_stream = id(self)

    def wait_stream(self, other: Actor) -> None:
        with self._world.lock:
            self._world.launch(other)
            join(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        with self._world.lock:
            join(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._world)
        event.record(self)
        return event

    def synchronize(self) -> None:
        with self._world.lock:
            join(self._world.thread.clock, self.clock)


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._clock: Clock | None = None
        self._num_queries = 0

    @property
    def clock(self) -> Clock:
        assert self._clock is not None, "an event that was never recorded orders nothing"
        return self._clock

    def record(self, stream: Any = None) -> None:
        with self._world.lock:
            stream = stream or self._world.stream
            self._world.launch(stream)
            self._clock = dict(stream.clock)

    def wait(self, stream: Any = None) -> None:
        (stream or self._world.stream).wait_event(self)

    def query(self) -> bool:
        self._num_queries += 1
        if self._num_queries <= _MOST_QUERIES and not self._world.is_query_true():
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        with self._world.lock:
            join(self._world.thread.clock, self.clock)
