"""Chunks: where in which file each part of a tensor lies.

A checkpoint of hundreds of ranks has a million chunks. Those of one tensor are then kept as columns of numbers, which
are checked, searched and written together; single chunks are made as they are asked for.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from lightning_superscale.layout.box import Box

# The columns before those of the boxes.
_FILE, _NUMBER, _START, _BOUNDS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor that a file holds in consecutive bytes.

    Attributes:
        file: name of the file, relative to the manifest's `root`.
        entry: name of the chunk in the file's safetensors header.
        start: place of its first byte, counted from the beginning of the file.
        box: the box, in the unsharded tensor.
    """

    file: str
    entry: str
    start: int
    box: Box


@functools.lru_cache(maxsize=2**16)
def box_of(offset: tuple[int, ...], size: tuple[int, ...]) -> Box:
    """The box of a chunk; layers of a model are cut alike, so most chunks share theirs."""
    return Box(offset, size)


class ChunkColumns(Sequence[Chunk]):
    """The chunks of one tensor, as columns.

    Args:
        names: the files' names.
        prefix: what the chunks' entries begin with; each ends in its number.
        table: int64 of shape [num_chunks, 3 + 2 * ndim]. Columns: index of the file in `names`, number of the entry,
            first byte, then offset and size along each of the tensor's dims.

    Raises:
        ValueError: the table has another dtype or width, or a file or a box that can't be.
    """

    def __init__(self, names: tuple[str, ...], prefix: str, table: Tensor) -> None:
        if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] < _BOUNDS or (table.shape[1] - _BOUNDS) % 2:
            raise ValueError(f"chunks need int64 columns, found {table.dtype} of shape {tuple(table.shape)}")
        rows = table.numpy()
        if (rows[:, _BOUNDS:] < 0).any():
            raise ValueError("a chunk has an offset or a size below 0")
        files = rows[:, _FILE]
        if files.size and not 0 <= files.min() <= files.max() < len(names):
            raise ValueError("a chunk lies in a file that is not listed")
        self.names, self.prefix, self.table = names, prefix, table

    def __len__(self) -> int:
        return self.table.shape[0]

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Chunk]: ...

    def __getitem__(self, index: int | slice) -> Chunk | Sequence[Chunk]:
        if isinstance(index, slice):
            return ChunkColumns(self.names, self.prefix, self.table[index])
        return self._chunk(self.table[index].tolist())

    def __iter__(self) -> Iterator[Chunk]:
        return map(self._chunk, self.table.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChunkColumns):
            return NotImplemented
        if self.prefix == other.prefix and self.names == other.names:
            return torch.equal(self.table, other.table)
        return [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]  # equal by value, and not for keys

    @property
    def ndim(self) -> int:
        """Number of the tensor's dims."""
        return (self.table.shape[1] - _BOUNDS) // 2

    def select(self, files: frozenset[str]) -> Iterator[Chunk]:
        """The chunks that lie in any of these files, in order."""
        return map(self._chunk, self.table[_are_among(self.names, files)[self.table[:, _FILE]]].tolist())

    def rows(self) -> tuple[list[int], list[int]]:
        """First row and number of rows of each chunk of a tensor with dims."""
        return self.table[:, _BOUNDS].tolist(), self.table[:, _BOUNDS + self.ndim].tolist()

    def are_proven(self, shape: Sequence[int], itemsize: int, file_sizes: Tensor) -> bool:
        """Whether the chunks are the tensor's rows, each once, aligned and within their files.

        False proves nothing: chunks that are no whole rows can be complete too.

        Args:
            file_sizes: bytes of each file, int64, in the order of `names`.
        """
        # Beyond that, numbers of bytes could overflow and a wrong place seem right.
        if not shape or len(shape) != self.ndim or math.prod(shape) * itemsize >= 2**62 or not len(self):
            return False
        columns = self.table.numpy().T  # whose small operations take a fifth of the time that torch's take
        offset, size = columns[_BOUNDS : _BOUNDS + self.ndim], columns[_BOUNDS + self.ndim :]
        if any(part.any() for part in offset[1:]):
            return False
        if any((part != extent).any() for part, extent in zip(size[1:], shape[1:], strict=True)):
            return False
        first, count = offset[0], size[0]
        if not (first[1:] >= first[:-1]).all():
            order = first.argsort(kind="stable")
            first, count = first[order], count[order]
        stop = count.cumsum()
        if stop[-1] != shape[0] or count.max() > shape[0] or not (first == stop - count).all():
            return False
        start, room = columns[_START], file_sizes.numpy()[columns[_FILE]]
        nbytes = size[0] * (math.prod(shape[1:]) * itemsize)
        return bool((start >= 0).all() and not (start % itemsize).any() and (start <= room - nbytes).all())

    def to_json(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The JSON form. Each column is a list of integers, or one integer where all are equal.

        Args:
            names: the files' names in the order that the form counts them in.
        """
        files = self.table[:, _FILE]
        if self.names != names:
            places = {name: i for i, name in enumerate(names)}
            files = torch.tensor([places.get(name, -1) for name in self.names])[files]
        bounds = [_packed(column) for column in self.table[:, _BOUNDS:].unbind(1)]
        return {
            "entry": self.prefix,
            "file": _packed(files),
            "number": _packed(self.table[:, _NUMBER]),
            "at": _packed(self.table[:, _START]),
            "offset": bounds[: self.ndim],
            "size": bounds[self.ndim :],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], names: tuple[str, ...]) -> ChunkColumns:
        """The chunks of a JSON form.

        Raises:
            LookupError, TypeError, ValueError: it is none.
        """
        columns = [fields["file"], fields["number"], fields["at"], *fields["offset"], *fields["size"]]
        if len(fields["offset"]) != len(fields["size"]):
            raise ValueError("chunks have another number of offsets than of sizes")
        lengths = {len(column) for column in columns if isinstance(column, list)} or {1}
        if len(lengths) > 1:
            raise ValueError(f"columns of chunks are {sorted(lengths)} long")
        table = torch.empty((*lengths, len(columns)), dtype=torch.int64)
        for i, column in enumerate(columns):
            # An array takes integers of 64 bits and nothing else, and is read at a fifth of what `torch.tensor` takes.
            values = array("q", column if isinstance(column, list) else [column])
            table[:, i] = torch.frombuffer(values, dtype=torch.int64) if values else 0
        return cls(names, str(fields["entry"]), table)

    def _chunk(self, row: list[int]) -> Chunk:
        cut = _BOUNDS + self.ndim
        box = box_of(tuple(row[_BOUNDS:cut]), tuple(row[cut:]))
        return Chunk(self.names[row[_FILE]], f"{self.prefix}{row[_NUMBER]}", row[_START], box)


@functools.lru_cache(maxsize=4)
def _are_among(names: tuple[str, ...], files: frozenset[str]) -> Tensor:
    """Of each name, whether it is one of the files; all tensors of a checkpoint ask for the same."""
    return torch.tensor([name in files for name in names], dtype=torch.bool)


def _packed(column: Tensor) -> int | list[int]:
    values: list[int] = column.tolist()
    return values[0] if values and values.count(values[0]) == len(values) else values


def chunks_in(chunks: Sequence[Chunk], files: frozenset[str]) -> Iterator[Chunk]:
    """The chunks that lie in any of these files, in order."""
    if isinstance(chunks, ChunkColumns):
        return chunks.select(files)
    return (chunk for chunk in chunks if chunk.file in files)
