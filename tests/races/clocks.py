"""Vector clocks: what has happened before what, whatever the timing.

An actor is whatever does one thing after another: a stream, a host thread, a job of the worker pool. Each counts its
own deeds; its clock says how many of every other actor's deeds are known to be over. A deed happened before another if
the other's actor knew of it (Lamport 1978; Fidge 1988).
"""

from __future__ import annotations

Clock = dict[str, int]


def join(clock: Clock, other: Clock) -> None:
    """Let a clock know all that another knows."""
    for actor, time in other.items():
        if time > clock.get(actor, 0):
            clock[actor] = time


class Actor:
    """Something that does one thing after another.

    Attributes:
        name: unique within a world.
        clock: the deeds of all actors that are known to be over.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 0}

    def tick(self) -> int:
        """Count one more deed of its own; returns its number."""
        self.clock[self.name] += 1
        return self.clock[self.name]

    def knows(self, actor: str, time: int) -> bool:
        """Whether a deed is known to be over."""
        return self.clock.get(actor, 0) >= time
