"""Activation checkpointing that gives a block its tokens back, where saved-tensor hooks made plain tensors of them.

A checkpoint saves its inputs as autograd does. Where saved-tensor hooks are active (`torch.autograd.graph.save_on_cpu`,
weight flow), autograd makes a new, plain tensor of what they unpack. The block that is computed again would take this
rank's part for all tokens, attend to it alone, and pass a wrong gradient on without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_superscale.sequence.tokens.tensor import layout_of, with_layout
from lightning_superscale.torch_private import wrap_checkpointed_blocks


class Checkpoints:
    """From the first `install` to the last `remove` of a process, both kinds of checkpoint keep layouts."""

    _users = 0
    _end: Callable[[], None] | None = None

    def __init__(self) -> None:
        self._is_installed = False

    def install(self) -> None:
        if self._is_installed:
            return
        self._is_installed = True
        Checkpoints._users += 1
        if Checkpoints._users == 1:
            Checkpoints._end = wrap_checkpointed_blocks(restoring)

    def remove(self) -> None:
        """Put torch's functions back, unless another run needs them; nothing where it was not installed."""
        if not self._is_installed:
            return
        self._is_installed = False
        Checkpoints._users -= 1
        if Checkpoints._users == 0 and Checkpoints._end is not None:
            Checkpoints._end()


def restoring(run: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """A function that gives plain tensors among its arguments the layouts that `args` have."""
    layouts = [layout_of(x) for x in args]
    if not any(layouts):
        return run

    def restored(*args: Any, **kwargs: Any) -> Any:
        given = (
            with_layout(x, layout) if layout is not None and type(x) is Tensor else x
            for x, layout in zip(args, layouts, strict=True)
        )
        return run(*given, **kwargs)

    return restored
