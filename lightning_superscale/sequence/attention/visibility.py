"""Which keys each query of a whole sequence may see, and the part of it that one rank's queries and keys need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.index import chosen


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """The keys that queries see; all conditions hold together. Positions are those in the whole sequence.

    Attributes:
        is_causal: only keys that are not later than the query.
        window: only the last `window` keys up to the query's own, as in sliding-window attention; needs `is_causal`.
        documents: [batch, tokens] or [1, tokens], the document of every token of the whole sequence; keys of other
            documents are not seen.
        dense: [batch or 1, heads or 1, tokens or 1, tokens], bool (True: seen) or a float that is added to scores.

    Raises:
        SequenceParallelError: a window without `is_causal` or of no key, or a dense mask that has not four dims.
    """

    is_causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    dense: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.is_causal):
            raise SequenceParallelError(
                f"expected a window of at least one key, in causal attention; found window={self.window} with "
                f"is_causal={self.is_causal}"
            )
        if self.dense is not None and self.dense.dim() != 4:
            raise SequenceParallelError(
                f"expected a mask of shape [batch, heads, tokens, tokens]; found {tuple(self.dense.shape)}"
            )

    @property
    def is_plain(self) -> bool:
        """Whether every key is seen, or every key that is not later."""
        return self.window is None and self.documents is None and self.dense is None

    def of_heads(self, heads: Sequence[int]) -> Visibility:
        """The same for some query heads.

        Args:
            heads: their numbers.
        """
        if self.dense is None or self.dense.shape[1] == 1:
            return self
        return replace(self, dense=chosen(self.dense, 1, heads))

    def mask(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """The mask of some queries and keys, to be broadcast over batch and heads; None where all keys are seen.

        Returns:
            [batch or 1, heads or 1, queries, keys] (or fewer dims in front), bool or what `dense` adds to scores, then
            -inf where other conditions hide a key.
        """
        seen = self._seen(queries, keys, device)
        if self.dense is None:
            return seen
        rows = queries if self.dense.shape[2] > 1 else slice(None)
        dense = self.dense[:, :, rows, keys]
        if seen is None:
            return dense
        return dense & seen if dense.dtype == torch.bool else dense.masked_fill(~seen, float("-inf"))

    def _seen(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """What causality, window and documents let see; bool."""
        seen = None
        if self.is_causal:
            at = torch.arange(queries.start, queries.stop, device=device)[:, None]
            of = torch.arange(keys.start, keys.stop, device=device)[None, :]
            if keys.stop - 1 > queries.start:
                seen = of <= at
            if self.window is not None and queries.stop - 1 - keys.start >= self.window:
                near = of > at - self.window
                seen = near if seen is None else seen & near
        if self.documents is not None:
            same = (self.documents[:, queries, None] == self.documents[:, None, keys])[:, None]
            seen = same if seen is None else seen & same
        return seen
