"""States the bytes of weights and gradients of a ZeRO stage; see [Note: One memory model] in layout/memory.py."""

from __future__ import annotations

import torch

from lightning_superscale.layout.memory import Axis, MemoryModel
from lightning_superscale.ops.state_dtypes import bytes_of


def trained_memory(
    weights: torch.dtype, gradients: torch.dtype, *, has_whole_weights: bool, reduces_once: bool, flows: bool
) -> MemoryModel:
    """The bytes of weights and gradients of trained parameters, gradients as they are between micro-batches.

    Args:
        weights, gradients: dtypes of both.
        has_whole_weights: each rank keeps all weights between steps; stage 3 divides those that FSDP2 gathers.
        reduces_once: `ZeroConfig.reduces_once`: gradients are whole until the step.
        flows: weights are in host memory, and the offload engine's model states their bytes.
    """
    on_device = [bytes_of("weights", weights, "device", axis=None if has_whole_weights else "shard")]
    axis: Axis | None = None if reduces_once else "shard"
    return MemoryModel((*([] if flows else on_device), bytes_of("gradients", gradients, "device", axis=axis)))


def frozen_memory(weights: torch.dtype, *, flows: bool) -> MemoryModel:
    """The bytes of the weights of parameters that are not trained, all of which each rank has."""
    if flows:
        return MemoryModel((bytes_of("frozen (host copy)", weights, "host", axis=None),))
    return MemoryModel((bytes_of("frozen weights", weights, "device", axis=None),))
