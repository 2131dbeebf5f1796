"""All chunks of a save as one table: what ranks tell the first one of what they wrote, and the records it makes of it.

Hundreds of ranks write thousands of chunks each. As numbers they travel, sort and lie in memory at a tenth of what they
take as objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns
from lightning_superscale.checkpoint.format.manifest import TensorRecord
from lightning_superscale.checkpoint.save.plan import entry_prefix
from lightning_superscale.checkpoint.state import TensorInfo, TensorKey

# A tensor with as many chunks is written as columns, which only readers of the format 1.1 know; fewer are legible and
# can be read by all.
MANY_CHUNKS = 64


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """The chunks that one rank wrote.

    Attributes:
        files: names of the files.
        rows: int64 of shape [num_chunks, 4 + 2 * most dims]: index of the tensor among the sorted keys, index of the
            file in `files`, number of the entry, first byte, offset along each dim, size along each dim. Tensors of
            fewer dims end in zeros, within the offset and within the size.
    """

    files: tuple[str, ...]
    rows: Tensor


def table_of(chunks: Iterable[tuple[TensorKey, Chunk]], tensors: Mapping[TensorKey, TensorInfo]) -> ChunkTable:
    """The table of a rank's chunks.

    Args:
        chunks: each chunk and its tensor.
        tensors: all tensors of the checkpoint.
    """
    places = {key: i for i, key in enumerate(sorted(tensors))}
    dims = _most_dims(tensors)
    files: dict[str, int] = {}
    rows = []
    for key, chunk in chunks:
        number = int(chunk.entry.removeprefix(entry_prefix(key)))
        rest = (0,) * (dims - len(chunk.box.size))
        at = files.setdefault(chunk.file, len(files))
        rows.append((places[key], at, number, chunk.start, *chunk.box.offset, *rest, *chunk.box.size, *rest))
    return ChunkTable(tuple(files), torch.tensor(rows, dtype=torch.int64).view(len(rows), 4 + 2 * dims))


def records_of(
    tables: Sequence[ChunkTable], tensors: Mapping[TensorKey, TensorInfo], files: Iterable[str]
) -> dict[TensorKey, TensorRecord]:
    """The record of each tensor, with the chunks that all ranks wrote of it.

    Args:
        tables: each rank's table, by rank.
        tensors: all tensors of the checkpoint.
        files: names of all its files. A manifest counts them, so that columns are proven and written as they are.
    """
    keys, dims = sorted(tensors), _most_dims(tensors)
    names = tuple(sorted(files))
    places = {name: i for i, name in enumerate(names)}
    parts = [torch.empty((0, 4 + 2 * dims), dtype=torch.int64)]
    for table in tables:
        places_of = torch.tensor([places[name] for name in table.files], dtype=torch.int64)
        parts.append(torch.cat((table.rows[:, :1], places_of[table.rows[:, 1:2]], table.rows[:, 2:]), dim=1))
    rows = torch.cat(parts)
    del parts
    rows = rows[rows[:, 0].argsort(stable=True)]
    counts = torch.bincount(rows[:, 0], minlength=len(keys)).tolist()
    records = {}
    for key, own in zip(keys, torch.split(rows, counts), strict=True):
        ndim = len(tensors[key].shape)
        bounds = (own[:, 4 : 4 + ndim], own[:, 4 + dims : 4 + dims + ndim])
        columns = ChunkColumns(names, entry_prefix(key), torch.cat((own[:, 1:4], *bounds), dim=1))
        records[key] = TensorRecord(tensors[key], columns if len(columns) >= MANY_CHUNKS else tuple(columns))
    return records


def _most_dims(tensors: Mapping[TensorKey, TensorInfo]) -> int:
    return max((len(info.shape) for info in tensors.values()), default=0)
