"""What this rank holds of a tensor, whatever kind of tensor says it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.checkpoint.state import LocalShard
from lightning_superscale.layout.box import Box, whole_box
from lightning_superscale.torch_private import sharded_tensor_type


@runtime_checkable
class LocalBoxLike(Protocol):
    """A rank's part of a tensor, described by whoever cut it.

    Attributes:
        shape: of the whole.
        offset: first index of the part along each tensor dim.
        tensor: the part's values.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def tensor(self) -> Tensor: ...


def is_tensor_like(value: Any) -> bool:
    """Whether `local_shards` knows what a value holds."""
    return isinstance(value, (Tensor, sharded_tensor_type())) or (
        isinstance(value, LocalBoxLike) and hasattr(value, "offset")
    )


def local_shards(value: Any) -> tuple[tuple[int, ...], torch.dtype, tuple[LocalShard, ...]]:
    """Shape and dtype of the whole tensor, and this rank's parts of it; issues nothing.

    Args:
        value: a tensor that is whole, a DTensor, FSDP's ShardedTensor, or a LocalBoxLike.
    """
    if isinstance(value, sharded_tensor_type()):
        shards = tuple(
            LocalShard(Box(tuple(one.metadata.shard_offsets), tuple(one.metadata.shard_sizes)), one.tensor)
            for one in value.local_shards()
        )
        return tuple(value.size()), value.dtype, shards
    if isinstance(value, DTensor):
        local = value.to_local()
        chunks = value.__create_chunk_list__()  # type: ignore[no-untyped-call]
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
        held = tuple(LocalShard(box, local.detach()) for box in boxes if box.size == tuple(local.shape))
        return tuple(value.shape), value.dtype, held
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, (LocalShard(whole_box(value.shape), value.detach()),)
    part: LocalBoxLike = value
    local = part.tensor.detach()
    held = (LocalShard(Box(part.offset, tuple(local.shape)), local),) if local.numel() else ()
    return part.shape, local.dtype, held
