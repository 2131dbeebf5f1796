"""`OffloadConfig(engine="superoffload")`: the host steps during backward and the next forward, exactly."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.engine import Forecast, OffloadContext, RunFacts, StepParts
from lightning_superscale.offload.memory import ParamKind, host_memory
from lightning_superscale.offload.planner.forecast import StepTimes, exposed_seconds
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.offload.superoffload.step import DeferredStep
from lightning_superscale.offload.weight_flow.weights import StreamedUnit
from lightning_superscale.optim.step_rule import RuleState, StepGuard
from lightning_superscale.optim.unit import ShardUnit


class SuperOffloadEngine:
    """The engine that steps on the host while the device works, and commits each step one step later.

    Satisfies `OffloadEngine`; see [Note: Deferred commit] in state.py.
    """

    weights_arrive: Literal["next forward"] = "next forward"
    equals_adamw = True
    why_no_flow = None

    def refuse(self, facts: RunFacts) -> None:
        """Refuse nothing: this engine works with every other setting."""

    def memory(self, kind: ParamKind) -> MemoryModel:
        return host_memory(kind, num_transfer_buffers=2, has_copy=kind.flows)

    def make_state(
        self, unit: ShardUnit, context: OffloadContext, *, has_moments: bool, streamed: StreamedUnit | None
    ) -> DeferredState:
        if not has_moments:
            raise AssertionError("an optimizer that steps through its own code has the cpu engine's states")
        return DeferredState(unit, context, streamed=streamed)

    def make_step(self, optimizer: Optimizer, guard: StepGuard, context: OffloadContext) -> DeferredStep:
        looks_ahead = context.streams and context.config.speculate
        return DeferredStep(optimizer, guard, looks_ahead=looks_ahead, timeline=context.timeline)

    def how_it_steps(self, config: OffloadConfig, *, streams: bool) -> str:
        if streams and config.speculate:
            return "the host steps each bucket during backward, and again what the gradient norm then changes"
        why = "gradients stay in param.grad" if not streams else "speculate is off"
        return f"the host steps after backward, and the next forward hides it: {why}"

    def left_behind(self, saved: RuleState) -> None:
        """Leave nothing: masters and moments are all that this engine saves."""

    def predict_exposed(self, times: StepTimes, config: OffloadConfig) -> float:
        return exposed_seconds(times)

    def forecast(self, parts: StepParts) -> Forecast:
        times, why_not = parts.times(), _why_no_forecast(parts)
        exposed = exposed_seconds(times) if why_not is None else None
        return Forecast(host=times.host, d2h=times.d2h, h2d=times.h2d, exposed=exposed, why_not=why_not)


def _why_no_forecast(parts: StepParts) -> str | None:
    """Why steps don't run during backward, or weights don't arrive during the next forward; None where both do."""
    if not parts.config.speculate:
        return "the host steps after backward"
    if not parts.streams:
        return "gradients stay in param.grad until the step"
    return "new weights are awaited right after the step" if parts.weights_awaited else None
