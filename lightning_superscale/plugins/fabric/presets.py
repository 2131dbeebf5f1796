"""Defaults-only variants of Fabric's strategy, as those of the Trainer's in trainer/presets.py."""

from __future__ import annotations

from lightning_superscale.plugins.defaults import with_defaults
from lightning_superscale.plugins.fabric.strategy import FabricStrategyMixin


@with_defaults(zero=2, offload="superoffload")
class FabricSuperOffloadStrategyMixin(FabricStrategyMixin):
    """Master weights, optimizer states and the optimizer step in host memory; the device keeps weights.

    Its arguments are those of SuperScaleStrategy; only defaults differ.
    """


@with_defaults(zero=2, offload="zenflow")
class FabricZenFlowStrategyMixin(FabricStrategyMixin):
    """The most important columns step on the device at every step, the others on the host every few steps (ZenFlow).

    Its arguments are those of SuperScaleStrategy; only defaults differ.
    """


@with_defaults(zero=3)
class FabricZeroStrategyMixin(FabricStrategyMixin):
    """Optimizer states, gradients and weights sharded over ranks (ZeRO), everything on the device.

    Its arguments are those of SuperScaleStrategy; only defaults differ.
    """
