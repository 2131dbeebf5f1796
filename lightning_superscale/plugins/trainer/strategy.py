"""The strategy: assembles units, transports, engines and link from the configs. No algorithms here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Union, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superscale.comm.mesh import check_tensor_size
from lightning_superscale.config import CheckpointConfig, OffloadConfig, ZeroConfig, resolve_offload, resolve_zero
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.offload.weight_flow.schedule import WeightFlow
from lightning_superscale.plugins.checkpoint.io import UniversalCheckpointIOMixin, before_step
from lightning_superscale.plugins.trainer.backward import BackwardMixin
from lightning_superscale.plugins.trainer.precision import SuperScalePrecisionMixin
from lightning_superscale.plugins.trainer.run_state import RunStateMixin
from lightning_superscale.plugins.trainer.visibility import why_gradients_are_held, why_weights_are_awaited
from lightning_superscale.run.assemble import Assembly, assemble
from lightning_superscale.run.checks import refuse_averaging
from lightning_superscale.run.environment import DEFAULT_TIMEOUT, RankEnvironment, check_axes
from lightning_superscale.run.precision import PRECISIONS, check_precision
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.reasons import device_share
from lightning_superscale.run.report.recorder import StepRecorder
from lightning_superscale.run.report.run_report import RunReport
from lightning_superscale.run.settings import RunSettings
from lightning_superscale.run.weight_flow import (
    WeightsChoice,
    check_flow,
    choose_weights,
    flow_alone,
    flow_of,
    place_resident,
)
from lightning_superscale.timeline import Lane
from lightning_superscale.zero.grad_schedule import Flag
from lightning_superscale.zero.meta_init import is_on_meta, materialise_all
from lightning_superscale.zero.replicated import broadcast_from_first

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import CheckpointIO, Precision
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class SuperScaleStrategyMixin(BackwardMixin, RunStateMixin, _Base):
    """Data-parallel training with sharded, offloaded or plain optimizer states, exactly as plain AdamW.

    Args:
        zero: what is sharded over ranks: 0 (nothing), 1 (optimizer states), 2 (gradients too), 3 (weights
            too), a ZeroConfig or a mapping with its keys.
        offload: where the optimizer lives: None (on the device), "cpu" or "superoffload" (in host
            memory), an OffloadConfig or a mapping with its keys.
        error_if_nonfinite: raise before weights or states change when a gradient is NaN or infinite,
            naming the parameters.
        checkpoint: write universal checkpoints, as plugins=[UniversalCheckpointIO(...)] does: a CheckpointConfig or a
            mapping with its keys. None: as the Trainer's checkpoint IO does.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin,
            process_group_backend, timeout, start_method: as in Lightning's DDPStrategy.
    """

    precision_class: type[SuperScalePrecisionMixin]
    checkpoint_io_class: type[UniversalCheckpointIOMixin]

    def __init__(
        self,
        zero: Union[int, ZeroConfig] = 0,
        offload: Union[Literal["cpu", "superoffload"], OffloadConfig, None] = None,
        error_if_nonfinite: bool = False,
        checkpoint: Union[CheckpointConfig, None] = None,
        accelerator: Union[Accelerator, None] = None,
        parallel_devices: Union[list[torch.device], None] = None,
        cluster_environment: Union[ClusterEnvironment, None] = None,
        checkpoint_io: Union[CheckpointIO, None] = None,
        precision_plugin: Union[Precision, None] = None,
        process_group_backend: Union[str, None] = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        self.zero_config = resolve_zero(zero)
        self.offload_config = resolve_offload(offload)
        self.error_if_nonfinite = error_if_nonfinite
        if checkpoint is not None:
            if checkpoint_io is not None:
                raise SuperScaleError("pass either checkpoint, which is of UniversalCheckpointIO, or checkpoint_io.")
            checkpoint_io = self.checkpoint_io_class(checkpoint)
        self._assembly: Assembly | None = None
        self._finished: Assembly | None = None
        self._report: RunReport | None = None
        self._flow: WeightFlow | None = None
        self._weights = WeightsChoice(False, "zero=3 shards them over ranks")
        self._environment = RankEnvironment()
        self._awaits_weights = True
        self._shows_weights = True
        self._was_on_meta = False
        self._is_blocked = False
        self._in_backward = Flag()
        self.phase_seconds = PhaseSeconds()
        self._recorder: StepRecorder | None = None
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    # Precision: stock plugins are translated, so that `precision="bf16-true"` just works.

    @property
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else self.precision_class()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is None or isinstance(plugin, self.precision_class):
            self._precision_plugin = plugin
            return
        if type(plugin).__name__ not in ("Precision", "HalfPrecision", "MixedPrecision", "DoublePrecision"):
            raise SuperScaleError(
                f"{type(self).__name__} can't work with the precision plugin {type(plugin).__name__}; "
                f"pass one of {', '.join(map(repr, PRECISIONS))}, or {self.precision_class.__name__}."
            )
        precision = str(plugin.precision)
        check_precision(precision)
        self._precision_plugin = self.precision_class(precision, getattr(plugin, "scaler", None))  # type: ignore[arg-type]

    # Environment

    @property
    def _num_ranks(self) -> int:
        return self.num_nodes * max(1, self.num_processes)

    def _configure_launcher(self) -> None:
        # One process needs no launcher, and without one notebooks work too.
        self._launcher = None
        check_flow(self.zero_config, self.offload_config)
        check_tensor_size(self.zero_config.tensor_parallel, self._num_ranks)
        if self.zero_config.tensor_parallel > 1 and self._start_method != "popen":
            raise SuperScaleError(
                f"start_method={self._start_method!r} brings the module back to the main process, which has no other "
                "ranks to hold its tensor-parallel parts. Use start_method='popen', or torchrun."
            )
        if self._num_ranks > 1:
            check_axes(self.zero_config, self._num_ranks)
            super()._configure_launcher()

    def setup_environment(self) -> None:
        if self.accelerator is None or self.cluster_environment is None:
            raise AssertionError("the Trainer sets accelerator and cluster before it sets up the environment")
        if self._num_ranks > 1:
            super().setup_environment()
            host = self.cluster_environment.main_address
            timeout = self._timeout or DEFAULT_TIMEOUT
            self._environment.open(self.zero_config, host, self.broadcast, timeout, self.root_device.type)
            if self.lightning_module is not None and self._environment.mesh.device_mesh is not None:
                # Lightning's own place for what configure_model() reads as self.device_mesh.
                self.lightning_module._device_mesh = self._environment.mesh.device_mesh
            return
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        # With one rank the sampler must stay the user's: a DistributedSampler would shuffle otherwise.
        module = self.lightning_module
        if module is not None and module._trainer is not None:
            module.trainer._accelerator_connector.use_distributed_sampler = False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of one tensor axis get the same batches."""
        size = self.zero_config.tensor_parallel
        return {"num_replicas": self._num_ranks // size, "rank": self.global_rank // size}

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._num_ranks == 1 else super().reduce_boolean_decision(decision, all)

    # Setup

    def setup(self, trainer: Trainer) -> None:
        if self.accelerator is None or self.lightning_module is None:
            raise AssertionError("the Trainer connects accelerator and module before setup")
        self._release()
        self._finished = None
        if trainer.state.fn == "fit":
            self._report = None
        self.accelerator.setup(trainer)
        model: nn.Module = self.lightning_module
        self._was_on_meta = is_on_meta(model)
        if trainer.state.fn == "fit" and self._layer_sync:
            model = self._layer_sync.apply(model)
        self.model = self.precision_plugin.convert_module(model)
        is_sharded = trainer.state.fn == "fit" and self.zero_config.stage == 3 and self._num_ranks > 1
        if not is_sharded:  # then the whole model is never on one device
            self._place(model)
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            self._assemble(trainer)
        else:
            broadcast_from_first(self._environment.mesh, [*self.model.parameters(), *self.model.buffers()])
            if self._flow is not None and self.offload_config is not None:
                flow_alone(self._flow, self.root_device, is_pinned=self.offload_config.pin_memory)
        self.setup_precision_plugin()

    def _place(self, model: nn.Module) -> None:
        """Give the model its initial weights on the device; those that flow stay in host memory."""
        offload = self.offload_config
        chosen = choose_weights(offload, self.zero_config, model, self.root_device)
        materialise_all(model, torch.device("cpu") if chosen.flow else self.root_device)
        if chosen.flow and offload is not None:
            self._flow = flow_of(model, offload)
        self._weights = chosen
        self.model_to_device()

    def _assemble(self, trainer: Trainer) -> None:
        module = self.lightning_module
        if module is None:
            raise AssertionError("no module to assemble")
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        held = why_gradients_are_held(module, callbacks, len(self.optimizers))
        awaited = why_weights_are_awaited(module, callbacks)
        self._recorder = StepRecorder.from_environment(self.root_device, self.global_rank)
        precision = cast(SuperScalePrecisionMixin, self.precision_plugin)  # its setter takes or makes no other
        settings = RunSettings(
            mesh=self._environment.mesh,
            device=self.root_device,
            zero=self.zero_config,
            offload=self.offload_config,
            precision=precision.choices,
            error_if_nonfinite=self.error_if_nonfinite,
            why_held=held,
            why_awaited=awaited,
            is_automatic=module.automatic_optimization,
            order=self._environment.order,
            weights=self._weights,
            flow=self._flow,
            is_scaling=self._is_scaling,
            timeline=self._recorder.timeline,
        )
        if settings.shards_weights:
            refuse_averaging(callbacks)
        self._assembly = assemble(module, self.optimizers, settings)
        self._awaits_weights = awaited is not None
        self._shows_weights = awaited is not None or held is not None
        self.phase_seconds = PhaseSeconds()
        precision.attach(self.root_device.type, self._assembly.engines)

    def model_to_device(self) -> None:
        if self.model is None:
            raise AssertionError("no model to move")
        if self._flow is None:
            self.model.to(self.root_device)
        else:
            place_resident(self.model, self._flow.block_of, self.root_device)

    # Running

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        num_steps = self.phase_seconds.num_steps
        entered = time.perf_counter()
        if self._recorder is not None:
            self._recorder.before_forward(num_steps)
        if self._assembly is not None:
            if num_steps:
                self._assembly.settle_in()
            self._assembly.enter_step()
        start = time.perf_counter()
        self.phase_seconds.before += start - entered
        try:
            with self._recorded("forward"), self._in_training_step():
                return super().training_step(*args, **kwargs)
        finally:
            self.phase_seconds.forward += time.perf_counter() - start
            if self._assembly is not None:
                self.phase_seconds.gates = self._assembly.waited_seconds
            if self._recorder is not None and self._recorder.timeline.is_open:
                self._recorder.after_forward(num_steps, self._facts())

    def _recorded(self, lane: Lane) -> AbstractContextManager[None]:
        return nullcontext() if self._recorder is None else self._recorder.phase(lane, self.phase_seconds.num_steps)

    def _facts(self) -> dict[str, Any]:
        """What a trace says of its run."""
        if self._assembly is None:
            return {}
        plan, engine = self._assembly.plan(), self._assembly.settings.engine
        return {
            "device": plan.device,
            "engine": plan.engine,
            "num_params": plan.num_trainable,
            "is_deferred": engine is not None and engine.weights_arrive == "next forward",
            "device_share": device_share(self._assembly.engines.values()),
        }

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Union[LightningModule, nn.Module, None] = None,
        **kwargs: Any,
    ) -> Any:
        start, inside = time.perf_counter(), self.phase_seconds.inside
        self._rest_weights(are_visible=False)  # after a backward that Lightning did not run
        io = self._io
        if io is not None:
            closure = before_step(io, closure)
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._awaits_weights:
            self._wait_for_weights()
        self.phase_seconds.step += time.perf_counter() - start - (self.phase_seconds.inside - inside)
        self.phase_seconds.end_step()
        return result

    def teardown(self) -> None:
        self._release()
        self._environment.close()
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        self._environment.report(exception)
        if self._assembly is not None:
            self._assembly.abandon()
        self._rest_weights(are_visible=False)
        super().on_exception(exception)

    def _release(self) -> None:
        """Give the module back. Sharded states stay reachable, so that a checkpoint can be saved after training."""
        if self._assembly is not None:
            self._report = RunReport(self._assembly, self.phase_seconds)
        if self._recorder is not None:
            self._recorder.end(self.phase_seconds.num_steps, self._facts())
            self._recorder = None
        if self._assembly is not None:
            self._assembly.close()
            cast(SuperScalePrecisionMixin, self.precision_plugin).detach()
            self._flow = None
            self._finished = self._assembly if self._assembly.mesh.num_shares > 1 else None
            self._assembly = None
        if self._flow is not None:  # nothing was trained
            self._flow.close()
            self._flow = None
