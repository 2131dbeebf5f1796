"""The Trainer's strategy, which hands Lightning's hooks to a `Run` and holds no algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Union, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.config import (
    CheckpointConfig,
    OffloadConfig,
    SequenceConfig,
    ZeroConfig,
    resolve_offload,
    resolve_sequence,
    resolve_zero,
)
from lightning_superscale.config.values import check_arguments, duration
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.plugins.checkpoint.io import (
    TECHNIQUES_KEY,
    UniversalCheckpointIOMixin,
    before_step,
    check_has_run,
    load_through,
    refuse_others_of,
    save_through,
)
from lightning_superscale.plugins.connect import connect
from lightning_superscale.plugins.lightning_private import (
    SyncDistAdvice,
    ask_strategy_whether_distributed,
    call_before_train_end,
    defer_sigterm,
    drop_launcher,
    end_by_sigterm,
    is_compiled_whole,
    keep_sampler,
    layer_sync_of,
    plain_optimizer,
    restore_trainer,
    set_device_mesh,
)
from lightning_superscale.plugins.precision import own_precision
from lightning_superscale.plugins.trainer.precision import SuperScalePrecisionMixin
from lightning_superscale.plugins.trainer.sample_ranks import SampleRanksMixin
from lightning_superscale.plugins.trainer.silent_step import silent_step
from lightning_superscale.plugins.trainer.visibility import visibility_of
from lightning_superscale.run.assemble import Assembly
from lightning_superscale.run.checks import check_clip_value, refuse_averaging
from lightning_superscale.run.environment import DEFAULT_PATIENCE, DEFAULT_TIMEOUT
from lightning_superscale.run.meetings import Meetings
from lightning_superscale.run.report.phases import PhaseSeconds
from lightning_superscale.run.report.plan import ParallelPlan
from lightning_superscale.run.run import Run
from lightning_superscale.run.settings import shards_weights
from lightning_superscale.run.techniques.rehearsal import Rehearsal
from lightning_superscale.run.weight_flow import check_flow
from lightning_superscale.zero.meta_init import is_on_meta

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import CheckpointIO, Precision

# Seconds after SIGTERM at which a rank ends without the others' consent: ranks agree at each optimizer step.
_ALONE_AFTER_S = 10.0


class SuperScaleStrategyMixin(SampleRanksMixin):
    """Data-parallel training with sharded, offloaded or plain optimizer states, exactly as plain AdamW.

    Args:
        zero: stage of what is sharded over ranks: 0 (nothing), 1 (optimizer states), 2 (gradients too), 3 (weights
            too), a ZeroConfig or a mapping with its keys.
        offload: where the optimizer lives: None (on the device), "cpu", "superoffload" or "zenflow" (in
            host memory), an OffloadConfig or a mapping with its keys.
        error_if_nonfinite: raise before weights or states change when a gradient is NaN or infinite,
            naming the parameters.
        checkpoint: write universal checkpoints, as plugins=[UniversalCheckpointIO(...)] does: a CheckpointConfig or a
            mapping with its keys. None leaves checkpoints to the Trainer's checkpoint IO.
        timeout: how long collectives wait, as a timedelta or in seconds; None for 30 minutes.
        patience: how long a rank may give no sign of life, because its process or its machine is stopped, before the
            other ranks end and name it, as a timedelta or in seconds; None for 30 seconds.
        sequence: number of neighbouring ranks that share every sample's sequence, a SequenceConfig or a mapping with
            its keys; None where each rank has samples of its own.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin,
            process_group_backend, start_method: those of Lightning's DDPStrategy.

    Raises:
        SuperScaleError: a config that can't work, or both `checkpoint` and `checkpoint_io`.
    """

    precision_class: type[SuperScalePrecisionMixin]
    checkpoint_io_class: type[UniversalCheckpointIOMixin]

    def __init__(
        self,
        zero: Union[int, ZeroConfig] = 0,
        offload: Union[Literal["cpu", "superoffload", "zenflow"], OffloadConfig, None] = None,
        error_if_nonfinite: bool = False,
        checkpoint: Union[CheckpointConfig, None] = None,
        accelerator: Union[Accelerator, None] = None,
        parallel_devices: Union[list[torch.device], None] = None,
        cluster_environment: Union[ClusterEnvironment, None] = None,
        checkpoint_io: Union[CheckpointIO, None] = None,
        precision_plugin: Union[Precision, None] = None,
        process_group_backend: Union[str, None] = None,
        timeout: Union[timedelta, float, None] = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        patience: Union[timedelta, float, None] = DEFAULT_PATIENCE,
        sequence: Union[int, SequenceConfig, None] = None,
    ) -> None:
        check_arguments(
            "SuperScaleStrategy",
            SuperScaleStrategyMixin.__init__,
            error_if_nonfinite=error_if_nonfinite,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self.zero_config = resolve_zero(zero)
        self.offload_config = resolve_offload(offload)
        self.sequence_config = resolve_sequence(sequence)
        self.error_if_nonfinite = error_if_nonfinite
        self.run = Run(self.zero_config, self.offload_config, self.sequence_config)
        self._meetings = Meetings()
        if checkpoint is not None:
            if checkpoint_io is not None:
                raise SuperScaleError("pass either checkpoint, which is of UniversalCheckpointIO, or checkpoint_io.")
            checkpoint_io = self.checkpoint_io_class(checkpoint)
        self._start_method = start_method
        self._advice = SyncDistAdvice()
        self._timeout = duration("SuperScaleStrategy.timeout", timeout) or DEFAULT_TIMEOUT
        self._has_failed = False
        self._patience = duration("SuperScaleStrategy.patience", patience) or DEFAULT_PATIENCE
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=self._timeout,
            start_method=start_method,
        )

    # Precision: stock plugins are translated, so that `precision="bf16-true"` just works.

    @property
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else self.precision_class()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        own = None if plugin is None else own_precision(plugin, self.precision_class, type(self).__name__)
        self._precision_plugin = own

    @property
    def _precision(self) -> SuperScalePrecisionMixin:
        return cast(SuperScalePrecisionMixin, self.precision_plugin)  # its setter takes or makes no other

    # Environment

    def _configure_launcher(self) -> None:
        ask_strategy_whether_distributed(self)
        drop_launcher(self)  # one process needs no launcher, and without one notebooks work too
        check_flow(self.zero_config, self.offload_config)
        spec = self.mesh_spec  # refuses axes that do not fit
        if spec.tensor > 1 and self._start_method != "popen":
            raise SuperScaleError(
                f"start_method={self._start_method!r} brings the module back to the main process, which has no other "
                "ranks to hold its tensor-parallel parts. Use start_method='popen', or torchrun."
            )
        if self.num_ranks > 1:
            super()._configure_launcher()
        elif self.cluster_environment is not None:  # as the launcher would: every process would train on all data
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)

    def setup_environment(self) -> None:
        if self.accelerator is None or self.cluster_environment is None:
            raise AssertionError("the Trainer sets accelerator and cluster before it sets up the environment")
        if self.num_ranks > 1:
            self.set_world_ranks()
            timeout, patience = self._timeout or DEFAULT_TIMEOUT, self._patience
            connect(self, self.cluster_environment, super().setup_environment, timeout, patience)
            device_mesh = self.run.environment.mesh.device_mesh
            if self.lightning_module is not None and device_mesh is not None:
                set_device_mesh(self.lightning_module, device_mesh)
            mesh = self.run.environment.mesh
            if mesh.sequence.size > 1 and mesh.batch.size == 1:
                keep_sampler(self.lightning_module)  # all ranks have the same batches
            return
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self.run.environment.open_alone()
        self._advice.hide()
        keep_sampler(self.lightning_module)  # a DistributedSampler would shuffle otherwise than the user's

    # Setup

    def setup(self, trainer: Trainer) -> None:
        if self.accelerator is None:
            raise AssertionError("the Trainer connects the accelerator before setup")
        trains = trainer.state.fn == "fit"
        check_clip_value("gradient_clip_val", trainer.gradient_clip_val)
        self.run.close()
        if self.num_ranks > 1:
            defer_sigterm(trainer, self.run.environment.want_end)
        self.accelerator.setup(trainer)
        model: nn.Module = self._module
        if trains and layer_sync_of(self):
            model = layer_sync_of(self).apply(model)
        self.model = self.precision_plugin.convert_module(model)
        self._precision.run_on(self.root_device.type)
        self.run.prepare(model, self.root_device, trains=trains, is_compiled_whole=is_compiled_whole(model))
        if trains:
            self.setup_optimizers(trainer)
            self._start_training(trainer)
        else:
            self.run.start_evaluation(model)
        self.setup_precision_plugin()

    def _start_training(self, trainer: Trainer) -> None:
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        if shards_weights(self.zero_config, self.run.environment.mesh):
            refuse_averaging(callbacks)
        module = trainer.lightning_module
        self.run.start_training(
            module,
            self.optimizers,
            precision=self._precision.choices,
            scaler=self._precision.scaler,
            visibility=visibility_of(module, callbacks, len(self.optimizers)),
            rank=self.global_rank,
            error_if_nonfinite=self.error_if_nonfinite,
        )
        self._precision.attach(self.run)
        if self.run.assembly is not None:
            call_before_train_end(trainer, self.run.assembly.catch_up)

    def model_to_device(self) -> None:
        if self.model is None:
            raise AssertionError("no model to move")
        self.run.to_device(self.model)

    # Running

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        trains = self.lightning_module is not None and self.lightning_module.trainer.training
        return self.run.batch(super().batch_to_device(batch, device, dataloader_idx), trains=trains)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._meetings.at_batch(self.run.assembly, batch_idx)
        step = partial(silent_step, self._module, super().training_step, batch_idx)
        scale = 1.0 if self._precision.scaler is None else self._precision.scaler.scale
        Rehearsal(self.run, step, self._module.backward, loss_scale=scale).first_batch(batch)

    def on_train_end(self) -> None:
        self._meetings.at_end(self.run.assembly)
        super().on_train_end()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.run.forward():
            result = self.run.output(super().training_step(*args, **kwargs), trains=True)
        self._heed_sigterm(alone_after_s=_ALONE_AFTER_S)
        return result

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        with self.run.backward(kwargs.get("inputs")):
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """A context for every micro-batch of a step but the last: their gradients add up where they are."""
        with self.run.accumulating():
            yield

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Union[LightningModule, nn.Module, None] = None,
        **kwargs: Any,
    ) -> Any:
        module = cast("LightningModule", model or self._module)
        io = self._io
        if io is not None:
            closure = before_step(io, closure)
        result = self._precision.optimizer_step(optimizer, model=module, closure=closure, **kwargs)
        self._heed_sigterm(alone_after_s=_ALONE_AFTER_S)
        # One line: an error between the two would leave a step that is whole, and that Lightning doesn't count.
        return self.run.end_step() or result  # type: ignore[func-returns-value]

    def _heed_sigterm(self, *, alone_after_s: float) -> None:
        """Let the Trainer end, once ranks have agreed to, or this one has wanted it for `alone_after_s`."""
        if self.run.environment.is_to_end(alone_after_s) and self.lightning_module is not None:
            end_by_sigterm(self.lightning_module.trainer)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.run.before_evaluation()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.run.evaluating():
            result = self.run.output(super().validation_step(*args, **kwargs), trains=False)
        self._heed_sigterm(alone_after_s=0.0)
        return result

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.run.evaluating():
            result = self.run.output(super().test_step(*args, **kwargs), trains=False)
        self._heed_sigterm(alone_after_s=0.0)
        return result

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.run.evaluating():
            result = self.run.output(super().predict_step(*args, **kwargs), trains=False)
        self._heed_sigterm(alone_after_s=0.0)
        return result

    def on_exception(self, exception: BaseException) -> None:
        if not (isinstance(exception, SystemExit) and self.run.environment.mesh.end.is_agreed):
            self.run.fail(exception)
            self._has_failed = True
        super().on_exception(exception)

    def teardown(self) -> None:
        with ExitStack() as rest:  # all of it, also where the end of the last step's work on the host fails
            rest.callback(self._end_lightnings)
            rest.callback(self._advice.show)
            rest.callback(self.run.environment.close)
            if self.lightning_module is not None:
                rest.callback(restore_trainer, self.lightning_module.trainer)
            rest.callback(self._precision.detach)
            try:
                self.run.close()
            except BaseException:
                self._has_failed = True
                raise

    def _end_lightnings(self) -> None:
        """Tear down what Lightning's own strategy set up."""
        has_failed, self._has_failed = self._has_failed, False
        try:
            super().teardown()
        except RuntimeError:
            if not has_failed:  # moving shards that an error's traceback holds would hide the error itself
                raise

    # What users ask

    @property
    def plan(self) -> ParallelPlan:
        """The resolved plan of this rank; after `fit()` the plan as it was at the end. Any rank may ask.

        Raises:
            SuperScaleError: before `fit()` has set the strategy up.
        """
        return self.run.plan

    def explain(self) -> str:
        """The plan as text: the place, dtype and size of each class of bytes, and the reasons for each choice.

        It is known from `on_fit_start` on, and after `fit()`. Any rank may ask.

        Raises:
            SuperScaleError: before `fit()` has set the strategy up.
        """
        return self.plan.table()

    def exposure(self) -> list[str]:
        """Sentences on how much of a step the host optimizer should leave exposed, and does; none without offload."""
        return self.run.exposure()

    def grad_norm(self, optimizer_index: int = 0) -> Tensor:
        """Global 2-norm of one optimizer's gradients at its last step, before clipping; fp32 scalar, CPU.

        Every rank calls it, where states are sharded.

        Raises:
            SuperScaleError: no step has been taken yet.
        """
        return self.run.grad_norm(optimizer_index)

    @contextmanager
    def full_params(self, *, writes: bool = False) -> Iterator[dict[str, Tensor]]:
        """A context that gives whole weights by name, between two steps: `with strategy.full_params() as weights:`.

        Every rank calls it. Weights that every rank has whole are the module's own memory; sharded ones are gathered
        into host memory of every rank, all of them at once.

        Args:
            writes: take rank 0's tensors, which were edited in place, as the new weights on every rank. Masters follow;
                optimizer states stay.

        Raises:
            SuperScaleError: outside `fit()`, or a tensor was edited without `writes`.
        """
        with self.run.full_params(writes=writes) as weights:
            yield weights

    @property
    def assembly(self) -> Assembly | None:
        """The running parts, or None outside `fit()`."""
        return self.run.assembly

    @property
    def phase_seconds(self) -> PhaseSeconds:
        """The host's time, divided over the phases of training steps."""
        return self.run.phases

    @property
    def ranks(self) -> Communicator:
        """The other ranks of the run.

        Raises:
            SuperScaleError: outside `fit()`.
        """
        if self.run.assembly is None:
            raise SuperScaleError("ranks are known once trainer.fit() has set up the model and its optimizers.")
        return self.run.assembly.ranks

    # State

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether Lightning restores weights after `setup`: tensors on the meta device have no memory before it."""
        return self.run.was_on_meta or is_on_meta(self.lightning_module)

    @property
    def _io(self) -> UniversalCheckpointIOMixin | None:
        """The universal checkpoint IO, bound to this run's ranks; None where the Trainer has another one."""
        io = self.checkpoint_io
        if not isinstance(io, UniversalCheckpointIOMixin):
            return None
        io.bind(self.run.environment.mesh)
        return io

    @property
    def _module(self) -> LightningModule:
        if self.lightning_module is None:
            raise AssertionError("the Trainer connects the module before it asks for anything of it")
        return self.lightning_module

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        states = self.run.technique_states()
        if states and "optimizer_states" in checkpoint:  # otherwise only weights are saved
            checkpoint = {**checkpoint, TECHNIQUES_KEY: states}
        io = self._io
        if io is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            save_through(io, self, checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        io = self._io
        if io is None:
            refuse_others_of(self.checkpoint_io, checkpoint_path)
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
            check_has_run(self, checkpoint, checkpoint_path)
            return checkpoint
        return load_through(io, self, checkpoint_path)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._meetings.at_save(self.run.assembly)
        return self.run.module_state(self._module, is_local=self._io is not None)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        io = self._io
        allow = None if io is None else io.config.allow
        self._precision.widen_module(self._module)
        self.run.load_module_state(self._module, checkpoint["state_dict"], strict=strict, allow=allow)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain, is_local = plain_optimizer(optimizer), self._io is not None
        state = self.run.optimizer_state(self._module, plain, is_local=is_local)
        return super().optimizer_state(optimizer) if state is None else state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.run.load_optimizer_states(self._module, self.optimizers, checkpoint["optimizer_states"])
        self.run.load_technique_states(checkpoint.get(TECHNIQUES_KEY, {}))
