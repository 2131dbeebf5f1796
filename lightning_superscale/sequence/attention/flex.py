"""Attention by torch's flex_attention over the tokens of all ranks: with any score function, and any mask of blocks.

By Ulysses a rank calls it with all tokens of its heads, whose true numbers it tells the functions; gathering, with its
own queries, whose true places it tells them, and the keys and values of all tokens. Functions of scores and masks are
those of the whole attention, so that what they index is whole too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.sequence.attention.all_gather import every_token
from lightning_superscale.sequence.attention.heads import plan_heads
from lightning_superscale.sequence.attention.index import chosen, index_on
from lightning_superscale.sequence.attention.ulysses import exchanged, to_tokens

Mod = Callable[..., Tensor]


class Window(NamedTuple):
    """The tokens of a frame that there are: so many, from the place `start` on."""

    start: int
    length: int


@dataclass(frozen=True)
class Flex:
    """One call of flex_attention.

    Attributes:
        attend: torch's function, compiled or not; gets query, key, value and options, and gives the output, alone or
            with further results per query and head.
        score_mod: of the whole attention; None without.
        block_mask: of the whole attention; None without.
        options: further options of the function.
    """

    attend: Callable[..., Any]
    score_mod: Mod | None
    block_mask: BlockMask | None
    options: dict[str, Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, score_mod: Mod | None, block_mask: BlockMask | None) -> Any:
        """Attend with other functions than those of the whole attention."""
        grouped = q.shape[1] != k.shape[1]
        return self.attend(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped, **self.options)


def flex_by_ulysses(flex: Flex, q: Tensor, k: Tensor, v: Tensor, window: Window, link: AxisLink) -> list[Tensor]:
    """Attention over the tokens of all ranks. Every rank of the axis calls it, in forward and in backward.

    Args:
        q: [batch, heads, tokens, head dim], of this rank's part of the frame.
        k, v: [batch, key-value heads, tokens, head dim], of the same tokens.
        window: the tokens of the frame; others are padding.

    Returns:
        the output [batch, heads, tokens, head dim of v], and further results [batch, heads, tokens, 1], of this rank's
        tokens.

    Raises:
        SequenceParallelError: numbers of heads that don't fit.
    """
    plan = plan_heads(q.shape[1], k.shape[1], link.size)
    num_tokens = q.shape[2] * link.size
    q, k, v, heads = exchanged(q, k, v, plan.exchanges[0], link)
    q, k, v = (x.narrow(2, window.start, window.length) for x in (q, k, v))
    score_mod, block_mask = _of_heads(flex, heads, q)
    after = num_tokens - window.start - window.length
    found = []
    for one in _results(flex(q, k, v, score_mod, block_mask)):
        every = to_tokens(functional.pad(one, (0, 0, window.start, after)), link)
        found.append(chosen(every, 1, plan.order))
    return found


def _of_heads(flex: Flex, heads: tuple[int, ...], like: Tensor) -> tuple[Mod | None, BlockMask | None]:
    """The functions of these heads, whose numbers count from 0 in them, on a tensor's device."""
    score_mod, whole = flex.score_mod, flex.block_mask
    number_of = None if score_mod is None else index_on(heads, like)

    def score_of_head(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if score_mod is None or number_of is None:
            raise AssertionError("scores that no function changes")
        return score_mod(score, b, number_of[h], i, j)

    found = None if whole is None else _kept(whole, heads, lambda: _mask_of_heads(whole, index_on(heads, like)))
    return None if score_mod is None else score_of_head, found


def _mask_of_heads(whole: BlockMask, heads: Tensor) -> BlockMask:
    def of_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return whole.mask_mod(b, heads[h], i, j)

    def chosen(blocks: Tensor) -> Tensor:
        return blocks if blocks.shape[1] == 1 else blocks.index_select(1, heads)

    full_numbers, full_indices = whole.full_kv_num_blocks, whole.full_kv_indices
    return BlockMask.from_kv_blocks(
        chosen(whole.kv_num_blocks),
        chosen(whole.kv_indices),
        None if full_numbers is None else chosen(full_numbers),
        None if full_indices is None else chosen(full_indices),
        BLOCK_SIZE=whole.BLOCK_SIZE,
        mask_mod=of_head,
        seq_lengths=whole.seq_lengths,
        compute_q_blocks=whole.q_indices is not None,
    )


def flex_by_all_gather(flex: Flex, q: Tensor, k: Tensor, v: Tensor, window: Window, link: AxisLink) -> list[Tensor]:
    """Attention over the tokens of all ranks, each with its own queries; as `flex_by_ulysses`.

    The blocks of a mask are found anew for these queries, once for each mask, from bools [queries, keys].
    """
    num_queries, dim = q.shape[2], k.shape[3]
    both = every_token(torch.cat([k, v], dim=3), link).narrow(2, window.start, window.length)
    # Queries of padding take the place of a token: what they find is dropped.
    own = torch.arange(link.rank * num_queries, (link.rank + 1) * num_queries, device=q.device)
    places = (own - window.start).clamp(0, window.length - 1)
    score_mod, whole = flex.score_mod, flex.block_mask

    def score_at_place(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if score_mod is None:
            raise AssertionError("scores that no function changes")
        return score_mod(score, b, h, places[i], j)

    key = (window, num_queries, link.rank)
    block_mask = None if whole is None else _kept(whole, key, lambda: _mask_at_places(whole, places, window.length))
    at = None if score_mod is None else score_at_place
    return _results(flex(q, both[..., :dim].contiguous(), both[..., dim:].contiguous(), at, block_mask))


def _mask_at_places(whole: BlockMask, places: Tensor, num_keys: int) -> BlockMask:
    """The mask of the queries at some places."""
    partial = _dense(whole.kv_num_blocks, whole.kv_indices)
    full = None if whole.full_kv_num_blocks is None else _dense(whole.full_kv_num_blocks, whole.full_kv_indices)
    rows, columns = whole.BLOCK_SIZE

    def at_place(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        place = places[i]
        block = (b % partial.shape[0], h % partial.shape[1], place // rows, j // columns)
        seen = partial[block] & whole.mask_mod(b, h, place, j)
        return seen if full is None else seen | full[block]

    batch, heads = whole.shape[:2]
    return create_block_mask(
        at_place, batch, heads, len(places), num_keys, device=places.device, BLOCK_SIZE=whole.BLOCK_SIZE
    )


def _dense(numbers: Tensor, indices: Tensor | None) -> Tensor:
    """Which blocks are listed, bool [batch, heads, rows, columns]."""
    if indices is None:
        raise AssertionError("a mask that counts blocks and lists none")
    num_columns = indices.shape[-1]
    listed = torch.arange(num_columns, device=indices.device) < numbers[..., None]
    found = torch.zeros(*indices.shape[:-1], num_columns + 1, dtype=torch.bool, device=indices.device)
    places = torch.where(listed, indices, num_columns).long()  # what is not listed goes to a column that is cut off
    return found.scatter_(-1, places, torch.ones_like(listed))[..., :num_columns]


def _results(found: Any) -> list[Tensor]:
    """The output, and results of one number for each query and head, with a dim of one for it."""
    if isinstance(found, Tensor):
        return [found]
    output, rest = found
    more = [rest] if isinstance(rest, Tensor) else list(rest)
    return [output, *(one[..., None] for one in more if one is not None)]


# What was made of a mask that lives; layers share masks.
_made: WeakKeyDictionary[BlockMask, dict[Any, BlockMask]] = WeakKeyDictionary()


def _kept(whole: BlockMask, key: Any, make: Callable[[], BlockMask]) -> BlockMask:
    known = _made.setdefault(whole, {})
    if key not in known:
        known[key] = make()
    return known[key]
