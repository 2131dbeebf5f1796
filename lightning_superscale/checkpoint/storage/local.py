"""How a checkpoint appears on a local file system: all at once, or not at all.

[Note: Commit] Files are written into `.ucp-staging-<uuid>/checkpoint` beside the target; when all are durable and
proven complete, one rename gives that folder the target's name. The same system call swaps the checkpoint that was
there before into the staging folder, so that there is no moment without a loadable checkpoint; it is deleted
afterwards. Where the system can't swap (NFS), a checkpoint lies in `.ucp-store/<uuid>` and its name is a link, which
can be replaced at once. Staging names don't contain the target's, as Lightning looks for checkpoints by parts of names.
A staging folder names the process that owns it; later saves delete the folders whose owners are gone
([Note: Owners] in owner.py). Only checkpoints are replaced and removed ([Note: What may be replaced] in contents.py),
which is looked at before any work, and again at what was taken from its place.
"""

from __future__ import annotations

import errno
import os
import uuid as uuids
from typing import Protocol

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.storage import staging as stagings
from lightning_superscale.checkpoint.storage.files import (
    FileWriter,
    LocalFile,
    is_remote,
    local_path,
    sync_folder,
    write_file,
)
from lightning_superscale.checkpoint.storage.rename import exchange
from lightning_superscale.checkpoint.storage.staging import (
    CONTENT,
    LINK,
    REPLACED,
    STAGING,
    STORE,
    Staging,
    contents_at,
    others_at,
    wait_for,
)
from lightning_superscale.errors import CheckpointError

# Time within which a folder that another host made must be seen here (attribute caches of NFS).
_VISIBLE_WITHIN_S = 30.0
# Times that a name is tried to be taken while other processes take it and give it up.
_TRIES = 20
# Errors of a rename where another process changed what has the name, since it was looked at.
_CHANGED = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


class Target(Protocol):
    """A place where one save writes a checkpoint.

    Attributes:
        path: path or URL of the checkpoint, for messages.
        root: folder within the checkpoint that holds its files; "" for the checkpoint's own.
    """

    path: str
    root: str

    def check(self) -> None:
        """Refuse a place whose content must not be replaced ([Note: What may be replaced]). Rank 0 calls it first.

        Raises:
            CheckpointError: names the place as it was resolved, and what lies there.
        """

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
        self._given = path
        self._parent = os.path.dirname(self.path)
        self._staging = Staging("", "")

    @property
    def _content(self) -> str:
        return os.path.join(self._staging.path, CONTENT)

    @property
    def _replaced(self) -> str:
        return os.path.join(self._staging.path, REPLACED)

    def check(self) -> None:
        check_place(self._given, "replaced", "Save to another path")

    def begin(self, uuid: str, nbytes: int) -> None:
        self.check()
        os.makedirs(self._parent, exist_ok=True)
        self._find(uuid)
        self._staging.open()
        stagings.reap(self._parent, self._staging.now)
        space = os.statvfs(self._parent)
        free = space.f_bavail * space.f_frsize
        if nbytes > free:
            raise CheckpointError(
                f"{self.path} needs {nbytes:,} bytes, and {free:,} are free on {self._parent} (ENOSPC). Free some, or "
                "save elsewhere."
            )
        for folder in (self._content, os.path.join(self._content, "data"), os.path.join(self._content, "blocks")):
            os.mkdir(folder)

    def _find(self, uuid: str) -> None:
        if not self._staging.path:
            self._staging = Staging(os.path.join(self._parent, STAGING + uuid), os.path.basename(self.path))

    def join(self, uuid: str) -> None:
        self._find(uuid)
        wait_for(self._staging.path, _VISIBLE_WITHIN_S)

    def create(self, name: str) -> FileWriter:
        return LocalFile(os.path.join(self._content, name))

    def seal(self) -> None:
        for folder in ("data", "blocks", ""):
            sync_folder(os.path.join(self._content, folder))

    def publish(self, manifest: bytes) -> None:
        write_file(os.path.join(self._content, MANIFEST_NAME), manifest)
        self.seal()
        sync_folder(self._staging.path)
        for _ in range(_TRIES):
            try:
                self._take_name()
                break
            except OSError as error:
                if error.errno not in _CHANGED or not os.path.isdir(self._content):
                    raise self._who_else(error) from error
        else:
            raise self._who_else(None)
        self._staging.is_published = True
        sync_folder(self._parent)
        self._staging.close()

    def _who_else(self, error: OSError | None) -> CheckpointError:
        others = others_at(self.path, os.path.basename(self._staging.path))
        said = f" {others} saves or removes checkpoints there too; let only one process use a path." if others else ""
        reason = "its name changed again and again" if error is None else f"{type(error).__name__}: {error}"
        return CheckpointError(f"{self.path} could not take its name: {reason}.{said}")

    def _take_name(self) -> None:
        if os.path.lexists(self.path):
            if not exchange(self._content, self.path):
                self._publish_link()
                return
            taken = contents_at(self._content)
            if taken.why_not:
                exchange(self._content, self.path)
                raise _refused(self.path, self._given, taken.why_not, "replaced", "Save to another path")
        elif self._can_exchange():
            os.rename(self._content, self.path)
        else:
            self._publish_link()

    def _can_exchange(self) -> bool:
        """Whether names can be swapped on this file system."""
        probes = [os.path.join(self._staging.path, f"probe-{i}") for i in range(2)]
        for probe in probes:
            os.makedirs(probe, exist_ok=True)
        can = exchange(*probes)
        for probe in probes:
            os.rmdir(probe)
        return can

    def _publish_link(self) -> None:
        """Publish where names can't be swapped: the checkpoint's name becomes a link ([Note: Commit])."""
        store = os.path.join(self._parent, STORE)
        if os.path.islink(store):
            raise CheckpointError(f"{store} is a link; checkpoints lie in a folder of this name. Remove the link.")
        os.makedirs(store, exist_ok=True)
        with stagings.locked(store):
            uuid = os.path.basename(self._staging.path).removeprefix(STAGING)
            os.rename(self._content, os.path.join(store, uuid))
            try:
                sync_folder(store)
                link = os.path.join(self._staging.path, LINK)
                os.symlink(os.path.join(STORE, uuid), link)
                if os.path.islink(self.path):
                    # The old link is kept, so that the folder that it leads to is found and deleted.
                    os.symlink(os.readlink(self.path), self._replaced)
                elif os.path.isdir(self.path):
                    # The name belongs to a plain folder, which a link can't replace at once: should this process stop
                    # between the two renames, the first one is taken back.
                    os.rename(self.path, self._replaced)
                    self._check_taken()
                os.replace(link, self.path)
            except BaseException:
                self._undo_link(os.path.join(store, uuid))
                raise

    def _check_taken(self) -> None:
        taken = contents_at(self._replaced)
        if taken.why_not:
            raise _refused(self.path, self._given, taken.why_not, "replaced", "Save to another path")

    def _undo_link(self, stored: str) -> None:
        """Take back the steps of a link that did not get its name, as far as that succeeds."""
        if os.path.islink(self.path) and os.path.realpath(self.path) == os.path.realpath(stored):
            self._staging.is_published = True  # an interrupt came after the last step
            return
        if not os.path.lexists(self.path) and os.path.lexists(self._replaced):
            os.rename(self._replaced, self.path)
        for left in (LINK, REPLACED):
            path = os.path.join(self._staging.path, left)
            if os.path.islink(path):
                os.unlink(path)
        if not os.path.lexists(self._replaced):
            os.rename(stored, self._content)

    def abort(self) -> None:
        if self._staging.path:
            self._staging.close()


def check_place(path: str, what: str, instead: str) -> None:
    """Refuse a local path at which something else lies than a checkpoint, or nothing.

    Args:
        what: done to what lies there, such as "replaced".
        instead: what to do, as the beginning of a sentence.

    Raises:
        CheckpointError: names the path as it was resolved, and what lies there.
    """
    resolved = local_path(path)
    if not path:
        raise _refused(resolved, path, "is where an empty path leads, the working folder", what, instead)
    working = os.getcwd()
    if os.path.commonpath([working, resolved]) == resolved:
        raise _refused(resolved, path, "is the working folder, or has it inside", what, instead)
    try:
        why_not = contents_at(resolved).why_not
    except OSError as error:
        raise _refused(resolved, path, f"can't be looked at ({error.strerror})", what, instead) from error
    if why_not:
        raise _refused(resolved, path, why_not, what, instead)


def _refused(path: str, given: str, why_not: str, what: str, instead: str) -> CheckpointError:
    named = "" if given == path else f" (given as {given!r})"
    return CheckpointError(
        f"{path}{named} {why_not}, so it is not {what}: only checkpoints are. {instead}, or remove it yourself."
    )


def remove(path: str) -> None:
    """Delete a checkpoint of any format, local or remote; nothing happens where there is none. One rank calls it.

    A local checkpoint disappears all at once, so that no reader sees a part of it. Only its own files go
    ([Note: What may be replaced]).

    Raises:
        CheckpointError: something else lies there.
        OSError: the checkpoint can't be deleted.
    """
    if is_remote(path):
        from lightning_superscale.checkpoint.storage.remote import remove_remote

        remove_remote(path)
        return
    given, path = path, local_path(path)
    if given and not os.path.lexists(path):
        return
    check_place(given, "removed", "Give the path of a checkpoint")
    parent, name = os.path.split(path)
    staging = Staging(os.path.join(parent, STAGING + new_uuid()), name)
    staging.open()
    taken = os.path.join(staging.path, CONTENT)
    try:
        try:
            os.rename(path, taken)
        except FileNotFoundError:
            return  # another process was first
        found = contents_at(taken)
        if found.why_not:
            os.rename(taken, path)
            raise _refused(path, given, found.why_not, "removed", "Give the path of a checkpoint")
        sync_folder(parent)
    finally:
        staging.close()


def restore(path: str) -> bool:
    """Take back a replacement of `path` that stopped half way, where names can't be swapped ([Note: Commit]).

    Returns:
        Whether there was one.
    """
    return stagings.restore(local_path(path))
