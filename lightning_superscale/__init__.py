"""Train larger models with PyTorch Lightning by changing one string: `Trainer(strategy="superoffload")`.

Importing the package registers its strategy names; everything else is imported when first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import _lightning_superscale_autoload

if TYPE_CHECKING:
    from lightning_superscale.checkpoint.tools.newest import last_checkpoint
    from lightning_superscale.config import CheckpointConfig, OffloadConfig, SequenceConfig, ZenFlowConfig, ZeroConfig
    from lightning_superscale.errors import CheckpointError, SequenceParallelError, SuperScaleError
    from lightning_superscale.estimation.api import estimate
    from lightning_superscale.plugins.checkpoint.load_from_checkpoint import load_from_checkpoint
    from lightning_superscale.plugins.data.sampler import ResumableSampler
    from lightning_superscale.plugins.pytorch import (
        CheckpointBinder,
        ScaleMonitor,
        ShardedEMA,
        SuperOffloadStrategy,
        SuperScalePrecision,
        SuperScaleStrategy,
        UniversalCheckpointIO,
        ZenFlowStrategy,
        ZeroStrategy,
    )
    from lightning_superscale.simulation.api import simulate

__all__ = [
    "CheckpointBinder",
    "CheckpointConfig",
    "CheckpointError",
    "OffloadConfig",
    "ResumableSampler",
    "ScaleMonitor",
    "SequenceConfig",
    "SequenceParallelError",
    "ShardedEMA",
    "SuperOffloadStrategy",
    "SuperScaleError",
    "SuperScalePrecision",
    "SuperScaleStrategy",
    "UniversalCheckpointIO",
    "ZenFlowConfig",
    "ZenFlowStrategy",
    "ZeroConfig",
    "ZeroStrategy",
    "estimate",
    "last_checkpoint",
    "load_from_checkpoint",
    "simulate",
]

try:
    __version__ = version("lightning-superscale")
except PackageNotFoundError:
    __version__ = "0.0.0"

_HOMES = {
    "CheckpointConfig": "lightning_superscale.config",
    "CheckpointError": "lightning_superscale.errors",
    "OffloadConfig": "lightning_superscale.config",
    "SequenceConfig": "lightning_superscale.config",
    "SequenceParallelError": "lightning_superscale.errors",
    "ZenFlowConfig": "lightning_superscale.config",
    "ZeroConfig": "lightning_superscale.config",
    "ResumableSampler": "lightning_superscale.plugins.data.sampler",
    "SuperScaleError": "lightning_superscale.errors",
    "estimate": "lightning_superscale.estimation.api",
    "last_checkpoint": "lightning_superscale.checkpoint.tools.newest",
    "load_from_checkpoint": "lightning_superscale.plugins.checkpoint.load_from_checkpoint",
    "simulate": "lightning_superscale.simulation.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        registry = importlib.import_module("lightning_superscale.plugins.registry")
        return getattr(registry.binding_module(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_lightning_superscale_autoload.install()
