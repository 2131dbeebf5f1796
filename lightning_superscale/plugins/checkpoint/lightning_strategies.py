"""Methods of Lightning's own strategies to which a UniversalCheckpointIO is bound ([Note: Bound to a strategy]).

Each function derives a class from a strategy's class. The strategy's `__class__` becomes that class, so it may have no
other base.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lightning_superscale.checkpoint.foreign.torch_optimizer import parameter_names
from lightning_superscale.errors import CheckpointError
from lightning_superscale.plugins.checkpoint.io import (
    UniversalCheckpointIOMixin,
    before_step,
    load_through,
    save_through,
)
from lightning_superscale.plugins.data.resume import place_loader, resume_batches
from lightning_superscale.plugins.lightning_private import fsdp_state_context, plain_optimizer
from lightning_superscale.run.state.optimizer_states import (
    by_name,
    has_names,
    load_placed_states,
    names_of,
    renumbered,
    without_left_behind,
)
from lightning_superscale.run.state.restore import fill_weights, fitted, is_lazy, read_weights, read_whole


def io_of(strategy: Any) -> UniversalCheckpointIOMixin:
    """The IO that a strategy is bound to.

    Raises:
        CheckpointError: the strategy has another IO by now.
    """
    io = strategy.checkpoint_io
    if not isinstance(io, UniversalCheckpointIOMixin):
        raise CheckpointError(
            f"the checkpoint IO of {type(strategy).__name__} was exchanged for a {type(io).__name__} after it "
            "was bound. Pass the IO to the Trainer."
        )
    return io


def _on_every_rank(base: Any) -> Any:
    class OnEveryRank(base):
        """Every rank saves and loads, through the IO."""

        @property
        def lightning_restore_optimizer(self) -> bool:
            """Whether Lightning asks for optimizer states after it loaded: weights and states are read separately."""
            return True

        def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            save_through(io_of(self), self, checkpoint, filepath)

        def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            return load_through(io_of(self), self, checkpoint_path)

        def process_dataloader(self, dataloader: object) -> object:
            ranks = getattr(self, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
            return place_loader(super().process_dataloader(dataloader), self.lightning_module.trainer, ranks)

        def on_train_start(self) -> None:
            super().on_train_start()
            resume_batches(self.lightning_module.trainer, self.global_rank)

        def optimizer_step(
            self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
        ) -> Any:
            return super().optimizer_step(optimizer, before_step(io_of(self), closure), model, **kwargs)

    return OnEveryRank


@cache
def replicated(base: Any) -> Any:
    """Derive the class for a strategy whose ranks hold the same whole state: one device, or DDP."""

    class Replicated(_on_every_rank(base)):  # type: ignore[misc]
        def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            module, allow = self.lightning_module, io_of(self).config.allow
            own = module.state_dict()
            weights = fitted(module, checkpoint["state_dict"], own, strict=strict, allow=allow)
            if is_lazy(weights):
                weights = read_weights(weights, own)
            super().load_model_state_dict({**checkpoint, "state_dict": weights}, strict=strict and not allow)

        def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
            packed = _own_states(self, checkpoint)
            if all(has_names(state) for state in packed):
                names = parameter_names(self.lightning_module, self.optimizers)
                owned = zip(packed, names, self.optimizers, strict=True)
                packed = read_whole([renumbered(state, own, optimizer) for state, own, optimizer in owned])
            super().load_optimizer_state_dict({**checkpoint, "optimizer_states": packed})

    return Replicated


@cache
def model_parallel(base: Any) -> Any:
    """Derive the class for ModelParallelStrategy: FSDP2 and tensor parallelism, whose tensors are DTensors."""

    class ModelParallel(_on_every_rank(base)):  # type: ignore[misc]
        def lightning_module_state_dict(self) -> dict[str, Any]:
            return dict(self.lightning_module.state_dict())

        def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
            return plain_optimizer(optimizer).state_dict()

        def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            _fill_own(self, checkpoint, strict=strict)

        def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
            names = names_of(self.lightning_module)
            for optimizer, packed in zip(self.optimizers, _own_states(self, checkpoint), strict=True):
                load_placed_states(plain_optimizer(optimizer), packed, names)

    return ModelParallel


@cache
def fully_sharded(base: Any) -> Any:
    """Derive the class for FSDPStrategy. Each rank holds whole optimizer states for a moment while it loads."""

    class FullySharded(_on_every_rank(base)):  # type: ignore[misc]
        def lightning_module_state_dict(self) -> dict[str, Any]:
            with fsdp_state_context(self, whole=False):
                return dict(self.model.state_dict())

        def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
            with fsdp_state_context(self, whole=False):
                return FullyShardedDataParallel.optim_state_dict(self.model, plain_optimizer(optimizer))

        def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
            own = _fill_own(self, checkpoint, strict=strict)
            with fsdp_state_context(self, whole=False):
                self.model.load_state_dict(own)

        def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
            with fsdp_state_context(self, whole=True):
                for optimizer, packed in zip(self.optimizers, _own_states(self, checkpoint), strict=True):
                    whole = read_whole(by_name(packed))
                    flat = FullyShardedDataParallel.optim_state_dict_to_load(
                        self.model, plain_optimizer(optimizer), whole
                    )
                    plain_optimizer(optimizer).load_state_dict(flat)

    return FullySharded


def _own_states(strategy: Any, checkpoint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A checkpoint's optimizer states without what only an offload engine can go on from.

    Warns:
        UserWarning: something is dropped; says what, and what to do.
    """
    tells = strategy.global_rank == 0
    found = [without_left_behind(packed, None, tells=tells) for packed in checkpoint["optimizer_states"]]
    if tells and any(weights_lag for _, weights_lag in found):
        warnings.warn(
            "the checkpoint was saved while an update was on its way from the host to the weights, which "
            f"{type(strategy).__name__} drops: moments have it and weights lack it. Resume under a strategy of "
            "lightning_superscale, which takes its masters, or from a checkpoint of the end of a run.",
            stacklevel=2,
        )
    return [states for states, _ in found]


def _fill_own(strategy: Any, checkpoint: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Overwrite this rank's shards of a strategy's state dict with a checkpoint's values, and return them."""
    own: dict[str, Any] = strategy.lightning_module_state_dict()
    module, allow = strategy.lightning_module, io_of(strategy).config.allow
    fill_weights(own, fitted(module, checkpoint["state_dict"], own, strict=strict, allow=allow))
    return own


BOUND: dict[str, Callable[[Any], Any]] = {
    "Strategy": replicated,
    "ModelParallelStrategy": model_parallel,
    "FSDPStrategy": fully_sharded,
}
