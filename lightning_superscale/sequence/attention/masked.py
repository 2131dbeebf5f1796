"""Attention under a mask that is never there whole: queries in blocks, each with the keys that it can see."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_superscale.sequence.attention.sdpa import Attend
from lightning_superscale.sequence.attention.visibility import Visibility

# Pairs of a query and a key for which a mask is made at a time: 16 MiB of truth values.
MOST_PAIRS = 2**24


def attend_masked(q: Tensor, k: Tensor, v: Tensor, sees: Visibility, attend: Attend, first: int = 0) -> Tensor:
    """The attention of some queries to the keys of the whole sequence.

    With a window a block of queries meets the keys of its window only, so work grows with tokens times window.

    Args:
        q: [batch, heads, queries, head dim], neighbouring ones.
        k, v: [batch, key-value heads, tokens, head dim], all tokens.
        first: the place of the first query in the sequence.

    Returns:
        [batch, heads, queries, head dim of v].
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if sees.is_plain and sees.is_causal and num_queries == num_keys:
        return attend(q, k, v, None, is_causal=True)
    if sees.is_plain and not sees.is_causal:
        return attend(q, k, v, None, is_causal=False)
    size = max(1, min(num_queries, MOST_PAIRS // num_keys))
    if sees.window is not None:
        size = min(size, max(sees.window, MOST_PAIRS // (2 * sees.window)))
    outputs = []
    for begin in range(0, num_queries, size):
        end = min(begin + size, num_queries)
        queries = slice(first + begin, first + end)
        start = 0 if sees.window is None else max(0, queries.start + 1 - sees.window)
        keys = slice(start, queries.stop if sees.is_causal else num_keys)
        mask = sees.mask(queries, keys, q.device)
        outputs.append(attend(q[:, :, begin:end], k[:, :, keys], v[:, :, keys], mask, is_causal=False))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
