"""How a checkpoint appears on a local file system: all at once, or not at all.

[Note: Commit] Files are written into `.ucp-staging-<uuid>/checkpoint` beside the target; when all are durable and
proven complete, one rename gives that folder the target's name. The same system call swaps the checkpoint that was
there before into the staging folder, so that there is no moment without a loadable checkpoint; it is deleted
afterwards. Where the system can't swap (NFS), a checkpoint lies in `.ucp-store/<uuid>` and its name is a link, which
can be replaced at once. Staging names don't contain the target's, as Lightning looks for checkpoints by parts of names.
A staging folder names the process that owns it; later saves delete the folders whose owners are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
import uuid as uuids
from typing import Any, Protocol

import psutil

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.storage.files import (
    FileWriter,
    LocalFile,
    is_remote,
    local_path,
    sync_folder,
    write_file,
)
from lightning_superscale.checkpoint.storage.rename import exchange
from lightning_superscale.errors import CheckpointError

STAGING, STORE, OWNER = ".ucp-staging-", ".ucp-store", "owner.json"
_CONTENT, _LINK, _REPLACED = "checkpoint", "link", "replaced"
# A staging folder of another host, whose processes can't be seen here, counts as dead this long after its last write.
_STALE_AFTER_S = 24 * 3600.0
# An empty staging folder that is older than this counts as dead: its owner is noted right after it is made.
_OWNED_WITHIN_S = 60.0
# Time within which a folder that another host made must be seen here (attribute caches of NFS).
_VISIBLE_WITHIN_S = 30.0


class Target(Protocol):
    """A place where one save writes a checkpoint.

    Attributes:
        path: path or URL of the checkpoint, for messages.
        root: folder within the checkpoint that holds its files; "" for the checkpoint's own.
    """

    path: str
    root: str

    def begin(self, uuid: str, nbytes: int) -> None:
        """Prepare the place for a save. Rank 0 calls it, before all others.

        Args:
            uuid: id of the save.
            nbytes: bytes that all ranks together will write.

        Raises:
            CheckpointError: the disk has less space than that.
        """

    def join(self, uuid: str) -> None:
        """Find the place that rank 0 prepared. Every rank calls it, after rank 0's `begin`.

        Raises:
            CheckpointError: this host does not see rank 0's folder.
        """

    def create(self, name: str) -> FileWriter:
        """Begin a new file of the checkpoint. Each rank calls it for its own files."""

    def seal(self) -> None:
        """Make the names of files durable. Every rank calls it, after its files are closed."""

    def publish(self, manifest: bytes) -> None:
        """Write the manifest and give the checkpoint its name. Rank 0 calls it, once all ranks have sealed."""

    def abort(self) -> None:
        """Delete the files of this save. Rank 0 calls it when a save fails."""


def target_at(path: str) -> Target:
    """The target that writes a checkpoint at this path or URL."""
    if is_remote(path):
        from lightning_superscale.checkpoint.storage.remote import RemoteTarget

        return RemoteTarget(path)
    return LocalTarget(path)


def new_uuid() -> str:
    """A random id for a save, of 32 hexadecimal digits."""
    return uuids.uuid4().hex


class LocalTarget:
    """A Target that is a folder on a file system that all ranks see ([Note: Commit])."""

    root = ""

    def __init__(self, path: str) -> None:
        self.path = local_path(path)
        self._parent = os.path.dirname(self.path)
        self._uuid = ""

    @property
    def _staging(self) -> str:
        return os.path.join(self._parent, STAGING + self._uuid)

    @property
    def _content(self) -> str:
        return os.path.join(self._staging, _CONTENT)

    def begin(self, uuid: str, nbytes: int) -> None:
        os.makedirs(self._parent, exist_ok=True)
        reap(self._parent)
        space = os.statvfs(self._parent)
        free = space.f_bavail * space.f_frsize
        if nbytes > free:
            raise CheckpointError(
                f"{self.path} needs {nbytes:,} bytes, and {free:,} are free on {self._parent} (ENOSPC). Free some, or "
                "save elsewhere."
            )
        self._uuid = uuid
        _make_staging(self._staging, {"target": os.path.basename(self.path)})
        for folder in (self._content, os.path.join(self._content, "data"), os.path.join(self._content, "blocks")):
            os.mkdir(folder)

    def join(self, uuid: str) -> None:
        self._uuid = uuid
        deadline = time.monotonic() + _VISIBLE_WITHIN_S
        while not os.path.exists(os.path.join(self._staging, OWNER)):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self._parent} is not the same folder on {socket.gethostname()} as on rank 0's host: the "
                    f"folder that rank 0 has made there was not seen within {_VISIBLE_WITHIN_S:.0f} s. Save to a "
                    "file system that all hosts share."
                )
            time.sleep(0.05)

    def create(self, name: str) -> FileWriter:
        return LocalFile(os.path.join(self._content, name))

    def seal(self) -> None:
        for folder in ("data", "blocks", ""):
            sync_folder(os.path.join(self._content, folder))

    def publish(self, manifest: bytes) -> None:
        write_file(os.path.join(self._content, MANIFEST_NAME), manifest)
        self.seal()
        sync_folder(self._staging)
        if os.path.lexists(self.path):
            if not exchange(self._content, self.path):
                self._publish_link()
        elif _can_exchange(self._staging):
            os.rename(self._content, self.path)
        else:
            self._publish_link()
        sync_folder(self._parent)
        _delete_old(self._staging)

    def _publish_link(self) -> None:
        """Publish where names can't be swapped: the checkpoint's name becomes a link ([Note: Commit])."""
        store = os.path.join(self._parent, STORE)
        os.makedirs(store, exist_ok=True)
        os.rename(self._content, os.path.join(store, self._uuid))
        sync_folder(store)
        link = os.path.join(self._staging, _LINK)
        os.symlink(os.path.join(STORE, self._uuid), link)
        if os.path.islink(self.path):
            # The old link is kept, so that the folder that it leads to is found and deleted.
            os.symlink(os.readlink(self.path), os.path.join(self._staging, _REPLACED))
        elif os.path.isdir(self.path):
            # The name belongs to a plain folder, which a link can't replace at once: should this process die between
            # the two renames, `restore` takes the first one back.
            os.rename(self.path, os.path.join(self._staging, _REPLACED))
        try:
            os.replace(link, self.path)
        except OSError:
            if not os.path.lexists(self.path):
                os.rename(os.path.join(self._staging, _REPLACED), self.path)
            raise

    def abort(self) -> None:
        if self._uuid:
            with contextlib.suppress(OSError):
                _delete_old(self._staging)


def remove(path: str) -> None:
    """Delete a checkpoint of any format, local or remote; nothing happens where there is none. One rank calls it.

    A local checkpoint disappears all at once, so that no reader sees a part of it.

    Raises:
        OSError: the checkpoint can't be deleted.
    """
    if is_remote(path):
        from lightning_superscale.checkpoint.storage.remote import remove_remote

        remove_remote(path)
        return
    path = local_path(path)
    if not os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    staging = os.path.join(parent, STAGING + new_uuid())
    _make_staging(staging, {})
    os.rename(path, os.path.join(staging, _CONTENT))
    sync_folder(parent)
    _delete_old(staging)


def restore(path: str) -> bool:
    """Take back a replacement of `path` that stopped half way, where names can't be swapped ([Note: Commit]).

    Returns:
        Whether there was one.
    """
    path = local_path(path)
    parent, name = os.path.split(path)
    if os.path.lexists(path) or not os.path.isdir(parent):
        return False
    for entry in os.listdir(parent):
        replaced = os.path.join(parent, entry, _REPLACED)
        if entry.startswith(STAGING) and os.path.isdir(replaced) and not os.path.islink(replaced):
            owner = _read_owner(os.path.join(parent, entry))
            if owner.get("target") == name and not _is_alive(owner, os.path.join(parent, entry)):
                os.rename(replaced, path)
                sync_folder(parent)
                return True
    return False


def reap(parent: str) -> list[str]:
    """Delete the staging folders in `parent` whose owners are gone, after taking back their unfinished replacements.

    Returns:
        Names of the folders that were deleted.
    """
    reaped = []
    for entry in os.listdir(parent):
        staging = os.path.join(parent, entry)
        if not entry.startswith(STAGING) or not os.path.isdir(staging):
            continue
        owner = _read_owner(staging)
        if not _is_alive(owner, staging):
            if "target" in owner:
                restore(os.path.join(parent, owner["target"]))
            _delete_old(staging)
            reaped.append(entry)
    return reaped


def _make_staging(staging: str, note: dict[str, Any]) -> None:
    os.mkdir(staging)
    try:
        write_file(os.path.join(staging, OWNER), json.dumps({**_this_process(), **note}).encode())
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _delete_old(staging: str) -> None:
    """Delete a staging folder with its content, and the stored folders that no link names any more."""
    parent = os.path.dirname(staging)
    store = os.path.join(parent, STORE)
    stored = {os.path.join(store, os.path.basename(staging).removeprefix(STAGING))}
    for name in (_CONTENT, _REPLACED):
        link = os.path.join(staging, name)
        if os.path.islink(link):
            # A link is relative to the folder that it was in, which is the parent.
            stored.add(os.path.normpath(os.path.join(parent, os.readlink(link))))
    for folder in stored:
        if os.path.dirname(folder) == store and os.path.isdir(folder) and not _is_linked(parent, folder):
            shutil.rmtree(folder, ignore_errors=True)
    # The owner's note goes last, so that a folder that is left when this process dies is known to be dead.
    for name in (_CONTENT, _REPLACED, _LINK):
        path = os.path.join(staging, name)
        if os.path.islink(path) or os.path.isfile(path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _is_linked(parent: str, folder: str) -> bool:
    """Whether a link in `parent` leads to a folder."""
    links = [os.path.join(parent, name) for name in os.listdir(parent)]
    return any(
        os.path.normpath(os.path.join(parent, os.readlink(link))) == folder for link in links if os.path.islink(link)
    )


def _can_exchange(staging: str) -> bool:
    """Whether names can be swapped on this file system."""
    probes = [os.path.join(staging, f"probe-{i}") for i in range(2)]
    for probe in probes:
        os.mkdir(probe)
    can = exchange(*probes)
    for probe in probes:
        os.rmdir(probe)
    return can


def _host() -> str:
    """This host, boot and process namespace, within which process numbers can be compared."""
    known = [socket.gethostname(), str(int(psutil.boot_time()))]
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            known[1] = file.read().strip()
        known.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return " ".join(known)


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _read_owner(staging: str) -> dict[str, Any]:
    try:
        with open(os.path.join(staging, OWNER)) as file:
            owner = json.load(file)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any], staging: str) -> bool:
    """Whether a staging folder's owner may still write.

    It may where its process runs; where the process can't be seen, when the folder was written to lately.
    """
    if owner.get("host") == _host():
        try:
            return bool(abs(psutil.Process(int(owner["pid"])).create_time() - owner["started"]) < 1.0)
        except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
            return False
    newest = os.stat(staging).st_mtime
    for folder, _, files in os.walk(staging):
        for name in files:
            try:
                newest = max(newest, os.lstat(os.path.join(folder, name)).st_mtime)
            except OSError:
                continue
    # The owner's note is made before all other content, and deleted after it.
    is_bare = not owner and set(os.listdir(staging)) <= {OWNER}
    return time.time() - newest < (_OWNED_WITHIN_S if is_bare else _STALE_AFTER_S)
