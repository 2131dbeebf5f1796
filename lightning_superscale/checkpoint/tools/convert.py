"""Converts a checkpoint of any format to a universal one, slab by slab."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_superscale.checkpoint.save.writer import OwnItem, Values, check_place, prepare, with_values, write
from lightning_superscale.checkpoint.state import EXTRA, LocalShard, LocalState, ReadRequest, StateSource, TensorKey
from lightning_superscale.checkpoint.tools.chunks import slabs
from lightning_superscale.comm.mesh import single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box


def convert(source: StateSource, path: str) -> None:
    """Write `source` as a universal checkpoint at `path`, and replace one that is there. One process calls it.

    Memory stays at two slabs. An exception, also a KeyboardInterrupt, leaves `path` as it was and nothing beside it; an
    interrupt that arrives while the checkpoint takes its name comes too late, and the new checkpoint stays.

    Raises:
        CheckpointError: something else lies at `path` than a checkpoint, the source is damaged, its optimizers'
            parameters have no names, or the disk is full.
    """
    check_place(path, single_mesh())
    prepared = prepare(_described(source), single_mesh(), step=source.step)
    reading = _Reading(source)
    values = [one.values if one.item.key.section == EXTRA else reading.values(one) for one in prepared.own]
    # `write` has a thread of its own: an interrupt here stops the reading, and `write` cleans up once its threads end.
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint conversion") as writer:
        task = writer.submit(write, path, with_values(prepared, values), single_mesh())
        try:
            task.result()
        except BaseException:
            reading.is_stopped.set()
            raise


def _described(source: StateSource) -> LocalState:
    """The state, with shards on the meta device, one for each slab."""
    shards = {
        key: tuple(
            LocalShard(box, torch.empty(box.size, dtype=info.dtype, device="meta"))
            for box in slabs(info.shape, info.dtype.itemsize)
        )
        for key, info in source.tensors.items()
    }
    return LocalState(dict(source.tensors), shards, source.optimizers, dict(source.aliases), source.rest)


class _Reading:
    """Reads slabs for the writer's threads, one after the other."""

    def __init__(self, source: StateSource) -> None:
        self.is_stopped = threading.Event()
        self._source = source
        self._lock = threading.Lock()  # a source need not be thread-safe

    def values(self, one: OwnItem) -> Values:
        return _Slab(self, one.item.key, one.item.box)

    def read(self, key: TensorKey, box: Box) -> Tensor:
        with self._lock:
            if self.is_stopped.is_set():
                raise CheckpointError("it was interrupted.")
            tensor = torch.empty(box.size, dtype=self._source.tensors[key].dtype)
            self._source.read([ReadRequest(key, box, tensor)])
            return tensor


class _Slab:
    """Values of a slab, which are read when they are written."""

    def __init__(self, reading: _Reading, key: TensorKey, box: Box) -> None:
        self._reading = reading
        self._key = key
        self._box = box

    @contextmanager
    def use(self) -> Iterator[Tensor]:
        yield self._reading.read(self._key, self._box)
