"""Folders in which a save or a removal works, beside its checkpoint ([Note: Commit] in local.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.storage.contents import (
    HEAD_BYTES,
    OWNER,
    Contents,
    contents_of_file,
    contents_of_folder,
    named_by_manifest,
    own_files,
)
from lightning_superscale.checkpoint.storage.files import sync_folder, write_file
from lightning_superscale.checkpoint.storage.owner import Owner, is_abandoned, lock, read_owner, this_process, unlock
from lightning_superscale.checkpoint.storage.trees import (
    delete,
    entries,
    is_folder,
    move_entries,
    opened,
    read_plain_file,
)
from lightning_superscale.errors import CheckpointError

STAGING, STORE = ".ucp-staging-", ".ucp-store"
CONTENT, LINK, REPLACED = "checkpoint", "link", "replaced"
_PROBES = ("probe-0/", "probe-1/")
# Times that a place is looked at while other processes change it.
_LOOKS = 50
# More time than passes between the two renames of a replacement where names can't be swapped.
_BETWEEN_RENAMES_S = 2.0
# Folders of a save that are made before anything is in them.
_FOLDERS = ("data/", "blocks/")


@dataclass(slots=True)
class Staging:
    """A staging folder of this process, which it has locked while it is open.

    Attributes:
        path: absolute path of the folder.
        target: name of the checkpoint, beside the folder; "" for a removal.
        is_published: whether the new checkpoint has its name, so that what it replaced is deleted and not taken back.
    """

    path: str
    target: str
    is_published: bool = False
    _lock: int | None = None

    def open(self) -> None:
        """Make the folder, lock it, and note its owner.

        Raises:
            OSError: it can't be made.
        """
        while not self._make():
            time.sleep(0.01)  # another process took it for one that was left, before it was locked

    def _make(self) -> bool:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        try:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            has_lock = lock(self._lock)
            if has_lock is False or not os.path.exists(self.path):
                self._unlock()
                return False
            owner = this_process(self.target, is_locked=has_lock is True)
            write_file(os.path.join(self.path, OWNER), owner.to_bytes())
        except BaseException:
            self.close()
            raise
        return True

    def _unlock(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
            os.close(self._lock)
            self._lock = None

    @property
    def now(self) -> float:
        """Time at which the folder was made, by the clock of its file system, in seconds since the epoch."""
        return os.stat(self.path).st_mtime

    def close(self) -> None:
        """Delete the folder with what is ours in it, after taking back a replacement that was not finished."""
        try:
            with contextlib.suppress(OSError), opened(self.path) as descriptor:
                clear(os.path.dirname(self.path), os.path.basename(self.path), descriptor, self)
        finally:
            self._unlock()


def clear(parent: str, name: str, descriptor: int, staging: Staging | None = None) -> None:
    """Delete an open staging folder: what is ours in it, and the stored folders that no link names any more.

    A checkpoint that it set aside and did not replace is put back first. What lies beside a checkpoint of ours that was
    replaced is moved to the new one.

    Args:
        parent: folder of the staging folder.
        name: name of the staging folder.
        descriptor: the staging folder itself.
        staging: it, where it is of this process; None for one that was abandoned.
    """
    owner = read_owner(descriptor)
    target = staging.target if staging is not None else owner.target if owner is not None else ""
    is_published = staging is not None and staging.is_published
    if not is_published and target and not put_back(parent, target, descriptor):
        return  # all that is left of the checkpoint is here
    path = os.path.join(parent, target) if target else ""
    if not _delete_stored(parent, name, descriptor, path):
        return  # what names the stored folders is still needed
    for part in (CONTENT, REPLACED):
        _delete_checkpoint(part, descriptor, path)
    # The owner's note goes last, so that a folder that is left when this process dies is known to be dead.
    delete(descriptor, (LINK, *_PROBES))
    if set(os.listdir(descriptor)) <= {OWNER}:
        delete(descriptor, [OWNER])
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(parent, name))


def put_back(parent: str, target: str, descriptor: int) -> bool:
    """Give a checkpoint that was set aside its name again, if nothing has the name.

    Returns:
        Whether nothing is set aside now that is missed at its place.
    """
    path = os.path.join(parent, target)
    if os.path.lexists(path) or not is_folder(REPLACED, descriptor):
        return True
    try:
        os.rename(REPLACED, path, src_dir_fd=descriptor)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        sync_folder(parent)
    return True


def _delete_checkpoint(part: str, folder: int, target: str) -> None:
    """Delete the files of a checkpoint in an open folder, and give what lies beside them to the path `target`."""
    if not is_folder(part, folder):
        if not contents_at(part, folder).why_not:
            delete(folder, [part])
        return
    with contextlib.suppress(OSError), opened(part, folder) as descriptor:
        manifest = read_plain_file(MANIFEST_NAME, descriptor)
        own = contents_at(part, folder).files or tuple(own_files(entries(descriptor), manifest))
        delete(descriptor, own[:-1])
        delete(descriptor, _FOLDERS)
        if target and named_by_manifest(manifest) is not None:
            _give_back(descriptor, target, {*own})
        # The manifest goes last: it tells what lies beside from what belongs to the checkpoint.
        delete(descriptor, own[-1:])
    with contextlib.suppress(OSError):
        os.rmdir(part, dir_fd=folder)


def _give_back(descriptor: int, target: str, own: set[str]) -> None:
    """Move what lies in an open folder, but for some files, to the checkpoint at `target`; makes it where none is."""
    if all(name in own for name in entries(descriptor)):
        return
    if not os.path.lexists(target):
        os.mkdir(target)
    elif contents_at(target).why_not:
        return
    with opened(os.path.realpath(target)) as beside:
        move_entries(descriptor, beside, own)
    delete(descriptor, [name for name in entries(descriptor) if name.endswith("/")])


def _delete_stored(parent: str, name: str, descriptor: int, target: str) -> bool:
    """Delete the folders in the store that belong to a staging folder, unless a link still names them.

    Returns:
        Whether they are gone.
    """
    stored = {name.removeprefix(STAGING)}
    for part in (CONTENT, REPLACED):
        with contextlib.suppress(OSError):
            # A link is relative to the folder that it was in, which is the parent.
            stored.add(stored_name(os.readlink(part, dir_fd=descriptor)))
    try:
        linked = {stored_name(os.readlink(entry.path)) for entry in os.scandir(parent) if entry.is_symlink()}
        with opened(os.path.join(parent, STORE)) as store:
            for one in stored - linked - {""}:
                if is_folder(one, store):
                    _delete_checkpoint(one, store, target)
            return not any(is_folder(one, store) for one in stored - linked - {""})
    except OSError:
        store_path = os.path.join(parent, STORE)
        return os.path.islink(store_path) or not os.path.isdir(store_path)


def stored_name(link: str) -> str:
    """The name of the stored folder that a link's text leads to; "" where it leads elsewhere."""
    folder, _, name = os.path.normpath(link).rpartition("/")
    return name if folder == STORE else ""


def contents_at(path: str, dir_fd: int | None = None) -> Contents:
    """What lies at a local path: nothing is followed but the path's own link.

    Args:
        path: absolute, or a name within the folder `dir_fd`.
    """
    for _ in range(_LOOKS):
        try:
            return _looked_at(path, dir_fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
        if not _is_there(path, dir_fd):
            return Contents("nothing")
        # Another process took it away, or put something else there, while it was looked at.
    return Contents(why_not="is changed by other processes all the time")


def _is_there(path: str, dir_fd: int | None) -> bool:
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _looked_at(path: str, dir_fd: int | None) -> Contents:
    found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        return _contents_of_link(path, dir_fd)
    if stat.S_ISREG(found.st_mode):
        return contents_of_file(_head(path, dir_fd), found.st_size)
    if not stat.S_ISDIR(found.st_mode):
        return Contents(why_not="is neither a file nor a folder")
    with opened(path, dir_fd) as descriptor:
        manifest = read_plain_file(MANIFEST_NAME, descriptor)
        return contents_of_folder(os.listdir(descriptor), entries(descriptor), manifest)


def _contents_of_link(path: str, dir_fd: int | None) -> Contents:
    """What a link is: only the link itself goes, but not one to what is the user's."""
    if dir_fd is not None or not os.path.exists(path):
        return Contents("a link", ("",))
    behind = contents_at(os.path.realpath(path))
    if behind.why_not:
        return Contents(why_not=f"is a link to {os.path.realpath(path)}, which {behind.why_not}")
    return Contents("a link", ("",))


def _head(path: str, dir_fd: int | None) -> bytes:
    if dir_fd is not None:
        return read_plain_file(path, dir_fd, HEAD_BYTES) or b""
    folder, name = os.path.split(path)
    with opened(os.path.realpath(folder)) as descriptor:
        return read_plain_file(name, descriptor, HEAD_BYTES) or b""


def stagings_in(parent: str) -> list[str]:
    """Names of the folders in `parent` that have the name of a staging folder."""
    return [name for name in sorted(os.listdir(parent)) if name.startswith(STAGING)]


def reap(parent: str, now: float) -> list[str]:
    """Delete the staging folders in `parent` whose owners are gone, after taking back their unfinished replacements.

    Args:
        now: time of a change that was just made in `parent`, in seconds since the epoch.

    Returns:
        Names of the folders that were deleted.
    """
    reaped = []
    for name in stagings_in(parent):
        with contextlib.suppress(OSError), opened(os.path.join(parent, name)) as descriptor:
            if is_abandoned(descriptor, now):
                clear(parent, name, descriptor)
                if not os.path.lexists(os.path.join(parent, name)):
                    reaped.append(name)
    return reaped


def restore(path: str) -> bool:
    """Take back a replacement of `path` that stopped half way, where names can't be swapped.

    Returns:
        Whether there was one.

    Raises:
        OSError: there is one, and it can't be put back.
    """
    parent, name = os.path.split(path)
    if os.path.lexists(path) or not os.path.isdir(parent):
        return False
    for entry in stagings_in(parent):
        staging = os.path.join(parent, entry)
        if _has_set_aside(staging, name) and (_is_left(staging) or _stays_so(path, staging)):
            with opened(staging) as found:
                os.rename(REPLACED, path, src_dir_fd=found)
            sync_folder(parent)
            return True
    return False


def _has_set_aside(staging: str, name: str) -> bool:
    """Whether a staging folder is of a save that set the folder of this name aside."""
    try:
        with opened(staging) as descriptor:
            owner = read_owner(descriptor)
            return owner is not None and owner.target == name and is_folder(REPLACED, descriptor)
    except OSError:
        return False


def _is_left(staging: str) -> bool:
    try:
        with opened(staging) as descriptor:
            return is_abandoned(descriptor, os.fstat(descriptor).st_mtime)
    except OSError:
        return False


def _stays_so(path: str, staging: str) -> bool:
    """Whether a process of another host, which can't be seen, stopped between two renames that follow at once."""
    deadline = time.monotonic() + _BETWEEN_RENAMES_S
    while time.monotonic() < deadline:
        if os.path.lexists(path) or not _has_set_aside(staging, os.path.basename(path)):
            return False
        time.sleep(0.05)
    with opened(staging) as descriptor:
        owner = read_owner(descriptor)
        return owner is not None and owner.host != this_process().host and lock(descriptor) is not False


def others_at(path: str, own: str = "") -> str:
    """The processes that save to a path or remove checkpoints beside it now, in words; "" where there are none."""
    parent, name = os.path.split(path)
    found: list[Owner] = []
    for entry in stagings_in(parent):
        with contextlib.suppress(OSError), opened(os.path.join(parent, entry)) as descriptor:
            owner = read_owner(descriptor)
            if entry != own and owner is not None and owner.target in ("", name) and not owner.is_gone():
                found.append(owner)
    return ", ".join(sorted({str(owner) for owner in found}))


def wait_for(staging: str, limit_s: float) -> None:
    """Wait until a staging folder that another rank has made is seen here.

    Raises:
        CheckpointError: it is not seen within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not os.path.exists(os.path.join(staging, OWNER)):
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{os.path.dirname(staging)} is not the same folder on {socket.gethostname()} as on rank 0's host: the "
                f"folder that rank 0 has made there was not seen within {limit_s:.0f} s. Save to a file system that "
                "all hosts share."
            )
        time.sleep(0.05)


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, if its file system has locks; waits for other processes."""
    with opened(folder) as descriptor:
        while lock(descriptor) is False:
            time.sleep(0.01)
        yield
