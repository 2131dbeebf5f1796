"""What a run of ZenFlow says of itself: bytes over the link, how late gradients are applied, what the selection holds.

[Note: Expected bytes] Of weights of M bytes on this rank, of whose columns the share k is selected, (1 - k) M go to the
host at each step, or with sums on the device at each window of S steps, and (1 - k) M come back at each window. A
selection moves what changes its owner, fp32 master and moments, once in each direction.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_superscale.config.zenflow import ZenFlowConfig
from lightning_superscale.offload.zenflow.auto import AutoNumbers
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.windows import Phase, Place, Schedule
from lightning_superscale.optim.step_rule import EACH_STEP, Cycle, Figure

# Below half, most of what a gradient says of the matrices comes late. The authors of ZenFlow report 85 to 90 % in the
# top columns of large models that are fine-tuned, where lateness costs nothing that can be seen; a small language model
# whose top tenth held 27 to 32 % was one where it costs. Columns chosen at random hold `topk` of it.
LOW_ENERGY_SHARE = 0.5
# The first selection sees the gradients of the first step, and any other those of one step.
LEAST_SELECTIONS = 3
# Steps that a recording waits for a selection to show.
MOST_STEPS_TO_SELECTION = 64


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


class _Rate:
    """Something that adds up over steps, per step, over as many whole cycles as there were."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._start: tuple[int, float] | None = None

    def note(self, step: int, total: float, cycle: int) -> None:
        """Note the total after a step.

        Args:
            cycle: number of steps after which things repeat.
        """
        if self._start is None:
            self._start = (step, total)
        begun, before = self._start
        if step > begun and (step - begun) % cycle == 0:
            self.value = (total - before) / (step - begun)


@dataclass(slots=True)
class _Selections:
    """What matrices' columns held when they were last chosen.

    Attributes:
        last: by name of the matrix.
        counts: selections of each.
        held: the shares of the last rounds, in each of which all matrices' columns were chosen anew.
    """

    last: dict[str, Shares] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    held: deque[float] = field(default_factory=lambda: deque(maxlen=LEAST_SELECTIONS))
    num_rounds: int = 0

    def add(self, shares: Iterable[Shares]) -> bool:
        """Note the selections of one step; returns whether they end a round."""
        for one in shares:
            self.last[one.fqn] = one
            self.counts[one.fqn] = self.counts.get(one.fqn, self.num_rounds) + 1
        if min(self.counts.values(), default=0) <= self.num_rounds:
            return False
        self.num_rounds += 1
        self.held.append(self.share_of("selected") or 0.0)
        return True

    def share_of(self, which: Literal["selected", "kept"]) -> float | None:
        energy = sum(one.energy for one in self.last.values())
        return sum(getattr(one, which) for one in self.last.values()) / energy if 0 < energy < math.inf else None


class ZenFlowReport:
    """Measures one optimizer's windows after the warm-up, and knows what they should be.

    It reads counters and what the host has anyway: it sends nothing, and waits for nothing.

    Args:
        numbers: of windows and columns.
        states: by unit index; the caller adds to it.
        warning: shared by the optimizers of a run.
        is_first_rank: whether warnings are this rank's.
    """

    def __init__(
        self,
        config: ZenFlowConfig,
        numbers: AutoNumbers,
        states: Mapping[int, SplitState],
        *,
        warning: LowEnergyWarning,
        is_first_rank: bool,
    ) -> None:
        self._config = config
        self._numbers = numbers
        self._states = states
        self._warning = warning
        self._is_first_rank = is_first_rank
        self._stepped: set[Place] = set()
        self._gradients, self._weights, self._moved = _Rate(), _Rate(), _Rate()
        self._age, self._num_applied = 0.0, 0
        self._selections = _Selections()

    # What happens

    def stepped(self, places: Iterable[Place], step: int, num_warm: int) -> None:
        """Note that these slices are stepped, when all of the host's work of the step before is done.

        Args:
            num_warm: steps of warm-up.
        """
        self._stepped.update(places)
        sent = [state.sent for state in self._states.values()]
        for one in sent:
            one.gradients += one.pending
            one.pending = 0
        interval = self._numbers.interval
        if step <= num_warm + interval:  # in which windows may be shorter
            return
        self._gradients.note(step, sum(one.gradients for one in sent), interval)
        self._weights.note(step, sum(one.weights for one in sent), interval)
        self._moved.note(step, sum(one.moved for one in sent), self._steps_between_selections)

    def discard(self) -> None:
        """Note that a step is not taken."""
        for state in self._states.values():
            state.sent.pending = 0

    def applied(self, num_steps: int, numel: int, *, is_late: bool) -> None:
        """Note that a window of so many steps is applied after the warm-up, at its end or one step later."""
        self._age += numel * num_steps * ((num_steps - 1) / 2 + is_late)
        self._num_applied += numel * num_steps

    def selected(self, shares: Iterable[Shares]) -> None:
        """Note that matrices' columns were chosen anew in one step."""
        if self._selections.add(one for one in shares if 0 < one.energy < math.inf):
            self._warn_if_low()

    def _warn_if_low(self) -> None:
        held, age = self._selections.held, self._expected_age
        if not age or self._warning.is_given or len(held) < LEAST_SELECTIONS or max(held) >= LOW_ENERGY_SHARE:
            return
        self._warning.is_given = True
        if not self._is_first_rank:
            return
        lowest = min(self._selections.last.values(), key=lambda one: one.selected / one.energy)
        warnings.warn(
            f"at the last {len(held)} selections the columns that ZenFlow steps at once held "
            f"{sum(held) / len(held):.0%} of the energy of the gradients (the sum of their squares); expected at least "
            f"{LOW_ENERGY_SHARE:.0%}. The rest is applied {age:.1f} steps late on average, which may "
            f"cost accuracy. Raise ZenFlowConfig.topk (found {self._numbers.topk:g}), shorten update_interval (found "
            f"{self._numbers.interval}), name in exclude the matrices whose columns matter alike, to afford a larger "
            f"topk in the others ({lowest.fqn!r} has the least, {lowest.selected / lowest.energy:.0%}), or use "
            "offload='superoffload', which applies every gradient at its own step.",
            stacklevel=2,
        )

    @property
    def _expected_age(self) -> float:
        return expected_age(self._config, self._numbers.interval)

    @property
    def _steps_between_selections(self) -> int:
        interval = self._numbers.interval
        return math.ceil(self._config.select_interval / interval) * interval

    # What is said

    def figures(self) -> Sequence[Figure]:
        """Bytes of this rank, ages, and shares of energy; see `StepRule.figures`."""
        interval = self._numbers.interval
        sums_on_host = 4 if self._config.accumulate_on == "host" else 0
        per_step = deferred = host = movable = 0
        for index, state in self._states.items():
            for i, one in enumerate(state.slices):
                layout, link = one.layout, state.transfer_dtype.itemsize
                host += state.bytes_per_element * layout.numel + (sums_on_host + 3 * link) * layout.deferred_numel
                if self._stepped and (index, i) not in self._stepped:
                    continue  # it has no gradients
                per_step += link * layout.deferred_numel
                deferred += layout.deferred_numel
                # An element that changes its owner, and another that takes its place.
                movable += 2 * state.bytes_per_element * min(layout.selected_numel, layout.deferred_numel)
        figures = [
            Figure(
                "gradient_bytes_per_step",
                "gradients of deferred columns over the link per step",
                "bytes",
                per_step if sums_on_host else per_step / interval,
                self._gradients.value,
            ),
            Figure(
                "weight_bytes_per_step",
                "new weights of deferred columns over the link per step",
                "bytes",
                per_step / interval,
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
                self._expected_age if deferred else None,
                self._age / self._num_applied if self._num_applied else None,
            ),
        ]
        return [*figures, *self._figures_of_selections(movable)] if movable else figures

    def _figures_of_selections(self, movable: int) -> Sequence[Figure]:
        """The figures of selections, where at most so many bytes move at one."""
        selections = self._selections
        return (
            Figure(
                "selection_bytes_per_step",
                "columns that change their owner at selections over the link per step, expected where all do",
                "bytes",
                movable / self._steps_between_selections,
                self._moved.value,
            ),
            Figure(
                "selected_energy_share",
                "share of the gradients' energy in the columns that step at once, at the last selection",
                "share",
                measured=selections.share_of("selected"),
            ),
            Figure(
                "kept_energy_share",
                "share that the columns of the selection before had left then",
                "share",
                measured=selections.share_of("kept") if selections.num_rounds > 1 else None,
            ),
        )


def expected_age(config: ZenFlowConfig, interval: int) -> float:
    """The mean number of steps between a deferred gradient's own step and the one that applies it.

    A window is applied at its end, or with overlap one step later.
    """
    return (interval - 1) / 2 + config.overlap


def cycle_of(phase: Phase, schedule: Schedule, states: Mapping[int, SplitState]) -> Cycle:
    """The steps that show windows end and arrive: from the step before a selection on, if one is near."""
    places = [
        (index, i) for index, state in states.items() for i, one in enumerate(state.slices) if one.layout.has_deferred
    ]
    if not places:
        return EACH_STEP
    # One that was not chosen with the first ones has no gradients.
    chosen = phase.chosen_at if phase.num_steps > schedule.num_warm else places
    split = [place for place in chosen if states[place[0]].slices[place[1]].layout.is_split]
    begins = max(phase.num_steps + 1, schedule.num_warm + 1)
    for step in range(begins, phase.num_steps + MOST_STEPS_TO_SELECTION):
        if any(schedule.chooses(place, step, phase.chosen_at.get(place)) for place in split):
            begins = max(phase.num_steps + 1, step - 1)
            break
    return Cycle(schedule.interval + 1, begins - phase.num_steps - 1)
