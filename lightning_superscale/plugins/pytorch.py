"""The plugins for `lightning.pytorch` ([Note: Two namespaces])."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy

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
