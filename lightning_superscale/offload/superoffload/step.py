"""Steps Adam and AdamW during backward: looks ahead while gradients arrive, and settles at the step.

Exactness does not depend on any guess: a look ahead stores nothing of this step but new weights, and those are not
uploaded before the step's verdict ([Note: Deferred commit] in state.py). Slices that were looked at with other numbers
than the verdict's (clipping, a changed learning rate, a late gradient) are looked at again.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.offload.late_moments import LateMoments
from lightning_superscale.offload.superoffload.worker import StepThread, StepWorker
from lightning_superscale.ops.types import AdamWHyper, GradStats
from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, adamw_hyper, by_unit
from lightning_superscale.optim.step_rule import StepGuard, SteppedUnit
from lightning_superscale.optim.unit import GradientDelta, PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import UnitState
from lightning_superscale.timeline import UNTIMED, Timeline

# Of the last _REMEMBERED_STEPS steps that looked ahead, when more than _MOST_REDONE had to look again, the next
# _PAUSE_STEPS steps do not look ahead: looking twice costs more than waiting for the norm and hiding the step behind
# the next forward. After a pause, the first step that has to look again begins another pause.
_REMEMBERED_STEPS, _MOST_REDONE, _PAUSE_STEPS = 20, 6, 50


class DeferringState(UnitState, Protocol):
    """States whose steps can be computed ahead of the verdict and committed later."""

    def look_ahead(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Compute new weights of slices with these hyperparameters; store nothing else of this step."""

    def has_arrived(self) -> bool:
        """Whether all gradients that were sent are there, so that `look_ahead` would not wait."""

    def order_after_copies(self) -> None:
        """Let the device's later work wait for copies of gradients, which it may change then."""

    def look_again(self, hypers: Mapping[int, AdamWHyper]) -> int:
        """Look ahead to slices not looked at with these hyperparameters; returns how many had been with others."""

    def settle(self, hypers: Mapping[int, AdamWHyper]) -> tuple[list[GradStats], int]:
        """Make this step final; returns statistics of its gradients, and the number of slices looked at again."""

    def flush(self) -> None:
        """Bring masters and moments up to the last settled step."""

    def fence(self) -> Any:
        """The point of the device's work after which uploads may replace its weights."""

    def upload(self, stepped: Sequence[int], after: Any = None) -> PublishEvent | None:
        """Send new weights of the stepped slices, after the point that `fence()` returned."""


class _Settled(NamedTuple):
    """The outcome of settling one unit.

    Attributes:
        stats: statistics of its gradients.
        num_redone: number of slices that had been looked at with other hyperparameters.
        upload: the event of its new weights; None where they need no upload.
    """

    stats: list[GradStats]
    num_redone: int
    upload: PublishEvent | None


class _Settlement:
    """The worker's task that settles one unit. Satisfies `worker.Settlement`.

    Args:
        index: the unit's, for the timeline.
        hypers: by slice index, the hyperparameters of this step's update.
        fence: the point of the device's work after which uploads may replace its weights.
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
    """The upload of a unit that another thread settles: waitable once that thread has started it and it is waitable.

    `wait` raises the error of a failed settlement.

    Args:
        timeline: counts waits.
    """

    def __init__(self, settled: Future[_Settled], timeline: Timeline = UNTIMED) -> None:
        self._settled = settled
        self._timeline = timeline

    def is_waitable(self) -> bool:
        if not self._settled.done():
            return False
        upload = self._settled.result().upload
        return upload is None or upload.is_waitable()

    def wait(self) -> None:
        with self._timeline.stalled("new weights"):
            upload = self._settled.result().upload
            if upload is not None:
                upload.wait()


class DeferredStep(AdamWRule):
    """Steps Adam and AdamW one commit behind: the optimizer's own state is up to date after `flush`.

    Args:
        looks_ahead: whether to step during backward; False waits for the verdict always, and overlaps with forward.
        worker: does the work on the host; None for a new thread.
        timeline: the record of that work.

    Attributes:
        num_redone: number of slices that were looked at again so far.
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
        self._moments = LateMoments(optimizer, self._bring_up)
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
            self._await(settling)  # until then the buffer for this gradient holds the last step's new weights
        is_begun = looking is not None and not looking.cancel()
        if looking is not None and is_begun:
            self._await(looking)  # a late gradient may not meet a running look ahead
        state.add_grads(delta.slices)
        if not self._looks_ahead or self._pause or is_begun:
            return
        hypers = self._hypers.setdefault(unit.index, {})
        for i, _ in delta.slices:
            param = unit.params[i]
            item = ParamUpdate(param, self._group(param), unit, state, i)
            count = int(self.bound_state(item)["step"]) + 1
            hypers[i] = adamw_hyper(
                self._optimizer, item.group, count, self._grad_scale, self._clip_value, device=unit.device
            )
        deferring = self._states[unit.index]
        ahead = functools.partial(self._look_ahead, unit.index, dict(hypers))
        self._looking[unit.index] = self._worker.look_ahead(ahead, deferring.has_arrived)

    def _await(self, work: Future[Any]) -> None:
        with self._timeline.stalled("last step's work"):
            work.result()

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
        """Cancel look aheads that have not begun, which settling makes up for, and wait for the one that has.

        Raises:
            Exception: the error of a look ahead that failed.
        """
        begun = [looking for looking in self._looking.values() if not looking.cancel()]
        for looking in begun:
            self._await(looking)

    # The step

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        """Let the worker settle every unit in the order of the next forward; it may still do so after the return."""
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
            self._moments.expect(unit.index, [item.param for item in items])
            # Copies may still be under way when the step returns. Their sources' memory is theirs until then
            # (`record_stream`), and no other code writes most of them; but a gradient in param.grad may be zeroed or
            # added to in place next.
            if any(item.param.grad is not None for item in items):
                state.order_after_copies()
            stepped.append((unit, list(hypers)))
            settlements.append(_Settlement(state, unit.index, hypers, state.fence(), self._timeline))
        for (unit, slices), settled in zip(stepped, self._worker.settle(settlements), strict=True):
            self._settling[unit.index] = settled
            yield SteppedUnit(unit, slices, _stats_of(settled), SettledWeights(settled, self._timeline))
        numbers.advance()

    def _remember_last(self) -> None:
        """Decide, from how the last step's units were settled, whether the next steps look ahead."""
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

    def _bring_up(self, index: int) -> None:
        for task in (self._settling.get(index), self._looking.get(index)):
            if task is not None and not task.cancelled():
                task.result()
        self._states[index].flush()

    def _bind(self, item: ParamUpdate, key: str, view: Tensor, held: Tensor | None) -> None:
        super()._bind(item, key, view, held)
        self._moments.forget(item.unit.index)

    def flush(self) -> None:
        self.quiesce()
        for state in self._states.values():
            state.flush()
        self._moments.arrived()

    def _before_states_change(self, item: ParamUpdate) -> None:
        self._states[item.unit.index].flush()  # or the pending gradient would be committed on top

    def discard(self) -> None:
        for looking in self._looking.values():
            if not looking.cancel():
                looking.exception()  # waits for it without raising: its failure may have interrupted the step
        self._forget()
        self._settling = {index: f for index, f in self._settling.items() if f.exception() is None}

    def _forget(self) -> None:
        self._looking.clear()
        self._hypers.clear()

    def close(self) -> None:
        with ExitStack() as rest:
            rest.callback(self._worker.close)
            rest.callback(self._moments.close)
            self.flush()


def _stats_of(settled: Future[_Settled]) -> Callable[[], Sequence[GradStats]]:
    return lambda: settled.result().stats
