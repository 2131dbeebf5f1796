"""Attention, for which ranks exchange tokens or heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.sequence.attention.shared import Mode, SharedAttention
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import AttentionSeen, Sharded, Sharing
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import entering, is_sharded, ndim_of, plain, with_layout
from lightning_superscale.torch_private import is_of_tracer


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
        if x.placement.tokens.dim != ndim_of(x) - 2 or not layout.has_same_tokens(x.placement):
            call.refuse("attends between other tokens than its own", "Give query, key and value the same tokens.")
    if layout.tokens.outer > 1 or is_sharded(mask):
        call.refuse("attends over several sequences on one dim", "Give each sequence its own place in the batch.")
    q, k, v = (plain(x) for x in (query, key, value))
    num_missing = 4 - q.dim()
    if num_missing < 0:
        call.refuse("attends with more than four dims", "Put the first ones on one dim.")
    q, k, v = (x[(None,) * num_missing] for x in (q, k, v))
    if dropout_p and is_of_tracer(q):
        call.refuse(
            "drops weights of attention in a compiled module, where ranks can't draw numbers of their own",
            "Set the model's attention dropout to 0, or compile only modules without attention.",
        )
    dense = _whole_mask(call, mask, layout, is_causal=is_causal)
    mode = mode_of(layout.sharing, q.shape[1])
    shared = SharedAttention(
        link=layout.sharing.link,
        mode=mode,
        order=layout.frame.order,
        num_chunks=layout.sharing.num_chunks,
        documents=None if documents is None else _whole_documents(documents, layout),
    )
    numbers = _numbers_of_its_own(layout.sharing.link.rank, q.device) if dropout_p else nullcontext()
    with seen(layout, mode, q, k), numbers:
        output = shared(q, k, v, dense, dropout_p, is_causal, scale, enable_gqa, window=window)
    return with_layout(output[(0,) * num_missing], layout)


@contextmanager
def seen(layout: Sharded, mode: Mode, q: Tensor, k: Tensor) -> Iterator[None]:
    """A context of one attention, for reports: which kind it is, and what this rank sends in it.

    Args:
        q, k: [batch, heads, tokens, head dim] of this rank's part.
    """
    sharing = layout.sharing
    before = sharing.link.num_bytes_sent
    yield
    met = AttentionSeen(mode, q.shape[1], k.shape[1], (q.shape[0], layout.frame.num_tokens, q.shape[3]))
    sharing.seen.attention[met] = sharing.link.num_bytes_sent - before


@contextmanager
def _numbers_of_its_own(rank: int, device: torch.device) -> Iterator[None]:
    """Random numbers of this rank's own, for weights of attention of heads and queries of its own.

    Ranks draw alike otherwise, and would drop the same places of different heads. They agree again afterwards.
    """
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(seed + rank)
        yield


def _whole_documents(documents: Tensor, layout: Sharded) -> Tensor:
    """The documents over the frame; places outside of the window are one of their own."""
    after = layout.frame.num_tokens - layout.start - layout.tokens.length
    return functional.pad(plain(entering(documents)), [layout.start, after], value=-1)


def _whole_mask(call: Call, mask: Tensor | None, layout: Sharded, *, is_causal: bool) -> Tensor | None:
    """The mask over the frame: what lies outside of the window sees and is seen by no other token."""
    length, frame, start = layout.tokens.length, layout.frame.num_tokens, layout.start
    if layout.is_full:
        return None if mask is None else _with_rows(mask)
    if mask is None:
        if is_causal and start == 0:
            return None  # places after the window are later than all tokens
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=call.args[0].device)
    mask = _with_rows(mask)
    before, after = start, frame - start - length
    hidden = False if mask.dtype == torch.bool else float("-inf")
    wide = functional.pad(mask, [before, after, 0, 0], value=hidden)
    if mask.shape[-2] == 1:
        return wide
    # A place outside of the window sees what some token sees, so that no row of the mask is empty.
    rows = torch.arange(-before, length + after, device=wide.device).clamp(0, length - 1)
    return wide.index_select(-2, rows)


def _with_rows(mask: Tensor) -> Tensor:
    """The mask as a plain one with a dim of queries."""
    found = plain(entering(mask))
    return found if found.dim() > 1 else found[None]


_MULTI_HEAD = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"
)


@rule("multi_head_attention_forward")
def multi_head(call: Call) -> tuple[Tensor, None]:
    """Torch's MultiheadAttention, of projections and the attention above."""
    given = call.named(_MULTI_HEAD, training=True, need_weights=True)
    if given["need_weights"]:
        call.refuse("is asked for weights of attention, of every token to every other", "Use need_weights=False.")
    if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        call.refuse("adds keys that are no tokens", "Leave out add_bias_kv, add_zero_attn and static keys.")
    inputs = [given[name] for name in ("query", "key", "value")]
    if (
        not all(is_sharded(x) for x in inputs)
        or is_sharded(given["attn_mask"])
        or is_sharded(given["key_padding_mask"])
    ):
        call.refuse(
            "attends between tokens that are shared and tokens that are not", "Only self-attention can be shared."
        )
    is_batched, heads = inputs[0].dim() == 3, given["num_heads"]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = functional.linear(x if is_batched else x.unsqueeze(1), weight, bias)
        return found.view(*found.shape[:2], heads, -1).permute(1, 2, 0, 3)

    q, k, v = (project(*one) for one in zip(inputs, weights, biases, strict=True))
    is_causal = given["is_causal"] and given["key_padding_mask"] is None
    mask = None if is_causal else _added(given["attn_mask"], given["key_padding_mask"], q)
    dropout_p = given["dropout_p"] if given["training"] else 0.0
    found = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
    found = functional.linear(found.permute(2, 0, 1, 3).flatten(-2), given["out_proj_weight"], given["out_proj_bias"])
    return (found if is_batched else found.squeeze(1)), None


def _added(mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """What torch adds to scores: masks of bools say which keys are not seen, there, where they say True."""

    def as_numbers(one: Tensor) -> Tensor:
        if one.dtype != torch.bool:
            return one
        return torch.zeros(one.shape, dtype=query.dtype, device=one.device).masked_fill_(one, float("-inf"))

    if mask is not None:
        mask = as_numbers(mask)
        mask = mask if mask.dim() == 2 else mask.view(query.shape[0], -1, *mask.shape[1:])
    if padding is None:
        return mask
    padding = as_numbers(padding)
    padding = padding[:, None, None, :] if padding.dim() == 2 else padding
    return padding if mask is None else mask + padding
