"""The mesh of ranks: the axes of a `MeshSpec`, each with its process group.

Ranks are numbered as in the spec, with the tensor axis innermost, as in Lightning's ModelParallelStrategy.

[Note: Two groups] Gathers of weights follow each rank's forward and backward, reductions follow an order that ranks
agree on. How the two interleave depends on the modules and parameters that a rank's batch used, so on one process
group a gather of one rank would meet a reduction of another. In stage 3 user code has a third one, under its DTensors:
what one rank alone does with a sharded weight must not meet a gather, which would hand the weights of one to the other.
What a model's forward and backward exchange along the sequence axis has a group of its own for the same reason: it
follows the model, while reductions are issued by the gradients' hooks between its collectives.

[Note: One order per device] NCCL runs a collective as a kernel that waits on the device for the other ranks' kernels.
Two groups whose kernels start in different orders on two ranks can wait for one another, when the device has no room
for both. So each rank issues its collectives in one order: a thread that gathers new weights registers in `queued`, and
whoever issues any other collective of ours first waits until that thread has issued what it was given. Collectives of
a model's forward and backward do so too (`AxisLink.note`); a graph that torch.compile made can't, and a step of a
model with one waits for all new weights before its forward (`PublishGates`). They are issued by the thread that runs
the model, and in a backward by autograd's thread of the device, which also runs the hooks that issue reductions: by one
thread at a time, in the order of the model, which ranks that share samples run alike. gloo's collectives run on the
host, and need no order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_superscale.comm.watch import RankWatch
from lightning_superscale.forks import Origin
from lightning_superscale.layout.mesh import AXES, BATCH_AXES, DATA_AXES, MeshSpec
from lightning_superscale.ops.cpu.memory import RecycledMemory

# Weights are gathered along this one, which has the ranks of `shard`.
GATHER_AXIS = "gather"

# The names that Lightning gives the axes of `LightningModule.device_mesh`.
DATA_AXIS, TENSOR_AXIS = "data_parallel", "tensor_parallel"


@dataclass(slots=True)
class EndRequest:
    """The wish of some rank that all ranks end after their present step.

    Attributes:
        wanted_at: when this rank wanted it first, by `time.monotonic`; None while it does not.
        is_agreed: whether an agreement found that any rank wants it; on all ranks from the same agreement on.
    """

    wanted_at: float | None = None
    is_agreed: bool = False

    def clear(self) -> None:
        """Want to go on."""
        self.wanted_at, self.is_agreed = None, False


@dataclass(slots=True)
class CollectiveCount:
    """Collectives and their bytes on this rank since the last `clear`, by kind of collective.

    Attributes:
        origin: the process whose collectives these are; one that is forked from it may issue none; None
            on one rank.
        calls: number of collectives.
        nbytes: bytes of this rank's inputs, padding included.
    """

    origin: Origin | None = None
    calls: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, nbytes: int) -> None:
        """Count one collective of `nbytes` bytes, which is about to be issued.

        Raises:
            SuperScaleError: in a forked process, which must not touch the connections of its parent.
        """
        self.check_origin()
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.nbytes[kind] = self.nbytes.get(kind, 0) + nbytes

    def check_origin(self) -> None:
        """Refuse collectives in a forked process; see `add`."""
        if self.origin is not None:
            self.origin.check("a collective")

    def clear(self) -> None:
        """Begin the count anew."""
        self.calls.clear()
        self.nbytes.clear()


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """One mesh axis: this rank's place on it, its number of ranks, and its process group (None with one rank)."""

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class DataMesh:
    """The mesh of one run: the axes of a `MeshSpec`, flattened as they are used.

    Attributes:
        shard: the ranks that divide one copy of the sharded states, those of `MeshSpec.shard_axes`.
        replicate: the ranks that hold the same shard, those of `MeshSpec.replica_axes`.
        world: all ranks.
        gather: the ranks of `shard`, with a process group of their own ([Note: Two groups]).
        data: the ranks over which gradients are averaged, `shard` and `replicate` together: they see other tokens.
        batch: the ranks with batches of their own, for samplers.
        tensor: the ranks that compute each batch together.
        sequence: the ranks that share the sequences of a batch, with a process group of their own.
        users: the process group of user code's operations on sharded weights, over the ranks of `shard`; None where
            weights are not sharded.
        device_mesh: the DeviceMesh that users parallelize over, "data_parallel" by "tensor_parallel", of which the
            first has the ranks of `data`; None without a tensor axis.
        control: process group for small agreements, on the host whatever the devices are, so that agreeing never
            waits for a device; None on one rank.
        watch: reports ranks that failed; None on one rank.
        end: whether ranks want to end after their present step.
        counts: counts collectives.
        memory: allocates temporary buffers of collectives.
        device_type: type of the device whose tensors the collectives move.
        queued: each returns when gathers that another thread was given are issued ([Note: One order per device]).
    """

    shard: MeshAxis
    replicate: MeshAxis
    world: MeshAxis
    gather: MeshAxis
    data: MeshAxis = field(default_factory=lambda: MeshAxis("data", 0, 1))
    batch: MeshAxis = field(default_factory=lambda: MeshAxis("batch", 0, 1))
    tensor: MeshAxis = field(default_factory=lambda: MeshAxis("tensor", 0, 1))
    sequence: MeshAxis = field(default_factory=lambda: MeshAxis("sequence", 0, 1))
    users: dist.ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    watch: RankWatch | None = None
    end: EndRequest = field(default_factory=EndRequest)
    counts: CollectiveCount = field(default_factory=CollectiveCount)
    memory: RecycledMemory = field(default_factory=RecycledMemory)
    device_type: str = "cpu"
    queued: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_single(self) -> bool:
        """Whether the run has one rank."""
        return self.world.size == 1

    def __getitem__(self, name: str) -> MeshAxis:
        if name not in AXES:
            raise KeyError(f"a mesh has the axes {', '.join(AXES)}; found {name!r}")
        axis: MeshAxis = getattr(self, name)
        return axis

    def wait_queued(self) -> None:
        """Return when gathers that another thread was given are issued ([Note: One order per device])."""
        for wait_issued in self.queued:
            wait_issued()

    @property
    def num_shares(self) -> int:
        """The number of ranks that share one copy of the sharded states."""
        return self.shard.size * self.tensor.size


def single_mesh() -> DataMesh:
    """The mesh of one rank; needs no process group."""
    shard, replicate, world, gather = (MeshAxis(name, 0, 1) for name in ("shard", "replicate", "world", "gather"))
    return DataMesh(shard, replicate, world, gather)


def build_mesh(
    spec: MeshSpec,
    timeout: timedelta,
    watch: RankWatch | None = None,
    *,
    device_type: str = "cpu",
    shards_weights: bool = True,
) -> DataMesh:
    """Make the mesh over the initialised default process group. Every rank calls it.

    Args:
        spec: sizes of the axes, of as many ranks as the group has.
        timeout: timeout of the control group's agreements.
        watch: reports ranks that failed.
        device_type: type of the device whose tensors the collectives move.
        shards_weights: whether weights may be sharded.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if spec.world_size != world_size:
        raise AssertionError(f"{spec} has {spec.world_size} ranks, the process group {world_size}")
    if world_size == 1:
        return single_mesh()
    device_mesh = _device_mesh(spec, device_type)
    made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}

    def axis(name: str, *axes: str, is_shared: bool = True) -> MeshAxis:
        """The axis of these, flattened; `is_shared`: the same ranks under another name have the same group."""
        groups = spec.groups(*axes)
        key = tuple(map(tuple, groups))
        if not is_shared:
            group = _new_group(groups, rank)
        elif key in made:
            group = made[key]
        else:
            group = made[key] = dist.group.WORLD if len(groups) == 1 else _new_group(groups, rank)
        return MeshAxis(name, spec.index_of(rank, *axes), spec.size_of(*axes), group)

    if device_mesh is not None:
        made[tuple(map(tuple, spec.groups("tensor")))] = device_mesh.get_group(TENSOR_AXIS)
    return DataMesh(
        axis("shard", *spec.shard_axes),
        axis("replicate", *spec.replica_axes),
        data=axis("data", *DATA_AXES),
        batch=axis("batch", *BATCH_AXES),
        tensor=axis("tensor", "tensor"),
        sequence=axis("sequence", "sequence", is_shared=False),
        world=MeshAxis("world", rank, world_size, dist.group.WORLD),
        gather=axis(GATHER_AXIS, *spec.shard_axes, is_shared=False),
        users=_users_group(spec, rank, device_mesh) if shards_weights else None,
        device_mesh=device_mesh,
        control=dist.new_group(backend="gloo", timeout=timeout),
        watch=watch,
        counts=CollectiveCount(Origin()),
        device_type=device_type,
    )


def _device_mesh(spec: MeshSpec, device_type: str) -> DeviceMesh | None:
    """The DeviceMesh that users parallelize modules over; None without a tensor axis."""
    if spec.tensor == 1:
        return None
    shape = (spec.size_of(*DATA_AXES), spec.tensor)
    return init_device_mesh(device_type, shape, mesh_dim_names=(DATA_AXIS, TENSOR_AXIS))


def _users_group(spec: MeshSpec, rank: int, device_mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """A third process group over the shard axis, under the DTensors of user code: see [Note: Two groups]."""
    if device_mesh is not None and spec.size_of(*spec.shard_axes) == spec.size_of(*DATA_AXES):
        return device_mesh.get_group(DATA_AXIS)
    return _new_group(spec.groups(*spec.shard_axes), rank)


def with_own_control(mesh: DataMesh, timeout: timedelta | None = None) -> DataMesh:
    """A mesh of the same ranks with a new control group, for a thread whose agreements must not meet other threads'.

    Every rank calls it. The new mesh has no watch, which follows the main thread only; a lost rank breaks the new
    group's connections.
    """
    if mesh.control is None:
        return mesh
    group = dist.new_group(backend="gloo", timeout=timeout)
    return replace(mesh, control=group, watch=None, counts=CollectiveCount(mesh.counts.origin), memory=RecycledMemory())


def _new_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Make a process group of each list of several ranks; returns the one with `rank`.

    Every rank calls it with the same lists: torch demands that every rank makes every group.
    """
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(ranks)
            if rank in ranks:
                own = group
    return own
