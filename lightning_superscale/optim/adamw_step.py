"""Adam and AdamW, stepped by the native kernel on masters and moments wherever they live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.comm.dtensor import local_shard, take_rows
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.types import AdamWHyper, AdamWSegment
from lightning_superscale.ops.update import Update
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, adamw_hyper, by_unit
from lightning_superscale.optim.step_rule import StepGuard, SteppedUnit, SynchronousRule
from lightning_superscale.optim.unit import ShardUnit, slice_view
from lightning_superscale.optim.unit_state import COMPENSATION_KEY, UnitState
from lightning_superscale.optim.weights.param_classes import data_ptr_of, set_data
from lightning_superscale.timeline import UNTIMED, Lane, Timeline
from lightning_superscale.torch_private import add_to_all

SubmitUpdate = Callable[[Sequence[AdamWSegment]], Update]


class AdamWRule(SynchronousRule):
    """The base of every rule that steps Adam natively: the optimizer's own state views the unit states' buffers.

    A subclass implements `step`, which updates masters and moments.
    """

    has_moments = True

    def __init__(self, optimizer: Optimizer, guard: StepGuard) -> None:
        self._optimizer = optimizer
        self._guard = guard
        self._bound_params: set[nn.Parameter] = set()

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        """Prepare nothing: states are bound at a parameter's first gradient, when plain AdamW makes them too."""

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        raise NotImplementedError

    def run_hooks(self) -> None:
        """Run `optimizer.step()` with no gradient in sight: only its hooks and its scheduler's count."""
        parked = [(p, p.grad) for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None]
        for param, _ in parked:
            param.grad = None
        try:
            with self._guard.opened():
                self._optimizer.step()
        finally:
            for param, grad in parked:
                _give_grad(param, grad)

    def bound_state(self, item: ParamUpdate) -> dict[str, Any]:
        """The optimizer's own state of a parameter: its step count, and views into the buffers of the unit's state.

        Raises:
            SuperScaleError: user code gave the optimizer a state of another shape; names the parameter.
        """
        own: dict[str, Any] = self._optimizer.state[item.param]
        if "step" not in own:
            own["step"] = torch.tensor(0.0)
        state = item.state
        flats = {"exp_avg": _present(state.exp_avg), "exp_avg_sq": _present(state.exp_avg_sq)}
        if state.compensation is not None:
            flats[COMPENSATION_KEY] = state.compensation
        for key, flat in flats.items():
            held = own.get(key)
            if held is not None and data_ptr_of(held) == flat.data_ptr() + item.piece.offset * flat.element_size():
                continue  # bound at an earlier step; a view per parameter and step would cost more than this
            own[key] = state.view_of(flat, item.i)
            self._bind(item, key, own[key], held)
        self._bound_params.add(item.param)
        return own

    def _bind(self, item: ParamUpdate, key: str, view: Tensor, held: Tensor | None) -> None:
        """Give a view into a unit's state the value that the optimizer's own state had before.

        Args:
            held: what user code loaded straight into the optimizer, this rank's rows or whole; None where there is
                nothing, at first, or because user code emptied the state, and the parameter starts over.
        """
        if held is not None:
            self._before_states_change(item)
            view.copy_(_rows_of(held, item, key))
        elif item.param in self._bound_params and key != COMPENSATION_KEY:  # which is a part of the weight
            self._before_states_change(item)
            view.zero_()

    def numbers(self, grad_scale: float, clip_value: float | None) -> StepNumbers:
        """The hyperparameters and step counts that the updates of one step share."""
        return StepNumbers(self, self._optimizer, grad_scale, clip_value)

    def _before_states_change(self, item: ParamUpdate) -> None:
        """Prepare for a write to an item's states that is not a step's: let no work in the background use them."""

    def load(self, param: nn.Parameter, unit: ShardUnit, state: UnitState, i: int, saved: Mapping[str, Any]) -> None:
        """Take over one parameter's saved state: step, exp_avg and exp_avg_sq, this rank's rows of the latter two."""
        self._optimizer.state[param] = {
            key: torch.tensor(float(value)) if key == "step" else value for key, value in saved.items()
        }
        self.bound_state(ParamUpdate(param, {}, unit, state, i))


class StepNumbers:
    """The numbers that updates of one step share: hyperparameters by group and step count, and these counts."""

    def __init__(self, rule: AdamWRule, optimizer: Optimizer, grad_scale: float, clip_value: float | None) -> None:
        self._rule = rule
        self._optimizer = optimizer
        self._grad_scale = grad_scale
        self._clip_value = clip_value
        self._counts: list[Tensor] = []
        # Most parameters of a group are at the same step, and on the same device.
        self._made: dict[tuple[int, int, torch.device], AdamWHyper] = {}

    def hyper_of(self, item: ParamUpdate) -> AdamWHyper:
        """The hyperparameters of one update. `advance` will count the step for its parameter."""
        count = self._rule.bound_state(item)["step"]
        self._counts.append(count)
        step, device = int(count) + 1, item.unit.device
        made = self._made.get((id(item.group), step, device))
        if made is None:
            made = adamw_hyper(self._optimizer, item.group, step, self._grad_scale, self._clip_value, device=device)
            self._made[id(item.group), step, device] = made
        return made

    def advance(self) -> None:
        """Count the step, which was taken, for each parameter that `hyper_of` was called for."""
        if self._counts:
            add_to_all(self._counts, 1.0)  # in place: they are the optimizer's own tensors


class AdamWStep(AdamWRule):
    """Steps Adam and AdamW by the native kernel at `optimizer.step()`, when the factor of gradients is known.

    Args:
        submit_update: starts the updates of one unit and returns a handle to wait for.
        timeline, lane: the record of updates, and the lane in it that shows them.
        scales_on_device: whether the kernel can read the factor of gradients from a tensor on their device; without,
            the host reads that tensor, and waits for it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        guard: StepGuard,
        submit_update: SubmitUpdate,
        *,
        timeline: Timeline = UNTIMED,
        lane: Lane = "host optimizer",
        scales_on_device: bool = False,
    ) -> None:
        super().__init__(optimizer, guard)
        self._submit_update = submit_update
        self._timeline = timeline
        self._lane = lane
        self._scales_on_device = scales_on_device

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        """Update every unit in the order of the next forward, and yield each as soon as it is updated."""
        device_scale = None
        if isinstance(grad_scale, Tensor):
            grad_scale, device_scale = (1.0, grad_scale) if self._scales_on_device else (float(grad_scale), None)
        numbers = self.numbers(grad_scale, clip_value)
        handles = []
        for items in by_unit(due).values():
            hypers = [numbers.hyper_of(item) for item in items]
            with self._stalled(items):
                # A rank may hold no row of a small parameter.
                segments = [
                    _segment(item, hyper, device_scale)
                    for item, hyper in zip(items, hypers, strict=True)
                    if item.piece.numel
                ]
                with self._recorded(items, is_queued=True):
                    handles.append((items, self._submit_update(segments)))
        for items, handle in handles:
            with self._stalled(items), self._recorded(items, is_queued=False):
                stats = handle.wait()
            yield SteppedUnit(items[0].unit, [item.i for item in items], stats)
        numbers.advance()
        for state in {id(item.state): item.state for item in due}.values():
            state.clear_grads()

    def _recorded(self, items: Sequence[ParamUpdate], *, is_queued: bool) -> AbstractContextManager[None]:
        """The span of a unit's update in the timeline: a GPU's around the queueing, the host's around the wait."""
        if is_queued != (self._lane == "device optimizer" and self._timeline.is_cuda):
            return nullcontext()
        return self._timeline.device(self._lane, f"unit {items[0].unit.index}")

    def _stalled(self, items: Sequence[ParamUpdate]) -> AbstractContextManager[None]:
        """A context in which the host has the gradients of a unit brought, or steps it, and the device waits."""
        if self._lane == "device optimizer":
            return nullcontext()
        return self._timeline.stalled(f"unit {items[0].unit.index}")


def _rows_of(held: Tensor, item: ParamUpdate, key: str) -> Tensor:
    piece = item.piece
    if tuple(held.shape) == piece.local_shape:
        return held
    if held.shape == item.param.shape:  # as `optimizer.load_state_dict()` leaves it
        return take_rows(local_shard(held, item.param), piece)
    raise SuperScaleError(
        f"the optimizer's state {key!r} of parameter {piece.fqn!r} has shape {tuple(held.shape)}; expected the "
        f"parameter's, {tuple(item.param.shape)}, or that of this rank's rows, {piece.local_shape}."
    )


def _segment(item: ParamUpdate, hyper: AdamWHyper, device_scale: Tensor | None) -> AdamWSegment:
    state, piece = item.state, item.piece
    return AdamWSegment(
        param=state.master_of(item.i),
        exp_avg=slice_view(_present(state.exp_avg), piece),
        exp_avg_sq=slice_view(_present(state.exp_avg_sq), piece),
        grad=item.grad(),
        hyper=hyper,
        weight_out=state.weight_out_of(item.i),
        rounding=state.rounding_of(item.i),
        compensation=None if state.compensation is None else slice_view(state.compensation, piece),
        device_scale=device_scale,
    )


def _give_grad(param: nn.Parameter, grad: Tensor) -> None:
    """Set `param.grad`, also where the weight is in host memory between its uses and the gradient is on the device."""
    if param.device == grad.device:
        param.grad = grad
        return
    weight = param.detach()
    # torch compares the devices of a parameter and the gradient that it is given.
    set_data(param, torch.empty_like(grad, dtype=weight.dtype))
    param.grad = grad
    set_data(param, weight)


def _present(moments: Tensor | None) -> Tensor:
    if moments is None:
        raise AssertionError("a native step needs moments")
    return moments
