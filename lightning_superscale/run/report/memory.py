"""Bytes of one rank by class, counted from the tensors that exist, beside the arithmetic of what should be there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_superscale.comm.dtensor import tensor_numel
from lightning_superscale.layout.memory import Home, MemoryModel
from lightning_superscale.layout.rows import ParamSpec
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.ops.state_dtypes import bytes_of, dtype_name
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.grad_dtypes import grad_dtype_of
from lightning_superscale.optim.mixed_step import MixedStep
from lightning_superscale.optim.step_rule import StepRule
from lightning_superscale.optim.unit import ShardUnit
from lightning_superscale.optim.unit_state import UnitState
from lightning_superscale.run.memory import states_memory
from lightning_superscale.run.report.plan import ByteClass
from lightning_superscale.run.settings import RunSettings
from lightning_superscale.zero.memory import frozen_memory, trained_memory


@dataclass(slots=True)
class _Row:
    """One class while it is summed up.

    Attributes:
        device_bytes, host_bytes: bytes of the tensors that exist, padding included.
        numel: elements of the unsharded parameters or buffers of the class; of tensor-parallel ones, this rank's part.
        expected_bytes: of these by the memory model, summed over the ranks that share them; 0 where it has none.
        num_shares: ranks that share the class.
    """

    device_bytes: int = 0
    host_bytes: int = 0
    numel: int = 0
    expected_bytes: float = 0
    num_shares: int = 1

    def arithmetic(self) -> str:
        """Bytes per element, the mean where parameters differ, times their number."""
        shared = f" / {self.num_shares} ranks" if self.num_shares > 1 else ""
        return f"{self.expected_bytes / self.numel:g} B x {self.numel:,}{shared}" if self.expected_bytes else ""


class _Rows:
    """Rows of the table of bytes, filled from counted tensors and from the memory model.

    Args:
        shard_size: ranks that share a sharded class.
    """

    def __init__(self, shard_size: int) -> None:
        self._shard_size = shard_size
        self.rows: dict[tuple[str, str], _Row] = {}

    def count(self, name: str, dtype: torch.dtype, numel: int, home: Home = "device") -> None:
        """Add tensors of `numel` elements that exist on this rank."""
        row = self.rows.setdefault((name, dtype_name(dtype)), _Row())
        if home == "host":
            row.host_bytes += numel * dtype.itemsize
        else:
            row.device_bytes += numel * dtype.itemsize

    def expect(self, model: MemoryModel, numel: int) -> None:
        """Add the bytes that parameters of `numel` elements should take by the memory model."""
        for one in model.classes:
            row = self.rows.setdefault((one.name, one.dtype), _Row())
            row.numel += numel
            row.expected_bytes += one.bytes * numel
            row.num_shares = self._shard_size if one.axis == "shard" else 1

    def done(self) -> list[ByteClass]:
        return [
            ByteClass(name, dtype, row.device_bytes, row.host_bytes, row.arithmetic())
            for (name, dtype), row in self.rows.items()
        ]


def byte_classes(
    module: nn.Module, engines: Iterable[OptimizerEngine], settings: RunSettings, link_dtype: LinkDtype
) -> list[ByteClass]:
    """Bytes of this rank by class.

    Gradients are counted as they are between micro-batches: unsharded where ranks reduce once per step, this rank's
    shard otherwise.
    """
    kept = [
        (unit, state, engine.rule)
        for engine in engines
        for unit, state in zip(engine.transport.units, engine.states, strict=True)
    ]
    rows = _Rows(settings.mesh.shard.size)
    flow = settings.flow
    flowing = {} if flow is None else flow.block_of
    for unit, state, rule in kept:
        flows = unit.params[0] in flowing
        _count_unit(rows, unit, state, settings, flows=flows)
        for piece, param in zip(unit.shard.slices, unit.params, strict=True):
            model = _model_of(unit, piece.spec, state, rule, settings, link_dtype, flows=flows)
            rows.expect(model, tensor_numel(param))
    in_units = {param for unit, _, _ in kept for param in unit.params}
    for param in (param for param in module.parameters() if param not in in_units):
        model, numel = frozen_memory(param.dtype, flows=param in flowing), tensor_numel(param)
        for one in model.classes:
            rows.count(one.name, param.dtype, numel, one.home)
        rows.expect(model, numel)
    for buffer in module.buffers():
        rows.count("buffers", buffer.dtype, tensor_numel(buffer))
        rows.expect(MemoryModel((bytes_of("buffers", buffer.dtype, "device", axis=None),)), tensor_numel(buffer))
    return rows.done()


def _count_unit(rows: _Rows, unit: ShardUnit, state: UnitState, settings: RunSettings, *, flows: bool) -> None:
    share = unit.shard.shard_numel
    if not flows:
        rows.count("weights", unit.dtype, unit.weight_numel)
    elif state.host_copy_numel:
        rows.count("weights (host copy)", unit.dtype, state.host_copy_numel, "host")
    whole = sum(map(tensor_numel, unit.params))
    rows.count("gradients", grad_dtype_of(unit.params[0]), whole if settings.zero.reduces_once else share)
    for kept in state.bytes():
        rows.count(kept.name, kept.dtype, kept.copies * (share if kept.numel is None else kept.numel), kept.home)


def _model_of(
    unit: ShardUnit,
    spec: ParamSpec,
    state: UnitState,
    rule: StepRule,
    settings: RunSettings,
    link_dtype: LinkDtype,
    *,
    flows: bool,
) -> MemoryModel:
    return trained_memory(
        unit.dtype,
        grad_dtype_of(unit.params[0]),
        has_whole_weights=unit.has_whole_weights,
        reduces_once=settings.zero.reduces_once,
        flows=flows,
    ) + states_memory(
        settings.precision.states,
        settings.offload,
        spec,
        unit.dtype,
        num_shares=settings.mesh.shard.size,
        is_on_host="host" in state.homes,
        link_dtype=link_dtype,
        has_moments=state.exp_avg is not None,
        flows=flows,
        rule=rule.host if isinstance(rule, MixedStep) else rule,
    )
