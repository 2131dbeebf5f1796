"""How a checkpoint appears in an object store, where nothing can be renamed.

[Note: Generations] The files of a save go under a prefix of their own, `<path>/<uuid>/`, its generation, which is
written once. The manifest at `<path>/MANIFEST.json` names that prefix and is written last, in one put: before it the
earlier checkpoint loads, after it the new one. A generation stays until the manifest that names it is gone:

- After the put the manifest is read again; what the store says it is decides which generation goes.
- A put or a removal whose answer is lost may have happened, or may happen later. It is asked again, and once a manifest
  was sent, the generation that it names is not taken back.
- Generations of other saves stay while these may run: a note beside each says which process writes it
  ([Note: Owners] in owner.py). Those of other hosts, and those without a note, count as dead a day after their last
  object was written, by the store's clock.

What the manifest does not name and has no name of ours is never deleted.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.storage.contents import (
    HEAD_BYTES,
    OWNER,
    Contents,
    contents_of_file,
    contents_of_folder,
    is_in_generation,
    named_by_manifest,
    own_files,
    root_of,
)
from lightning_superscale.checkpoint.storage.files import FileWriter, RemoteFile, remote_filesystem
from lightning_superscale.checkpoint.storage.owner import parse_owner, this_process
from lightning_superscale.errors import CheckpointError

# A generation, or the note beside it.
_GENERATION = re.compile(r"([0-9a-f]{32})(?:\." + re.escape(OWNER) + ")?")
# Times that the store is asked, and seconds before it is asked again for the first time; they double.
_TRIES, _PAUSE_S = 4, 0.05
_STALE_AFTER_S = 24 * 3600.0
_LEFT = "what is left of saves"
# The generations that this process is writing. Threads only add, discard and ask for one, each at once.
_LIVE: set[str] = set()
_Answer = TypeVar("_Answer")


class RemoteTarget:
    """A Target that is a prefix in an object store, or on another file system that fsspec reaches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = ""
        self._store = _Store(path)
        self._was_named = False  # whether a manifest was sent that names this generation

    def check(self) -> None:
        _refuse(self.path, self._store.contents(), "replaced", "Save to another URL")

    def begin(self, uuid: str, nbytes: int) -> None:
        self.check()
        self.root = uuid  # an object store can't tell its free space and has no folders to make
        _LIVE.add(uuid)
        self._store.put(_note(uuid), this_process().to_bytes())

    def join(self, uuid: str) -> None:
        self.root = uuid

    def create(self, name: str) -> FileWriter:
        return RemoteFile(self._store.filesystem, self._store.full(f"{self.root}/{name}"))

    def seal(self) -> None:
        return  # a closed object is durable

    def publish(self, manifest: bytes) -> None:
        replaced = self._store.read(MANIFEST_NAME)
        found = self._store.contents()
        _refuse(self.path, found, "replaced", "Save to another URL")
        self._was_named = True
        self._store.put_manifest(manifest, replaced)
        _LIVE.discard(self.root)
        with contextlib.suppress(Exception):  # the next save deletes what is left
            self._store.delete([_note(self.root)])
            self._delete_others([*found.files, *(named_by_manifest(replaced) or ())])

    def _delete_others(self, replaced: Sequence[str]) -> None:
        """Delete what was replaced and what is left of dead saves, as far as no manifest names it now.

        Args:
            replaced: names of the files of what was there before.
        """
        dead = self._store.dead() - {self.root}
        # Read after they were found dead: a save that ended before that has its manifest there by now.
        named = root_of(self._store.read(MANIFEST_NAME))
        if not named:
            return
        files = [name for name in dict.fromkeys(replaced) if name != MANIFEST_NAME]
        if named != self.root:  # another save came later, and may not have seen this one
            files += self._store.generation(self.root)
        for generation in dead:
            files += self._store.generation(generation)
        self._store.delete([name for name in files if not name.startswith(f"{named}/")])

    def abort(self) -> None:
        _LIVE.discard(self.root)
        if self.root and not self._was_named:
            with contextlib.suppress(Exception):  # what is left is deleted by a later save
                self._store.delete(self._store.generation(self.root))


def remove_remote(path: str) -> None:
    """Delete a checkpoint at a URL, its manifest first, so that no reader takes the rest for a checkpoint.

    Raises:
        CheckpointError: something else lies there, or the store does not say that the manifest is gone.
    """
    store = _Store(path)
    found = store.contents()
    _refuse(path, found, "removed", "Give the URL of a checkpoint")
    store.delete_surely(MANIFEST_NAME)
    files = [name for name in found.files if name != MANIFEST_NAME]
    if found.kind == _LEFT:
        for generation in store.generations() - store.running():
            files += store.generation(generation)
    store.delete(files)


def has_objects(path: str) -> bool:
    """Whether anything lies at a URL or below it, other than what is left of saves."""
    return _Store(path).contents().kind not in ("nothing", "an empty folder", _LEFT)


def _note(root: str) -> str:
    """The name of the note that says who writes a generation; it lies beside it, as it is no part of the checkpoint."""
    return f"{root}.{OWNER}"


def _refuse(path: str, found: Contents, what: str, instead: str) -> None:
    if found.why_not:
        raise CheckpointError(
            f"{path} {found.why_not}, so it is not {what}: only checkpoints are. {instead}, or remove it yourself."
        )


class _Store:
    """The objects at a URL and below it, by names relative to it; "" is the object at the URL itself."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.filesystem, self._prefix = remote_filesystem(path)

    def full(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def contents(self) -> Contents:
        """What lies there; where the store does not permit to list it, what the manifest says."""
        try:
            return self._listed()
        except PermissionError:
            with contextlib.suppress(PermissionError):
                return Contents("what the manifest names", tuple(named_by_manifest(self.read(MANIFEST_NAME)) or ()))
            return Contents("nothing")

    def _listed(self) -> Contents:
        self.filesystem.invalidate_cache()
        files: tuple[str, ...] = ()
        kind = "nothing"
        if self._prefix and self._asked(lambda: self.filesystem.isfile(self._prefix)):
            size = self.filesystem.info(self._prefix)["size"]
            found = contents_of_file(self.filesystem.cat_file(self._prefix, start=0, end=min(size, HEAD_BYTES)), size)
            if found.why_not:
                return found
            kind, files = found.kind, ("",)
        top = self._names_below("")
        manifest = self.read(MANIFEST_NAME)
        if not {name for name in top if not _GENERATION.fullmatch(name)}:
            # Their generations are no files of a checkpoint: a running save may be writing them.
            return Contents(_LEFT if top and not files else kind, files)
        found = contents_of_folder(top, (name for name in self._all_names() if not is_in_generation(name)), manifest)
        return Contents(found.kind, (*files, *found.files), found.others, found.why_not)

    def _names_below(self, folder: str) -> set[str]:
        try:
            found = self._asked(lambda: self.filesystem.ls(self.full(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        here = self.full(folder).strip("/")
        return {one.rstrip("/").rsplit("/", 1)[-1] for one in found if one.strip("/") != here}

    def _all_names(self) -> Iterator[str]:
        start = len(self._prefix.lstrip("/")) + bool(self._prefix.lstrip("/"))
        for found in self._asked(lambda: self.filesystem.find(self._prefix)):
            if found.lstrip("/")[start:]:
                yield found.lstrip("/")[start:]

    def generations(self) -> set[str]:
        """The ids of all generations, and of notes of those that have no files yet."""
        return {found[1] for name in self._names_below("") if (found := _GENERATION.fullmatch(name))}

    def generation(self, root: str) -> list[str]:
        """The files of a generation, with its note; no others that lie there."""
        names = [name for name in self._all_names() if name.startswith((f"{root}/", f"{root}."))]
        return own_files(names, None)

    def dead(self) -> set[str]:
        """The generations that nobody writes any more; none where the store does not permit to list them."""
        try:
            return {one for one in self.generations() if self.is_dead(one)}
        except PermissionError:
            return set()

    def running(self) -> set[str]:
        """The generations that running saves write."""
        noted = {one for one in self.generations() if parse_owner(self.read(_note(one))) is not None}
        return {one for one in noted if not self.is_dead(one)}

    def is_dead(self, root: str) -> bool:
        """Whether nobody writes a generation any more."""
        if root in _LIVE:
            return False
        owner = parse_owner(self.read(_note(root)))
        me = this_process()
        if owner is not None and owner.host == me.host:
            return owner.is_gone() or (owner.pid, owner.ticks) == (me.pid, me.ticks)
        try:
            now = self.filesystem.modified(self.full(MANIFEST_NAME)).timestamp()
            names = [name for name in self._all_names() if name.startswith((f"{root}/", f"{root}."))]
            newest = max(self.filesystem.modified(self.full(name)).timestamp() for name in names)
        except (OSError, NotImplementedError, ValueError, KeyError, AttributeError):
            return False  # a store without times
        return bool(now - newest > _STALE_AFTER_S)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        self.filesystem.invalidate_cache()
        try:
            return self._asked(lambda: bytes(self.filesystem.cat_file(self.full(name))))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def put(self, name: str, data: bytes) -> None:
        """Write an object, and be sure that it is there.

        Raises:
            CheckpointError: the store does not say that it is. It may be there all the same, or come later.
        """

        def is_there() -> bool:
            return self.read(name) == data

        self._surely(lambda: self.filesystem.pipe_file(self.full(name), data), is_there, f"taken {name}")

    def put_manifest(self, data: bytes, replaced: bytes | None) -> None:
        """Write the manifest, and be sure that it is there.

        Args:
            data: its content.
            replaced: content of the one that is there now.

        Raises:
            CheckpointError: the store does not say that it is, or has another one by now.
        """

        def is_there() -> bool:
            found = self.read(MANIFEST_NAME)
            if found not in (data, replaced):
                # It may have been there for a moment, and what it names may be gone: it is not sent again.
                raise CheckpointError(
                    f"{self.path}: the store did not say that it has taken {MANIFEST_NAME}, and has that of another "
                    "save by now, which is the one that loads. Let only one process save to a URL."
                )
            return found == data

        self._surely(
            lambda: self.filesystem.pipe_file(self.full(MANIFEST_NAME), data), is_there, f"taken {MANIFEST_NAME}"
        )

    def delete_surely(self, name: str) -> None:
        """Delete an object, and be sure that it is gone.

        Raises:
            CheckpointError: the store does not say that it is.
        """
        if self.read(name) is not None:
            self._surely(
                lambda: self.filesystem.rm_file(self.full(name)), lambda: self.read(name) is None, f"deleted {name}"
            )

    def delete(self, names: list[str]) -> None:
        """Delete objects, and folders that are empty then, where the store has folders. Keeps what can't be."""
        folders: set[str] = set()
        for name in names:
            with contextlib.suppress(OSError):
                self.filesystem.rm_file(self.full(name))
            parts = name.split("/")[:-1]
            folders.update("/".join(parts[: count + 1]) for count in range(len(parts)))
        for folder in [*sorted(folders, key=lambda one: one.count("/"), reverse=True), ""]:
            with contextlib.suppress(Exception):  # stores differ in what they think of folders
                if not self.filesystem.ls(self.full(folder), detail=False):
                    self.filesystem.rmdir(self.full(folder))

    def _surely(self, work: Callable[[], object], is_done: Callable[[], bool], what: str) -> None:
        for attempt in range(_TRIES):
            try:
                work()
                return
            except Exception as raised:  # stores raise anything; what they did decides
                error = raised
            try:
                if is_done():
                    return
            except CheckpointError:
                raise
            except Exception as unknown:
                error = unknown
                break  # it is asked again only where it is known not to have happened
            time.sleep(_PAUSE_S * 2**attempt)
        raise CheckpointError(
            f"{self.path}: the store did not say, asked {_TRIES} times, that it has {what}: "
            f"{type(error).__name__}: {error}. It may have, or may do so later, so nothing was deleted."
        ) from error

    def _asked(self, ask: Callable[[], _Answer]) -> _Answer:
        """An answer of the store; a question that it did not answer is asked again."""
        for attempt in range(_TRIES - 1):
            try:
                return ask()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
                raise
            except Exception:  # stores raise anything
                time.sleep(_PAUSE_S * 2**attempt)
        return ask()
