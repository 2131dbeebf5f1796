"""Puts an attention over ranks in the place of torch's, so that models whose batch a test cuts attend by it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_superscale.sequence.attention.sdpa import plain_attention


class Replacement:
    """torch's attention function is another one from `install` to `remove`.

    Args:
        attend: has the arguments of torch's function.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self._attend = attend
        self._before: Callable[..., Tensor] = plain_attention
        self._had_fast_path = True

    def install(self) -> None:
        """Take the place of torch's function."""
        self._before = functional.scaled_dot_product_attention
        # In evaluation torch's MultiheadAttention would go by another road, past this function.
        self._had_fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        functional.scaled_dot_product_attention = _named_like_torchs(self._before, self._attend)

    def remove(self) -> None:
        """Give the place back."""
        functional.scaled_dot_product_attention = self._before
        torch.backends.mha.set_fastpath_enabled(self._had_fast_path)


def _named_like_torchs(local: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the name of torch's, which torch's own registers of functions ask for."""

    @functools.wraps(local, assigned=("__name__", "__qualname__", "__doc__"))
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs)

    return scaled_dot_product_attention
