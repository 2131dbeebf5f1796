"""The seam between checkpointed blocks and where their inputs are kept until backward.

[Note: Boundary activations] A checkpointed block saves its inputs and nothing else. Those of them that come from the
block before, that is, floating tensors that want a gradient, are the boundary activations: H numbers per token and
block, which a store may keep elsewhere or in fewer bits. Other inputs, such as masks and positions, are shared by all
blocks and stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_superscale.sequence.tokens.tensor import plain
from lightning_superscale.torch_private import saved_tensor_hooks, storage_id_of


class BoundaryStore(Protocol):
    """Keeps the boundary activations of checkpointed blocks between forward and backward."""

    def saving(self, block: int, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        """A context in which a block saves its inputs.

        Args:
            block: number of the block, in the order of forward.
            inputs: all tensors among the block's arguments.
        """


def boundary_hooks(
    inputs: Sequence[Tensor], pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> torch.autograd.graph.saved_tensors_hooks:
    """Saved-tensor hooks that hand the boundary activations among `inputs` to `pack`, each once.

    Other tensors go to the hooks that are active now, if any, which these would hide.

    Args:
        pack: returns what is kept in place of a tensor.
        unpack: returns the tensor for what is kept; it is called once per backward.
    """
    boundary = {_place_of(tensor) for tensor in inputs if is_boundary(tensor)}
    pack_other, unpack_other = saved_tensor_hooks() or (_as_it_is, _as_it_is)

    def pack_one(saved: Tensor) -> Any:
        # Of tokens that ranks share, a store gets this rank's part.
        return _Packed(pack(plain(saved).detach())) if _place_of(saved) in boundary else pack_other(saved)

    def unpack_one(kept: Any) -> Tensor:
        return unpack(kept.content) if isinstance(kept, _Packed) else unpack_other(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack_one, unpack_one)


def is_boundary(tensor: Tensor) -> bool:
    """Whether an input of a block is a boundary activation; see [Note: Boundary activations]."""
    return plain(tensor).is_floating_point() and plain(tensor).requires_grad


def _as_it_is(saved: Any) -> Any:
    return saved


class _Packed(NamedTuple):
    """What a store keeps in place of a tensor."""

    content: Any


def _place_of(tensor: Tensor) -> tuple[object, ...]:
    memory = plain(tensor)
    return storage_id_of(memory.untyped_storage()), memory.storage_offset(), memory.shape, memory.stride(), memory.dtype
