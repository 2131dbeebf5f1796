"""Files of a checkpoint, on local file systems and on those that fsspec reaches: written once, read in parts.

Every call that changes a local disk is a plain function of `os`, looked up when it is called, so that tests can count
them and stop a process at any one.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Protocol

import fsspec

from lightning_superscale.errors import CheckpointError

# The most buffers that one system call fills.
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")


class FileWriter(Protocol):
    """A new file that is written front to back."""

    def write(self, data: memoryview) -> None:
        """Append bytes; `data` is flat and of itemsize 1."""

    def close(self) -> None:
        """End the file, and make it durable."""


class Folder(Protocol):
    """The files of one checkpoint, for reading.

    Attributes:
        path: path or URL of the checkpoint, for messages.
    """

    path: str

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where the folder has no such file."""

    def names(self) -> set[str]:
        """Names of all files in the folder and below it, relative to it."""

    def read(self, name: str) -> bytes:
        """The entire content of a file.

        Raises:
            CheckpointError: the file can't be read.
        """

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """Fill buffers, one after the other, with a file's bytes from `start` on.

        Args:
            outs: writable buffers, flat and of itemsize 1.

        Raises:
            CheckpointError: the file can't be read, or ends before the buffers are full.
        """

    def close(self) -> None:
        """End the use of the folder; nothing can be read after it."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec. "local://" is this machine's file system through fsspec."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """The absolute path of a local path or "file://" URL; "~" is expanded."""
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def open_folder(path: str, root: str = "") -> Folder:
    """The folder of a checkpoint's files, local or remote.

    Args:
        path: path or URL of the checkpoint.
        root: folder within the checkpoint that holds the files; "" for the checkpoint's own.

    Raises:
        CheckpointError: there is no such local folder, or fsspec does not know the URL.
    """
    if is_remote(path):
        return RemoteFolder(path, root)
    return LocalFolder(path, root)


class LocalFile:
    """A FileWriter for a new file on this machine's file systems.

    Raises:
        OSError: the file exists, or can't be written; names the path.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: memoryview) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._give_up(error)
        os.close(self._descriptor)

    def _give_up(self, error: OSError) -> None:
        os.close(self._descriptor)
        raise OSError(error.errno, os.strerror(error.errno or 0), self._path) from error


def write_file(path: str, data: bytes) -> None:
    """Write a new, durable file. Its name is durable only after `sync_folder` of its folder.

    Raises:
        OSError: the file exists, or can't be written.
    """
    file = LocalFile(path)
    file.write(memoryview(data))
    file.close()


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems can't do it
            raise
    finally:
        os.close(descriptor)


class LocalFolder:
    """A Folder on this machine's file systems.

    It keeps the folder itself open, so that reads stay with it when another folder takes its name.

    Raises:
        CheckpointError: there is no such folder.
    """

    def __init__(self, path: str, root: str = "") -> None:
        self.path = path
        try:
            self._descriptor: int | None = os.open(
                os.path.join(local_path(path), root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
        except OSError as error:
            raise CheckpointError(f"{path} is no checkpoint folder: {error.strerror}.") from error

    def _opened(self) -> int:
        if self._descriptor is None:
            raise CheckpointError(f"{self.path} was closed; open it again.")
        return self._descriptor

    def size(self, name: str) -> int | None:
        try:
            return os.stat(name, dir_fd=self._opened()).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self) -> set[str]:
        found = set()
        for folder, _, files, _ in os.fwalk(".", dir_fd=self._opened()):
            found |= {os.path.normpath(os.path.join(folder, file)) for file in files}
        return found

    def read(self, name: str) -> bytes:
        size = self.size(name)
        data = bytearray(size or 0)
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        descriptor = self._opened()
        left = [out for out in outs if out]
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=descriptor)
            try:
                while left:
                    count = os.preadv(file, left[:_MAX_BUFFERS], start)
                    if count == 0:
                        raise CheckpointError(f"{self.path}: {name} ends at byte {start}; it was cut off.")
                    start += count
                    while left and count >= len(left[0]):
                        count -= len(left.pop(0))
                    if count:
                        left[0] = left[0][count:]
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} can't be read: {error.strerror}.") from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()


def remote_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it.

    Raises:
        CheckpointError: fsspec does not know the URL's protocol, or lacks a package for it.
    """
    try:
        if path.startswith("local://"):
            return fsspec.filesystem("local", auto_mkdir=True), os.path.abspath(path.removeprefix("local://"))
        filesystem, plain = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{path} can't be reached through fsspec: {error}") from error
    return filesystem, plain.rstrip("/")


class RemoteFile:
    """A FileWriter for a new object, which is uploaded as it is written and exists once it is closed."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._file = filesystem.open(path, "wb")

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._file.close()


class RemoteFolder:
    """A Folder of the objects under a common prefix."""

    def __init__(self, path: str, root: str = "") -> None:
        self.path = path
        self._filesystem, prefix = remote_filesystem(path)
        self._prefix = f"{prefix}/{root}" if root else prefix

    def size(self, name: str) -> int | None:
        try:
            return int(self._filesystem.info(f"{self._prefix}/{name}")["size"])
        except FileNotFoundError:
            return None

    def names(self) -> set[str]:
        start = len(self._prefix.lstrip("/")) + 1
        return {found.lstrip("/")[start:] for found in self._filesystem.find(self._prefix)}

    def read(self, name: str) -> bytes:
        try:
            return bytes(self._filesystem.cat_file(f"{self._prefix}/{name}"))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} can't be read: {error}") from error

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        size = sum(map(len, outs))
        try:
            data = memoryview(self._filesystem.cat_file(f"{self._prefix}/{name}", start=start, end=start + size))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} can't be read: {error}") from error
        if len(data) != size:
            raise CheckpointError(f"{self.path}: {name} ends at byte {start + len(data)}; it was cut off.")
        for out in outs:
            out[:], data = data[: len(out)], data[len(out) :]

    def close(self) -> None:
        return
