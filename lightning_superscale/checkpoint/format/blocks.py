"""Checksums per block of a file, so that a part of a file can be verified without reading the rest.

Block `i` of a file is its bytes [i, i + 1) MiB, headers included; the last block may be shorter. Checksums are xxh3-64,
and a blocks file holds those of all blocks, in order, as little-endian 64-bit numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from lightning_superscale.errors import CheckpointError

BLOCK_BYTES = 2**20
_SUM_BYTES = 8


def hex_digest(data: bytes | bytearray | memoryview) -> str:
    """The xxh3-64 checksum of bytes, as the manifest writes it: 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def num_blocks(size: int) -> int:
    """The number of blocks of a file of `size` bytes."""
    return -(-size // BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and checksums of a file that was written.

    Attributes:
        size: size of the file in bytes.
        xxh3: checksum of all its bytes, hexadecimal.
        blocks: content of its blocks file, the checksums of its blocks.
    """

    size: int
    xxh3: str
    blocks: bytes


class BlockHasher:
    """Checksums of a file and its blocks, computed while the file is written front to back."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_64()
        self._block = xxhash.xxh3_64()
        self._sums: list[int] = []
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes that the hasher was given so far."""
        return self._size

    def update(self, data: memoryview) -> None:
        """Add the file's next bytes; `data` is flat and of itemsize 1."""
        self._whole.update(data)
        while data:
            room = BLOCK_BYTES - self._size % BLOCK_BYTES
            part, data = data[:room], data[room:]
            self._block.update(part)
            self._size += len(part)
            if self._size % BLOCK_BYTES == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._sums.append(self._block.intdigest())
        self._block.reset()

    def digest(self) -> FileDigest:
        """The checksums of the file, once all bytes were added; nothing may be added after it."""
        if self._size % BLOCK_BYTES:
            self._end_block()
        return FileDigest(self._size, self._whole.hexdigest(), struct.pack(f"<{len(self._sums)}Q", *self._sums))


class BlockSums:
    """The checksums of a data file's blocks, read from its blocks file.

    Args:
        data: content of the blocks file.
        size: bytes of the data file.
        where: the blocks file, for messages.

    Raises:
        CheckpointError: the blocks file does not have a checksum for each block.
    """

    def __init__(self, data: bytes, size: int, where: str) -> None:
        if len(data) != num_blocks(size) * _SUM_BYTES:
            raise CheckpointError(
                f"{where}: {num_blocks(size)} blocks were expected for its {size} bytes, found checksums of "
                f"{len(data) / _SUM_BYTES:g}."
            )
        self._sums = struct.unpack(f"<{len(data) // _SUM_BYTES}Q", data)

    def first_damaged(self, first_block: int, *parts: memoryview) -> int | None:
        """The number of the first block that does not have its checksum, or None.

        Args:
            first_block: number of the block that the bytes begin with.
            parts: consecutive bytes of the file, in buffers of any sizes; they end at the end of a block or of the
                file.
        """
        for block, own in enumerate(_cut_in_blocks(parts), first_block):
            if _digest(own) != self._sums[block]:
                return block
        return None


def _cut_in_blocks(parts: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The parts of each block, in order."""
    own, room = [], BLOCK_BYTES
    for part in parts:
        while part:
            own.append(part[:room])
            part, room = part[room:], room - len(own[-1])
            if not room:
                yield own
                own, room = [], BLOCK_BYTES
    if own:
        yield own


def _digest(parts: Sequence[memoryview]) -> int:
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    hasher = xxhash.xxh3_64()
    for part in parts:
        hasher.update(part)
    return hasher.intdigest()
