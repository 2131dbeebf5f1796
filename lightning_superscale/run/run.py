"""The facade of the engine room: the methods that a framework's adapter calls, from the first rank to the last step.

[Note: Order of a run] Some things must happen in one order on every rank, and some before user code looks. The order
is kept here, so that no adapter has to know it:

- new weights arrive, or the error of what makes them (`_wait_for_weights`), then techniques rest, then weights are
  read or written;
- techniques get ready for a forward, then gates wait for the weights that no later gate waits for;
- where user code may read weights right after a step, the step ends only when new weights are there;
- a failure is told to the other ranks before this one stops waiting for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.config import OffloadConfig, SequenceConfig, ZeroConfig
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.forks import Origin
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.optim.clipping import ClipRequest
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.run.assemble import Assembly, assemble
from lightning_superscale.run.environment import RankEnvironment
from lightning_superscale.run.full_params import full_params
from lightning_superscale.run.interrupts import mark_whole
from lightning_superscale.run.loss_scaler import LossScaler
from lightning_superscale.run.precision import PrecisionChoices
from lightning_superscale.run.report.exposure import exposure_of
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.plan import ParallelPlan
from lightning_superscale.run.report.recorder import StepRecorder
from lightning_superscale.run.report.run_report import RunReport, facts_of_trace, plan_of
from lightning_superscale.run.settings import RunSettings, shards_weights
from lightning_superscale.run.state.module_state import load_module_state, module_state
from lightning_superscale.run.state.optimizer_states import load_optimizer_states, names_of
from lightning_superscale.run.techniques.collection import Techniques
from lightning_superscale.run.techniques.technique import TechniqueFacts
from lightning_superscale.run.visibility import Visibility
from lightning_superscale.run.weight_flow import flow_alone, least_free_bytes, place_resident
from lightning_superscale.timeline import Lane
from lightning_superscale.torch_private import is_compiled
from lightning_superscale.zero.fsdp2.user_errors import check_backward_inputs, explain
from lightning_superscale.zero.meta_init import is_on_meta, materialise_all
from lightning_superscale.zero.replicated import broadcast_from_first


class Run:
    """Training or evaluation of one module on this rank; `prepare` begins the next one.

    Every rank calls each method at the same place, unless it says otherwise.

    Args:
        zero: what is sharded over ranks.
        offload: where the optimizer lives; None for the device.
        sequence: how ranks share the sequences of a batch; None where each has samples of its own.

    Attributes:
        environment: the other ranks; kept between runs.
        assembly: the running parts, or None while nothing is trained.
        phases: how the host's time divides over the steps of training.
        was_on_meta: whether any part of the module was on the meta device when the run was prepared.
    """

    def __init__(self, zero: ZeroConfig, offload: OffloadConfig | None, sequence: SequenceConfig | None = None) -> None:
        self.zero, self.offload, self.sequence = zero, offload, sequence
        self.environment = RankEnvironment()
        self.assembly: Assembly | None = None
        self.phases = PhaseSeconds()
        self._finished: Assembly | None = None
        self._report: RunReport | None = None
        self._recorder: StepRecorder | None = None
        self._device = torch.device("cpu")
        self._techniques = Techniques()
        self._technique_states: dict[str, dict[str, Any]] = {}
        self._visibility = Visibility()
        self._scaler: LossScaler | None = None
        self._precision_name = ""
        self._origin = Origin(is_bound=False)
        self.was_on_meta = self._is_compiled = self._is_accumulating = self._is_in_backward = False

    # Setting up

    def prepare(self, module: nn.Module, device: torch.device, *, trains: bool, is_compiled_whole: bool) -> None:
        """End the run before, let techniques see the module, and give it its initial weights on the device.

        Args:
            is_compiled_whole: the framework knows that the module is a product of `torch.compile`, where torch can't
                tell it from the module.
        """
        self.close()
        self._origin = Origin()
        self._finished = None
        if trains:
            self._report = None
        self._device = device
        self.was_on_meta = is_on_meta(module)
        self._is_compiled = is_compiled_whole
        facts = TechniqueFacts(
            zero=self.zero,
            offload=self.offload,
            sequence=self.sequence,
            mesh=self.environment.mesh,
            device=device,
            trains=trains,
            is_compiled=is_compiled_whole or is_compiled(module),
            is_compiled_whole=is_compiled_whole,
            shards_weights=trains and shards_weights(self.zero, self.environment.mesh),
            free_bytes=least_free_bytes(self.environment.mesh, module, device),
        )
        self._techniques, self._technique_states = Techniques.of(facts), {}
        self._techniques.prepare(module)
        if not facts.shards_weights:  # otherwise the whole model is never on one device
            materialise_all(module, device)
            self.to_device(module)

    def to_device(self, module: nn.Module) -> None:
        """Move a module to the device, but for what techniques keep in host memory."""
        place_resident(module, self._techniques.off_device(), self._device)

    def start_training(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        precision: PrecisionChoices,
        scaler: LossScaler | None,
        visibility: Visibility,
        rank: int,
        error_if_nonfinite: bool = False,
    ) -> None:
        """Build the engines of the module's optimizers.

        Args:
            scaler: scales losses; None where no loss is scaled.
            visibility: the gradients and weights that user code may look at between passes.
            rank: number of this process in the world, for the names of files.
            error_if_nonfinite: raise before weights or states change when a gradient is NaN or infinite.

        Raises:
            SuperScaleError: a module or optimizers that can't be trained; on every rank, before anything is changed.
        """
        self._recorder = StepRecorder.from_environment(self._device, rank)
        self._visibility = visibility
        self._scaler = scaler
        self._precision_name = precision.name
        settings = RunSettings(
            mesh=self.environment.mesh,
            device=self._device,
            zero=self.zero,
            offload=self.offload,
            precision=precision,
            error_if_nonfinite=error_if_nonfinite,
            visibility=visibility,
            order=self.environment.order,
            sequence=self.sequence,
            techniques=self._techniques,
            is_compiled=self._is_compiled,
            is_scaling=None if scaler is None else lambda: self._is_in_backward,
            timeline=self._recorder.timeline,
        )
        self.assembly = assemble(module, optimizers, settings)
        self.environment.name_weights(module.named_parameters)
        self.phases = PhaseSeconds()
        self.announce_loss_scale()

    def start_evaluation(self, module: nn.Module) -> None:
        """Give every rank rank 0's weights and buffers of a module that nothing trains."""
        broadcast_from_first(self.environment.mesh, [*module.parameters(), *module.buffers()])
        if self.flow is not None and self.offload is not None:
            flow_alone(self.flow, self._device, is_pinned=self.offload.pin_memory)

    @property
    def flow(self) -> WeightFlow | None:
        """The schedule that brings weights from the host when they are used; None when they stay on the device."""
        return self._techniques.flow

    # A training step

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A context around the user's training step, which may run backward and step by itself.

        Raises:
            SuperScaleError: in place of torch's error, where the step met a shard that it took for a parameter.
        """
        self._origin.check("a training step")
        num_steps, entered = self.phases.num_steps, perf_counter()
        with ExitStack() as stack:
            if self._recorder is not None:
                stack.enter_context(self.phases.stalls(self._recorder.timeline))
                self._recorder.before_forward(num_steps, lambda: [engine.rule.cycle for engine in self._engines()])
            if self.assembly is not None and num_steps:
                self.assembly.adapt_after_first_step()
            stack.enter_context(self._techniques.around_forward(trains=True))
            if self.assembly is not None:
                self.assembly.enter_step()
            start = perf_counter()
            self.phases.before += start - entered
            try:
                with self._recorded("forward"), _gradients_stay(self.assembly):
                    yield
            finally:
                self.phases.forward += perf_counter() - start
                if self.assembly is not None:
                    self.phases.gates = self.assembly.waited_seconds
                if self._recorder is not None:
                    self._recorder.after_forward(num_steps, self._facts)

    def batch(self, batch: Any, *, trains: bool) -> Any:
        """The part of the data loader's batch, on the device, that this rank's step gets."""
        return self._techniques.batch(batch, trains=trains)

    def output(self, output: Any, *, trains: bool) -> Any:
        """What the caller of the module's step gets for its output, asked for within `forward` or `evaluating`."""
        return self._techniques.output(output, trains=trains)

    @contextmanager
    def backward(self, inputs: Tensor | Sequence[Tensor] | None = None) -> Iterator[None]:
        """A context around a backward that the framework runs; with a scaler, its gradients are those of a scaled loss.

        Args:
            inputs: the tensors whose gradients are computed; None for all.

        Raises:
            SuperScaleError: a sharded parameter among `inputs`, or no optimizer holds a trainable parameter.
        """
        self._origin.check("a backward")
        check_backward_inputs(inputs)
        if self.assembly is not None:
            self.assembly.check_trainable()
        start, before = perf_counter(), self._is_in_backward
        self._is_in_backward = True
        try:
            with self._recorded("backward"):
                yield
        finally:
            self._is_in_backward = before
            self.phases.backward += perf_counter() - start

    def after_backward(self) -> None:
        """Let techniques rest; unless more micro-batches follow, average gradients that stay in `param.grad`."""
        self._rest(is_visible=self._visibility.shows_weights)
        if self.assembly is not None and not self._is_accumulating:
            self.assembly.after_backward()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """A context for every micro-batch of a step but the last: their gradients add up where they are."""
        before, self._is_accumulating = self._is_accumulating, True
        try:
            with ExitStack() as stack:
                for engine in self._engines():
                    stack.enter_context(engine.transport.blocked())
                yield
        finally:
            self._is_accumulating = before

    def announce_loss_scale(self) -> None:
        """Tell engines that the next backward is of a loss times the scaler's scale, if there is a scaler."""
        if self._scaler is not None:
            for engine in self._engines():
                engine.scale_losses(self._scaler.scale)

    def clip(self, optimizer: Optimizer, request: ClipRequest) -> bool:
        """Clip an optimizer's gradients: at once where user code looks at them, otherwise inside of its next step.

        Returns:
            whether they are clipped. Otherwise the optimizer steps `param.grad` itself, which the caller clips.
        """
        assembly, engine = self.assembly, self._engine_of(optimizer)
        if assembly is None or engine is None or engine.is_passthrough:
            return False
        assembly.clip(engine, request)
        return True

    def step(self, optimizer: Optimizer, closure: Callable[[], Any], **options: Any) -> Any:
        """Run the closure, then step the optimizer.

        Args:
            closure: runs forward, backward and the framework's hooks before a step; its result is returned.
            options: further arguments of `optimizer.step()`, which only an optimizer without an engine takes.

        Raises:
            SuperScaleError: options for an optimizer that has an engine, a scaler with one that evaluates losses, or a
                NaN or infinite gradient with error_if_nonfinite; nothing was changed.
        """
        self._origin.check("a step")
        start, inside = perf_counter(), self.phases.inside
        self._rest(is_visible=False)  # `after_backward` is not called where user code runs backward by itself
        assembly, engine = self.assembly, self._engine_of(optimizer)
        if assembly is None or engine is None:
            result = optimizer.step(closure, **options)
        elif options:
            raise SuperScaleError(
                f"optimizer.step() takes only a closure under this strategy, found {', '.join(map(repr, options))}."
            )
        else:
            with self.phases.stalls(assembly.settings.timeline):
                result = self._step(assembly, engine, closure)
                if assembly.settings.why_weights_awaited is not None:
                    assembly.wait_all_published()
        self.phases.step += perf_counter() - start - (self.phases.inside - inside)
        self.phases.end_step()
        return result

    def end_step(self) -> None:
        """Note that the caller counts the step: no code is left that could fail before. Else nothing may be saved."""
        mark_whole(self._engines())

    def _step(self, assembly: Assembly, engine: OptimizerEngine, closure: Callable[[], Any]) -> Any:
        if engine.is_passthrough or engine.needs_closure:
            if self._scaler is not None:
                raise SuperScaleError(
                    f"{type(engine.optimizer).__name__} evaluates the loss itself, which "
                    f"precision={self._precision_name!r} can't scale. Use 'bf16-mixed' or 'bf16-true'."
                )
            return assembly.own_step(engine, closure)
        try:
            result = closure()
        except BaseException:
            engine.discard_gradients()
            raise
        was_skipped = result is None and self._visibility.is_automatic
        assembly.step(engine, None if was_skipped else self._scaler)
        return result

    # Evaluation, and user code between passes

    def before_evaluation(self) -> None:
        """Get weights and techniques ready for an evaluation, perhaps between two training steps."""
        if self.assembly is not None:
            self.assembly.before_evaluation()
            self._techniques.before_evaluation()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context around a step of the module that trains nothing."""
        self._origin.check("an evaluation")
        self._wait_for_weights()
        with self._techniques.around_forward(trains=False):
            try:
                yield
            finally:
                self._rest(is_visible=True)

    @contextmanager
    def full_params(self, *, writes: bool) -> Iterator[dict[str, Tensor]]:
        """A context that gives every weight whole, by name, between two steps.

        Args:
            writes: take rank 0's tensors, which were edited in place, as the new weights on every rank.

        Raises:
            SuperScaleError: nothing is trained, or a tensor was edited without `writes`.
        """
        self._weights_at_rest(is_visible=True)
        with full_params(self.assembly, writes=writes) as weights:
            yield weights

    def _weights_at_rest(self, *, is_visible: bool) -> None:
        """Wait for new weights, then let techniques rest; `is_visible`: weights must lie where user code looks."""
        self._origin.check("a save or a load")
        self._wait_for_weights()
        self._rest(is_visible=is_visible)

    def _wait_for_weights(self) -> None:
        if self.assembly is not None:
            self.assembly.quiesce()

    def _rest(self, *, is_visible: bool) -> None:
        self._techniques.rest(is_visible=is_visible)

    # State

    def module_state(self, module: nn.Module, *, is_local: bool) -> dict[str, Any]:
        """The module's weights and buffers for a checkpoint; see `module_state` in state/module_state.py."""
        self._weights_at_rest(is_visible=False)  # weights are read where they live
        return module_state(module, self.assembly, self.environment.mesh, is_local=is_local)

    def load_module_state(
        self, module: nn.Module, weights: Mapping[str, Any], *, strict: bool, allow: Sequence[str] | None
    ) -> None:
        """Load weights and buffers into the module; see `load_module_state` in state/module_state.py."""
        self._weights_at_rest(is_visible=True)
        load_module_state(module, self.assembly, weights, strict=strict, allow=allow)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer, *, is_local: bool) -> dict[str, Any] | None:
        """One optimizer's state, also after training where it is sharded; None for an optimizer without an engine.

        Args:
            is_local: this rank's rows, parameters by name, as universal checkpoints take them; otherwise whole, in
                torch's own format.
        """
        assembly = self.assembly or self._finished
        engine = None if assembly is None else assembly.engines.get(optimizer)
        if engine is None:
            return None
        return engine.local_state_dict(names_of(module)) if is_local else engine.state_dict()

    def load_optimizer_states(
        self, module: nn.Module, optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]
    ) -> None:
        """Load a checkpoint's state of each optimizer.

        Raises:
            SuperScaleError: another number of optimizers, or other parameter groups.
        """
        engine = None if self.offload is None else self.offload.engine
        load_optimizer_states(self._engine_of, optimizers, states, names_of(module), engine)

    def technique_states(self) -> dict[str, dict[str, Any]]:
        """States of the techniques that have any, by name; after training as they were at its end."""
        return self._techniques.states() or self._technique_states

    def load_technique_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what `technique_states` gave; see `load_states` in techniques/collection.py."""
        self._techniques.load_states(states)

    def _engine_of(self, optimizer: Optimizer) -> OptimizerEngine | None:
        return None if self.assembly is None else self.assembly.engines.get(optimizer)

    # What users ask

    @property
    def plan(self) -> ParallelPlan:
        """The resolved plan; after training as it was at the end. Any rank may ask.

        Raises:
            SuperScaleError: before training was set up.
        """
        if self.assembly is not None:
            return plan_of(self.assembly, self.phases)
        if self._report is not None:
            return self._report.plan
        raise SuperScaleError("the plan is known once trainer.fit() has set up the model and its optimizers.")

    def exposure(self) -> list[str]:
        """Sentences on how much of a step the host optimizer should leave exposed, and does; none without offload."""
        if self.assembly is not None:
            return exposure_of(self.assembly, self.phases)
        return [] if self._report is None else self._report.exposure

    def grad_norm(self, optimizer_index: int) -> Tensor:
        """Global 2-norm of one optimizer's gradients at its last step, before clipping; fp32 scalar, CPU.

        Raises:
            SuperScaleError: no step has been taken yet.
        """
        if self.assembly is not None:
            return list(self.assembly.engines.values())[optimizer_index].grad_norm()
        if self._report is not None:
            return self._report.grad_norm(optimizer_index, self.environment.mesh)
        raise SuperScaleError("grad_norm() is known after an optimizer step.")

    # The end

    def fail(self, exception: BaseException) -> None:
        """Tell the other ranks of this rank's exception, and wait for none. The rank that failed calls it alone."""
        if not self._origin.is_here:
            return
        self._techniques.note_causes(exception)
        self.environment.report(exception)
        if self.assembly is not None:
            self.assembly.abandon()
        self._rest(is_visible=False)

    def close(self) -> None:
        """Give the module back. Sharded states stay reachable, so that a checkpoint can be saved after training."""
        if not self._origin.is_here:
            return
        if self.assembly is not None:
            self._report = RunReport(self.assembly, self.phases)
        if self._recorder is not None:
            self._recorder.end(self.phases.num_steps, self._facts)
            self._recorder = None
        assembly, self.assembly = self.assembly, None
        techniques, self._techniques = self._techniques, Techniques()
        self._technique_states = techniques.states() or self._technique_states
        if assembly is not None:
            self._finished = assembly if assembly.mesh.num_shares > 1 else None
            assembly.close()
        else:
            techniques.close()

    def _engines(self) -> Sequence[OptimizerEngine]:
        return () if self.assembly is None else tuple(self.assembly.engines.values())

    def _recorded(self, lane: Lane) -> AbstractContextManager[None]:
        return nullcontext() if self._recorder is None else self._recorder.phase(lane, self.phases)

    def _facts(self) -> dict[str, Any]:
        return {} if self.assembly is None else facts_of_trace(self.assembly)


@contextmanager
def _gradients_stay(assembly: Assembly | None) -> Iterator[None]:
    """Keep the gradients of a backward that the user's training step runs by itself in `param.grad`.

    A framework may zero gradients after the training step and before its own backward.
    """
    with ExitStack() as stack:
        for engine in () if assembly is None else assembly.engines.values():
            stack.enter_context(engine.transport.holding())
        try:
            yield
        except RuntimeError as error:
            if assembly is not None and assembly.settings.shards_weights:
                explain(error)
            raise
