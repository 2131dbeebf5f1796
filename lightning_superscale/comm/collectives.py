"""Issues collectives, as no other file does but in_graph.py. All are counted; every reduction has a fixed order.

[Note: Reductions on gloo] gloo's reduce-scatter is an all-reduce that throws most of its result away, and
its order of summation depends on the place of an element. Here ranks exchange their shares directly and each
sums the shares that it received in rank order: half the bytes, and bits that depend on the ranks' values alone.
16-bit values are summed in fp32 and rounded once.

[Note: Copies on gloo] On gloo a copy costs as much as the wire. So a rank's own share of a reduce-scatter stays where
it was packed, and an all-gather of rows sends each from the memory that it was computed in to the memory that it is
read from. Only small rows are packed: a message of their own would cost more than copying them.

Complex values travel as pairs of real ones, which every backend knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.mesh import GATHER_AXIS, DataMesh, MeshAxis
from lightning_superscale.comm.watch import RankWatch
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.ops.events import Done, Event, has_streams
from lightning_superscale.torch_private import AsyncCollectiveTensor, copy_all

# The interval in which a rank that waits looks whether another one failed.
_LOOK_EVERY = timedelta(seconds=0.1)
# Rows of at least this many elements travel by themselves.
_OWN_MESSAGE_NUMEL = 2**15

# torch 2.13 gave this collective a new name and warns at the old one.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _wait(works: list[Any], watch: RankWatch | None, what: str, *, can_look: bool = True) -> None:
    """Wait for works, and give up when another rank failed ([Note: Waiting for other ranks] in watch.py).

    Args:
        watch: None waits without giving up.
        what: names the works in errors.
        can_look: whether a wait may run out of time. gloo's sends and receives break their connection then.
    """
    if watch is None:
        for work in works:
            work.wait()
        return
    with watch.waiting(what):
        for work in works if can_look else ():
            while not work.is_completed():
                watch.raise_if_failed()
                with contextlib.suppress(RuntimeError):  # out of time, or a failure that the last wait raises again
                    work.wait(_LOOK_EVERY)
        watch.raise_if_failed()
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise watch.explain(error) from error


class InFlight:
    """The event of collectives that were issued, and of the work that makes their result. Satisfies `ops.events.Event`.

    It is complete when torch's works are, which gloo's sends and receives report only after `wait`. With NCCL it is
    waitable from the start, because waiting orders streams; with gloo, when it is complete.

    Args:
        works: torch's handles of the collectives.
        finish: makes the result, once the works are waited for.
        watch: reports ranks that failed while this one blocks; None where waiting does not block.
        what: names the collectives in errors.
        can_look: whether a wait for a work may run out of time and be repeated.
        orders_streams: whether waiting for a work orders streams and does not block.
    """

    def __init__(
        self,
        works: list[Any],
        finish: Callable[[], Tensor],
        watch: RankWatch | None,
        what: str,
        *,
        can_look: bool,
        orders_streams: bool,
    ) -> None:
        self._works = works
        self._finish = finish
        self._watch = watch
        self._what = what
        self._can_look = can_look
        self._orders_streams = orders_streams
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            _wait(self._works, self._watch, self._what, can_look=self._can_look)
            if not self._orders_streams:
                self._works = []
            self._result = self._finish()
        return self._result

    def synchronize(self) -> None:
        result = self.wait()
        if has_streams(result.device):
            torch.cuda.current_stream(result.device).synchronize()

    def is_waitable(self) -> bool:
        return self._orders_streams or self.is_complete()

    def is_complete(self) -> bool:
        return all(work.is_completed() for work in self._works)


class AxisCollectives:
    """Collectives along one mesh axis. Every rank of the axis calls each, in the same order."""

    def __init__(self, axis: MeshAxis, mesh: DataMesh) -> None:
        self.axis = axis
        self._counts = mesh.counts
        self._memory = mesh.memory
        self._wait_queued = mesh.wait_queued
        self._is_gloo = axis.group is not None and _backend_of(axis.group, mesh.device_type) == "gloo"
        # Waiting for NCCL orders streams and does not block, so there is nothing to watch.
        self._watch = mesh.watch if self._is_gloo else None
        self._exchanges = 0

    @property
    def runs_on_host(self) -> bool:
        """Whether collectives run on the host, as gloo's do, where their wait blocks it."""
        return self._is_gloo

    def _begin(self) -> None:
        """Let gathers that another thread was given go first ([Note: One order per device] in mesh.py)."""
        if not self._is_gloo and self.axis.name != GATHER_AXIS:
            self._wait_queued()

    def reduce_scatter(self, packed: Tensor) -> Event[Tensor]:
        """Sum `packed` [size, n] over ranks; the result is row `rank` of the sum, [n], of the same dtype.

        No other code may read or write `packed` afterwards: the result may be a part of it.
        """
        if self.axis.size == 1:
            return Done(packed[0])
        self._counts.add("reduce_scatter", packed.nbytes)
        is_complex, packed = packed.is_complex(), _as_real(packed)
        if not self._is_gloo:
            self._begin()
            out = packed.new_empty(packed.shape[1])
            work = dist.reduce_scatter_tensor(out, packed.view(-1), group=self.axis.group, async_op=True)
            return self._in_flight([work], lambda: _as_complex(out) if is_complex else out, "reduce-scatter")
        size, rank = self.axis.size, self.axis.rank
        # Leave this rank's own row out, where the others lie in one piece ([Note: Copies on gloo]).
        first, last = (1, size) if rank == 0 else (0, size - 1) if rank == size - 1 else (0, size)
        sent = packed[first:last]
        splits = [packed.shape[1] if first <= row < last else 0 for row in range(size)]
        received = self._memory.empty(*sent.shape, dtype=packed.dtype, device=packed.device)
        work = dist.all_to_all_single(
            received.view(-1), sent.view(-1), splits, splits, group=self.axis.group, async_op=True
        )
        rows = [received[row - first] if first <= row < last else packed[row] for row in range(size)]

        def finish() -> Tensor:
            total = _sum_of_rows(rows, received[0], self._memory)
            return _as_complex(total) if is_complex else total

        return self._in_flight([work], finish, "reduce-scatter")

    def all_reduce(self, tensor: Tensor) -> Event[Tensor]:
        """Sum `tensor` over ranks, in place; the result is `tensor`."""
        if self.axis.size == 1:
            return Done(tensor)
        self._counts.add("all_reduce", tensor.nbytes)
        self._begin()
        work = dist.all_reduce(_as_real(tensor), group=self.axis.group, async_op=True)
        return self._in_flight([work], lambda: tensor, "all-reduce")

    def all_gather(self, packed: Tensor, *, is_polled: bool = False) -> Event[Tensor]:
        """Fill every row of `packed` [size, n] with its rank's row; this rank's own row is there already.

        Args:
            is_polled: whether `is_complete()` has to become true before `wait()`, as it does not for gloo's sends and
                receives.
        """
        if self.axis.size == 1:
            return Done(packed)
        self._counts.add("all_gather", packed[0].nbytes)
        real = _as_real(packed)
        if is_polled or not self._is_gloo:
            self._begin()
            own = real[self.axis.rank]
            work = _ALL_GATHER(real.view(-1), own, group=self.axis.group, async_op=True)
            return self._in_flight([work], lambda: packed, "all-gather")
        works = self._exchange([[row] for row in real])
        return self._in_flight(works, lambda: packed, "all-gather", can_look=False)

    @property
    def gathers_rows(self) -> bool:
        """Whether `all_gather_rows` works on this axis: its group is one of gloo."""
        return self._is_gloo

    def all_gather_rows(self, rows: Sequence[Sequence[Tensor]]) -> Event[Tensor]:
        """Fill the tensors `rows[r]` of every other rank r with that rank's own `rows[r]`.

        Args:
            rows: by rank, contiguous tensors of one dtype, of the same shapes on every rank. Until the result is there,
                no code may read or write those of other ranks, or write this rank's own.
        """
        rows = [[_as_real(row) for row in those] for those in rows]
        own = rows[self.axis.rank]
        self._counts.add("all_gather", sum(row.nbytes for row in own))
        large = [[row for row in those if row.numel() >= _OWN_MESSAGE_NUMEL] for those in rows]
        small = [[row for row in those if 0 < row.numel() < _OWN_MESSAGE_NUMEL] for those in rows]
        packed = []
        for rank, those in enumerate(small):
            if rank == self.axis.rank and those:
                packed.append(torch.cat(those))
            else:
                packed.append(torch.empty(sum(map(torch.numel, those)), dtype=own[0].dtype, device=own[0].device))

        def finish() -> Tensor:
            for rank, those in enumerate(small):
                if rank != self.axis.rank and those:
                    copy_all(those, torch.split(packed[rank], [row.numel() for row in those]))
            return packed[self.axis.rank]

        sent = [[flat, *those] if flat.numel() else those for flat, those in zip(packed, large, strict=True)]
        return self._in_flight(self._exchange(sent), finish, "all-gather", can_look=False)

    def _in_flight(
        self, works: list[Any], finish: Callable[[], Tensor], kind: str, *, can_look: bool = True
    ) -> InFlight:
        what = f"{kind} over the {self.axis.name} axis"
        return InFlight(works, finish, self._watch, what, can_look=can_look, orders_streams=not self._is_gloo)

    def _exchange(self, rows: Sequence[Sequence[Tensor]]) -> list[Any]:
        """Send this rank's tensors to every other rank and receive theirs in place; returns torch's works."""
        group, rank = self.axis.group, self.axis.rank
        self._exchanges += 1
        works = []
        for peer in range(self.axis.size):
            if peer != rank:
                there = dist.get_global_rank(group, peer) if group is not None else peer
                works += [dist.irecv(row, there, group=group, tag=self._exchanges) for row in rows[peer]]
                works += [dist.isend(row, there, group=group, tag=self._exchanges) for row in rows[rank]]
        return works

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with that of the axis' first rank, in place. Blocks on gloo."""
        if self.axis.size == 1:
            return
        self._counts.add("broadcast", tensor.nbytes)
        self._begin()
        tensor = _as_real(tensor)
        source = 0 if self.axis.group is None else dist.get_global_rank(self.axis.group, 0)
        if not has_streams(tensor.device) and not self._is_gloo:  # NCCL knows device memory only
            staged = tensor.to(torch.device("cuda", torch.cuda.current_device()))
            dist.broadcast(staged, source, group=self.axis.group)
            tensor.copy_(staged)
            return
        dist.broadcast(tensor, source, group=self.axis.group)


def _backend_of(group: dist.ProcessGroup, device_type: str) -> str | None:
    """The backend that moves a group's tensors on a type of device; None where it has none.

    A group may have a backend for each, as in "cpu:gloo,cuda:nccl".
    """
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends.get(device_type)


def _as_real(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor without complex numbers: its last dimension is twice as long, if it has any."""
    return torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor


def _as_complex(tensor: Tensor) -> Tensor:
    """The view of which `_as_real` made `tensor`."""
    return torch.view_as_complex(tensor.view(*tensor.shape[:-1], -1, 2))


def _sum_of_rows(rows: Sequence[Tensor], scratch: Tensor, memory: RecycledMemory) -> Tensor:
    """The sum of rows in their order, rounded once.

    Args:
        scratch: one of the received rows, which takes the sum of two rows of a wide dtype.
        memory: allocates the sum otherwise.
    """
    first, dtype = rows[0], rows[0].dtype
    is_wide = dtype in (torch.float32, torch.float64)
    total = scratch
    if not is_wide or len(rows) > 2:
        total = memory.empty(first.numel(), dtype=dtype if is_wide else torch.float32, device=first.device)
    if is_wide:
        torch.add(first, rows[1], out=total)
    else:
        total.copy_(first).add_(rows[1])
    for row in rows[2:]:
        total.add_(row)
    return total if is_wide else memory.empty(first.numel(), dtype=dtype, device=first.device).copy_(total)


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """This rank's gradient of a parameter, placed as the parameter is where that is a DTensor.

    A gradient may lack the sum over the tensor axis (Partial), or be cut otherwise than its parameter: then this issues
    a collective, and every rank of the axis calls it at the same point of its backward.
    """
    if not isinstance(grad, DTensor) or not isinstance(param, DTensor):
        return grad.detach()
    with torch.no_grad():
        if grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        local: Tensor = grad.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local.detach()


def control_max(mesh: DataMesh, values: Tensor, what: str) -> Tensor:
    """Elementwise maximum of host tensors over all ranks, in place. Every rank calls it; blocks.

    Args:
        what: names it in errors, while this rank waits.

    Raises:
        RankFailure: another rank failed.
    """
    if mesh.control is not None:
        mesh.counts.add("control", values.nbytes)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=mesh.control, async_op=True)
        _wait([work], mesh.watch, what)
    return values


def control_sum(mesh: DataMesh, values: Tensor, what: str) -> Tensor:
    """Elementwise sum of host tensors over all ranks, in place. Every rank calls it; blocks.

    Args:
        what: names it in errors, while this rank waits.

    Raises:
        RankFailure: another rank failed.
    """
    if mesh.control is not None:
        mesh.counts.add("control", values.nbytes)
        _wait([dist.all_reduce(values, group=mesh.control, async_op=True)], mesh.watch, what)
    return values


def gather_objects(mesh: DataMesh, value: object) -> list[Any]:
    """Every rank's `value`, by world rank. Every rank calls it; blocks. Values are pickled: ranks trust each other."""
    if mesh.control is None:
        return [value]
    mesh.counts.check_origin()
    gathered: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(gathered, value, group=mesh.control)
    return gathered


def exchange(
    mesh: DataMesh,
    sent: Sequence[tuple[Tensor, Sequence[int]]],
    received: Sequence[tuple[Tensor, int]],
    what: str,
) -> None:
    """Send host tensors to some ranks and fill others from some ranks, over the control group; blocks.

    Two ranks must list the tensors between them in one order, in which they are sent and received.

    Args:
        sent: contiguous tensors, each with the world ranks that receive it.
        received: contiguous tensors to fill, each with the world rank that sends it.
        what: names the exchange in errors, while this rank waits.

    Raises:
        RankFailure: another rank failed.
    """
    if mesh.control is None:
        return
    mesh.counts.add("exchange", sum(tensor.nbytes * len(ranks) for tensor, ranks in sent))
    works: list[Any] = [dist.irecv(tensor, rank, group=mesh.control) for tensor, rank in received]
    works += [dist.isend(tensor, rank, group=mesh.control) for tensor, ranks in sent for rank in ranks]
    _wait(works, mesh.watch, what, can_look=False)
