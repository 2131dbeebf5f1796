"""Puts an attention over ranks in the place of torch's, for as long as a model trains with it.

[Note: Replacement] A model calls `torch.nn.functional.scaled_dot_product_attention` by that name, looked up at each
call: directly, or through Hugging Face's attention functions, or torch's MultiheadAttention without `need_weights`. So
the name stands for another function from set-up to tear-down. Activation checkpointing, which calls it again in
backward and on threads of autograd, finds the same function there, and not one that was there during forward only.

A module that computes with whole sequences of its own, such as a frozen teacher, runs within `local_attention()`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.errors import SequenceParallelError
from lightning_superscale.sequence.attention.sdpa import plain_attention

_local = threading.local()


@contextlib.contextmanager
def local_attention() -> Iterator[None]:
    """Within it, this thread attends to this rank's tokens alone, as without sequence parallelism.

    Backward needs no such context, unless activation checkpointing computes the module again: then the function that is
    checkpointed has to open it.
    """
    before = getattr(_local, "depth", 0)
    _local.depth = before + 1
    try:
        yield
    finally:
        _local.depth = before


def is_local() -> bool:
    """Whether this thread is within `local_attention()`."""
    return getattr(_local, "depth", 0) > 0


class Replacement:
    """torch's attention function is another one from `install` to `remove`.

    Args:
        attend: has the arguments of torch's function.
    """

    _installed: Replacement | None = None

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self._attend = attend
        self._before: Callable[..., Tensor] = plain_attention
        self._had_fast_path = True

    def install(self) -> None:
        """Take the place of torch's function.

        Raises:
            SequenceParallelError: another run of this process has taken it.
        """
        if Replacement._installed is not None:
            raise SequenceParallelError(
                "another run of this process shares its sequences among ranks; end it before this one begins"
            )
        Replacement._installed = self
        self._before = functional.scaled_dot_product_attention
        # In evaluation torch's MultiheadAttention would go by another road, past this function.
        self._had_fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        functional.scaled_dot_product_attention = _named_like_torchs(self._before, self._attend)

    def remove(self) -> None:
        """Give the place back; nothing where it was not taken."""
        if Replacement._installed is not self:
            return
        Replacement._installed = None
        functional.scaled_dot_product_attention = self._before
        torch.backends.mha.set_fastpath_enabled(self._had_fast_path)


def _named_like_torchs(local: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the name of torch's, which torch's own registers of functions ask for."""

    @functools.wraps(local, assigned=("__name__", "__qualname__", "__doc__"))
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        return (local if is_local() else attend)(*args, **kwargs)

    return scaled_dot_product_attention
