"""Joins weight flow with a run: whether weights flow, which ones, and where the rest of the model goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_superscale.comm.collectives import control_max
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.engine import engine_of
from lightning_superscale.offload.link.arena import HostArena, free_device_bytes
from lightning_superscale.offload.link.link import Link, link_for
from lightning_superscale.offload.weight_flow.schedule import BlockParams, WeightFlow
from lightning_superscale.offload.weight_flow.weights import FlowingWeights
from lightning_superscale.ops.cpu.memory import RecycledMemory
from lightning_superscale.run.report.plan import format_bytes
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.fsdp2.wrap import blocks_with_own_params

_STATIONARY = "Use OffloadConfig(weights='stationary')."


# The share of free device memory that weights may take; the rest is for activations, gradients and buffers.
_MOST_OF_DEVICE = 0.75
_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class WeightsChoice:
    """Whether weights flow, and the clause of `explain()` that says why."""

    flow: bool
    reason: str


def choose_weights(
    offload: OffloadConfig | None,
    zero: ZeroConfig,
    module: nn.Module,
    free: int | None,
    *,
    is_compiled: bool = False,
) -> WeightsChoice:
    """Choose whether the weights of a model that is not on the device yet flow.

    Args:
        free: what `least_free_bytes` gave, the same on every rank, so that all ranks choose alike.
    """
    if offload is None:
        return WeightsChoice(False, "nothing is offloaded")
    if offload.weights != "auto":
        return WeightsChoice(offload.weights == "flow", f"OffloadConfig.weights is {offload.weights!r}")
    if free is None:
        return WeightsChoice(False, "device memory is host memory here, so that flowing would save none")
    needed = sum(param.nbytes for param in module.parameters())
    share = f"they take {format_bytes(needed)} of {format_bytes(free)} that are free there"
    if needed <= _MOST_OF_DEVICE * free:
        return WeightsChoice(False, share)
    why_not = _why_not_flow(offload, zero, module, is_compiled=is_compiled)
    if why_not is not None:
        return WeightsChoice(False, f"{share}, but {why_not}")
    return WeightsChoice(True, share)


def least_free_bytes(mesh: DataMesh, module: nn.Module, device: torch.device) -> int | None:
    """Bytes that weights and all else may take on the device of any rank: those of the rank that has the fewest free.

    Weights that are on the device already count as free. Every rank calls it, whatever its settings are.

    Returns:
        None where no rank's device has memory apart from the host's.
    """
    free = free_device_bytes(device)
    if free is not None:
        free += sum(param.nbytes for param in module.parameters() if param.device == device)
    taken = control_max(mesh, torch.tensor([-_NO_LIMIT if free is None else -free]), "the comparison of free memory")
    least = -int(taken.item())
    return None if least == _NO_LIMIT else least


def _why_not_flow(offload: OffloadConfig, zero: ZeroConfig, module: nn.Module, *, is_compiled: bool) -> str | None:
    why_no_flow = engine_of(offload.engine).why_no_flow
    if why_no_flow is not None:
        return why_no_flow
    if zero.stage == 3:
        return "zero=3 shards them over ranks"
    if is_compiled:
        return "a compiled graph keeps views of weights"
    if offload.gpu_fraction not in ("auto", 0):
        return f"gpu_fraction={offload.gpu_fraction} keeps states there, and their weights with them"
    if offload.link_dtype == "fp32":
        return "link_dtype='fp32' moves new weights to a device that keeps them"
    return None if blocks_with_own_params(module) else "the model has no repeated blocks to stream"


def check_flow(zero: ZeroConfig, offload: OffloadConfig | None) -> None:
    """Refuse configs under which weights can't flow.

    Raises:
        SuperScaleError: names the option and what to do.
    """
    if offload is None or offload.weights != "flow":
        return
    why_no_flow = engine_of(offload.engine).why_no_flow
    if why_no_flow is not None:
        raise SuperScaleError(
            f"OffloadConfig.weights='flow' keeps weights in host memory, and {why_no_flow}; found both. Use "
            "weights='stationary', or engine='superoffload'."
        )
    if zero.stage == 3:
        raise SuperScaleError(
            "weights='flow' keeps whole weights in host memory, and zero=3 shards them over the ranks' devices; found "
            "both. Use zero=2, whose weights flow while ranks share gradients and states, or zero=3 with "
            "weights='stationary'."
        )


def compiled_flow(name: str) -> SuperScaleError:
    """The error where the weights of a compiled module would flow; `name` is that of its class."""
    return SuperScaleError(
        f"weights='flow' empties weights between uses, and a compiled graph of {name} keeps views of them. "
        f"Train without torch.compile. {_STATIONARY}"
    )


def flow_of(module: nn.Module, offload: OffloadConfig, *, is_compiled: bool = False) -> WeightFlow:
    """Find the blocks whose weights flow and hook them. The module is in host memory or on the device, whole.

    Raises:
        SuperScaleError: a compiled model, a model without blocks, or a name in `wrap` that matches nothing.
    """
    name = type(module).__name__
    if is_compiled:
        raise compiled_flow(name)
    blocks = [BlockParams(*block) for block in blocks_with_own_params(module, offload.wrap)]
    if not blocks:
        raise SuperScaleError(
            f"weights='flow' streams repeated blocks, and {name} has none: expected a ModuleList or Sequential with "
            "two or more alike, or _no_split_modules. Name classes or modules in OffloadConfig.wrap. " + _STATIONARY
        )
    return WeightFlow(blocks)


def place_resident(module: nn.Module, flowing: Iterable[nn.Parameter], device: torch.device) -> None:
    """Move a module to the device, but for the parameters that flow: those keep their memory."""
    kept = {param: param.data for param in flowing}
    for param in kept:
        param.data = param.data.new_empty(0)  # `to` moves it, and Lightning learns the module's device
    try:
        module.to(device)
    finally:
        for param, data in kept.items():
            param.data = data


def stream_the_rest(flow: WeightFlow, link: Link, device: torch.device, arena: HostArena, *, is_pinned: bool) -> None:
    """Let the blocks' parameters that no engine steps flow too: frozen ones, and all where nothing is trained."""
    is_pinned = is_pinned and link.needs_pinned_host()
    kinds: dict[tuple[int, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
    for fqn, param in flow.named_params:
        if not flow.holds(param):
            kinds.setdefault((flow.block_of[param], param.dtype), []).append((fqn, param))
    for (_, dtype), named in kinds.items():
        unit = BucketUnit(-1, named, 0, 1, RecycledMemory(), streams_to=device)
        buffer = arena.zeros(unit.full.shard_numel, dtype, is_pinned=is_pinned, in_forks=True)
        flow.add(FlowingWeights(unit, link, [buffer]))


def flow_alone(flow: WeightFlow, device: torch.device, *, is_pinned: bool) -> None:
    """Let every block flow where nothing is trained."""
    stream_the_rest(flow, link_for(device), device, HostArena(device=device.index or 0), is_pinned=is_pinned)


def how_weights_flow(choice: WeightsChoice, flow: WeightFlow | None, module: nn.Module) -> str:
    """The sentence of `explain()` that says whether weights flow, and why."""
    if flow is None:
        return f"weights stay on the device: {choice.reason}"
    flowing = sum(param.numel() * param.element_size() for param in flow.block_of)
    whole = sum(param.numel() * param.element_size() for param in module.parameters())
    return (
        f"weights of {flow.num_blocks} blocks ({format_bytes(flowing)} of {format_bytes(whole)}) flow from host memory "
        f"through at most {format_bytes(flow.most_device_bytes)} of the device, in forward and in backward; weights "
        f"that no block or more than one owns stay there: {choice.reason}"
    )
