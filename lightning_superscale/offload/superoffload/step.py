"""Steps Adam and AdamW during backward and the next forward: looks ahead, commits early or steps directly.

Which of these a step does is chosen at the end of the one before (plan.py). Exactness does not depend on any guess: a
look ahead stores nothing of this step but new weights, and those are not uploaded before the step's verdict ([Note:
Deferred commit] in state.py). Slices that were looked at with other numbers than the verdict's (clipping, a changed
learning rate, a late gradient) are looked at again.

[Note: A clip that is certain] The kernel sums up the squares of the gradients that it looks at. These sums are parts of
the norm's, on this rank alone, so once they exceed the square of the bound, the step will be clipped, and looking at
more gradients would be in vain; what is left of backward only commits then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.offload.late_moments import LateMoments
from lightning_superscale.offload.superoffload.plan import PlanChooser
from lightning_superscale.offload.superoffload.worker import StepThread, StepWorker
from lightning_superscale.ops.types import AdamWHyper, GradStats
from lightning_superscale.optim.adamw_step import AdamWRule, StepNumbers
from lightning_superscale.optim.clipping import ClipByNorm, ClipRequest
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, adamw_hyper, by_unit
from lightning_superscale.optim.step_rule import Figure, StepGuard, SteppedUnit
from lightning_superscale.optim.unit import GradientDelta, PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import UnitState
from lightning_superscale.timeline import UNTIMED, Timeline


class DeferringState(UnitState, Protocol):
    """States whose steps can be computed ahead of the verdict and committed later."""

    def look_ahead(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Compute new weights of slices with these hyperparameters; store nothing else of this step."""

    def has_arrived(self) -> bool:
        """Whether all gradients that were sent are there, so that `look_ahead` would not wait."""

    def order_after_copies(self) -> None:
        """Let the device's later work wait for copies of gradients, which it may change then."""

    def sumsq(self) -> float:
        """Sum of squares of this step's gradients, scaled as expected, of the slices that were looked at."""

    def finish(self, hypers: Mapping[int, AdamWHyper], *, defers: bool) -> int:
        """Compute new weights of slices not looked at with these hyperparameters; returns how many had been otherwise.

        Args:
            defers: whether to leave gradients to be committed later, rather than to apply them where none is pending.
        """

    def begin(self, hypers: Mapping[int, AdamWHyper]) -> None:
        """Start what can be applied at once with these hyperparameters; `settle` waits for it and does the rest."""

    def settle(self, hypers: Mapping[int, AdamWHyper], *, defers: bool) -> tuple[list[GradStats], int]:
        """Make this step final; returns statistics of its gradients, and the number of slices looked at again."""

    def flush(self) -> None:
        """Bring masters and moments up to the last settled step."""

    def take_work(self) -> tuple[float, float]:
        """Seconds of passes since the last call, and how many parameters they could have committed and looked at."""

    def is_pending(self) -> bool:
        """Whether masters and moments are behind the last settled step."""

    def fence(self) -> Any:
        """The point of the device's work after which uploads may replace its weights."""

    def upload(self, stepped: Sequence[int], after: Any = None) -> PublishEvent | None:
        """Send new weights of the stepped slices, after the point that `fence()` returned."""


class _Settled(NamedTuple):
    """The outcome of settling one unit.

    Attributes:
        stats: statistics of its gradients.
        num_redone: number of slices that had been looked at with other hyperparameters.
        is_pending: whether its gradients are to be committed yet.
        upload: the event of its new weights; None where they need no upload.
    """

    stats: list[GradStats]
    num_redone: int
    is_pending: bool
    upload: PublishEvent | None


class _Settlement:
    """The worker's task that settles one unit. Satisfies `worker.Settlement`.

    Args:
        hypers: by slice index, the hyperparameters of this step's update.
        fence: the point of the device's work after which uploads may replace its weights.
        defers: whether gradients may be committed later.
        committing: the commit of the last gradients, which may have failed; None without one.

    Attributes:
        slices: indices of the slices that are stepped.
    """

    def __init__(
        self,
        state: DeferringState,
        unit: ShardUnit,
        hypers: Mapping[int, AdamWHyper],
        fence: Any,
        timeline: Timeline,
        *,
        defers: bool,
        committing: Future[None] | None,
    ) -> None:
        self.unit, self.slices = unit, list(hypers)
        self.has_arrived = state.has_arrived
        self._state = state
        self._label = f"unit {unit.index}"
        self._hypers = hypers
        self._defers = defers
        self._committing = committing
        self._fence = fence
        self._timeline = timeline
        self._num_redone = 0

    def begin(self) -> None:
        """Start the work without waiting for its end; only on the thread that settles it."""
        self._raise_failed()
        self._state.begin(self._hypers)

    def prepare(self) -> None:
        self._raise_failed()
        with self._timeline.host("host optimizer", f"{self._label}, ahead"):
            self._num_redone = self._state.finish(self._hypers, defers=self._defers)

    def settle(self) -> _Settled:
        self._raise_failed()
        with self._timeline.host("host optimizer", self._label):
            stats, num_redone = self._state.settle(self._hypers, defers=self._defers)
        upload = self._state.upload(self.slices, self._fence)
        return _Settled(stats, self._num_redone + num_redone, self._state.is_pending(), upload)

    def _raise_failed(self) -> None:
        if self._committing is not None:
            self._committing.result()  # on the worker's one thread it is done, as that began it before


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
    """Steps Adam and AdamW at most one commit behind: the optimizer's own state is up to date after `flush`.

    Args:
        chooser: chooses the plan of each step.
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
        chooser: PlanChooser,
        worker: StepWorker | None = None,
        timeline: Timeline = UNTIMED,
    ) -> None:
        super().__init__(optimizer, guard)
        self.chooser = chooser
        self._worker = worker or StepThread()
        self._timeline = timeline
        self._states: dict[int, DeferringState] = {}
        self._looking: dict[int, Future[bool]] = {}
        self._committing: dict[int, Future[None]] = {}
        self._pending: set[int] = set()  # units whose last gradients may be to be committed yet
        self._hypers: dict[int, dict[int, AdamWHyper]] = {}
        self._settling: dict[int, Future[_Settled]] = {}  # units of the last step that the worker settles
        self._settled: list[_Settled] = []  # those of its units that were settled on this thread
        self._moments = LateMoments(optimizer, self._bring_up)
        self._group_of: dict[nn.Parameter, dict[str, Any]] = {}
        self._clip_value: float | None = None
        self._grad_scale = 1.0
        self._max_norm: float | None = None  # that the last step was clipped to
        self._asked_norm: float | None = None  # that this step is clipped to
        self._sumsq = 0.0  # of the gradients of this step that were looked at; the worker's
        self._groups_before: list[tuple[Any, ...]] | None = None  # when this step's first gradient left
        self._num_ahead = 0  # units that the last step's backward looked at
        self.num_redone = 0

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        self._states[unit.index] = cast(DeferringState, state)
        numel = unit.shard.shard_numel
        self.chooser.add_work(numel, numel * state.transfer_dtype.itemsize)

    # Backward

    def expect(self, grad_scale: float) -> None:
        self._grad_scale = grad_scale

    def expect_clip(self, clip: ClipRequest) -> None:
        if isinstance(clip, ClipByNorm):
            self._asked_norm = clip.max_norm

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        unit = delta.unit
        self.chooser.note_gradient()
        if self._groups_before is None:
            self._groups_before = self._group_numbers()
        settling, looking = self._settling.get(unit.index), self._looking.get(unit.index)
        if settling is not None:
            self._await(settling)  # until then the buffer for this gradient holds the last step's new weights
        is_begun = looking is not None and not looking.cancel()
        if looking is not None and is_begun:
            self._await(looking)  # a late gradient may not meet a running look ahead
        state.add_grads(delta.slices)
        if self.chooser.plan != "ahead" or is_begun:
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

    def _group_numbers(self) -> list[tuple[Any, ...]]:
        """The hyperparameters of every group, which user code may change between backward and the step."""
        keys = ("lr", "betas", "eps", "weight_decay")
        return [tuple(group[key] for key in keys) for group in self._optimizer.param_groups]

    def _await(self, work: Future[Any]) -> None:
        with self._timeline.stalled("last step's work"):
            work.result()

    def _look_ahead(self, index: int, hypers: Mapping[int, AdamWHyper]) -> bool:
        """Look at a unit's gradients, or only commit the last ones where that would be in vain; returns which."""
        with self._timeline.host("host optimizer", f"unit {index}, ahead"):
            if self._max_norm is not None and self._sumsq > self._max_norm**2:
                self._states[index].flush()  # [Note: A clip that is certain]
                return False
            self._states[index].look_ahead(hypers)
        self._sumsq += self._states[index].sumsq()
        return True

    def _commit(self, index: int) -> None:
        with self._timeline.host("host optimizer", f"unit {index}, commit"):
            self._states[index].flush()

    def _group(self, param: nn.Parameter) -> dict[str, Any]:
        if param not in self._group_of:
            self._group_of = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        return self._group_of[param]

    def quiesce(self) -> None:
        self._take_back()
        for settling in self._settling.values():
            settling.result()
        self._take_back_commits()
        for committing in self._committing.values():
            committing.result()

    def _take_back_commits(self) -> None:
        """Cancel commits that have not begun, which the next pass over their units makes up for."""
        self._committing = {index: future for index, future in self._committing.items() if not future.cancel()}
        self._pending -= self._committing.keys()

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
        defers = self.chooser.plan != "direct"
        expected = (self._grad_scale, self._clip_value, self._groups_before or self._group_numbers())
        self._clip_value = clip_value
        self._take_back()
        self._take_back_commits()
        self._remember_last()
        self._forget()
        grad_scale = float(grad_scale)
        missed = (grad_scale, clip_value, self._group_numbers()) != expected
        numbers = self.numbers(grad_scale, clip_value)
        settlements: list[_Settlement] = []
        for items in by_unit(due).values():
            settlements.append(self._settlement(items, numbers, defers=defers))
            if self.chooser.awaits:  # the pool works on it while this thread prepares the next
                with self._timeline.stalled("this step's gradients"):
                    settlements[-1].begin()
        yield from self._settled_here(settlements) if self.chooser.awaits else self._settled_by_worker(settlements)
        numbers.advance()
        self._max_norm, self._asked_norm = self._asked_norm, None
        self.chooser.end_step(missed=missed, may_miss=self._max_norm is not None)
        stepped = [settlement.unit.index for settlement in settlements]
        self._pending |= {index for index in stepped if defers or index in self._pending}
        if self.chooser.plan != "ahead":
            self._commit_later(stepped)

    def _settlement(self, items: Sequence[ParamUpdate], numbers: StepNumbers, *, defers: bool) -> _Settlement:
        """The task that settles the unit of these items."""
        hypers = {item.i: numbers.hyper_of(item) for item in items}
        unit = items[0].unit
        state = self._states[unit.index]
        self._moments.expect(unit.index, [item.param for item in items])
        # Copies may still be under way when the step returns. Their sources' memory is theirs until then
        # (`record_stream`), and no other code writes most of them; but a gradient in param.grad may be zeroed or added
        # to in place next.
        if any(item.param.grad is not None for item in items):
            state.order_after_copies()
        committing = self._committing.get(unit.index)
        return _Settlement(state, unit, hypers, state.fence(), self._timeline, defers=defers, committing=committing)

    def _settled_by_worker(self, settlements: Sequence[_Settlement]) -> Iterator[SteppedUnit]:
        for settlement, settled in zip(settlements, self._worker.settle(settlements), strict=True):
            unit = settlement.unit
            self._settling[unit.index] = settled
            yield SteppedUnit(unit, settlement.slices, _stats_of(settled), SettledWeights(settled, self._timeline))

    def _settled_here(self, settlements: Sequence[_Settlement]) -> Iterator[SteppedUnit]:
        """Settle units that were begun, on this thread, which runs the model."""
        for settlement in settlements:
            with self._timeline.stalled("this step's work"):
                settled = settlement.settle()
            self._settled.append(settled)
            yield SteppedUnit(settlement.unit, settlement.slices, functools.partial(_stats, settled), settled.upload)

    def _commit_later(self, first: Sequence[int]) -> None:
        """Let the worker commit pending gradients when it has nothing to settle, those of the next forward first.

        Args:
            first: units in the order of the next forward; others follow.
        """
        order = [index for index in dict.fromkeys([*first, *sorted(self._pending)]) if index in self._pending]
        for index in reversed(order):  # the worker takes the newest first
            self._committing[index] = self._worker.look_ahead(functools.partial(self._commit, index), lambda: True)

    def _remember_last(self) -> None:
        """Count how the last step's units were settled, and how this one's were looked at."""
        last, counts = [*self._settled, *(s.result() for s in self._settling.values())], self.chooser.counts
        under_way = {index for index, committing in self._committing.items() if not committing.done()}
        for index in self._settling.keys() - under_way:
            self.chooser.note_work(*self._states[index].take_work())
        self._settling.clear()
        self._settled.clear()
        num_pending = sum(settled.is_pending for settled in last)
        self.num_redone += sum(settled.num_redone for settled in last)
        counts.redone += sum(settled.num_redone > 0 for settled in last)
        counts.direct += len(last) - num_pending
        counts.late += max(0, num_pending - self._num_ahead)
        self._num_ahead = sum(looking.result() for looking in self._looking.values() if not looking.cancelled())
        counts.ahead += self._num_ahead

    # State

    def _bring_up(self, index: int) -> None:
        for task in (self._settling.get(index), self._looking.get(index), self._committing.get(index)):
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
        self._pending.clear()

    def _before_states_change(self, item: ParamUpdate) -> None:
        committing = self._committing.get(item.unit.index)
        if committing is not None and not committing.cancel():
            committing.result()
        self._states[item.unit.index].flush()  # or the pending gradient would be committed on top

    def figures(self) -> Sequence[Figure]:
        return self.chooser.figures()

    def reasons(self) -> Sequence[str]:
        return self.chooser.reasons()

    def discard(self) -> None:
        for looking in self._looking.values():
            if not looking.cancel():
                looking.exception()  # waits for it without raising: its failure may have interrupted the step
        self._forget()
        self._asked_norm = None
        self.chooser.drop_step()
        self._settling = {index: f for index, f in self._settling.items() if f.exception() is None}

    def _forget(self) -> None:
        self._looking.clear()
        self._hypers.clear()
        self._sumsq, self._groups_before = 0.0, None

    def close(self) -> None:
        with ExitStack() as rest:
            rest.callback(self._worker.close)
            rest.callback(self._moments.close)
            self.flush()


def _stats_of(settled: Future[_Settled]) -> Callable[[], Sequence[GradStats]]:
    return lambda: settled.result().stats


def _stats(settled: _Settled) -> Sequence[GradStats]:
    return settled.stats
