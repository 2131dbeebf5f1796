"""What one `fit()` is assembled from, resolved."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.offload.engine import OffloadEngine, engine_of
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.run.precision import PrecisionChoices
from lightning_superscale.run.weight_flow import WeightsChoice
from lightning_superscale.timeline import UNTIMED, Timeline
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run is assembled from.

    Attributes:
        why_held: why gradients stay in `param.grad` until the step; None when they may leave during backward.
        why_awaited: why new weights are waited for right after the step; None when forward may wait for them.
        is_automatic: whether Lightning runs backward and step, or the user's training_step.
        precision: dtypes of everything.
        timeline: where a step is recorded, when one is.
        order: compares gathers between ranks; needed by stage 3 over several ranks.
        weights: whether weights flow from the host, and why.
        is_scaling: whether losses are scaled by a backward that runs now; None where none ever is.
        flow: brings them when they are used; None when they stay on the device.
    """

    mesh: DataMesh
    device: torch.device
    zero: ZeroConfig
    offload: OffloadConfig | None
    precision: PrecisionChoices
    error_if_nonfinite: bool
    why_held: str | None
    why_awaited: str | None
    is_automatic: bool
    order: GatherOrder | None
    weights: WeightsChoice
    flow: WeightFlow | None = None
    is_scaling: IsScaling | None = None
    timeline: Timeline = UNTIMED

    @property
    def shards_weights(self) -> bool:
        """Stage 3 over several ranks: FSDP2 gathers weights for forward and backward, over data-parallel ones."""
        return self.zero.stage == 3 and self.mesh.num_shares > 1

    @property
    def engine(self) -> OffloadEngine | None:
        """What steps Adam and AdamW on the host; None where nothing is offloaded."""
        return None if self.offload is None else engine_of(self.offload.engine)

    @property
    def streams(self) -> bool:
        """Whether gradients leave during backward: they have somewhere to go, and nobody looks at them before."""
        return self.why_held is None and (self.offload is not None or not self.mesh.is_single)
