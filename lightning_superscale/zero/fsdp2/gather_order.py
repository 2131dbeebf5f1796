"""Checks that ranks gather weights in one order, and raises on all ranks before a gather mixes weights up.

[Note: Order of gathers] A gather joins whatever every rank calls next, so ranks that gather different modules of
equal size hand each other the wrong weights, silently (measured: a forward that returned 3232 for 64). Each rank
therefore follows a chain of the gathers since its last step. A gather that every rank was seen to do at this point
of the chain, and the only one ever done there, is issued at once. Any other is first announced in a store, and waits
until every rank has announced the same. A rank that issues a known gather while another announces a new one waits in
its gather; after a moment it looks into the store, finds the other's announcement, and both raise.

The agreement of the optimizer step (comm/agreement.py) also compares the whole chain, so that a step after
gathers in different orders is never applied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_superscale.comm.agreement import short_hash
from lightning_superscale.comm.watch import RankWatch
from lightning_superscale.errors import SuperScaleError

STEP = "the optimizer step"

_POLL_S = 0.002
_LOOK_AFTER_S = 0.5
_NUM_KNOWN = 100_000


class OrderDeparted(SuperScaleError):
    """The error of ranks that went to different gathers. Every rank that still runs raises it.

    Attributes:
        is_joined: whether the other rank waits in the step's agreement, through which this one has to raise the error
            so that the other raises it too.
    """

    def __init__(self, message: str, *, is_joined: bool) -> None:
        super().__init__(message)
        self.is_joined = is_joined


class GatherOrder:
    """One rank's chain of gathers.

    Args:
        store: a store of all ranks of the shard axis, for this object alone; None compares at the step only.
        patience_s: seconds to wait for ranks that have not come this far yet.
        watch: reports ranks that failed, and is told when ranks went apart; None for no watch.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        *,
        patience_s: float = 300.0,
        watch: RankWatch | None = None,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._patience_s = patience_s
        self._watch = watch
        self._chain = 0
        self._known: dict[int, set[str]] = {}
        self._count = 0
        self._posted: set[int] = set()
        self._looked: set[int] = set()
        self._first_top: str | None = None

    def begin_pass(self, top: str, *, is_inference: bool) -> None:
        """Note that an outermost module, named `top`, is entered.

        There may be thousands of validation batches between two steps, all alike: each begins the chain anew.
        """
        if self._first_top is None:
            self._first_top = top
        elif is_inference and top == self._first_top:
            self._chain = short_hash("inference")

    def enter(self, name: str) -> None:
        """Note that this rank is about to gather `name`. Every rank calls it before each gather.

        Raises:
            OrderDeparted: another rank is about to gather another module, or is at the step, or did not come in time.
            RankFailure: another rank failed.
        """
        is_known = self._known.get(self._chain) == {name}
        self._count += 1
        if not is_known and self._store is not None:
            self._announce(name)
        self._advance(name)

    def _advance(self, name: str) -> None:
        if len(self._known) > _NUM_KNOWN:
            self._known.clear()
        self._known.setdefault(self._chain, set()).add(name)
        self._chain = short_hash(f"{self._chain} {name}")

    def _announce(self, name: str) -> None:
        if self._store is None:
            return
        self._compare(name)
        key = self._key
        self._posted.add(self._count)
        self._store.add(f"{key}/count", 1)
        began = time.monotonic()
        with self.waiting(name):
            while self._store.add(f"{key}/count", 0) < self._world_size:
                self._raise_if_departed(name)
                if time.monotonic() - began > self._patience_s:
                    self._raise(name, f"another rank did not gather anything for {self._patience_s:.0f} s")
                self.raise_if_failed()
                time.sleep(_POLL_S)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """While open, this rank waits for the others to gather `name`."""
        if self._watch is None:
            yield
            return
        with self._watch.waiting(f"the gather of {_at(name)}"):
            yield

    def raise_if_failed(self) -> None:
        """Raise the failure of another rank, if there is one.

        Raises:
            RankFailure: another rank failed.
        """
        if self._watch is not None:
            self._watch.raise_if_failed()

    @property
    def _key(self) -> str:
        return f"gather/{self._count}"

    def _compare(self, name: str) -> None:
        if self._store is None:
            return
        said = self._store.compare_set(self._key, "", f"{name}\n{self._rank}").decode()
        other, _, other_rank = said.partition("\n")
        if other != name:
            self._raise(name, f"rank {other_rank} is at {_at(other)}", is_joined=other == STEP)

    def _raise_if_departed(self, name: str) -> None:
        if self._store is not None and self._store.check([f"{self._key}/departed"]):
            raise self._error(name, self._store.get(f"{self._key}/departed").decode())

    def look(self, name: str) -> None:
        """Look, while the gather of `name` waits, whether a rank announced another gather at this point.

        Raises:
            OrderDeparted: a rank announced another gather.
        """
        self._looked.add(self._count)
        self._compare(name)
        self._raise_if_departed(name)

    def enter_step(self) -> None:
        """Note that this rank is at the optimizer step, without waiting for the others.

        Raises:
            OrderDeparted: another rank is about to gather weights.
        """
        self._count += 1
        if self._store is not None:
            self._compare(STEP)
            self._posted.add(self._count)
        self._advance(STEP)

    def digest(self) -> str:
        """A text of the number of gathers so far and the chain since the last step, for the agreement to compare."""
        return f"{self._count} gathers, chain {self._chain:08x}"

    def step_agreed(self) -> None:
        """Begin a new chain and forget announcements, after the agreement of the step has found every rank there."""
        self._chain = 0
        self._first_top = None
        if self._store is not None:
            for count in (self._posted | self._looked) if self._rank == 0 else self._looked:
                self._store.delete_key(f"gather/{count}")
                self._store.delete_key(f"gather/{count}/count")
        self._posted.clear()
        self._looked.clear()

    def _raise(self, name: str, what: str, *, is_joined: bool = False) -> None:
        if self._store is not None:
            self._store.compare_set(f"{self._key}/departed", "", f"rank {self._rank} is at {_at(name)}")
        raise self._error(name, what, is_joined=is_joined)

    def _error(self, name: str, what: str, *, is_joined: bool = False) -> OrderDeparted:
        error = OrderDeparted(
            f"ranks went apart: rank {self._rank} is at {_at(name)}, but {what}. With ZeRO-3 every rank must "
            "run the same modules in the same order. Make the modules that only some batches use part of the group "
            "of their caller (ZeroConfig.wrap), run them on every rank, or use ZeRO-2, which allows it. "
            "No weight was changed in this step.",
            is_joined=is_joined,
        )
        if self._watch is not None:
            self._watch.report(error)
        return error


def _at(name: str) -> str:
    return name if name == STEP else f"module {name!r}"


class Patience:
    """Says when a gather that waits should look whether it waits in vain: twice a second."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _LOOK_AFTER_S

    def should_look(self) -> bool:
        """Whether half a second has passed since this last returned True, or since the wait began."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _LOOK_AFTER_S
        return True
