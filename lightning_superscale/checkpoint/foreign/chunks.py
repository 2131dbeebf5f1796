"""A foreign checkpoint as a table: which tensors it has, and of which chunks in which files each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.state import OptimizerRecord, ReadRequest, Role, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError, did_you_mean
from lightning_superscale.layout.box import Box, flat_boxes, whole_box

Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class ForeignChunk:
    """A part of a tensor that lies in one file.

    Attributes:
        box: which part.
        read: values at an index within the chunk, in the tensor's dtype; reads no more of the file than its format
            lets it.
        file: for messages, and so that reads of one file follow one another.
    """

    box: Box
    read: Callable[[Index], Tensor]
    file: str


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor and all its chunks."""

    info: TensorInfo
    chunks: tuple[ForeignChunk, ...]


Table = dict[TensorKey, ForeignTensor]


def reader(tensor: Tensor, dtype: torch.dtype | None = None) -> Callable[[Index], Tensor]:
    """Reads from a mapped tensor; of another `dtype` where the checkpoint only holds what a weight is rounded from."""
    return (lambda index: tensor[index]) if dtype is None else (lambda index: tensor[index].to(dtype))


def whole_tensor(tensor: Tensor, role: Role, file: str, *, trainable: bool = False) -> ForeignTensor:
    """A tensor that a file has in one chunk."""
    shape = tuple(tensor.shape)
    chunk = ForeignChunk(whole_box(shape), reader(tensor), file)
    return ForeignTensor(TensorInfo(tensor.dtype, shape, role, trainable), (chunk,))


def flat_chunks(
    shape: Sequence[int], start: int, values: Tensor, file: str, dtype: torch.dtype | None = None
) -> list[ForeignChunk]:
    """The chunks that `values` [n] make, which are elements [start, start + n) of a flattened tensor."""
    chunks, done = [], 0
    for box in flat_boxes(shape, start, start + values.numel()):
        part = values[done : done + box.numel].view(box.size)
        chunks.append(ForeignChunk(box, reader(part, dtype), file))
        done += box.numel
    return chunks


@dataclass(slots=True)
class ForeignSource:
    """A StateSource over mapped files; the values of a tensor are read when they are asked for.

    Attributes:
        make_rest: reads what is neither weights nor optimizers; called once, by who asks for it.
        names_missing: why the optimizers can't be told, where the file has states without parameters' names; raised
            when somebody asks for them. Weights are readable all the same.
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
            self._rest = self.make_rest()
        return self._rest

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill each request with the values that the checkpoint's files hold.

        Raises:
            CheckpointError: a tensor or box that the checkpoint does not have, or a damaged file.
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
            values = chunk.read(part.within(chunk.box))
            if values.shape != target.shape:
                raise CheckpointError(
                    f"{request.key} in {chunk.file} should have {part.size} values at {part.offset}, found "
                    f"{tuple(values.shape)}. The file is damaged."
                )
            target.copy_(values.detach())  # DeepSpeed saves masters that require gradients

    def close(self) -> None:
        """Let go of the files; nothing can be read afterwards."""
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
    """Every element of a tensor must be in exactly one chunk."""
    why = uncovered(entry.info.shape, [chunk.box for chunk in entry.chunks])
    if why is not None:
        raise CheckpointError(f"{key} in {path} is not complete: {why}. A file is missing or damaged.")
