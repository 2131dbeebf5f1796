"""Who has which samples, as the Trainer asks: its samplers, and its own collectives over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from lightning_superscale.config import SequenceConfig, ZeroConfig
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.layout.mesh import BATCH_AXES, MeshSpec
from lightning_superscale.plugins.data.resume import place_loader, resume_batches
from lightning_superscale.run.environment import mesh_spec_of
from lightning_superscale.run.run import Run
from lightning_superscale.sequence.tokens.tensor import layout_of

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class SampleRanksMixin(_Base):
    """The part of the strategy that knows which ranks have samples of their own.

    One rank has a process group for user code's sake; its Trainer's own collectives are as without.

    Attributes:
        run: what trains, and shares sequences.
        zero_config: what is sharded over ranks.
        sequence_config: how ranks share the sequences of a batch; None where each has samples of its own.
    """

    run: Run
    zero_config: ZeroConfig
    sequence_config: SequenceConfig | None

    @property
    def num_ranks(self) -> int:
        """The number of processes of the run, before they are connected too."""
        return self.num_nodes * max(1, self.num_processes)

    @property
    def mesh_spec(self) -> MeshSpec:
        """The axes of the run's ranks; raises SuperScaleError where they do not fit."""
        return mesh_spec_of(self.zero_config, self.sequence_config, self.num_ranks)

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks, which the Trainer asks."""
        return self.num_ranks > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The sampler's replicas and rank: ranks of the sequence and tensor axis share samples and are one replica."""
        spec = self.mesh_spec
        return {
            "num_replicas": spec.size_of(*BATCH_AXES),
            "rank": spec.index_of(self.global_rank, *BATCH_AXES),
        }

    def process_dataloader(self, dataloader: object) -> object:
        """Lightning's loaders, told which samples are this rank's; raises SuperScaleError as `place_loader` says."""
        module = self.lightning_module
        loader = super().process_dataloader(dataloader)
        return loader if module is None else place_loader(loader, module.trainer, self.distributed_sampler_kwargs)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.lightning_module is not None:
            resume_batches(self.lightning_module.trainer, self.global_rank)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.num_ranks == 1:
            return decision
        vote = torch.tensor(int(decision), device=self.root_device)
        return bool(self.reduce(vote, reduce_op="min" if all else "max"))  # Lightning's counts votes in a sum

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The value that a tensor has over all ranks, on every rank; in a sum every sample counts once.

        Ranks that share samples, along the sequence and the tensor axis, log the same values of them. So the mean and
        the extremes over ranks are those over samples, and a sum is divided by the number of ranks that share a sample.
        """
        if self.num_ranks == 1:
            return tensor
        reduced = super().reduce(tensor, group, reduce_op)
        num_sharing = self.num_ranks // self.mesh_spec.size_of(*BATCH_AXES)
        is_sum = reduce_op.lower() == "sum" if isinstance(reduce_op, str) else reduce_op in (None, ReduceOp.SUM)
        if is_sum and group is None and num_sharing > 1 and isinstance(reduced, Tensor):
            reduced.copy_(reduced / num_sharing)  # in place, as reducing is
        return reduced

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all ranks; those of which ranks have parts are whole on each of them.

        Raises:
            SequenceParallelError: gradients are wanted of a tensor of tokens that ranks share.
        """
        if self.num_ranks == 1:
            return tensor
        if sync_grads and layout_of(tensor) is not None:
            raise SequenceParallelError(
                f"all_gather(sync_grads=True) of a tensor {list(tensor.shape)}, computed of tokens that ranks share; "
                "expected one without gradients. Every rank has the loss of all tokens: compute with it as it is, or "
                "gather with sync_grads=False."
            )
        return super().all_gather(self.run.output(tensor, trains=False), group, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self.num_ranks == 1 else super().broadcast(obj, src)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self.num_ranks > 1:
            super().barrier(*args, **kwargs)
