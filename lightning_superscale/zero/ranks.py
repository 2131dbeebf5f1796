"""What transports and engines know of the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_superscale.comm.agreement import Agreement
from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.mesh import DataMesh, single_mesh


@dataclass(frozen=True, slots=True)
class Ranks:
    """The mesh, the collectives along its axes, and the agreement that every step begins with.

    Attributes:
        flag_of: a parameter's place in the agreement's flags. The flags hold two per parameter:
            whether it has a gradient, and whether one came late.
    """

    mesh: DataMesh
    shard: AxisCollectives
    replicate: AxisCollectives
    world: AxisCollectives
    agreement: Agreement
    flag_of: Mapping[nn.Parameter, int]

    @property
    def num_params(self) -> int:
        return len(self.flag_of)


def ranks_of(mesh: DataMesh, params: Iterable[nn.Parameter]) -> Ranks:
    """Args: params: the module's, without duplicates, in the same order on every rank."""
    flag_of = {param: i for i, param in enumerate(params)}
    return Ranks(
        mesh,
        AxisCollectives(mesh.shard, mesh),
        AxisCollectives(mesh.replicate, mesh),
        AxisCollectives(mesh.world, mesh),
        Agreement(mesh, 2 * len(flag_of)),
        flag_of,
    )


def single_rank() -> Ranks:
    """The only rank there is."""
    return ranks_of(single_mesh(), ())
