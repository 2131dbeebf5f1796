"""Cross entropy of a linear head, a tile of tokens at a time: no more logits exist than a tile has.

[Note: Gradients in forward] The gradient of a tile's logits is known as soon as the logits are, so forward multiplies
it with the weight and the hidden states at once and keeps those products instead of the logits; backward only scales
them (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2). Of N tokens with H features, over V classes,
autograd keeps

    plain `F.cross_entropy(F.linear(hidden, weight).float(), labels)`:  V * a bytes per token
    tiled:  H * e bytes per token, and V * H * a bytes once

where e is the bytes of an element of `hidden`, and a those of the accumulation dtype. Less is kept once there are more
than about H tokens. A checkpoint around it computes the products twice and keeps nothing meanwhile.

[Note: Why not torch's chunked loss] From 2.13 on torch has `F.linear_cross_entropy(..., options=...)`, which has the
same idea, and in fp32 and fp64 the same values within rounding; the tests hold both against the plain loss. It is not
used here, because for 16-bit hidden states it adds up loss and weight's gradient over tiles in 16 bits; it does not
follow autocast, has no label smoothing (asked for it, it warns and makes all logits), and keeps its gradients where a
checkpoint does not reach them. docs/decisions/0008-a-tiled-loss-of-our-own.md has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.collectives import AxisCollectives
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.events import has_streams
from lightning_superscale.torch_private import is_fake

# Rows of the weight's gradient whose wide product exists at one time.
_ROWS_AT_A_TIME = 2**14
# Of a tile: with fewer, memory takes longer than products (measured on a CPU; a GPU's ratio of both is larger).
_LEAST_TOKENS = 256


class LossSum(NamedTuple):
    """The loss of some tokens in the form in which ranks can add it up.

    Attributes:
        total: the sum over valid tokens, 0-d, fp32 (fp64 if `hidden` is), differentiable.
        num_valid: the number of tokens whose label is not `ignore_index`, 0-d, int64, on the same device.
    """

    total: Tensor
    num_valid: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over valid tokens; NaN without any, as in torch."""
        return self.total / self.num_valid


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    tile: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The loss `F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)`, with logits of only a tile at a time.

    Logits have the dtype of `hidden`, or autocast's, and everything after them is computed in fp32, or in fp64 if
    `hidden` is. The weight's gradient is summed in that dtype over all tiles and rounded once. A second derivative is
    refused.

    Args:
        hidden: [..., H], floating; the dtype of `weight`, unless autocast is on.
        weight: [V, H]; it may be an embedding's too (tied weights).
        labels: [...], int64: classes in [0, V), or `ignore_index`. On CUDA other labels trip a device-side assert, as
            torch's own loss does, so that the host need not wait.
        bias: [V].
        ignore_index: the label of tokens that count nothing.
        label_smoothing: the share of every target that is spread evenly over all classes, in [0, 1].
        tile: number of tokens per tile; None chooses one by `tokens_per_tile`.
        reduction: "mean" over valid tokens, or their "sum".

    Returns:
        0-d, fp32 (fp64 if `hidden` is).

    Raises:
        SuperScaleError: shapes, dtypes or values that don't fit; says which.
    """
    summed = cross_entropy_sum(
        hidden,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        tile=tile,
    )
    if reduction not in ("mean", "sum"):
        raise SuperScaleError(f"tiled cross entropy: reduction is 'mean' or 'sum'; found {reduction!r}.")
    return summed.mean if reduction == "mean" else summed.total


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    tile: int | None = None,
) -> LossSum:
    """As `tiled_cross_entropy`, with the sum over valid tokens and their number apart, for losses over ranks."""
    head = _Head(ignore_index, label_smoothing, tile, vocab_size=weight.shape[0])
    return _loss_sum(hidden, weight, bias, labels, head)


def vocab_parallel_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ranks: AxisCollectives,
    first_row: int,
    vocab_size: int,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    tile: int | None = None,
) -> LossSum:
    """As `cross_entropy_sum`, of a weight whose rows are sharded over ranks: each computes the logits of its own rows.

    Every rank of the axis calls it with the same `hidden` and `labels`, and gets the same loss and the same, whole
    gradient of `hidden`; the gradient of `weight` is that of its own rows. All collectives run in forward: one
    all-gather of three numbers per token and tile (four with label smoothing), and one all-reduce of the gradient of
    `hidden`. Bits follow the order of ranks.

    Args:
        weight: [v, H], rows first_row to first_row + v of the whole weight.
        bias: [v], of the same rows.
        ranks: collectives over the ranks that hold the rows.
        first_row: the class of this rank's first row.
        vocab_size: V, the number of all classes.

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3; differs: tiled, and with one collective per
    tile in place of three.
    """
    if not 0 <= first_row <= first_row + weight.shape[0] <= vocab_size:
        raise SuperScaleError(
            f"vocab-parallel cross entropy: rows {first_row} to {first_row + weight.shape[0]} are not within "
            f"the vocabulary of {vocab_size}; pass first_row and vocab_size of the whole weight."
        )
    head = _Head(ignore_index, label_smoothing, tile, vocab_size=vocab_size, first_row=first_row, ranks=ranks)
    return _loss_sum(hidden, weight, bias, labels, head)


def tokens_per_tile(num_tokens: int, num_features: int, num_classes: int) -> int:
    """The tokens of a tile whose logits have about as many elements as all hidden states, a power of two.

    Smaller tiles would hardly lower the peak, and cost more. It is Liger Kernel's rule, but for short sequences: each
    tile reads and writes the whole gradient of the weight, which with few tokens takes longer than their products. So
    a tile has at least 256 tokens, or as many that its logits have as many elements as that gradient, which exists.
    """
    num_tiles = -(-num_classes // max(num_features, 1))
    by_hidden = _power_of_two(-(-num_tokens // max(num_tiles, 1)))
    return max(by_hidden, min(_LEAST_TOKENS, _power_of_two(num_features), _power_of_two(num_tokens)))


def _power_of_two(number: int) -> int:
    """The smallest that is no less than a number, at least 1."""
    return int(1 << max(number - 1, 0).bit_length())


@dataclass(frozen=True, slots=True)
class _Head:
    """What all tiles have in common.

    Attributes:
        first_row: class of the first row of the weight.
        ranks: the ranks that share the rows; None if the weight has all.
        compute_dtype: dtype of the matrix products.
        acc_dtype: dtype of everything else.
    """

    ignore_index: int
    label_smoothing: float
    tile: int | None
    vocab_size: int
    first_row: int = 0
    ranks: AxisCollectives | None = None
    compute_dtype: torch.dtype = torch.float32
    acc_dtype: torch.dtype = torch.float32

    @property
    def on_target(self) -> float:
        """The share of a target that is on its label alone."""
        return 1.0 - self.label_smoothing

    @property
    def on_each(self) -> float:
        """The share of a target that is on each class."""
        return self.label_smoothing / self.vocab_size


def _loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head) -> LossSum:
    _check(hidden, weight, bias, labels, head)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    tile = head.tile or tokens_per_tile(flat.shape[0], flat.shape[1], head.vocab_size)
    device_type, compute_dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:  # which autocast leaves alone
        compute_dtype = torch.get_autocast_dtype(device_type)
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    head = replace(head, tile=tile, compute_dtype=compute_dtype, acc_dtype=acc_dtype)
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    with torch.autocast(device_type, enabled=False):
        total: Tensor = _TiledCrossEntropy.apply(flat, weight, bias, targets, head, wanted)  # type: ignore[no-untyped-call]
    return LossSum(total, (targets != head.ignore_index).sum())


class _TiledCrossEntropy(torch.autograd.Function):
    """See [Note: Gradients in forward]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: _Head,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        total, grads = _loss_and_grads(hidden, weight, bias, labels, head, wanted)
        ctx.save_for_backward(*grads)
        ctx.head = head
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise SuperScaleError(
                "tiled cross entropy has no second derivative, and backward ran with create_graph=True; expected a "
                "backward without. Use F.cross_entropy(F.linear(hidden, weight), labels) for gradient penalties."
            )
        (grad,) = grad_outputs
        scaled = [
            None if saved is None else _scaled(saved, grad, dtype, ctx.head.tile)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _scaled(saved: Tensor, scale: Tensor, dtype: torch.dtype, tile: int) -> Tensor:
    """`saved * scale` in a dtype, rounded once; `saved` stays as it is, because there may be another backward."""
    if saved.dtype == scale.dtype:
        return (saved * scale).to(dtype)
    # torch would round the scale to 16 bits. By tiles, so that no wide copy of all rows exists.
    out = torch.empty_like(saved, dtype=dtype)
    for start in range(0, saved.shape[0], tile):
        out[start : start + tile] = saved[start : start + tile].to(scale.dtype) * scale
    return out


def _loss_and_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: _Head,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss, and the gradients of hidden [N, H], weight [v, H] and bias [v] that are wanted."""
    of_hidden, of_weight, of_bias = wanted
    acc_dtype = head.acc_dtype
    # Parts of a gradient that ranks add up stay wide until they are.
    hidden_dtype = hidden.dtype if head.ranks is None else acc_dtype
    grad_hidden = torch.empty(hidden.shape if of_hidden else (0,), dtype=hidden_dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape if of_weight else (0,), dtype=acc_dtype, device=weight.device)
    grad_bias = torch.zeros(weight.shape[0] if of_bias else 0, dtype=acc_dtype, device=weight.device)
    total = torch.zeros((), dtype=acc_dtype, device=hidden.device)
    weight = weight.to(head.compute_dtype)
    bias = None if bias is None else bias.to(head.compute_dtype)
    for start in range(0, hidden.shape[0], head.tile or 1):
        rows = slice(start, start + (head.tile or 1))
        inputs = hidden[rows].to(head.compute_dtype)
        logits = torch.nn.functional.linear(inputs, weight, bias).to(acc_dtype)
        loss, gradient = _loss_of_tile(logits, labels[rows], head)
        total += loss
        if any(wanted):
            gradient()
            narrow = logits.to(head.compute_dtype)
            if of_hidden:
                grad_hidden[rows] = narrow @ weight
            if of_weight:
                _add_product(grad_weight, logits, narrow, inputs)
            if of_bias:
                grad_bias += logits.sum(0)
    if of_hidden and head.ranks is not None:
        head.ranks.all_reduce(grad_hidden).wait()
        grad_hidden = grad_hidden.to(hidden.dtype)
    grads = zip((grad_hidden, grad_weight, grad_bias), wanted, strict=True)
    return total, [grad if is_wanted else None for grad, is_wanted in grads]


def _add_product(total: Tensor, logits: Tensor, narrow: Tensor, inputs: Tensor) -> None:
    """`total += logits.T @ inputs` [v, H], with sums in the dtype of `total`.

    Args:
        logits: [T, v], in the dtype of `total`.
        narrow: the same in the dtype of `inputs`.
    """
    if narrow.dtype == total.dtype:
        total.addmm_(narrow.t(), inputs)
    elif has_streams(total.device):  # tensor cores multiply 16 bits and add up in fp32
        for start in range(0, total.shape[0], _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            total[rows].add_(torch.mm(narrow[:, rows].t(), inputs, out_dtype=total.dtype))
    else:
        total.addmm_(logits.t(), inputs.to(total.dtype))


def _loss_of_tile(logits: Tensor, labels: Tensor, head: _Head) -> tuple[Tensor, Callable[[], None]]:
    """The loss of a tile, summed, from its logits [T, v], which are overwritten.

    With m = max(z), d = sum(exp(z - m)) and a label y, the loss of a token is

        log d - (1 - s) (z_y - m) - s / V sum(z - m)

    Returns:
        the sum, 0-d; and a function that makes the logits their gradient, exp(z - m) / d - (1 - s) [y] - s / V.
    """
    num_rows = logits.shape[1]
    is_valid = labels != head.ignore_index
    row = labels - head.first_row
    is_here = is_valid & (row >= 0) & (row < num_rows)
    is_class = (labels >= 0) & (labels < head.vocab_size)
    # A label that is no class stays out of bounds, so that the device notices it.
    row = row.masked_fill(~is_valid | (is_class & ~is_here), 0).unsqueeze(1)
    own_max = logits.amax(1)
    target = logits.gather(1, row).squeeze(1).masked_fill(~is_here, 0.0)
    logits.sub_(own_max.unsqueeze(1))
    spread = logits.sum(1) if head.label_smoothing else None
    denominator = logits.exp_().sum(1)
    factor = 1.0 / denominator
    maximum = own_max
    if head.ranks is not None:
        shares = _Shares(own_max, denominator, target, spread, num_rows)
        maximum, denominator, target, spread = _over_ranks(shares, head.ranks)
        factor = torch.exp(own_max - maximum) / denominator
    loss = denominator.log() - head.on_target * (target - maximum)
    if spread is not None:
        loss -= head.on_each * spread

    def make_gradient() -> None:
        logits.mul_((factor * is_valid).unsqueeze(1))
        logits.scatter_add_(1, row, (is_here.to(logits.dtype) * -head.on_target).unsqueeze(1))
        if head.label_smoothing:
            logits.sub_((is_valid.to(logits.dtype) * head.on_each).unsqueeze(1))

    return loss.masked_fill(~is_valid, 0.0).sum(), make_gradient


class _Shares(NamedTuple):
    """What one rank's rows say of a tile's tokens, each [T].

    Attributes:
        maximum: of the rank's logits.
        denominator: sum of exp(z - maximum) over them.
        target: the label's logit where the rank has it, else 0.
        spread: sum of (z - maximum) over them; None without label smoothing.
        num_rows: their number.
    """

    maximum: Tensor
    denominator: Tensor
    target: Tensor
    spread: Tensor | None
    num_rows: int


def _over_ranks(own: _Shares, ranks: AxisCollectives) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Maximum, denominator, target and spread over the rows of all ranks, added up in the order of ranks."""
    parts = [own.maximum, own.denominator, own.target]
    if own.spread is not None:
        parts += [own.spread, torch.full_like(own.spread, own.num_rows)]
    packed = own.maximum.new_empty(ranks.axis.size, len(parts) * own.maximum.numel())
    torch.cat(parts, out=packed[ranks.axis.rank])
    every = ranks.all_gather(packed).wait().view(ranks.axis.size, len(parts), -1)
    maximum = every[:, 0].amax(0)
    lower = every[:, 0] - maximum  # [ranks, T]: how much lower each rank's maximum is

    def total(of_ranks: Tensor) -> Tensor:
        return functools.reduce(torch.add, of_ranks.unbind(0))

    spread = None if own.spread is None else total(every[:, 3] + every[:, 4] * lower)
    return maximum, total(every[:, 1] * lower.exp()), total(every[:, 2]), spread


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head) -> None:
    """Refuse what can't be a linear head with labels.

    Raises:
        SuperScaleError: says what does not fit.
    """

    def refuse(what: str) -> None:
        raise SuperScaleError(f"tiled cross entropy: {what}")

    named = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}
    for name, tensor in named.items():
        if isinstance(tensor, DTensor):
            refuse(
                f"{name} is a DTensor, and this loss computes with plain tensors. Pass full_tensor() or to_local() "
                "where it is whole, or this rank's rows to vocab_parallel_cross_entropy_sum."
            )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        refuse(
            "expected hidden [..., H] and weight [V, H]; found "
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        refuse(f"expected a bias of shape ({weight.shape[0]},), one per row of weight; found {tuple(bias.shape)}.")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        refuse(
            f"expected labels of shape {tuple(hidden.shape[:-1])} and dtype torch.int64, one per token; found "
            f"{tuple(labels.shape)} and {labels.dtype}. Probabilities as targets are not supported."
        )
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    others = [weight] if bias is None else [weight, bias]
    if not all(t.is_floating_point() and (is_autocast or t.dtype == hidden.dtype) for t in (hidden, *others)):
        dtypes = ", ".join(str(t.dtype) for t in (hidden, *others))
        refuse(f"expected hidden, weight and bias of one floating dtype, or autocast; found {dtypes}. Cast them first.")
    if not 0.0 <= head.label_smoothing <= 1.0:
        refuse(f"label_smoothing is in [0, 1]; found {head.label_smoothing!r}.")
    if head.tile is not None and (isinstance(head.tile, bool) or not isinstance(head.tile, int) or head.tile < 1):
        refuse(f"tile is a number of tokens of at least 1, or None for a choice; found {head.tile!r}.")
    # On a device with streams the host would wait for it, and an estimate's labels have no values.
    if not (has_streams(labels.device) or is_fake(labels)):
        is_class = (labels >= 0) & (labels < head.vocab_size)
        wrong = labels[~(is_class | (labels == head.ignore_index))]
        if wrong.numel():
            refuse(
                f"labels are classes in [0, {head.vocab_size}) or ignore_index ({head.ignore_index}); found "
                f"{wrong[0].item()}."
            )
