"""Bytes of one rank by class, counted from the tensors that exist, beside the arithmetic of their ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lightning_superscale.config import ZeroConfig
from lightning_superscale.plan import ByteClass
from lightning_superscale.zero.engine import OptimizerEngine


def byte_classes(
    module: nn.Module, engines: Iterable[OptimizerEngine], zero: ZeroConfig, *, is_offloaded: bool
) -> list[ByteClass]:
    """Bytes of this rank by class. Gradients are whole up to stage 1, and this rank's rows from stage 2 on."""
    pairs = [pair for engine in engines for pair in zip(engine.transport.units, engine.states, strict=True)]
    in_units = {param for unit, _ in pairs for param in unit.params}
    rows: dict[tuple[str, str], list[int]] = {}

    def add(name: str, tensor: torch.Tensor | None, count: int | None = None) -> None:
        if tensor is None:
            return
        row = rows.setdefault((name, str(tensor.dtype).removeprefix("torch.")), [0, 0])
        nbytes = (tensor.numel() if count is None else count) * tensor.element_size()
        row[1 if is_offloaded and name not in ("weights", "gradients", "frozen weights", "buffers") else 0] += nbytes

    for unit, state in pairs:
        add("weights", unit.params[0], unit.weight_numel)
        add("gradients", unit.params[0], unit.weight_numel if zero.stage < 2 else unit.shard.shard_numel)
        add("master weights", state.master)
        add("optimizer states", state.exp_avg)
        add("optimizer states", state.exp_avg_sq)
        if is_offloaded:
            add("transfer buffers", unit.params[0], unit.shard.shard_numel)
    for param in module.parameters():
        if param not in in_units:
            add("frozen weights", param)
    for buffer in module.buffers():
        add("buffers", buffer)
    return [ByteClass(name, dtype, device, host) for (name, dtype), (device, host) in rows.items()]
