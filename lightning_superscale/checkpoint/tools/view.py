"""Opens checkpoints of any format, ours or foreign, for one process that reads alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_superscale.checkpoint.foreign.lightning import Names
from lightning_superscale.checkpoint.foreign.registry import open_foreign
from lightning_superscale.checkpoint.load.reader import is_checkpoint, open_checkpoint
from lightning_superscale.checkpoint.state import (
    MODEL,
    OptimizerRecord,
    ReadRequest,
    StateSource,
    TensorInfo,
    TensorKey,
)
from lightning_superscale.checkpoint.storage.files import is_remote, local_path
from lightning_superscale.checkpoint.storage.local import restore
from lightning_superscale.checkpoint.storage.remote import has_objects

# Entries that Lightning leaves out of a checkpoint that was saved with weights only.
_OF_TRAINING = ("callbacks", "lr_schedulers", "MixedPrecision", "NativeMixedPrecisionPlugin", "deepspeed")


def exists(path: str) -> bool:
    """Whether anything lies at a path, or at a URL and below it.

    A checkpoint that an interrupted replacement set aside is put back first.
    """
    if is_remote(path):
        return has_objects(path)
    restore(path)
    return os.path.lexists(local_path(path))


def open_state(path: str, names: Names | None = None) -> StateSource:
    """Open a checkpoint of any known format, for this process alone; no tensor's values are read.

    In our format, blocks are verified as they are read.

    Args:
        path: file, folder, or a URL that fsspec knows (our format only).
        names: names of each optimizer's parameters, in its order, for formats that number parameters.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged or incomplete, or of no known format.
    """
    if is_remote(path) or is_checkpoint(path):
        return open_checkpoint(path, check_first=False)
    return open_foreign(local_path(path), names)


@dataclass(slots=True)
class View:
    """A StateSource that shows another one, with or without its optimizers, and reports reads.

    Attributes:
        source: the state that is shown.
        is_weights_only: whether optimizers and all else that a Lightning checkpoint of weights only lacks are hidden.
        on_read: called after every read with its number of bytes, from the thread that reads.
    """

    source: StateSource
    is_weights_only: bool = False
    on_read: Callable[[int], None] | None = None
    _tensors: Mapping[TensorKey, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        found = self.source.tensors
        if self.is_weights_only:
            found = {key: info for key, info in found.items() if key.section == MODEL}
        self._tensors = found

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def step(self) -> int | None:
        return self.source.step

    @property
    def tensors(self) -> Mapping[TensorKey, TensorInfo]:
        return self._tensors

    @property
    def optimizers(self) -> tuple[OptimizerRecord, ...]:
        return () if self.is_weights_only else self.source.optimizers

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.source.aliases

    @property
    def rest(self) -> dict[str, Any]:
        hidden = _OF_TRAINING if self.is_weights_only else ()
        return {key: value for key, value in self.source.rest.items() if key not in hidden}

    def read(self, requests: Sequence[ReadRequest]) -> None:
        self.source.read(requests)
        if self.on_read is not None:
            self.on_read(sum(request.out.nbytes for request in requests))

    def close(self) -> None:
        self.source.close()
