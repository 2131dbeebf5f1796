"""Bytes of one rank by class, counted from the tensors that exist, beside the arithmetic of their ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_superscale.comm.dtensor import tensor_numel
from lightning_superscale.config import ZeroConfig
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.grad_dtypes import grad_dtype_of
from lightning_superscale.optim.unit import ShardUnit
from lightning_superscale.optim.unit_state import Home, UnitState
from lightning_superscale.run.report.plan import ByteClass


@dataclass(slots=True)
class _Row:
    """One class while it is summed up.

    Attributes:
        device_bytes, host_bytes: of the tensors, padding included.
        numel: elements of the whole parameters or buffers in it; of those that a plan cut, this rank's part.
        num_shares: ranks that share them.
    """

    bytes_each: int
    num_shares: int
    device_bytes: int = 0
    host_bytes: int = 0
    numel: int = 0

    def arithmetic(self) -> str:
        shared = f" / {self.num_shares} ranks" if self.num_shares > 1 else ""
        return f"{self.bytes_each} B x {self.numel:,}{shared}"


class _Rows:
    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], _Row] = {}

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        numel: int,
        held_numel: int,
        *,
        num_shares: int = 1,
        copies: int = 1,
        home: Home = "device",
    ) -> None:
        """Args: copies: tensors of `held_numel` elements each."""
        key = (name, str(dtype).removeprefix("torch."))
        row = self.rows.setdefault(key, _Row(copies * dtype.itemsize, num_shares))
        held_bytes = copies * held_numel * dtype.itemsize
        if home == "host":
            row.host_bytes += held_bytes
        else:
            row.device_bytes += held_bytes
        row.numel += numel

    def done(self) -> list[ByteClass]:
        return [
            ByteClass(name, dtype, row.device_bytes, row.host_bytes, row.arithmetic())
            for (name, dtype), row in self.rows.items()
        ]


def byte_classes(
    module: nn.Module,
    engines: Iterable[OptimizerEngine],
    zero: ZeroConfig,
    *,
    shard_size: int,
    flow: WeightFlow | None = None,
) -> list[ByteClass]:
    """Bytes of this rank by class.

    Gradients are counted as they are held between micro-batches: whole where ranks reduce once per step, this
    rank's rows otherwise.
    """
    pairs = [pair for engine in engines for pair in zip(engine.transport.units, engine.states, strict=True)]
    rows = _Rows()
    flowing = {} if flow is None else flow.block_of
    for unit, state in pairs:
        _add_unit(rows, unit, state, zero, shard_size, flows=unit.params[0] in flowing)
    in_units = {param for unit, _ in pairs for param in unit.params}
    for param in (param for param in module.parameters() if param not in in_units):
        name = "frozen (host copy)" if param in flowing else "frozen weights"
        rows.add(
            name, param.dtype, tensor_numel(param), tensor_numel(param), home="host" if param in flowing else "device"
        )
    for buffer in module.buffers():
        rows.add("buffers", buffer.dtype, tensor_numel(buffer), tensor_numel(buffer))
    return [*rows.done(), *([] if flow is None else [_flowing(flow)])]


def _flowing(flow: WeightFlow) -> ByteClass:
    dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in flow.block_of})
    most = f"at most {flow.most_blocks} of {flow.num_blocks} blocks at a time"
    return ByteClass("weights (flowing)", "/".join(dtypes), flow.most_device_bytes, 0, most)


def _add_unit(
    rows: _Rows, unit: ShardUnit, state: UnitState, zero: ZeroConfig, shard_size: int, *, flows: bool
) -> None:
    numel, share = sum(map(tensor_numel, unit.params)), unit.shard.shard_numel
    weight_shares = 1 if unit.has_whole_weights else shard_size
    if not flows:
        rows.add("weights", unit.dtype, numel, unit.weight_numel, num_shares=weight_shares)
    elif state.host_copy_numel:
        rows.add("weights (host copy)", unit.dtype, numel, state.host_copy_numel, home="host")
    if zero.reduces_once:
        rows.add("gradients", grad_dtype_of(unit.params[0]), numel, numel)
    else:
        rows.add("gradients", grad_dtype_of(unit.params[0]), numel, share, num_shares=shard_size)
    for kept in state.bytes():
        rows.add(
            kept.name,
            kept.dtype,
            numel,
            share,
            num_shares=shard_size,
            copies=kept.copies,
            home=kept.home,
        )
