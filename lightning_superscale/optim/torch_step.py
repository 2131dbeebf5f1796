"""Steps any torch optimizer through its own code, on fp32 masters that stand in for the parameters meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.comm.dtensor import local_of
from lightning_superscale.optim.grad_dtypes import grad_dtype_of
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, by_unit
from lightning_superscale.optim.step_rule import StepGuard, SteppedUnit, SynchronousRule
from lightning_superscale.optim.unit import ShardUnit, flattened, shaped
from lightning_superscale.optim.unit_state import UnitState, master_slice
from lightning_superscale.timeline import UNTIMED, Lane, Timeline


class Evaluate(Protocol):
    """Publishes new weights and runs forward and backward on them."""

    def __call__(self, stepped: Iterator[SteppedUnit]) -> tuple[Any, Sequence[ParamUpdate], GradScale, float | None]:
        """Returns (loss, gradients due, clip coefficient, clip value)."""


class TorchStep(SynchronousRule):
    """Steps an optimizer through its own `step`, with masters in its groups where they are other tensors."""

    has_moments = False

    def __init__(self, optimizer: Optimizer, guard: StepGuard, timeline: Timeline = UNTIMED) -> None:
        self._optimizer = optimizer
        self._guard = guard
        self._timeline = timeline
        # Parameters whose master is a tensor of its own; the others are their own masters.
        self._masters: dict[nn.Parameter, nn.Parameter] = {}

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        """Make the stand-ins of a unit's parameters."""
        if state.master is None and unit.is_whole:
            return
        for i, param in enumerate(unit.params):
            master = nn.Parameter(master_slice(unit, state, i))
            self._masters[param] = master
            # Some optimizers make state in their constructor (Adagrad): bring it to the masters' device, dtype and
            # rows.
            own: dict[str, Any] = self._optimizer.state.get(param, {})
            for key, value in own.items():
                if isinstance(value, Tensor) and value.shape == param.shape and value.dtype == param.dtype:
                    piece = unit.shard.slices[i]
                    whole = flattened(local_of(value), piece.spec)
                    rows = whole[piece.global_offset : piece.global_offset + piece.numel]
                    own[key] = shaped(rows, piece).to(master.device, master.dtype, copy=True)

    @property
    def has_stand_ins(self) -> bool:
        """Whether any parameter's master is a tensor of its own."""
        return bool(self._masters)

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        self._set_grads(due, grad_scale, clip_value)
        try:
            is_on_host = any("host" in item.state.homes for item in due)
            lane: Lane = "host optimizer" if is_on_host else "device optimizer"
            stalled = self._timeline.stalled("its own step") if is_on_host else nullcontext()
            with self._guard.opened(), self._masters_in_place(), self._timeline.device(lane, "its own step"), stalled:
                self._optimizer.step()
        finally:
            self._drop_grads(due)
        yield from self._stepped(due)
        self._forget_grads(due)

    @property
    def needs_closure(self) -> bool:
        """Whether `optimizer.step` evaluates the loss itself, perhaps more than once, as LBFGS does."""
        closure = self._closure_parameter()
        return closure is not None and closure.default is inspect.Parameter.empty

    @property
    def may_need_closure(self) -> bool:
        """Whether `optimizer.step` may evaluate the loss although its closure has a default, as SAM's does.

        torch's own optimizers with such a closure only call it once and lose nothing without it.
        """
        return self._closure_parameter() is not None and not type(self._optimizer).__module__.startswith("torch.")

    def _closure_parameter(self) -> inspect.Parameter | None:
        return inspect.signature(type(self._optimizer).step).parameters.get("closure")

    def closure_step(self, evaluate: Evaluate) -> tuple[Any, Iterator[SteppedUnit]]:
        """Step an optimizer that evaluates the loss itself; returns the loss and the units to publish."""
        due: list[ParamUpdate] = []

        def closure() -> Any:
            with self._params_in_place():
                result, due[:], grad_scale, clip_value = evaluate(self._stepped(due))
            self._set_grads(due, grad_scale, clip_value)
            self._forget_grads(due)  # the next evaluation brings its own
            return result

        try:
            with self._guard.opened(), self._masters_in_place():
                result = self._optimizer.step(closure)
        finally:
            self._drop_grads(due)
        return result, self._stepped(due)

    def passthrough_step(self, closure: Callable[[], Any]) -> Any:
        """Let the optimizer step the module's parameters as if no engine were there."""
        with self._guard.opened():
            return self._optimizer.step(closure=closure)

    def load(self, param: nn.Parameter, unit: ShardUnit, state: UnitState, i: int, saved: Mapping[str, Any]) -> None:
        """Take over one parameter's saved state, on the master's device, in the dtypes that were saved."""
        device = self._masters.get(param, param).device
        self._optimizer.state[param] = {
            key: value.to(device, copy=True) if isinstance(value, Tensor) and key != "step" else value
            for key, value in saved.items()
        }

    def _set_grads(self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None) -> None:
        if isinstance(grad_scale, Tensor) and any("host" in item.state.homes for item in due):
            grad_scale = float(grad_scale)
        given: set[nn.Parameter] = set()
        for item in due:
            master = self._masters.get(item.param, item.param)
            grad = item.grad()
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            if item.param in given and master.grad is not None:  # twice in a group: scaled twice, as by torch
                grad = flattened(master.grad.detach(), item.piece.spec)
            given.add(item.param)
            if isinstance(grad_scale, Tensor) or grad_scale != 1.0:  # comparing a tensor would wait for the device
                grad.mul_(grad_scale)
            if clip_value is not None:
                grad.clamp_(-clip_value, clip_value)
            master.grad = shaped(grad, item.piece).to(grad_dtype_of(master))

    def _forget_grads(self, due: Sequence[ParamUpdate]) -> None:
        for item in due:
            item.state.clear_grads()

    def _drop_grads(self, due: Sequence[ParamUpdate]) -> None:
        for item in due:
            self._masters.get(item.param, item.param).grad = None

    def _stepped(self, due: Sequence[ParamUpdate]) -> Iterator[SteppedUnit]:
        """Round masters to new weights, unit by unit, where masters are tensors of their own."""
        for items in by_unit(due).values():
            for item in items:
                weight_out = item.state.weight_out_of(item.i)
                if weight_out is not None:
                    weight_out.copy_(item.state.master_of(item.i))
            yield SteppedUnit(items[0].unit, [item.i for item in items])

    @contextmanager
    def _masters_in_place(self) -> Iterator[None]:
        """While open, the optimizer's groups and states are keyed by masters."""
        self._exchange(self._masters)
        try:
            yield
        finally:
            self._exchange(self._params_of_masters())

    @contextmanager
    def _params_in_place(self) -> Iterator[None]:
        """While open, inside `_masters_in_place`, the optimizer's groups and states are keyed by parameters again."""
        self._exchange(self._params_of_masters())
        try:
            yield
        finally:
            self._exchange(self._masters)

    def _params_of_masters(self) -> dict[nn.Parameter, nn.Parameter]:
        return {master: param for param, master in self._masters.items()}

    def _exchange(self, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> None:
        # In place, because LBFGS keeps the list.
        for group in self._optimizer.param_groups:
            group["params"][:] = [stand_ins.get(p, p) for p in group["params"]]
        for param, stand_in in stand_ins.items():
            if param in self._optimizer.state:
                self._optimizer.state[stand_in] = self._optimizer.state.pop(param)
