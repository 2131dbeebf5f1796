"""Stores of a unit's weights, at which new weights are waited for, and the ways in which new weights arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from lightning_superscale.ops.events import Waitable
from lightning_superscale.optim.weights.watch import WeightWatch
from lightning_superscale.torch_private import plainly


class NewWeights(Protocol):
    """New weights of one unit that a step has made, on their way to the unit's store.

    [Note: New weights] New weights come up over a link, from other ranks, or both. The transport knows the way and
    hands this object to the store; the store knows when the weights are used, and waits then. Neither needs to look for
    the other.
    """

    def begin(self) -> None:
        """Start every transfer that can be started without waiting: the weights will be used soon."""

    def are_on_host(self) -> bool:
        """Whether the store's own host memory has the new weights, so that copies may begin before `wait`."""

    def wait(self) -> None:
        """Return when work that is queued from now on sees the new weights, on the device or in the store's memory."""

    def abandon(self) -> None:
        """Let `wait` wait for no other rank any more, since one failed; it may bring no new weights then."""


class WeightStore(Protocol):
    """The place of one unit's weights between their uses, at which new weights are waited for.

    Every unit has one. `OnDevice` keeps them where forward reads them, whole or in shards that FSDP2 gathers;
    `offload/weight_flow/weights.py` keeps them in host memory, and brings them to the device when they are used.

    Attributes:
        watch: lets every read of a parameter wait for its new weights.
        is_lost: whether new weights did not arrive, because of an error.
    """

    watch: WeightWatch[nn.Parameter]
    is_lost: bool

    def receive(self, new: NewWeights) -> None:
        """Keep the new weights of the last step; the next use of the unit's weights waits for them."""

    def wait_new(self) -> bool:
        """Return when work that is queued from now on sees the new weights.

        A store that streams weights also drops the copies that it has ready on the device.

        Returns:
            whether there were new weights.
        """

    def filling(self, *, is_whole: bool) -> AbstractContextManager[None]:
        """While open, the unit's weights on the device can be written; the store keeps what was written.

        Args:
            is_whole: all of the unit's weights are written, so that old values need not be there.
        """

    def abandon(self) -> None:
        """Wait for no other rank any more, since one failed; new weights under way may be lost."""

    def close(self) -> None:
        """Let go of the parameters."""


class OnDevice:
    """Weights that stay where forward, or FSDP2's gather, reads them. Satisfies `WeightStore`.

    Args:
        params: the unit's parameters, which wait for new weights when they are read (`watch.py`).
    """

    def __init__(self, params: Sequence[nn.Parameter] = ()) -> None:
        self.watch = WeightWatch(params, self.wait_new)
        self.is_lost = False
        self._new: NewWeights | None = None
        self._lock = threading.RLock()  # another thread that reads meanwhile waits, too

    def receive(self, new: NewWeights) -> None:
        self._new = new
        self.watch.expect()

    def wait_new(self) -> bool:
        if not self.watch.is_late:
            return False
        if self._lock._is_owned():  # type: ignore[attr-defined]  # as `threading.Condition` asks
            return False  # this thread brings the weights, and reads the parameter for that
        with self._lock:  # which an interrupt can't leave locked
            return self._wait_once()

    def _wait_once(self) -> bool:
        new = self._new
        if new is None:  # another thread has waited meanwhile
            return False
        try:
            self.watch.origin.check("a read of weights that are under way")
            plainly(new.wait)
        except Exception:
            self._end_wait()
            self.is_lost = True
            raise
        self._end_wait()  # after an interrupt the next use waits once more
        return True

    def _end_wait(self) -> None:
        self.watch.arrived()  # first: a read would wait for ever for weights that are late and not on their way
        self._new = None

    def filling(self, *, is_whole: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def abandon(self) -> None:
        if self._new is not None:
            self._new.abandon()

    def close(self) -> None:
        self.watch.close()


class Uploaded:
    """New weights that come over a link, or stay in host memory. Satisfies `NewWeights`."""

    def __init__(self, event: Waitable[None]) -> None:
        self._event = event

    def begin(self) -> None:
        return

    def are_on_host(self) -> bool:
        return self._event.is_waitable()

    def wait(self) -> None:
        self._event.wait()

    def abandon(self) -> None:
        return


class Incoming:
    """New weights that come into a buffer on the device, and are moved on from there. Satisfies `NewWeights`.

    Args:
        event: the buffer's weights: an upload, or a gather from the other ranks.
        move: brings them from the buffer to where forward, or FSDP2's gather, reads them.
    """

    def __init__(self, event: Waitable[object], move: Callable[[], None]) -> None:
        self._event: Waitable[object] | None = event
        self._move = move

    def begin(self) -> None:
        return

    def are_on_host(self) -> bool:
        return False

    def wait(self) -> None:
        if self._event is not None:
            self._event.wait()
            self._move()
            self._event = None

    def abandon(self) -> None:
        self._event = None  # sharded weights stay in shards, and may never be gathered again
