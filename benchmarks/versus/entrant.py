"""One entrant of `make bench`: the ranks of a contestant, which step together; what it fails of is kept, not raised."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.step_cost import ROOT, BenchmarkError, Contestant, free_port


class Rank(Contestant):
    """One process of `versus/contestants.py`."""

    def command(self, name: str, size: str, table: str) -> list[str]:
        command = super().command(name, size, table)
        return [str(ROOT / "benchmarks" / "versus" / "contestants.py"), *command[1:]]


class Entrant:
    """The ranks of one contestant.

    Args:
        num_ranks: processes; one has no process group unless the contestant makes one.
        variables, more: of the environment and command line of every rank, beside the usual ones.

    Attributes:
        absent: always None: who can't run has an `error`.
        error: the last words of the rank that failed first; None where none did.
    """

    def __init__(
        self,
        name: str,
        size: str,
        table: str,
        peers: Path | None,
        num_ranks: int = 1,
        variables: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.absent: str | None = None
        self.error: str | None = None
        self.ranks: list[Rank] = []
        port = str(free_port())

        def start() -> None:
            for rank in range(num_ranks):
                place = dict(variables or {})
                if num_ranks > 1:
                    place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_PORT": port}
                    place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
                    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "benchmark"}
                self.ranks.append(Rank(name, size, table, peers, place, more))

        self._try(start)

    def _try(self, action: Callable[[], None]) -> None:
        """Do it where nothing failed before; keep what fails, and end the other ranks."""
        if self.error is not None:
            return
        try:
            action()
        except (BenchmarkError, BrokenPipeError) as error:
            self.error = str(error)
            self.close()

    def _each(self, action: Callable[[Rank], Any]) -> None:
        for rank in self.ranks:
            action(rank)

    def ready(self) -> None:
        def act() -> None:
            self._each(Rank.ready)
            for rank in self.ranks:
                if rank.absent is not None:
                    raise BenchmarkError(rank.absent)

        self._try(act)

    def turn(self, steps: int) -> None:
        def act() -> None:
            self._each(lambda rank: rank.tell(str(steps)))
            self._each(Rank.take_turn)

        self._try(act)

    def finish(self) -> None:
        def act() -> None:
            self._each(lambda rank: rank.tell("end"))
            self._each(Rank.take_end)

        self._try(act)

    def close(self) -> None:
        self._each(Rank.close)

    @property
    def why(self) -> str:
        """The line of its last words that names the error."""
        return named_error(self.error or "")

    @property
    def wall(self) -> list[float]:
        """Seconds of a step, per round: the slowest rank's."""
        return [max(map(statistics.mean, turn)) for turn in zip(*(rank.wall for rank in self.ranks), strict=True)]

    @property
    def cpu(self) -> list[float]:
        """CPU seconds of a step, per round: all ranks together."""
        return [sum(map(statistics.mean, turn)) for turn in zip(*(rank.cpu for rank in self.ranks), strict=True)]

    @property
    def losses(self) -> list[tuple[float, ...]]:
        """Per step, of every rank."""
        return list(zip(*(rank.losses for rank in self.ranks), strict=True))

    @property
    def digests(self) -> list[str]:
        return [rank.end["digest"] for rank in self.ranks]

    @property
    def peak_mib(self) -> int:
        """Of all ranks together."""
        return sum(rank.end["peak_mib"] for rank in self.ranks)

    @property
    def facts(self) -> dict[str, Any]:
        """Of its first rank."""
        found: dict[str, Any] = self.ranks[0].end["facts"]
        return found

    @property
    def moved_bytes(self) -> float | None:
        """Bytes per step between ranks (the busiest's writes), or over the link of one process; None if not counted."""
        num_steps = len(self.ranks[0].losses)
        if len(self.ranks) > 1:
            return max(float(rank.end["facts"]["written_bytes"]) for rank in self.ranks) / num_steps
        if "d2h" in self.facts:
            return float(self.facts["d2h"] + self.facts["h2d"]) / num_steps
        return None


def named_error(words: str) -> str:
    """The last line that names an error, of what a process said before it ended; else its last line."""
    lines = [line.strip().removeprefix("[rank0]: ") for line in words.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or "Exception: " in line]
    return (named or lines or ["it said nothing"])[-1]
