"""How a checkpoint appears in an object store, where nothing can be renamed.

The files of a save go under a prefix of their own, `<path>/<uuid>/`, which is written once. The manifest at
`<path>/MANIFEST.json` names that prefix and is written last, in one put: before it the earlier checkpoint loads, after
it the new one. Then all other prefixes are deleted, with those of saves that died.
"""

from __future__ import annotations

import contextlib
from typing import Any

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.storage.files import FileWriter, RemoteFile, remote_filesystem


class RemoteTarget:
    """A Target that is a prefix in an object store, or on another file system that fsspec reaches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = ""
        self._filesystem, self._prefix = remote_filesystem(path)

    def begin(self, uuid: str, nbytes: int) -> None:
        self.root = uuid  # an object store can't tell its free space and has no folders to make

    def join(self, uuid: str) -> None:
        self.root = uuid

    def create(self, name: str) -> FileWriter:
        return RemoteFile(self._filesystem, f"{self._prefix}/{self.root}/{name}")

    def seal(self) -> None:
        return  # a closed object is durable

    def publish(self, manifest: bytes) -> None:
        self._filesystem.pipe_file(f"{self._prefix}/{MANIFEST_NAME}", manifest)
        with contextlib.suppress(OSError):  # the next save deletes what is left
            self._delete_others()

    def _delete_others(self) -> None:
        if self._filesystem.isfile(self._prefix):
            self._filesystem.rm_file(self._prefix)
        for found in self._filesystem.ls(self._prefix, detail=False):
            if found.rstrip("/").rsplit("/", 1)[-1] not in (self.root, MANIFEST_NAME):
                _delete(self._filesystem, found)

    def abort(self) -> None:
        if self.root:
            _delete(self._filesystem, f"{self._prefix}/{self.root}")


def remove_remote(path: str) -> None:
    """Delete a checkpoint at a URL, its manifest first, so that no reader takes the rest for a checkpoint."""
    filesystem, prefix = remote_filesystem(path)
    _delete(filesystem, f"{prefix}/{MANIFEST_NAME}")
    _delete(filesystem, prefix)


def _delete(filesystem: Any, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)
