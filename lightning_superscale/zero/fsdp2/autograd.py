"""Supports uses of gathered weights by autograd beyond one plain backward: graphs of graphs, and users' hooks.

[Note: Second order] A backward with `create_graph=True` saves the gathered weights once more, for a backward through
itself that no hook on a module's output announces; that would read freed memory. So groups that such a backward
reaches stay gathered until their weights change; frozen groups, until training ends. Only memory is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.torch_private import backward_hooks_of, has_post_accumulate_hooks, tree_leaves

_Hooks = Mapping[int, Callable[[Tensor], Tensor | None]]


class GroupGraphs:
    """Tracks the groups that are in graphs of this step, by index, and keeps those gathered that second order reads.

    Args:
        reshards_after_forward: whether groups reshard after forward where nothing keeps them gathered.
    """

    def __init__(self, *, reshards_after_forward: bool) -> None:
        self._reshards_after_forward = reshards_after_forward
        self._kept: set[int] = set()
        self._used: set[int] = set()

    def watch(self, index: int, module: nn.Module) -> RemovableHandle:
        """Follow a group's forwards and their backward. Call it after FSDP2 registered its own hooks on the module."""
        fsdp = cast(FSDPModule, module)

        def reached(_grad: Tensor) -> None:
            if torch.is_grad_enabled() and index not in self._kept:
                self._kept.add(index)
                fsdp.set_reshard_after_backward(False, recurse=False)
                fsdp.set_reshard_after_forward(False, recurse=False)

        def after(_module: nn.Module, _inputs: object, outputs: object) -> None:
            if torch.is_grad_enabled():
                self._used.add(index)
                for output in tree_leaves(outputs):
                    if isinstance(output, Tensor) and output.requires_grad:
                        output.register_hook(reached)  # type: ignore[no-untyped-call]

        return module.register_forward_hook(cast(Any, torch.compiler.disable(after)))  # type: ignore[no-untyped-call]

    def allow_reshard(self, index: int, module: nn.Module) -> None:
        """Let a group reshard as usual again: its weights change, so no graph may use the old ones."""
        if index in self._kept:
            self._kept.discard(index)
            fsdp = cast(FSDPModule, module)
            fsdp.set_reshard_after_backward(True, recurse=False)
            fsdp.set_reshard_after_forward(self._reshards_after_forward, recurse=False)

    def take_used(self, groups: set[int]) -> set[int]:
        """The groups among `groups` whose forward was recorded for a backward since the last call for them."""
        used = self._used & groups
        self._used -= used
        return used


class UsersHooks:
    """Runs the hooks that users registered on parameters on the gradients of the unsharded parameters.

    Args:
        original_of: the parameter that a sharded one replaced; hooks of both count.
    """

    def __init__(self, original_of: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self._original_of = dict(original_of)
        self._followed: dict[nn.Parameter, nn.Parameter] = {}

    def hooks_of(self, param: nn.Parameter) -> list[_Hooks]:
        """The hooks that `register_hook` put on a sharded parameter and its original, the original's first."""
        owners = (self._original_of.get(param), param)
        return [hooks for owner in owners if owner is not None and (hooks := backward_hooks_of(owner))]

    def hand_back(self, plain: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Register hooks of sharded parameters on the plain ones that take their place; old handles don't remove them.

        Args:
            plain: by sharded parameter, the plain one.
        """
        for param, own in plain.items():
            for hooks in self.hooks_of(param):
                for hook in hooks.values():
                    own.register_hook(hook)  # type: ignore[no-untyped-call]

    def follow(self, param: nn.Parameter, unsharded: nn.Parameter, fqn: str) -> RemovableHandle | None:
        """Let hooks of a sharded parameter see the gradient of the gathered one, before a transport takes it.

        Returns:
            the handle of a new hook on `unsharded`; None if it has one already, or none is needed.

        Raises:
            SuperScaleError: a post-accumulate hook would read `param.grad`, where a sharded parameter has no gradient.
        """
        for owner in (self._original_of.get(param), param):
            if owner is not None and has_post_accumulate_hooks(owner):
                raise SuperScaleError(
                    f"parameter {fqn!r} has a hook of register_post_accumulate_grad_hook(), which reads param.grad; "
                    "with ZeRO-3 that is empty until the step. Use param.register_hook(), which is given the gradient, "
                    "or ZeRO-2."
                )
        if self._followed.get(param) is unsharded or not self.hooks_of(param):
            return None
        self._followed[param] = unsharded

        def run(grad: Tensor) -> Tensor:
            for hooks in self.hooks_of(param):
                for hook in tuple(hooks.values()):
                    found = hook(grad)
                    grad = grad if found is None else found
            return grad

        return cast(RemovableHandle, unsharded.register_hook(run))  # type: ignore[no-untyped-call]
