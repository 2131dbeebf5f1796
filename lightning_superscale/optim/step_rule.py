"""The protocol of rules that step an optimizer's units, and the guard that refuses other steps of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.errors import SuperScaleError
from lightning_superscale.ops.update import StatsSource
from lightning_superscale.optim.clipping import ClipRequest
from lightning_superscale.optim.param_update import GradScale, ParamUpdate
from lightning_superscale.optim.unit import GradientDelta, PublishEvent, ShardUnit
from lightning_superscale.optim.unit_state import UnitState

RuleState = Mapping[str, Tensor | int | float]
"""The state that a rule keeps for itself beside states of parameters, by name; small, and equal on every rank."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that a rule knows of its work on this rank, for loggers and for `explain()`.

    Attributes:
        name: of the metric in a log, such as "selected_energy_share".
        text: what the number is of, in words.
        unit: "bytes", "share" (from 0 to 1) or "steps".
        expected: by arithmetic, from settings and sizes alone; None where these do not tell.
        measured: None before steps were taken that tell it.
    """

    name: str
    text: str
    unit: Literal["bytes", "share", "steps"]
    expected: float | None = None
    measured: float | None = None


class Cycle(NamedTuple):
    """The steps in which a rule does everything that it does, for a recording that shows it.

    Attributes:
        num_steps: number of steps to record.
        starts_in: steps from now after which a recording best begins; 0 to begin with the next one.
    """

    num_steps: int
    starts_in: int


EACH_STEP = Cycle(1, 0)
"""The cycle of a rule whose steps are all alike."""


class SteppedUnit(NamedTuple):
    """One unit that a rule has stepped, for the engine to publish.

    Attributes:
        slices: indices of the stepped slices.
        stats: statistics of its gradients; None where no kernel counted them.
        event: the upload of new weights to the unit's inbox, if it is under way; None where the engine has yet to ask
            the unit's state for it.
    """

    unit: ShardUnit
    slices: Sequence[int]
    stats: StatsSource | None = None
    event: PublishEvent | None = None


class StepRule(Protocol):
    """Steps one optimizer's units once the engine knows the verdict; it may work ahead of that, but not commit.

    Attributes:
        has_moments: whether unit states keep exp_avg and exp_avg_sq.
        evaluates_stale: whether the rule keeps gradients back, so that weights may lack them between steps; evaluation
            then begins with `catch_up`.
        cycle: the steps that a recording has to show.
    """

    @property
    def has_moments(self) -> bool: ...
    @property
    def evaluates_stale(self) -> bool: ...
    @property
    def cycle(self) -> Cycle: ...

    def attach(self, unit: ShardUnit, state: UnitState) -> None:
        """Prepare to step a unit that was just made."""

    def expect(self, grad_scale: float) -> None:
        """Note the factor that gradients get if they are not clipped, the inverse of a loss scale; to work ahead."""

    def expect_clip(self, clip: ClipRequest) -> None:
        """Note a clip that was requested for this step, because the next steps probably get the same."""

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        """Add reduced gradients to a unit's state, during backward or at the step."""

    def quiesce(self) -> None:
        """Return when nothing of this rule runs in the background; work that had not begun is not applied.

        Raises:
            Exception: the error of background work that failed.
        """

    def step(
        self, due: Sequence[ParamUpdate], grad_scale: GradScale, clip_value: float | None
    ) -> Iterator[SteppedUnit]:
        """Step every unit in the order of the next forward, and forget its gradients.

        The engine runs it to its end and publishes each unit while the next ones are still being stepped.
        """

    def run_hooks(self) -> None:
        """Run the hooks that users have put on the optimizer's `step`, after a step that was published."""

    def load(self, param: nn.Parameter, unit: ShardUnit, state: UnitState, i: int, saved: Mapping[str, Any]) -> None:
        """Take over one parameter's saved state, this rank's rows: that of slice `i` of `unit`."""

    def flush(self) -> None:
        """Bring masters and moments up to the weights that forward reads."""

    def catch_up(self) -> Iterator[SteppedUnit]:
        """Step, between two steps, with the gradients that were kept back; the engine publishes units as in `step`."""

    def state_dict(self) -> RuleState:
        """Accumulators, phases and counters that belong to no parameter, for a checkpoint.

        Names of entries begin with that of the offload engine and a dot. The engine calls it after `flush`, and after
        `close` too. Tensors of the shape of a parameter belong into the
        optimizer's own state of that parameter.
        """

    def load_state_dict(self, saved: RuleState) -> None:
        """Take over a `state_dict` of this rule or of another: the entries whose names this rule knows.

        Where none is known, as in a checkpoint that another engine wrote, the rule begins anew. Units may be attached
        before or afterwards.
        """

    def figures(self) -> Sequence[Figure]:
        """Numbers of this rule's work so far; in one run always of the same names.

        This rank calls it alone, at any time.
        """

    def reasons(self) -> Sequence[str]:
        """Sentences on what this rule has chosen for the user so far. This rank calls it alone, at any time."""

    def discard(self) -> None:
        """Forget the gradients and the work of an interrupted step."""

    def close(self) -> None:
        """Take no more steps, and leave masters and moments up to date."""


class SynchronousRule:
    """The base of rules that do everything inside `step`: no work runs ahead or lags behind, and no state is kept."""

    @property
    def evaluates_stale(self) -> bool:
        return False

    def expect(self, grad_scale: float) -> None:
        return

    def expect_clip(self, clip: ClipRequest) -> None:
        return

    def add_grads(self, delta: GradientDelta, state: UnitState) -> None:
        state.add_grads(delta.slices)

    def quiesce(self) -> None:
        return

    def run_hooks(self) -> None:
        return

    def flush(self) -> None:
        return

    def catch_up(self) -> Iterator[SteppedUnit]:
        return iter(())

    def state_dict(self) -> RuleState:
        return {}

    def load_state_dict(self, saved: RuleState) -> None:
        return

    @property
    def cycle(self) -> Cycle:
        return EACH_STEP

    def figures(self) -> Sequence[Figure]:
        return ()

    def reasons(self) -> Sequence[str]:
        return ()

    def discard(self) -> None:
        return

    def close(self) -> None:
        return


class StepGuard:
    """Refuses `optimizer.step()` unless the engine itself calls it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._is_open = False
        self._hook = optimizer.register_step_pre_hook(self._check)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, `optimizer.step()` is allowed."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_open:
            raise SuperScaleError(
                f"{type(optimizer).__name__}.step() was called on the bare optimizer, which would step the module's "
                "weights behind their fp32 masters. Call step() on what self.optimizers() returns."
            )

    def remove(self) -> None:
        self._hook.remove()
