"""Looking into folders and deleting from them, never through a link.

Everything is reached from an open folder, one name after the other, so that neither a link nor a folder that takes the
place of another meanwhile leads elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def opened(name: str, dir_fd: int | None = None) -> Iterator[int]:
    """A context with the descriptor of a folder that is no link.

    Args:
        name: path, or name within the folder `dir_fd`.

    Raises:
        OSError: there is no such folder, or it is a link.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened_below(descriptor: int, folder: str) -> Iterator[int]:
    """A context with the descriptor of a folder anywhere below another; "" is that folder itself.

    Raises:
        OSError: there is no such folder, or a part of its name is a link.
    """
    with contextlib.ExitStack() as stack:
        for name in filter(None, folder.split("/")):
            if name == "..":
                raise OSError(errno.EINVAL, "a name that leads upwards", folder)
            descriptor = stack.enter_context(opened(name, descriptor))
        yield descriptor


def is_folder(name: str, dir_fd: int) -> bool:
    """Whether a name within an open folder is a folder, and no link."""
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def entries(descriptor: int) -> Iterator[str]:
    """All that lies below an open folder: names of what is no folder, and of empty folders, which end with "/"."""
    for folder, folders, files, inner in os.fwalk(".", dir_fd=descriptor):
        where = folder[2:] + "/" if folder != "." else ""
        yield from (where + name for name in files)
        yield from (where + name for name in folders if not is_folder(name, inner))
        if where and not folders and not files:
            yield where


def read_plain_file(name: str, dir_fd: int, limit: int | None = None) -> bytes | None:
    """The content of a file, or its first `limit` bytes; None for what is missing, no plain file, or a link."""
    try:
        # O_NONBLOCK: the opening of a FIFO would wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def delete(descriptor: int, names: Iterable[str]) -> None:
    """Delete files below an open folder, in their order, and the folders that are empty then. Keeps what can't be.

    Args:
        names: names of files; those that end with "/" are folders, which are deleted if they are empty.
    """
    folders: set[str] = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        parts = folder.split("/") if folder else []
        folders.update("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        if last:
            with contextlib.suppress(OSError), opened_below(descriptor, folder) as inner:
                os.unlink(last, dir_fd=inner)
    for folder in sorted(folders, key=lambda one: one.count("/"), reverse=True):
        above, _, last = folder.rpartition("/")
        with contextlib.suppress(OSError), opened_below(descriptor, above) as inner:
            os.rmdir(last, dir_fd=inner)


def move_entries(source: int, target: int, kept: Collection[str] = ()) -> None:
    """Move what lies below one open folder to the same places below another; what has no free place there stays.

    Args:
        kept: names of files that are not moved.
    """
    for name in sorted(set(entries(source)) - set(kept)):
        folder, _, last = name.rstrip("/").rpartition("/")
        with contextlib.suppress(OSError):
            _make_folders(target, folder)
            with opened_below(source, folder) as old, opened_below(target, folder) as new:
                if not _exists(last, new):
                    os.rename(last, last, src_dir_fd=old, dst_dir_fd=new)


def _make_folders(descriptor: int, folder: str) -> None:
    parts = folder.split("/") if folder else []
    for count in range(len(parts)):
        with contextlib.suppress(FileExistsError), opened_below(descriptor, "/".join(parts[:count])) as inner:
            os.mkdir(parts[count], dir_fd=inner)


def _exists(name: str, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
