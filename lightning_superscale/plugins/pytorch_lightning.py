"""The plugins for `pytorch_lightning` ([Note: Two namespaces])."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import DDPStrategy

from lightning_superscale.plugins.binder import CheckpointBinderMixin
from lightning_superscale.plugins.checkpoint.io import UniversalCheckpointIOMixin
from lightning_superscale.plugins.trainer.precision import SuperScalePrecisionMixin
from lightning_superscale.plugins.trainer.presets import (
    SuperOffloadStrategyMixin,
    ZenFlowStrategyMixin,
    ZeroStrategyMixin,
)
from lightning_superscale.plugins.trainer.scale_monitor.callback import ScaleMonitorMixin
from lightning_superscale.plugins.trainer.sharded_ema import ShardedEMAMixin
from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin


class SuperScalePrecision(SuperScalePrecisionMixin, Precision):
    __doc__ = SuperScalePrecisionMixin.__doc__


class UniversalCheckpointIO(UniversalCheckpointIOMixin, CheckpointIO):
    __doc__ = UniversalCheckpointIOMixin.__doc__


class SuperScaleStrategy(SuperScaleStrategyMixin, DDPStrategy):
    __doc__ = SuperScaleStrategyMixin.__doc__
    precision_class = SuperScalePrecision
    checkpoint_io_class = UniversalCheckpointIO


class SuperOffloadStrategy(SuperOffloadStrategyMixin, SuperScaleStrategy):
    __doc__ = SuperOffloadStrategyMixin.__doc__


class ZenFlowStrategy(ZenFlowStrategyMixin, SuperScaleStrategy):
    __doc__ = ZenFlowStrategyMixin.__doc__


class ZeroStrategy(ZeroStrategyMixin, SuperScaleStrategy):
    __doc__ = ZeroStrategyMixin.__doc__


class ScaleMonitor(ScaleMonitorMixin, Callback):
    __doc__ = ScaleMonitorMixin.__doc__


class ShardedEMA(ShardedEMAMixin, Callback):
    __doc__ = ShardedEMAMixin.__doc__


class CheckpointBinder(CheckpointBinderMixin, Callback):
    __doc__ = CheckpointBinderMixin.__doc__
