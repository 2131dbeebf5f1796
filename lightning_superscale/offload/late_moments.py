"""Lets reads of the optimizer's own moments wait until they are up to date, where a rule lags behind its steps."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.optim.unit_state import COMPENSATION_KEY
from lightning_superscale.optim.weights.watch import WeightWatch


class LateMoments:
    """Watches the moments that an optimizer's own state holds, unit by unit.

    Code that reads them between steps finds those of the last step, and what it writes there is kept.

    Args:
        bring_up: a method that brings the moments of a unit, given by its index, up to the last step. Any thread may
            call it. Its object is not kept alive: this object is a part of it, and a circle of both would keep the
            states of a rule that was replaced, in host memory and on the device, until Python looks for circles.
    """

    def __init__(self, optimizer: Optimizer, bring_up: Callable[[int], None]) -> None:
        self._optimizer = optimizer
        self._bring_up = weakref.WeakMethod(bring_up)
        self._watches: dict[int, WeightWatch[Tensor]] = {}

    def expect(self, index: int, params: Iterable[nn.Parameter]) -> None:
        """Let reads and writes of a unit's moments wait, because a step is about to be made."""
        watch = self._watches.get(index)
        if watch is None:
            own = [self._optimizer.state[param] for param in params]
            moments = [
                state[key] for state in own for key in ("exp_avg", "exp_avg_sq", COMPENSATION_KEY) if key in state
            ]
            watch = self._watches[index] = WeightWatch(moments, functools.partial(self._wait, index))
        watch.expect()

    def _wait(self, index: int) -> None:
        bring_up = self._bring_up()
        if bring_up is not None:
            bring_up(index)
        self._watches[index].arrived()

    def forget(self, index: int) -> None:
        """Watch a unit's moments no longer: the optimizer has other tensors now."""
        former = self._watches.pop(index, None)
        if former is not None:
            former.close()

    def arrived(self) -> None:
        """All moments are up to date."""
        for watch in self._watches.values():
            watch.arrived()

    def close(self) -> None:
        """Let go of all moments."""
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
