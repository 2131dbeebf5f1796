"""`OffloadConfig(engine="cpu")`: the host steps after backward, and nothing runs ahead."""

from __future__ import annotations

from typing import Literal

import torch
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig
from lightning_superscale.offload.cpu.state import HostState, host_bytes
from lightning_superscale.offload.engine import OffloadContext, RunFacts
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.weight_flow.weights import StreamedUnit
from lightning_superscale.ops.state_dtypes import StateDtypes
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.step_rule import StepGuard
from lightning_superscale.optim.unit import ShardUnit


class CpuEngine:
    """Satisfies `OffloadEngine`."""

    weights_arrive: Literal["at step"] = "at step"

    def refuse(self, facts: RunFacts) -> None:
        """Everything works."""

    def host_bytes(
        self, numel: int, dtype: torch.dtype, *, flows: bool, dtypes: StateDtypes, link_dtype: LinkDtype
    ) -> int:
        return host_bytes(numel, dtype, has_moments=True, flows=flows, dtypes=dtypes, link_dtype=link_dtype)

    def make_state(
        self, unit: ShardUnit, context: OffloadContext, *, has_moments: bool, streamed: StreamedUnit | None
    ) -> HostState:
        return HostState(unit, context, has_moments=has_moments, streamed=streamed)

    def make_step(self, optimizer: Optimizer, guard: StepGuard, context: OffloadContext) -> AdamWStep:
        return AdamWStep(optimizer, guard, context.update.submit, timeline=context.timeline)

    def how_it_steps(self, config: OffloadConfig, *, streams: bool) -> str:
        return "the 'cpu' engine steps on the host, after backward"

    def why_no_forecast(self, config: OffloadConfig) -> str:
        return "the host steps after backward"
