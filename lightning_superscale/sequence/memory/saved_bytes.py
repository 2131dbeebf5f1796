"""Counts the bytes that autograd saves for backward: the measure of every part of the long-context kit."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.torch_private import saved_tensor_hooks, storage_id_of


class SavedBytes:
    """Counts what autograd saves while the context is open.

    Each storage counts once and whole, because a saved view keeps all of it. The inside of a checkpointed block counts
    nothing: only the block's inputs are saved. Saved-tensor hooks that are active already are called as without it.
    While the context is open, counted storages stay alive, and torch does not notice saved tensors that are changed in
    place.

    Args:
        apart_from: tensors that live anyway, such as parameters; their storages don't count.

    Attributes:
        nbytes: bytes counted so far.
        num_storages: number of storages counted so far.
    """

    def __init__(self, apart_from: Iterable[Tensor] = ()) -> None:
        self.nbytes = self.num_storages = 0
        self._ignored = {storage_id_of(tensor.untyped_storage()) for tensor in apart_from}
        self._counted: dict[int, torch.UntypedStorage] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._around: tuple[Any, Any] | None = None

    def __enter__(self) -> SavedBytes:
        self._around = saved_tensor_hooks()
        unpack = _as_it_is if self._around is None else self._around[1]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hooks is None:
            raise AssertionError("SavedBytes was left before it was entered")
        self._hooks.__exit__(kind, error, traceback)
        self._counted.clear()
        self._hooks = self._around = None

    def _pack(self, saved: Tensor) -> Any:
        storage = saved.untyped_storage()
        key = storage_id_of(storage)
        if key not in self._ignored and key not in self._counted:
            self._counted[key] = storage
            self.nbytes += storage.nbytes()
            self.num_storages += 1
        return saved if self._around is None else self._around[0](saved)


def _as_it_is(packed: Tensor) -> Tensor:
    return packed
