"""`OffloadConfig(engine="superoffload")`: the host steps during backward and the next forward, exactly."""

from __future__ import annotations

from typing import Literal, cast

from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.engine import Forecast, OffloadContext, RunFacts, StepParts
from lightning_superscale.offload.memory import ParamKind, host_memory
from lightning_superscale.offload.planner.forecast import (
    HostSchedule,
    StepTimes,
    awaited_seconds,
    best_plan,
    exposed_seconds,
)
from lightning_superscale.offload.superoffload.plan import PlanChooser, has_own_cores
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

    def device_bytes(self, kind: ParamKind) -> float:
        return 0.0  # gradients leave from where backward put them, and weights arrive where forward reads them

    def make_state(
        self, unit: ShardUnit, context: OffloadContext, *, has_moments: bool, streamed: StreamedUnit | None
    ) -> DeferredState:
        if not has_moments:
            raise AssertionError("an optimizer that steps through its own code has the cpu engine's states")
        return DeferredState(unit, context, streamed=streamed)

    def make_step(self, optimizer: Optimizer, guard: StepGuard, context: OffloadContext) -> DeferredStep:
        chooser = PlanChooser(
            context.config.speculate,
            streams=context.streams,
            profile=context.profile,
            has_own_memory=context.device_update.num_threads == 0,
            has_own_cores=has_own_cores(context.device_update, context.pool),
        )
        return DeferredStep(optimizer, guard, chooser=chooser, timeline=context.timeline)

    def how_it_steps(self, config: OffloadConfig, *, streams: bool) -> str:
        if not streams:
            return "the host steps after backward, and the next forward hides it: gradients stay in param.grad"
        if config.speculate is True:
            return "the host steps each bucket during backward, and again what the gradient norm then changes"
        if config.speculate is False:
            return "the host steps after backward, and the next forward hides it: speculate is off"
        return (
            "the host steps during backward or the next forward, as the clip rate and its speed say (speculate='auto')"
        )

    def left_behind(self, saved: RuleState) -> None:
        """Leave nothing: masters and moments are all that this engine saves."""

    def predict_exposed(self, times: StepTimes, config: OffloadConfig) -> float:
        # Every step is clipped, as most are that clip at a norm of 1.0 and begin.
        plan = best_plan(times, 1.0, may_look_ahead=config.speculate is not False)
        return exposed_seconds(times, plan, 1.0)

    def predict_work(self, times: StepTimes, config: OffloadConfig) -> float:
        return times.d2h + times.host + times.h2d

    def host_schedule(self, times: StepTimes, config: OffloadConfig) -> HostSchedule | None:
        # Where every step is clipped, looks ahead of the verdict are in vain.
        return HostSchedule(plan=best_plan(times, 1.0, may_look_ahead=False), passes=times.passes)

    def forecast(self, parts: StepParts) -> Forecast:
        times, chooser = parts.times(), cast(DeferredStep, parts.rule).chooser
        why_not, exposed = _why_no_forecast(parts), None
        if why_not is None and chooser.awaits:
            exposed = awaited_seconds(times, times.passes.direct * times.host)
        elif why_not is None and chooser.has_own_cores:
            exposed = exposed_seconds(times, chooser.plan, chooser.clip_rate)
        elif why_not is None:
            exposed = times.passes.direct * times.host  # whoever does it, the model waits for the core
        return Forecast(host=times.host, d2h=times.d2h, h2d=times.h2d, exposed=exposed, why_not=why_not)


def _why_no_forecast(parts: StepParts) -> str | None:
    """Why gradients don't leave in backward, or weights don't arrive during the next forward; None where both do."""
    if not parts.streams:
        return "gradients stay in param.grad until the step"
    return "new weights are awaited right after the step" if parts.weights_awaited else None
