"""A toy offload engine: each step applies the gradients of the step before. No file of the package knows it.

The first steps are on time; the largest gradient element that they saw bounds all that come late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.cpu.engine import CpuEngine
from lightning_superscale.offload.cpu.state import HostState
from lightning_superscale.offload.engine import RunFacts
from lightning_superscale.ops.state_dtypes import bytes_of
from lightning_superscale.optim.adamw_step import AdamWRule, AdamWStep
from lightning_superscale.optim.param_update import ParamUpdate
from lightning_superscale.optim.step_rule import RuleState, SteppedUnit
from lightning_superscale.optim.unit import slice_view
from lightning_superscale.optim.unit_state import StateBytes

LATE_KEY = "late_grad"  # in the optimizer's own state of a parameter, so it reaches every checkpoint
NUM_ON_TIME = 2
BOUND_SHARE = 0.5


class LateState(HostState):
    """Host states and one buffer more, which keeps a step's gradients until the next one."""

    def __init__(self, unit, context, *, streamed=None) -> None:
        super().__init__(unit, context, has_moments=True, streamed=streamed)
        self.late = context.arena.zeros(unit.shard.shard_numel, torch.float32, is_pinned=False)

    def bytes(self) -> Sequence[StateBytes]:
        return [*super().bytes(), StateBytes("late gradients", torch.float32, home="host")]

    def late_of(self, i: int) -> torch.Tensor:
        return slice_view(self.late, self.unit.shard.slices[i])


class LateStep(AdamWRule):
    """Steps with what the last step brought, and keeps what this one brings."""

    def __init__(self, optimizer, guard, native: AdamWStep) -> None:
        super().__init__(optimizer, guard)
        self._native = native
        self._num_steps = 0
        self._bound = torch.tensor(0.0)
        self._last: list[ParamUpdate] = []

    def step(self, due: Sequence[ParamUpdate], grad_scale: float, clip_value: float | None) -> Iterator[SteppedUnit]:
        self._num_steps += 1
        if self._num_steps <= NUM_ON_TIME:
            seen = [BOUND_SHARE * (item.grad().float() * grad_scale).abs().amax() for item in due if item.piece.numel]
            self._bound = torch.stack([self._bound, *seen]).amax()
            yield from self._native.step(due, grad_scale, clip_value)
            return
        late = []
        for item in due:
            own, kept = self.bound_state(item), item.state.late_of(item.i)
            new = (item.grad().float() * grad_scale).clamp_(-self._bound, self._bound)
            if clip_value is not None:
                new.clamp_(-clip_value, clip_value)
            if LATE_KEY in own:
                late.append(self._of(item))
            own[LATE_KEY] = kept.view(item.piece.local_shape)
            kept.copy_(new)
        yield from self._native.step(late, 1.0, None)
        for item in due:
            item.state.clear_grads()
        self._last = list(due)

    def _of(self, item: ParamUpdate) -> ParamUpdate:
        return item.with_grad(item.state.late_of(item.i).to(item.state.transfer_dtype, copy=True))

    def state_dict(self) -> RuleState:
        return {"num_steps": self._num_steps, "bound": self._bound}

    def load_state_dict(self, saved: RuleState) -> None:
        self._num_steps = int(saved.get("num_steps", 0))
        self._bound = torch.as_tensor(saved.get("bound", 0.0))

    def load(self, param, unit, state, i: int, saved: Mapping[str, Any]) -> None:
        super().load(param, unit, state, i, {key: value for key, value in saved.items() if key != LATE_KEY})
        if LATE_KEY in saved:
            kept = state.late_of(i)
            kept.copy_(saved[LATE_KEY].reshape(-1))
            self._optimizer.state[param][LATE_KEY] = kept.view(unit.shard.slices[i].local_shape)


class CaughtUpStep(LateStep):
    """The same, but evaluation sees weights with all gradients."""

    evaluates_stale = True

    def catch_up(self) -> Iterator[SteppedUnit]:
        late = [item for item in self._last if LATE_KEY in self.bound_state(item)]
        yield from self._native.step([self._of(item) for item in late], 1.0, None)
        for item in late:
            del self.bound_state(item)[LATE_KEY]
        self._last = []


class LateEngine(CpuEngine):
    """Satisfies `OffloadEngine`: the cpu engine, one step late."""

    def refuse(self, facts: RunFacts) -> None:
        if facts.dtypes.is_low_precision:
            raise ValueError("the late engine keeps fp32 states; found 16-bit ones. Use engine='cpu'.")

    def memory(self, kind) -> MemoryModel:
        return super().memory(kind) + MemoryModel((bytes_of("late gradients", torch.float32, "host"),))

    def make_state(self, unit, context, *, has_moments, streamed) -> LateState:
        return LateState(unit, context, streamed=streamed)

    def make_step(self, optimizer, guard, context) -> LateStep:
        return LateStep(optimizer, guard, super().make_step(optimizer, guard, context))

    def how_it_steps(self, config, *, streams) -> str:
        return "the 'late' engine steps on the host, one step late"


class CaughtUpEngine(LateEngine):
    """Satisfies `OffloadEngine`: late but for evaluation."""

    def make_step(self, optimizer, guard, context) -> CaughtUpStep:
        return CaughtUpStep(optimizer, guard, CpuEngine.make_step(self, optimizer, guard, context))
