"""Files of this user in places that others may reach: a cache in a shared home, or a folder under /tmp.

What is read back from a cache decides how a run computes, and a library from it is run. So it is taken only if it is
ours: a regular file of this user or of root, which nobody else can write, in a folder of the same kind. Everything is
checked on open descriptors, so that nothing can be exchanged between the check and the use.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "lightning_superscale"
_WRITABLE_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotOwnError(OSError):
    """A file or folder that somebody else owns or can write, or that is no plain file; names it and what was found."""


def private_folder() -> Path:
    """The folder of this user under the system's folder for temporary files, whether it exists or not."""
    return Path(tempfile.gettempdir()) / f"{NAME}-{os.geteuid()}"


def user_cache() -> Path:
    """The user's cache folder of this package, for files that it can make again, whether it exists or not.

    It is that of XDG_CACHE_HOME if set, else that of the home; a private folder under /tmp stands in for a home that
    can't be used.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / NAME
    try:
        folder = Path.home() / ".cache" / NAME
    except RuntimeError:  # a user without a home, as containers have them
        return private_folder()
    return folder if _can_be_own(folder) else private_folder()


def _can_be_own(folder: Path) -> bool:
    try:
        with own_folder(folder):
            return True
    except FileNotFoundError:
        pass
    except OSError:
        return False
    existing = next(parent for parent in folder.parents if os.path.lexists(parent))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _check_own(found: os.stat_result, path: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise NotOwnError(f"{path} belongs to user {found.st_uid}, expected user {os.geteuid()} or root")
    if found.st_mode & _WRITABLE_TO_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        raise NotOwnError(f"{path} can be written by others (mode {mode:o}): run chmod go-w on it")


@contextmanager
def own_folder(folder: Path) -> Iterator[int]:
    """A context that gives a descriptor of a folder of this user.

    Raises:
        NotOwnError: somebody else owns it, or a link to it, or can write in it.
        OSError: there is no such folder, or it can't be read.
    """
    if stat.S_ISLNK((link := os.lstat(folder)).st_mode) and link.st_uid not in (os.geteuid(), 0):
        raise NotOwnError(f"{folder} is a link that belongs to user {link.st_uid}")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_own(os.fstat(descriptor), str(folder))
        yield descriptor
    finally:
        os.close(descriptor)


def make_own_folder(folder: Path) -> None:
    """Make a folder that only this user can write, or close one of this user's to others.

    Raises:
        OSError: it can't be made, or somebody else owns it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            # What others put there before is theirs, and is refused file by file.
            if found.st_uid == os.geteuid() and found.st_mode & _WRITABLE_TO_OTHERS:
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & ~_WRITABLE_TO_OTHERS)
        finally:
            os.close(descriptor)
    with own_folder(folder):
        pass


@contextmanager
def own_file(path: Path) -> Iterator[int]:
    """A context that gives a descriptor of a regular file of this user, opened for reading without following links.

    Raises:
        NotOwnError: it is a link, a pipe, a device or a folder, or somebody else owns it or can write it or its folder.
        OSError: there is no such file, or it can't be read.
    """
    with own_folder(path.parent) as folder:
        if stat.S_ISLNK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise NotOwnError(f"{path} is a link, expected a file")
        # A pipe without a writer would block, and some devices act when they are opened.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotOwnError(f"{path} is no regular file")
        _check_own(found, str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def read_own_file(path: Path, most_bytes: int) -> bytes:
    """The content of a small file of this user.

    Raises:
        NotOwnError: as `own_file` does, or it is larger than `most_bytes`.
        OSError: there is no such file, or it can't be read.
    """
    with own_file(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise NotOwnError(f"{path} is larger than {most_bytes} bytes, which is no file of this package")
    return content
