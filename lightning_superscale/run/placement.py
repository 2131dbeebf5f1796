"""Where parameters' states live and which share a unit, at the start and once the first step has been observed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.dtensor import tensor_numel
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.link.arena import free_device_bytes
from lightning_superscale.ops.state_dtypes import FP32_STATES, StateDtypes, bytes_of
from lightning_superscale.optim.bucketing import Grouping, NamedParam, last_ready
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.optim.grad_dtypes import grad_dtype_of
from lightning_superscale.optim.param_update import why_not_native
from lightning_superscale.optim.rebuild_buckets import regroup


def first_grouping(
    optimizer: Optimizer,
    fqn_of: Mapping[nn.Parameter, str],
    offload: OffloadConfig | None,
    unit_bytes: int,
    block_of: Mapping[nn.Parameter, int],
) -> Grouping:
    """The grouping of an optimizer's parameters before anything is known of their gradients.

    Args:
        unit_bytes: upper bound of a unit's weights.
        block_of: parameters whose weights stream from the host, and whose states stay there.
    """
    grouping = Grouping(unit_bytes, block_of=block_of)
    if offload is None or offload.gpu_fraction == "auto" or why_not_native(optimizer) is not None:
        return grouping
    own = {param for group in optimizer.param_groups for param in group["params"]}
    named = [(fqn, param) for param, fqn in fqn_of.items() if param in own and param.requires_grad]
    return replace(grouping, on_device=_share(grouping, named, offload.gpu_fraction))


def _share(grouping: Grouping, named: Sequence[NamedParam], fraction: float) -> frozenset[nn.Parameter]:
    numels = {param: param.numel() for _, param in named}
    return last_ready(grouping.in_order(named), numels, round(fraction * sum(numels.values())))


def device_bytes_of(param: nn.Parameter, shard_size: int, dtypes: StateDtypes) -> int:
    """Bytes that one parameter's states and its gradient take on the device until the step, but for padding."""
    states = dtypes.memory(param.dtype, has_moments=True, home="device")
    grads = MemoryModel((bytes_of("gradients", grad_dtype_of(param), "device"),))
    return (states + grads).bytes("device", tensor_numel(param), shard_size)


def adapt_after_first_step(
    engines: Iterable[OptimizerEngine],
    mesh: DataMesh,
    offload: OffloadConfig,
    device: torch.device,
    dtypes: StateDtypes = FP32_STATES,
) -> bool:
    """Regroup parameters in the order of the first step's gradients, and use the device memory that it left free.

    Every rank calls it, between the first step and the next. All ranks take rank 0's order and
    the smallest free memory.

    Returns:
        whether any parameter moved.
    """
    movable = [engine for engine in engines if engine.can_regroup]
    fqns = [[fqn for fqn, _ in _observed(engine)] for engine in movable]
    seen = gather_objects(mesh, (fqns, free_device_bytes(device)))
    orders: list[list[str]] = seen[0][0]
    free = min((there for _, there in seen if there is not None), default=0)
    moved = False
    for engine, order in zip(movable, orders, strict=True):
        named = engine.named_params()
        by_fqn = dict(named)
        old = engine.transport.grouping
        grouping = replace(old, order={by_fqn[fqn]: place for place, fqn in enumerate(order)}, on_device=frozenset())
        if offload.gpu_fraction == "auto":
            costs = {param: device_bytes_of(param, mesh.shard.size, dtypes) for _, param in named}
            may_move = [item for item in grouping.in_order(named) if item[1] not in grouping.block_of]
            on_device = last_ready(may_move, costs, free)
            free -= sum(costs[param] for param in on_device)
        else:
            on_device = _share(grouping, named, offload.gpu_fraction)
        moved |= regroup(engine, replace(grouping, on_device=on_device))
    return moved


def _observed(engine: OptimizerEngine) -> list[NamedParam]:
    fqn_of = {param: fqn for fqn, param in engine.named_params()}
    return [(fqn_of[param], param) for param in engine.transport.observed]
