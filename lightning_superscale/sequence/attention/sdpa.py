"""torch's scaled_dot_product_attention as an attention on one device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

plain_attention = functional.scaled_dot_product_attention
"""torch's own function, taken when this module is loaded: later its name may stand for a replacement."""


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
