"""Every private name of Lightning that the package uses, once each; tests/plugins/test_lightning_private.py tries them.

Both distributions, `lightning.pytorch` and `pytorch_lightning`, have the same private names, so that one function
serves both ([Note: Two namespaces] in trainer/precision.py). Overridden methods keep their names, since Lightning calls
them: `Strategy._configure_launcher`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The first and the last release that the tests were run with.
VERSIONS = ("2.6", "2.6")


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The user's optimizer, which LightningOptimizer wraps for hooks."""
    plain: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return plain


def is_compiled_whole(module: nn.Module) -> bool:
    """Whether `from_compiled` made the module: its steps are compiled, although it looks like any other module."""
    return getattr(module, "_compiler_ctx", None) is not None


def wrapped_closure(precision: Any, model: Any, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
    """A closure that calls `on_before_optimizer_step` and clips, after `closure` has run forward and backward."""
    return functools.partial(precision._wrap_closure, model, optimizer, closure)


def arguments_of_step(trainer: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """The arguments that a Trainer gives to its module's `training_step` for a batch, without the names."""
    return tuple(trainer.fit_loop.epoch_loop._build_kwargs({}, batch, batch_idx).values())


def set_device_mesh(module: Any, mesh: DeviceMesh) -> None:
    """Give a LightningModule the mesh that its `configure_model()` reads as `self.device_mesh`."""
    module._device_mesh = mesh


def keep_sampler(module: Any) -> None:
    """Let the Trainer of a module, if it has one, keep the user's sampler."""
    if module is not None and module._trainer is not None:
        module.trainer._accelerator_connector.use_distributed_sampler = False


def ask_strategy_whether_distributed(strategy: Any) -> None:
    """Let Trainers ask a strategy's `is_distributed`, where it has one, before they go by its class.

    A strategy that inherits from DDPStrategy counts as distributed, also on one device, and the batch size finder
    refuses it. Trainers with other strategies are as they were.
    """
    package = next(one.__module__ for one in type(strategy).__mro__ if one.__name__ == "DDPStrategy").split(
        ".strategies"
    )
    connectors = importlib.import_module(f"{package[0]}.trainer.connectors.accelerator_connector")
    connector = connectors._AcceleratorConnector
    by_class = connector.is_distributed.fget
    if getattr(by_class, "asks_strategy", False):
        return

    def is_distributed(self: Any) -> bool:
        said = getattr(self.strategy, "is_distributed", None)
        return by_class(self) if said is None else bool(said)

    is_distributed.asks_strategy = True  # type: ignore[attr-defined]
    connector.is_distributed = property(is_distributed)


class SyncDistAdvice:
    """Lightning's advice to pass `sync_dist=True`, which it gives where there is a process group, also of one rank."""

    def __init__(self) -> None:
        self._filter: Any = None

    def hide(self) -> None:
        """Give no such advice from now on."""
        if self._filter is None:
            warnings.filterwarnings("ignore", "It is recommended to use `self.log")
            self._filter = warnings.filters[0]

    def show(self) -> None:
        """Give it again."""
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        self._filter = None


def defer_sigterm(trainer: Any, want: Callable[[], None]) -> None:
    """Let SIGTERM only be noted: `want` is called, and by the first one the launcher's children get it too.

    Lightning's own handler broadcasts at once, between any two collectives of this rank, which the other ranks' do not
    match. Called before Lightning sets its handler; `restore_trainer` undoes it.
    """
    connector = trainer._signal_connector
    has_told: list[bool] = []

    def note(number: Any, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if not has_told and launcher is not None:
            launcher.kill(number)
        has_told.append(True)
        want()

    connector._sigterm_notifier_fn = note


def restore_trainer(trainer: Any) -> None:
    """Undo `defer_sigterm` and `call_before_train_end`, as far as they were called."""
    trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)
    trainer.fit_loop.__dict__.pop("on_run_end", None)


def call_before_train_end(trainer: Any, function: Callable[[], None]) -> None:
    """Let a Trainer call a function after its last step, before any hook `on_train_end`; `restore_trainer` undoes it.

    The strategy's own hook comes last: after callbacks that put other weights in place, such as averages.
    """
    loop = trainer.fit_loop
    call_hooks = type(loop).on_run_end

    def on_run_end() -> None:
        function()
        call_hooks(loop)

    loop.on_run_end = on_run_end


def end_by_sigterm(trainer: Any) -> None:
    """Let a Trainer end at its next check, as after SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def drop_launcher(strategy: Any) -> None:
    """Take a strategy's launcher away, so that the Trainer runs in its own process."""
    strategy._launcher = None


def wrapped_sampler(sampler: Any) -> Any:
    """The sampler of a loader that Lightning has divided among ranks, or None where it wrapped none."""
    wraps = any(one.__name__ == "DistributedSamplerWrapper" for one in type(sampler).__mro__)
    return sampler.dataset._sampler if wraps else None


def train_loaders(trainer: Any) -> tuple[str, list[Any]]:
    """How a Trainer combines the loaders that it trains with, such as "max_size_cycle", and those loaders."""
    combined = trainer.fit_loop._combined_loader
    return combined._mode, list(combined.flattened)


def training_batches(trainer: Any) -> tuple[Any, bool]:
    """A Trainer's count of the batches of this epoch, which may be changed, and whether the latest is the last."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current, bool(progress.is_last_batch)


def count_batches(trainer: Any, number: int) -> None:
    """Let a Trainer that goes on within an epoch begin after this number of batches."""
    loop = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    current.ready = current.started = current.processed = current.completed = number
    if loop.restarted_on_train_batch_end:
        current.completed -= 1  # it counts the batch at whose end it was saved once more


def end_epoch(trainer: Any) -> None:
    """Let a Trainer that goes on after the last batch of an epoch begin the next one.

    With `max_steps` it would train on one batch more, or on none, and call that an epoch, if it saved once the epoch
    was counted.
    """
    fit = trainer.fit_loop
    epoch, batches = fit.epoch_progress.current, fit.epoch_loop.batch_progress
    if fit.epoch_loop.restarted_on_train_batch_end:
        count_batches(trainer, trainer.num_training_batches)  # Lightning begins the next
    elif epoch.processed >= epoch.started:
        count_batches(trainer, 0)
        batches.is_last_batch = False
        epoch.completed = epoch.processed
        fit.reset_restart_stage()


def layer_sync_of(strategy: Any) -> Any:
    """The layer synchronization that `Trainer(sync_batchnorm=True)` applies to a model; None without that option."""
    return strategy._layer_sync


def checkpoint_io_of(strategy: Any) -> Any:
    """The CheckpointIO that a strategy was given; None where it makes Lightning's own when it is asked."""
    return strategy._checkpoint_io


def load_state_of(package: str) -> Callable[..., Any]:
    """The function that builds a module from a checkpoint's hyperparameters and loads its weights.

    Args:
        package: "lightning.pytorch" or "pytorch_lightning".
    """
    load_state: Callable[..., Any] = importlib.import_module(f"{package}.core.saving")._load_state
    return load_state


def fsdp_state_context(strategy: Any, *, whole: bool) -> AbstractContextManager[None]:
    """The context in which an FSDPStrategy's model gives and takes this rank's shards, or whole tensors."""
    package = next(one.__module__ for one in type(strategy).__mro__ if one.__name__ == "FSDPStrategy")
    module = importlib.import_module(package)
    if whole:
        context = module._get_full_state_dict_context(strategy.model, world_size=strategy.world_size, rank0_only=False)
    else:
        context = module._get_sharded_state_dict_context(strategy.model)
    found: AbstractContextManager[None] = context
    return found


def beside_any_backward(backward: Callable[..., Any], strategy_class: Any) -> Callable[..., Any]:
    """A Fabric strategy's `backward` beside which a module's outputs may also be used in any other backward.

    Fabric refuses `loss.backward()` and `torch.autograd.grad` through the outputs of a module whose strategy has a
    `backward` of its own, by comparing functions. It goes by the function that another one says it wraps.

    Args:
        strategy_class: Fabric's `Strategy`.
    """

    @functools.wraps(strategy_class.backward)
    def wrapping(self: Any, *args: Any, **kwargs: Any) -> Any:
        return backward(self, *args, **kwargs)

    return wrapping


def logged_step(trainer: Any) -> int:
    """The step that loggers are told with what a training batch logs."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step
