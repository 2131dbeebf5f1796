"""Attention, for which ranks exchange tokens or heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.sequence.attention.shared import Mode, SharedAttention
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import AttentionSeen, Sharded, Sharing
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import entering, is_sharded, plain, with_layout


def mode_of(sharing: Sharing, num_heads: int) -> Mode:
    """How ranks attend with so many query heads."""
    if sharing.mode != "auto":
        return sharing.mode
    return "ulysses" if num_heads >= sharing.link.size else "allgather"


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    query, key, value, *rest = call.bind(
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        dropout_p=0.0,
        is_causal=False,
        enable_gqa=False,
    )
    return attend(Call(call.func, call.name, (query, key, value), {}), *rest)


def attend(
    call: Call,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Any:
    """Attention over the tokens of all ranks, with what `scaled_dot_product_attention` takes.

    Args:
        call: of query, key and value.
        window: only the last `window` keys up to the query's own.
        documents: [batch or 1, tokens], whole on every rank: keys of other documents are not seen.
    """
    query, key, value = call.args
    if not (is_sharded(query) and is_sharded(key) and is_sharded(value)):
        call.refuse(
            "attends between tokens that are shared and tokens that are not, as cross-attention and caches do",
            "Only self-attention can be shared.",
        )
    layout: Sharded = query.placement
    for x in (query, key, value):
        if x.placement.tokens.dim != plain(x).dim() - 2 or not layout.has_same_tokens(x.placement):
            call.refuse("attends between other tokens than its own", "Give query, key and value the same tokens.")
    if layout.tokens.outer > 1 or is_sharded(mask):
        call.refuse("attends over several sequences on one dim", "Give each sequence its own place in the batch.")
    q, k, v = (plain(x) for x in (query, key, value))
    num_missing = 4 - q.dim()
    if num_missing < 0:
        call.refuse("attends with more than four dims", "Put the first ones on one dim.")
    q, k, v = (x[(None,) * num_missing] for x in (q, k, v))
    dense = _whole_mask(call, mask, layout, is_causal=is_causal)
    mode = mode_of(layout.sharing, q.shape[1])
    sent = layout.sharing.link.counts.nbytes
    before = sum(sent.values())
    shared = SharedAttention(
        link=layout.sharing.link,
        mode=mode,
        order=layout.frame.order,
        num_chunks=layout.sharing.num_chunks,
        documents=None if documents is None else _whole_documents(documents, layout),
    )
    output = shared(q, k, v, dense, dropout_p, is_causal, scale, enable_gqa, window=window)
    met = AttentionSeen(mode, q.shape[1], k.shape[1], (q.shape[0], layout.frame.num_tokens, q.shape[3]))
    layout.sharing.seen.attention[met] = sum(sent.values()) - before
    return with_layout(output[(0,) * num_missing], layout)


def _whole_documents(documents: Tensor, layout: Sharded) -> Tensor:
    """The documents over the frame; places outside of the window are one of their own."""
    after = layout.frame.num_tokens - layout.start - layout.tokens.length
    return functional.pad(plain(entering(documents)), [layout.start, after], value=-1)


def _whole_mask(call: Call, mask: Tensor | None, layout: Sharded, *, is_causal: bool) -> Tensor | None:
    """The mask over the frame: what lies outside of the window sees and is seen by no other token."""
    length, frame, start = layout.tokens.length, layout.frame.num_tokens, layout.start
    if layout.is_full:
        return None if mask is None else plain(entering(mask))
    if mask is None:
        if is_causal and start == 0:
            return None  # places after the window are later than all tokens
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=call.args[0].device)
    mask = plain(entering(mask))
    before, after = start, frame - start - length
    rows = [before, after] if mask.shape[-2] > 1 else [0, 0]
    hidden = False if mask.dtype == torch.bool else float("-inf")
    wide = functional.pad(mask, [before, after, 0, 0], value=hidden)
    # A place outside of the window sees what some token sees, so that no row of the mask is empty.
    return (
        wide
        if rows == [0, 0]
        else torch.cat(
            [
                wide[..., :1, :].expand(*wide.shape[:-2], before, -1),
                wide,
                wide[..., -1:, :].expand(*wide.shape[:-2], after, -1),
            ],
            dim=-2,
        )
    )


@rule("multi_head_attention_forward")
def multi_head(call: Call) -> Any:
    call.refuse(
        "computes attention by hand where weights of attention are asked for",
        "Use scaled_dot_product_attention.",
    )
