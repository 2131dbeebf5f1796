"""Counts the floating-point operations of a model's own step while it runs, for what share of a device it uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.estimation.tracing.operations import flops_of, gradient_flops, kind_of
from lightning_superscale.torch_private import (
    TorchDispatchMode,
    has_compiled_code,
    is_in_backward,
    tree_leaves,
)


class ModelFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts the products of forward, with those that backward will need for gradients.

    It sees operations below autograd, where tensors are what they are on this rank, and calls each as it is. Work that
    backward does, or does again, is not counted. The forward of a reentrant checkpoint counts without the gradients of
    its activations, since torch runs it without them.

    Attributes:
        by_dtype: floating-point operations so far, by the dtype of the factors; None for factors of none.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_dtype: Counter[torch.dtype | None] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not Tensor for kind in types):
            return NotImplemented  # a tensor of several ranks does its part by operations that are seen in their turn
        results = op(*args, **(kwargs or {}))
        flops = 0 if is_in_backward() else flops_of(op, args, kwargs or {}, results)
        if flops:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.by_dtype[kind_of(inputs)] += flops + gradient_flops(flops, inputs)
        return results


@contextmanager
def counting_flops() -> Iterator[ModelFlops]:
    """A context that counts; nothing may be compiled, because compiled code is not seen, and would not run as it is.

    Raises:
        SuperScaleError: something in this process was compiled.
    """
    if has_compiled_code():
        raise SuperScaleError("floating-point operations can't be counted: this process has code of torch.compile.")
    with ModelFlops() as counted:
        yield counted
