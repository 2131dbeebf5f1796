"""The protocol of offload engines, which make the states that live in host memory and the rule that steps them.

[Note: Engines] An engine is a folder beside this file, a class in it that satisfies `OffloadEngine`, and one line in
`ENGINES` of config/offload.py. The rest of the package does not look at an engine's name; it calls the engine.
Optimizers that step through their own code get the "cpu" engine's states whatever was chosen, because their code is
synchronous.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch.optim import Optimizer

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.config import OffloadConfig, ZeroConfig
from lightning_superscale.config.offload import ENGINES
from lightning_superscale.layout.memory import MemoryModel
from lightning_superscale.offload.link.arena import HostArena
from lightning_superscale.offload.link.dtype import LinkDtype
from lightning_superscale.offload.link.link import Link
from lightning_superscale.offload.memory import ParamKind
from lightning_superscale.offload.planner.choices import HostWork, step_times
from lightning_superscale.offload.planner.forecast import HostSchedule, StepTimes
from lightning_superscale.offload.planner.profile import HardwareProfile
from lightning_superscale.offload.weight_flow.weights import FlowingWeights, StreamedUnit
from lightning_superscale.ops.cpu.pool import Pool
from lightning_superscale.ops.state_dtypes import FP32_STATES, StateDtypes
from lightning_superscale.ops.update import UpdatePath
from lightning_superscale.optim.adamw_step import AdamWRule
from lightning_superscale.optim.step_rule import RuleState, StepGuard, StepRule
from lightning_superscale.optim.unit import ShardUnit
from lightning_superscale.optim.unit_state import UnitState
from lightning_superscale.timeline import UNTIMED, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadContext:
    """The parts of a run that its offload engine makes states and rules from.

    Attributes:
        config: the user's settings.
        link: the device's link.
        arena: allocates host buffers.
        pool: threads of the host's kernels.
        update, device_update: the kernels that step on the host and on the device.
        ranks: collectives with the other ranks.
        dtypes: of masters and moments.
        link_dtype: dtype of gradients and new weights on the link; "weights" where weights flow or any state is not
            fp32.
        streams: whether gradients leave during backward rather than at the step.
        profile: the measured speeds of this rank's hardware; None without any.
        timeline: the record of steps.
    """

    config: OffloadConfig
    link: Link
    arena: HostArena
    pool: Pool
    update: UpdatePath
    device_update: UpdatePath
    ranks: Communicator
    dtypes: StateDtypes = FP32_STATES
    link_dtype: LinkDtype = "weights"
    streams: bool = False
    profile: HardwareProfile | None = None
    timeline: Timeline = UNTIMED

    @property
    def is_pinned(self) -> bool:
        """Whether host buffers that a transfer reads or writes are page-locked."""
        return self.config.pin_memory and self.link.needs_pinned_host()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The facts of a run that an engine may have to refuse, known before any work starts.

    Attributes:
        fqns: names of all parameters.
        dtypes: of masters and moments.
        world_size: number of all ranks.
    """

    config: OffloadConfig
    zero: ZeroConfig
    optimizers: Sequence[Optimizer]
    fqns: Sequence[str]
    dtypes: StateDtypes
    world_size: int


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """The part of a checkpoint that only the engine which wrote it can go on from, where a run has another.

    Attributes:
        keys: the states of parameters that only that engine's rule reads.
        weights_lag: whether masters have updates that weights lack, so that weights have to follow them.
        dropped: what is lost without it, and what to do; None where nothing is.
    """

    keys: frozenset[str]
    weights_lag: bool
    dropped: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """The parts of one optimizer's steps on this rank, for its engine to forecast them.

    Attributes:
        config: the user's settings.
        profile: the measured speeds of this rank's hardware.
        work: the host's in a step that steps all of its parameters.
        forward, backward: seconds of the model without offloading.
        states: the units' that are on the host.
        rule: the rule that steps these, which `make_step` made.
        streams: whether gradients leave during backward rather than at the step.
        weights_awaited: whether new weights are awaited right after the step.
    """

    config: OffloadConfig
    profile: HardwareProfile
    work: HostWork
    forward: float
    backward: float
    states: Sequence[UnitState]
    rule: StepRule
    streams: bool
    weights_awaited: bool

    def times(self) -> StepTimes:
        """Seconds of a step that steps all parameters of the host."""
        return step_times(self.profile, self.work, forward=self.forward, backward=self.backward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What steps should take by the hardware profile, in seconds per step.

    Attributes:
        host, d2h, h2d: of the host's work, of gradients on their way to it, and of weights on their way back, each by
            itself.
        exposed: by which a step is longer than forward and backward; None where nothing is forecast.
        why_not: the reason why nothing is; None where it is.
    """

    host: float
    d2h: float
    h2d: float
    exposed: float | None = None
    why_not: str | None = None


class HostUnitState(UnitState, Protocol):
    """States of one unit in host memory.

    Attributes:
        flowing: the unit's weights, if they stream from host memory; None if they stay on the device.
    """

    @property
    def flowing(self) -> FlowingWeights | None: ...


class OffloadEngine(Protocol):
    """One way of stepping Adam and AdamW in host memory.

    Attributes:
        weights_arrive: when the uploads of new weights begin: all "at step", or some during the "next forward", whose
            modules then wait for their own.
        equals_adamw: whether its steps are AdamW's, bit for bit.
        why_no_flow: the reason why weights can't flow from host memory with these states; None where they can.
    """

    @property
    def weights_arrive(self) -> Literal["at step", "next forward"]: ...
    @property
    def equals_adamw(self) -> bool: ...
    @property
    def why_no_flow(self) -> str | None: ...

    def refuse(self, facts: RunFacts) -> None:
        """Refuse combinations that can't work. Each rank calls it for itself; the caller raises errors on all ranks.

        Raises:
            SuperScaleError: names the option and what to do.
        """

    def memory(self, kind: ParamKind) -> MemoryModel:
        """Bytes that the states of such parameters take; see [Note: One memory model] in layout/memory.py."""

    def device_bytes(self, kind: ParamKind) -> float:
        """Bytes per element of such parameters that the device moves in a step, besides forward, backward and link."""

    def make_state(
        self, unit: ShardUnit, context: OffloadContext, *, has_moments: bool, streamed: StreamedUnit | None
    ) -> HostUnitState:
        """Make the states of a unit, in host memory.

        Args:
            has_moments: False for an optimizer that keeps states of its own.
            streamed: the same unit, if its weights flow.
        """

    def make_step(self, optimizer: Optimizer, guard: StepGuard, context: OffloadContext) -> AdamWRule:
        """Make the rule that steps Adam or AdamW on these states."""

    def how_it_steps(self, config: OffloadConfig, *, streams: bool) -> str:
        """A sentence for `explain()`: when the host steps, and which work of the device hides that."""

    def left_behind(self, saved: RuleState) -> LeftBehind | None:
        """The part of a checkpoint of this engine that another one leaves behind; None where there is none.

        Args:
            saved: the state that this engine's rule kept for itself, with the engine's name before each entry's own.
        """

    def predict_exposed(self, times: StepTimes, config: OffloadConfig) -> float:
        """Seconds by which a step is longer than forward and backward, before there is a run.

        Args:
            times: of a step that steps all parameters of the host.
        """

    def predict_work(self, times: StepTimes, config: OffloadConfig) -> float:
        """Seconds by which a step is longer where device, link and host are the same cores, so that nothing hides.

        Args:
            times: of a step that steps all parameters of the host.
        """

    def host_schedule(self, times: StepTimes, config: OffloadConfig) -> HostSchedule | None:
        """When the host works in steps as `predict_exposed` takes them; None where no `HostSchedule` says it."""

    def forecast(self, parts: StepParts) -> Forecast:
        """What the steps of an optimizer should take. Any rank may ask by itself; the parts are its own."""


def engine_of(name: str) -> OffloadEngine:
    """The engine of this name in `ENGINES`, which a config has checked."""
    module, _, class_name = ENGINES[name].partition(":")
    return cast(OffloadEngine, getattr(importlib.import_module(module), class_name)())


def left_behind_by(saved: RuleState, own: str | None) -> dict[str, LeftBehind]:
    """By engine, the part of a checkpoint that a run without that engine leaves behind.

    Args:
        saved: the state that a rule kept for itself, as "engine.entry".
        own: the engine that steps now; None where no state is on the host.
    """
    writers = {name.partition(".")[0] for name in saved} & ENGINES.keys() - {own}
    found = {writer: engine_of(writer).left_behind(saved) for writer in sorted(writers)}
    return {writer: left for writer, left in found.items() if left is not None}
