"""The seconds of collectives on links of given rates and latencies (the alpha-beta model).

[Note: Seconds of a collective] A ring sends (n - 1) / n of a buffer through each rank's link, in n - 1 rounds that each
wait for a latency; an all-reduce is a reduce-scatter and an all-gather, and an all-to-all exchanges in pairs (Thakur,
Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1)). Over several
nodes a collective is hierarchical: a ring within each node, and between nodes as many rings as a node has ranks, each
with its part of the bytes. Both together send what one ring over all ranks would, in fewer rounds, and every rank's
link to other nodes is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_superscale.estimation.devices import DeviceProfile

Kind = Literal["reduce_scatter", "all_gather", "all_reduce", "all_to_all", "ring_shift"]
"""The names by which a run's mesh counts its collectives (`CollectiveCount` in comm/mesh.py)."""

Port = Literal["rank", "node", "to host", "from host"]
"""A link of one rank: to the ranks of its node, to other nodes, and each way of the one to its host."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds that one round of a collective takes, however few bytes it sends.

    The defaults are those by which NCCL chooses its algorithms, of a ring with the protocol "Simple" (hwLat in
    src/graph/tuning.cc of NCCL 2.11).

    Attributes:
        rank: between ranks of one node, over NVLink.
        node: between nodes, over InfiniBand.
    """

    rank: float = 3.4e-6
    node: float = 9.6e-6


class GroupShape(NamedTuple):
    """The places of a group's ranks: a number of nodes, and the most ranks that it has on one of them."""

    num_nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """The number of ranks, where every node has as many."""
        return self.num_nodes * self.per_node


class Exchange(NamedTuple):
    """A collective, with the bytes that `Links.hops` takes."""

    kind: Kind
    nbytes: int


class Hop(NamedTuple):
    """A part of a collective: seconds of waiting for latencies, and seconds of a port that it has for itself."""

    port: Port
    latency: float
    seconds: float


class Links:
    """The links of one rank.

    Args:
        profile: its rates; what they reach is taken off.
    """

    def __init__(self, profile: DeviceProfile, latencies: Latencies) -> None:
        self._rank_rate = profile.rank_link * profile.reach.links
        self._node_rate = profile.node_link * profile.reach.links
        self._latencies = latencies

    def hops(self, kind: Kind, nbytes: int, shape: GroupShape) -> Sequence[Hop]:
        """The hops of a collective, one after the other ([Note: Seconds of a collective]); none for one rank.

        Args:
            nbytes: of one rank's input of a reduce-scatter, an all-reduce, an all-to-all or a shift to the next rank,
                and of one rank's output of an all-gather.
        """
        if kind == "ring_shift":
            return self._shift(nbytes, shape)
        if kind == "all_to_all":
            return self._pairs(nbytes, shape)
        inside, between = GroupShape(1, shape.per_node), GroupShape(shape.num_nodes, 1)
        hops = [*self._ring(nbytes, inside), *self._ring(nbytes / shape.per_node, between)]
        return [*hops, *reversed(hops)] if kind == "all_reduce" else hops

    def seconds(self, kind: Kind, nbytes: int, shape: GroupShape) -> float:
        """Seconds of a collective that has the links for itself."""
        return sum(hop.latency + hop.seconds for hop in self.hops(kind, nbytes, shape))

    def _ring(self, nbytes: float, shape: GroupShape) -> list[Hop]:
        """A ring of ranks of one node, or of one rank of each node; nothing for one rank."""
        rounds = shape.size - 1
        if not rounds:
            return []
        sent = nbytes * rounds / shape.size
        if shape.num_nodes == 1:
            return [Hop("rank", rounds * self._latencies.rank, sent / self._rank_rate)]
        return [Hop("node", rounds * self._latencies.node, sent / self._node_rate)]

    def _shift(self, nbytes: float, shape: GroupShape) -> list[Hop]:
        """One round in which every rank sends all to the next one, on another node where that is the slowest."""
        if shape.size == 1:
            return []
        if shape.num_nodes == 1:
            return [Hop("rank", self._latencies.rank, nbytes / self._rank_rate)]
        return [Hop("node", self._latencies.node, nbytes / self._node_rate)]

    def _pairs(self, nbytes: float, shape: GroupShape) -> list[Hop]:
        size, inside = shape.size, shape.per_node - 1
        outside = size - 1 - inside
        hops = [Hop("rank", inside * self._latencies.rank, nbytes * inside / size / self._rank_rate)] if inside else []
        if outside:
            hops.append(Hop("node", outside * self._latencies.node, nbytes * outside / size / self._node_rate))
        return hops
