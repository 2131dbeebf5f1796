"""Bytes of one rank by class, before the run is there: the memory model's, for each parameter in its place.

[Note: Predicted bytes] Every parameter has its slice of a unit's buffer on the rank with the most rows, aligned as
`layout.rows.unit_layout` does, and takes of it what the memory model states ([Note: One memory model] in
layout/memory.py). `explain()` of a run counts the same bytes from the tensors that exist; tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_superscale.estimation.setup import Setup
from lightning_superscale.estimation.tracing.step import StepTrace
from lightning_superscale.layout.memory import BytesPerParam, MemoryModel
from lightning_superscale.layout.rows import ParamSpec, align_up, shard_rows
from lightning_superscale.offload.weight_flow.schedule import BLOCKS_AHEAD
from lightning_superscale.ops.state_dtypes import bytes_of, dtype_name
from lightning_superscale.optim.bucketing import Grouping, last_ready
from lightning_superscale.run.memory import states_memory
from lightning_superscale.run.report.plan import ByteClass
from lightning_superscale.run.techniques.long_context import INPUTS_OF_BLOCKS
from lightning_superscale.zero.fsdp2.wrap import blocks_with_own_params, left_out_of, plan_groups, wrap_plan
from lightning_superscale.zero.memory import frozen_memory, trained_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter as the run will have it.

    Attributes:
        dtype: of its weights in forward and backward.
        is_on_host: whether its states are in host memory.
        is_gathered: whether FSDP2 shards its weights and gathers them for each pass.
        block: number of the block of modules that streams or gathers it; None outside of all.
    """

    spec: ParamSpec
    dtype: torch.dtype
    trains: bool
    is_on_host: bool
    is_gathered: bool
    block: int | None

    @property
    def numel(self) -> int:
        return self.spec.numel

    def shard_numel(self, num_shards: int) -> int:
        """Elements of the rank that has the most."""
        first, last = shard_rows(self.spec.num_rows, 0, num_shards)
        return (last - first) * self.spec.row_numel


def params_of(module: nn.Module, setup: Setup) -> list[Param]:
    """The parameters of a module, on the meta device or any other, in the order of their registration."""
    named = [(fqn, _stand_in(param, setup)) for fqn, param in module.named_parameters()]
    original = dict(zip((twin for _, twin in named), module.parameters(), strict=True))
    block_of, left_out = _blocks(module, setup)
    on_device = _on_device(named, setup)
    return [
        Param(
            spec=ParamSpec(fqn, tuple(twin.shape)),
            dtype=twin.dtype,
            trains=twin.requires_grad,
            is_on_host=setup.offload is not None and twin not in on_device,
            is_gathered=setup.shards_weights and original[twin] in block_of and original[twin] not in left_out,
            block=block_of.get(original[twin]),
        )
        for fqn, twin in named
    ]


def _stand_in(param: nn.Parameter, setup: Setup) -> nn.Parameter:
    shape, dtype = param.shape, setup.dtype_of(param)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=param.requires_grad)


def _blocks(module: nn.Module, setup: Setup) -> tuple[Mapping[nn.Parameter, int], Collection[nn.Parameter]]:
    """By parameter, the block that streams it from the host or in which FSDP2 gathers it; and what FSDP2 leaves out."""
    if setup.flows and setup.offload is not None:
        blocks = blocks_with_own_params(module, setup.offload.wrap)
        return {param: i for i, (_, _, own) in enumerate(blocks) for param in own.values()}, ()
    if setup.shards_weights:
        plans = plan_groups(module, wrap_plan(module, setup.zero.wrap, include_root=False))
        return {param: i for i, plan in enumerate(plans) for param in plan.params.values()}, left_out_of(plans)
    return {}, ()


def _on_device(named: Sequence[tuple[str, nn.Parameter]], setup: Setup) -> frozenset[nn.Parameter]:
    """The trained parameters whose states stay on the device."""
    trained = [(fqn, param) for fqn, param in named if param.requires_grad]
    numels = {param: param.numel() for _, param in trained}
    return last_ready(Grouping(1).in_order(trained), numels, round(setup.on_device * sum(numels.values())))


def byte_classes(module: nn.Module, params: Sequence[Param], setup: Setup) -> list[ByteClass]:
    """Bytes of the rank with the most rows, by class, between two steps; gradients as between micro-batches.

    Args:
        params: what `params_of` gave for this module and setup.
    """
    rows = _Rows()
    for param in params:
        flows = setup.flows and param.block is not None
        if not param.trains:
            for one in frozen_memory(param.dtype, flows=flows).classes:
                rows.add(one, round(one.bytes * param.numel))
            continue
        for one in _classes_of(param, setup, flows=flows):
            rows.add(one, _bytes_here(one, param, setup))
    for buffer in module.buffers():
        one = bytes_of("buffers", setup.dtype_of(buffer), "device", axis=None)
        rows.add(one, round(one.bytes * buffer.numel()))
    if setup.flows:
        rows.flowing(params)
    return rows.classes()


def activations_class(trace: StepTrace) -> list[ByteClass]:
    """The row of activations in host memory, under the name that `explain()` has for it; none without any."""
    nbytes = trace.on_host.nbytes
    return [ByteClass(INPUTS_OF_BLOCKS, "", 0, nbytes)] if nbytes else []


def share_on_device(param: Param, setup: Setup) -> float:
    """Share of a trained parameter's elements that step on the device, and whose gradients stay there until then."""
    if not param.is_on_host:
        return 1.0
    flows = setup.flows and param.block is not None
    states = states_of(param, setup, flows=flows).classes
    return max((one.share for one in states if one.home == "device" and "states" in one.name), default=0.0)


def _classes_of(param: Param, setup: Setup, *, flows: bool) -> Sequence[BytesPerParam]:
    held = trained_memory(
        param.dtype,
        setup.precision.gradients.accumulation or param.dtype,
        has_whole_weights=not param.is_gathered,
        reduces_once=setup.zero.reduces_once,
        flows=flows,
    )
    return (held + states_of(param, setup, flows=flows)).classes


def states_of(param: Param, setup: Setup, *, flows: bool) -> MemoryModel:
    """What the memory model states of a trained parameter's masters, moments and buffers."""
    return states_memory(
        setup.precision.states,
        setup.offload,
        param.spec,
        param.dtype,
        num_shares=setup.num_shards,
        is_on_host=param.is_on_host,
        link_dtype="weights" if setup.flows else setup.link_dtype,
        flows=flows,
    )


def _bytes_here(one: BytesPerParam, param: Param, setup: Setup) -> int:
    if one.name == "gradients" and one.axis is None:
        return round(one.bytes * param.numel)  # each in memory of its own
    return one.padded_bytes(param.numel if one.axis is None else param.shard_numel(setup.num_shards))


def kept_on_device(classes: Sequence[ByteClass]) -> dict[str, int]:
    """Bytes that the device has all the time, by class: those of gradients and of weights that flow come and go."""
    passing = ("gradients", "weights (flowing)")
    kept: dict[str, int] = {}
    for row in classes:
        if row.device_bytes and row.name not in passing:
            kept[row.name] = kept.get(row.name, 0) + row.device_bytes
    return kept


class _Rows:
    """The bytes of each class while they are summed up."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, one: BytesPerParam, nbytes: int) -> None:
        if not nbytes:
            return
        device, host = self._bytes.get((one.name, one.dtype), (0, 0))
        found = (device, host + nbytes) if one.home == "host" else (device + nbytes, host)
        self._bytes[one.name, one.dtype] = found

    def flowing(self, params: Sequence[Param]) -> None:
        """Add the blocks that are on the device at one time: the largest."""
        blocks = flowing_blocks(params)
        if blocks:
            dtypes = sorted({dtype_name(param.dtype) for param in params if param.block is not None})
            most = sum(sorted(blocks.values())[-(1 + BLOCKS_AHEAD) :])
            self._bytes["weights (flowing)", "/".join(dtypes)] = (most, 0)

    def classes(self) -> list[ByteClass]:
        return [ByteClass(name, dtype, device, host) for (name, dtype), (device, host) in self._bytes.items()]


def flowing_blocks(params: Sequence[Param]) -> dict[int, int]:
    """Bytes of the whole weights of each block, by its number."""
    sizes: dict[int, int] = {}
    for param in params:
        if param.block is not None:
            sizes[param.block] = sizes.get(param.block, 0) + align_up(param.numel) * param.dtype.itemsize
    return sizes
