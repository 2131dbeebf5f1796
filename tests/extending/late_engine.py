"""A toy offload engine: each step applies the gradients of the step before. No file of the package knows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_superscale.offload.cpu.engine import CpuEngine
from lightning_superscale.offload.cpu.state import HostState
from lightning_superscale.offload.engine import RunFacts
from lightning_superscale.optim.adamw_step import AdamWRule, AdamWStep
from lightning_superscale.optim.param_update import ParamUpdate
from lightning_superscale.optim.step_rule import SteppedUnit
from lightning_superscale.optim.unit import slice_view
from lightning_superscale.optim.unit_state import StateBytes

LATE_KEY = "late_grad"  # in the optimizer's own state of a parameter, so it reaches every checkpoint


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

    def apply(self, due: Sequence[ParamUpdate], grad_scale: float, clip_value: float | None) -> Iterator[SteppedUnit]:
        late = []
        for item in due:
            own, kept = self.bound_state(item), item.state.late_of(item.i)
            new = item.grad().float() * grad_scale
            if clip_value is not None:
                new.clamp_(-clip_value, clip_value)
            if LATE_KEY in own:
                late.append(item.with_grad(kept.to(item.state.transfer_dtype, copy=True)))
            own[LATE_KEY] = kept.view(item.piece.local_shape)
            kept.copy_(new)
        yield from self._native.apply(late, 1.0, None)
        for item in due:
            item.state.clear_grads()

    def load(self, param, unit, state, i: int, saved: Mapping[str, Any]) -> None:
        super().load(param, unit, state, i, {key: value for key, value in saved.items() if key != LATE_KEY})
        if LATE_KEY in saved:
            kept = state.late_of(i)
            kept.copy_(saved[LATE_KEY].reshape(-1))
            self._optimizer.state[param][LATE_KEY] = kept.view(unit.shard.slices[i].local_shape)


class LateEngine(CpuEngine):
    """Satisfies `OffloadEngine`: the cpu engine, one step late."""

    def refuse(self, facts: RunFacts) -> None:
        if facts.dtypes.is_low_precision:
            raise ValueError("the late engine keeps fp32 states; found 16-bit ones. Use engine='cpu'.")

    def host_bytes(self, numel, dtype, **how) -> int:
        return super().host_bytes(numel, dtype, **how) + 4 * numel

    def make_state(self, unit, context, *, has_moments, streamed) -> LateState:
        return LateState(unit, context, streamed=streamed)

    def make_step(self, optimizer, guard, context) -> LateStep:
        return LateStep(optimizer, guard, super().make_step(optimizer, guard, context))

    def how_it_steps(self, config, *, streams) -> str:
        return "the 'late' engine steps on the host, one step late"
