"""Which tokens of a sequence each rank has.

[Note: Zigzag] With causal attention a query late in the sequence sees more keys than an early one. Consecutive parts
would leave the first rank with next to no work in a ring. So the sequence is cut into twice as many parts as there are
ranks, and each has one from either end: the r-th and the r-th from the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_superscale.errors import SequenceParallelError

Order = Literal["consecutive", "zigzag"]


@dataclass(frozen=True)
class TokenSpans:
    """The parts of a sequence by rank.

    Attributes:
        num_tokens: of the whole sequence.
        size: number of ranks.
        order: consecutive parts, or one from either end ([Note: Zigzag]).

    Raises:
        SequenceParallelError: tokens that don't divide.
    """

    num_tokens: int
    size: int
    order: Order = "consecutive"

    def __post_init__(self) -> None:
        if self.num_tokens % self.multiple:
            raise SequenceParallelError(
                f"a sequence of {self.num_tokens} tokens does not divide into {self.multiple} equal parts for "
                f"{self.size} ranks; pad it to a multiple of {self.multiple}"
            )

    @property
    def multiple(self) -> int:
        """The number of parts."""
        return self.size * (2 if self.order == "zigzag" else 1)

    @property
    def per_rank(self) -> int:
        """The number of tokens that each rank has."""
        return self.num_tokens // self.size

    def of(self, rank: int) -> tuple[slice, ...]:
        """The positions of a rank's tokens, in the order in which it has them."""
        length = self.num_tokens // self.multiple
        parts = (rank,) if self.order == "consecutive" else (rank, self.multiple - 1 - rank)
        return tuple(slice(part * length, (part + 1) * length) for part in parts)

    def take(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's tokens of a tensor of all of them; a view where they are consecutive."""
        parts = [x.narrow(dim, span.start, span.stop - span.start) for span in self.of(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """All tokens in order, from those of each rank."""
        at: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            spans = self.of(rank)
            at.update({span.start: piece for span, piece in zip(spans, part.chunk(len(spans), dim), strict=True)})
        return torch.cat([at[start] for start in sorted(at)], dim)
