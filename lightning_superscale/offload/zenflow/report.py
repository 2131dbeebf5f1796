"""What a run of ZenFlow says of itself: bytes over the link, how late gradients are applied, what the selection holds.

[Note: Expected bytes] Of weights of M bytes on this rank, of whose columns the share k is selected, (1 - k) M go to the
host at each step and (1 - k) M come back at each window of S steps. A selection moves what changes its owner, fp32
master and moments, once in each direction.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.offload.link.link import Link
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.windows import Phase, Place
from lightning_superscale.optim.step_rule import EACH_STEP, Cycle, Figure

# Below half, most of what a gradient says of the matrices comes late. The authors of ZenFlow report 85 to 90 % in the
# top columns of large models that are fine-tuned, where lateness costs nothing that can be seen; a small language model
# whose top tenth held 27 to 32 % was one where it costs. Columns chosen at random hold `topk` of it.
LOW_ENERGY_SHARE = 0.5
# The first selection sees the gradients of the first step, and any other those of one step.
LEAST_SELECTIONS = 3
# Steps that a recording waits for a selection to show.
MOST_STEPS_TO_SELECTION = 64

BYTES_PER_MOVED = 2 * 3 * 4
"""Master and moments of an element that changes its owner cross the link; another element's cross it the other way."""


class Shares(NamedTuple):
    """How much of the gradient's energy, the sum of its squares, columns have in one matrix at a selection.

    Attributes:
        fqn: the matrix.
        energy: of all columns, on all ranks.
        selected: of the columns that the device owns from now on.
        kept: of those that it owned until now.
    """

    fqn: str
    energy: float
    selected: float
    kept: float


def shares_of(fqn: str, energy: Tensor, before: Tensor, now: Tensor) -> Shares:
    """The shares of one matrix.

    Args:
        energy: of each column, summed over ranks, fp64 on the CPU.
        before, now: numbers of the columns that the device owned, and owns.
    """
    return Shares(fqn, float(energy.sum()), float(energy[now].sum()), float(energy[before].sum()))


@dataclass(slots=True)
class LowEnergyWarning:
    """The warning that the selected columns matter little, which one run gives once whatever its optimizers are.

    Attributes:
        is_given: whether it was.
    """

    is_given: bool = False


@dataclass(slots=True)
class _Mean:
    """Something that adds up over steps.

    Attributes:
        total: the sum so far.
        num_steps: the steps that it is of.
    """

    total: float = 0.0
    num_steps: int = 0

    def add(self, total: float, num_steps: int) -> None:
        self.total += total
        self.num_steps += num_steps

    @property
    def value(self) -> float | None:
        return self.total / self.num_steps if self.num_steps else None


@dataclass(slots=True)
class _Selection:
    """The last selections.

    Attributes:
        held: of each, the share of the energy that its columns had.
        kept: the share that the columns of the selection before had at the last one; None without one.
    """

    held: deque[float] = field(default_factory=lambda: deque(maxlen=LEAST_SELECTIONS))
    kept: float | None = None


class ZenFlowReport:
    """Measures one optimizer's windows after the warm-up, and knows what they should be.

    It reads counters and what the host has anyway: it sends nothing, and waits for nothing.

    Args:
        states: by unit index; the caller adds to it.
        warning: shared by the optimizers of a run.
        is_first_rank: whether warnings are this rank's.
    """

    def __init__(
        self,
        config: ZenFlowConfig,
        link: Link,
        states: Mapping[int, SplitState],
        *,
        warning: LowEnergyWarning,
        is_first_rank: bool,
    ) -> None:
        self._config = config
        self._link = link
        self._states = states
        self._warning = warning
        self._is_first_rank = is_first_rank
        self._stepped: set[Place] = set()
        self._bytes_of_step = 0
        self._gradients, self._weights, self._moved, self._age = _Mean(), _Mean(), _Mean(), _Mean()
        self._selection = _Selection()

    # What happens

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """A context in which gradients of one step leave for the host."""
        before = self._link.bytes.d2h
        try:
            yield
        finally:
            self._bytes_of_step += self._link.bytes.d2h - before

    def stepped(self, places: Iterable[Place], num_steps: int) -> None:
        """Note a step of these slices, the `num_steps`th."""
        self._stepped.update(places)
        if not self._is_warm(num_steps):
            self._gradients.add(self._bytes_of_step, 1)
        self._bytes_of_step = 0

    def discard(self) -> None:
        """Note that a step is not taken."""
        self._bytes_of_step = 0

    @contextmanager
    def arriving(self, steps_of_window: int, phase: Phase) -> Iterator[None]:
        """A context in which a window's new weights go to the device.

        Args:
            steps_of_window: 0 where a checkpoint did not say.
            phase: the open window's steps are those since that window ended.
        """
        before = self._link.bytes.h2d
        yield
        if not steps_of_window or self._is_warm(phase.num_steps):
            return
        self._weights.add(self._link.bytes.h2d - before, steps_of_window)
        mean_age = phase.window.num_steps + (steps_of_window - 1) / 2
        self._age.add(mean_age * steps_of_window, steps_of_window)

    @contextmanager
    def selecting(self, phase: Phase, shares: Sequence[Shares]) -> Iterator[None]:
        """A context that moves columns between their owners.

        Args:
            phase: before it notes the selection.
            shares: filled in the context.
        """
        link, last = self._link.bytes, phase.chosen_at
        before = link.d2h + link.h2d
        yield
        if last:  # the first one moves what no gradient has chosen
            self._moved.add(link.d2h + link.h2d - before, phase.num_steps - last)
        energy = sum(one.energy for one in shares)
        if not (0 < energy < math.inf):
            return
        selection = self._selection
        selection.held.append(sum(one.selected for one in shares) / energy)
        selection.kept = sum(one.kept for one in shares) / energy if last else None
        self._warn_if_low(shares)

    def _warn_if_low(self, shares: Sequence[Shares]) -> None:
        held, age = self._selection.held, expected_age(self._config)
        if not age or self._warning.is_given or len(held) < LEAST_SELECTIONS or max(held) >= LOW_ENERGY_SHARE:
            return
        self._warning.is_given = True
        if not self._is_first_rank:
            return
        lowest = min((one for one in shares if one.energy > 0), key=lambda one: one.selected / one.energy)
        config = self._config
        warnings.warn(
            f"at the last {len(held)} selections the columns that ZenFlow steps at once held "
            f"{sum(held) / len(held):.0%} of the energy of the gradients (the sum of their squares); expected at least "
            f"{LOW_ENERGY_SHARE:.0%}. The rest is applied {age:.1f} steps late on average, which may "
            f"cost accuracy. Raise ZenFlowConfig.topk (found {config.topk:g}), shorten update_interval (found "
            f"{config.update_interval}), name in exclude the matrices whose columns matter alike, to afford a larger "
            f"topk in the others ({lowest.fqn!r} has the least, {lowest.selected / lowest.energy:.0%}), or use "
            "offload='superoffload', which applies every gradient at its own step.",
            stacklevel=2,
        )

    def _is_warm(self, num_steps: int) -> bool:
        return num_steps <= max(1, self._config.warmup_steps)

    # What is said

    def figures(self) -> Sequence[Figure]:
        """Bytes of this rank, ages, and shares of energy; see `StepRule.figures`."""
        config = self._config
        num_windows = 2 if config.overlap else 1
        per_step = deferred = host = movable = 0
        for index, state in self._states.items():
            for i, one in enumerate(state.slices):
                layout, link = one.layout, state.transfer_dtype.itemsize
                host += 12 * layout.numel + (4 * num_windows + 3 * link) * layout.deferred_numel
                if self._stepped and (index, i) not in self._stepped:
                    continue  # it has no gradients
                per_step += link * layout.deferred_numel
                deferred += layout.deferred_numel
                movable += min(layout.selected_numel, layout.deferred_numel)
        figures = [
            Figure(
                "gradient_bytes_per_step",
                "gradients of deferred columns over the link per step",
                "bytes",
                per_step,
                self._gradients.value,
            ),
            Figure(
                "weight_bytes_per_step",
                "new weights of deferred columns over the link per step",
                "bytes",
                per_step / config.update_interval,
                self._weights.value,
            ),
            Figure(
                "host_bytes",
                "states, sums and transfers in host memory",
                "bytes",
                host,
                sum(
                    one.copies * one.dtype.itemsize * (state.unit.shard.shard_numel if one.numel is None else one.numel)
                    for state in self._states.values()
                    for one in state.bytes()
                    if one.home == "host"
                ),
            ),
            Figure(
                "deferred_age_steps",
                "mean number of steps that gradients of deferred columns are applied late",
                "steps",
                expected_age(config) if deferred else None,
                self._age.value,
            ),
        ]
        return [*figures, *self._figures_of_selections(movable)] if movable else figures

    def _figures_of_selections(self, movable: int) -> Sequence[Figure]:
        held = self._selection.held
        return (
            Figure(
                "selection_bytes_per_step",
                "columns that change their owner at selections over the link per step, expected where all do",
                "bytes",
                BYTES_PER_MOVED * movable / _steps_between_selections(self._config),
                self._moved.value,
            ),
            Figure(
                "selected_energy_share",
                "share of the gradients' energy in the columns that step at once, at the last selection",
                "share",
                measured=held[-1] if held else None,
            ),
            Figure(
                "kept_energy_share",
                "share that the columns of the selection before had left then",
                "share",
                measured=self._selection.kept,
            ),
        )


def _steps_between_selections(config: ZenFlowConfig) -> int:
    return math.ceil(config.select_interval / config.update_interval) * config.update_interval


def expected_age(config: ZenFlowConfig) -> float:
    """The mean number of steps between a deferred gradient's own step and the one that applies it.

    A window is applied at its end, or with overlap one window later, but at once where a selection follows.
    """
    steps = config.update_interval
    in_window = (steps - 1) / 2
    if not config.overlap:
        return in_window
    num_windows = _steps_between_selections(config) // steps
    share_late = 1 - 1 / num_windows if 0 < config.topk < 1 else 1.0
    return in_window + share_late * steps


def cycle_of(phase: Phase, config: ZenFlowConfig, states: Iterable[SplitState]) -> Cycle:
    """The steps that show a whole window: from the step that ends one to the step that ends the next.

    The latter is one that selects columns, if that is not far.
    """
    if not any(one.layout.deferred_numel for state in states for one in state.slices):
        return EACH_STEP
    steps, warmup = config.update_interval, max(1, config.warmup_steps)
    taken = phase.window.num_steps if phase.num_steps > warmup else 0
    to_end = max(0, warmup - phase.num_steps) + max(0, steps - 1 - taken)
    if 0 < config.topk < 1:
        chosen_at = phase.chosen_at if phase.num_steps >= warmup else warmup
        end = phase.num_steps + to_end + 1
        num_windows = max(0, math.ceil((chosen_at + config.select_interval - end) / steps))
        if num_windows == 0:  # the next window ends with a selection, so one after it is shown
            num_windows = _steps_between_selections(config) // steps
        if num_windows * steps <= MOST_STEPS_TO_SELECTION:
            to_end += (num_windows - 1) * steps
    return Cycle(steps + 1, to_end)
