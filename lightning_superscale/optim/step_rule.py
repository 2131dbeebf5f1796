"""What the optimizer engine needs of a way of stepping, and the guard of the optimizer that it steps for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.optim.param_update import ParamUpdate
from lightning_superscale.optim.unit import GradientDelta, PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import UnitState


class SteppedUnit(NamedTuple):
    """One unit that a rule has stepped, for the engine to publish.

    Attributes:
        slices: indices of the stepped slices.
        stats: of its gradients; None where nothing counted them.
        event: new weights are on their way to the unit's inbox already; None where its state has yet to send them.
    """

    unit: ShardUnit
    slices: Sequence[int]
    stats: StatsSource | None = None
    event: PublishEvent | None = None


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

    def quiesce(self) -> None:
        """Return when nothing of this rule runs in the background; nothing is applied that had not begun.

        Raises: what failed there.
        """

    def step(self, due: Sequence[ParamUpdate], grad_scale: float, clip_value: float | None) -> Iterator[SteppedUnit]:
        """Step every unit in the order of the next forward, and forget its gradients.

        The engine runs it to its end and publishes each unit while the next ones are still being stepped.
        """

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

    def quiesce(self) -> None:
        return

    def flush(self) -> None:
        return

    def discard(self) -> None:
        return

    def close(self) -> None:
        return


class StepGuard:
    """Refuses `optimizer.step()` unless the engine itself calls it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._is_open = False
        self._hook = optimizer.register_step_pre_hook(self._check)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, `optimizer.step()` runs."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_open:
            raise SuperScaleError(
                f"{type(optimizer).__name__}.step() was called on the bare optimizer, which would step the module's "
                "weights behind their fp32 masters. Call step() on what self.optimizers() returns."
            )

    def remove(self) -> None:
        self._hook.remove()
