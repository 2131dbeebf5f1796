"""Assembles one run from its resolved settings: engines, their transports and states, and gates in forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.comm.agreement import check_equal_on_all_ranks, raise_together
from lightning_superscale.comm.communicator import Communicator, ranks_of
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.engine import OffloadContext, RunFacts, engine_of
from lightning_superscale.offload.link.arena import HostArena
from lightning_superscale.offload.link.link import Link, link_for
from lightning_superscale.ops.update import UpdatePath, update_path
from lightning_superscale.optim.adamw_step import AdamWStep
from lightning_superscale.optim.bucketing import Grouping
from lightning_superscale.optim.clipping import ClipRequest, norm_of_scaled
from lightning_superscale.optim.engine import MakeState, OptimizerEngine
from lightning_superscale.optim.grad_dtypes import narrow_gradients, widen_gradients
from lightning_superscale.optim.mixed_step import MixedStep
from lightning_superscale.optim.step_rule import StepGuard, StepRule
from lightning_superscale.optim.transport import Transport
from lightning_superscale.optim.unit import DeltaSink, ShardUnit
from lightning_superscale.optim.unit_state import ResidentState, UnitState
from lightning_superscale.run.checks import (
    check_optimizers_over_ranks,
    check_parameters,
    check_trainable,
    check_verify,
    check_wrap,
    facts_of_run,
)
from lightning_superscale.run.host_plan import HostPlan, plan_host
from lightning_superscale.run.interrupts import StepInterrupts
from lightning_superscale.run.loss_scaler import LossScaler
from lightning_superscale.run.memory import host_bytes_needed
from lightning_superscale.run.placement import adapt_after_first_step, first_grouping
from lightning_superscale.run.precision import check_with_run
from lightning_superscale.run.report.memory import byte_classes
from lightning_superscale.run.report.plan import ParallelPlan
from lightning_superscale.run.report.reasons import reasons_of, reasons_of_rules, where_states_are
from lightning_superscale.run.settings import RunSettings
from lightning_superscale.run.weight_flow import compiled_flow, stream_the_rest
from lightning_superscale.torch_private import is_compiled
from lightning_superscale.zero.buckets.all_gather import Gathers, gathers_for
from lightning_superscale.zero.buckets.transport import BucketTransport, SharedParts
from lightning_superscale.zero.buckets.unit import BucketUnit
from lightning_superscale.zero.forward_gates import PublishGates
from lightning_superscale.zero.fsdp2.module import ShardedModule
from lightning_superscale.zero.fsdp2.shard import ShardingPolicy, shard_module
from lightning_superscale.zero.fsdp2.transport import Fsdp2Transport
from lightning_superscale.zero.manual_averages import ManualAverages
from lightning_superscale.zero.replicated import broadcast_from_first
from lightning_superscale.zero.tensor_parallel import check_placements


@dataclass(slots=True)
class Assembly:
    """The running parts of one `fit()`.

    Attributes:
        engines: one per optimizer, in the order of `configure_optimizers`.
        gates: waits in forward for weights that arrive after the step; empty where none do.
        link: copies between the device and its host; None when nothing is.
        host: the plan of this rank's host: unit size, threads and link dtype.
        update: the kernels that step the optimizers where their states are.
        sharded: the module under FSDP2, when its weights are sharded (stage 3 over several ranks).
        averages: averages gradients after each manual backward; None where that is not done, or transports do it.
        reasons: one sentence per choice that was made for the user while the run was assembled.
        interrupts: puts Ctrl-C off to the ends of steps.
        is_abandoned: whether the run was interrupted.
    """

    module: nn.Module
    settings: RunSettings
    engines: dict[Optimizer, OptimizerEngine]
    gates: list[PublishGates]
    link: Link | None
    host: HostPlan
    update: UpdatePath
    ranks: Communicator
    sharded: ShardedModule | None
    averages: ManualAverages | None
    reasons: list[str] = field(default_factory=list)
    interrupts: StepInterrupts = field(default_factory=StepInterrupts)
    is_abandoned: bool = False
    _has_adapted: bool = False
    _old_gates_seconds: float = 0.0
    _is_forward_compiled: bool = False

    @property
    def mesh(self) -> DataMesh:
        return self.settings.mesh

    @property
    def waited_seconds(self) -> float:
        """Seconds that weights under way have kept the host inside forward so far."""
        return self._old_gates_seconds + sum(gates.waited_seconds for gates in self.gates)

    def check_trainable(self) -> None:
        """Refuse a backward that can make no gradient for any optimizer; see `checks.check_trainable`."""
        if not any(engine.states for engine in self.engines.values()):  # all parameters were frozen so far
            check_trainable(self.module, list(self.engines))

    def adapt_after_first_step(self) -> None:
        """Adapt units and the place of states to the first step, once. Every rank calls it before a later forward."""
        offload = self.settings.offload
        if self._has_adapted or offload is None:
            return
        self._has_adapted = True
        if adapt_after_first_step(
            self.engines.values(), self.mesh, offload, self.settings.device, self.settings.precision.states
        ):
            self._gate_anew()

    def compile_forward(self) -> None:
        """Take it that forward is compiled, although the module is not a product of `torch.compile`.

        Raises:
            SuperScaleError: weights that flow, or options for long sequences, which no graph can have.
        """
        if self._is_forward_compiled or self.settings.is_compiled:
            return
        name, settings = type(self.module).__name__, self.settings
        if settings.flow is not None:
            raise compiled_flow(name)
        if settings.sequence is not None:
            raise SuperScaleError(
                f"SequenceConfig acts on the operations of {name}, and it turned out to be compiled only when it was "
                "called. Set it up without torch.compile, or compile its parts: module.block.compile()."
            )
        self._is_forward_compiled = True
        self._gate_anew()
        self.reasons = reasons_of(settings, is_model_compiled=True)

    def _gate_anew(self) -> None:
        """Make gates for the units, and for what is compiled, as they are now."""
        self._old_gates_seconds = self.waited_seconds
        for gates in self.gates:
            gates.close()
        compiled = self._is_forward_compiled or self.settings.is_compiled or is_compiled(self.module)
        self.gates = _gates(self.module, self.engines.values(), self.settings, is_model_compiled=compiled)

    def step(self, engine: OptimizerEngine, scaler: LossScaler | None) -> None:
        """Step one optimizer with its gradients, and let the loss scaler follow. Every rank calls it."""
        with self.interrupts.step():
            has_stepped = engine.step()
            if scaler is not None:
                scaler.update(has_overflowed=not has_stepped)

    def own_step(self, engine: OptimizerEngine, closure: Callable[[], Any]) -> Any:
        """Let an optimizer step by its own code, which evaluates the loss itself."""

        def evaluate() -> Any:
            result = closure()
            engine.is_torn = True  # from here on the optimizer may change weights
            return result

        step = engine.passthrough_step if engine.is_passthrough else engine.closure_step
        with self.interrupts.step_after(evaluate) as interruptible:
            return step(interruptible)

    def check_whole(self) -> None:
        """Refuse to give weights or states to save that are of no whole step.

        Raises:
            SuperScaleError: an error ended the last step in its middle.
        """
        units = (unit for engine in self.engines.values() for unit in engine.transport.units)
        if any(engine.is_torn for engine in self.engines.values()) or any(unit.store.is_lost for unit in units):
            raise SuperScaleError(
                "an error ended the last optimizer step in its middle, so that some weights and optimizer states are "
                "those before the step and some those after. Nothing is saved. Resume from an earlier checkpoint."
            )

    def enter_step(self) -> None:
        """Wait for new weights that no module's gate waits for.

        Every rank calls it before a training step's forward, once techniques are ready for it.
        """
        self.interrupts.open()
        self.interrupts.counted()
        for gates in self.gates:
            gates.enter_step()

    def before_evaluation(self) -> None:
        """Apply gradients that engines have kept back. Every rank calls it between steps, before an evaluation."""
        self.interrupts.counted()
        for engine in self.engines.values():
            engine.before_evaluation()

    def catch_up(self) -> None:
        """Apply gradients that engines have kept back, after the last step. Every rank calls it."""
        with self.interrupts.step():
            for engine in self.engines.values():
                engine.catch_up()
        self.interrupts.counted()

    def after_backward(self) -> None:
        """Average gradients that stay in `param.grad` over ranks.

        Every rank calls it after a step's last backward, and after each backward that user code runs by itself.
        """
        if self.averages is not None:
            self.averages.after_backward()
        elif self.settings.visibility.why_gradients_stay is not None:
            for engine in self.engines.values():
                engine.transport.average_grads()

    def clip(self, engine: OptimizerEngine, request: ClipRequest) -> None:
        """Clip an optimizer's gradients: at once where user code looks at them, otherwise inside of its next step."""
        if self.settings.clips_in_place:
            self.clip_in_place(engine, request)
        else:
            engine.request_clip(request)

    def clip_in_place(
        self, engine: OptimizerEngine, request: ClipRequest, *, keeps_nonfinite: bool = False
    ) -> Tensor | None:
        """Clip gradients that lie in `param.grad`, averages over ranks by then. Every rank calls it."""
        if not self.settings.visibility.is_automatic:  # a backward that is not the framework's may have added to them
            self.after_backward()
        return engine.clip_in_place(request, keeps_nonfinite=keeps_nonfinite)

    def clip_scaled(self, engine: OptimizerEngine, request: ClipRequest, loss_scale: float) -> Tensor:
        """Let the next step clip gradients that are scaled until then; gives their norm now. Every rank calls it."""
        self.after_backward()
        engine.request_clip(request)
        return norm_of_scaled(engine.params(), loss_scale)

    def wait_all_published(self) -> None:
        """Wait until work that is queued from now on sees all new weights. Every rank calls it."""
        for engine in self.engines.values():
            engine.transport.wait_all_published()

    def quiesce(self) -> None:
        """Wait until nothing of the steps so far runs in the background, and raise its errors. Every rank calls it."""
        for engine in self.engines.values():
            engine.quiesce()

    def abandon(self) -> None:
        """Drop a step that was interrupted, here or on another rank, without waiting for any rank."""
        self.is_abandoned = True
        self.settings.techniques.rest(is_visible=False)
        for engine in self.engines.values():
            engine.abandon()
        if self.sharded is not None:
            self.sharded.abandon()

    def close(self) -> None:
        """End engines and techniques, and give back the module and the interrupt's handler.

        Parameters have storage of their own again, and no hooks.
        """
        with ExitStack() as rest:  # all of it, also where the end of an engine's work fails
            if self.settings.precision.gradients.accumulation is not None:
                rest.callback(narrow_gradients, self.module.parameters())
            rest.callback(self.settings.techniques.close)
            for engine in reversed(self.engines.values()):
                rest.callback(engine.close)
            rest.callback(self.settings.techniques.rest, is_visible=False)
            for gates in reversed(self.gates):
                rest.callback(gates.close)
            self.interrupts.close()

    def plan(self) -> ParallelPlan:
        """The resolved plan of this rank as it is now. Any rank may ask by itself."""
        units = [unit for engine in self.engines.values() for unit in engine.transport.units]
        params = list(self.module.parameters())
        own = sorted({e.why_not_native for e in self.engines.values() if e.why_not_native is not None})
        settings = self.settings
        return ParallelPlan(
            device=str(settings.device),
            world_size=self.mesh.world.size,
            shard_size=self.mesh.shard.size,
            tensor_size=self.mesh.tensor.size,
            sequence_size=self.mesh.sequence.size,
            zero_stage=settings.zero.stage,
            engine="resident" if settings.offload is None else settings.offload.engine,
            precision=settings.precision.describe(),
            num_params=sum(p.numel() for p in params),
            num_trainable=sum(p.numel() for p in params if p.requires_grad),
            num_units=len(units),
            unit_bytes=self.host.unit_bytes,
            cpu_threads=self.update.num_threads,
            kernel="its own code" if own else self.update.name,
            bytes=[
                *byte_classes(self.module, self.engines.values(), settings, self.host.link_dtype),
                *(row for technique in settings.techniques.values() for row in technique.bytes()),
            ],
            reasons=[
                *self.reasons,
                *(reason for technique in settings.techniques.values() for reason in technique.reasons()),
                *self.host.reasons,
                *where_states_are(self.engines.values(), settings, has_adapted=self._has_adapted),
                *reasons_of_rules(self.engines.values()),
                *(f"the optimizer steps through its own code: {reason}" for reason in own),
            ],
        )


def assemble(module: nn.Module, optimizers: Sequence[Optimizer], settings: RunSettings) -> Assembly:
    """Build the engines of one run on this rank. Every rank calls it.

    Raises:
        SuperScaleError: nothing to train, an optimizer over foreign or shared parameters, parameters
            of a dtype that no engine steps, too little host memory, or ranks that build different
            things; on every rank, before anything is changed.
    """
    mesh, offload = settings.mesh, settings.offload
    _check_on_all_ranks(module, optimizers, settings)
    host = plan_host(optimizers, settings, functools.partial(host_bytes_needed, module, optimizers, settings))
    sharded = _sharded(module, optimizers, settings)
    precision = settings.precision
    if precision.gradients.accumulation is not None:  # frozen weights too, since they may be unfrozen later
        widened = (param for param in module.parameters() if param.dtype == precision.weights)
        widen_gradients(widened, precision.gradients.accumulation)
    fqn_of = {param: fqn for fqn, param in module.named_parameters()}
    link = _link_of(settings)
    update = _update_of(settings, host)
    ranks = ranks_of(mesh, fqn_of, num_buffers=len(list(module.buffers())))
    context = None if link is None else _offload_context(settings, host, update, link, ranks)
    block_of = {} if settings.flow is None else settings.flow.block_of
    is_each_averaged = not (settings.visibility.is_automatic or mesh.is_single or sharded)
    averages = ManualAverages(ranks) if is_each_averaged else None
    make_gathers = functools.cache(functools.partial(gathers_for, ranks, are_late=settings.flow is not None))
    engines = {
        optimizer: OptimizerEngine(
            optimizer,
            fqn_of=fqn_of,
            ranks=ranks,
            make_transport=_transport_maker(
                ranks,
                settings,
                sharded,
                first_grouping(optimizer, fqn_of, offload, host.unit_bytes, block_of),
                f"optimizer {number}",
                averages,
                make_gathers,
            ),
            make_state=_state_maker(settings, context),
            make_native=_native_maker(settings, update, context),
            error_if_nonfinite=settings.error_if_nonfinite,
            timeline=settings.timeline,
        )
        for number, optimizer in enumerate(optimizers)
        if any(param in fqn_of for group in optimizer.param_groups for param in group["params"])
    }
    if settings.flow is not None and context is not None:
        stream_the_rest(settings.flow, context.link, settings.device, context.arena, is_pinned=context.is_pinned)
    for engine in engines.values():
        if settings.streams:
            engine.transport.stream()
        elif not settings.visibility.is_automatic:
            engine.transport.watch_edits(settings.is_scaling)
    for technique in settings.techniques.values():
        technique.connect(ranks, link)
    compiled = settings.is_compiled or is_compiled(module)
    gates = _gates(module, engines.values(), settings, is_model_compiled=compiled)
    reasons = reasons_of(settings, is_model_compiled=compiled)
    return Assembly(module, settings, engines, gates, link, host, update, ranks, sharded, averages, reasons)


def _update_of(settings: RunSettings, host: HostPlan) -> UpdatePath:
    """How states step where they are."""
    where = settings.device if settings.offload is None else torch.device("cpu")
    return update_path(where, host.pool, is_low_precision=settings.precision.states.is_low_precision)


def _link_of(settings: RunSettings) -> Link | None:
    """The run's link between the device and its host; None where nothing crosses it."""
    copies = settings.offload is not None or any(technique.uses_link() for technique in settings.techniques.values())
    return link_for(settings.device, settings.timeline) if copies else None


def _offload_context(
    settings: RunSettings, host: HostPlan, update: UpdatePath, link: Link, ranks: Communicator
) -> OffloadContext | None:
    if settings.offload is None:
        return None
    is_low = settings.precision.states.is_low_precision
    return OffloadContext(
        config=settings.offload,
        link=link,
        arena=HostArena(host.pool, settings.device.index or 0),
        pool=host.pool,
        update=update,
        device_update=update_path(settings.device, host.pool, is_low_precision=is_low),
        ranks=ranks,
        dtypes=settings.precision.states,
        link_dtype=host.link_dtype,
        streams=settings.streams,
        profile=host.profile,
        timeline=settings.timeline,
    )


def _sharded(module: nn.Module, optimizers: Sequence[Optimizer], settings: RunSettings) -> ShardedModule | None:
    """Give every rank the same initial weights, and in stage 3 only its rows of them."""
    mesh = settings.mesh
    if not settings.shards_weights:
        broadcast_from_first(mesh, [*module.parameters(), *module.buffers()])
        return None
    if settings.order is None:
        raise AssertionError("stage 3 over several ranks compares their gathers")
    wrap = None if settings.zero.wrap is None else set(settings.zero.wrap)
    return shard_module(module, optimizers, mesh, settings.device, settings.order, ShardingPolicy(wrap=wrap))


def _transport_maker(
    ranks: Communicator,
    settings: RunSettings,
    sharded: ShardedModule | None,
    grouping: Grouping,
    label: str,
    averages: ManualAverages | None,
    make_gathers: Callable[[], Gathers],
) -> Callable[[DeltaSink], Transport]:
    if sharded is not None:
        return lambda sink: Fsdp2Transport(
            sharded,
            sink=sink,
            ranks=ranks,
            grouping=grouping,
            label=label,
            no_sync=settings.zero.reduces_once,
            dtypes=settings.precision.gradients,
        )

    def buckets(sink: DeltaSink) -> BucketTransport:
        transport = BucketTransport(
            [],
            grouping=grouping,
            sink=sink,
            ranks=ranks,
            label=label,
            no_sync=settings.zero.reduces_once,
            dtypes=settings.precision.gradients,
            streams_to=settings.device,
            shared=SharedParts(gathers=make_gathers()),
        )
        if averages is not None:
            transport.average_with(averages)
        return transport

    return buckets


def _gates(
    module: nn.Module, engines: Iterable[OptimizerEngine], settings: RunSettings, *, is_model_compiled: bool
) -> list[PublishGates]:
    """Gates in forward for weights that arrive after the step, from the host or from other ranks."""
    offload, mesh = settings.offload, settings.mesh
    if settings.shards_weights or (offload is None and mesh.is_single):
        return []  # sharded weights are awaited where they are gathered
    engine = settings.engine
    may_be_late = mesh.shard.size > 1 or (engine is not None and engine.weights_arrive == "next forward")
    per_module = may_be_late and not is_model_compiled
    waits = settings.timeline.waits
    return [PublishGates(module, engine.transport, per_module=per_module, waits=waits) for engine in engines]


def _check_on_all_ranks(module: nn.Module, optimizers: Sequence[Optimizer], settings: RunSettings) -> None:
    fqn_of = {param: fqn for fqn, param in module.named_parameters()}
    mesh, zero, offload = settings.mesh, settings.zero, settings.offload
    error: SuperScaleError | None = None
    try:
        check_parameters(module, optimizers, fqn_of, settings.why_one_optimizer)
        check_wrap(module, zero)
        check_verify(settings.sequence, is_automatic=settings.visibility.is_automatic)
        check_placements(module, mesh)
        check_optimizers_over_ranks(optimizers, zero, mesh.world.size)
        check_with_run(settings.precision, optimizers, zero, offload, mesh.world.size)
        if settings.engine is not None and offload is not None:
            settings.engine.refuse(
                RunFacts(
                    config=offload,
                    zero=zero,
                    optimizers=optimizers,
                    fqns=list(fqn_of.values()),
                    dtypes=settings.precision.states,
                    world_size=mesh.world.size,
                )
            )
    except SuperScaleError as found:
        error = found  # the other ranks are on their way into the comparison
    raise_together(mesh, error)
    precision, sequence = settings.precision.describe(), settings.sequence
    check_equal_on_all_ranks(mesh, facts_of_run(module, optimizers, zero, offload, precision, sequence))


def _native_maker(
    settings: RunSettings, update: UpdatePath, context: OffloadContext | None
) -> Callable[[Optimizer, StepGuard], StepRule]:
    def on_device(optimizer: Optimizer, guard: StepGuard, path: UpdatePath) -> AdamWStep:
        return AdamWStep(
            optimizer,
            guard,
            path.submit,
            timeline=settings.timeline,
            lane="device optimizer",
            scales_on_device=path.scales_on_device,
        )

    engine = settings.engine
    if engine is None or context is None:
        return lambda optimizer, guard: on_device(optimizer, guard, update)

    def split(optimizer: Optimizer, guard: StepGuard) -> StepRule:
        device = on_device(optimizer, guard, context.device_update)
        return MixedStep(optimizer, guard, host=engine.make_step(optimizer, guard, context), device=device)

    return split


def _state_maker(settings: RunSettings, context: OffloadContext | None) -> MakeState:
    flow, engine = settings.flow, settings.engine

    def make_state(unit: ShardUnit, *, has_moments: bool, is_on_device: bool) -> UnitState:
        if engine is None or context is None or is_on_device:
            return ResidentState(unit, has_moments=has_moments, dtypes=settings.precision.states)
        streamed = unit if isinstance(unit, BucketUnit) and unit.is_streamed else None
        # See [Note: Engines]: an optimizer that keeps states of its own steps through its own code.
        maker = engine if has_moments else engine_of("cpu")
        state = maker.make_state(unit, context, has_moments=has_moments, streamed=streamed)
        if flow is not None and streamed is not None and state.flowing is not None:
            streamed.keep_in(state.flowing)
            flow.add(state.flowing)
        return state

    return make_state
