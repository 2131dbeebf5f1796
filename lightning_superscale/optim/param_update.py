"""The update of one parameter in a step, its hyperparameters, and whether the native kernel can do it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.ops.events import has_streams
from lightning_superscale.ops.state_dtypes import WIDE_DTYPES
from lightning_superscale.ops.types import AdamWHyper
from lightning_superscale.optim.unit import ShardUnit
from lightning_superscale.optim.unit_state import UnitState

GradScale = float | Tensor
"""The factor of a step's gradients; one fp32 element on their device where the host need not know it."""


@dataclass(slots=True)
class ParamUpdate:
    """One parameter that a step updates.

    Attributes:
        group: the optimizer's parameter group that holds it.
        i: index of its slice in `unit`.
    """

    param: nn.Parameter
    group: dict[str, Any]
    unit: ShardUnit
    state: UnitState
    i: int
    _in_place_of_grad: Tensor | None = None

    @property
    def piece(self) -> ParamSlice:
        """This rank's rows of the parameter, and their place in the unit's flat buffers."""
        return self.unit.shard.slices[self.i]

    def grad(self) -> Tensor:
        """This step's whole gradient of the slice, 1D [piece.numel], where the states live.

        Blocks the host until copies have brought it there, so call it only to read the gradient at once.

        Raises:
            AssertionError: the step is over, and its gradients are gone.
        """
        found = self.state.grad(self.i) if self._in_place_of_grad is None else self._in_place_of_grad
        if found is None:
            raise AssertionError(f"slice {self.i} of unit {self.unit.index} has no gradient any more")
        return found

    def with_grad(self, grad: Tensor) -> ParamUpdate:
        """A copy of this update with another gradient, 1D [piece.numel], for a rule that changes gradients."""
        return replace(self, _in_place_of_grad=grad)


def by_unit(due: Iterable[ParamUpdate]) -> dict[int, list[ParamUpdate]]:
    """Group updates by unit index, last unit first: units are in the order of backward, uploads in forward's."""
    units: dict[int, list[ParamUpdate]] = {}
    for item in due:
        units.setdefault(item.unit.index, []).append(item)
    return dict(sorted(units.items(), reverse=True))


_NATIVE_TYPES = (torch.optim.Adam, torch.optim.AdamW)


def why_not_native(optimizer: Optimizer) -> str | None:
    """The reason why an optimizer steps through its own code; None when the native AdamW kernel steps it.

    A subclass may override `step`, so only the two classes themselves qualify.
    """
    if type(optimizer) not in _NATIVE_TYPES:
        return f"{type(optimizer).__name__} is not torch.optim.Adam or AdamW"
    for group in optimizer.param_groups:
        if len(set(group["params"])) < len(group["params"]):
            return "a parameter is in a group twice, and steps twice"
        wide = [param.dtype for param in group["params"] if param.dtype in WIDE_DTYPES]
        if wide:
            return f"a parameter is {wide[0]}"
        for key in ("amsgrad", "differentiable", "capturable"):
            if group.get(key):
                return f"{key}=True"
        for key in ("lr", "eps", "weight_decay"):
            if isinstance(group[key], torch.Tensor):
                return f"{key} is a tensor"
        if any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
            return "betas are tensors"
    return None


def adamw_hyper(
    optimizer: Optimizer,
    group: dict[str, Any],
    step: int,
    grad_scale: float,
    clip_value: float | None,
    *,
    device: torch.device,
) -> AdamWHyper:
    """The hyperparameters of one update, read from the parameter group at the step, so that schedulers keep working.

    The square root is the one that plain AdamW would take: IEEE's on a GPU and in its fused CPU kernel,
    torch's own in the loop that runs on a CPU otherwise.

    Args:
        step: the number of this step, from 1.
        grad_scale: factor of the gradient.
        clip_value: bound of its elements after that; None for none.
        device: the device that the model runs on, where plain AdamW would step the parameter. The parameter itself may
            be in host memory between its uses.
    """
    beta1, beta2 = group["betas"]
    return AdamWHyper(
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=step,
        decoupled=bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))),
        maximize=bool(group["maximize"]),
        grad_scale=grad_scale,
        clip_value=clip_value,
        ieee_sqrt=has_streams(device) or bool(group.get("fused")),
    )
