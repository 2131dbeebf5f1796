"""What happens to a leg: how it is done, and what has to come of it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning_superscale as lss
from tests.soak.processes import Processes
from tests.soak.ranks import PATIENCE_S

# Seconds within which every rank ends after one has failed; far below any timeout of a collective.
ENDS_WITHIN_S = 40.0


@dataclass(frozen=True)
class Happening:
    """Something that happens to a run.

    Attributes:
        name: as the report calls it.
        do: does it from outside, to the ranks of a leg, some time after it has begun; None where a rank does it itself.
        trap: what a rank does to itself; see Leg.
        says: words, one of which each rank that lives on has to end with; empty where none need be said.
        needs_ours: whether it is promised under this package's strategies only.
        needs_ranks: least number of ranks.
        kinds: of runs.
    """

    name: str
    do: Callable[[Processes, random.Random], str] | None = None
    trap: str = ""
    says: tuple[str, ...] = ()
    needs_ours: bool = False
    needs_ranks: int = 1
    kinds: tuple[str, ...] = ("fp32", "fp16")


def kill_one(processes: Processes, rng: random.Random) -> str:
    rank = rng.randrange(processes.leg.ranks)
    processes.send(signal.SIGKILL, [rank])
    return f"rank {rank}"


def kill_all(processes: Processes, rng: random.Random) -> str:
    processes.send(signal.SIGKILL)
    return "all ranks"


def terminate(processes: Processes, rng: random.Random) -> str:
    processes.send(signal.SIGTERM)
    return "all ranks"


def stop(processes: Processes, rng: random.Random) -> str:
    """Stop a rank for good: the others end, and then it is killed."""
    rank = rng.randrange(processes.leg.ranks)
    processes.send(signal.SIGSTOP, [rank])
    others = processes.leg.ranks - 1
    deadline = time.monotonic() + PATIENCE_S + ENDS_WITHIN_S
    while len(processes.ends) < others and time.monotonic() < deadline:
        processes.listen(0.2)
    left = [other for other in processes.alive() if other != rank and other not in processes.ends]
    if left:
        processes.dump_stacks()
    processes.send(signal.SIGKILL, [rank])
    return f"FAILED: ranks {left} went on although rank {rank} was stopped for good" if left else f"rank {rank}"


def pause(processes: Processes, rng: random.Random) -> str:
    """Stop a rank for less than the others' patience: nobody ends. Then all are killed, so that the run is cut."""
    rank = rng.randrange(processes.leg.ranks)
    processes.send(signal.SIGSTOP, [rank])
    processes.listen(2.0)
    processes.send(signal.SIGCONT, [rank])
    processes.listen(2.0)
    if any(end.how != "done" for end in processes.ends.values()):
        return f"FAILED: a rank ended while rank {rank} was paused for 2 s"
    processes.send(signal.SIGKILL)
    return f"rank {rank}"


def damage(processes: Processes, rng: random.Random) -> str:
    """Kill all ranks, and flip bytes of the newest checkpoint."""
    processes.send(signal.SIGKILL)
    processes.listen(20.0)
    newest = lss.last_checkpoint(processes.leg.checkpoints, reads_all=False)
    if newest is None:
        return "nothing to damage"
    path = rng.choice(sorted(path for path in Path(newest).rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"damaged {newest}"


def fill_disk(processes: Processes, rng: random.Random) -> str:
    """Fill the disk of checkpoints, let the run end of it, and free it."""
    ballast = os.path.join(processes.leg.checkpoints, os.pardir, "ballast")
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    try:
        processes.listen(ENDS_WITHIN_S)
    finally:
        os.unlink(ballast)
    return "disk of checkpoints"


NAMED = ("rank ", "ranks ", "Connection closed by peer", "Connection reset by peer", "timed out", "Broken pipe")
HAPPENINGS = (
    Happening("SIGKILL of one rank", kill_one, says=NAMED, needs_ranks=2),
    Happening("SIGKILL of all ranks", kill_all),
    Happening("SIGKILL within a step", trap="kill in a step", says=NAMED),
    Happening("SIGKILL within a save", trap="kill in a save", says=NAMED),
    Happening("SIGTERM, as a scheduler sends it", terminate),
    Happening("SIGSTOP of one rank", stop, says=NAMED, needs_ours=True, needs_ranks=2),
    Happening("SIGSTOP for 2 s, which all survive", pause, needs_ours=True, needs_ranks=2),
    Happening("bytes of the newest checkpoint flipped", damage),
    Happening("a full disk", fill_disk, says=("No space left", "bytes free", "ENOSPC")),
    Happening("a batch with NaN", trap="nan", says=("NaN", "not finite", "nonfinite", "non-finite", "nan"),
              needs_ours=True, kinds=("fp32",)),
    Happening("an exception of one rank", trap="raise", says=("bad sample 17", *NAMED)),
)  # fmt: skip
