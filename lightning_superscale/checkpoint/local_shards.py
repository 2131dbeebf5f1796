"""This rank's shards of a tensor of any kind: plain, DTensor, ShardedTensor, or a box of another library."""

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
    """A rank's box of a tensor, with the shape of the unsharded tensor and the place of the box in it.

    Attributes:
        shape: shape of the unsharded tensor.
        offset: first index of the box along each tensor dim.
        tensor: values of the box, of its shape; empty on a rank that has none.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def tensor(self) -> Tensor: ...


def is_tensor_like(value: Any) -> bool:
    """Whether `local_shards` takes a value of this kind."""
    return isinstance(value, (Tensor, sharded_tensor_type())) or (
        isinstance(value, LocalBoxLike) and hasattr(value, "offset")
    )


def local_shards(value: Any) -> tuple[tuple[int, ...], torch.dtype, tuple[LocalShard, ...]]:
    """Shape and dtype of the unsharded tensor, and this rank's shards of it; no collective is issued.

    Args:
        value: a plain tensor, a DTensor, FSDP's ShardedTensor, or a LocalBoxLike. A plain tensor counts as unsharded.

    Returns:
        The shards' tensors are detached views of the value's memory.
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
