"""Attention for which ranks trade their parts of the sequence for heads, and back (Ulysses, arXiv 2309.14509).

Each rank has some tokens of all heads. An all-to-all of queries, keys and values together gives it all tokens of some
heads, any attention computes these, and another all-to-all brings the outputs back: two in forward, two in backward,
and one more each where values have another head dim. `heads.py` says who gets which heads.

In chunks, heads follow one another, each chunk with exchanges of its own that backward repeats: what is whole along the
sequence at a time is one chunk's heads (untied Ulysses, arXiv 2602.21196).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_superscale.comm.in_graph import AxisLink, all_to_all
from lightning_superscale.sequence.attention.heads import Exchange, plan_heads
from lightning_superscale.sequence.attention.index import chosen
from lightning_superscale.sequence.attention.masked import attend_masked
from lightning_superscale.sequence.attention.sdpa import Attend
from lightning_superscale.sequence.attention.visibility import Visibility


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, sees: Visibility, attend: Attend, link: AxisLink, *, num_chunks: int = 1
) -> Tensor:
    """Attention over the tokens of all ranks. Every rank of the axis calls it, in forward and in backward.

    Args:
        q: [batch, heads, tokens, head dim], of this rank's tokens; ranks have consecutive parts of equal length.
        k, v: [batch, key-value heads, tokens, head dim], of the same tokens.
        sees: over the whole sequence.
        num_chunks: chunks of heads; with more than one, backward computes each chunk's attention once more.

    Returns:
        [batch, heads, tokens, head dim of v], of this rank's tokens.

    Raises:
        SequenceParallelError: numbers of heads that don't fit.
    """
    plan = plan_heads(q.shape[1], k.shape[1], link.size, num_chunks)
    outputs = []
    for exchange in plan.exchanges:
        run = functools.partial(_attend_some, exchange=exchange, sees=sees, attend=attend, link=link)
        if len(plan.exchanges) > 1 and torch.is_grad_enabled():
            outputs.append(checkpoint(run, q, k, v, use_reentrant=False))
        else:
            outputs.append(run(q, k, v))
    every = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return chosen(every, 1, plan.order)


def _attend_some(
    q: Tensor, k: Tensor, v: Tensor, *, exchange: Exchange, sees: Visibility, attend: Attend, link: AxisLink
) -> Tensor:
    """The outputs [batch, size x heads of a rank, tokens, head dim] of one exchange, rank by rank."""
    queries, keys, values, heads = exchanged(q, k, v, exchange, link)
    return to_tokens(attend_masked(queries, keys, values, sees.of_heads(heads), attend), link)


def exchanged(
    q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, link: AxisLink
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Queries, keys and values of all tokens of this rank's heads, and the numbers of its query heads.

    A head of zeros, where heads don't divide, has the number of the last one.
    """
    wanted = [head for of_rank in exchange.queries for head in of_rank]
    if None in wanted:
        q = functional.pad(q, (0, 0, 0, 0, 0, 1))  # a head of zeros, at the end
    num_queries = q.shape[1] - (None in wanted)
    own = [num_queries if head is None else head for head in exchange.queries[link.rank]]
    queries = chosen(q, 1, [num_queries if head is None else head for head in wanted])
    needed = [head for of_rank in exchange.keys for head in of_rank]
    keys, values = (chosen(x, 1, needed) for x in (k, v))
    alike: list[list[Tensor]] = []  # of one dtype and dim, so that one message can have them
    for x in (queries, keys, values):
        if alike and (x.dtype, x.shape[3]) == (alike[-1][0].dtype, alike[-1][0].shape[3]):
            alike[-1].append(x)
        else:
            alike.append([x])
    queries, keys, values = [moved for tensors in alike for moved in _to_heads(tensors, link)]
    if not exchange.is_grouped:
        keys, values = (chosen(x, 1, exchange.readers[link.rank]) for x in (keys, values))
    return queries, keys, values, tuple(min(head, num_queries - 1) for head in own)


def _to_heads(tensors: Sequence[Tensor], link: AxisLink) -> list[Tensor]:
    """Each [batch, size x n, tokens, dim] of this rank's tokens to [batch, n, size x tokens, dim] of its heads.

    One message to each rank has all of them, of one dtype and dim, whatever their numbers of heads.
    """
    batch, _, tokens, dim = tensors[0].shape
    numbers = [x.shape[1] // link.size for x in tensors]
    by_rank = [x.view(batch, link.size, n, tokens, dim).transpose(0, 1) for x, n in zip(tensors, numbers, strict=True)]
    sent = torch.cat(by_rank, 2) if len(by_rank) > 1 else by_rank[0]
    moved = all_to_all(sent.flatten(0, 1), link).view(link.size, batch, sum(numbers), tokens, dim)
    # A split, whose gradient is one copy of all parts; slices would each make zeros of the whole and add them up.
    return [
        part.permute(1, 2, 0, 3, 4).reshape(batch, n, link.size * tokens, dim)
        for part, n in zip(torch.split(moved, numbers, 2), numbers, strict=True)
    ]


def to_tokens(x: Tensor, link: AxisLink) -> Tensor:
    """The inverse of `_to_heads`: [batch, n, size x tokens, dim] to [batch, size x n, tokens, dim]."""
    batch, heads, tokens, dim = x.shape
    by_rank = x.reshape(batch, heads, link.size, tokens // link.size, dim).permute(2, 0, 1, 3, 4)
    moved = all_to_all(by_rank.flatten(0, 1), link).view(link.size, batch, heads, tokens // link.size, dim)
    return moved.transpose(0, 1).reshape(batch, link.size * heads, tokens // link.size, dim)
