"""The mesh of ranks: one axis shards, one replicates (hybrid sharding, HSDP), one computes together (tensor parallel).

Rank `r` of the world is member `r % shard_size` of its shard axis and member `r // shard_size` of its
replicate axis, so that the ranks that shard a model together are neighbours: on one node where it fits.
With tensor parallelism neighbours are those of the tensor axis, as in Lightning's ModelParallelStrategy: rank `r` is
member `r % tensor_size` of it and member `r // tensor_size` of the shard axis, and nothing replicates.

[Note: Two groups] Gathers of weights follow each rank's forward and backward, reductions follow an order that ranks
agree on. Where the two interleave depends on which modules and parameters a rank's batch used, so on one group they
would meet the wrong partner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_superscale.comm.watch import RankWatch
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.cpu.memory import RecycledMemory

# The names that Lightning gives the axes of `LightningModule.device_mesh`.
DATA_AXIS, TENSOR_AXIS = "data_parallel", "tensor_parallel"


@dataclass(slots=True)
class CollectiveCount:
    """What was sent since the count began, by kind of collective.

    Attributes:
        calls: number of collectives.
        nbytes: bytes that this rank handed in, padding included.
    """

    calls: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, nbytes: int) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.nbytes[kind] = self.nbytes.get(kind, 0) + nbytes

    def clear(self) -> None:
        self.calls.clear()
        self.nbytes.clear()


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """One axis: this rank's place on it, and the group that talks along it (None when it has one rank)."""

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class DataMesh:
    """The axes of one run.

    Attributes:
        shard: ranks that share one copy of what is sharded.
        replicate: ranks that hold the same shard.
        world: all of them.
        gather: the ranks of `shard`, with a process group of their own ([Note: Two groups]).
        tensor: ranks that compute each batch together, each with its part of what a plan parallelizes.
        device_mesh: what users parallelize over, "data_parallel" by "tensor_parallel"; None without a tensor axis.
        watch: tells of ranks that failed; None on one rank.
        memory: where temporary buffers of collectives come from.
        control: group for small agreements, on the host whatever the devices are, so that agreeing never
            waits for a device; None on one rank.
    """

    shard: MeshAxis
    replicate: MeshAxis
    world: MeshAxis
    gather: MeshAxis
    tensor: MeshAxis = field(default_factory=lambda: MeshAxis("tensor", 0, 1))
    device_mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    watch: RankWatch | None = None
    counts: CollectiveCount = field(default_factory=CollectiveCount)
    memory: RecycledMemory = field(default_factory=RecycledMemory)

    @property
    def is_single(self) -> bool:
        return self.world.size == 1

    @property
    def data(self) -> MeshAxis:
        """Ranks with batches of their own, over which gradients are averaged."""
        return self.world if self.tensor.size == 1 else self.shard

    @property
    def num_shares(self) -> int:
        """Ranks that share one copy of what is sharded."""
        return self.shard.size * self.tensor.size


def single_mesh() -> DataMesh:
    """The mesh of one rank; needs no process group."""
    shard, replicate, world, gather = (MeshAxis(name, 0, 1) for name in ("shard", "replicate", "world", "gather"))
    return DataMesh(shard, replicate, world, gather)


def check_shard_size(shard_size: int, world_size: int) -> None:
    """Refuse a shard axis that does not divide the ranks.

    Raises:
        SuperScaleError: names both numbers and the sizes that work.
    """
    if world_size % shard_size:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise SuperScaleError(
            f"ZeroConfig.shard_size={shard_size} does not divide the {world_size} data-parallel ranks. "
            f"Use one of {', '.join(map(str, fitting))}, or None to shard over all ranks."
        )


def check_tensor_size(tensor_size: int, world_size: int) -> None:
    """Refuse a tensor axis that does not divide the ranks.

    Raises:
        SuperScaleError: names both numbers and the sizes that work.
    """
    if world_size % tensor_size:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise SuperScaleError(
            f"ZeroConfig.tensor_parallel={tensor_size} does not divide the {world_size} rank"
            f"{'s' if world_size > 1 else ''} of the Trainer. Use one of {', '.join(map(str, fitting))}, or other "
            "devices and num_nodes."
        )


def build_mesh(
    shard_size: int,
    timeout: timedelta,
    watch: RankWatch | None = None,
    *,
    tensor_size: int = 1,
    device_type: str = "cpu",
) -> DataMesh:
    """Make the mesh over the initialised default process group. Collective: every rank calls it.

    Args:
        shard_size: ranks on the shard axis; with a tensor axis, the rest of the world.
        timeout: of the control group's agreements.
        tensor_size: ranks on the tensor axis.
        device_type: where tensors of the tensor axis live.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if tensor_size > 1:
        return _build_tensor_mesh(tensor_size, timeout, watch, device_type)
    check_shard_size(shard_size, world_size)
    if world_size == 1:
        return single_mesh()
    num_replicas = world_size // shard_size
    shards = [[r * shard_size + s for s in range(shard_size)] for r in range(num_replicas)]
    replicas = [[r * shard_size + s for r in range(num_replicas)] for s in range(shard_size)]
    return DataMesh(
        MeshAxis("shard", rank % shard_size, shard_size, _group_of(shards, rank)),
        MeshAxis("replicate", rank // shard_size, num_replicas, _group_of(replicas, rank)),
        MeshAxis("world", rank, world_size, dist.group.WORLD),
        MeshAxis("gather", rank % shard_size, shard_size, _new_group(shards, rank)),
        control=dist.new_group(backend="gloo", timeout=timeout),
        watch=watch,
    )


def with_own_control(mesh: DataMesh, timeout: timedelta | None = None) -> DataMesh:
    """The same ranks with a control group of their own, for a thread whose agreements must not meet others'.

    Collective: every rank calls it. The watch stays with the main thread, whose places it knows; a lost rank breaks
    the new group's connections.
    """
    if mesh.control is None:
        return mesh
    group = dist.new_group(backend="gloo", timeout=timeout)
    return replace(mesh, control=group, watch=None, counts=CollectiveCount(), memory=RecycledMemory())


def _build_tensor_mesh(tensor_size: int, timeout: timedelta, watch: RankWatch | None, device_type: str) -> DataMesh:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    check_tensor_size(tensor_size, world_size)
    shard_size = world_size // tensor_size
    device_mesh = init_device_mesh(device_type, (shard_size, tensor_size), mesh_dim_names=(DATA_AXIS, TENSOR_AXIS))
    shards = [[s * tensor_size + t for s in range(shard_size)] for t in range(tensor_size)]
    return DataMesh(
        MeshAxis("shard", rank // tensor_size, shard_size, _group_of(shards, rank)),
        MeshAxis("replicate", 0, 1),
        MeshAxis("world", rank, world_size, dist.group.WORLD),
        MeshAxis("gather", rank // tensor_size, shard_size, device_mesh.get_group(DATA_AXIS)),
        MeshAxis("tensor", rank % tensor_size, tensor_size, device_mesh.get_group(TENSOR_AXIS)),
        device_mesh=device_mesh,
        control=dist.new_group(backend="gloo", timeout=timeout),
        watch=watch,
    )


def _group_of(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """The one of these groups that holds `rank`; the default group where that is it."""
    return dist.group.WORLD if len(groups) == 1 else _new_group(groups, rank)


def _new_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """A new group for each of these; returns the one with `rank`. Every rank makes every group, as torch demands."""
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(ranks)
            if rank in ranks:
                own = group
    return own
