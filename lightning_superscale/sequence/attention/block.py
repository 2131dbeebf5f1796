"""Attention of some queries to some keys, in a form that joins with their attention to others.

Beside the output comes each query's `lse`, the logarithm of the sum of the exponentials of its scores: with it two
outputs are joined as if all keys had been there at once, and backward finds each block's part of the gradients by
itself (FlashAttention, arXiv 2205.14135, section 3.1; Ring Attention, arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.torch_private import cpu_flash_attention, cpu_flash_attention_grads


@dataclass(frozen=True, slots=True)
class Joined:
    """The attention of queries to the keys that they have met so far.

    Attributes:
        output: [batch, heads, queries, dim], fp32 or wider.
        lse: [batch, heads, queries] of the same dtype; -inf where no key was seen, with an output of 0.
    """

    output: Tensor
    lse: Tensor

    def join(self, other: Joined) -> Joined:
        """The attention to the keys of both."""
        lse = torch.logaddexp(self.lse, other.lse)
        output = self.output * _share(self.lse, lse) + other.output * _share(other.lse, lse)
        return Joined(output, lse)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The weight of a part's output in the whole's; 0 where no key was seen."""
    return torch.where(part == float("-inf"), 0.0, (part - whole).exp()).unsqueeze(-1)


def attend_to_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float, fused: bool
) -> Joined:
    """Attention of queries to one block of keys.

    Args:
        q, k, v: [batch, heads, tokens, dim], with as many heads each.
        mask: to be broadcast to [batch, heads, queries, keys]; bool, or a float that is added to scores.
        is_causal: as many keys as queries, of which each sees those up to its own.
        fused: by torch's fused kernel, of CPUs only; else by matrix products, with all scores at once.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    added = _added(mask, q.dtype if fused else wide)
    if fused:
        size = max(q.shape[3], v.shape[3])
        output, lse = cpu_flash_attention(
            _widened(q, size), _widened(k, size), _widened(v, size), added, is_causal=is_causal, scale=scale
        )
        output, lse = output[..., : v.shape[3]].to(wide), lse.to(wide)
        if added is None:
            return Joined(output, lse)
        # The kernel has 0 where no key is seen.
        is_hidden = (added == float("-inf")).all(-1).expand(lse.shape)
        return Joined(output, lse.masked_fill(is_hidden, float("-inf")))
    scores = _scores(q, k, added, is_causal=is_causal, scale=scale)
    lse = scores.logsumexp(-1)
    return Joined(_weights(scores, lse) @ v.to(wide), lse)


def grads_of_block(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    joined: Joined,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of q, k and v, fp32 or wider.

    Args:
        grad: of the output of all keys.
        joined: the attention to all keys.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    added = _added(mask, q.dtype if fused else wide)
    # Queries that saw no key have weights of exp(-inf).
    lse = joined.lse.masked_fill(joined.lse == float("-inf"), float("inf"))
    if fused:
        size = max(q.shape[3], v.shape[3])
        its = [_widened(x.to(q.dtype), size) for x in (grad, q, k, v, joined.output)]
        of_q, of_k, of_v = cpu_flash_attention_grads(
            its[0],
            its[1],
            its[2],
            its[3],
            its[4],
            lse,
            added,
            is_causal=is_causal,
            scale=scale,
        )
        return of_q[..., : q.shape[3]].to(wide), of_k[..., : k.shape[3]].to(wide), of_v[..., : v.shape[3]].to(wide)
    weights = _weights(_scores(q, k, added, is_causal=is_causal, scale=scale), lse)
    grad = grad.to(wide)
    of_weights = grad @ v.to(wide).transpose(2, 3)
    of_scores = weights * (of_weights - (grad * joined.output).sum(-1, keepdim=True)) * scale
    return of_scores @ k.to(wide), of_scores.transpose(2, 3) @ q.to(wide), weights.transpose(2, 3) @ grad


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _widened(x: Tensor, size: int) -> Tensor:
    """Zeros beside each row, which change no score and give outputs that are dropped."""
    return x if x.shape[3] == size else functional.pad(x, (0, size - x.shape[3]))


def _scores(q: Tensor, k: Tensor, added: Tensor | None, *, is_causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(2, 3)) * scale
    if is_causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores if added is None else scores + added


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """The weights of attention; 0 where a query sees no key."""
    return torch.where(scores == float("-inf"), 0.0, (scores - lse.unsqueeze(-1)).exp())
