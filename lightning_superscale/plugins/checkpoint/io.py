"""Universal checkpoints as Lightning's CheckpointIO.

[Note: Bound to a strategy] Lightning asks a CheckpointIO to write on rank 0 only, and FSDP's and ModelParallel's
strategies do not ask it at all. So a callback that comes with the package (`binder.py`) gives the strategy of a Trainer
with this IO methods that ask it on every rank; this package's strategies have such methods. No checkpoint of such a
Trainer is written past its IO.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_superscale.checkpoint.foreign.registry import detect
from lightning_superscale.checkpoint.load.reader import is_checkpoint
from lightning_superscale.checkpoint.save.background import BackgroundSaver
from lightning_superscale.checkpoint.save.writer import save
from lightning_superscale.checkpoint.state import TensorKey
from lightning_superscale.checkpoint.storage.files import is_remote
from lightning_superscale.checkpoint.storage.local import remove
from lightning_superscale.comm.mesh import DataMesh, build_mesh, single_mesh
from lightning_superscale.config import CheckpointConfig, resolve_checkpoint
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.mesh import MeshSpec
from lightning_superscale.plugins.binder import expect
from lightning_superscale.plugins.lightning_private import plain_optimizer
from lightning_superscale.plugins.trainer.visibility import overrides
from lightning_superscale.run.environment import DEFAULT_TIMEOUT
from lightning_superscale.run.state.collect import local_state
from lightning_superscale.run.state.restore import as_lightnings, open_any

if TYPE_CHECKING:
    from lightning.pytorch.plugins import CheckpointIO as _Base
else:
    _Base = object

# Where a checkpoint keeps states of module techniques; absent where none has any.
TECHNIQUES_KEY = "lightning_superscale_techniques"


class UniversalCheckpointIOMixin(_Base):
    """Checkpoints that any strategy writes and reads, at any number of ranks, with no conversion.

    A checkpoint is a directory with a JSON manifest and safetensors files, written by all ranks at once, complete or
    absent, with checksums; no pickle is executed on load. The IO also reads checkpoints of Lightning,
    torch.distributed.checkpoint, DeepSpeed and Hugging Face. It works under Lightning's single-device, DDP, FSDP and
    ModelParallel strategies and under the strategies of this package.

    Args:
        config: a CheckpointConfig or a mapping with its keys.
    """

    def __init__(self, config: Union[CheckpointConfig, Mapping[str, Any], None] = None) -> None:
        self.config = resolve_checkpoint(config)
        self._mesh: DataMesh | None = None
        self._own_mesh: tuple[object, DataMesh] | None = None
        self._saver: BackgroundSaver | None = None
        expect(self)

    # The methods that a bound strategy calls, each on every rank.

    def bind(self, mesh: DataMesh | None = None) -> None:
        """Set the ranks of a run: those of `mesh`, or for None all of the process group's once there is one."""
        self._mesh = mesh

    @property
    def mesh(self) -> DataMesh:
        """The ranks that save and load together."""
        if self._mesh is not None:
            return self._mesh
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return single_mesh()
        if self._own_mesh is None or self._own_mesh[0] is not dist.group.WORLD:
            # torch never frees process groups, so they are made once for each default group
            self._own_mesh = (dist.group.WORLD, build_mesh(MeshSpec(shard=dist.get_world_size()), DEFAULT_TIMEOUT))
        return self._own_mesh[1]

    def save_on_all_ranks(
        self, checkpoint: Mapping[str, Any], path: str, module: nn.Module, optimizers: Sequence[Optimizer]
    ) -> None:
        """Write this rank's part of a checkpoint that `trainer.save_checkpoint` dumped. Every rank calls it.

        Raises:
            CheckpointError: a path with something else than a checkpoint, a value that can't be saved, a full disk, a
                lost rank, or an earlier asynchronous save that failed; raised on every rank.
        """
        state = local_state(checkpoint, module, optimizers, self.mesh)
        step = checkpoint.get("global_step")
        if not self.config.asynchronous:
            save(path, state, self.mesh, step=step)
            return
        if self._saver is None:
            self._saver = BackgroundSaver(self.mesh, DEFAULT_TIMEOUT, is_immutable=self._is_immutable)
        self._saver.save(path, state, step=step)

    def _is_immutable(self, key: TensorKey) -> bool:
        """Whether a tensor changes only in steps, before which `before_step` is called: optimizer states do."""
        return key.section.startswith("optimizer.")

    def before_step(self) -> None:
        """Let a snapshot that is being written keep its values, although weights and states are about to change.

        Raises:
            CheckpointError: the save in flight failed; raised on every rank at the same step.
        """
        if self._saver is None:
            return
        if self._saver.is_busy:
            self._saver.order_after_snapshot()
            self._saver.release()
        self._saver.raise_if_failed(self.mesh)

    # CheckpointIO

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        raise CheckpointError(
            f"{type(self).__name__} was asked to write {path} by a strategy that it is not bound to, on one rank. The "
            "callback that binds it comes with an installed package: pip install lightning-superscale, or add "
            "callbacks=[lightning_superscale.CheckpointBinder()]."
        )

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint of any known format as Lightning's dict; its tensors are read at their first use.

        Args:
            map_location: of no effect: values are read into the memory that they are loaded into.
            weights_only: of no effect: no pickle is ever executed.

        Raises:
            CheckpointError: no checkpoint, a format that is not known, or damage; before the model changes.
        """
        return self.load_on_all_ranks(str(path), is_all_used=False)

    def load_on_all_ranks(self, path: str, *, is_all_used: bool) -> dict[str, Any]:
        """Open a checkpoint as `load_checkpoint` does, for all ranks at once. Every rank calls it.

        Args:
            is_all_used: whether optimizer states will be loaded too; see `open_any`.
        """
        self.wait()
        return open_any(path, self.mesh, is_all_used=is_all_used)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint of any known format, and nothing else.

        Raises:
            CheckpointError: something else than a checkpoint lies there.
        """
        if self._saver is not None:
            self._saver.remove(str(path))
        else:
            remove(str(path))

    def wait(self) -> None:
        """Wait until a save in flight is done. Every rank calls it.

        Raises:
            CheckpointError: the save failed.
        """
        if self._saver is not None:
            self._saver.wait()

    def teardown(self) -> None:
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.close()


def save_through(io: UniversalCheckpointIOMixin, strategy: Any, checkpoint: Mapping[str, Any], path: Any) -> None:
    """Save a checkpoint for a strategy that is bound to an IO. Every rank calls it."""
    optimizers = list(map(plain_optimizer, strategy.optimizers))
    io.save_on_all_ranks(checkpoint, str(strategy.broadcast(path)), strategy.lightning_module, optimizers)


def load_through(io: UniversalCheckpointIOMixin, strategy: Any, path: Any) -> dict[str, Any]:
    """Open a checkpoint for a strategy that is bound to an IO. Every rank calls it."""
    path = str(strategy.broadcast(path))
    checkpoint: dict[str, Any] = as_lightnings(io.load_on_all_ranks(path, is_all_used=_resumes_fit(strategy)))
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise CheckpointError(f'{path} has no "state_dict" of a module, and is not one itself; nothing was changed.')
    check_has_run(strategy, checkpoint, path)
    return checkpoint


def _resumes_fit(strategy: Any) -> bool:
    """Whether the Trainer of a strategy loads for fit(), which alone loads optimizer states, after weights."""
    module = strategy.lightning_module
    return module is not None and bool(module.trainer.state.fn == "fit")


def check_has_run(strategy: Any, checkpoint: Mapping[str, Any], path: Any) -> None:
    """Refuse to go on with a run that a checkpoint does not have: Lightning finds out when weights have changed.

    Only fit() goes on with one. What a user's own `on_load_checkpoint` may add is not asked for.

    Raises:
        CheckpointError: says what is missing, and how to begin with the weights alone.
    """
    if not _resumes_fit(strategy):
        return
    missing = [key for key in ("optimizer_states", "lr_schedulers") if key not in checkpoint]
    trainer = strategy.lightning_module.trainer
    hooked = (trainer.lightning_module, trainer.datamodule, *trainer.callbacks)
    if missing and not any(overrides(one, ("on_load_checkpoint",)) for one in hooked):
        raise CheckpointError(
            f"{path} has weights, but no {' and no '.join(missing)}: fit(ckpt_path=...) goes on with a run, and needs "
            "them; nothing was changed. To begin a new run with these weights, build the module by "
            "lightning_superscale.load_from_checkpoint(ModuleClass, path) and call fit() without ckpt_path."
        )


def refuse_others_of(io: Any, path: Any) -> None:
    """Refuse a checkpoint that Lightning's own IO can't read and UniversalCheckpointIO can.

    Args:
        io: the strategy's; one of a user's own may read anything.

    Raises:
        CheckpointError: names the format, and the plugin that reads it.
    """
    path = str(path)
    if type(io).__name__ != "TorchCheckpointIO" or is_remote(path) or not os.path.exists(path):
        return
    kind = "universal checkpoint" if is_checkpoint(path) else detect(path)
    if kind != "lightning":
        raise CheckpointError(
            f"{path} is a checkpoint of another format ({kind}), which Lightning's TorchCheckpointIO does not read. "
            "Pass plugins=[lightning_superscale.UniversalCheckpointIO()] to the Trainer."
        )


def before_step(io: UniversalCheckpointIOMixin, closure: Callable[[], Any]) -> Callable[[], Any]:
    """A closure that runs `closure` and then `io.before_step`, so that weights and states may change."""

    def evaluated() -> Any:
        result = closure()
        io.before_step()
        return result

    return evaluated
