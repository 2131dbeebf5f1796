"""The plugins for `lightning.fabric` ([Note: Two namespaces])."""

from __future__ import annotations

from lightning.fabric.plugins.io import CheckpointIO
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import Strategy

from lightning_superscale.plugins.checkpoint.io import UniversalCheckpointIOMixin
from lightning_superscale.plugins.fabric.precision import FabricPrecisionMixin
from lightning_superscale.plugins.fabric.presets import (
    FabricSuperOffloadStrategyMixin,
    FabricZenFlowStrategyMixin,
    FabricZeroStrategyMixin,
)
from lightning_superscale.plugins.fabric.strategy import FabricStrategyMixin
from lightning_superscale.plugins.lightning_private import beside_any_backward


class SuperScalePrecision(FabricPrecisionMixin, Precision):
    __doc__ = FabricPrecisionMixin.__doc__


class UniversalCheckpointIO(UniversalCheckpointIOMixin, CheckpointIO):
    __doc__ = UniversalCheckpointIOMixin.__doc__


class SuperScaleStrategy(FabricStrategyMixin, DDPStrategy):
    __doc__ = FabricStrategyMixin.__doc__
    precision_class = SuperScalePrecision
    checkpoint_io_class = UniversalCheckpointIO
    backward = beside_any_backward(FabricStrategyMixin.backward, Strategy)


class SuperOffloadStrategy(FabricSuperOffloadStrategyMixin, SuperScaleStrategy):
    __doc__ = FabricSuperOffloadStrategyMixin.__doc__


class ZenFlowStrategy(FabricZenFlowStrategyMixin, SuperScaleStrategy):
    __doc__ = FabricZenFlowStrategyMixin.__doc__


class ZeroStrategy(FabricZeroStrategyMixin, SuperScaleStrategy):
    __doc__ = FabricZeroStrategyMixin.__doc__
