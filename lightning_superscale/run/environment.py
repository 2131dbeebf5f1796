"""The mesh and the watch of one strategy: made once its process group is, and kept between runs of its Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lightning_superscale.comm.mesh import DataMesh, build_mesh, check_shard_size, check_tensor_size, single_mesh
from lightning_superscale.comm.watch import RankWatch, open_store
from lightning_superscale.config import ZeroConfig
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder

# Of collectives; a rank that fails is heard of much sooner.
DEFAULT_TIMEOUT = timedelta(minutes=30)


def check_axes(zero: ZeroConfig, world_size: int) -> None:
    """Refuse mesh axes that do not divide the ranks.

    Raises:
        SuperScaleError: names the option, both numbers and the sizes that work.
    """
    check_tensor_size(zero.tensor_parallel, world_size)
    check_shard_size(zero.shard_size_of(world_size), world_size)


class RankEnvironment:
    """What one rank has of the others, from `open` to `close`; a mesh of one rank before and without.

    Attributes:
        order: compares the gathers of stage 3 between ranks.
    """

    def __init__(self) -> None:
        self.mesh: DataMesh = single_mesh()
        self.order: GatherOrder | None = None
        self._made_for: object = None

    def open(
        self, zero: ZeroConfig, host: str, broadcast: Callable[[Any], Any], timeout: timedelta, device_type: str
    ) -> None:
        """Make mesh and watch over the initialised process group. Every rank calls it.

        Args:
            host: where rank 0 runs.
            broadcast: sends rank 0's object to all.
            device_type: of the training devices.
        """
        if self.mesh.watch is not None:
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        check_axes(zero, world_size)
        own = open_store(0, world_size, host, 0, timeout) if rank == 0 else None
        port = broadcast(None if own is None else own.port)
        store = own if own is not None else open_store(rank, world_size, host, port, timeout)
        watch = RankWatch(store, rank, world_size)
        if self._made_for is dist.group.WORLD:
            self.mesh = replace(self.mesh, watch=watch)  # torch never gives groups back, so they are made once
        else:
            self.mesh = build_mesh(
                zero.shard_size_of(world_size),
                timeout,
                watch,
                tensor_size=zero.tensor_parallel,
                device_type=device_type,
            )
            self._made_for = dist.group.WORLD
        if zero.stage == 3:
            self.order = GatherOrder(PrefixStore("gathers", store), rank, world_size, watch=watch)

    def report(self, exception: BaseException) -> None:
        """Tell the other ranks that this one failed."""
        if self.mesh.watch is not None:
            self.mesh.watch.report(exception)

    def close(self) -> None:
        if self.mesh.watch is not None:
            self.mesh.watch.close()
            self.mesh = replace(self.mesh, watch=None)
