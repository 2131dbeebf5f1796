"""The attention of a model whose sequences are shared among ranks, with the arguments of torch's own function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.all_gather import all_gather_attention
from lightning_superscale.sequence.attention.masked import attend_masked
from lightning_superscale.sequence.attention.ring import ring_attention
from lightning_superscale.sequence.attention.sdpa import Sdpa
from lightning_superscale.sequence.attention.ulysses import ulysses_attention
from lightning_superscale.sequence.attention.visibility import Visibility
from lightning_superscale.sequence.spans import Order, TokenSpans

Mode = Literal["ulysses", "ring", "allgather"]


@dataclass(frozen=True, kw_only=True)
class SharedAttention:
    """`torch.nn.functional.scaled_dot_product_attention` over the tokens of all ranks.

    Attributes:
        link: the ranks that share each sequence.
        mode: how they attend.
        order: which tokens each rank has; only a ring takes zigzag.
        num_chunks: chunks of heads, with Ulysses.
        documents: [batch or 1, tokens of the whole sequence], if several documents are packed into one sequence.
    """

    link: AxisLink
    mode: Mode = "ulysses"
    order: Order = "consecutive"
    num_chunks: int = 1
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.order == "zigzag" and self.mode != "ring":
            raise SequenceParallelError(f"expected consecutive tokens with mode={self.mode!r}, found order='zigzag'")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        window: int | None = None,
    ) -> Tensor:
        """Attend. Every rank calls it, with its own tokens, in forward and in backward.

        Args:
            query: [batch, heads, tokens, head dim], of this rank's tokens.
            key, value: the same tokens'; with `enable_gqa` of fewer heads.
            attn_mask: over the whole sequence, [..., tokens or 1, tokens of all ranks].
            window: only the last `window` keys up to the query's own, which torch's function does not know.

        Raises:
            SequenceParallelError: tensors of other shapes, or dropout in a ring; says what was found.
        """
        attend = Sdpa(dropout_p, scale)
        self._check(query, key, value, enable_gqa=enable_gqa)
        num_tokens = query.shape[2] * self.link.size
        dense = self._whole_mask(attn_mask, num_tokens)
        sees = Visibility(is_causal=is_causal, window=window, documents=self.documents, dense=dense)
        if self.link.size == 1:
            return attend_masked(query, key, value, sees, attend)
        if self.mode == "ulysses":
            return ulysses_attention(query, key, value, sees, attend, self.link, num_chunks=self.num_chunks)
        if self.mode == "allgather":
            return all_gather_attention(query, key, value, sees, attend, self.link)
        if dropout_p:
            raise SequenceParallelError(
                f"a ring drops no weights of attention, and the model asks for dropout_p={dropout_p}; use "
                "mode='ulysses' or 'allgather', or set the model's attention dropout to 0"
            )
        return ring_attention(query, key, value, sees, self.spans_of(query.shape[2]), self.link, scale=scale)

    def spans_of(self, num_tokens: int) -> TokenSpans:
        """The tokens of each rank, of which this one has so many."""
        return TokenSpans(num_tokens * self.link.size, self.link.size, self.order)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> None:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
        if {query.dim(), key.dim(), value.dim()} != {4}:
            raise SequenceParallelError(
                f"expected query, key and value of shape [batch, heads, tokens, head dim]; found {shapes}"
            )
        if not query.shape[2] == key.shape[2] == value.shape[2]:
            raise SequenceParallelError(
                f"expected as many keys as queries; found {shapes}: attention to another sequence, or with a cache, "
                "can't be shared among ranks. Compute it within `whole_sequences()`, or switch its cache off"
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise SequenceParallelError(f"expected equally many heads, or enable_gqa=True; found {shapes}")

    def _whole_mask(self, mask: Tensor | None, num_tokens: int) -> Tensor | None:
        """The mask with its four dims."""
        if mask is None:
            return None
        if mask.dim() > 4 or mask.shape[-1] != num_tokens or mask.shape[-2] not in (1, num_tokens):
            raise SequenceParallelError(
                f"expected a mask over the whole sequence, [..., {num_tokens} or 1, {num_tokens}], of which this rank "
                f"has {num_tokens // self.link.size} tokens; found {tuple(mask.shape)}"
            )
        return mask[(None,) * (4 - mask.dim())]
