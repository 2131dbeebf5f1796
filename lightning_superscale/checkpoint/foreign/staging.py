"""Writes a checkpoint into a directory beside its target, and moves it to the target once it is complete."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lightning_superscale.checkpoint.state import ReadRequest, StateSource, TensorKey
from lightning_superscale.checkpoint.storage.rename import rename_to_free
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A context that gives a directory to write in; the file or folder `target.name` in it becomes `target` at its end.

    The directory lies beside `target`, and is gone afterwards. An error in the context leaves nothing. One process
    calls it.

    Raises:
        CheckpointError: `target` exists already.
    """
    _check_free(target)
    # Its name must not contain the target's: a search for checkpoints by their names would find it.
    staging = target.parent / f".staging-{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    try:
        yield staging
        result = staging / target.name
        for folder, _, files in os.walk(result):
            for file in files:
                _sync(Path(folder, file))
            _sync(Path(folder))
        if result.is_file():
            _sync(result)
        try:
            rename_to_free(str(result), str(target))
        except FileExistsError:
            _check_free(target)
            raise
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_free(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already. Export to another path, or remove it first.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copies_on_disk(source: StateSource, keys: Iterable[TensorKey], folder: Path) -> dict[TensorKey, Tensor]:
    """Copies of tensors, each mapped from a file of its own in `folder`, so that the kernel may take its memory back.

    Args:
        source: the state; it is read by this process alone.
        keys: the tensors.
        folder: directory to make for the files.

    Returns:
        The unsharded tensors by key, each of its shape and dtype. They are valid while the files are mapped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[TensorKey, Tensor] = {}
    for number, key in enumerate(keys):
        info = source.tensors[key]
        numel = torch.Size(info.shape).numel()
        flat = (
            torch.from_file(str(folder / str(number)), shared=True, size=numel, dtype=info.dtype)
            if numel
            else torch.empty(0, dtype=info.dtype)
        )
        found[key] = flat.view(info.shape)
        source.read([ReadRequest(key, whole_box(info.shape), found[key])])
    return found


def read_tensor(source: StateSource, key: TensorKey, dtype: torch.dtype | None = None) -> Tensor:
    """An unsharded tensor in host memory, of its own dtype, or converted to `dtype`."""
    info = source.tensors[key]
    tensor = torch.empty(info.shape, dtype=dtype or info.dtype)
    source.read([ReadRequest(key, whole_box(info.shape), tensor)])
    return tensor
