"""A module's weights and buffers for a checkpoint, and back: whole, placed over ranks, or this rank's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_superscale.comm.dtensor import placed_state, whole_state
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.state.restore import fill_weights, fitted, is_lazy, read_weights


def module_state(module: nn.Module, assembly: Assembly | None, mesh: DataMesh, *, is_local: bool) -> dict[str, Any]:
    """The weights and buffers of a module whose new weights have arrived and in which no pass runs.

    Every rank calls it.

    Args:
        assembly: the parts of the run that trains the module; None outside.
        is_local: give this rank's shards, which a universal checkpoint takes; otherwise whole tensors.

    Raises:
        SuperScaleError: an error ended the last optimizer step in its middle.
    """
    if assembly is not None:
        assembly.check_whole()
    sharded = None if assembly is None else assembly.sharded
    if is_local:
        return dict(module.state_dict()) if sharded is None else sharded.local_state_dict()
    if assembly is not None and sharded is not None:
        return sharded.state_dict(assembly.ranks)
    return whole_state(mesh, module.state_dict())


def load_module_state(
    module: nn.Module,
    assembly: Assembly | None,
    weights: Mapping[str, Any],
    *,
    strict: bool,
    allow: Sequence[str] | None,
) -> None:
    """Load weights and buffers into a module in which no pass runs, and the engines' masters from them.

    Every rank calls it.

    Args:
        weights: whole tensors, or lazy ones, of which this rank reads its own shards.
        strict: whether exactly the module's names are expected.
        allow: patterns of names that may differ all the same, under a universal checkpoint IO; None under another IO.

    Raises:
        CheckpointError: a universal checkpoint's weights don't fit the module; nothing was changed.
    """
    sharded = None if assembly is None else assembly.sharded
    own = module.state_dict() if sharded is None else sharded.local_state_dict()
    if allow is not None:
        weights = fitted(module, weights, own, strict=strict, allow=allow)
        strict = strict and not allow
    if sharded is None:
        whole = read_weights(weights, own) if is_lazy(weights) else weights
        module.load_state_dict(placed_state(module, whole), strict=strict)
    elif is_lazy(weights):
        fill_weights(own, weights)
    else:
        sharded.load_state_dict(weights, strict=strict)
    for engine in () if assembly is None else assembly.engines.values():
        engine.reload_masters()
