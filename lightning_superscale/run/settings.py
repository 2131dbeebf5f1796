"""The resolved settings that one `fit()` is assembled from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.offload.engine import OffloadEngine, engine_of
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.optim.transport import IsScaling
from lightning_superscale.run.precision import PrecisionChoices
from lightning_superscale.run.techniques.collection import Techniques
from lightning_superscale.run.visibility import Visibility
from lightning_superscale.timeline import UNTIMED, Timeline
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder


def shards_weights(zero: ZeroConfig, mesh: DataMesh) -> bool:
    """Whether FSDP2 shards weights and gathers them for each pass: stage 3 over several ranks of one copy."""
    return zero.stage == 3 and mesh.num_shares > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """The resolved settings that a run is assembled from.

    Attributes:
        sequence: how ranks share the sequences of a batch; None where each has samples of its own.
        visibility: what user code may look at between the run's passes.
        precision: dtypes of weights, states and gradients.
        timeline: where a step is recorded, when one is.
        order: compares gathers between ranks; needed by stage 3 over several ranks.
        is_scaling: returns whether the backward of a scaled loss runs now; None where no loss is ever scaled.
        techniques: the techniques that act on the module around its forwards.
        is_compiled: whether the framework says that the module is a product of `torch.compile`.
    """

    mesh: DataMesh
    device: torch.device
    zero: ZeroConfig
    offload: OffloadConfig | None
    precision: PrecisionChoices
    error_if_nonfinite: bool
    visibility: Visibility
    order: GatherOrder | None
    sequence: SequenceConfig | None = None
    techniques: Techniques = field(default_factory=Techniques)
    is_compiled: bool = False
    is_scaling: IsScaling | None = None
    timeline: Timeline = UNTIMED

    @property
    def shards_weights(self) -> bool:
        """Whether this run shards weights over ranks."""
        return shards_weights(self.zero, self.mesh)

    @property
    def flow(self) -> WeightFlow | None:
        """The schedule that brings weights to the device when they are used; None when they stay there."""
        return self.techniques.flow

    @property
    def engine(self) -> OffloadEngine | None:
        """The engine that steps Adam and AdamW on the host; None where nothing is offloaded."""
        return None if self.offload is None else engine_of(self.offload.engine)

    @property
    def clips_in_place(self) -> bool:
        """Whether gradients are clipped in `param.grad`, where user code looks at them.

        Elsewhere a step clips, which costs no pass of its own. Gradients of scaled losses are scaled until the step.
        """
        is_visible = self.visibility.why_gradients_stay is not None
        return is_visible and self.is_scaling is None and self.mesh.tensor.size == 1

    @property
    def why_weights_awaited(self) -> str | None:
        """Why new weights are waited for right after the step; None where every read waits by itself.

        Weights that flow over several ranks are gathered when they are used. A rank that reads one on its own would
        wait for ranks that may wait for it in a collective of the user's.
        """
        return None if self.flow is None or self.mesh.is_single else self.visibility.why_weights_awaited

    def why_one_optimizer(self, param: nn.Parameter) -> str | None:
        """Why a parameter can't be in two optimizers; None where weights are the only thing that both would keep.

        Then each optimizer takes over the other's new weights as it takes over those that user code edits.
        """
        if self.offload is not None:
            return "two would each keep a master of it in host memory"
        if self.mesh.num_shares > 1:
            return "two would each gather its new weights from the other ranks"
        states = self.precision.states
        if states.master_of(param.dtype) != param.dtype or states.compensates(param.dtype):
            return f"two would each keep a master of it, since it is {param.dtype}"
        return None

    @property
    def streams(self) -> bool:
        """Whether gradients leave during backward: they have somewhere to go, and user code does not look at them."""
        return self.visibility.why_gradients_stay is None and (self.offload is not None or not self.mesh.is_single)
