"""What the optimizer engine needs of a way of stepping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from lightning_superscale.ops.update import StatsSource
from lightning_superscale.zero.due import Due
from lightning_superscale.zero.states import UnitState
from lightning_superscale.zero.units import GradientDelta, PublishEvent, ShardUnit


class Publish(Protocol):
    """Brings a unit's new weights to where forward reads them."""

    def __call__(self, unit: ShardUnit, stepped: Sequence[int], event: PublishEvent | None = None) -> None:
        """With an `event`, they are being brought to the unit's inbox already."""


class StepRule(Protocol):
    """Steps one optimizer's units once the engine knows clipping; may work ahead of that, never commit.

    Attributes:
        has_moments: whether states keep exp_avg and exp_avg_sq for it.
    """

    @property
    def has_moments(self) -> bool: ...

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        """Know a new unit."""

    def expect(self, grad_scale: float) -> None:
        """What this step's gradients will be multiplied by if they are not clipped: the inverse of a loss scale."""

    def receive(self, delta: GradientDelta, state: UnitState) -> None:
        """Take reduced gradients during backward or at the step."""

    def come_to_rest(self) -> None:
        """Return when nothing of this rule runs in the background; what only waited is left to the step.

        Raises: what failed there.
        """

    def step(
        self, due: Sequence[Due], grad_scale: float, clip_value: float | None, publish: Publish
    ) -> Sequence[StatsSource]:
        """Step every unit, publish each, forget its gradients; returns the gradients' statistics by unit."""

    def load(self, param: nn.Parameter, unit: ShardUnit, state: UnitState, i: int, saved: Mapping[str, Any]) -> None:
        """Take over one parameter's saved state."""

    def flush(self) -> None:
        """Bring masters and moments up to the last step."""

    def discard(self) -> None:
        """Forget an interrupted step."""

    def close(self) -> None:
        """No more steps; flushed."""


class SynchronousRule:
    """The part of a rule that does everything inside `step`: nothing runs ahead or lags behind."""

    def expect(self, grad_scale: float) -> None:
        return

    def receive(self, delta: GradientDelta, state: UnitState) -> None:
        state.receive(delta.slices)

    def come_to_rest(self) -> None:
        return

    def flush(self) -> None:
        return

    def discard(self) -> None:
        return

    def close(self) -> None:
        return
