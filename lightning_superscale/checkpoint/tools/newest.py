"""Finds the checkpoint that a run goes on from: the newest of a folder that is whole."""

from __future__ import annotations

import os
import warnings
from typing import Union

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from lightning_superscale.checkpoint.load.reader import check_sizes, is_checkpoint
from lightning_superscale.checkpoint.storage.files import is_remote, local_path, open_folder, remote_filesystem
from lightning_superscale.checkpoint.tools.verify import verify
from lightning_superscale.errors import CheckpointError

_SUFFIX = ".ckpt"


def last_checkpoint(folder: Union[str, os.PathLike[str]], *, reads_all: bool = True) -> str | None:
    """The newest universal checkpoint in a folder that is whole, for `trainer.fit(model, ckpt_path=...)`.

    The same command then starts a run and goes on with it, at any number of ranks. The newest is that of the most
    steps, and of several the one that was written last. What a crash left of a save is no checkpoint. Any process may
    call it, with or without ranks; all ranks find the same one as long as nothing is saved.

    Args:
        folder: path or URL of the folder that checkpoints lie in, as ModelCheckpoint's `dirpath`.
        reads_all: check every byte against the checksums, which takes as long as loading; otherwise the manifests and
            the sizes of files.

    Returns:
        The checkpoint's path, or None where there is none, or no such folder.

    Warns:
        UserWarning: a damaged checkpoint, or one of another format, is passed over; names it.
    """
    found = []
    for path in _paths_in(str(folder)):
        if is_checkpoint(path):
            step = _step_of(path)
            if step is None:  # it may be the newest
                _pass_over(path, f"its {MANIFEST_NAME} can't be read")
            else:
                found.append((step, _written_at(path), path))
        elif path.endswith(_SUFFIX):
            _pass_over(path, "it is no universal checkpoint, as UniversalCheckpointIO writes them")
    for _, _, path in sorted(found, reverse=True):
        problem = _problem(path, reads_all=reads_all)
        if problem is None:
            return path
        _pass_over(path, problem)
    return None


def _paths_in(folder: str) -> list[str]:
    if is_remote(folder):
        filesystem, place = remote_filesystem(folder)
        names = [str(path).rstrip("/").rpartition("/")[2] for path in filesystem.ls(place, detail=False)]
        return [f"{folder.rstrip('/')}/{name}" for name in sorted(names) if not name.startswith(".")]
    folder = local_path(folder)
    if not os.path.isdir(folder):
        return []
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]


def _step_of(path: str) -> int | None:
    """The number of steps before a checkpoint; 0 where it does not say, None where it can't be read."""
    try:
        return _manifest_of(path).step or 0
    except CheckpointError:
        return None


def _manifest_of(path: str) -> Manifest:
    source = open_folder(path)
    try:
        return Manifest.from_bytes(source.read(MANIFEST_NAME), MANIFEST_NAME)
    finally:
        source.close()


def _written_at(path: str) -> float:
    return 0.0 if is_remote(path) else os.stat(os.path.join(path, MANIFEST_NAME)).st_mtime


def _problem(path: str, *, reads_all: bool) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    if reads_all:
        findings = verify(path)
        return None if not findings else f"{findings[0]}" + (", and more" if len(findings) > 1 else "")
    manifest = _manifest_of(path)
    source = open_folder(path, manifest.root)
    try:
        check_sizes(source, manifest)
    except CheckpointError as error:
        return str(error)
    finally:
        source.close()
    return None


def _pass_over(path: str, problem: str) -> None:
    warnings.warn(f"the checkpoint {path} is passed over: {problem}", stacklevel=3)
