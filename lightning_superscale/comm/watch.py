"""Tells ranks that wait for another rank that it failed, and why.

[Note: Waiting for other ranks] A rank that raises or dies leaves the others in a collective. On gloo they wake when
its process ends, with a message that names a port; if the process lives on, at the collective's timeout. So ranks
tell each other: a rank that fails writes its reason into a store, every rank keeps a sign of life there, and a thread
per rank looks twice a second. This package's collectives are polled and give up as soon as a rank failed. A rank that
hangs in a collective of other code (FSDP2's, Lightning's) can't be woken; it prints the reason to stderr and ends its
process, as NCCL's watchdog does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from lightning_superscale.errors import SuperScaleError

_PERIOD_S = 0.5
# The file whose Python code polls this package's own collectives. It imports this one, so its path is given.
OWN_COLLECTIVES = str(Path(__file__).with_name("collectives.py"))
# Age in seconds of the last sign of life at which a rank counts as dead: after a broken connection, and otherwise.
_BROKEN_AFTER_S = 2.5
_SILENT_AFTER_S = 30.0
# Seconds that all ranks, each beating, may wait in different places before they count as waiting in vain.
_APART_AFTER_S = 6.0
# Age in seconds of a last sign of life from which on a rank may be paused: by the kernel, a migration, or C++ code that
# keeps the interpreter's lock. A paused rank says nothing about the place that it is at.
_PAUSED_AFTER_S = 2.0
# Seconds that a rank may stay in a collective of other code after a rank failed.
_GRACE_S = 4.0
_FAILED, _APART = "failed", "apart"


class _Sign(NamedTuple):
    """A rank's last sign of life.

    Attributes:
        beat: number of the sign.
        waits_for: the place at which the rank waits for others; "" when it runs.
    """

    beat: int
    waits_for: str


class RankFailure(SuperScaleError):
    """The error that ranks raise when another rank failed; names it and its reason."""


class RankWatch:
    """One rank's watch over all ranks, on a thread of its own. Every rank makes one at the same time.

    Args:
        store: a store that all ranks reach, for their watches alone.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._waits_for = ""
        self._failure: str | None = None
        self._failed_at = 0.0
        self._is_reported = False
        self._stop = threading.Event()
        self._signs: dict[int, tuple[_Sign, float]] = {}
        self._beat = 0
        self._apart: tuple[str, ...] = ()
        self._apart_since = 0.0
        self._thread = threading.Thread(target=self._watch, name="lightning-superscale rank watch", daemon=True)
        self._thread.start()

    # Methods of the main thread

    def report(self, exception: BaseException) -> None:
        """Tell the other ranks that this one failed, or add to an error of a broken connection which rank broke it."""
        if self._is_reported or isinstance(exception, RankFailure):
            return
        if isinstance(exception, RuntimeError) and _is_broken_connection(str(exception)):
            if hasattr(exception, "add_note"):  # Python 3.11
                exception.add_note(str(self.explain(exception)))
            return
        self._is_reported = True
        text = str(exception).strip().splitlines()
        reason = f"{type(exception).__name__}: {text[0] if text else ''}".rstrip(": ")
        with contextlib.suppress(Exception):  # the store may be what failed
            self._store.compare_set(_FAILED, "", json.dumps({"rank": self._rank, "reason": reason}))

    def raise_if_failed(self) -> None:
        """Raise the failure of another rank, if there is one and this rank has reported none.

        Raises:
            RankFailure: another rank failed; names it and its reason.
        """
        if self._failure is not None and not self._is_reported:
            raise RankFailure(self._failure)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While open, this rank waits for all others at a place that `what` names."""
        self._waits_for = what
        try:
            yield
        finally:
            self._waits_for = ""

    def explain(self, error: Exception) -> RankFailure:
        """The failure behind an error of a collective; blocks for some seconds until the reason is known."""
        deadline = time.monotonic() + _BROKEN_AFTER_S + 2 * _PERIOD_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = self._silent_ranks(_BROKEN_AFTER_S)
            if silent:
                self._fail(f"{_named(silent)} died: no sign of life for {_BROKEN_AFTER_S:.0f} s")
        return RankFailure(self._failure or f"a collective failed, and every rank is alive: {error}")

    def close(self) -> None:
        """Stop watching. After a failure rank 0, which keeps the store, first lets the others read the reason."""
        if self._rank == 0 and (self._failure is not None or self._is_reported):
            time.sleep(3 * _PERIOD_S)
        self._stop.set()
        self._thread.join(2 * _PERIOD_S)

    # Methods of the thread

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self._say_and_look()
            except Exception as error:
                if not self._stop.is_set():
                    self._fail(f"rank 0 is gone, or the network to it: {str(error).splitlines()[0]}")
            if self._failure is not None:
                self._end_if_stuck()

    def _say_and_look(self) -> None:
        self._beat += 1
        place = self._waits_for or _foreign_collective(_main_frame())
        self._store.set(f"sign/{self._rank}", json.dumps([self._beat, place]))
        if self._failure is None and self._store.check([_FAILED]):
            failed = json.loads(self._store.get(_FAILED))
            if failed["rank"] != self._rank:
                self._fail(f"rank {failed['rank']} failed: {failed['reason']}")
        if self._failure is None and self._store.check([_APART]):
            self._fail(self._store.get(_APART).decode())
        for rank in range(self._world_size):
            if self._store.check([f"sign/{rank}"]):
                sign = _Sign(*json.loads(self._store.get(f"sign/{rank}")))
                known = self._signs.get(rank)
                if known is None or known[0].beat != sign.beat:
                    # The time at which this rank saw the sign, because clocks of hosts differ.
                    self._signs[rank] = (sign, time.monotonic())
        silent = self._silent_ranks(_SILENT_AFTER_S)
        if silent:
            self._fail(f"{_named(silent)} gave no sign of life for {_SILENT_AFTER_S:.0f} s")
        self._look_for_ranks_apart()

    def _silent_ranks(self, after_s: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, at) in self._signs.items() if rank != self._rank and now - at > after_s]

    def _look_for_ranks_apart(self) -> None:
        places = tuple(self._signs[r][0].waits_for for r in range(self._world_size) if r in self._signs)
        is_apart = len(places) == self._world_size and all(places) and len(set(places)) > 1
        if not is_apart or places != self._apart or self._silent_ranks(_PAUSED_AFTER_S):
            self._apart, self._apart_since = places, time.monotonic()
        elif time.monotonic() - self._apart_since > _APART_AFTER_S:
            listed = ", ".join(f"rank {rank} at {place}" for rank, place in enumerate(places))
            failure = f"ranks went apart and wait for each other: {listed}"
            # The first rank that sees this stops waiting, and no other could see it after that.
            self._store.set(_APART, failure)
            self._fail(failure)

    def _fail(self, failure: str) -> None:
        if self._failure is None:
            self._failed_at = time.monotonic()
            self._failure = failure

    def _end_if_stuck(self) -> None:
        """End the process if its main thread is in a collective that can't be interrupted."""
        if self._is_reported or time.monotonic() - self._failed_at < _GRACE_S:
            return
        if _is_in_collective(_main_frame()):
            sys.stderr.write(f"lightning_superscale: rank {self._rank} ends, because {self._failure}\n")
            sys.stderr.flush()
            os._exit(1)


def _is_broken_connection(message: str) -> bool:
    """Whether a message is one of gloo's about a rank that is gone."""
    return any(words in message for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe"))


def _main_frame() -> Any:
    """The frame that the main thread executes now; None without one."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _foreign_collective(frame: Any) -> str:
    """The collective of torch.distributed that a thread is in, and its caller's place; "" when it is in none."""
    name = ""
    while frame is not None and "torch/distributed" in frame.f_code.co_filename.replace(os.sep, "/"):
        name = frame.f_code.co_name if name in ("", "wrapper", "wait") else name
        frame = frame.f_back
    return f"{name} called by {frame.f_code.co_filename}:{frame.f_lineno}" if name and frame is not None else ""


def _is_in_collective(frame: Any) -> bool:
    """Whether a thread's innermost Python frame is one that calls a collective, or the operator of one."""
    frame = _behind_dispatch(frame)
    if frame is None:
        return False
    file = frame.f_code.co_filename.replace(os.sep, "/")
    if "torch/distributed/tensor/" in file:
        return False  # a DTensor's operation on its own part
    return "torch/distributed" in file or frame.f_code.co_filename == OWN_COLLECTIVES


def _behind_dispatch(frame: Any) -> Any:
    """The innermost frame outside of torch's dispatch of operators: DTensor's collectives are operators."""
    while frame is not None and any(
        part in frame.f_code.co_filename.replace(os.sep, "/") for part in ("torch/_ops.py", "torch/_library/")
    ):
        frame = frame.f_back
    return frame


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def open_store(mesh_rank: int, world_size: int, host: str, port: int, timeout: timedelta) -> TCPStore:
    """Open the watch's own store, which rank 0 serves at `host`:`port`."""
    return TCPStore(host, port, world_size, is_master=mesh_rank == 0, timeout=timeout, wait_for_workers=False)
