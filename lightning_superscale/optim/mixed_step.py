"""Adam and AdamW where some units' states are on the host and others' on the device: each steps where they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from lightning_superscale.ops.update import StatsSource
from lightning_superscale.optim.adamw_step import BoundStep
from lightning_superscale.optim.param_update import Due, by_unit
from lightning_superscale.optim.step_rule import Publish, StepGuard
from lightning_superscale.optim.unit import GradientDelta, ShardUnit
from lightning_superscale.optim.unit_state import UnitState


class SplitStep(BoundStep):
    """Gives every unit to the rule of its home.

    Args:
        host, device: step units whose states are there.
    """

    def __init__(self, optimizer: Optimizer, guard: StepGuard, *, host: BoundStep, device: BoundStep) -> None:
        super().__init__(optimizer, guard)
        self._host = host
        self._device = device

    def _of(self, state: UnitState) -> BoundStep:
        return self._host if state.is_on_host else self._device

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        self._of(state).attach(unit, state)

    def expect(self, grad_scale: float) -> None:
        self._host.expect(grad_scale)
        self._device.expect(grad_scale)

    def receive(self, delta: GradientDelta, state: UnitState) -> None:
        self._of(state).receive(delta, state)

    def come_to_rest(self) -> None:
        self._host.come_to_rest()
        self._device.come_to_rest()

    def apply(
        self, due: Sequence[Due], grad_scale: float, clip_value: float | None, publish: Publish
    ) -> Sequence[StatsSource]:
        # The device's first: the next forward begins with them, and on a GPU they are only queued.
        found: dict[int, StatsSource] = {}
        for rule, is_on_host in ((self._device, False), (self._host, True)):
            items = [item for item in due if item.state.is_on_host == is_on_host]
            found.update(zip(by_unit(items), rule.apply(items, grad_scale, clip_value, publish), strict=True))
        return [found[index] for index in by_unit(due)]

    def _before_states_change(self, item: Due) -> None:
        self._of(item.state)._before_states_change(item)

    def flush(self) -> None:
        self._host.flush()
        self._device.flush()

    def discard(self) -> None:
        self._host.discard()
        self._device.discard()

    def close(self) -> None:
        self._host.close()
        self._device.close()
