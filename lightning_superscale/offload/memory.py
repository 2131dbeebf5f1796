"""Bytes that states in host memory take per parameter; see [Note: One memory model] in layout/memory.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_superscale.config import OffloadConfig
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.layout.rows import ParamSpec
from lightning_superscale.offload.link.dtype import LinkDtype, dtype_on_link
from lightning_superscale.ops.state_dtypes import StateDtypes, bytes_of
from lightning_superscale.optim.step_rule import StepRule


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamKind:
    """A parameter, or several alike, whose states take equally many bytes per element.

    Attributes:
        spec: its name, shape and memory format.
        weights: dtype of their weights.
        has_moments: False for an optimizer that keeps states of its own.
        flows: their weights stream from host memory.
        num_shares: ranks that share their steps.
        dtypes: of masters and moments.
        link_dtype: what crosses the link.
        config: the user's settings.
        rule: the engine's, which may have chosen what settings leave to it; None before there is one.
    """

    spec: ParamSpec
    weights: torch.dtype
    has_moments: bool
    flows: bool
    num_shares: int
    dtypes: StateDtypes
    link_dtype: LinkDtype
    config: OffloadConfig
    rule: StepRule | None = None


def host_memory(kind: ParamKind, *, num_transfer_buffers: int, has_copy: bool) -> MemoryModel:
    """Bytes of masters, moments, the ends of transfers, and a copy of weights that flow.

    Args:
        has_copy: weights flow and have a buffer of their own, whole ones on each rank.
    """
    on_link = dtype_on_link(kind.link_dtype, kind.weights)
    buffers = [bytes_of("transfer buffers", on_link, "host", copies=num_transfer_buffers)]
    if has_copy:
        buffers.append(bytes_of("weights (host copy)", kind.weights, "host", axis=None))
    states = kind.dtypes.memory(kind.weights, has_moments=kind.has_moments, home="host")
    return states + MemoryModel(tuple(buffers))
