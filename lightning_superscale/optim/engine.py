"""The optimizer engine: takes one optimizer's gradients, judges them, steps, publishes new weights.

The user's `torch.optim.Optimizer` stays the owner of parameter groups and states: schedulers, monitors,
`zero_grad`, `toggle_model` and `state_dict` keep working on it. Its parameters stay the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.ops.state_dtypes import WIDE_DTYPES
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.optim.bucketing import NamedParam
from lightning_superscale.optim.clipping import ClipRequest, LastNorm
from lightning_superscale.optim.param_update import GradScale, ParamUpdate, by_unit, why_not_native
from lightning_superscale.optim.state_dict import (
    MASTER_KEY,
    keep_rule_state,
    pack_local_state,
    pack_state,
    unpack_state,
)
from lightning_superscale.optim.step_rule import RuleState, StepGuard, SteppedUnit, StepRule
from lightning_superscale.optim.torch_step import TorchStep
from lightning_superscale.optim.transport import Transport
from lightning_superscale.optim.unit import DeltaSink, GradientDelta, ShardUnit
from lightning_superscale.optim.unit_state import UnitState, load_master, master_slice
from lightning_superscale.optim.verdict import EqualGradients, GradVerdict
from lightning_superscale.timeline import UNTIMED, Timeline
from lightning_superscale.torch_private import version_of


class MakeState(Protocol):
    """A function that builds the state of a unit."""

    def __call__(self, unit: ShardUnit, *, has_moments: bool, is_on_device: bool) -> UnitState:
        """Build the state of `unit`.

        Args:
            has_moments: whether it keeps exp_avg and exp_avg_sq.
            is_on_device: keep it on the unit's device, also where other units' states are on the host.
        """


@dataclass(slots=True)
class StepSeconds:
    """Seconds that the host was busy with each part of an optimizer step, summed over steps.

    Attributes:
        collect: waiting for the last step's weights, and collecting gradients.
        norm: the verdict.
        update: stepping, without publishing.
        publish: sending new weights on their way.
    """

    collect: float = 0.0
    norm: float = 0.0
    update: float = 0.0
    publish: float = 0.0


class OptimizerEngine:
    """Steps one optimizer: Adam and AdamW by the native kernel, any other through its own code.

    Args:
        optimizer: the user's, as `configure_optimizers` returned it.
        fqn_of: names of the module's parameters, in registration order.
        ranks: collectives with the other ranks, and the agreement with them.
        make_transport: builds a transport without units, which feeds the given sink.
        make_state: builds the state of a unit; decides where masters and moments live.
        make_native: builds the rule that steps Adam and AdamW.
        error_if_nonfinite: raise before anything changes when a gradient is NaN or infinite.
        timeline: the record of its steps.

    Attributes:
        why_not_native: why the optimizer steps through its own code; None for Adam and AdamW.
        states: by unit index.
        is_torn: whether a step has begun to change weights or states, and its caller has not yet seen its end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        fqn_of: Mapping[nn.Parameter, str],
        ranks: Communicator,
        make_transport: Callable[[DeltaSink], Transport],
        make_state: MakeState,
        make_native: Callable[[Optimizer, StepGuard], StepRule],
        error_if_nonfinite: bool = False,
        timeline: Timeline = UNTIMED,
    ) -> None:
        self.optimizer = optimizer
        self.ranks = ranks
        self.why_not_native = why_not_native(optimizer)
        self.seconds = StepSeconds()
        self._fqn_of = fqn_of
        self._make_state = make_state
        self._make_native = make_native
        self._judge = GradVerdict(ranks, fqn_of, error_if_nonfinite=error_if_nonfinite)
        self._guard = StepGuard(optimizer)
        self._equal_gradients = EqualGradients(ranks.mesh, fqn_of)
        self._timeline = timeline
        self._loss_scale: float | None = None
        self._own = TorchStep(optimizer, self._guard, timeline)
        self._rule: StepRule = make_native(optimizer, self._guard) if self.why_not_native is None else self._own
        self._seen_versions: dict[nn.Parameter, int] = {}
        self.states: list[UnitState] = []
        self.is_torn = self._is_abandoned = self._is_closed = False
        self.transport = make_transport(self._add_grads)
        own = set(self.params())
        self.adopt([p for p in fqn_of if p in own and p.requires_grad])

    def params(self) -> Iterator[nn.Parameter]:
        """The optimizer's parameters, trained and frozen, in the order of its groups."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def adopt(self, params: Sequence[nn.Parameter]) -> None:
        """Move parameters into new units: at the start, and when some are unfrozen or added later.

        Raises:
            SuperScaleError: the module does not own a parameter, or a kernel that was chosen can't step it; names it.
        """
        for param in params:
            if param not in self._fqn_of:
                raise SuperScaleError(
                    f"{type(self.optimizer).__name__} was given a parameter of shape {tuple(param.shape)} that the "
                    "LightningModule does not own. Register it on the module before add_param_group()."
                )
            if param.dtype in WIDE_DTYPES and self.why_not_native is None:
                raise SuperScaleError(
                    f"parameter {self._fqn_of[param]!r} is {param.dtype}, and was given to "
                    f"{type(self.optimizer).__name__} after its kernel was chosen, which steps fp32, bf16 and fp16. "
                    "Give it to the optimizer in configure_optimizers(), frozen if need be; torch steps all of it then."
                )
        for unit in self.transport.add_params([(self._fqn_of[p], p) for p in params]):
            self._attach(unit)

    def _attach(self, unit: ShardUnit) -> None:
        is_on_device = unit.params[0] in self.transport.grouping.on_device
        state = self._make_state(unit, has_moments=self._rule.has_moments, is_on_device=is_on_device)
        self.states.append(state)
        self._rule.attach(unit, state)
        self._seen_versions.update((param, version_of(param)) for param in unit.params)
        unit.seal()

    # Members that rebuild_buckets.regroup() uses

    @property
    def can_regroup(self) -> bool:
        """Whether `regroup` can move states to other units: those of Adam and AdamW, which unit states hold."""
        return self.why_not_native is None

    def named_params(self) -> list[NamedParam]:
        """Parameters that units hold, in registration order."""
        return [(fqn, param) for param, fqn in self._fqn_of.items() if self.transport.place_of(param) is not None]

    def own_state_of(self, param: nn.Parameter) -> Mapping[str, Any]:
        """The state that the user's optimizer keeps of a parameter."""
        state: Mapping[str, Any] = self.optimizer.state.get(param, {})
        return state

    def start_over(self) -> None:
        """Forget the state of every unit, and begin with a new rule that takes over the old one's own state."""
        self._rule.close()
        kept = self._rule.state_dict()
        self._rule = self._make_native(self.optimizer, self._guard)
        self._rule.load_state_dict(kept)
        self.states = []

    # Gradients

    def _add_grads(self, delta: GradientDelta) -> None:
        state = self.states[delta.unit.index]
        if "host" in state.homes:
            self._judge.measure(delta)
        self._rule.add_grads(delta, state)

    def request_clip(self, clip: ClipRequest) -> None:
        """Clip the gradients of the next step; see `GradVerdict.request`."""
        self._judge.request(clip)
        self._rule.expect_clip(clip)

    def clip_in_place(self, clip: ClipRequest, *, keeps_nonfinite: bool = False) -> Tensor | None:
        """Clip the gradients that lie in `param.grad`, averaged over ranks, where user code looks at them.

        Every rank calls it. Arguments and result are those of `clip_in_place` in clipping.py.
        """
        return self._judge.clip_in_place(self.params(), clip, keeps_nonfinite=keeps_nonfinite)

    def discard_gradients(self) -> None:
        """Forget the gradients and clip requests of a step that is not taken."""
        self._rule.discard()
        self.transport.discard()
        self._judge.discard()
        for state in self.states:
            state.clear_grads()

    def measure_gradients(self) -> dict[str, float]:
        """2-norm of each gradient, averaged over ranks, by name; then forget them. Every rank calls it, for a step."""
        try:
            self.wait_idle()
            return self._judge.norms_by_name(self._gather_due())
        finally:
            self.discard_gradients()

    def abandon(self) -> None:
        """Forget an interrupted step after a rank failed, and wait for nothing from other ranks any more."""
        self._is_abandoned = True
        self.discard_gradients()
        self.transport.abandon()

    def _gather_due(self) -> list[ParamUpdate]:
        late = [p for p in self.params() if p.requires_grad and self.transport.place_of(p) is None]
        if late:
            self.adopt(late)
        self.transport.collect()
        due = []
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                place = self.transport.place_of(param)
                if place is None:
                    continue
                unit, i = place
                state = self.states[unit.index]
                if state.has_grad(i):
                    due.append(ParamUpdate(param, group, unit, state, i))
        self._equal_gradients.check(due)
        return due

    def _follow_edits(self) -> None:
        """Take over weights that user code changed in place since the last step (a clamp, an average, a load).

        [Note: Edited weights] A parameter views its unit's buffer but counts versions of its own: uploads
        don't raise the count, in-place operations of the user do. Changes through `param.data` and through views that
        user code keeps raise none; the transport knows the parameters that may have been changed in this way.
        """
        edited = {param: None for param, seen in self._seen_versions.items() if version_of(param) != seen}
        edited.update(dict.fromkeys(self.transport.take_edits()))
        if edited:
            self._rule.quiesce()
        for param in edited:
            self._seen_versions[param] = version_of(param)
            place = self.transport.place_of(param)
            if place is not None:
                self.states[place[0].index].reload([place[1]])

    # The step

    def scale_losses(self, loss_scale: float) -> None:
        """Expect gradients of a loss times `loss_scale`, which steps divide by it ([Note: Scale of a step])."""
        self._loss_scale = loss_scale
        self._rule.expect(1.0 / loss_scale)

    def step(self) -> bool:
        """Apply this step's gradients. Every rank calls it once per `optimizer.step()` of the user, after backward.

        Returns:
            False if gradients of a scaled loss overflowed: they are dropped on every rank, and nothing changes.

        Raises:
            SuperScaleError: a NaN or infinite gradient with error_if_nonfinite (names the parameters;
                masters, states and weights are unchanged).
        """
        start = perf_counter()
        try:
            self.wait_idle()
            due = self._gather_due()
            collected = perf_counter()
            with self._timeline.device("verdict", "norm and clip coefficient"):
                verdict = self._judge.judge(due, self._loss_scale)
            judged = perf_counter()
            if verdict.has_overflowed:
                self.discard_gradients()
                return False
            published_before = self.seconds.publish
            self.is_torn = True
            stats = self._publish_all(self._rule.step(due, verdict.grad_scale, verdict.clip_value))
            self._judge.note(due, [stats[index] for index in by_unit(due) if index in stats])
            self._rule.run_hooks()
        except BaseException:
            self.discard_gradients()
            raise
        self.seconds.collect += collected - start
        self.seconds.norm += judged - collected
        self.seconds.update += perf_counter() - judged - (self.seconds.publish - published_before)
        return True

    def wait_idle(self) -> None:
        """Wait until uploads of the last step have arrived, and take over weights that user code changed in place."""
        self.transport.wait_all_published()
        self._follow_edits()

    def quiesce(self) -> None:
        """Wait until nothing of the steps so far runs in the background; raises the error of what failed there."""
        self._rule.quiesce()
        self.transport.wait_all_published()

    def before_evaluation(self) -> None:
        """Apply the gradients that the rule has kept back, if any. Every rank calls it, between steps.

        It first raises the error of background work that failed, which weights would lack.
        """
        self.quiesce()
        if self._rule.evaluates_stale:
            self.catch_up()

    def catch_up(self) -> None:
        """Apply the gradients that the rule has kept back. Every rank calls it, between steps."""
        self.wait_idle()
        self._publish_all(self._rule.catch_up())

    def _publish_all(self, stepped: Iterable[SteppedUnit]) -> dict[int, StatsSource]:
        """Bring new weights to where forward reads them, each unit's as soon as it is stepped.

        Returns:
            statistics of gradients by unit index, for the units whose rule counted them.
        """
        stats = {}
        for unit, slices, source, under_way in stepped:
            start = perf_counter()
            event = self.states[unit.index].upload(slices) if under_way is None else under_way
            self.transport.publish(unit, event, slices)
            self._seen_versions.update((unit.params[i], version_of(unit.params[i])) for i in slices)
            self.seconds.publish += perf_counter() - start
            if source is not None:
                stats[unit.index] = source
        return stats

    # Optimizers that run themselves

    @property
    def is_passthrough(self) -> bool:
        """Whether the user's optimizer can step the module's own parameters as if no engine were there."""
        is_plain = self.transport.is_local and not self._own.has_stand_ins and self._loss_scale is None
        return self._rule is self._own and is_plain

    def passthrough_step(self, closure: Callable[[], Any]) -> Any:
        """Let the user's optimizer step the module's parameters as if no engine were there."""
        return self._own.passthrough_step(closure)

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the loss itself, as LBFGS does.

        One that only may do so is stepped without a closure where losses are scaled, which it would not know.
        """
        if self._rule is not self._own:
            return False
        return self._own.needs_closure or (self._loss_scale is None and self._own.may_need_closure)

    def closure_step(self, closure: Callable[[], Any]) -> Any:
        """Step an optimizer that evaluates the loss itself, as LBFGS does.

        Args:
            closure: runs forward and backward and returns the loss.

        Returns:
            what `optimizer.step(closure)` returned.
        """

        def evaluate(stepped: Iterable[SteppedUnit]) -> tuple[Any, Sequence[ParamUpdate], GradScale, float | None]:
            self._publish_all(stepped)
            self.transport.wait_all_published()
            result = closure()
            due = self._gather_due()
            verdict = self._judge.judge(due, None)
            return result, due, verdict.grad_scale, verdict.clip_value

        self.wait_idle()
        result, stepped = self._own.closure_step(evaluate)
        self._publish_all(stepped)
        return result

    # State

    def flush(self) -> None:
        """Bring masters and moments up to date: some rules leave them one step behind the weights.

        Masters follow weights that user code changed since the last step, so that what is saved belongs together.
        """
        if not (self._is_closed or self._is_abandoned):
            self.wait_idle()
        self._rule.flush()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in torch's own format, tensors whole, with masters (see `pack_state`).

        Every rank calls it.
        """
        self.flush()
        return pack_state(self)

    def local_state_dict(self, name_of: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """This rank's rows of the optimizer's state, parameters by name (see `pack_local_state`). No rank waits."""
        self.flush()
        return pack_local_state(self, name_of)

    def load_state_dict(self, packed: Mapping[str, Any]) -> None:
        """Load a state dict of this engine, or of a plain optimizer of the same type, tensors whole.

        Raises:
            SuperScaleError: parameter groups of other sizes.
        """
        self._rule.flush()
        unpack_state(self, packed)

    def rule_state(self) -> RuleState:
        """The state that the rule keeps for itself; empty for most rules."""
        return self._rule.state_dict()

    def load_rule_state(self, saved: RuleState) -> None:
        """Let the rule take over the state that a rule kept for itself; see `StepRule.load_state_dict`."""
        self._rule.load_state_dict(saved)

    def take_states(self, states: Mapping[nn.Parameter, Mapping[str, Any]], rule_state: RuleState) -> None:
        """Forget all states and take over the given ones.

        Args:
            states: this rank's rows of each parameter's state, with its master under MASTER_KEY.
            rule_state: the state that the rule keeps for itself.
        """
        self._rule.flush()
        self.optimizer.state.clear()
        for param, state in states.items():
            rest = {key: value for key, value in state.items() if key != MASTER_KEY}
            self.load_param_state(param, rest, state.get(MASTER_KEY))
        self._rule.load_state_dict(rule_state)

    def piece_of(self, param: nn.Parameter) -> ParamSlice | None:
        """The slice that says which rows of a parameter this rank has; None for a parameter in no unit."""
        place = self.transport.place_of(param)
        return None if place is None else place[0].shard.slices[place[1]]

    def master_of(self, param: nn.Parameter) -> Tensor | None:
        """This rank's rows of a parameter's master, in their shape; None where the weight stands for it."""
        place = self.transport.place_of(param)
        if place is None:
            return None
        state = self.states[place[0].index]
        master = master_slice(place[0], state, place[1])
        return None if master.dtype == param.dtype and not state.masters_lead else master

    def load_param_state(self, param: nn.Parameter, state: Mapping[str, Any], master: Tensor | None) -> None:
        """Take over one parameter's saved state and master, this rank's rows of each; None keeps its master."""
        if self.transport.place_of(param) is None:
            self.adopt([param])
        place = self.transport.place_of(param)
        if place is None:
            raise AssertionError("a parameter that was just adopted has no unit")
        unit, i = place
        kept, rest = self.states[unit.index], dict(state)
        load_master(unit, kept, i, master, rest)
        if rest:
            self._rule.load(param, unit, kept, i, rest)

    def reload_masters(self) -> None:
        """Let masters follow the module's weights, after a load changed these."""
        self._rule.flush()
        for unit, state in zip(self.transport.units, self.states, strict=True):
            state.reload(range(len(unit.params)))

    def follow_masters(self) -> None:
        """Let weights follow masters that were loaded with updates which they lack. Every rank calls it."""
        self.transport.wait_all_published()
        for unit, state in zip(self.transport.units, self.states, strict=True):
            slices = range(len(unit.params))
            if state.master is not None:
                for i in slices:
                    unit.local_rows(i).copy_(state.master_of(i))
            self.transport.publish(unit, None, slices)
            self._seen_versions.update((param, version_of(param)) for param in unit.params)

    def grad_norm(self) -> Tensor:
        """Global 2-norm of the last step's gradients; see `GradVerdict.grad_norm`. Every rank calls it if sharded."""
        return self._judge.grad_norm()

    def last_norm(self) -> LastNorm:
        """The last step's norm as far as this rank knows it without asking another; see `GradVerdict.last_norm`."""
        return self._judge.last_norm()

    @property
    def rule(self) -> StepRule:
        """The rule that steps now; another one once units were made anew."""
        return self._rule

    def close(self) -> None:
        """Hand everything back, also where work of the last step failed, which is raised then. Every rank calls it.

        Parameters own their storage again, without hooks. Gradients that the rule kept back are applied first, unless
        an error ended the last step or a rank failed. Masters, and what the rule keeps, go into the optimizer's state.
        """
        with ExitStack() as rest:
            for state in self.states:
                rest.callback(state.release)
            rest.callback(self.transport.close)
            rest.callback(self._leave_optimizer)
            rest.callback(self._rule.close)
            if not (self.is_torn or self._is_abandoned):
                self.catch_up()
                self.transport.wait_all_published()

    def _leave_optimizer(self) -> None:
        keep_rule_state(self.optimizer, self._rule.state_dict())
        for param in self.params():
            master = self.master_of(param)
            if master is not None and param in self.optimizer.state:
                self.optimizer.state[param][MASTER_KEY] = master
        self._guard.remove()
        self._is_closed = True
