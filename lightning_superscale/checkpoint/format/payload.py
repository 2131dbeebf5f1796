"""Data files of a checkpoint: safetensors, written front to back without a copy of a file in memory.

The container is safetensors, so that any program can read the tensors. Its entries are aligned: an entry whose size is
a multiple of 64 bytes starts at a multiple of 64, and every other entry at a multiple of its dtype's size. The format
forbids gaps, so the order of the entries aligns them: first those of a multiple of 64 bytes, then the others by falling
item size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format.blocks import BlockHasher, FileDigest
from lightning_superscale.checkpoint.format.dtypes import dtype_name
from lightning_superscale.checkpoint.storage.files import FileWriter
from lightning_superscale.layout.box import flat_boxes, whole_box
from lightning_superscale.torch_private import is_traceable_wrapper_subclass

ALIGNMENT = 64
# Bytes of a tensor that are copied to the host, or made contiguous, at a time.
_CHUNK_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class FileEntry:
    """The description of a tensor that a file is going to hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize


def sort_entries(entries: Sequence[FileEntry]) -> list[int]:
    """Indices of the entries in the order that aligns them: multiples of 64 bytes first, then by falling item size."""

    def place(i: int) -> tuple[bool, int, str]:
        is_odd = entries[i].nbytes % ALIGNMENT != 0
        return is_odd, -entries[i].dtype.itemsize if is_odd else 0, entries[i].name

    return sorted(range(len(entries)), key=place)


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a file.

    Attributes:
        header: the file's first bytes: the length of the safetensors header and the header.
        starts: place of each entry's first byte, counted from the beginning of the file.
    """

    header: bytes
    starts: tuple[int, ...]


def layout(entries: Sequence[FileEntry], uuid: str) -> Layout:
    """The layout of a file with these entries, in this order.

    Args:
        uuid: id of the checkpoint, noted in the header.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt", "lucp": uuid}}
    offsets, end = [], 0
    for entry in entries:
        offsets.append(end)
        end += entry.nbytes
        fields[entry.name] = {
            "dtype": dtype_name(entry.dtype, entry.name),
            "shape": list(entry.shape),
            "data_offsets": [offsets[-1], end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Layout(header, tuple(len(header) + offset for offset in offsets))


class PayloadWriter:
    """Writes one file front to back, and computes its checksums meanwhile."""

    def __init__(self, file: FileWriter) -> None:
        self._file = file
        self._hasher = BlockHasher()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        self._file.write(view)
        self._hasher.update(view)

    def write_tensor(self, tensor: Tensor) -> None:
        """Append the values of a plain tensor of any device and strides, in C order."""
        for chunk in host_chunks(tensor):
            self.write(chunk.numpy().data)

    def finish(self) -> FileDigest:
        """Make the file durable, and return its checksums."""
        self._file.close()
        return self._hasher.digest()


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor wraps other tensors, as a DTensor does, and has no bytes of its own."""
    return is_traceable_wrapper_subclass(tensor)


def host_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor's values in C order, as flat uint8 tensors in host memory; views of it where it allows."""
    tensor = tensor.detach()
    chunk_numel = _CHUNK_BYTES // tensor.element_size()
    is_flat = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    flat = tensor.view(-1) if is_flat else None
    for start in range(0, tensor.numel(), chunk_numel):
        stop = min(start + chunk_numel, tensor.numel())
        if flat is not None:
            parts = [flat[start:stop]]
        else:
            whole = whole_box(tensor.shape)
            parts = [tensor[box.within(whole)] for box in flat_boxes(tensor.shape, start, stop)]
        for part in parts:
            resolved = part.resolve_conj().resolve_neg().contiguous()
            # Not view(-1): a tensor of one element keeps any stride, and a view as bytes needs a stride of 1.
            yield resolved.cpu().as_strided((part.numel(),), (1,)).view(torch.uint8)
