"""Tells ranks that wait for another rank that it failed, and why.

[Note: Waiting for other ranks] A rank that raises or dies leaves the others in a collective. On gloo they wake when
its process ends, with a message that names a port; if the process lives on, at the collective's timeout. So ranks
tell each other: a rank that fails writes its reason into a store, every rank keeps a sign of life there, and a thread
per rank talks to the store twice a second. A sign names the rank's process, so that ranks of one machine see at once
that it is gone. This package's collectives are polled and give up as soon as a rank failed. A rank that hangs in a
collective of other code (FSDP2's, Lightning's, a DTensor's) can't be woken; it prints the reason to stderr and ends its
process, as NCCL's watchdog does. A second thread does that, because a store may hang too: with the rank that keeps it.

How long all this takes: a rank that raised or whose process is gone is told within 2 s where the others share its
machine, one that gives no sign of life after `silence_s`, ranks that wait for each other after 6 s; a rank that can't
be woken ends 4 s later.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from lightning_superscale.comm.places import WeightNames, foreign_collective, is_in_collective, is_leaving
from lightning_superscale.comm.processes import Fate, Process, fate_of, this_process
from lightning_superscale.comm.stacks import main_stack
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.forks import Origin

SILENCE_S = 30.0
"""Age in seconds of the last sign of life from which on a rank is given up, unless a watch is told otherwise."""

RANK_0 = "rank 0"
"""The keeper of a store that no launcher keeps, as errors name it."""

_PERIOD_S = 0.5
# Age in seconds of the last sign of life at which a rank counts as dead after a broken connection.
_BROKEN_AFTER_S = 2.5
# Seconds that all ranks, each beating, may wait in different places before they count as waiting in vain.
_APART_AFTER_S = 6.0
# Age in seconds of a last sign of life from which on a rank may be paused: by the kernel, a migration, or C++ code that
# keeps the interpreter's lock. A paused rank says nothing about the place that it is at.
_PAUSED_AFTER_S = 2.0
# Seconds within which a rank takes leave, or gives it up because the store hangs.
_LEAVE_S = 1.0
# Seconds that a rank may stay in a collective of other code after a rank failed.
_GRACE_S = 4.0
_FAILED, _VERDICT = "failed", "verdict"
_LONGEST_LINE = 500


class _Sign(NamedTuple):
    """A rank's last sign of life.

    Attributes:
        beat: number of the sign.
        waits_for: the place at which the rank waits for others; "" when it runs.
        has_ended: whether the rank ended its run well, and gives no further sign.
        process: the process that gave the sign.
    """

    beat: int
    waits_for: str
    has_ended: bool
    process: Process


class RankFailure(SuperScaleError):
    """The error that ranks raise when another rank failed; names it and its reason."""


class RankWatch:
    """One rank's watch over all ranks, on threads of its own. Every rank makes one at the same time.

    Args:
        store: a store that all ranks reach, for their watches alone; or a function that opens one, which the watch's
            thread calls and repeats after an error.
        silence_s: seconds without a sign of life after which a rank is given up.
        keeper: who keeps the store, as an error names it.
        keeper_process: rank 0's process where that is known before its first sign of life could be read.

    Attributes:
        weights: gives the names of sharded weights, for errors.
    """

    def __init__(
        self,
        store: Store | Callable[[], Store],
        rank: int,
        world_size: int,
        *,
        silence_s: float = SILENCE_S,
        keeper: str = RANK_0,
        keeper_process: Process | None = None,
    ) -> None:
        self._open_store: Callable[[], Store] | None = None if isinstance(store, Store) else store
        self._store: Store | None = store if isinstance(store, Store) else None
        self._rank = rank
        self._world_size = world_size
        self._silence_s = silence_s
        self._keeper = keeper
        self._keeper_process = keeper_process
        self.weights: WeightNames = tuple
        self._process = this_process()
        self._origin = Origin()
        self._waits_for = ""
        self._failure: str | None = None
        self._stuck_since: float | None = None
        self._own_failure: str | None = None
        self._is_own_failure_told = threading.Event()
        self._stop, self._wake, self._has_said = threading.Event(), threading.Event(), threading.Event()
        self._signs: dict[int, tuple[_Sign, float]] = {}
        self._beat = 0
        self._apart: tuple[str, ...] = ()
        self._apart_since = 0.0
        # The time from which on a rank that never gave a sign counts as silent; None where ranks may still be coming.
        self._all_here_at: float | None = time.monotonic() if self._store is not None else None
        self._heard_at = self._read_at = self._looked_at = self._resumed_at = time.monotonic()
        if self._store is not None:
            self._say(self._store)  # a rank that dies in its first moments is known by this
        names = ("lightning-superscale rank watch", "lightning-superscale rank signs")
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in zip((self._watch, self._talk), names, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    # Methods of the main thread

    @property
    def silence_s(self) -> float:
        """Age in seconds of the last sign of life from which on a rank is given up."""
        return self._silence_s

    @property
    def _is_reported(self) -> bool:
        return self._own_failure is not None

    @property
    def has_failed(self) -> bool:
        """Whether this rank or another one failed."""
        return self._failure is not None or self._is_reported

    def report(self, exception: BaseException) -> None:
        """Tell the other ranks that this one failed, or add to an error of a broken connection which rank broke it."""
        if self._is_reported or isinstance(exception, RankFailure) or not self._origin.is_here:
            return
        if isinstance(exception, DistError) or _is_broken_connection(str(exception)):
            if hasattr(exception, "add_note"):  # Python 3.11
                exception.add_note(str(self.explain(exception)))
            return
        if self._failure is not None:
            return
        self._own_failure = _in_a_line(exception)
        self._wake.set()
        self._is_own_failure_told.wait(2.0)  # the store may be what failed, or hang with the rank that keeps it

    def raise_if_failed(self) -> None:
        """Raise the failure of another rank, if there is one and this rank has reported none.

        Raises:
            RankFailure: another rank failed; names it and its reason.
        """
        if self._failure is not None and not self._is_reported:
            raise RankFailure(self._failure)

    def wait_until_known(self, timeout: timedelta) -> None:
        """Block until this rank has given its first sign of life, without which its death would be told as its absence.

        Returns after the timeout too, when the store is not there.
        """
        self._has_said.wait(timeout.total_seconds())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While open, this rank waits for all others at a place that `what` names."""
        self._waits_for = what
        try:
            yield
        finally:
            self._waits_for = ""

    def explain(self, error: BaseException) -> RankFailure:
        """The failure behind an error of a collective; blocks for some seconds until the reason is known."""
        self._wait_for_failure()
        return RankFailure(self._failure or self._unexplained(error))

    def _unexplained(self, error: BaseException) -> str:
        if self._all_here_at is not None:
            return f"a collective failed, and every rank is alive: {error}"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        who = f"rank {others[0]}" if len(others) == 1 else "another rank"
        return f"{who} ended, or the network to it, while ranks connected: {error}"

    def failure_behind(self, error: BaseException) -> RankFailure | None:
        """The failure of another rank that an error of torch.distributed comes of; None if it comes of none.

        Blocks for some seconds until that is known.
        """
        if not isinstance(error, DistError) and not _is_broken_connection(str(error)):
            return None
        self._wait_for_failure()
        return RankFailure(self._failure or self._unexplained(error))

    def _wait_for_failure(self) -> None:
        deadline = time.monotonic() + _BROKEN_AFTER_S + 2 * _PERIOD_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = self._silent_ranks(_BROKEN_AFTER_S)
            if silent:  # all seem to be where the store went with the rank that kept it, so those that are gone first
                gone = [rank for rank in silent if (fate := self._fate_of(rank)) is not None and fate.is_gone]
                self._fail(self._death_of(gone or silent, _BROKEN_AFTER_S, verb="died:"))

    def close(self) -> None:
        """Stop watching. After a failure rank 0, which keeps the store, first lets the others read the reason."""
        if not self._origin.is_here:  # the threads are the parent's
            return
        if self._rank == 0 and self.has_failed:
            time.sleep(3 * _PERIOD_S)
        self._stop.set()
        self._wake.set()
        self.weights = tuple
        for thread in self._threads[1:] if self.has_failed else self._threads:
            thread.join(_LEAVE_S)

    # Methods of the thread that talks to the store

    def _talk(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.is_set()  # what is said after it takes leave of the others
            try:
                if self._store is None and self._open_store is not None:
                    self._store = self._open_store()
                self._say_and_look()
            except Exception as error:
                if self._store is not None and not self._stop.is_set():
                    self._fail(self._loss_of_store(error))
                    return  # torch would warn of each further attempt
            self._wake.wait(0.0 if is_last else _PERIOD_S)
            self._wake.clear()

    def _say_and_look(self) -> None:
        store = self._store
        if store is None:
            return
        if self._own_failure is not None and not self._is_own_failure_told.is_set():
            store.compare_set(_FAILED, "", json.dumps({"rank": self._rank, "reason": self._own_failure}))
            self._is_own_failure_told.set()
        self._say(store)
        if not self._stop.is_set():
            self._look(store)

    def _say(self, store: Store) -> None:
        self._beat += 1
        place = self._waits_for or self._foreign_place()
        has_ended = self._stop.is_set() and not self.has_failed
        store.set(f"sign/{self._rank}", json.dumps([self._beat, place, has_ended, self._process]))
        self._has_said.set()

    def _foreign_place(self) -> str:
        """The collective of other code in which the main thread waits; "" for none."""
        # A rank by itself waits for nobody, and frames that are read keep a step's tensors meanwhile.
        return foreign_collective(main_stack(), self.weights) if self._world_size > 1 else ""

    def _look(self, store: Store) -> None:
        # First, because what a process wrote before its end is there to be read afterwards.
        gone = [rank for rank in self._missed() if (fate := self._fate_of(rank)) is not None and fate.is_gone]
        self._read_signs(store)
        if self._failure is None and store.check([_FAILED]):
            failed = json.loads(store.get(_FAILED))
            if failed["rank"] != self._rank:
                self._fail(f"rank {failed['rank']} failed: {failed['reason']}")
        if self._failure is None and store.check([_VERDICT]):
            self._fail(store.get(_VERDICT).decode())
        self._heard_at = time.monotonic()
        gone = [rank for rank in gone if not self._signs[rank][0].has_ended]
        silent = self._silent_ranks(self._silence_s)
        if gone:
            self._judge(store, self._death_of(gone, 0.0))
        elif silent:
            self._judge(store, self._death_of(silent, self._silence_s))
        if self._all_here_at is not None:
            self._look_for_ranks_apart(store)

    def _read_signs(self, store: Store) -> None:
        now = time.monotonic()
        if now - self._read_at > _PAUSED_AFTER_S:  # this process was paused, or the store was: what is known is old
            self._resumed_at = now
        found = [rank for rank in range(self._world_size) if rank in self._signs or store.check([f"sign/{rank}"])]
        for rank, said in zip(found, store.multi_get([f"sign/{rank}" for rank in found]), strict=True):
            beat, waits_for, has_ended, process = json.loads(said)
            known = self._signs.get(rank)
            if known is None or known[0].beat != beat:
                # The time at which this rank saw the sign, because clocks of hosts differ.
                sign = _Sign(beat, waits_for, has_ended, Process(*process))
                self._signs[rank] = (sign, time.monotonic())
        self._read_at = time.monotonic()

    def _judge(self, store: Store, failure: str) -> None:
        """Fail, and let all ranks say the same of it: the first that sees it stops, and no other could see it then."""
        if self._failure is None:
            self._fail(store.compare_set(_VERDICT, "", failure).decode())

    def _missed(self) -> list[int]:
        """Ranks that gave a sign of life once, and none since."""
        now = time.monotonic()
        return [
            rank
            for rank, (sign, at) in self._signs.items()
            if rank != self._rank and not sign.has_ended and now - at > 2 * _PERIOD_S
        ]

    def _fate_of(self, rank: int) -> Fate | None:
        known = self._signs.get(rank)
        process = known[0].process if known is not None else self._keeper_process if rank == 0 else None
        return None if process is None else fate_of(process)

    def _silent_ranks(self, after_s: float) -> list[int]:
        """Ranks that gave no sign of life for `after_s`, or never gave one; without those that ended well.

        While this process was paused itself it heard nobody, so that time does not count.
        """
        has_listened = time.monotonic() - self._resumed_at > after_s
        return self._quiet_ranks(after_s) if has_listened else []

    def _quiet_ranks(self, after_s: float) -> list[int]:
        """Ranks from which this process has heard nothing for `after_s`, for whatever reason."""
        now = time.monotonic()
        silent = []
        for rank in range(self._world_size):
            known = self._signs.get(rank)
            since = self._all_here_at if known is None else None if known[0].has_ended else known[1]
            if rank != self._rank and since is not None and now - since > after_s:
                silent.append(rank)
        return silent

    def _death_of(self, ranks: list[int], after_s: float, *, verb: str = "gave") -> str:
        """The failure of ranks that gave no sign of life for `after_s`, with what their machine knows of them.

        Args:
            verb: says what that is a sign of: with a broken connection it is a death, which the caller alone knows.
        """
        fates = [fate for rank in ranks if (fate := self._fate_of(rank)) is not None]
        known = "; ".join(fate.text for fate in fates)
        if fates and all(fate.is_gone for fate in fates) and len(fates) == len(ranks):
            return f"{_named(ranks)} died: {known}"
        never = any(rank not in self._signs for rank in ranks)
        what = f"no sign of life for {after_s:g} s{' since it connected' if never else ''}"
        return f"{_named(ranks)} {verb} {what}" + (f": {known}" if known else "")

    def _loss_of_store(self, error: Exception) -> str:
        deadline = time.monotonic() + 2 * _PERIOD_S  # a process that ends closes its connections first
        while self._keeper == RANK_0 and self._fate_of(0) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        fate = self._fate_of(0)
        if fate is not None and fate.is_gone:
            return self._death_of([0], 0.0)
        return f"{self._keeper} is gone, or the network to it: {str(error).splitlines()[0]}"

    def _look_for_ranks_apart(self, store: Store) -> None:
        places = tuple(self._place_of(self._signs[r][0]) for r in range(self._world_size) if r in self._signs)
        is_apart = len(places) == self._world_size and all(places) and len(set(places)) > 1
        if not is_apart or places != self._apart or self._quiet_ranks(_PAUSED_AFTER_S):
            self._apart, self._apart_since = places, time.monotonic()
            return
        # A rank that ended its run may come back for the next one.
        patience = self._silence_s if _ENDED in places else _APART_AFTER_S
        if time.monotonic() - self._apart_since > patience:
            listed = ", ".join(f"rank {rank} at {place}" for rank, place in enumerate(places))
            self._judge(store, f"ranks went apart and wait for each other: {listed}")

    @staticmethod
    def _place_of(sign: _Sign) -> str:
        return _ENDED if sign.has_ended else sign.waits_for

    # Methods of the thread that watches

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            now = time.monotonic()
            if now - self._looked_at > _PAUSED_AFTER_S:  # this process was paused, and did not listen
                self._heard_at = now
            self._looked_at = now
            if self._store is not None and now - self._heard_at > self._silence_s:
                self._fail(self._silence_of_store())
            if self._failure is not None:
                self._end_if_stuck(is_in_collective)
        leaves_until = time.monotonic() + self._silence_s
        while self.has_failed and time.monotonic() < leaves_until:
            time.sleep(_PERIOD_S)
            self._end_if_stuck(is_leaving)

    def _silence_of_store(self) -> str:
        fate = self._fate_of(0) if self._keeper == RANK_0 else None
        known = "" if fate is None else f": {fate.text}"
        what = "gave no sign of life" if self._keeper == RANK_0 else "did not answer"
        return f"{self._keeper}, which keeps the ranks' store, {what} for {self._silence_s:g} s{known}"

    def _fail(self, failure: str) -> None:
        if self._failure is None:
            self._failure = failure
            _leaves_within.append(self._silence_s)

    def _end_if_stuck(self, is_stuck: Callable[[Sequence[Any]], bool]) -> None:
        """End the process once its main thread has been in something that can't be interrupted for long."""
        if self._is_reported and self._failure is None and is_stuck is is_in_collective:
            return
        if not is_stuck(main_stack()):
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = time.monotonic()
        elif time.monotonic() - self._stuck_since > _GRACE_S:
            why = self._failure or self._own_failure
            sys.stderr.write(f"lightning_superscale: rank {self._rank} ends, because {why}\n")
            sys.stderr.flush()
            os._exit(1)


_ENDED = "the end of its run"


# Seconds that this process may take to end after a rank failed; empty while none did.
_leaves_within: list[float] = []


def _end_if_leaving_hangs() -> None:
    """End the process by SIGALRM where a rank failed and its groups, which Python destroys last, wait for it."""
    if _leaves_within and hasattr(signal, "alarm"):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(math.ceil(max(_leaves_within)))


atexit.register(_end_if_leaving_hangs)


def _in_a_line(exception: BaseException) -> str:
    """An exception in one line: of a longer message its first and its last, where a worker says what it met."""
    text = [line.strip() for line in str(exception).strip().splitlines()]
    ends = text[:1] + (text[-1:] if len(text) > 1 and len(text[-1]) < _LONGEST_LINE else [])
    return f"{type(exception).__name__}: {' ... '.join(ends)}".rstrip(": ")


def _is_broken_connection(message: str) -> bool:
    """Whether a message is one of gloo's about a rank that is gone."""
    return any(words in message for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe"))


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def open_store(mesh_rank: int, world_size: int, host: str, port: int, timeout: timedelta) -> TCPStore:
    """Open the watch's own store, which rank 0 serves at `host`:`port`."""
    return TCPStore(host, port, world_size, is_master=mesh_rank == 0, timeout=timeout, wait_for_workers=False)
