"""The options of ZeRO: the tensors that are sharded over ranks, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional, Union

from lightning_superscale.config.values import Between, ModuleNames, PositiveInt, check_fields
from lightning_superscale.errors import SuperScaleError

Stage = Annotated[int, Between(0, 3)]


@dataclass(frozen=True)
class ZeroConfig:
    """Options for sharding a training state over the data-parallel ranks (Rajbhandari et al. 2020, arXiv:1910.02054).

    Args:
        stage: 0 replicates everything, as DDP does. 1 shards master weights and optimizer states, 2 shards gradients
            too, and 3 shards weights too.
        bucket_mb: size of a bucket in MiB of weights, which are reduced, stepped and all-gathered together.
        shard_size: number of ranks that a tensor is sharded over; None for all. With fewer than all, groups of so many
            ranks hold replicas of the shards (HSDP).
        no_sync: whether micro-batches before the last of a step accumulate unsharded gradients on every rank, so that
            ranks reduce once per step. "auto" does so below stage 2; in stages 2 and 3 every micro-batch is reduced,
            and ranks keep only their shards.
        wrap: in stage 3, class names or names of the modules whose weights are all-gathered together; None finds the
            repeated blocks.
        assume_elementwise: whether an optimizer that this package does not know may step on rows of each parameter.
            The result is right only if the optimizer treats every element by itself, as Adam and SGD do.
        tensor_parallel: in stage 3, number of neighbouring ranks that compute each batch together, on modules that
            configure_model() parallelizes over self.device_mesh["tensor_parallel"].
    """

    stage: Stage = 0
    bucket_mb: PositiveInt = 64
    shard_size: Optional[PositiveInt] = None
    no_sync: Union[bool, Literal["auto"]] = "auto"
    wrap: Optional[ModuleNames] = None
    assume_elementwise: bool = False
    tensor_parallel: PositiveInt = 1

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_tensor_parallel()
        if self.shard_size is not None and self.stage == 0:
            raise SuperScaleError(
                f"ZeroConfig.shard_size={self.shard_size} divides ranks into groups that shard, and stage 0 shards "
                "nothing. Use stage 1, 2 or 3, or remove shard_size."
            )
        if self.wrap is not None and self.stage != 3:
            raise SuperScaleError(
                f"ZeroConfig.wrap chooses what stage 3 gathers together; found it with stage {self.stage}. Remove it."
            )

    def _check_tensor_parallel(self) -> None:
        if self.tensor_parallel == 1:
            return
        if self.stage != 3:
            raise SuperScaleError(
                f"ZeroConfig.tensor_parallel={self.tensor_parallel} works in stage 3 only; found stage {self.stage}. "
                "Use ZeroConfig(stage=3), or remove tensor_parallel."
            )
        if self.shard_size is not None:
            raise SuperScaleError(
                f"ZeroConfig.tensor_parallel={self.tensor_parallel} can't be combined with shard_size="
                f"{self.shard_size}: shards are spread over all data-parallel ranks then. Remove shard_size."
            )

    @property
    def reduces_once(self) -> bool:
        """Whether the gradients of all micro-batches of a step are reduced once, together."""
        return self.stage < 2 if self.no_sync == "auto" else bool(self.no_sync)
