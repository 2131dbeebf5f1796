"""Collectives inside a model's forward, which autograd follows and torch.compile sees.

Every rank of the axis calls them in the same order, in forward and in backward. They are issued and awaited at once, in
the order in which the model needs them, and counted where Python issues them; those of a graph that torch compiles are
counted by who runs it (`traced`). Their order among other collectives is in [Note: One order per device] in mesh.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.comm.mesh import CollectiveCount, DataMesh, MeshAxis
from lightning_superscale.torch_private import (
    all_gather_in_graph,
    all_reduce_in_graph,
    all_to_all_in_graph,
    is_of_tracer,
    start_shift_in_graph,
    wait_in_graph,
)


@dataclass(frozen=True, slots=True)
class AxisLink:
    """What a model's forward needs to exchange tensors along one axis of the mesh.

    Attributes:
        axis: the ranks.
        counts: counts the collectives of this rank, in bytes of its inputs.
        wait_queued: returns when collectives that go before the next one are issued; None where order does not matter.
        has_ranks: whether there is a process group; without one, only tensors without values can be exchanged.
    """

    axis: MeshAxis
    counts: CollectiveCount = field(default_factory=CollectiveCount)
    wait_queued: Callable[[], None] | None = None
    has_ranks: bool = True

    @classmethod
    def along_sequence(cls, mesh: DataMesh) -> AxisLink:
        """The link along the sequence axis of a run's mesh."""
        is_ordered = mesh.sequence.size > 1 and not AxisCollectives(mesh.sequence, mesh).runs_on_host
        return cls(mesh.sequence, mesh.counts, mesh.wait_queued if is_ordered else None)

    @classmethod
    def without_ranks(cls, size: int) -> AxisLink:
        """The link of the first of `size` ranks that are not there, for a model on tensors without values."""
        return cls(MeshAxis("sequence", 0, size), has_ranks=False)

    @property
    def rank(self) -> int:
        """This rank's place on the axis."""
        return self.axis.rank

    @property
    def size(self) -> int:
        """The number of ranks on the axis."""
        return self.axis.size

    @property
    def group_name(self) -> str:
        """The name of the axis' process group."""
        if not self.has_ranks:
            return "none"
        if self.axis.group is None:
            raise AssertionError("an axis of one rank exchanges nothing")
        return self.axis.group.group_name

    def note(self, kind: str, x: Tensor) -> None:
        """Count a collective of x that is about to be issued, and let those go first that have to."""
        if torch.compiler.is_compiling():  # tracing may change nothing
            return
        if is_of_tracer(x):
            note_traced([(kind, x.nbytes)])
            return
        self.note_all([(kind, x.nbytes)])

    def note_all(self, collectives: Sequence[tuple[str, int]]) -> None:
        """Count collectives, kinds and bytes, that are about to be issued, and let those go first that have to."""
        for kind, nbytes in collectives:
            self.counts.add(kind, nbytes)
        if collectives and self.wait_queued is not None:
            self.wait_queued()

    @property
    def num_bytes_sent(self) -> int:
        """Bytes of all collectives so far, or while a compiler traces those that it met in the innermost `traced`."""
        return sum(self.counts.nbytes.values()) + sum(nbytes for _, nbytes in (_traced[-1] if _traced else ()))


_traced: list[list[tuple[str, int]]] = []


@contextmanager
def traced() -> Iterator[list[tuple[str, int]]]:
    """Gives the collectives, kinds and bytes, that a compiler meets while it is open and no other is open within it.

    A compiler issues none of them; whoever runs its graph counts them then.
    """
    _traced.append([])
    try:
        yield _traced[-1]
    finally:
        _traced.pop()


def note_traced(collectives: Sequence[tuple[str, int]]) -> None:
    """Add collectives, kinds and bytes, that a compiler met to those of the innermost `traced`."""
    if _traced:
        _traced[-1].extend(collectives)


@dataclass(frozen=True, slots=True)
class RingShift:
    """Tensors that are on their way to the next rank of an axis, while this rank gets those of the one before."""

    sent: Tensor
    _arriving: Tensor

    @classmethod
    def start(cls, x: Tensor, link: AxisLink) -> RingShift:
        """Begin to send x. Every rank of the axis calls it, with a tensor of the same shape."""
        link.note("ring_shift", x)
        sent = x.contiguous()
        return cls(sent, start_shift_in_graph(sent, link.group_name, link.size, link.rank))

    def wait(self) -> Tensor:
        """The tensor of the rank before."""
        return wait_in_graph(self._arriving).view(self.sent.shape)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: AxisLink) -> Tensor:
        ctx.link = link
        link.note("all_to_all", x)
        return all_to_all_in_graph(x.contiguous(), link.group_name, link.size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_to_all(grads[0], ctx.link), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: AxisLink) -> Tensor:
        ctx.link = link
        link.note("all_gather", x)
        return all_gather_in_graph(x.contiguous(), link.group_name, link.size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The gradient of a gather. Forward has no function for it: torch 2.11 compiles one without a gradient.
        return _ReduceScatter.apply(grads[0], ctx.link), None  # type: ignore[no-untyped-call]


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: AxisLink) -> Tensor:
        ctx.link = link
        # Each rank sums the shares that it gets in the order of ranks: bits that depend on the values alone, on gloo
        # too, and what crosses the wire is what a reduce-scatter sends.
        link.note("reduce_scatter", x)
        shares = all_to_all_in_graph(x.contiguous(), link.group_name, link.size)
        parts = shares.view(link.size, len(x) // link.size, *x.shape[1:])
        wide = torch.promote_types(x.dtype, torch.float32)
        return parts.sum(0, dtype=wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_gather(grads[0], ctx.link), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: AxisLink) -> Tensor:
        ctx.size = link.size
        link.note("all_reduce", x)
        return all_reduce_in_graph(x.contiguous(), link.group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.size, None


def all_to_all(x: Tensor, link: AxisLink) -> Tensor:
    """Exchange equal parts of dim 0: part r of the result is what rank r had for this one.

    Args:
        x: [size * n, ...] with the part for rank r from r * n on.
    """
    moved: Tensor = _AllToAll.apply(x, link)  # type: ignore[no-untyped-call]
    return moved


def all_gather(x: Tensor, link: AxisLink) -> Tensor:
    """All ranks' tensors, one after the other along dim 0. Backward gives each rank the sum of its gradients."""
    gathered: Tensor = _AllGather.apply(x, link)  # type: ignore[no-untyped-call]
    return gathered


def sum_over_ranks(x: Tensor, link: AxisLink) -> Tensor:
    """The sum over ranks, on every rank, of a loss whose gradients are averaged over the axis' ranks afterwards.

    Backward multiplies by the number of ranks, and asks no other rank: each has the same loss, so the same gradient of
    it, and the mean over ranks that follows divides by that number.
    """
    summed: Tensor = _SumOverRanks.apply(x, link)  # type: ignore[no-untyped-call]
    return summed
