"""Sizes and ranks of the mesh's axes: pure arithmetic, which needs no running rank."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

# The axes, outermost first. Neighbours on the last axis have neighbouring ranks, on one node where that fits.
AXES = ("replicate", "shard", "sequence", "tensor")

# Ranks that differ along DATA_AXES see other tokens; ranks that differ along BATCH_AXES see other batches.
DATA_AXES, BATCH_AXES = ("replicate", "shard", "sequence"), ("replicate", "shard")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSpec:
    """The number of ranks on each axis of a mesh.

    Ranks of the sequence axis see other tokens of the same samples, and their gradients are averaged as those of other
    samples are. So they may divide states among themselves as data-parallel ranks do: a tensor is sharded over
    `shard_axes`, and the ranks along `replica_axes` hold the same shard of it.

    Attributes:
        replicate: ranks with other batches that hold the same shard (hybrid sharding, HSDP).
        shard: ranks with other batches that divide one copy of the sharded states among themselves.
        sequence: ranks that each compute a part of every sample's sequence.
        tensor: ranks that compute each batch together, each with its part of the parameters that a plan parallelizes.
        shards_states: whether states are sharded at all; otherwise every rank but those of the tensor axis has them
            whole, and `shard` is 1.
    """

    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    tensor: int = 1
    shards_states: bool = True

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes along which ranks divide one copy of the sharded states."""
        return ("shard", "sequence") if self.shards_states else ("shard",)

    @property
    def replica_axes(self) -> tuple[str, ...]:
        """The axes along which ranks hold the same shard."""
        return ("replicate",) if self.shards_states else ("replicate", "sequence")

    @property
    def world_size(self) -> int:
        """The number of all ranks."""
        return self.size_of(*AXES)

    def size_of(self, *axes: str) -> int:
        """The number of ranks along these axes together."""
        return prod(getattr(self, axis) for axis in axes)

    def index_of(self, rank: int, *axes: str) -> int:
        """The place of a rank of the world along these axes, flattened in the order of AXES."""
        index = 0
        for axis in AXES:
            if axis in axes:
                index = index * getattr(self, axis) + self._coordinate(rank, axis)
        return index

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that differ along these axes only, one list per combination of the other axes; each in order."""
        rest = tuple(axis for axis in AXES if axis not in axes)
        members: list[list[int]] = [[] for _ in range(self.size_of(*rest))]
        for rank in range(self.world_size):
            members[self.index_of(rank, *rest)].append(rank)
        return members

    def _coordinate(self, rank: int, axis: str) -> int:
        inner = AXES[AXES.index(axis) + 1 :]
        return rank // self.size_of(*inner) % int(getattr(self, axis))
