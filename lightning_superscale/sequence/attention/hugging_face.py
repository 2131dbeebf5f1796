"""Attention over ranks for Hugging Face's models, through their registers of attention functions and masks.

Their models make masks of the tokens that they are given, which are one rank's. So the function that attends is told
causality and the window of each layer, and masks are left to it, but for padding, which is gathered from all ranks. On
the first forward what the model's mask would hide is compared with that: a model that hides other keys is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.comm.in_graph import all_gather
from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.shared import SharedAttention

NAME = "lightning_superscale"
"""Of the attention implementation, in the registers and in a model's config."""

# What changes the result of attention in ways that no mode computes.
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")
# Pairs of positions along each side at which masks are compared.
_NUM_COMPARED = 128


class HuggingFaceAttention:
    """Lets one model attend over ranks, from `install` to `remove`. Every rank uses it alike.

    Args:
        attend: whose tokens are consecutive, or zigzag with an `attention_mask`: without one the models take positions
            that jump for packed documents.
    """

    def __init__(self, attend: SharedAttention) -> None:
        self._attend = attend
        self._before: tuple[Any, str] | None = None
        self._compared: set[int | None] = set()

    def install(self, model: nn.Module) -> None:
        """Make a model attend through this object.

        Args:
            model: a `transformers.PreTrainedModel`.

        Raises:
            SequenceParallelError: a model whose attention can't be replaced; names its class.
        """
        config: Any = getattr(model, "config", None)
        set_implementation: Any = getattr(model, "set_attn_implementation", None)
        if set_implementation is None or config is None:
            raise SequenceParallelError(f"expected a model of transformers, found {type(model).__name__}")
        importlib.import_module("transformers").AttentionInterface.register(NAME, self.attend)
        importlib.import_module("transformers").AttentionMaskInterface.register(NAME, self.mask)
        before = config._attn_implementation
        set_implementation(NAME)
        if config._attn_implementation != NAME:
            raise SequenceParallelError(
                f"{type(model).__name__} does not take another attention: it computes its own, which can't be shared "
                "among ranks. Use a model that follows transformers' AttentionInterface"
            )
        self._before = (model, before)

    def remove(self) -> None:
        """Give the model the attention back that it had; nothing where none was replaced."""
        if self._before is None:
            return
        (model, before), self._before = self._before, None
        model.set_attn_implementation(before)

    def attend(
        self,
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
    ) -> tuple[Tensor, None]:
        """What transformers calls for each layer; see its `sdpa_attention_forward`.

        Returns:
            [batch, tokens, heads, head dim], and None in place of the weights of attention.

        Raises:
            SequenceParallelError: an option that no mode computes.
        """
        given = [name for name in _REFUSED if options.get(name) is not None]
        if options.get("output_attentions"):
            given.append("output_attentions")
        if given:
            raise SequenceParallelError(
                f"{type(module).__name__} attends with {', '.join(given)}, which sequence parallelism does not "
                "compute; train it without sequence=, or switch that off in its config"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        output = self._attend(
            query,
            key,
            value,
            attention_mask,
            dropout,
            causal,
            scaling,
            key.shape[1] != query.shape[1],
            window=sliding_window if causal else None,
        )
        return output.transpose(1, 2).contiguous(), None

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        *args: Any,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Tensor | None:
        """What transformers calls for a mask, once per forward and kind of layer; see its `sdpa_mask`.

        Returns:
            bool [batch, 1, 1, tokens of all ranks], which keys are not padding; None where no mask was given.

        Raises:
            SequenceParallelError: keys are hidden by another rule than causality and a window.
        """
        if mask_function is not None and local_size not in self._compared:
            self._compared.add(local_size)
            self._compare(mask_function, q_length, local_size, torch.device(device))
        if attention_mask is None:
            return None
        link = self._attend.link
        if link.size == 1:
            return attention_mask.bool()[:, None, None, :]
        spans = self._attend.spans_of(attention_mask.shape[1])
        gathered = all_gather(attention_mask.to(torch.uint8), link).chunk(link.size)
        return spans.join(list(gathered), 1).bool()[:, None, None, :]

    def _compare(
        self, mask_function: Callable[..., Any], num_tokens: int, window: int | None, device: torch.device
    ) -> None:
        """Compare what a model's mask hides with what causality and the window hide, at some pairs of positions."""
        at = torch.linspace(0, num_tokens - 1, min(num_tokens, _NUM_COMPARED), device=device).long()
        first = torch.zeros(1, dtype=torch.int64, device=device)
        theirs = torch.as_tensor(mask_function(first, first, at[:, None], at[None, :]), device=device)
        ours = at[None, :] <= at[:, None]
        if window is not None:
            ours = ours & (at[None, :] > at[:, None] - window)
        if not torch.equal(theirs.bool().expand(ours.shape), ours):
            raise SequenceParallelError(
                "the model's attention mask hides other keys than causality"
                f"{'' if window is None else f' and a window of {window} keys'}: packed documents, chunks or tokens "
                "that see one another. Sequence parallelism can't tell them from a mask of one rank's tokens"
            )
