"""Layers whose weights a tensor-parallel plan cut, when tokens meet them.

torch's plans make DTensors of a layer's inputs in hooks before its forward, and plain tensors of its outputs in hooks
after it. A DTensor has no tokens. So the hooks of this file lie around those: they hand a layer this rank's part of its
input as a plain tensor, and give what comes out the tokens of what went in. That is right for layers that treat every
token by itself, whatever the plan does with features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.layout import Sharded
from lightning_superscale.sequence.tokens.rules.products import entered
from lightning_superscale.sequence.tokens.tensor import entering, layout_of, plain, with_layout
from lightning_superscale.sequence.whole import are_whole
from lightning_superscale.torch_private import AsyncCollectiveTensor


class ParallelLayers:
    """From `install` to `remove`, the layers of a tensor-parallel plan compute with tokens that ranks share."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        # The tokens of the input with which each layer's present call began.
        self._inputs: dict[nn.Module, Sharded | None] = {}

    def install(self, root: nn.Module) -> None:
        """Hook all layers of a plan.

        Raises:
            SequenceParallelError: a plan cut a module that is no Linear and no Embedding; names it.
        """
        for name, module in root.named_modules():
            if not any(isinstance(param, DTensor) for param in module.parameters(recurse=False)):
                continue
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                raise SequenceParallelError(
                    f"{name} is a {type(module).__name__} of a tensor-parallel plan; expected only Linear and "
                    "Embedding layers in it, with sequence=: torch's SequenceParallel style cuts the sequences that "
                    "ranks share already. Leave it out of the plan."
                )
            self._handles += [
                module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            ]

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        self._inputs.clear()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._inputs[module] = None
        given: Any = args[0] if args else kwargs.get("input")
        if layout_of(given) is None:
            return None
        x = given if are_whole() else entered(given)
        layout = layout_of(x)
        own = plain(entering(x))
        if isinstance(layout, Sharded):
            if isinstance(module, nn.Linear) and layout.tokens.dim == own.dim() - 1:
                _call(module, x).refuse("mixes tokens with one another", "Apply layers to the dim of features.")
            self._inputs[module] = layout
        return (own, *args[1:]), {name: value for name, value in kwargs.items() if name != "input"}

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        layout = self._inputs.pop(module, None)
        if layout is None:
            return None
        if isinstance(output, DTensor):
            _call(module, output).refuse(
                "returns a DTensor, which has no tokens", "Let its style of the plan return local tensors."
            )
        if isinstance(output, AsyncCollectiveTensor):
            output = _Arrived.apply(output)  # type: ignore[no-untyped-call]
        size = output.shape[layout.tokens.dim]
        if size != layout.local_size:
            _call(module, output).refuse(
                f"returns {size} tokens on dim {layout.tokens.dim} where this rank has {layout.local_size}",
                "Let its style of the plan cut features, not the sequence, which ranks share already.",
            )
        return with_layout(output, layout)


class _Arrived(torch.autograd.Function):
    """A plain tensor of one that torch's plan has not waited for."""

    @staticmethod
    def forward(ctx: Any, x: AsyncCollectiveTensor) -> Tensor:
        return x.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _call(module: nn.Module, x: Tensor) -> Call:
    return Call(module.forward, f"{type(module).__name__} of a tensor-parallel plan", (x,), {})
