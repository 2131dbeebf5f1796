"""The optimizer engine: takes one optimizer's gradients, judges them, steps, publishes new weights.

The user's `torch.optim.Optimizer` stays the owner of parameter groups and states: schedulers, monitors,
`zero_grad`, `toggle_model` and `state_dict` keep working on it. Its parameters stay the module's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.zero.buckets import BucketTransport
from lightning_superscale.zero.clip import (
    ClipByNorm,
    ClipByValue,
    ClipRequest,
    clip_coefficient,
    grad_norms,
    joined,
    total_norm,
)
from lightning_superscale.zero.due import Due
from lightning_superscale.zero.guard import StepGuard
from lightning_superscale.zero.native_step import NativeStep, SubmitUpdate
from lightning_superscale.zero.own_step import OwnStep
from lightning_superscale.zero.rules import reason_not_native
from lightning_superscale.zero.states import UnitState, master_slice
from lightning_superscale.zero.units import GradientDelta, ShardUnit

MASTER_KEY = "master_param"


@dataclass(slots=True)
class StepSeconds:
    """How long the host was busy with each part of an optimizer step, summed over steps."""

    collect: float = 0.0
    norm: float = 0.0
    update: float = 0.0
    publish: float = 0.0


class OptimizerEngine:
    """Steps one optimizer: Adam and AdamW by the native kernel, any other through its own code.

    Args:
        optimizer: the user's, as `configure_optimizers` returned it.
        fqn_of: names of the module's parameters, in registration order.
        unit_bytes: upper bound of a unit's weights.
        make_state: builds the state of a unit (second argument: with moments or without); decides where
            masters and moments live.
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
        self._error_if_nonfinite = error_if_nonfinite
        self._guard = StepGuard(optimizer)
        self._own = OwnStep(optimizer, self._guard)
        self._rule: NativeStep | OwnStep = self._own
        if self.reason_not_native is None:
            self._rule = NativeStep(optimizer, self._guard, submit_update)
        self._clips: list[ClipRequest] = []
        self._last_norm: Tensor | None = None
        self._last_stats: Sequence[StatsSource] = ()
        self._seen_versions: dict[nn.Parameter, int] = {}
        self.states: list[UnitState] = []
        self.transport = BucketTransport([], unit_bytes=unit_bytes, sink=self._receive)
        own = set(self._params())
        self._adopt([p for p in fqn_of if p in own and p.requires_grad])

    def _params(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _adopt(self, params: Sequence[nn.Parameter]) -> None:
        """Move parameters into units of their own: at the start, and when some are unfrozen or added later."""
        for param in params:
            if param not in self._fqn_of:
                raise SuperScaleError(
                    f"{type(self.optimizer).__name__} was given a parameter of shape {tuple(param.shape)} that the "
                    "LightningModule does not own. Register it on the module before add_param_group()."
                )
        for unit in self.transport.add_params([(self._fqn_of[p], p) for p in params]):
            state = self._make_state(unit, self._rule.has_moments)
            self.states.append(state)
            self._rule.attach(unit, state)
            self._seen_versions.update((param, param._version) for param in unit.params)

    # Gradients

    def _receive(self, delta: GradientDelta) -> None:
        self.states[delta.unit.index].receive(delta.slices)

    def request_clip(self, clip: ClipRequest) -> None:
        """Clip the gradients of the next step.

        Raises:
            SuperScaleError: a clip by norm after one by value, which can't be fused.
        """
        self._clips = joined(self._clips, clip)

    def discard_gradients(self) -> None:
        """Forget gradients and clip requests of an interrupted step."""
        self.transport.discard()
        self._clips.clear()
        for state in self.states:
            state.clear_grads()

    def _gather_due(self) -> list[Due]:
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
                state = self.states[unit.index]
                grad = state.grad(i)
                if grad is not None:
                    due.append(Due(param, group, unit, state, i, grad))
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
            place = self.transport.place_of(param)
            if place is not None:
                self.states[place[0].index].reload([place[1]])

    # The step

    def step(self) -> None:
        """Apply this step's gradients. Called once per `optimizer.step()` of the user, after backward.

        Raises:
            SuperScaleError: a NaN or infinite gradient with error_if_nonfinite (names the parameters;
                masters, states and weights are unchanged).
        """
        start = time.perf_counter()
        self._settle()
        try:
            due = self._gather_due()
            collected = time.perf_counter()
            coefficient, clip_value = self._judge(due)
        except BaseException:
            self.discard_gradients()
            raise
        judged = time.perf_counter()
        published_before = self.seconds.publish
        self._last_stats = self._rule.step(due, coefficient, clip_value, self._publish)
        for state in self.states:
            state.clear_grads()
        self.seconds.collect += collected - start
        self.seconds.norm += judged - collected
        self.seconds.update += time.perf_counter() - judged - (self.seconds.publish - published_before)

    def _settle(self) -> None:
        """Bring weights and masters to rest: uploads of the last step are through, edits are taken over."""
        self.transport.wait_all_published()
        self._follow_edits()

    def _judge(self, due: Sequence[Due]) -> tuple[float, float | None]:
        """The verdict on this step's gradients: (clip coefficient, clip value)."""
        clips, self._clips = self._clips, []
        max_norm = next((c.max_norm for c in clips if isinstance(c, ClipByNorm)), None)
        clip_value = next((c.clip_value for c in clips if isinstance(c, ClipByValue)), None)
        self._last_norm, self._last_stats = None, ()
        if not due or (max_norm is None and not self._error_if_nonfinite):
            return 1.0, clip_value
        norms = grad_norms([item.grad for item in due])
        self._last_norm = total_norm(norms)
        if self._error_if_nonfinite and not bool(self._last_norm.isfinite()):
            self._raise_nonfinite(due, norms)
        if max_norm is None:
            return 1.0, clip_value
        return float(clip_coefficient(self._last_norm, max_norm)), clip_value

    def _raise_nonfinite(self, due: Sequence[Due], norms: Tensor) -> None:
        is_bad = (~norms.isfinite()).tolist()
        bad = [self._fqn_of[item.param] for item, flag in zip(due, is_bad, strict=True) if flag]
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise SuperScaleError(
            f"error_if_nonfinite: the gradients of {len(bad)} of {len(due)} parameters are NaN or infinite "
            f"({shown}). Weights and optimizer states are as before this step. "
            "Look for a NaN loss or an overflow; pass error_if_nonfinite=False to train on regardless."
        )

    def _publish(self, unit: ShardUnit, stepped: Sequence[int]) -> None:
        start = time.perf_counter()
        self.transport.publish(unit, self.states[unit.index].upload(stepped))
        self.seconds.publish += time.perf_counter() - start

    # Optimizers that run themselves

    @property
    def is_passthrough(self) -> bool:
        """Whether the user's optimizer can step the module's own parameters as if we were not there."""
        return self._rule is self._own and not self._own.has_stand_ins

    def passthrough_step(self, closure: Callable[[], Any]) -> Any:
        """Let it."""
        return self._own.passthrough_step(closure)

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the loss itself, as LBFGS does."""
        return self._rule is self._own and self._own.needs_closure

    def closure_step(self, closure: Callable[[], Any]) -> Any:
        """Step such an optimizer; `closure` runs forward and backward and returns the loss."""

        def evaluate() -> tuple[Any, Sequence[Due], float, float | None]:
            self.transport.wait_all_published()
            result = closure()
            due = self._gather_due()
            coefficient, clip_value = self._judge(due)
            for state in self.states:
                state.clear_grads()
            return result, due, coefficient, clip_value

        self._settle()
        return self._own.closure_step(evaluate, self._publish)

    # State

    def state_dict(self) -> dict[str, Any]:
        """`optimizer.state_dict()` in torch's own format, with each parameter's fp32 master beside its moments.

        A plain optimizer loads it and ignores the masters.
        """
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed["state"] = {index: dict(state) for index, state in packed["state"].items()}
        for index, param in enumerate(self._params()):
            place = self.transport.place_of(param)
            if place is not None and param.dtype != torch.float32:
                unit, i = place
                packed["state"].setdefault(index, {})[MASTER_KEY] = master_slice(unit, self.states[unit.index], i)
        return packed

    def load_state_dict(self, packed: Mapping[str, Any]) -> None:
        """Load what `state_dict()` of this or of a plain optimizer of the same type returned.

        Raises:
            SuperScaleError: parameter groups of other sizes.
        """
        groups, own_groups = packed["param_groups"], self.optimizer.param_groups
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own_groups]:
            raise SuperScaleError(
                f"the checkpoint's {type(self.optimizer).__name__} has parameter groups of "
                f"{[len(g['params']) for g in groups]} parameters, this run's has "
                f"{[len(g['params']) for g in own_groups]}. Build the optimizer as it was when it was saved."
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
        if self.transport.place_of(param) is None:
            self._adopt([param])
        place = self.transport.place_of(param)
        if place is None:
            raise AssertionError("a parameter that was just adopted has no unit")
        unit, i = place
        state = self.states[unit.index]
        if MASTER_KEY in saved:
            master_slice(unit, state, i).copy_(saved[MASTER_KEY])
        rest = {key: value for key, value in saved.items() if key != MASTER_KEY}
        if rest:
            self._rule.load(param, unit, state, i, rest)

    def reload_masters(self) -> None:
        """Follow the module's weights, after somebody loaded those."""
        for unit, state in zip(self.transport.units, self.states, strict=True):
            state.reload(range(len(unit.params)))

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the gradients of the last step, before clipping; fp32 scalar on the CPU.

        Raises:
            SuperScaleError: no step with gradients has been taken, or the optimizer steps itself.
        """
        if self._last_norm is not None:
            return self._last_norm.detach().cpu()
        if self._last_stats:
            return torch.tensor(sum(s.sumsq for source in self._last_stats for s in source()) ** 0.5)
        raise SuperScaleError(
            "grad_norm() is known after an optimizer step of Adam or AdamW, or after one with clipping by norm; "
            "neither has happened yet."
        )

    def close(self) -> None:
        """Hand everything back: parameters own their storage again, the optimizer is the user's alone.

        Masters go into the optimizer's state, so that a checkpoint saved after training still has them.
        """
        for param in self._params():
            place = self.transport.place_of(param)
            if place is not None and param.dtype != torch.float32 and param in self.optimizer.state:
                unit, i = place
                self.optimizer.state[param][MASTER_KEY] = master_slice(unit, self.states[unit.index], i)
        self._guard.remove()
        self.transport.close()
        for state in self.states:
            state.release()
