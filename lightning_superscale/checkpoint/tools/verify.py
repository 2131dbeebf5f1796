"""Checks that a checkpoint is complete and undamaged: every byte, every file, every element."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash

from lightning_superscale.checkpoint.format.blocks import BLOCK_BYTES, BlockSums, hex_digest
from lightning_superscale.checkpoint.format.chunks import chunks_in
from lightning_superscale.checkpoint.format.dtypes import dtype_name
from lightning_superscale.checkpoint.format.malformed import parse
from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME, Manifest, blocks_name, is_data
from lightning_superscale.checkpoint.load.reader import tensors_in_block
from lightning_superscale.checkpoint.state import ReadRequest, StateSource, TensorKey
from lightning_superscale.checkpoint.storage.files import Folder, open_folder
from lightning_superscale.checkpoint.tools.chunks import batches
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box

_CHUNK_BYTES = 8 * BLOCK_BYTES
# The largest safetensors header that is read; a longer length is damage.
_MAX_HEADER_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """A defect of a checkpoint.

    Attributes:
        file: name of the file.
        problem: the defect of the file, as the rest of a sentence, such as "is missing".
        block: number of the damaged block; None where the defect is of the file.
        holds: names of the tensors that the defect affects; "" where unknown.
    """

    file: str
    problem: str
    block: int | None = None
    holds: str = ""

    def __str__(self) -> str:
        where = "" if self.block is None else f", block {self.block}"
        return f"{self.file}{where}: {self.problem}" + (f" (holds {self.holds})" if self.holds else "")


def verify(path: str, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Read all of a universal checkpoint, and check its manifest, files, checksums and headers. One process calls it.

    Args:
        path: path or URL of the checkpoint.
        progress: called with the number of bytes that were checked so far, and of all bytes.

    Returns:
        The defects; empty where there are none. A manifest that can be read proves that all tensors are complete.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = open_folder(path)
    try:
        try:
            manifest = Manifest.from_bytes(folder.read(MANIFEST_NAME), MANIFEST_NAME)
        except CheckpointError as error:
            return [Finding(MANIFEST_NAME, str(error))]
        if manifest.root:
            folder.close()
            folder = open_folder(path, manifest.root)
        return _Verification(folder, manifest, progress).run()
    finally:
        folder.close()


def read_through(source: StateSource) -> list[Finding]:
    """Read every tensor of a checkpoint once, for formats without checksums. One process calls it.

    Only tensors that can't be read are found; altered values are not. Memory stays at one slab.

    Returns:
        A defect for each tensor that can't be read.
    """
    findings: dict[TensorKey, Finding] = {}
    for batch in batches(source.tensors, sorted(source.tensors)):
        try:
            _read(source, batch)
        except CheckpointError:
            for key, box in batch:
                try:
                    _read(source, [(key, box)])
                except CheckpointError as error:
                    findings.setdefault(key, Finding(source.path, str(error), None, str(key)))
    return list(findings.values())


def _read(source: StateSource, batch: list[tuple[TensorKey, Box]]) -> None:
    source.read([ReadRequest(key, box, torch.empty(box.size, dtype=source.tensors[key].dtype)) for key, box in batch])


class _Verification:
    def __init__(self, folder: Folder, manifest: Manifest, progress: Callable[[int, int], None] | None) -> None:
        self._folder = folder
        self._manifest = manifest
        self._progress = progress
        self._total = sum(file.size for file in manifest.files.values())
        self._done = 0

    def run(self) -> list[Finding]:
        findings: list[Finding] = []
        for name in sorted(self._folder.names() - set(self._manifest.files) - {MANIFEST_NAME}):
            findings.append(Finding(name, "is not listed in the manifest"))
        for name, file in sorted(self._manifest.files.items()):
            size = self._folder.size(name)
            if size is None:
                findings.append(Finding(name, "is missing"))
            elif size != file.size:
                findings.append(Finding(name, f"has {size} bytes, {file.size} were expected"))
            else:
                findings += self._check_file(name, size)
            self._advance(file.size if size != file.size else 0)
        return findings

    def _check_file(self, name: str, size: int) -> list[Finding]:
        try:
            findings = self._check_blocks(name, size)
            if not findings and is_data(name):
                findings = self._check_header(name)
        except CheckpointError as error:
            findings = [Finding(name, str(error))]
        return findings

    def _check_blocks(self, name: str, size: int) -> list[Finding]:
        sums = self._sums(name, size) if is_data(name) else None
        whole = xxhash.xxh3_64()
        findings = []
        for start in range(0, size, _CHUNK_BYTES):
            data = memoryview(bytearray(min(_CHUNK_BYTES, size - start)))
            self._folder.read_into(name, start, data)
            whole.update(data)
            for offset in range(0, len(data) if sums is not None else 0, BLOCK_BYTES):
                block = (start + offset) // BLOCK_BYTES
                if sums is not None and sums.first_damaged(block, data[offset : offset + BLOCK_BYTES]) is not None:
                    holds = tensors_in_block(self._manifest, name, block)
                    findings.append(Finding(name, "is damaged", block, holds))
            self._advance(len(data))
        if not findings and whole.hexdigest() != self._manifest.files[name].xxh3:
            findings.append(Finding(name, "does not have its checksum"))
        return findings

    def _sums(self, name: str, size: int) -> BlockSums | None:
        """The checksums of a file's blocks; None where their file is lost or damaged, which is another finding."""
        sums = blocks_name(name)
        if sums not in self._manifest.files or self._folder.size(sums) is None:
            return None
        data = self._folder.read(sums)
        return BlockSums(data, size, sums) if hex_digest(data) == self._manifest.files[sums].xxh3 else None

    def _check_header(self, name: str) -> list[Finding]:
        """Defects of a file's safetensors header: entries that differ from the manifest's chunks."""
        length = bytearray(8)
        self._folder.read_into(name, 0, memoryview(length))
        (nbytes,) = struct.unpack("<Q", length)
        if nbytes > min(_MAX_HEADER_BYTES, self._manifest.files[name].size):
            return [Finding(name, "has no safetensors header")]
        header = bytearray(nbytes)
        self._folder.read_into(name, 8, memoryview(header))
        try:
            entries = dict(parse(bytes(header), name))
        except (CheckpointError, TypeError, ValueError):
            return [Finding(name, "has no safetensors header")]
        findings = []
        for key, record in self._manifest.tensors.items():
            for chunk in chunks_in(record.chunks, frozenset({name})):
                start = chunk.start - 8 - nbytes
                expected = {
                    "dtype": dtype_name(record.info.dtype, key),
                    "shape": list(chunk.box.size),
                    "data_offsets": [start, start + chunk.box.numel * record.info.dtype.itemsize],
                }
                if entries.get(chunk.entry) != expected:
                    findings.append(Finding(name, f"has another entry {chunk.entry} than the manifest", None, str(key)))
        return findings

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
