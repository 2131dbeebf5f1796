"""The mesh and the watch of one strategy: made once its process group exists, and kept between runs of its Trainer."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_superscale.comm.mesh import DataMesh, build_mesh, single_mesh
from lightning_superscale.comm.places import WeightNames
from lightning_superscale.comm.processes import this_process
from lightning_superscale.comm.watch import RANK_0, SILENCE_S, RankWatch, open_store
from lightning_superscale.config import SequenceConfig, ZeroConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.forks import Origin
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.zero.fsdp2.gather_order import GatherOrder

# How long collectives wait; the watch reports a rank that fails much sooner.
DEFAULT_TIMEOUT = timedelta(minutes=30)
# How long a rank may give no sign of life before the others end.
DEFAULT_PATIENCE = timedelta(seconds=SILENCE_S)

# How often this process connected to other ranks, which its launcher's store outlives.
_connections = itertools.count()


def mesh_spec_of(zero: ZeroConfig, sequence: SequenceConfig | None, world_size: int) -> MeshSpec:
    """The mesh axes that the configs ask for, over `world_size` ranks.

    Raises:
        SuperScaleError: an axis that does not divide the ranks: names the option, both numbers and the sizes that work.
    """
    if world_size % zero.tensor_parallel:
        raise SuperScaleError(
            f"ZeroConfig.tensor_parallel={zero.tensor_parallel} does not divide the {_ranks(world_size)} of the "
            f"Trainer. Use one of {_fitting(world_size)}, or other devices and num_nodes."
        )
    num_data, size = world_size // zero.tensor_parallel, 1 if sequence is None else sequence.size
    if num_data % size:
        left = f"that tensor_parallel={zero.tensor_parallel} leaves of {world_size}" if zero.tensor_parallel > 1 else ""
        raise SuperScaleError(
            f"SequenceConfig.size={size} does not divide the {_ranks(num_data)} {left or 'of the Trainer'}. "
            f"Use one of {_fitting(num_data)}, or other devices and num_nodes."
        )
    if zero.stage == 0:
        return MeshSpec(replicate=num_data // size, sequence=size, shards_states=False)
    shard = zero.shard_size or num_data
    if num_data % shard:
        raise SuperScaleError(
            f"ZeroConfig.shard_size={shard} does not divide the {num_data} data-parallel rank"
            f"{'s' if num_data > 1 else ''}. "
            f"Use one of {_fitting(num_data, size)}, or None to shard over all ranks."
        )
    if shard % size:
        raise SuperScaleError(
            f"ZeroConfig.shard_size={shard} counts the ranks that share a sequence, and is no multiple of "
            f"SequenceConfig.size={size}. Use one of {_fitting(num_data, size)}, or None to shard over all ranks."
        )
    return MeshSpec(replicate=num_data // shard, shard=shard // size, sequence=size, tensor=zero.tensor_parallel)


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _fitting(num_ranks: int, unit: int = 1) -> str:
    """The multiples of `unit` that divide a number of ranks."""
    return ", ".join(str(size) for size in range(unit, num_ranks + 1, unit) if num_ranks % size == 0)


class RankEnvironment:
    """One rank's connections to the others, from `open` to `close`.

    Attributes:
        mesh: the ranks; a mesh of one rank before `open`, or where it is never called.
        order: compares the gathers of stage 3 between ranks.
    """

    def __init__(self) -> None:
        self.mesh: DataMesh = single_mesh()
        self.order: GatherOrder | None = None
        self._made_for: object = None
        self._group_of_one: object = None
        self._origin = Origin(is_bound=False)

    def open_alone(self) -> None:
        """Make a process group of one rank, which code that runs under DDP finds there (a `DistributedSampler`).

        Its store is in this process, so that no port is opened, and it takes no memory of a device: gloo serves tensors
        of CUDA, too, and by one name torch knows the group's default. Where gloo finds no network interface there is
        none, and who needs one says so.
        """
        if dist.is_available() and dist.is_gloo_available() and not dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
                self._group_of_one = dist.group.WORLD
                self._origin = Origin()

    @contextmanager
    def connecting(
        self,
        meeting: Callable[[], tuple[str, int]],
        rank: int,
        world_size: int,
        timeout: timedelta,
        patience: timedelta,
    ) -> Iterator[None]:
        """A context in which the process group is made, and this environment opened: ranks watch each other from then.

        Does nothing where the process group exists. Every rank calls it.

        Args:
            meeting: gives host and port of the store through which ranks find each other, which may not be there yet.
            timeout: how long to wait for that store.
            patience: how long a rank may give no sign of life before the others end.

        Raises:
            RankFailure: another rank failed or died meanwhile.
        """
        if dist.is_initialized():
            yield
            return
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, port = meeting()
        prefix = f"lightning_superscale/watch/{attempt}/{next(_connections)}"
        is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        keeper = "the launcher" if is_launchers else RANK_0

        def connect() -> Store:
            store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
            return PrefixStore(prefix, store)

        watch = RankWatch(connect, rank, world_size, silence_s=patience.total_seconds(), keeper=keeper)
        try:
            if rank != 0 or is_launchers:  # otherwise rank 0 makes the store, in what follows
                watch.wait_until_known(timeout)
            yield
        except BaseException as error:
            watch.report(error)
            failure = watch.failure_behind(error)
            if failure is not None:
                raise failure from error
            raise
        finally:
            watch.close()

    def open(
        self,
        zero: ZeroConfig,
        sequence: SequenceConfig | None,
        host: str,
        broadcast: Callable[[Any], Any],
        timeout: timedelta,
        device_type: str,
        patience: timedelta = DEFAULT_PATIENCE,
    ) -> None:
        """Make mesh and watch over the initialised process group. Every rank calls it.

        Args:
            host: name or address of the machine where rank 0 runs.
            broadcast: sends rank 0's object to all ranks and returns it on each.
            timeout: how long collectives wait.
            device_type: type of the training devices, such as "cuda".
            patience: how long a rank may give no sign of life before the others end.

        Raises:
            SuperScaleError: a mesh axis that does not divide the ranks.
        """
        if self.mesh.watch is not None:
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        spec = mesh_spec_of(zero, sequence, world_size)
        own = open_store(0, world_size, host, 0, timeout) if rank == 0 else None
        # Rank 0 may be stopped, and its store with it, before others read from there which process it is.
        port, process = broadcast(None if own is None else (own.port, this_process()))
        store = own if own is not None else open_store(rank, world_size, host, port, timeout)
        watch = RankWatch(store, rank, world_size, silence_s=patience.total_seconds(), keeper_process=process)
        if self._made_for is dist.group.WORLD:
            self.mesh = replace(self.mesh, watch=watch)  # torch never frees process groups, so they are made once
        else:
            self.mesh = build_mesh(spec, timeout, watch, device_type=device_type, shards_weights=zero.stage == 3)
            self._made_for = dist.group.WORLD
        if zero.stage == 3:
            self.order = GatherOrder(PrefixStore("gathers", store), rank, world_size, watch=watch)

    def want_end(self) -> None:
        """Want all ranks to end after their present step. A rank may call it alone, also from a signal's handler."""
        if self.mesh.end.wanted_at is None:
            self.mesh.end.wanted_at = time.monotonic()

    def is_to_end(self, alone_after_s: float) -> bool:
        """Whether ranks agreed to end, or this one has wanted it for `alone_after_s`."""
        end = self.mesh.end
        return end.is_agreed or (end.wanted_at is not None and time.monotonic() - end.wanted_at >= alone_after_s)

    def name_weights(self, weights: WeightNames) -> None:
        """Let errors name sharded weights, which `weights` gives."""
        if self.mesh.watch is not None:
            self.mesh.watch.weights = weights

    def report(self, exception: BaseException) -> None:
        """Tell the other ranks that this one failed. The rank that failed calls it alone."""
        if self.mesh.watch is not None:
            self.mesh.watch.report(exception)

    def close(self) -> None:
        """End the watch over the other ranks, and the group of one rank if this made it. Every rank calls it."""
        if not self._origin.is_here:  # a group that is destroyed in a forked process waits for the parent's threads
            return
        if self._group_of_one is not None and self._group_of_one is dist.group.WORLD:
            dist.destroy_process_group()
        self._group_of_one = None
        if self.mesh.watch is not None:
            self.mesh.watch.close()
            self.mesh.end.clear()
            self.mesh = replace(self.mesh, watch=None)
