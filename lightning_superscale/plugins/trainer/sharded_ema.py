"""ShardedEMA: an exponential moving average of the weights that every rank keeps of its own rows only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.dtensor import gather_whole, local_of, local_part, placed_like, write_local
from lightning_superscale.config.values import Between, PositiveInt, check_arguments
from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin
from lightning_superscale.torch_private import lerp_all

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object


class ShardedEMAMixin(_Base):
    """Averages the trainable weights in fp32, validates with the averages, and leaves them in the model at the end.

    It works under every strategy; with zero=3 each rank averages its own rows, so no rank holds a second whole model.
    Buffers are not averaged. A checkpoint, unless of weights only, holds whole averages, so that any number of ranks
    can resume from it.

    Args:
        decay: the average's decay per update: `average = decay * average + (1 - decay) * weight`.
        every_n_steps: optimizer steps from one update to the next.
        validates: whether validation during `fit()` runs with the averages.

    Raises:
        SettingError: a decay outside [0, 1), or an argument of another type or range.
    """

    def __init__(
        self,
        decay: Annotated[float, Between(0, 1, below=True)] = 0.999,
        every_n_steps: PositiveInt = 1,
        validates: bool = True,
    ) -> None:
        check_arguments(
            "ShardedEMA",
            ShardedEMAMixin.__init__,
            decay=decay,
            every_n_steps=every_n_steps,
            validates=validates,
        )
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.validates = validates
        self._averages: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._last_step = 0

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._averages = {fqn: local_of(param).float().clone() for fqn, param in _trainable(pl_module)}
        for fqn, param in _trainable(pl_module):
            if fqn in self._restored:
                self._averages[fqn].copy_(local_part(self._restored[fqn], param))
        self._restored, self._whole = {}, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        params = dict(_trainable(pl_module))
        for fqn in params.keys() - self._averages.keys():  # parameters that were unfrozen since the last update
            self._averages[fqn] = local_of(params[fqn]).float().clone()
        averages = [self._averages[fqn] for fqn in params]
        lerp_all(averages, [local_of(param).float() for param in params.values()], 1 - self.decay)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._whole = self._gathered(trainer, pl_module)  # a checkpoint may be saved once nothing is sharded any more
        self._write(trainer, pl_module, self._averages)
        self._averages = {}

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validates and self._averages and trainer.state.fn == "fit":
            self._kept = {fqn: local_of(param).clone() for fqn, param in _trainable(pl_module)}
            self._write(trainer, pl_module, self._averages)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept:
            self._write(trainer, pl_module, self._kept)
            self._kept = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)  # or averages would be saved as the weights

    def _write(self, trainer: Trainer, pl_module: nn.Module, rows: Mapping[str, Tensor]) -> None:
        for fqn, param in _trainable(pl_module):
            if fqn in rows:
                write_local(param, rows[fqn].to(param.dtype))
        sharded = _sharded(trainer)
        if sharded is not None:
            sharded.reshard_all()

    # Checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the averages, whole and fp32 on the host, into the checkpoint. Every rank calls it.

        A callback's `state_dict` gets neither the Trainer nor the module, so the averages are gathered here.
        """
        checkpoint[_KEY] = self._whole or self._gathered(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = dict(checkpoint.get(_KEY, {}))

    def _gathered(self, trainer: Trainer, pl_module: nn.Module) -> dict[str, Tensor]:
        sharded, whole = _sharded(trainer), {}
        strategy = trainer.strategy
        for fqn, param in _trainable(pl_module):
            if fqn not in self._averages:
                continue
            average = self._averages[fqn]
            if isinstance(param, DTensor) and sharded is not None and isinstance(strategy, SuperScaleStrategyMixin):
                whole[fqn] = gather_whole(strategy.ranks, fqn, placed_like(average, param))
            else:
                whole[fqn] = average.detach().cpu().clone()
        return whole


_KEY = "sharded_ema"


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(fqn, param) for fqn, param in module.named_parameters() if param.requires_grad]


def _sharded(trainer: Trainer) -> Any:
    assembly = getattr(trainer.strategy, "assembly", None)
    return None if assembly is None else assembly.sharded
