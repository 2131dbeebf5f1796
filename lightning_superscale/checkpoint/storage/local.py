"""How a checkpoint appears: all at once, or not at all; on a local file system.

[Note: Commit] Files are written into `.ucp-staging-<uuid>/checkpoint` beside the target; when all are durable and
proven complete, one rename gives them the target's name. What was there before is swapped into the staging folder by
the same system call, so there is no moment without a loadable checkpoint, and is deleted after it. Where the system
can't swap (NFS), a checkpoint lies in `.ucp-store/<uuid>` and its name is a link, which can be replaced at once.
Staging names don't contain the target's: Lightning looks for checkpoints by parts of names. The staging folder says
who owns it; later saves delete those whose owner is gone.
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
# Staging folders of another host, whose processes can't be seen from here, are dead after this long without a write.
_STALE_AFTER_S = 24 * 3600.0
# A staging folder with nothing in it that is older than this will not get an owner any more.
_OWNED_WITHIN_S = 60.0
# How long another host's new folder may take to be seen here (attribute caches of NFS).
_VISIBLE_WITHIN_S = 30.0


class Target(Protocol):
    """A place where a checkpoint is going to be. One save uses it."""

    path: str
    root: str

    def begin(self, uuid: str, nbytes: int) -> None:
        """Rank 0: make room. `nbytes` is what all ranks will write."""

    def join(self, uuid: str) -> None:
        """Every rank, after `begin`: find what rank 0 has made."""

    def create(self, name: str) -> FileWriter:
        """Begin a new file of the checkpoint. Each rank calls it for its own files."""

    def seal(self) -> None:
        """Every rank, after its files are closed: make their names durable."""

    def publish(self, manifest: bytes) -> None:
        """Rank 0, once all have sealed: let the checkpoint take its name."""

    def abort(self) -> None:
        """Rank 0: delete whatever was written; never raises."""


def target_at(path: str) -> Target:
    """The target that writes a checkpoint at this path or URL."""
    if is_remote(path):
        from lightning_superscale.checkpoint.storage.remote import RemoteTarget

        return RemoteTarget(path)
    return LocalTarget(path)


def new_uuid() -> str:
    return uuids.uuid4().hex


class LocalTarget:
    """A folder on a file system that all ranks see."""

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
        """Where names can't be swapped: the name becomes a link ([Note: Commit])."""
        store = os.path.join(self._parent, STORE)
        os.makedirs(store, exist_ok=True)
        os.rename(self._content, os.path.join(store, self._uuid))
        sync_folder(store)
        link = os.path.join(self._staging, _LINK)
        os.symlink(os.path.join(STORE, self._uuid), link)
        if os.path.islink(self.path):
            # Kept, so that the folder behind it is found and deleted.
            os.symlink(os.readlink(self.path), os.path.join(self._staging, _REPLACED))
        elif os.path.isdir(self.path):
            # A folder that something else put there. A link can't replace a folder at once: should this process die
            # between the two renames, `restore` takes the first one back.
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
    """Delete a checkpoint, of any format; only rank 0 calls it. No reader ever sees a part of one.

    Raises:
        OSError: it can't be deleted.
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
    """Take back a replacement that stopped half way, where names can't be swapped. Whether there was one."""
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
    """Delete staging folders whose owners are gone, after taking back what they had not finished.

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
    """Delete a staging folder with what it holds, and the stored folders that nothing names any more."""
    parent = os.path.dirname(staging)
    store = os.path.join(parent, STORE)
    stored = {os.path.join(store, os.path.basename(staging).removeprefix(STAGING))}
    for name in (_CONTENT, _REPLACED):
        link = os.path.join(staging, name)
        if os.path.islink(link):
            # Links are relative to the folder that they were in: the parent.
            stored.add(os.path.normpath(os.path.join(parent, os.readlink(link))))
    for folder in stored:
        if os.path.dirname(folder) == store and os.path.isdir(folder) and not _is_linked(parent, folder):
            shutil.rmtree(folder, ignore_errors=True)
    # The owner goes last: what is left when this process dies is known to be dead.
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
    """This host, boot and process namespace: where a process number means the same."""
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
    """Whether the owner may still write: its process runs, or it can't be seen and something was written lately."""
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
    # The owner is noted before anything else is made, and deleted after everything else.
    is_bare = not owner and set(os.listdir(staging)) <= {OWNER}
    return time.time() - newest < (_OWNED_WITHIN_S if is_bare else _STALE_AFTER_S)
