"""A foreign checkpoint as a table of its tensors, each with its chunks in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.format.malformed import malformed_as_error
from lightning_superscale.checkpoint.state import OptimizerRecord, ReadRequest, Role, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError, did_you_mean
from lightning_superscale.layout.box import Box, flat_boxes, whole_box

# One slice for each tensor dim.
Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class ForeignChunk:
    """A box of a tensor that lies in one file.

    Attributes:
        box: the box, in the unsharded tensor.
        read: returns the values at an index within the chunk, in the tensor's dtype; reads as little of the file as its
            format allows.
        file: name of the file, for messages, and for ordering reads by file.
    """

    box: Box
    read: Callable[[Index], Tensor]
    file: str


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor's description and its chunks, which cover each element once."""

    info: TensorInfo
    chunks: tuple[ForeignChunk, ...]


Table = dict[TensorKey, ForeignTensor]


def reader(tensor: Tensor, dtype: torch.dtype | None = None) -> Callable[[Index], Tensor]:
    """A `ForeignChunk.read` for a mapped tensor.

    Args:
        dtype: dtype that values are converted to; None for the tensor's own.
    """
    return (lambda index: tensor[index]) if dtype is None else (lambda index: tensor[index].to(dtype))


def check_dense(tensor: Tensor, file: str, name: str = "a tensor") -> None:
    """Refuse tensors whose values can't be read part by part.

    Raises:
        CheckpointError: a sparse, nested or quantized tensor, or one on the meta device; names the kind and `name`.
    """
    kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized, "meta": tensor.is_meta}
    kind = next((kind for kind, is_one in kinds.items() if is_one), None)
    if kind is None and tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
    if kind is not None:
        raise CheckpointError(
            f"{name} in {file} is a {kind} tensor, and only those with dense values can be read. Save its to_dense() "
            "or dequantize(), or leave it out."
        )


def whole_tensor(tensor: Tensor, role: Role, file: str, *, trainable: bool = False) -> ForeignTensor:
    """An entry for a mapped tensor that a file holds in one chunk.

    Args:
        file: the file, for messages.
        trainable: whether a weight has gradients.

    Raises:
        CheckpointError: a tensor that has no dense values.
    """
    check_dense(tensor, file)
    shape = tuple(tensor.shape)
    chunk = ForeignChunk(whole_box(shape), reader(tensor), file)
    return ForeignTensor(TensorInfo(tensor.dtype, shape, role, trainable), (chunk,))


def flat_chunks(
    shape: Sequence[int], start: int, values: Tensor, file: str, dtype: torch.dtype | None = None
) -> list[ForeignChunk]:
    """The chunks of a tensor that `values` [n] hold, which are its elements [start, start + n) when flattened.

    Args:
        shape: shape of the unsharded tensor.
        start: number of the first element.
        values: the elements, a mapped 1-D tensor.
        file: the file, for messages.
        dtype: dtype that values are converted to; None for that of `values`.
    """
    chunks, done = [], 0
    for box in flat_boxes(shape, start, start + values.numel()):
        part = values[done : done + box.numel].view(box.size)
        chunks.append(ForeignChunk(box, reader(part, dtype), file))
        done += box.numel
    return chunks


@dataclass(slots=True)
class ForeignSource:
    """A StateSource over mapped files; `read` alone reads tensors' values.

    Attributes:
        path: path of the checkpoint, for messages.
        table: all tensors but those within the rest.
        step: optimizer steps taken; None where the format does not say.
        records: a record for each optimizer, by index.
        aliases: name of a tied weight -> the name under which it is saved.
        make_rest: reads the part of the checkpoint that is neither weights nor optimizers; called once, at the first
            use of `rest`.
        names_missing: why `optimizers` raises an error, where the file has states without parameters' names; else "".
            Weights can be read all the same.

    Raises:
        CheckpointError: chunks of a tensor have gaps or overlap.
    """

    path: str
    table: Table
    step: int | None = None
    records: tuple[OptimizerRecord, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    make_rest: Callable[[], dict[str, Any]] = dict
    names_missing: str = ""
    _rest: dict[str, Any] | None = field(init=False, default=None)
    _tensors: dict[TensorKey, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        for key, entry in self.table.items():
            _check_covers(self.path, key, entry)
        self._tensors = {key: entry.info for key, entry in self.table.items()}

    @property
    def tensors(self) -> Mapping[TensorKey, TensorInfo]:
        return self._tensors

    @property
    def optimizers(self) -> tuple[OptimizerRecord, ...]:
        if self.names_missing:
            raise CheckpointError(self.names_missing)
        return self.records

    @property
    def rest(self) -> dict[str, Any]:
        if self._rest is None:
            with malformed_as_error(f"{self.path} can't be read beside its tensors"):
                self._rest = dict(self.make_rest())
        return self._rest

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill each request with values from the checkpoint's files. Each rank reads for itself.

        Raises:
            CheckpointError: the checkpoint lacks a tensor or box, or a file is damaged.
        """
        jobs: list[tuple[ForeignChunk, Box, ReadRequest]] = []
        for request in requests:
            entry = self._entry(request)
            for chunk in entry.chunks:
                part = chunk.box.intersect(request.box)
                if part is not None:
                    jobs.append((chunk, part, request))
        jobs.sort(key=lambda job: (job[0].file, str(job[2].key), job[0].box))
        for chunk, part, request in jobs:
            target = request.out[part.within(request.box)]
            with malformed_as_error(f"{request.key} in {chunk.file} can't be read"):
                values = chunk.read(part.within(chunk.box))
            if values.shape != target.shape:
                raise CheckpointError(
                    f"{request.key} in {chunk.file} should have {part.size} values at {part.offset}, found "
                    f"{tuple(values.shape)}. The file is damaged."
                )
            target.copy_(values.detach())  # DeepSpeed saves masters that require gradients

    def close(self) -> None:
        """Release the mapped files; nothing can be read after it."""
        self.table.clear()

    def _entry(self, request: ReadRequest) -> ForeignTensor:
        key, entry = request.key, self.table.get(request.key)
        if entry is None:
            hint = did_you_mean(key.name, [k.name for k in self.table if k.section == key.section])
            if key.name in self.aliases:
                hint = f"; it is tied to {self.aliases[key.name]!r}, under which it is saved"
            raise CheckpointError(f"{self.path} has no {key}{hint}.")
        if not request.box.lies_in(entry.info.shape) or tuple(request.out.shape) != request.box.size:
            raise CheckpointError(
                f"{key} in {self.path} has shape {entry.info.shape}; asked for {request.box.size} values at "
                f"{request.box.offset}, into a tensor of shape {tuple(request.out.shape)}."
            )
        return entry


def _check_covers(path: str, key: TensorKey, entry: ForeignTensor) -> None:
    """Raise a CheckpointError unless each element of a tensor is in exactly one chunk."""
    why = uncovered(entry.info.shape, [chunk.box for chunk in entry.chunks])
    if why is not None:
        raise CheckpointError(f"{key} in {path} is not complete: {why}. A file is missing or damaged.")
