"""The resolved settings that an estimate is made for, without any process, device or tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.estimation.links import GroupShape
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.run.environment import mesh_spec_of
from lightning_superscale.run.precision import PrecisionChoices


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a run's strategy and precision plugin resolve to.

    Attributes:
        num_ranks: of all nodes.
        ranks_per_node: that share a host's memory.
        on_device: share of the trained parameters whose states stay on the device, from the last gradient backwards.
        flows: whether weights stream from host memory.
        micro_batches: of one step.
    """

    zero: ZeroConfig
    offload: OffloadConfig | None
    precision: PrecisionChoices
    sequence: SequenceConfig | None = None
    num_ranks: int = 1
    ranks_per_node: int = 1
    on_device: float = 0.0
    flows: bool = False
    link_dtype: LinkDtype = "weights"
    micro_batches: int = 1

    @property
    def mesh(self) -> MeshSpec:
        """The mesh axes.

        Raises:
            SuperScaleError: an axis does not divide the ranks.
        """
        return mesh_spec_of(self.zero, self.sequence, self.num_ranks)

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of the sharded states."""
        mesh = self.mesh
        return mesh.size_of(*mesh.shard_axes)

    @property
    def sequence_group(self) -> GroupShape:
        """The places of the ranks that share a sequence, which are neighbours."""
        size = self.mesh.sequence
        per_node = min(size, self.ranks_per_node)
        return GroupShape(-(-size // per_node), per_node)

    @property
    def shards_weights(self) -> bool:
        """Whether FSDP2 shards weights and gathers them for each pass."""
        return self.zero.stage == 3 and self.num_shards > 1

    @property
    def streams(self) -> bool:
        """Whether gradients leave `param.grad` during backward: to the host or to other ranks."""
        return self.offload is not None or self.num_ranks > 1

    @property
    def accumulates_whole(self) -> bool:
        """Whether whole gradients add up in `param.grad` until the last micro-batch of a step."""
        return self.micro_batches > 1 and (self.zero.reduces_once or self.num_ranks == 1)

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype that a parameter or buffer has in training: "-true" precisions cast those of floating point."""
        is_cast = self.precision.name.endswith("-true") and tensor.is_floating_point()
        return self.precision.weights if is_cast else tensor.dtype
