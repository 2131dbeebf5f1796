"""`OffloadConfig(engine="cpu")`: the host steps after backward, and nothing runs ahead."""

from __future__ import annotations

from typing import Literal

import torch
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.cpu.state import HostState
from lightning_superscale.offload.engine import OffloadContext, RunFacts
from lightning_superscale.offload.host_state import host_memory
from lightning_superscale.offload.link.dtype import LinkDtype, dtype_on_link
from lightning_superscale.offload.weight_flow.weights import StreamedUnit
from lightning_superscale.ops.state_dtypes import StateDtypes
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.step_rule import StepGuard
from lightning_superscale.optim.unit import ShardUnit


class CpuEngine:
    """The engine that steps on the host after backward, one unit after the other. Satisfies `OffloadEngine`."""

    weights_arrive: Literal["at step"] = "at step"

    def refuse(self, facts: RunFacts) -> None:
        """Refuse nothing: this engine works with every other setting."""

    def memory(
        self,
        weights: torch.dtype,
        *,
        has_moments: bool,
        flows: bool,
        num_shares: int,
        dtypes: StateDtypes,
        link_dtype: LinkDtype,
    ) -> MemoryModel:
        # A master of the weights' dtype is what flows, where it is whole.
        has_own_weights = dtypes.master_of(weights) != dtype_on_link(link_dtype, weights)
        return host_memory(
            weights,
            has_moments=has_moments,
            num_transfer_buffers=1,
            has_copy=flows and (has_own_weights or num_shares > 1),
            dtypes=dtypes,
            link_dtype=link_dtype,
        )

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
