"""Pure shard arithmetic: the places of parameters' rows on ranks and in buffers. No processes, no tensors.

Every transport shards a parameter by rows (tensor dim 0), as DTensor's `Shard(0)` does, and packs the
slices of several parameters into units (buckets). States and checkpoints are therefore the same objects at
every ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Slices start at multiples of this many elements, so that every slice of every dtype is aligned to a
# cache line on the host and to a 128-byte segment on the device.
SLICE_ALIGN_NUMEL = 64


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """The name, the shape and the memory format of one parameter.

    Attributes:
        fqn: its name from the root module.
        strides: strides in elements of its memory, which has no gaps, with whole rows one after the other if any rank
            holds a part of them; None where it is contiguous.
    """

    fqn: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Rows along tensor dim 0; one in a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dims_in_memory(self) -> tuple[int, ...]:
        """Tensor dims from the outermost in memory to the innermost."""
        dims = range(len(self.shape))
        return tuple(dims) if self.strides is None else dims_in_memory(self.shape, self.strides)


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """The rows of one parameter that one rank holds, and their start in its shard buffer.

    Attributes:
        rows: [start, stop) along tensor dim 0 of the whole parameter; empty on a rank with none. A
            scalar counts as one row.
        offset: first element in the rank's shard buffer.
    """

    spec: ParamSpec
    rows: tuple[int, int]
    offset: int

    @property
    def fqn(self) -> str:
        return self.spec.fqn

    @property
    def numel(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.spec.row_numel

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of these rows; () for the only row of a scalar, (0,) on a rank that does not hold it."""
        if not self.spec.shape and self.numel:
            return ()
        return (self.rows[1] - self.rows[0], *self.spec.shape[1:])

    @property
    def global_offset(self) -> int:
        """First element of these rows in the flattened whole parameter, in the order of its memory."""
        return self.rows[0] * self.spec.row_numel


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """The layout of one rank's shard buffer of one unit: slices one after the other, each aligned.

    Attributes:
        slices: this rank's rows of each parameter of the unit.
        shard_numel: elements of the shard buffer with padding, the same on every rank of the shard axis.
    """

    index: int
    slices: tuple[ParamSlice, ...]
    shard_numel: int


def dims_in_memory(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Tensor dims from the outermost in memory to the innermost; dims of one element, which have no place, last."""
    return tuple(sorted(range(len(shape)), key=lambda dim: (shape[dim] == 1, -strides[dim], dim)))


def kept_strides(shape: Sequence[int], strides: Sequence[int], shard_world_size: int) -> tuple[int, ...] | None:
    """The strides that a parameter can keep in a flat buffer of rows; None where it has to be contiguous.

    Its elements must be dense and without overlap; and where several ranks have rows, each row must be in one piece.
    """
    dims, stride = dims_in_memory(shape, strides), 1
    for dim in reversed(dims):
        if shape[dim] > 1:
            if strides[dim] != stride:
                return None
            stride *= shape[dim]
    is_by_rows = shard_world_size == 1 or not dims or shape[0] == 1 or dims[0] == 0
    return tuple(strides) if math.prod(shape) and is_by_rows else None


def align_up(numel: int, align: int = SLICE_ALIGN_NUMEL) -> int:
    """The smallest multiple of `align` that is at least `numel`."""
    return -(-numel // align) * align


def shard_rows(num_rows: int, rank: int, shard_world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of `rank`: chunks of ceil(num_rows / shard_world_size), as DTensor's Shard(0) cuts.

    Raises:
        ValueError: `rank` is not in [0, shard_world_size).
    """
    if not 0 <= rank < shard_world_size:
        raise ValueError(f"rank must be in [0, {shard_world_size}), found {rank}")
    chunk = -(-num_rows // shard_world_size)
    start = min(rank * chunk, num_rows)
    return start, min(start + chunk, num_rows)


def unit_layout(index: int, specs: Sequence[ParamSpec], rank: int, shard_world_size: int) -> UnitLayout:
    """The layout of one unit on one rank. Slices keep the order of `specs`.

    Rank 0 holds the most rows of each parameter, so its slices' lengths decide the offsets on every rank.
    """
    slices = []
    offset = 0
    shard_numel = 0
    for spec in specs:
        rows = shard_rows(spec.num_rows, rank, shard_world_size)
        slices.append(ParamSlice(spec, rows, offset))
        # Offsets follow rank 0's slice lengths on every rank, so that a slice starts at one place everywhere.
        longest = shard_rows(spec.num_rows, 0, shard_world_size)
        offset = align_up(offset + (longest[1] - longest[0]) * spec.row_numel)
        shard_numel = offset
    return UnitLayout(index, tuple(slices), shard_numel)


def split_into_units(specs: Sequence[ParamSpec], unit_numel: int) -> list[list[ParamSpec]]:
    """Cut an ordered list of parameters into runs of at most `unit_numel` elements.

    A parameter is never cut; one that is larger than `unit_numel` has a unit of its own.

    Raises:
        ValueError: `unit_numel` is below 1.
    """
    if unit_numel < 1:
        raise ValueError(f"unit_numel must be at least 1, found {unit_numel}")
    units: list[list[ParamSpec]] = []
    filled = 0
    for spec in specs:
        if units and filled + spec.numel <= unit_numel:
            units[-1].append(spec)
            filled += spec.numel
        else:
            units.append([spec])
            filled = spec.numel
    return units
