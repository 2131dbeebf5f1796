"""Bytes that one run should take of each memory, from configs, dtypes and sizes alone ([Note: One memory model])."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superscale.comm.dtensor import tensor_numel, tensor_shape
from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import Home, MemoryModel
from lightning_superscale.layout.rows import ParamSpec
from lightning_superscale.offload.engine import engine_of
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.memory import ParamKind
from lightning_superscale.ops.state_dtypes import StateDtypes
from lightning_superscale.optim.step_rule import StepRule
from lightning_superscale.run.settings import RunSettings
from lightning_superscale.zero.memory import frozen_memory


def states_memory(
    dtypes: StateDtypes,
    offload: OffloadConfig | None,
    spec: ParamSpec,
    weights: torch.dtype,
    *,
    num_shares: int,
    is_on_host: bool,
    link_dtype: LinkDtype,
    has_moments: bool = True,
    flows: bool = False,
    rule: StepRule | None = None,
) -> MemoryModel:
    """Bytes that masters, moments and buffers of a parameter take.

    Args:
        dtypes: of masters and moments.
        spec: the parameter.
        weights: its dtype.
        num_shares: ranks that share its steps.
        is_on_host: whether the offload engine keeps the states, if one runs; False where they stay on the device.
        link_dtype: dtype that crosses the link.
        has_moments: False for an optimizer that keeps states of its own.
        flows: whether the weights stream from host memory, so that the host keeps a copy of them.
        rule: the rule that steps the states on the host; None before there is one.
    """
    if offload is None or not is_on_host:
        return dtypes.memory(weights, has_moments=has_moments, home="device")
    kind = ParamKind(
        spec=spec,
        weights=weights,
        has_moments=has_moments,
        flows=flows,
        num_shares=num_shares,
        dtypes=dtypes,
        link_dtype=link_dtype,
        config=offload,
        rule=rule,
    )
    return engine_of(offload.engine if has_moments else "cpu").memory(kind)


def host_bytes_needed(
    module: nn.Module, optimizers: Iterable[Optimizer], settings: RunSettings, link_dtype: LinkDtype
) -> int:
    """Host bytes of this rank's states and of weights that flow, without padding.

    States that may move to the device later are counted, and an optimizer that keeps states of its own counts as one
    that keeps Adam's moments.
    """
    if settings.engine is None:
        return 0

    flowing = {} if settings.flow is None else settings.flow.block_of

    def is_copied(param: nn.Parameter) -> bool:
        # A copy takes the place of weights that are in host memory already.
        return param in flowing and param.device.type != "cpu"

    fqn_of = {param: fqn for fqn, param in module.named_parameters()}
    stepped = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = {param for param in stepped if param.requires_grad}
    host: Home = "host"
    divided = whole = 0.0
    for param in trained:
        spec, flows = ParamSpec(fqn_of[param], tensor_shape(param)), is_copied(param)
        model = states_memory(
            settings.precision.states,
            settings.offload,
            spec,
            param.dtype,
            num_shares=settings.mesh.shard.size,
            is_on_host=True,
            link_dtype=link_dtype,
            flows=flows,
        )
        divided += tensor_numel(param) * model.per_param(host, "shard")
        whole += param.numel() * model.per_param(host, None)
    for param in module.parameters():
        if is_copied(param) and param not in trained:
            whole += param.numel() * frozen_memory(param.dtype, flows=True).per_param(host, None)
    offload = settings.offload
    stays = 0.0 if offload is None or offload.gpu_fraction == "auto" else offload.gpu_fraction
    return round(divided * (1 - stays) / settings.mesh.shard.size + whole)
