"""Attention on one device: what it is, and torch's scaled_dot_product_attention as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

plain_attention = functional.scaled_dot_product_attention
"""torch's own function, taken when this module is loaded, whatever its name stands for later."""


class Attend(Protocol):
    """An attention on one device."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
        """The output [batch, heads, queries, head dim of v] of attention.

        Args:
            q: [batch, heads, queries, head dim].
            k, v: [batch, key-value heads, keys, head dim]; equally many neighbouring query heads read each head.
            mask: broadcast to [batch, heads, queries, keys]; bool, or a float that is added to scores. None without.
            is_causal: every query sees the keys up to its own, of as many as there are queries; `mask` is None then.
        """
        ...


# Without slots, as what else a compiled block makes: torch 2.11 can't trace a frozen class that has them.
@dataclass(frozen=True)
class Sdpa:
    """`torch.nn.functional.scaled_dot_product_attention`. Satisfies `Attend`.

    Attributes:
        dropout_p: probability of dropping a weight of attention.
        scale: of scores; None for 1 / sqrt(head dim).
    """

    dropout_p: float = 0.0
    scale: float | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
        return plain_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout_p,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
