"""`OffloadConfig(engine="cpu")`: the host steps after backward, and nothing runs ahead."""

from __future__ import annotations

from typing import Literal

from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.cpu.state import HostState
from lightning_superscale.offload.engine import Forecast, OffloadContext, RunFacts, StepParts
from lightning_superscale.offload.link.dtype import dtype_on_link
from lightning_superscale.offload.memory import ParamKind, host_memory
from lightning_superscale.offload.planner.forecast import HostSchedule, StepTimes, awaited_seconds
from lightning_superscale.offload.weight_flow.weights import StreamedUnit
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.step_rule import RuleState, StepGuard
from lightning_superscale.optim.unit import ShardUnit


class CpuEngine:
    """The engine that steps on the host after backward, one unit after the other. Satisfies `OffloadEngine`."""

    weights_arrive: Literal["at step"] = "at step"
    equals_adamw = True
    why_no_flow = None

    def refuse(self, facts: RunFacts) -> None:
        """Refuse nothing: this engine works with every other setting."""

    def memory(self, kind: ParamKind) -> MemoryModel:
        # A master of the weights' dtype is what flows, where it is whole.
        has_own_weights = kind.dtypes.master_of(kind.weights) != dtype_on_link(kind.link_dtype, kind.weights)
        has_copy = kind.flows and (has_own_weights or kind.num_shares > 1)
        return host_memory(kind, num_transfer_buffers=1, has_copy=has_copy)

    def device_bytes(self, kind: ParamKind) -> float:
        return 0.0  # gradients leave from where backward put them, and weights arrive where forward reads them

    def make_state(
        self, unit: ShardUnit, context: OffloadContext, *, has_moments: bool, streamed: StreamedUnit | None
    ) -> HostState:
        return HostState(unit, context, has_moments=has_moments, streamed=streamed)

    def make_step(self, optimizer: Optimizer, guard: StepGuard, context: OffloadContext) -> AdamWStep:
        return AdamWStep(optimizer, guard, context.update.submit, timeline=context.timeline)

    def how_it_steps(self, config: OffloadConfig, *, streams: bool) -> str:
        return "the 'cpu' engine steps on the host, after backward"

    def left_behind(self, saved: RuleState) -> None:
        """Leave nothing: masters and moments are all that this engine saves."""

    def predict_exposed(self, times: StepTimes, config: OffloadConfig) -> float:
        return awaited_seconds(times, times.host)

    def predict_work(self, times: StepTimes, config: OffloadConfig) -> float:
        return times.d2h + times.host + times.h2d

    def host_schedule(self, times: StepTimes, config: OffloadConfig) -> HostSchedule | None:
        return HostSchedule(waits=True)

    def forecast(self, parts: StepParts) -> Forecast:
        times = parts.times()
        return Forecast(host=times.host, d2h=times.d2h, h2d=times.h2d, why_not="the host steps after backward")
