"""Attention for which every rank gathers the keys and values of all tokens, and attends with its own queries.

It takes any mask and any number of heads. In forward a rank gathers keys and values, in backward the ranks sum up their
gradients; outputs are where they belong. With causal attention a rank computes with the keys up to its last query only,
and with a window from the first key that one of its queries sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.comm.in_graph import AxisLink, all_gather
from lightning_superscale.sequence.attention.masked import attend_masked
from lightning_superscale.sequence.attention.sdpa import Attend
from lightning_superscale.sequence.attention.visibility import Visibility


def all_gather_attention(q: Tensor, k: Tensor, v: Tensor, sees: Visibility, attend: Attend, link: AxisLink) -> Tensor:
    """Attention over the tokens of all ranks. Every rank of the axis calls it, in forward and in backward.

    Args:
        q: [batch, heads, tokens, head dim], of this rank's tokens; ranks have consecutive parts of equal length.
        k, v: [batch, key-value heads, tokens, head dim], of the same tokens.
        sees: over the whole sequence.

    Returns:
        [batch, heads, tokens, head dim of v], of this rank's tokens.
    """
    num_tokens, dim = q.shape[2], k.shape[3]
    both = every_token(torch.cat([k, v], dim=3), link)
    return attend_masked(q, both[..., :dim], both[..., dim:], sees, attend, link.rank * num_tokens)


def every_token(x: Tensor, link: AxisLink) -> Tensor:
    """[batch, heads, tokens, dim] of this rank to [batch, heads, size x tokens, dim] of all."""
    batch, heads, tokens, dim = x.shape
    gathered = all_gather(x, link).view(link.size, batch, heads, tokens, dim)
    return gathered.permute(1, 2, 0, 3, 4).reshape(batch, heads, link.size * tokens, dim)
