"""The optimizer engine: takes one optimizer's gradients, steps masters and states, publishes new weights.

The user's `torch.optim.Optimizer` stays the owner of parameter groups and states: schedulers, monitors,
`zero_grad`, `toggle_model` and `state_dict` keep working on it. Its parameters stay the module's own.
Adam and AdamW are stepped by the native kernel; any other optimizer steps through its own code on
the fp32 masters, which stand in for the parameters while it runs.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.types import AdamWSegment, GradStats
from lightning_superscale.zero.buckets import BucketTransport
from lightning_superscale.zero.clip import (
    ClipByNorm,
    ClipByValue,
    ClipRequest,
    clip_coefficient,
    grad_norms,
    total_norm,
)
from lightning_superscale.zero.rules import hyper_of, reason_not_native
from lightning_superscale.zero.states import UnitState, master_slice
from lightning_superscale.zero.units import GradientDelta, ShardUnit, slice_view

MASTER_KEY = "master_param"


class UpdateHandle(Protocol):
    """An update that was submitted."""

    def wait(self) -> Sequence[GradStats] | None:
        """Return statistics of the gradients, if any were taken, once masters and states are new."""


SubmitUpdate = Callable[[Sequence[AdamWSegment]], UpdateHandle]


@dataclass(slots=True)
class StepSeconds:
    """How long the host was busy with each part of an optimizer step, summed over steps."""

    collect: float = 0.0
    norm: float = 0.0
    update: float = 0.0
    publish: float = 0.0

    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self)))


@dataclass(slots=True)
class _Due:
    """One parameter that has a gradient this step."""

    param: nn.Parameter
    group: dict[str, Any]
    state: UnitState
    i: int
    grad: Tensor


class OptimizerEngine:
    """Steps one optimizer.

    Args:
        optimizer: the user's, as `configure_optimizers` returned it.
        fqn_of: names of the module's parameters.
        unit_bytes: upper bound of a unit's weights.
        make_state: builds the state of a unit; decides where masters and moments live.
        submit_update: starts a native update of segments and returns a handle with `wait()`.
        error_if_nonfinite: raise before anything changes when a gradient is NaN or infinite.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        fqn_of: Mapping[nn.Parameter, str],
        unit_bytes: int,
        make_state: Callable[[ShardUnit, bool], UnitState],
        submit_update: SubmitUpdate,
        error_if_nonfinite: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.reason_not_native = reason_not_native(optimizer)
        self.seconds = StepSeconds()
        self._fqn_of = fqn_of
        self._make_state = make_state
        self._submit_update = submit_update
        self._error_if_nonfinite = error_if_nonfinite
        self._clips: list[ClipRequest] = []
        self._last_norm: Tensor | None = None
        self._last_stats: list[GradStats] = []
        self._is_stepping = False
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._seen_versions: dict[nn.Parameter, int] = {}
        trainable = [(fqn_of[p], p) for p in self._params() if p.requires_grad]
        order = {param: n for n, param in enumerate(fqn_of)}
        trainable.sort(key=lambda item: order[item[1]])
        self.transport = BucketTransport(trainable, unit_bytes=unit_bytes, sink=self._receive)
        self.states: list[UnitState] = [self._build_state(unit) for unit in self.transport.units]
        self._guard = optimizer.register_step_pre_hook(self._refuse_direct_step)

    # Building

    def _params(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _build_state(self, unit: ShardUnit) -> UnitState:
        state = self._make_state(unit, self.reason_not_native is None)
        for param in unit.params:
            self._seen_versions[param] = param._version
        if not state.is_shared and self.reason_not_native is not None:
            for i, param in enumerate(unit.params):
                self._masters[param] = nn.Parameter(master_slice(state, i))
                self._lift_early_state(param)
        return state

    def _lift_early_state(self, param: nn.Parameter) -> None:
        """Move state that an optimizer made in its constructor (Adagrad does) to where and how masters are."""
        own: dict[str, Any] = self.optimizer.state[param] if param in self.optimizer.state else {}
        master = self._masters[param]
        for key, value in own.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.dtype == param.dtype:
                own[key] = value.to(master.device, master.dtype, copy=True)

    def _adopt(self, params: Sequence[nn.Parameter]) -> None:
        """Take in parameters that were unfrozen, or added as a group, after training began."""
        for param in params:
            if param not in self._fqn_of:
                raise SuperScaleError(
                    f"{type(self.optimizer).__name__} was given a parameter of shape {tuple(param.shape)} that the "
                    "LightningModule does not own. Register it on the module before add_param_group()."
                )
        added = self.transport.add_params([(self._fqn_of[p], p) for p in params])
        self.states += [self._build_state(unit) for unit in added]

    @property
    def is_passthrough(self) -> bool:
        """Whether the user's optimizer can step the module's own parameters as if we were not there."""
        return self.reason_not_native is not None and all(state.is_shared for state in self.states)

    # Gradients

    def _receive(self, delta: GradientDelta) -> None:
        self.states[delta.unit.index].receive(delta.slices)

    def request_clip(self, clip: ClipRequest) -> None:
        """Clip the gradients of the next step."""
        if self._clips and type(self._clips[-1]) is type(clip):
            self._clips[-1] = clip if _limit(clip) < _limit(self._clips[-1]) else self._clips[-1]
        else:
            self._clips.append(clip)
        if len(self._clips) > 2 or [type(c) for c in self._clips] == [ClipByValue, ClipByNorm]:
            self._clips.clear()
            raise SuperScaleError(
                "gradients of one step can be clipped by norm, by value, or by norm and then by value; "
                "found a clip by norm after a clip by value."
            )

    def discard_gradients(self) -> None:
        """Forget gradients and clip requests of an interrupted step."""
        self.transport.discard()
        self._clips.clear()
        for state in self.states:
            state.clear_grads()

    def _gather_due(self) -> list[_Due]:
        late = [p for p in self._params() if p.grad is not None and self.transport.place_of(p) is None]
        if late:
            self._adopt(late)
        self.transport.collect()
        due = []
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                place = self.transport.place_of(param)
                if place is None:
                    continue
                unit, i = place
                grad = self.states[unit.index].grad(i)
                if grad is not None:
                    due.append(_Due(param, group, self.states[unit.index], i, grad))
        return due

    def _follow_edits(self) -> None:
        """Take over weights that user code changed in place since the last step (a clamp, an average, a load).

        [Note: Edited weights] A parameter views its unit's buffer but counts versions of its own: uploads
        don't raise the count, in-place operations of the user do. Changes through `param.data` raise none
        and can't be seen; they last until the next step.
        """
        for param, seen in self._seen_versions.items():
            if param._version == seen:
                continue
            self._seen_versions[param] = param._version
            unit, i = self.transport.place_of(param) or (None, 0)
            if unit is not None:
                self.states[unit.index].reload([i])

    # The step

    def step(self) -> None:
        """Apply this step's gradients. Called once per `optimizer.step()` of the user, after backward.

        Raises:
            SuperScaleError: a NaN or infinite gradient with error_if_nonfinite (names the parameters;
                masters, states and weights are unchanged).
        """
        clock = time.perf_counter
        start = clock()
        # Uploads of the previous step must be through before their buffers are written again.
        self.transport.wait_all_published()
        self._follow_edits()
        try:
            due = self._gather_due()
            collected = clock()
            coefficient, clip_value = self._judge(due)
            judged = clock()
        except BaseException:
            self.discard_gradients()
            raise
        finally:
            self._clips.clear()
        if self.reason_not_native is None:
            published = self._native_step(due, coefficient, clip_value)
        else:
            self._foreign_step(due, coefficient, clip_value)
            published = self._publish(due)
        for state in self.states:
            state.clear_grads()
        end = clock()
        self.seconds.collect += collected - start
        self.seconds.norm += judged - collected
        self.seconds.publish += published
        self.seconds.update += end - judged - published

    def _judge(self, due: Sequence[_Due]) -> tuple[float, float | None]:
        """The verdict on this step's gradients: (clip coefficient, clip value)."""
        max_norm = next((c.max_norm for c in self._clips if isinstance(c, ClipByNorm)), None)
        clip_value = next((c.clip_value for c in self._clips if isinstance(c, ClipByValue)), None)
        self._last_norm, self._last_stats = None, []
        if not due or (max_norm is None and not self._error_if_nonfinite):
            return 1.0, clip_value
        norms = grad_norms([item.grad for item in due])
        self._last_norm = total_norm(norms)
        if self._error_if_nonfinite and not bool(self._last_norm.isfinite()):
            self._raise_nonfinite(due, norms)
        if max_norm is None:
            return 1.0, clip_value
        return float(clip_coefficient(self._last_norm, max_norm)), clip_value

    def _raise_nonfinite(self, due: Sequence[_Due], norms: Tensor) -> None:
        bad = [
            self._fqn_of[item.param]
            for item, norm in zip(due, norms.tolist(), strict=True)
            if norm != norm or norm == float("inf")
        ]
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise SuperScaleError(
            f"error_if_nonfinite: the gradients of {len(bad)} of {len(due)} parameters are NaN or infinite "
            f"({shown}). Weights and optimizer states are as before this step. "
            "Look for a NaN loss or an overflow; pass error_if_nonfinite=False to train on regardless."
        )

    def _native_step(self, due: Sequence[_Due], grad_scale: float, clip_value: float | None) -> float:
        segments: dict[int, list[AdamWSegment]] = {}
        step_counts = []
        for item in due:
            step_counts.append(self._bound_state(item)["step"])
            hyper = hyper_of(self.optimizer, item.group, int(step_counts[-1]) + 1, grad_scale, clip_value)
            segments.setdefault(item.state.unit.index, []).append(_segment(item, hyper))
        # Last unit first: units follow the backward, uploads the next forward.
        handles = [(index, self._submit_update(segments[index])) for index in sorted(segments, reverse=True)]
        published = 0.0
        for index, handle in handles:
            stats = handle.wait()
            if stats is not None:
                self._last_stats += stats
            start = time.perf_counter()
            stepped = [item.i for item in due if item.state is self.states[index]]
            self.transport.publish(self.states[index].unit, self.states[index].upload(stepped))
            published += time.perf_counter() - start
        for step in step_counts:
            step += 1  # noqa: PLW2901 - in place, it is the optimizer's own tensor
        self._run_own_step()
        return published

    def _publish(self, due: Sequence[_Due]) -> float:
        start = time.perf_counter()
        stepped: dict[int, list[int]] = {}
        for item in due:
            stepped.setdefault(item.state.unit.index, []).append(item.i)
        for index in sorted(stepped, reverse=True):
            state = self.states[index]
            if state.weight_out is not None:
                state.weight_out.copy_(state.master)
            self.transport.publish(state.unit, state.upload(stepped[index]))
        return time.perf_counter() - start

    def _run_own_step(self) -> None:
        """Run `optimizer.step()` with no gradient in sight: only its hooks and its scheduler's count."""
        parked = [(p, p.grad) for p in self._params() if p.grad is not None]
        for param, _ in parked:
            param.grad = None
        self._is_stepping = True
        try:
            self.optimizer.step()
        finally:
            self._is_stepping = False
            for param, grad in parked:
                param.grad = grad

    def _foreign_step(self, due: Sequence[_Due], grad_scale: float, clip_value: float | None) -> None:
        self._set_master_grads(due, grad_scale, clip_value)
        self._is_stepping = True
        try:
            with self.masters_in_place_of_params():
                self.optimizer.step()
        finally:
            self._is_stepping = False
            self._drop_master_grads(due)

    def _drop_master_grads(self, due: Sequence[_Due]) -> None:
        for item in due:
            self._masters.get(item.param, item.param).grad = None

    def _set_master_grads(self, due: Sequence[_Due], grad_scale: float, clip_value: float | None) -> None:
        for item in due:
            grad = item.grad.to(torch.float32, copy=True)
            if grad_scale != 1.0:
                grad.mul_(grad_scale)
            if clip_value is not None:
                grad.clamp_(-clip_value, clip_value)
            self._masters.get(item.param, item.param).grad = grad.view(item.state.unit.shard.slices[item.i].local_shape)

    @property
    def needs_closure(self) -> bool:
        """Whether `optimizer.step` evaluates the loss itself, more than once perhaps, as LBFGS does."""
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    def closure_step(self, closure: Callable[[], Any]) -> Any:
        """Step an optimizer that evaluates the loss itself: each evaluation sees the masters' current weights."""
        due: list[_Due] = []

        def evaluate() -> Any:
            with self._params_in_place_of_masters():
                if due:
                    self._publish(due)
                    self.transport.wait_all_published()
                result = closure()
                due[:] = self._gather_due()
                coefficient, clip_value = self._judge(due)
                self._clips.clear()
            self._set_master_grads(due, coefficient, clip_value)
            for state in self.states:
                state.clear_grads()
            return result

        self.transport.wait_all_published()
        self._follow_edits()
        self._is_stepping = True
        try:
            with self.masters_in_place_of_params():
                result = self.optimizer.step(evaluate)
        finally:
            self._is_stepping = False
            self._drop_master_grads(due)
        self._publish(due)
        return result

    def passthrough_step(self, closure: Callable[[], Any]) -> Any:
        """Let the user's optimizer step the module's parameters with its own code, closure and all."""
        self._is_stepping = True
        try:
            return self.optimizer.step(closure=closure)
        finally:
            self._is_stepping = False

    def _refuse_direct_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_stepping:
            raise SuperScaleError(
                f"{type(optimizer).__name__}.step() was called on the bare optimizer, which would step the module's "
                "weights behind their fp32 masters. Call step() on what self.optimizers() returns."
            )

    # State

    def _bound_state(self, item: _Due) -> dict[str, Any]:
        """The optimizer's own state of a parameter, made of views into our buffers."""
        own: dict[str, Any] = self.optimizer.state[item.param]
        piece = item.state.unit.shard.slices[item.i]
        if item.state.exp_avg is None or item.state.exp_avg_sq is None:
            raise AssertionError("a native step needs moments")
        if "step" not in own:
            own["step"] = torch.tensor(0.0)
        for key, flat in (("exp_avg", item.state.exp_avg), ("exp_avg_sq", item.state.exp_avg_sq)):
            view = slice_view(flat, piece).view(piece.local_shape)
            held = own.get(key)
            if held is None:
                own[key] = view
            elif held.data_ptr() != view.data_ptr():
                # Somebody loaded states straight into the optimizer: take them over.
                view.copy_(held)
                own[key] = view
        return own

    @contextmanager
    def masters_in_place_of_params(self) -> Iterator[None]:
        """While open, the optimizer's groups and states are keyed by fp32 masters."""
        _exchange(self.optimizer, self._masters)
        try:
            yield
        finally:
            _exchange(self.optimizer, self._params_of_masters())

    @contextmanager
    def _params_in_place_of_masters(self) -> Iterator[None]:
        _exchange(self.optimizer, self._params_of_masters())
        try:
            yield
        finally:
            _exchange(self.optimizer, self._masters)

    def _params_of_masters(self) -> dict[nn.Parameter, nn.Parameter]:
        return {master: param for param, master in self._masters.items()}

    def state_dict(self) -> dict[str, Any]:
        """`optimizer.state_dict()` in torch's own format, with each parameter's fp32 master beside its moments.

        A plain optimizer loads it and ignores the masters.
        """
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed["state"] = {index: dict(state) for index, state in packed["state"].items()}
        for index, param in enumerate(self._params()):
            place = self.transport.place_of(param)
            if place is not None and not self.states[place[0].index].is_shared and param.dtype != torch.float32:
                packed["state"].setdefault(index, {})[MASTER_KEY] = master_slice(self.states[place[0].index], place[1])
        return packed

    def load_state_dict(self, packed: Mapping[str, Any]) -> None:
        """Load what `state_dict()` of this or of a plain optimizer of the same type returned."""
        groups, own_groups = packed["param_groups"], self.optimizer.param_groups
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own_groups]:
            raise SuperScaleError(
                f"the checkpoint's {type(self.optimizer).__name__} has parameter groups of "
                f"{[len(g['params']) for g in groups]} parameters, this run's has "
                f"{[len(g['params']) for g in own_groups]}. Build the optimizer as it was when the checkpoint was saved."
            )
        for group, own_group in zip(groups, own_groups, strict=True):
            own_group.update({key: value for key, value in group.items() if key != "params"})
        saved_index = [index for group in groups for index in group["params"]]
        self.optimizer.state.clear()
        for index, param in zip(saved_index, self._params(), strict=True):
            saved = packed["state"].get(index)
            if saved is not None:
                self._load_param_state(param, saved)

    def _load_param_state(self, param: nn.Parameter, saved: Mapping[str, Any]) -> None:
        place = self.transport.place_of(param)
        if place is None:
            self._adopt([param])
            place = self.transport.place_of(param)
        assert place is not None  # noqa: S101 - _adopt has just placed it
        unit, i = place
        state = self.states[unit.index]
        if MASTER_KEY in saved:
            master_slice(state, i).copy_(saved[MASTER_KEY])
        rest = {key: value for key, value in saved.items() if key != MASTER_KEY}
        if not rest:
            return
        if self.reason_not_native is not None:
            key_param = self._masters.get(param, param)
            self.optimizer.state[param] = {
                key: value.to(key_param.device, copy=True) if isinstance(value, Tensor) and key != "step" else value
                for key, value in rest.items()
            }
            return
        self.optimizer.state[param] = {
            key: value.clone() if isinstance(value, Tensor) else torch.tensor(float(value)) if key == "step" else value
            for key, value in rest.items()
        }
        self._bound_state(_Due(param, {}, state, i, param))

    def reload_masters(self) -> None:
        """Follow the module's weights, after somebody loaded those."""
        for state in self.states:
            state.reload(range(len(state.unit.params)))

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the gradients of the last step, before clipping; fp32 scalar on the CPU.

        Raises:
            SuperScaleError: no step with gradients has been taken, or the optimizer steps itself.
        """
        if self._last_norm is not None:
            return self._last_norm.detach().cpu()
        if self._last_stats:
            return torch.tensor(sum(s.sumsq for s in self._last_stats) ** 0.5)
        raise SuperScaleError(
            "grad_norm() is known after an optimizer step of Adam or AdamW, or after one with clipping by norm; "
            "neither has happened yet."
        )

    def close(self) -> None:
        """Hand everything back: parameters own their storage again, the optimizer is the user's alone."""
        self._guard.remove()
        self.transport.close()
        for state in self.states:
            state.release()


def _segment(item: _Due, hyper: Any) -> AdamWSegment:
    state, piece = item.state, item.state.unit.shard.slices[item.i]
    if state.exp_avg is None or state.exp_avg_sq is None:
        raise AssertionError("a native step needs moments")
    return AdamWSegment(
        param=slice_view(state.master, piece),
        exp_avg=slice_view(state.exp_avg, piece),
        exp_avg_sq=slice_view(state.exp_avg_sq, piece),
        grad=item.grad,
        hyper=hyper,
        weight_out=None if state.weight_out is None else slice_view(state.weight_out, piece),
    )


def _exchange(optimizer: Optimizer, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace parameters by their stand-ins in an optimizer's groups (in place) and states."""
    for group in optimizer.param_groups:
        group["params"][:] = [stand_ins.get(p, p) for p in group["params"]]
    for param, stand_in in stand_ins.items():
        if param in optimizer.state:
            optimizer.state[stand_in] = optimizer.state.pop(param)


def _limit(clip: ClipRequest) -> float:
    return clip.max_norm if isinstance(clip, ClipByNorm) else clip.clip_value
