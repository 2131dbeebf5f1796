"""Attention of Hugging Face's models without the masks over all pairs of tokens that they make.

torch's attention knows causality only, so models of transformers write sliding windows, padding and packed documents
into a mask [tokens, tokens], which at 128k tokens takes 16 GiB. Through their registers of attention and mask functions
they get functions that keep a window as a number, padding as one row, and documents as one number per token. A mask of
any other kind is made as they make it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.comm.mesh import MeshAxis
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.shared import SharedAttention
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.rules.attention import attend
from lightning_superscale.sequence.tokens.tensor import is_sharded, plain
from lightning_superscale.sequence.whole import are_whole

NAME = "lightning_superscale"
"""Of the attention implementation, in the registers and in a model's config."""

# Implementations whose place this one takes; others compute something else, or attend by hand.
_REPLACED = ("sdpa", "flash_attention_2", "flash_attention_3")
# What changes the result of attention in ways that no mode computes.
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")

_found: list[Any] = []


def _masking() -> Any:
    """The module of transformers that makes masks, found once: compilers can't capture that."""
    if not _found:
        _found.append(importlib.import_module("transformers.masking_utils"))
    return _found[0]


class HuggingFaceAttention:
    """Gives the models of transformers in a module this attention, from `install` to `remove`."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str]] = []

    def install(self, module: nn.Module) -> None:
        """Find the models, and let them attend by the functions of this file; others are left alone."""
        models: list[Any] = [one for one in module.modules() if hasattr(one, "set_attn_implementation")]
        if not models:
            return
        transformers = importlib.import_module("transformers")
        _masking()
        transformers.AttentionInterface.register(NAME, attention)
        transformers.AttentionMaskInterface.register(NAME, mask)
        for model in models:
            before = getattr(model.config, "_attn_implementation", None)
            if before in _REPLACED:
                model.set_attn_implementation(NAME)  # its parts too
                self._before.append((model, before))

    def remove(self) -> None:
        """Give the models the attention back that they had."""
        for model, before in reversed(self._before):
            model.set_attn_implementation(before)
        self._before.clear()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """What transformers calls for each layer; see its `sdpa_attention_forward`.

    Returns:
        [batch, tokens, heads, head dim], and None in place of the weights of attention.

    Raises:
        SequenceParallelError: an option that no mode computes.
    """
    given = [name for name in _REFUSED if options.get(name) is not None]
    given += ["output_attentions"] if options.get("output_attentions") else []
    if given:
        raise SequenceParallelError(
            f"{type(module).__name__} attends with {', '.join(given)}, which sequence parallelism does not compute; "
            "train it without sequence=, or switch that off in its config"
        )
    dense, documents = _apart(attention_mask)
    # A mask of pairs of tokens holds causality and the window already.
    is_whole = dense is not None and dense.shape[-2] > 1
    causal = not is_whole and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = sliding_window if causal else None
    grouped = key.shape[1] != query.shape[1]
    name = f"attention of {type(module).__name__}"
    output = attend_shared(query, key, value, dense, documents, dropout, causal, scaling, grouped, window, name)
    return output.transpose(1, 2).contiguous(), None


def attend_shared(  # noqa: PLR0913 # one flat call, as compilers capture it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dense: Tensor | None,
    documents: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: int | None,
    name: str,
) -> Tensor:
    """Attention with what `attention` knows; a compiler captures a call of it as one function."""
    if is_sharded(query):
        call = Call(functional.scaled_dot_product_attention, name, (query, key, value), {})
        found: Tensor = attend(call, dense, dropout, is_causal, scale, enable_gqa, window=window, documents=documents)
        return found
    attends = SharedAttention(link=AxisLink(MeshAxis("sequence", 0, 1)), documents=documents)
    q, k, v = (plain(x) for x in (query, key, value))
    return attends(q, k, v, dense, dropout, is_causal, scale, enable_gqa, window=window)


def _apart(given: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask, and the documents [batch, tokens], of what `mask` gave: whole numbers are documents."""
    if given is None or given.dtype == torch.bool or given.is_floating_point():
        return given, None
    return None, given[:, 0, 0]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What transformers calls for a mask, once per forward and kind of layer; see its `sdpa_mask`.

    Returns:
        None where causality and a window say all; bool [batch, 1, 1, tokens], which keys are no padding; int64
        [batch, 1, 1, tokens], the document of each token; or else transformers' own mask of pairs.
    """
    parts = None if are_whole() or q_length != kv_length or args else _parts(mask_function)
    if parts is None or (parts and attention_mask is not None):
        own = {} if mask_function is None else {"mask_function": mask_function}
        made: Tensor | None = _masking().sdpa_mask(
            batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **own, **options
        )
        return made
    if attention_mask is not None:
        return attention_mask.bool()[:, None, None, :]
    if not parts:
        return None
    (documents,) = parts
    return documents.to(torch.int64).expand(batch_size, -1)[:, None, None, :]


def _parts(function: Callable[..., Any] | None) -> list[Tensor] | None:
    """The documents that a mask function of transformers tells apart, if any; None where it is of another kind.

    Functions are known by what they are, not by what they answer: a few hidden pairs among millions would go unseen.
    """
    masks = _masking()
    if function is None or function is masks.causal_mask_function:
        return []
    name = getattr(function, "__qualname__", "") if getattr(function, "__module__", "") == masks.__name__ else ""
    cells = {} if not name else dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return []
    if name == "packed_sequence_mask_function.<locals>.inner_mask":
        return [cells["packed_sequence_mask"].cell_contents]
    if name == "and_masks.<locals>.and_mask":
        found = [_parts(one) for one in cells["mask_functions"].cell_contents]
        known = [one for one in found if one is not None]
        documents = [one for part in known for one in part]
        return documents if len(known) == len(found) and len(documents) < 2 else None
    return None
