"""Cuts whole parameters into the rows of all ranks, and puts them together again, with few kernels.

[Note: Blocks of ranks] Rows are dealt in equal chunks, so the ranks whose chunk is full are one strided block of the
buffer, and at most one rank has a shorter chunk after them. One or two kernels therefore copy, scale and cast a
parameter, however many ranks there are, and read and write it once. A copy of all parameters in one launch
(`torch._foreach_copy_`, `torch._chunk_cat`) would read and write the whole buffer a second time for the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_superscale.layout.rows import UnitLayout, shard_rows
from lightning_superscale.optim.grad_dtypes import packed_into


class _Chunks(NamedTuple):
    """The chunks in which one parameter's rows are dealt to ranks.

    Attributes:
        numel: elements of a full chunk.
        num_full: number of ranks that have a full chunk; they come first.
        rest: elements of the next rank's shorter chunk; 0 where no rows are left.
    """

    numel: int
    num_full: int
    rest: int


class RankedRows:
    """Places of one unit's parameters in a buffer of all ranks' rows, [shard_world_size, shard_numel].

    Args:
        shard: the layout of any rank's rows.
    """

    def __init__(self, shard: UnitLayout, shard_world_size: int) -> None:
        self._chunks: list[_Chunks] = []
        self._widths: list[int] = []  # of columns: one parameter's, then the gap to the next, and so on
        ends = [*(piece.offset for piece in shard.slices[1:]), shard.shard_numel]
        for piece, end in zip(shard.slices, ends, strict=True):
            first, last = shard_rows(piece.spec.num_rows, 0, shard_world_size)
            num_rows, row_numel = piece.spec.num_rows, piece.spec.row_numel
            num_full = num_rows // (last - first) if last > first else 0
            numel = (last - first) * row_numel
            self._chunks.append(_Chunks(numel, num_full, (num_rows - num_full * (last - first)) * row_numel))
            self._widths += [numel, end - piece.offset - numel]

    def columns(self, packed: Tensor) -> Sequence[Tensor]:
        """Views of each parameter's columns of the buffer, [shard_world_size, numel of a full chunk] each."""
        return packed.split_with_sizes(self._widths, dim=1)[::2]

    def blocks(self, column: Tensor, flat: Tensor, i: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs of views of equal shape: parameter i's rows in its columns of the buffer, and the same rows in `flat`.

        Args:
            column: the parameter's columns, from `columns`.
            flat: the whole parameter, 1D.

        Returns:
            at most two pairs: full chunks, and the shorter one; none for an empty parameter.
        """
        numel, num_full, rest = self._chunks[i]
        if not rest:
            full = column if num_full == column.shape[0] else column[:num_full]
            return [(full, flat.view(num_full, numel))] if num_full and numel else []
        cut = num_full * numel
        tail = (column[num_full, :rest], flat[cut:])
        return [(column[:num_full], flat[:cut].view(num_full, numel)), tail] if num_full else [tail]

    def pack(self, packed: Tensor, grads: Mapping[int, Tensor], scale: float) -> Tensor:
        """Write gradients times `scale` into the buffer that a reduce-scatter reads, and return it.

        Rows of parameters without a gradient become zero; gaps and places of rows that do not exist hold any values.

        Args:
            packed: [shard_world_size, shard_numel], of the dtype in which gradients travel.
            grads: whole gradients by index of the parameter, 1D.
        """
        for i, column in enumerate(self.columns(packed)):
            grad = grads.get(i)
            if grad is None:
                column.zero_()
                continue
            for there, here in self.blocks(column, grad, i):
                packed_into(there, here, scale)
        return packed
