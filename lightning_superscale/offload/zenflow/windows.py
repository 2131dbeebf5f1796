"""Windows of steps whose deferred gradients add up, and when they end, arrive and choose columns anew.

[Note: Windows] A window is `update_interval` steps whose deferred gradients add up in one buffer. At its end, with
overlap, the update of the window before it must be done (the host had a whole window's time for it): its new weights go
to the device, and the host begins with this window's. So a gradient is applied at most 2 S - 1 steps after its step, at
a step that depends on no clock. Without overlap the host applies a window at its end, while the device waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.ops.types import AdamWHyper

Place = tuple[int, int]
"""A unit's index and that of a slice in it."""


@dataclass(frozen=True, slots=True)
class Absorbed:
    """The gradients of one slice in a window.

    Attributes:
        num_steps: number of steps that had one.
        lr_sum: sum of their learning rates.
        last: the last of these steps' updates.
    """

    num_steps: int
    lr_sum: float
    last: AdamWHyper

    def packed(self) -> Tensor:
        """These numbers for a checkpoint, fp64 [8]."""
        last = self.last
        numbers = [last.step, last.lr, last.beta1, last.beta2, last.eps, last.weight_decay]
        return torch.tensor([self.num_steps, self.lr_sum, *numbers], dtype=torch.float64)

    @classmethod
    def unpacked(cls, saved: Tensor, like: AdamWHyper) -> Absorbed:
        """What was packed, with everything else as in `like`."""
        num_steps, lr_sum, step, lr, beta1, beta2, eps, weight_decay = saved.tolist()
        numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        return cls(int(num_steps), lr_sum, replace(like, step=int(step), **numbers))


@dataclass(slots=True)
class Window:
    """Steps whose deferred gradients add up in one buffer.

    Attributes:
        buffer: number of the buffer.
        num_steps: number of its steps so far.
        absorbed: by place.
        hypers: the update of each place, once the window has ended.
    """

    buffer: int
    num_steps: int = 0
    absorbed: dict[Place, Absorbed] = field(default_factory=dict)
    hypers: dict[Place, AdamWHyper] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does besides, known before its gradients are.

    Attributes:
        ends_window: it is the last of its window.
        waits: the window is applied at once.
        chooses: columns are chosen anew.
    """

    ends_window: bool
    waits: bool
    chooses: bool


@dataclass(slots=True)
class Phase:
    """Where a run is between its windows.

    Attributes:
        num_steps: steps of the optimizer so far.
        chosen_at: the step after which columns were last chosen.
        window: the open window.
        in_flight: the one before, while its new weights are not on the device.
        num_updates: by place, updates of deferred columns, where these count (`deferred_lr="none"`).
    """

    num_steps: int = 0
    chosen_at: int = 0
    window: Window = field(default_factory=lambda: Window(0))
    in_flight: Window | None = None
    num_updates: dict[Place, int] = field(default_factory=dict)

    def next_step(self, config: ZenFlowConfig) -> StepPlan:
        """The plan of the step after `num_steps`."""
        step, warmup = self.num_steps + 1, max(1, config.warmup_steps)
        is_warm = step <= warmup
        ends = is_warm or self.window.num_steps + 1 >= config.update_interval
        is_due = step == warmup or (not is_warm and step - self.chosen_at >= config.select_interval)
        chooses = ends and is_due and 0 < config.topk < 1
        return StepPlan(ends, ends and (is_warm or chooses or not config.overlap), chooses)


def by_index(places: Iterable[Place]) -> dict[int, list[int]]:
    """Slices by unit index, both ascending."""
    slices: dict[int, list[int]] = {}
    for index, i in sorted(places):
        slices.setdefault(index, []).append(i)
    return slices


def deferred_lr(rule: str | float, absorbed: Absorbed) -> float:
    """The learning rate of the update by a window's mean gradient."""
    if rule == "linear":
        return absorbed.lr_sum
    if rule == "sqrt":
        return absorbed.lr_sum / absorbed.num_steps * math.sqrt(absorbed.num_steps)
    return absorbed.last.lr * (1.0 if rule == "none" else cast(float, rule))
