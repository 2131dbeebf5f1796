"""Bytes of one rank by class, counted from the tensors that exist, beside the arithmetic of their ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_superscale.config import ZeroConfig
from lightning_superscale.offload.weight_flow import WeightFlow
from lightning_superscale.plan import ByteClass
from lightning_superscale.zero.engine import OptimizerEngine
from lightning_superscale.zero.states import UnitState
from lightning_superscale.zero.units import ShardUnit

_ON_HOST = ("master weights", "optimizer states", "transfer buffers")
_ALWAYS_ON_HOST = ("weights (host copy)", "frozen (host copy)")


@dataclass(slots=True)
class _Row:
    """One class while it is summed up.

    Attributes:
        held_bytes: of the tensors, padding included.
        numel: elements of the whole parameters or buffers in it.
        num_shares: ranks that share them.
    """

    bytes_each: int
    num_shares: int
    is_on_host: bool
    held_bytes: int = 0
    numel: int = 0

    def arithmetic(self) -> str:
        shared = f" / {self.num_shares} ranks" if self.num_shares > 1 else ""
        return f"{self.bytes_each} B x {self.numel:,}{shared}"


class _Rows:
    def __init__(self, *, is_offloaded: bool) -> None:
        self.rows: dict[tuple[str, str], _Row] = {}
        self.is_offloaded = is_offloaded

    def add(
        self, name: str, dtype: torch.dtype, numel: int, held_numel: int, *, num_shares: int = 1, copies: int = 1
    ) -> None:
        """Args: copies: tensors of `held_numel` elements each."""
        on_host = name in _ALWAYS_ON_HOST or (self.is_offloaded and name in _ON_HOST)
        key = (name, str(dtype).removeprefix("torch."))
        row = self.rows.setdefault(key, _Row(copies * dtype.itemsize, num_shares, on_host))
        row.held_bytes += copies * held_numel * dtype.itemsize
        row.numel += numel

    def done(self) -> list[ByteClass]:
        return [
            ByteClass(
                name,
                dtype,
                0 if row.is_on_host else row.held_bytes,
                row.held_bytes if row.is_on_host else 0,
                row.arithmetic(),
            )
            for (name, dtype), row in self.rows.items()
        ]


def byte_classes(
    module: nn.Module,
    engines: Iterable[OptimizerEngine],
    zero: ZeroConfig,
    *,
    shard_size: int,
    is_offloaded: bool,
    flow: WeightFlow | None = None,
) -> list[ByteClass]:
    """Bytes of this rank by class.

    Gradients are counted as they are held between micro-batches: whole where ranks reduce once per step, this
    rank's rows otherwise.
    """
    pairs = [pair for engine in engines for pair in zip(engine.transport.units, engine.states, strict=True)]
    rows = _Rows(is_offloaded=is_offloaded)
    flowing = {} if flow is None else flow.block_of
    for unit, state in pairs:
        _add_unit(rows, unit, state, zero, shard_size, flows=unit.params[0] in flowing)
    in_units = {param for unit, _ in pairs for param in unit.params}
    frozen = [
        ("frozen (host copy)" if param in flowing else "frozen weights", param)
        for param in module.parameters()
        if param not in in_units
    ]
    for name, tensor in frozen + [("buffers", buffer) for buffer in module.buffers()]:
        rows.add(name, tensor.dtype, tensor.numel(), tensor.numel())
    return [*rows.done(), *([] if flow is None else [_flowing(flow)])]


def _flowing(flow: WeightFlow) -> ByteClass:
    dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in flow.block_of})
    most = f"at most {flow.most_blocks} of {flow.num_blocks} blocks at a time"
    return ByteClass("weights (flowing)", "/".join(dtypes), flow.most_device_bytes, 0, most)


def _add_unit(
    rows: _Rows, unit: ShardUnit, state: UnitState, zero: ZeroConfig, shard_size: int, *, flows: bool
) -> None:
    numel, share = sum(param.numel() for param in unit.params), unit.shard.shard_numel
    weight_shares = 1 if unit.has_whole_weights else shard_size
    if not flows:
        rows.add("weights", unit.dtype, numel, unit.weight_numel, num_shares=weight_shares)
    elif state.num_host_copies:
        rows.add("weights (host copy)", unit.dtype, numel, share, copies=state.num_host_copies)
    if zero.reduces_once:
        rows.add("gradients", unit.dtype, numel, numel)
    else:
        rows.add("gradients", unit.dtype, numel, share, num_shares=shard_size)
    if state.master is not None:
        rows.add("master weights", state.master.dtype, numel, share, num_shares=shard_size)
    if state.exp_avg is not None:
        rows.add("optimizer states", state.exp_avg.dtype, numel, share, num_shares=shard_size, copies=2)
    if state.num_transfer_buffers:
        copies = state.num_transfer_buffers
        rows.add("transfer buffers", unit.dtype, numel, share, num_shares=shard_size, copies=copies)
