"""Defaults-only variants of the strategy: the same class with another default, under a name of its own."""

from __future__ import annotations

from lightning_superscale.plugins.defaults import with_defaults
from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin


@with_defaults(zero=2, offload="superoffload")
class SuperOffloadStrategyMixin(SuperScaleStrategyMixin):
    """Master weights, optimizer states and the optimizer step in host memory; the device keeps weights.

    On several ranks, masters, states and gradients are sharded (zero=2), so that no step is done twice.

    Its arguments are those of SuperScaleStrategy; only defaults differ.
    """


@with_defaults(zero=2, offload="zenflow")
class ZenFlowStrategyMixin(SuperScaleStrategyMixin):
    """The most important columns step on the device at every step, the others on the host every few steps (ZenFlow).

    Its result is another than AdamW's: steps of the host's columns are few, and late. On several ranks, masters, states
    and gradients are sharded (zero=2).

    Its arguments are those of SuperScaleStrategy; only defaults differ.
    """


@with_defaults(zero=3)
class ZeroStrategyMixin(SuperScaleStrategyMixin):
    """Optimizer states, gradients and weights sharded over ranks (ZeRO), everything on the device.

    Its arguments are those of SuperScaleStrategy; only defaults differ.
    """
