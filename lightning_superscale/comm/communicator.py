"""The communicator, through which transports and engines reach the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_superscale.comm.agreement import Agreement
from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.mesh import DataMesh, single_mesh


@dataclass(frozen=True, slots=True)
class Communicator:
    """The mesh, the collectives along its axes, and the agreement that every step begins with.

    Attributes:
        shard, replicate, data, tensor: collectives along these axes.
        gather: collectives over the ranks of the shard axis, on a process group of their own.
        flag_of: each parameter's place in the agreement's flags. There are two flags per parameter: whether it has a
            gradient, and, `num_params` places later, whether one came late.
    """

    mesh: DataMesh
    shard: AxisCollectives
    replicate: AxisCollectives
    data: AxisCollectives
    tensor: AxisCollectives
    gather: AxisCollectives
    agreement: Agreement
    flag_of: Mapping[nn.Parameter, int]

    @property
    def num_params(self) -> int:
        """The number of parameters that have flags."""
        return len(self.flag_of)


def ranks_of(mesh: DataMesh, params: Iterable[nn.Parameter], *, num_buffers: int = 0) -> Communicator:
    """Make the communicator that one run's transports and engines share.

    Args:
        params: the module's parameters, without duplicates, in the same order on every rank.
        num_buffers: number of the module's buffers. Every agreement has room for a flag of each, so that agreements
            that ranks enter at different places have one length, and can raise an error.
    """
    flag_of = {param: i for i, param in enumerate(params)}
    return Communicator(
        mesh,
        AxisCollectives(mesh.shard, mesh),
        AxisCollectives(mesh.replicate, mesh),
        AxisCollectives(mesh.data, mesh),
        AxisCollectives(mesh.tensor, mesh),
        AxisCollectives(mesh.gather, mesh),
        Agreement(mesh, max(2 * len(flag_of), num_buffers)),
        flag_of,
    )


def single_rank() -> Communicator:
    """The communicator of a run of one rank."""
    return ranks_of(single_mesh(), ())
