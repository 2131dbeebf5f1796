"""Fabric's strategy, which hands Fabric's calls to a `Run` and holds no algorithm.

[Note: A loop that nobody knows] Under Fabric the loop is the user's: it may read gradients and weights, clip and
step at any time. So a run is one of manual optimization: gradients are in `param.grad` until the step, and on several
ranks they are averages there after each `fabric.backward()` outside of `fabric.no_backward_sync()`.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Union, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
from lightning_superscale.errors import CheckpointError, SuperScaleError
from lightning_superscale.optim.clipping import ClipByNorm, ClipByValue, ClipRequest, clip_in_place
from lightning_superscale.plugins.checkpoint.io import TECHNIQUES_KEY, UniversalCheckpointIOMixin, before_step
from lightning_superscale.plugins.connect import connect
from lightning_superscale.plugins.fabric import state as states
from lightning_superscale.plugins.fabric.module import RunModule
from lightning_superscale.plugins.fabric.precision import FabricPrecisionMixin
from lightning_superscale.plugins.lightning_private import drop_launcher
from lightning_superscale.plugins.precision import own_precision
from lightning_superscale.run.checks import check_clip_value
from lightning_superscale.run.environment import DEFAULT_PATIENCE, DEFAULT_TIMEOUT
from lightning_superscale.run.run import Run
from lightning_superscale.run.state.optimizer_states import check_optimizer_states
from lightning_superscale.run.visibility import Visibility
from lightning_superscale.run.weight_flow import check_flow
from lightning_superscale.zero.meta_init import is_on_meta

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
    from lightning.fabric.strategies.ddp import DDPStrategy as _Base
else:
    _Base = object

# See [Note: A loop that nobody knows].
_VISIBILITY = Visibility(
    why_gradients_stay="a Fabric loop may read or change param.grad at any time",
    why_weights_awaited="a Fabric loop may read weights right after step()",
    is_automatic=False,
)


class _BackwardSync:
    """What `fabric.no_backward_sync()` asks for its context."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """A context for every micro-batch of a step but the last: its gradients add up where they are."""
        return self._run.accumulating() if enabled else nullcontext()


class FabricStrategyMixin(_Base):
    """Data-parallel training with sharded, offloaded or plain optimizer states, exactly as plain AdamW, under Fabric.

    One module is set up, with all of its optimizers: `fabric.setup(module, *optimizers)`, or `fabric.setup_module()`
    and then `fabric.setup_optimizers()` before the first forward that trains. `fabric.save()` and `fabric.load()` write
    and read universal checkpoints, which the Trainer's strategies have too.

    Args:
        zero: stage of what is sharded over ranks: 0 (nothing), 1 (optimizer states), 2 (gradients too), 3 (weights
            too), a ZeroConfig or a mapping with its keys; `tensor_parallel` is for the Trainer.
        offload: where the optimizer lives: None (on the device), "cpu", "superoffload" or "zenflow" (in
            host memory), an OffloadConfig or a mapping with its keys.
        error_if_nonfinite: raise before weights or states change when a gradient is NaN or infinite,
            naming the parameters.
        checkpoint: a CheckpointConfig or a mapping with its keys; None for its defaults.
        timeout: how long collectives wait, as a timedelta or in seconds; None for 30 minutes.
        patience: how long a rank may give no sign of life, because its process or its machine is stopped, before the
            other ranks end and name it, as a timedelta or in seconds; None for 30 seconds.
        sequence: a SequenceConfig of size 1, or a mapping with its keys, for what each rank keeps of long sequences in
            the module's forward; None for nothing. Ranks that share sequences need the Trainer, which hands them their
            batches.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision,
            process_group_backend, start_method: those of Fabric's DDPStrategy.

    Raises:
        SuperScaleError: a config that can't work under Fabric; names it.
    """

    precision_class: type[FabricPrecisionMixin]
    checkpoint_io_class: type[UniversalCheckpointIOMixin]
    _own_precision: FabricPrecisionMixin

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
        precision: Union[Precision, None] = None,
        process_group_backend: Union[str, None] = None,
        timeout: Union[timedelta, float, None] = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        patience: Union[timedelta, float, None] = DEFAULT_PATIENCE,
        sequence: Union[int, SequenceConfig, None] = None,
    ) -> None:
        check_arguments(
            "SuperScaleStrategy",
            FabricStrategyMixin.__init__,
            error_if_nonfinite=error_if_nonfinite,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self.zero_config = resolve_zero(zero)
        self.offload_config = resolve_offload(offload)
        self.sequence_config = resolve_sequence(sequence)
        _refuse_for_trainer(self.zero_config, self.sequence_config)
        if checkpoint_io is not None and checkpoint is not None:
            raise SuperScaleError("pass either checkpoint, which is of UniversalCheckpointIO, or checkpoint_io.")
        self.error_if_nonfinite = error_if_nonfinite
        self.run = Run(self.zero_config, self.offload_config, self.sequence_config)
        self._module: RunModule | None = None
        self._optimizers: list[Optimizer] = []
        self._timeout = duration("SuperScaleStrategy.timeout", timeout) or DEFAULT_TIMEOUT
        self._patience = duration("SuperScaleStrategy.patience", patience) or DEFAULT_PATIENCE
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io or cast("CheckpointIO", self.checkpoint_io_class(checkpoint)),
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=self._timeout,
            start_method=start_method,
        )
        self._backward_sync_control = cast(Any, _BackwardSync(self.run))

    # Precision: stock plugins are translated, so that `precision="bf16-true"` just works.

    @property
    def precision(self) -> Precision:
        return cast("Precision", self._own_precision)

    @precision.setter
    def precision(self, plugin: Precision | None) -> None:
        given = self.precision_class() if plugin is None else plugin
        self._own_precision = own_precision(given, self.precision_class, type(self).__name__)

    # Environment

    @property
    def num_ranks(self) -> int:
        """The number of processes of the run, before they are connected too."""
        return self.num_nodes * max(1, self.num_processes)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:  # type: ignore[override]
        """The sampler's replicas and rank; None for one process, whose data loaders keep the user's samplers."""
        return {"num_replicas": self.num_ranks, "rank": self.global_rank} if self.num_ranks > 1 else None

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all ranks in a new first dim; one rank's own tensor as it is, as without a strategy."""
        return super().all_gather(tensor, group, sync_grads) if self.num_ranks > 1 else tensor

    def _configure_launcher(self) -> None:
        drop_launcher(self)
        check_flow(self.zero_config, self.offload_config)
        if not isinstance(self.checkpoint_io, UniversalCheckpointIOMixin):
            raise SuperScaleError(
                f"{type(self).__name__} saves universal checkpoints under Fabric, and was given a "
                f"{type(self.checkpoint_io).__name__}. Remove it, or pass checkpoint=CheckpointConfig(...)."
            )
        if self.num_ranks > 1:
            super()._configure_launcher()
        elif self.cluster_environment is not None and hasattr(self.cluster_environment, "validate_settings"):
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)

    def setup_environment(self) -> None:
        if self.num_ranks > 1:
            if self.cluster_environment is None:
                raise AssertionError("Fabric sets the cluster before it sets up the environment")
            self._set_world_ranks()
            timeout, patience = self._timeout or DEFAULT_TIMEOUT, self._patience
            connect(self, self.cluster_environment, super().setup_environment, timeout, patience)
        else:
            if self.accelerator is None:
                raise AssertionError("Fabric sets the accelerator before it sets up the environment")
            self.accelerator.setup_device(self.root_device)
            self._set_world_ranks()
            self.run.environment.open_alone()
        self._own_precision.run_on(self.root_device.type)
        atexit.register(self._leave)  # Fabric has no end of its own

    # Setup

    def module_to_device(self, module: nn.Module) -> None:
        """Move a module to the device, but for one that is yet to be set up and has no values or no room there."""
        offload = self.offload_config
        is_whole = self.zero_config.stage < 3 and (offload is None or offload.weights == "stationary")
        if (is_whole and not is_on_meta(module)) or self._module is not None:
            module.to(self.root_device)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[RunModule, list[Optimizer], Any]:
        wrapped = self._new_module(module)
        self._start_training(module, optimizers)
        self._module = wrapped
        return wrapped, optimizers, scheduler

    def setup_module(self, module: nn.Module) -> RunModule:  # type: ignore[override]
        wrapped = self._new_module(module)
        self.run.prepare(module, self.root_device, trains=False, is_compiled_whole=False)
        self.run.start_evaluation(module)
        self._module = wrapped
        return wrapped

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if self._module is None or self._module.has_trained:
            found = "no module was set up" if self._module is None else "it has trained without this one"
            raise SuperScaleError(
                f"{type(self).__name__} starts a run with a module and all of its optimizers, and {found}. Call "
                "fabric.setup(module, *optimizers) with all of them at once, or fabric.setup_module() and then "
                "fabric.setup_optimizers() before the first forward."
            )
        # Fabric hands optimizers over one by one and never says which is the last: each begins the run anew.
        self._start_training(self._module.module, [*self._optimizers, optimizer])
        return optimizer

    def _new_module(self, module: nn.Module) -> RunModule:
        if self._module is not None:
            raise SuperScaleError(
                f"{type(self).__name__} was given a {type(self._module.module).__name__}, and now a "
                f"{type(module).__name__}. It runs one module: make both parts of one nn.Module, or call "
                "fabric.to_device() for one that isn't trained."
            )
        return RunModule(module, self.run)

    def _start_training(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        before = dict(module.named_parameters())
        self.run.prepare(module, self.root_device, trains=True, is_compiled_whole=False)
        _follow_replaced(optimizers, before, module)
        self.run.start_training(
            module,
            optimizers,
            precision=self._own_precision.choices,
            scaler=self._own_precision.scaler,
            visibility=_VISIBILITY,
            rank=self.global_rank,
            error_if_nonfinite=self.error_if_nonfinite,
        )
        self._own_precision.attach(self.run)
        self._optimizers = list(optimizers)

    # Running

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        with self.run.backward(kwargs.get("inputs")):
            super().backward(self._own_precision.scaled(tensor), module, *args, **kwargs)
        self.run.after_backward()

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:  # type: ignore[override]
        closure: Callable[[], Any] = kwargs.pop("closure", None) or _nothing
        result = self.run.step(optimizer, before_step(self._io, closure), **kwargs)
        self.run.end_step()
        return result

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: Union[float, int],
        norm_type: Union[float, int] = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip an optimizer's gradients to a global 2-norm; gives the norm before. Every rank calls it.

        Gradients of scaled losses, with fp16, are clipped inside of the next step, and a norm that is not finite is no
        error: that step is dropped, and the scale lowered.

        Raises:
            SuperScaleError: another norm than the 2-norm, a negative limit, or with `error_if_nonfinite` a norm that is
                NaN or infinite, on every rank; gradients, weights and states are as they were.
        """
        check_clip_value("max_norm", max_norm)
        if float(norm_type) != 2.0:
            raise SuperScaleError(f"clip_gradients takes norm_type=2, the global 2-norm; found {norm_type!r}.")
        norm = self._clip(optimizer, ClipByNorm(float(max_norm)), keeps_nonfinite=error_if_nonfinite)
        if norm is None:
            raise AssertionError("a clip by norm gives the norm")
        if error_if_nonfinite and self._own_precision.scaler is None and not norm.isfinite():
            raise SuperScaleError(
                f"the norm of the gradients of {type(optimizer).__name__} is {norm.item()}, so that clipping would "
                "make all of them NaN or zero; nothing was changed. Skip the step with optimizer.zero_grad(), or pass "
                "error_if_nonfinite=False."
            )
        return norm.to(self.root_device)

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: Union[float, int]) -> None:
        """Limit every element of an optimizer's gradients to [-clip_val, clip_val]. Every rank calls it."""
        check_clip_value("clip_val", clip_val)
        self._clip(optimizer, ClipByValue(float(clip_val)), keeps_nonfinite=False)

    def _clip(self, optimizer: Optimizer, request: ClipRequest, *, keeps_nonfinite: bool) -> Tensor | None:
        """Clip in `param.grad` now, or scaled gradients later; gives the norm before, on the CPU, if it is known."""
        assembly = self.run.assembly
        engine = None if assembly is None else assembly.engines.get(optimizer)
        if assembly is not None and engine is not None and not engine.is_passthrough:
            if self._own_precision.scaler is not None:
                return assembly.clip_scaled(engine, request, self._own_precision.scaler.scale)
            return assembly.clip_in_place(engine, request, keeps_nonfinite=keeps_nonfinite)
        params = (param for group in optimizer.param_groups for param in group["params"])
        return clip_in_place(params, request, keeps_nonfinite=keeps_nonfinite)

    # State

    @property
    def _io(self) -> UniversalCheckpointIOMixin:
        """The universal checkpoint IO, bound to this run's ranks."""
        io = cast(UniversalCheckpointIOMixin, self.checkpoint_io)  # `_configure_launcher` refuses any other
        io.bind(self.run.environment.mesh)
        return io

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        return self.run.module_state(_plain(module), is_local=False)

    def load_module_state_dict(self, module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        self.run.load_module_state(_plain(module), state_dict, strict=strict, allow=self._io.config.allow)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = None if self._module is None else self._optimizer_state(optimizer, is_local=False)
        return optimizer.state_dict() if state is None else state

    def _optimizer_state(self, optimizer: Optimizer, *, is_local: bool) -> dict[str, Any]:
        state = self.run.optimizer_state(self._own_module, optimizer, is_local=is_local)
        return optimizer.state_dict() if state is None else state

    @property
    def _own_module(self) -> nn.Module:
        if self._module is None:
            raise AssertionError("asked for the module only where one was set up")
        return self._module.module

    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write a universal checkpoint of the module, and of the optimizers that `state` has. Every rank calls it.

        Raises:
            CheckpointError: a filter, a state without the module that was set up, or a value that can't be saved.
        """
        if filter:
            raise CheckpointError(
                f"fabric.save(filter=...) of {', '.join(map(repr, filter))}: a universal checkpoint has all of a "
                "module and of an optimizer. Leave the filter away, or save what you need with torch.save()."
            )
        user = states.sorted_out(state, self._module, self._optimizers)
        optimizers = [self._optimizers[number] for number in user.optimizers.values()]
        user = states.UserState(user.module, {name: i for i, name in enumerate(user.optimizers)}, user.values)
        checkpoint: dict[str, Any] = {"state_dict": self.run.module_state(self._own_module, is_local=True)}
        if optimizers:
            checkpoint["optimizer_states"] = [self._optimizer_state(one, is_local=True) for one in optimizers]
            techniques = self.run.technique_states()
            checkpoint.update({TECHNIQUES_KEY: techniques} if techniques else {})
            scale = self._own_precision.state_dict()
            checkpoint.update({type(self._own_precision).__qualname__: scale} if scale else {})
        checkpoint.update(states.saved_values(user))
        self._io.save_on_all_ranks(checkpoint, str(self.broadcast(path)), self._own_module, optimizers)

    def load_checkpoint(
        self,
        path: Any,
        state: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint of any known format into the objects of a state. Every rank calls it.

        Args:
            state: objects by name; or the module or an optimizer alone, whose own state dict the checkpoint may be too.
            weights_only: of no effect: no pickle is ever executed.

        Raises:
            CheckpointError: no checkpoint, damage, or one that does not fit the state; nothing was changed.
        """
        path = str(self.broadcast(path))
        opened = self._io.load_on_all_ranks(path, is_all_used=True)
        if not state:
            return states.whole(opened)
        if isinstance(state, Optimizer):
            state.load_state_dict(states.optimizer_state_in(opened, path))
            return {}
        given = {"module": state} if isinstance(state, nn.Module) else state
        user = states.sorted_out(given, self._module, self._optimizers)
        checkpoint = states.as_trainers(opened, user, path)
        found, saved = states.found_in(checkpoint, user), checkpoint.get("optimizer_states", [])
        states.check_names(user, found, len(saved), path, strict=strict)
        by_number = states.states_for(user, found, saved)
        own = [self._optimizers[number] for number in by_number]
        check_optimizer_states(self._own_module, own, list(by_number.values()))
        self.load_module_state_dict(self._own_module, checkpoint["state_dict"], strict=strict)
        self.run.load_optimizer_states(self._own_module, own, list(by_number.values()))
        if own:
            self.run.load_technique_states(checkpoint.get(TECHNIQUES_KEY, {}))
            self._own_precision.load_state_dict(checkpoint.get(type(self._own_precision).__qualname__, {}))
        return states.load_values(given, user, found)

    # The end

    def teardown(self) -> None:
        """End the run, and the watch over the other ranks. Every rank calls it."""
        with ExitStack() as rest:  # all of it, also where the end of the last step's work on the host fails
            rest.callback(super().teardown)
            rest.callback(self._forget)
            rest.callback(self.run.environment.close)
            rest.callback(self._io.wait)
            rest.callback(self._own_precision.detach)
            self.run.close()

    def _forget(self) -> None:
        atexit.unregister(self._leave)
        self._module, self._optimizers = None, []

    def _leave(self) -> None:
        """End the run as the process ends; after an error, tell the other ranks of it."""
        error = getattr(sys, "last_value", None)
        if error is not None:
            self.run.fail(error)
        elif self.run.assembly is not None:
            self.run.assembly.abandon()  # nobody reads weights any more, and no thread takes work
        self.run.close()
        if self.num_ranks > 1:  # one process has nobody to take leave of, and its group ends with it
            self.run.environment.close()


def _refuse_for_trainer(zero: ZeroConfig, sequence: SequenceConfig | None) -> None:
    """Refuse configs that need the Trainer's hooks.

    Raises:
        SuperScaleError: names the config and what to do.
    """
    if sequence is not None and sequence.size > 1:
        raise SuperScaleError(
            f"SequenceConfig.size={sequence.size}: ranks that share sequences get their tokens from the Trainer, which "
            "hands them batches; Fabric's loops take batches by themselves. Use lightning.pytorch's Trainer, or size=1."
        )
    if zero.tensor_parallel > 1:
        raise SuperScaleError(
            f"ZeroConfig.tensor_parallel={zero.tensor_parallel} cuts modules in configure_model(), which only the "
            "Trainer calls. Use lightning.pytorch's Trainer, or tensor_parallel=1."
        )


def _plain(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, RunModule) else module


def _nothing() -> None:
    """The closure of a step that is given none."""


def _follow_replaced(optimizers: Sequence[Optimizer], before: Mapping[str, nn.Parameter], module: nn.Module) -> None:
    """Hand optimizers the parameters that took the place of those on the meta device, which they were built from."""
    now = dict(module.named_parameters())
    replaced = {old: now[name] for name, old in before.items() if now[name] is not old}
    for optimizer in optimizers if replaced else ():
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(param, param) for param in group["params"]]
