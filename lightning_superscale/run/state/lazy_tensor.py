"""Tensors of a checkpoint whose values are read at their first use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.state import ReadRequest, TensorInfo, TensorKey
from lightning_superscale.layout.box import whole_box
from lightning_superscale.torch_private import make_wrapper, tree_map, without_torch_function

if TYPE_CHECKING:
    from lightning_superscale.run.state.restore import OpenedCheckpoint

# The attributes and methods that need no values.
_SHALLOW: frozenset[Any] = frozenset(
    getattr(Tensor, name).__get__ if isinstance(getattr(Tensor, name), property) or not callable(getattr(Tensor, name))
    else getattr(Tensor, name)
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_meta", "is_cuda",
        "is_sparse", "is_quantized", "is_nested", "size", "dim", "numel", "nelement", "is_floating_point", "is_complex",
        "element_size",
    )
)  # fmt: skip


class LazyTensor(Tensor):
    """A whole tensor of a checkpoint. Shape and dtype are known; any operation reads the values first, on this rank.

    Code that loads many tensors reads them together instead (`read_whole`, `read_boxes`).

    Attributes:
        opened: the checkpoint that has the tensor.
        key: the tensor's key in it.
    """

    opened: OpenedCheckpoint
    key: TensorKey

    @staticmethod
    def __new__(cls: type[LazyTensor], opened: OpenedCheckpoint, key: TensorKey, info: TensorInfo) -> LazyTensor:
        host = torch.device("cpu")
        lazy: LazyTensor = make_wrapper(cls, info.shape, info.dtype, host)
        lazy.key, lazy.opened = key, opened
        return lazy

    def __init__(self, opened: OpenedCheckpoint, key: TensorKey, info: TensorInfo) -> None:
        super().__init__()

    def load(self) -> Tensor:
        """Read the values now, by this rank alone, into a new tensor in host memory."""
        with without_torch_function():
            out = torch.empty(self.shape, dtype=self.dtype)
            self.opened.alone.read([ReadRequest(self.key, whole_box(tuple(self.shape)), out)])
            return out

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with without_torch_function():
            if func in _SHALLOW:
                return func(*args, **kwargs)
            return func(*tree_map(_loaded, args), **tree_map(_loaded, dict(kwargs)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_loaded, args), **tree_map(_loaded, dict(kwargs or {})))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with without_torch_function():
            return f"LazyTensor({self.key}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.load()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.load().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _loaded(value: Any) -> Any:
    return value.load() if isinstance(value, LazyTensor) else value
