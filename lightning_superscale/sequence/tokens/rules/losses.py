"""Losses: the mean or the sum over the tokens of all ranks ([Note: One loss contract] in sequence/loss.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.comm.in_graph import sum_over_ranks
from lightning_superscale.sequence.loss import mean_over_tokens
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.elementwise import elementwise
from lightning_superscale.sequence.tokens.rules.reductions import total
from lightning_superscale.sequence.tokens.rules.registry import rule
from lightning_superscale.sequence.tokens.tensor import entering, is_sharded, ndim_of, plain, reduced, with_layout
from lightning_superscale.sequence.tokens.traced import is_tensor

CROSS_ENTROPY = "input target weight size_average ignore_index reduce reduction label_smoothing"


@rule("cross_entropy", "nll_loss")
def cross_entropy(call: Call) -> Any:
    given = call.named(CROSS_ENTROPY, ignore_index=-100, reduction="mean", label_smoothing=0.0)
    x, target, weight, ignored = given["input"], given["target"], given["weight"], given["ignore_index"]
    if given["size_average"] is not None or given["reduce"] is not None:
        call.refuse("with size_average or reduce, which torch deprecated", "Use reduction=.")
    if not is_sharded(x):
        call.refuse("of classes that every rank has", "Compute logits of tokens.")
    num_dims, layout = ndim_of(x), x.placement
    class_dim = 0 if num_dims == 1 else 1
    if layout.tokens.dim == class_dim:
        call.refuse("takes tokens for classes", "Put classes on dim 1: logits.transpose(1, 2), or flatten(0, 1).")
    at = layout.tokens.dim - (layout.tokens.dim > class_dim)
    own = own_targets(call, target, layout, at, ignored)
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignored}
    if call.name == "cross_entropy":
        options["label_smoothing"] = given["label_smoothing"]
    function = functional.cross_entropy if call.name == "cross_entropy" else functional.nll_loss
    part = plain(x)
    if given["reduction"] == "none":
        return with_layout(function(part, own, reduction="none", **options), layout.at(at))
    link = layout.sharing.link
    if own.is_floating_point():  # shares of classes, which torch averages over tokens
        each = with_layout(function(part, own, reduction="none", **options), layout.at(at))
        summed = total(each, list(range(ndim_of(each))), keepdim=False)
        return (summed / _share(given["reduction"], each)).to(plain(each).dtype)
    if part.dtype in (torch.float16, torch.bfloat16):
        # A sum over tokens is past what 16 bits hold, where torch's mean is not.
        losses = function(part, own, reduction="none", **options)
        summed, dtype = losses.float().sum(), losses.dtype
    else:
        summed = function(part, own, reduction="sum", **options)
        dtype = summed.dtype
    counted = own != ignored
    num = counted.sum() if weight is None else (weight[own.masked_fill(~counted, 0)] * counted).sum()
    if given["reduction"] == "sum":
        return reduced(sum_over_ranks(summed, link).to(dtype), layout.sharing)
    return reduced(mean_over_tokens(summed, num, link).to(dtype), layout.sharing)


def _share(reduction: str, each: Tensor) -> int:
    """The number by which a sum of losses is divided."""
    return 1 if reduction == "sum" else each.numel()


def own_targets(call: Call, target: Tensor, layout: Sharded, at: int, ignored: int) -> Tensor:
    """The targets of this rank's tokens; `ignored` for places outside of the window."""
    is_share = target.is_floating_point()
    dim = layout.tokens.dim if is_share else at
    if is_sharded(target):
        other: Any = target.placement  # type: ignore[attr-defined]
        if other.tokens.dim != dim or not layout.has_same_tokens(other):
            call.refuse("compares a token with another one's label", "Shift labels in the batch.")
        own = plain(target)
        if layout.is_full or is_share:
            return own
        return own.masked_fill(~layout.is_token(own, dim), ignored)
    whole = plain(entering(target))
    if whole.shape[dim] != layout.tokens.size:
        call.refuse(f"expects labels of {layout.tokens.size} tokens", "Give each token one.")
    return layout.take(whole, dim, fill=0 if is_share else ignored)


@rule(
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "poisson_nll_loss",
    "gaussian_nll_loss",
)
def of_elements(call: Call) -> Any:
    """The loss of every element, and its mean over the tokens of all ranks."""
    reduction = call.kwargs.get("reduction", "mean")
    sized = [call.kwargs.get(name) for name in ("size_average", "reduce")]
    if any(one is not None for one in sized) or any(not is_tensor(one) and one is not None for one in call.args[2:]):
        call.refuse("with options that have no names, or that torch deprecated", "Name them: reduction=, delta=.")
    each = elementwise(Call(call.func, call.name, call.args, {**call.kwargs, "reduction": "none"}))
    if reduction == "none":
        return each
    dims = list(range(ndim_of(each)))
    if reduction == "batchmean":
        return (total(each, dims, keepdim=False) / each.shape[0]).to(plain(each).dtype)
    return (total(each, dims, keepdim=False) / _share(reduction, each)).to(plain(each).dtype)
