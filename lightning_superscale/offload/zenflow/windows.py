"""Windows of steps whose deferred gradients add up, when they end, and when columns are chosen anew.

[Note: Windows] A window of a parameter is `update_interval` steps whose deferred gradients add up. At its end the host
begins with its update, for which it has one step's time: in the next step, before that step's own update, the new
weights are put in place. So a gradient is applied at most S steps after its own step, at a step that depends on no
clock. Windows of different parameters end at different steps, so that the host has as much to do in each; with
`overlap=False` they end together, and the device waits.

ZenFlow's paper ends all windows at once and gives the host the whole next window, which makes gradients up to 2 S - 1
steps late. The host's work, the bytes on the link and the time in which they must be done per step are the same here,
and one buffer of sums is enough.

Columns are chosen in the first step of a window, by the gradients of that very step, when no gradient is on its way: it
stays on the device, whole, until its owners are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.offload.zenflow.auto import NUM_MEASURED
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
        """These numbers for a checkpoint, fp64 1D."""
        return torch.cat([torch.tensor([self.num_steps, self.lr_sum], dtype=torch.float64), packed(self.last)])

    @staticmethod
    def num_steps_of(saved: Tensor | int | float) -> int:
        """The number of steps in what `packed` gave."""
        return int(cast(Tensor, saved)[0])

    @classmethod
    def unpacked(cls, saved: Tensor, like: AdamWHyper) -> Absorbed:
        """What was packed, with everything else as in `like`."""
        return cls(int(saved[0]), float(saved[1]), unpacked(saved[2:], like))


_PACKED = ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")


def packed(hyper: AdamWHyper) -> Tensor:
    """An update's numbers for a checkpoint, fp64 1D."""
    clip_value = math.nan if hyper.clip_value is None else hyper.clip_value
    numbers = [hyper.step, hyper.absorbed, clip_value, *(getattr(hyper, name) for name in _PACKED)]
    return torch.tensor(numbers, dtype=torch.float64)


def unpacked(saved: Tensor, like: AdamWHyper) -> AdamWHyper:
    """The update that was packed, with everything else as in `like`."""
    step, absorbed, clip_value, *numbers = saved.tolist()
    return replace(
        like,
        step=int(step),
        absorbed=int(absorbed),
        clip_value=None if math.isnan(clip_value) else clip_value,
        **dict(zip(_PACKED, numbers, strict=True)),
    )


def staggered(sizes: Mapping[Place, tuple[int, str]], update_interval: int) -> dict[Place, int]:
    """By how many steps each parameter's windows end earlier than those of offset 0, so that steps have equal loads.

    Largest first, each to the step that has least so far (Graham 1969's LPT rule).

    Args:
        sizes: elements of the whole parameter, and its name, which decides between equals: the same on all ranks.
    """
    loads, offsets = [0] * update_interval, {}
    for place, (numel, _) in sorted(sizes.items(), key=lambda item: (-item[1][0], item[1][1])):
        offset = loads.index(min(loads))
        loads[offset] += numel
        offsets[place] = offset
    return offsets


@dataclass(slots=True)
class Phase:
    """Where a run is between its windows.

    Attributes:
        num_steps: steps of the optimizer so far.
        open: the gradients of windows under way, by place.
        late: the host's updates by windows that have ended and whose new weights are not in place.
        ahead: those whose deferred columns' weights are ahead of their masters.
        chosen_at: by place, the step in which its columns were last chosen.
        num_updates: by place, updates of deferred columns, where these count (`deferred_lr="none"`).
    """

    num_steps: int = 0
    open: dict[Place, Absorbed] = field(default_factory=dict)
    late: dict[Place, AdamWHyper] = field(default_factory=dict)
    ahead: set[Place] = field(default_factory=set)
    chosen_at: dict[Place, int] = field(default_factory=dict)
    num_updates: dict[Place, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When windows of parameters begin and end, and when their columns are chosen.

    Attributes:
        interval: number of steps in a window.
        offsets: what `staggered` gave; none where windows end together.
    """

    config: ZenFlowConfig
    interval: int
    offsets: Mapping[Place, int]

    @property
    def num_warm(self) -> int:
        """Number of first steps in which every column is stepped."""
        least = NUM_MEASURED if "auto" in (self.config.topk, self.config.update_interval) else 1
        return max(least, self.config.warmup_steps)

    def is_warm(self, step: int) -> bool:
        """Whether every column is stepped in this step, counted from 1."""
        return step <= self.num_warm

    def ends(self, place: Place, step: int) -> bool:
        """Whether a window ends with this step."""
        return self.is_warm(step) or self._phase(place, step) == 0

    def waits(self, step: int) -> bool:
        """Whether windows that end with this step are applied at once."""
        return self.is_warm(step) or not self.config.overlap

    def chooses(self, place: Place, step: int, chosen_at: int | None) -> bool:
        """Whether columns are chosen anew in this step, which then is a window's first."""
        if self.is_warm(step):
            return False
        begins = step == self.num_warm + 1 or self._phase(place, step - 1) == 0
        return begins and (chosen_at is None or step - chosen_at >= self.config.select_interval)

    def _phase(self, place: Place, step: int) -> int:
        return (step - self.num_warm + self.offsets.get(place, 0)) % self.interval


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
