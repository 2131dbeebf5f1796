"""Loading: a universal checkpoint as a StateSource, for any number of ranks with any layout.

[Note: Reading once] Ranks tell one another which boxes they need, and which blocks of which files hold them. A block
that several ranks need is read by one of them, which sends each other rank the part that it needs, in rounds of bounded
size ([Note: Rounds] in `exchange.py`). So the files are read once, for any number of ranks, and beside the tensors that
it fills a rank needs memory for a few segments only.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format import json_codec as rest_json
from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES, BlockSums, hex_digest
from lightning_superscale.checkpoint.format.chunks import chunks_in
from lightning_superscale.checkpoint.format.malformed import malformed_as_error, parse
from lightning_superscale.checkpoint.format.manifest import (
    MANIFEST_NAME,
    REST_NAME,
    Manifest,
    blocks_name,
    is_data,
)
from lightning_superscale.checkpoint.format.payload import is_wrapper
from lightning_superscale.checkpoint.load.exchange import Sharing
from lightning_superscale.checkpoint.load.scatter import READ_THREADS, Buffers, Filling, Others, Wanted
from lightning_superscale.checkpoint.load.segments import (
    Segment,
    Transfer,
    mapped_transfer_of,
    read_items_of,
    segments_of,
    transfer_of,
)
from lightning_superscale.checkpoint.phases import attempt
from lightning_superscale.checkpoint.state import EXTRA, OptimizerRecord, ReadRequest, TensorInfo, TensorKey
from lightning_superscale.checkpoint.storage.files import Folder, is_remote, open_folder
from lightning_superscale.checkpoint.storage.local import restore
from lightning_superscale.comm.mesh import DataMesh, single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box


def is_checkpoint(path: str) -> bool:
    """Whether a path or URL has the manifest of a checkpoint of this format; its content is not looked at."""
    try:
        folder = open_folder(path)
    except CheckpointError:
        return False
    try:
        return folder.size(MANIFEST_NAME) is not None
    finally:
        folder.close()


def open_checkpoint(path: str, mesh: DataMesh | None = None, *, check_first: bool | None = None) -> SavedState:
    """Open a checkpoint. Every rank of the mesh calls it; none reads values yet.

    Args:
        path: path or URL of the checkpoint; the same on every rank.
        mesh: ranks that are going to read together; None where this process reads alone.
        check_first: whether `read` verifies every block that it needs before it fills the first tensor, so that damage
            is found while nothing has changed. Costs a second pass over the bytes, from the page cache where they fit.
            None for true on local file systems only. With false, blocks are verified as they are read, and tensors are
            filled in part when a block turns out to be damaged.

    Raises:
        CheckpointError: on every rank: there is no checkpoint, it is damaged or incomplete, or needs a newer reader.
    """
    mesh = mesh or single_mesh()
    failed = f"{path} can't be loaded"
    if not is_remote(path):
        attempt(mesh, lambda: mesh.world.rank == 0 and restore(path), failed)
    opened: list[SavedState] = []

    def look() -> str:
        folder = open_folder(path)
        if folder.size(MANIFEST_NAME) is None:
            raise CheckpointError(f"{path} has no {MANIFEST_NAME}, so it is no checkpoint of this format.")
        manifest = Manifest.from_bytes(folder.read(MANIFEST_NAME), f"{path}/{MANIFEST_NAME}")
        if manifest.root:
            folder.close()
            folder = open_folder(path, manifest.root)
        if mesh.world.rank == 0:
            check_sizes(folder, manifest)
        opened.append(
            SavedState(path, mesh, folder, manifest, not is_remote(path) if check_first is None else check_first)
        )
        return manifest.uuid

    uuids = attempt(mesh, look, failed)
    if len(set(uuids)) > 1:
        raise CheckpointError(
            f"{failed}: ranks see different checkpoints there, as if it was replaced while they opened it, or each "
            "host has its own. Use a file system that all hosts share."
        )
    return opened[0]


def check_sizes(folder: Folder, manifest: Manifest) -> None:
    """Check that the files of the manifest exist and have their sizes.

    Raises:
        CheckpointError: a file is missing, or has another size; names it.
    """
    for name, file in manifest.files.items():
        size = folder.size(name)
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{folder.path}: {name} {found}, {file.size} bytes were expected. Load an earlier checkpoint."
            )


class SavedState:
    """A checkpoint of our own format, as a `StateSource`.

    Attributes:
        path: path or URL of the checkpoint.
        manifest: the checkpoint's manifest.
        bytes_read: bytes of data files that this rank has read to fill tensors.
        bytes_checked: bytes of data files that this rank has read only to verify them.
    """

    def __init__(self, path: str, mesh: DataMesh, folder: Folder, manifest: Manifest, check_first: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.bytes_read = 0
        self.bytes_checked = 0
        self._mesh = mesh
        self._folder = folder
        self._check_first = check_first
        self._sums: dict[str, BlockSums] = {}
        self._lock = Lock()

    @property
    def step(self) -> int | None:
        return self.manifest.step

    @cached_property
    def tensors(self) -> Mapping[TensorKey, TensorInfo]:
        """All tensors of the checkpoint but those within `rest` and the optimizers' groups and values."""
        return {key: record.info for key, record in self.manifest.tensors.items() if key.section != EXTRA}

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.manifest.aliases

    @cached_property
    def optimizers(self) -> tuple[OptimizerRecord, ...]:
        """A record for each optimizer, with its tensors on the host. Each rank that uses it reads it for itself."""
        with malformed_as_error(f"{self.path}: the optimizers in {MANIFEST_NAME} are not as they are written"):
            return self._optimizers()

    def _optimizers(self) -> tuple[OptimizerRecord, ...]:
        return tuple(
            OptimizerRecord(
                class_name=str(fields["class"]),
                groups=tuple(rest_json.decode(fields["groups"], f"optimizers[{i}]/groups", self._extra)),
                names=tuple(tuple(names) for names in fields["names"]),
                values=rest_json.decode(fields["values"], f"optimizers[{i}]/values", self._extra),
                rule=rest_json.decode(fields.get("rule", {}), f"optimizers[{i}]/rule", self._extra),
            )
            for i, fields in enumerate(self.manifest.optimizers)
        )

    @cached_property
    def rest(self) -> dict[str, Any]:
        """Lightning's part of the state, with its tensors on the host; each rank reads it for itself.

        Raises:
            CheckpointError: the content is damaged, or of a class that is not known as safe; says how to allow it.
        """
        value = rest_json.decode(self.rest_json, "rest", self._extra)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path}: {REST_NAME} holds a {type(value).__name__}, a dict was expected.")
        return value

    @cached_property
    def rest_json(self) -> Any:
        """The content of rest.json, from which `rest` is decoded; no object of a saved class is constructed."""
        return parse(self._whole_file(REST_NAME), f"{self.path}/{REST_NAME}")

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill each request. Every rank of the mesh calls it, with its own requests, also with none.

        Raises:
            CheckpointError: on every rank: a tensor or box that the checkpoint does not have, or damaged bytes; names
                the file, block and tensors.
        """
        mine = Filling(requests)

        def look() -> tuple[dict[str, list[tuple[int, int]]], Wanted]:
            for request in requests:
                self._check_request(request)
            blocks = mine.take(read_items_of([(r.key, r.box) for r in requests], self.manifest.tensors))
            if self._mesh.is_single:
                return blocks, ()
            number = {key: i for i, key in enumerate(self.manifest.tensors)}
            return blocks, [(number[r.key], r.box.offset, r.box.size) for r in requests]

        failed = f"{self.path} can't be loaded"
        looked = attempt(self._mesh, look, failed)
        segments = segments_of([blocks for blocks, _ in looked])
        rank = self._mesh.world.rank
        own = [segment for segment in segments if segment.reader == rank]
        if self._check_first:
            attempt(self._mesh, lambda: self._check(own), failed)
        shared = [segment for segment in segments if len(segment.ranks) > 1]
        errors: list[Exception] = []
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="checkpoint reader") as threads:
            if shared:
                sharing = Sharing(self._mesh, mine, self._read_segment, threads, errors)
                world_size = self._mesh.world.size
                nbytes = sharing.run_mapped([mapped_transfer_of(s, self._nbytes(s), world_size) for s in shared])
                if nbytes is None:
                    files = frozenset(segment.file for segment in own)
                    others = Others([wanted for _, wanted in looked], self.manifest.tensors, files)
                    nbytes = sharing.run(self._transfers(shared, mine, failed), others)
                self.bytes_read += nbytes
            alone = [segment for segment in own if len(segment.ranks) == 1]
            attempt(self._mesh, lambda: self._read_alone(alone, mine, threads, errors), failed)

    def check_all(self) -> None:
        """Verify every block of every tensor, divided among the ranks. Every rank calls it.

        For callers of several `read`s, which must know of damage before the first one changes anything. Later reads
        verify blocks as they are read, and make no pass of their own for it.

        Raises:
            CheckpointError: on every rank: a block is damaged; names the file, block and tensors.
        """
        files = {name: file for name, file in self.manifest.files.items() if is_data(name)}
        blocks = {name: [(0, -(-file.size // BLOCK_BYTES))] for name, file in files.items()}
        rank, world_size = self._mesh.world.rank, self._mesh.world.size
        own = [segment for segment in segments_of([blocks] * world_size) if segment.reader == rank]
        attempt(self._mesh, lambda: self._check(own), f"{self.path} can't be loaded")
        self._check_first = False

    def close(self) -> None:
        """Close the checkpoint's folder; nothing can be read after it."""
        self._folder.close()

    # Requests

    def _check_request(self, request: ReadRequest) -> None:
        if is_wrapper(request.out):
            raise CheckpointError(
                f"{request.key}: a plain tensor is filled, found a {type(request.out).__name__}. Give the part that "
                "this rank holds, such as a DTensor's to_local(), and its box."
            )
        record = self.manifest.tensors.get(request.key)
        if record is None:
            raise CheckpointError(f"{request.key} is not in the checkpoint.")
        if not request.box.lies_in(record.info.shape) or tuple(request.out.shape) != request.box.size:
            raise CheckpointError(
                f"{request.key} has shape {record.info.shape}; its part at {request.box.offset} of size "
                f"{request.box.size} was asked for, to fill a tensor of shape {tuple(request.out.shape)}."
            )

    # Reading

    def _check(self, segments: Sequence[Segment]) -> None:
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="checkpoint reader") as threads:
            buffers = Buffers(is_pinned=False)

            def check(segment: Segment) -> int:
                with buffers.take() as buffer:
                    return self._read_segment(segment, buffer)

            self.bytes_checked += sum(threads.map(check, segments))

    def _read_alone(
        self, segments: Sequence[Segment], mine: Filling, threads: ThreadPoolExecutor, errors: list[Exception]
    ) -> None:
        if errors:
            raise errors[0]
        buffers = Buffers(mine.is_pinned)

        def read(segment: Segment) -> int:
            with buffers.take() as buffer:
                data = buffer[: self._nbytes(segment)]
                destinations = mine.destinations(segment, data)
                nbytes = self._read_verified(segment, *destinations.memory)
                mine.scatter_left(segment, destinations, data)
                return nbytes

        self.bytes_read += sum(threads.map(read, segments))

    def _transfers(self, shared: Sequence[Segment], mine: Filling, failed: str) -> list[Transfer]:
        """The transfers of shared segments, the same on every rank. Every rank calls it."""
        rank = self._mesh.world.rank

        def wanted_bytes() -> array[int]:
            return array("q", (sum(w.packed_bytes for w in mine.parts_of(s)) if rank in s.ranks else 0 for s in shared))

        wanted = attempt(self._mesh, wanted_bytes, failed)
        return [
            transfer_of(segment, self._nbytes(segment), [counts[i] for counts in wanted])
            for i, segment in enumerate(shared)
        ]

    def _nbytes(self, segment: Segment) -> int:
        return min(segment.stop * BLOCK_BYTES, self.manifest.files[segment.file].size) - segment.first * BLOCK_BYTES

    def _read_segment(self, segment: Segment, buffer: Tensor) -> int:
        """Fill the beginning of `buffer` with a segment's bytes, verified. Returns their number."""
        data: memoryview = buffer.numpy().data[: self._nbytes(segment)]
        return self._read_verified(segment, data)

    def _read_verified(self, segment: Segment, *outs: memoryview) -> int:
        """Fill buffers, together as long as a segment, with its bytes, verified. Returns their number."""
        sums = self._block_sums(segment.file)
        self._folder.read_into(segment.file, segment.first * BLOCK_BYTES, *outs)
        damaged = sums.first_damaged(segment.first, *outs)
        if damaged is not None:
            holds = tensors_in_block(self.manifest, segment.file, damaged)
            raise CheckpointError(
                f"{self.path}: {segment.file} is damaged in block {damaged} (bytes {damaged * BLOCK_BYTES} to "
                f"{(damaged + 1) * BLOCK_BYTES}), which holds {holds}. "
                "Load an earlier checkpoint."
            )
        return self._nbytes(segment)

    def _block_sums(self, file: str) -> BlockSums:
        with self._lock:
            if file not in self._sums:
                name = blocks_name(file)
                size = self.manifest.files[file].size
                self._sums[file] = BlockSums(self._whole_file(name), size, f"{self.path}/{name}")
            return self._sums[file]

    def _whole_file(self, name: str) -> bytes:
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path}/{MANIFEST_NAME} does not list {name}, so it can't be verified.")
        data = self._folder.read(name)
        if hex_digest(data) != self.manifest.files[name].xxh3:
            raise CheckpointError(f"{self.path}: {name} is damaged. Load an earlier checkpoint.")
        return data

    def _extra(self, name: str) -> Tensor:
        """A tensor within `rest` or an optimizer's record, by its name, read to the host by this rank alone."""
        key = TensorKey(EXTRA, name)
        if key not in self.manifest.tensors:
            raise CheckpointError(f"{key} is not in the checkpoint.")
        info = self.manifest.tensors[key].info
        request = ReadRequest(key, whole_box(info.shape), torch.empty(info.shape, dtype=info.dtype))
        mine = Filling([request])
        wanted = mine.take(read_items_of([(key, request.box)], self.manifest.tensors))
        for segment in segments_of([wanted]):
            buffer = torch.empty(self._nbytes(segment), dtype=torch.uint8)
            self._read_segment(segment, buffer)
            mine.scatter(segment, buffer)
        return request.out


def tensors_in_block(manifest: Manifest, file: str, block: int) -> str:
    """The tensors that a block of a file holds parts of, for messages."""
    low, high = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
    found = [
        str(key)
        for key, record in manifest.tensors.items()
        if any(
            chunk.start < high and chunk.start + chunk.box.numel * record.info.dtype.itemsize > low
            for chunk in chunks_in(record.chunks, frozenset({file}))
        )
    ]
    shown = ", ".join(found[:3]) or "the file's header"
    return shown + (f" and {len(found) - 3} more" if len(found) > 3 else "")
