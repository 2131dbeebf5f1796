"""Steps Adam and AdamW where some units' states are only on the device, and an offload engine has the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.clipping import ClipRequest
from lightning_superscale.optim.param_update import GradScale, ParamUpdate
from lightning_superscale.optim.step_rule import Cycle, Figure, RuleState, StepGuard, SteppedUnit
from lightning_superscale.optim.unit import GradientDelta, ShardUnit
from lightning_superscale.optim.unit_state import UnitState


class MixedStep(AdamWRule):
    """Hands every unit to the rule that steps its states.

    Args:
        host: steps units that have any state on the host.
        device: steps the others.
    """

    def __init__(self, optimizer: Optimizer, guard: StepGuard, *, host: AdamWRule, device: AdamWRule) -> None:
        super().__init__(optimizer, guard)
        self._host = host
        self._device = device

    @property
    def host(self) -> AdamWRule:
        """The rule that steps units that have any state on the host."""
        return self._host

    def _of(self, state: UnitState) -> AdamWRule:
        return self._host if "host" in state.homes else self._device

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        self._of(state).attach(unit, state)

    def expect(self, grad_scale: float) -> None:
        self._host.expect(grad_scale)
        self._device.expect(grad_scale)

    def expect_clip(self, clip: ClipRequest) -> None:
        self._host.expect_clip(clip)
        self._device.expect_clip(clip)

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        self._of(state).add_grads(delta, state)

    def quiesce(self) -> None:
        self._host.quiesce()
        self._device.quiesce()

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        # Units on the device come first: the next forward begins with them, and on a GPU they are only queued.
        for rule, has_host in ((self._device, False), (self._host, True)):
            items = [item for item in due if ("host" in item.state.homes) == has_host]
            yield from rule.step(items, grad_scale, clip_value)

    def load(self, param: nn.Parameter, unit: ShardUnit, state: UnitState, i: int, saved: Mapping[str, Any]) -> None:
        self._of(state).load(param, unit, state, i, saved)

    def _before_states_change(self, item: ParamUpdate) -> None:
        self._of(item.state)._before_states_change(item)

    def flush(self) -> None:
        self._host.flush()
        self._device.flush()

    @property
    def evaluates_stale(self) -> bool:
        return self._host.evaluates_stale or self._device.evaluates_stale

    def catch_up(self) -> Iterator[SteppedUnit]:
        yield from self._device.catch_up()
        yield from self._host.catch_up()

    def state_dict(self) -> RuleState:
        return {**self._device.state_dict(), **self._host.state_dict()}

    def load_state_dict(self, saved: RuleState) -> None:
        self._device.load_state_dict(saved)
        self._host.load_state_dict(saved)

    @property
    def cycle(self) -> Cycle:
        return max(self._host.cycle, self._device.cycle)

    def figures(self) -> Sequence[Figure]:
        return (*self._host.figures(), *self._device.figures())

    def reasons(self) -> Sequence[str]:
        return (*self._host.reasons(), *self._device.reasons())

    def discard(self) -> None:
        self._host.discard()
        self._device.discard()

    def close(self) -> None:
        with ExitStack() as rest:
            rest.callback(self._device.close)
            self._host.close()
