"""Starts the ranks of a leg, and says what became of each within a time."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from tests.helpers.ranks import _CONTEXT
from tests.soak.ranks import Leg, run_leg

# What every rank imports is imported once, in the server that ranks are forked from.
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "lightning_superscale.plugins.pytorch", "tests.soak.model"])


@dataclass
class Ended:
    """How a rank ended: "done", "error" with its text, or "killed" without a word."""

    how: str
    text: str = ""


@dataclass
class Started:
    """Where a leg began: the step, the checkpoint's path, the warnings of what was passed over, and when."""

    step: int
    path: str | None
    passed_over: list[str]
    at: float


@dataclass
class Processes:
    """The ranks of a leg.

    Attributes:
        ends: what became of each rank that has ended.
        start: where the leg began, once a rank has said so.
    """

    leg: Leg
    ends: dict[int, Ended] = field(default_factory=dict)
    start: Started | None = None

    def __post_init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: dict[int, Any] = {}
        for rank in range(self.leg.ranks):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=run_leg, args=(rank, self.leg, sender))
            process.start()
            sender.close()
            self._processes.append(process)
            self._pipes[rank] = receiver

    def listen(self, seconds: float, until_started: bool = False) -> bool:
        """Take in what ranks say, for so long; whether all have ended, or a rank has begun to train."""
        deadline = time.monotonic() + seconds
        while len(self.ends) < self.leg.ranks:
            if until_started and self.start is not None:
                return True
            left = [rank for rank in range(self.leg.ranks) if rank not in self.ends]
            # A pipe may be held open by a loader's worker that outlives its rank, so ends of processes count too.
            sources = {self._pipes[rank]: rank for rank in left}
            sources |= {self._processes[rank].sentinel: rank for rank in left}
            ready = wait(list(sources), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            for rank in {sources[source] for source in ready}:
                self._take(rank)
        return True

    def _take(self, rank: int) -> None:
        try:
            if not self._pipes[rank].poll():
                raise EOFError  # it ended without a word
            kind, *rest = self._pipes[rank].recv()
        except (EOFError, OSError):
            self.ends.setdefault(rank, Ended("killed"))
            return
        if kind == "started":
            self.start = self.start or Started(*rest)
        else:
            self.ends[rank] = Ended(kind, *rest)

    def send(self, number: int, ranks: Any = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in range(self.leg.ranks) if ranks is None else ranks:
            process = self._processes[rank]
            if process.is_alive():
                with suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(process.pid, number)

    def alive(self) -> list[int]:
        return [rank for rank, process in enumerate(self._processes) if process.is_alive()]

    def dump_stacks(self) -> None:
        """Let every rank that is left write where it is to its log."""
        self.send(signal.SIGUSR1)
        time.sleep(1.0)

    def close(self) -> None:
        """End what is left."""
        self.send(signal.SIGKILL)
        for process, pipe in zip(self._processes, self._pipes.values(), strict=True):
            process.join(20)
            pipe.close()
