"""What one operation of a traced step costs: floating-point operations, bytes of memory, and how to run it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lightning_superscale.estimation.links import Exchange, Kind
from lightning_superscale.torch_private import tree_leaves, tree_map

Phase = Literal["forward", "backward"]

# Collectives in a model's forward, as comm/in_graph.py issues them.
_COLLECTIVES: dict[str, Kind] = {
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::all_reduce": "all_reduce",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of an operation's arguments, without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Sample:
    """An operation with arguments of certain shapes, of which a step may have many.

    Attributes:
        op: the operation, as `torch.ops` has it.
        key: tells samples apart.
        args, kwargs: its arguments, with a `TensorSpec` in the place of each tensor.
    """

    op: Callable[..., Any]
    key: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self.key == other.key


@dataclass(frozen=True, slots=True)
class TracedOperation:
    """One operation of a step that makes memory or changes it.

    Attributes:
        flops: floating-point operations; 0 for what only moves or maps elements.
        nbytes: bytes that it reads and writes at least.
        dtype: of its first floating-point argument; None without any.
        gradient_flops: floating-point operations that backward needs for the gradients of its factors, as they were
            called with; nothing that is computed again.
        exchange: with the ranks that share a sequence, which the operation is; None for one of this rank alone.
    """

    phase: Phase
    flops: int
    nbytes: int
    dtype: torch.dtype | None
    sample: Sample
    gradient_flops: int = 0
    exchange: Exchange | None = None


def traced(phase: Phase, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> TracedOperation:
    """The cost of a call of an operation, from its arguments and results."""
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
    flops = flops_of(op, args, kwargs, results)
    return TracedOperation(
        phase,
        flops,
        sum(map(_touched_bytes, (*inputs, *outputs))),
        kind_of(inputs),
        _sample(op, args, kwargs),
        gradient_flops(flops, inputs),
        exchange_of(op, args),
    )


def exchange_of(op: Any, args: Sequence[Any]) -> Exchange | None:
    """The collective that a call is; None for one of another operation."""
    kind = _COLLECTIVES.get(getattr(getattr(op, "_schema", None), "name", ""))
    if kind is None:
        return None
    nbytes = args[0].nbytes
    if kind == "all_gather":
        return Exchange(kind, nbytes * args[1])
    if kind == "all_to_all" and 0 in args[1]:  # only the next rank gets something
        return Exchange("ring_shift", nbytes)
    return Exchange(kind, nbytes)


def kind_of(inputs: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of the first floating-point tensor; None without any."""
    return next((tensor.dtype for tensor in inputs if tensor.is_floating_point()), None)


def gradient_flops(flops: int, inputs: Sequence[Tensor]) -> int:
    """Floating-point operations of an operation's backward: those of forward once for each factor with a gradient.

    Attention counts as one product of two factors (arXiv:2204.02311, appendix B): scores that are made again are left
    out, as everything is that backward computes again.
    """
    if not flops or not torch.is_grad_enabled():
        return 0
    return flops * min(2, sum(tensor.requires_grad for tensor in inputs if tensor.ndim > 1))


def _touched_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; an element that it repeats (stride 0) counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def flops_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> int:
    """Floating-point operations of a call; 0 for an operation that only moves or maps elements."""
    packet = getattr(op, "_overloadpacket", op)
    if "scaled_dot_product" in str(packet):
        return _attention_flops(op, args, kwargs)
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=results))


def _attention_flops(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Two products of [queries, keys] in forward, five in backward, which makes the scores again (FlashAttention-2,
    arXiv:2307.08691, section 3.1.2); half of each under a causal mask.
    """
    named = {arg.name: value for arg, value in zip(op._schema.arguments, args, strict=False)} | dict(kwargs)
    query, key, value = named["query"], named["key"], named["value"]
    pairs = math.prod(query.shape[:-2]) * query.shape[-2] * key.shape[-2]
    widths = (query.shape[-1], value.shape[-1])
    is_backward = "backward" in str(op)
    products = 3 * widths[0] + 2 * widths[1] if is_backward else sum(widths)
    flops = 2 * pairs * products
    return int(flops // 2 if named.get("is_causal") else flops)


def _sample(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sample:
    def spec(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return TensorSpec(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype)
        return leaf

    plain_args, plain_kwargs = tree_map(spec, (tuple(args), dict(kwargs)))
    return Sample(op, f"{op}{plain_args}{plain_kwargs}", plain_args, plain_kwargs)
