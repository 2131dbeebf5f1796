"""A unit of parameters that FSDP2 shards: this rank's rows of each, and the packing of whole gradients into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_superscale.comm.dtensor import local_rows_of, tensor_shape
from lightning_superscale.layout.rows import ParamSpec, UnitLayout, unit_layout
from lightning_superscale.ops.events import note_use
from lightning_superscale.optim.unit import slice_view
from lightning_superscale.optim.weights.store import OnDevice, WeightStore
from lightning_superscale.zero.packing import RankedRows


class Fsdp2Unit:
    """Parameters of one group, optimizer, dtype and device.

    DTensor's `Shard(0)` cuts rows as `layout.rows.shard_rows` does (tests/zero/fsdp2/test_contract.py), so this rank's
    local tensors are the slices of `shard`, each in a storage of its own.

    Attributes:
        group: index of the FSDP2 group that gathers these parameters.
        full: layout of whole parameters, as the tensor axis cuts them; only its names and shapes are used.
        store: waits for new rows.
    """

    def __init__(
        self,
        index: int,
        group: int,
        named_params: Sequence[tuple[str, nn.Parameter]],
        shard_rank: int,
        shard_world_size: int,
    ) -> None:
        specs = [ParamSpec(fqn, tensor_shape(param)) for fqn, param in named_params]
        self.index = index
        self.group = group
        self.params = tuple(param for _, param in named_params)
        self.full: UnitLayout = unit_layout(index, specs, 0, 1)
        self.shard: UnitLayout = unit_layout(index, specs, shard_rank, shard_world_size)
        self.is_whole = False  # even an only shard is another tensor than the module's unsharded parameter
        self.has_whole_weights = False
        self._shard_world_size = shard_world_size
        self._ranked = RankedRows(self.shard, shard_world_size)
        self.store: WeightStore = OnDevice(self.params)
        self._inbox: Tensor | None = None
        for piece, param in zip(self.shard.slices, self.params, strict=True):
            found = tuple(local_rows_of(param).shape)
            if found != piece.local_shape:
                raise AssertionError(f"FSDP2 holds {found} of {piece.fqn}; expected rows {piece.rows}")

    @property
    def weight_numel(self) -> int:
        return self.shard.shard_numel

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def local_rows(self, i: int) -> Tensor:
        return local_rows_of(self.params[i]).view(-1)

    def seal(self) -> None:
        return

    def inbox(self) -> Tensor:
        if self._inbox is None:
            self._inbox = torch.empty(self.shard.shard_numel, dtype=self.dtype, device=self.device)
        return self._inbox

    def take_inbox(self, stepped: Sequence[int]) -> None:
        """Copy the stepped slices from the inbox into the sharded parameters, which gathers read; frees the inbox."""
        inbox = self.inbox()
        for i in stepped:
            self.local_rows(i).copy_(slice_view(inbox, self.shard.slices[i]))
        note_use(inbox)
        self._inbox = None

    def packed(self, grads: Mapping[int, Tensor], scale: float, dtype: torch.dtype) -> Tensor:
        """Gradients times `scale` in the buffer that a reduce-scatter reads, [shard_world_size, shard_numel].

        Rows of parameters without a gradient here are zero; alignment gaps hold any values.

        Args:
            grads: whole gradients by index of the parameter, 1D.
            dtype: of the buffer.
        """
        packed = torch.empty(self._shard_world_size, self.shard.shard_numel, dtype=dtype, device=self.device)
        return self._ranked.pack(packed, grads, scale)
