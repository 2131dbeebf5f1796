"""Outputs of sharded modules, as tensors that are no views.

FSDP gathers a module's weights for backward in a hook on the module's output. Writing to a view in place takes it from
the graph that its hooks are in, and what a linear layer returns is a view: weights would be missing in backward after
`y = block(x); y += x`. So what such a module returns is made a tensor of its own, of the same memory, before FSDP sees
it. Autograd knows nothing of their sharing: outputs that share memory with one another stay views, as FSDP warns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lightning_superscale.sequence.tokens.nested import leaves_of, map_leaves
from lightning_superscale.sequence.tokens.tensor import TokenTensor, is_of_its_own, layout_of, plain
from lightning_superscale.torch_private import same_memory_as


class OwnOutputs:
    """From `install` to `remove`, sharded modules return tensors of tokens that are no views."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def install(self, root: nn.Module) -> None:
        """Hook all modules of which FSDP shards the weights, before FSDP's own hooks."""
        for module in root.modules():
            if isinstance(module, FSDPModule):
                self._handles.append(module.register_forward_hook(_own_output, prepend=True))

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()


def _own_output(module: nn.Module, args: Any, output: Any) -> Any:
    tokens = [x for x in leaves_of(output) if type(x) is TokenTensor and x.requires_grad]
    memory = [plain(x).untyped_storage().data_ptr() for x in tokens]
    alone = {id(x) for x, at in zip(tokens, memory, strict=True) if memory.count(at) == 1 and not is_of_its_own(x)}
    return map_leaves(lambda x: _Own.apply(x) if id(x) in alone else x, output)  # type: ignore[no-untyped-call]


class _Own(torch.autograd.Function):
    """The same tensor with tokens, which autograd takes for no view of it."""

    @staticmethod
    def forward(ctx: Any, x: TokenTensor) -> Tensor:
        own: Tensor = same_memory_as(plain(x), TokenTensor)
        own.placement = layout_of(x)  # type: ignore[attr-defined]
        return own

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]
