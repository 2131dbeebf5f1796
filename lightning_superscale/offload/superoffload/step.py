"""Adam and AdamW during backward: looks ahead while gradients arrive, and settles at the step.

Exactness does not depend on any guess: a look ahead stores nothing of this step but new weights, and those go nowhere
before the step's verdict ([Note: Deferred commit] in state.py). What was looked at with other numbers than
the verdict's (clipping, a changed learning rate, a late gradient) is looked at again.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, cast

from torch import nn
from torch.optim import Optimizer

from lightning_superscale.offload.superoffload.worker import StepThread, StepWorker
from lightning_superscale.ops.types import AdamWHyper, GradStats
from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, adamw_hyper, by_unit
from lightning_superscale.optim.step_rule import StepGuard, SteppedUnit
from lightning_superscale.optim.unit import GradientDelta, PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import UnitState
from lightning_superscale.timeline import UNTIMED, Timeline

# Looking ahead is given up for a while when more than so many of the last steps that tried had to look again: looking
# twice costs more than waiting for the norm and hiding the step behind the next forward. After a pause the first such
# step begins the next one.
_REMEMBERED_STEPS, _MOST_REDONE, _PAUSE_STEPS = 20, 6, 50


class DeferringState(UnitState, Protocol):
    """States that can look ahead without committing."""

    def look_ahead(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Compute new weights of slices whose gradient arrived; store nothing else of this step."""

    def has_arrived(self) -> bool:
        """Whether `look_ahead` would wait for no gradient."""

    def order_after_copies(self) -> None:
        """Let the device change gradients only after the copies of them that are still under way."""

    def look_again(self, hypers: Mapping[int, AdamWHyper]) -> int:
        """Look ahead to slices that were not looked at with these numbers; how many had been with others."""

    def settle(self, hypers: Mapping[int, AdamWHyper]) -> tuple[list[GradStats], int]:
        """Make this step final with these numbers: (statistics of its gradients, slices that were looked at again)."""

    def flush(self) -> None:
        """Bring masters and moments up to the last settled step."""

    def fence(self) -> Any:
        """The point of the device's work after which its weights may be replaced."""

    def upload(self, stepped: Sequence[int], after: Any = None) -> PublishEvent | None:
        """Send new weights; `after` is what `fence()` returned."""


class _Settled(NamedTuple):
    """The outcome of settling one unit.

    Attributes:
        num_redone: slices that had been looked at with other numbers.
        upload: of its new weights.
    """

    stats: list[GradStats]
    num_redone: int
    upload: PublishEvent | None


class _Settlement:
    """The worker's task that settles one unit.

    Args:
        hypers: by slice, the numbers of this step's update.
        fence: the point of the device's work after which its weights may be replaced.
    """

    def __init__(
        self, state: DeferringState, index: int, hypers: Mapping[int, AdamWHyper], fence: Any, timeline: Timeline
    ) -> None:
        self.has_arrived = state.has_arrived
        self._state = state
        self._label = f"unit {index}"
        self._hypers = hypers
        self._fence = fence
        self._timeline = timeline
        self._num_redone = 0

    def prepare(self) -> None:
        with self._timeline.host("host optimizer", f"{self._label}, ahead"):
            self._num_redone = self._state.look_again(self._hypers)

    def settle(self) -> _Settled:
        with self._timeline.host("host optimizer", self._label):
            stats, num_redone = self._state.settle(self._hypers)
        upload = self._state.upload(list(self._hypers), self._fence)
        return _Settled(stats, self._num_redone + num_redone, upload)


class SettledWeights:
    """A settled unit's upload, which another thread starts: waitable once it is started and waitable itself."""

    def __init__(self, settled: Future[_Settled]) -> None:
        self._settled = settled

    def is_waitable(self) -> bool:
        if not self._settled.done():
            return False
        upload = self._settled.result().upload
        return upload is None or upload.is_waitable()

    def wait(self) -> None:
        upload = self._settled.result().upload
        if upload is not None:
            upload.wait()


class DeferredStep(AdamWRule):
    """Steps an optimizer one commit behind; its own state views our buffers, and is up to date after `flush`.

    Args:
        looks_ahead: False waits for the verdict always, and then overlaps with the next forward.
        worker: where the work is done; None for a thread of its own.
        timeline: where it is recorded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        guard: StepGuard,
        *,
        looks_ahead: bool = True,
        worker: StepWorker | None = None,
        timeline: Timeline = UNTIMED,
    ) -> None:
        super().__init__(optimizer, guard)
        self._looks_ahead = looks_ahead
        self._worker = worker or StepThread()
        self._timeline = timeline
        self._states: dict[int, DeferringState] = {}
        self._looking: dict[int, Future[None]] = {}
        self._hypers: dict[int, dict[int, AdamWHyper]] = {}
        self._settling: dict[int, Future[_Settled]] = {}
        self._group_of: dict[nn.Parameter, dict[str, Any]] = {}
        self._clip_value: float | None = None
        self._grad_scale = 1.0
        self._outcomes: deque[bool] = deque(maxlen=_REMEMBERED_STEPS)
        self._pause = 0
        self._patience = _MOST_REDONE
        self.num_redone = 0

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        self._states[unit.index] = cast(DeferringState, state)

    # Backward

    def expect(self, grad_scale: float) -> None:
        self._grad_scale = grad_scale

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        unit = delta.unit
        settling, looking = self._settling.get(unit.index), self._looking.get(unit.index)
        if settling is not None:
            settling.result()  # the buffer that receives holds the last step's new weights until then
        is_begun = looking is not None and not looking.cancel()
        if looking is not None and is_begun:
            looking.result()  # a late gradient may not meet a running look ahead
        state.add_grads(delta.slices)
        if not self._looks_ahead or self._pause or is_begun:
            return
        hypers = self._hypers.setdefault(unit.index, {})
        for i, _ in delta.slices:
            param = unit.params[i]
            item = ParamUpdate(param, self._group(param), unit, state, i)
            count = int(self.bound_state(item)["step"]) + 1
            hypers[i] = adamw_hyper(self._optimizer, item.group, count, self._grad_scale, self._clip_value)
        deferring = self._states[unit.index]
        ahead = functools.partial(self._look_ahead, unit.index, dict(hypers))
        self._looking[unit.index] = self._worker.look_ahead(ahead, deferring.has_arrived)

    def _look_ahead(self, index: int, hypers: Mapping[int, AdamWHyper]) -> None:
        with self._timeline.host("host optimizer", f"unit {index}, ahead"):
            self._states[index].look_ahead(hypers)

    def _group(self, param: nn.Parameter) -> dict[str, Any]:
        if param not in self._group_of:
            self._group_of = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        return self._group_of[param]

    def quiesce(self) -> None:
        self._take_back()
        for settling in self._settling.values():
            settling.result()

    def _take_back(self) -> None:
        """Begin no look ahead any more; settling does what is left of them.

        Raises: what a look ahead raised.
        """
        begun = [looking for looking in self._looking.values() if not looking.cancel()]
        for looking in begun:
            looking.result()

    # The step

    def apply(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        """Settle every unit in the order of the next forward; new weights may still be on their way afterwards."""
        self._clip_value = clip_value
        self._take_back()
        self._forget()
        self._remember_last()
        numbers = self.numbers(float(grad_scale), clip_value)
        settlements: list[_Settlement] = []
        stepped = []
        for items in by_unit(due).values():
            hypers = {item.i: numbers.hyper_of(item) for item in items}
            unit = items[0].unit
            state = self._states[unit.index]
            # Copies may still be under way when the step returns. What they read stays alive (StreamEvent), and most
            # of it is nobody else's; but a gradient in param.grad may be zeroed or added to in place next.
            if any(item.param.grad is not None for item in items):
                state.order_after_copies()
            stepped.append((unit, list(hypers)))
            settlements.append(_Settlement(state, unit.index, hypers, state.fence(), self._timeline))
        for (unit, slices), settled in zip(stepped, self._worker.settle(settlements), strict=True):
            self._settling[unit.index] = settled
            yield SteppedUnit(unit, slices, _stats_of(settled), SettledWeights(settled))
        numbers.advance()

    def _remember_last(self) -> None:
        """Decide from the last step whether its successors look ahead."""
        last = [settled.result() for settled in self._settling.values()]
        self._settling.clear()
        self.num_redone += sum(settled.num_redone for settled in last)
        if self._pause:
            self._pause -= 1
        elif self._looks_ahead and last:
            self._outcomes.append(any(settled.num_redone for settled in last))
            if sum(self._outcomes) > self._patience:
                self._outcomes.clear()
                self._pause, self._patience = _PAUSE_STEPS, 0
            elif len(self._outcomes) == _REMEMBERED_STEPS:
                self._patience = _MOST_REDONE

    # State

    def flush(self) -> None:
        self.quiesce()
        for state in self._states.values():
            state.flush()

    def _before_states_change(self, item: ParamUpdate) -> None:
        self._states[item.unit.index].flush()  # or what is pending would be committed on top

    def discard(self) -> None:
        for looking in self._looking.values():
            if not looking.cancel():
                looking.exception()  # it may be what failed
        self._forget()
        self._settling = {index: f for index, f in self._settling.items() if f.exception() is None}

    def _forget(self) -> None:
        self._looking.clear()
        self._hypers.clear()

    def close(self) -> None:
        self.flush()
        self._worker.close()


def _stats_of(settled: Future[_Settled]) -> Callable[[], Sequence[GradStats]]:
    return lambda: settled.result().stats
