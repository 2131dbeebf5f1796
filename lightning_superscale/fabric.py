"""The plugins for Lightning Fabric: `from lightning_superscale.fabric import SuperOffloadStrategy`.

They have the names of the Trainer's, which the package itself has; a string needs no import of either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_superscale.plugins.registry import fabric_binding_module

if TYPE_CHECKING:
    from lightning_superscale.plugins.fabric.lightning import (
        SuperOffloadStrategy,
        SuperScalePrecision,
        SuperScaleStrategy,
        UniversalCheckpointIO,
        ZenFlowStrategy,
        ZeroStrategy,
    )

__all__ = [
    "SuperOffloadStrategy",
    "SuperScalePrecision",
    "SuperScaleStrategy",
    "UniversalCheckpointIO",
    "ZenFlowStrategy",
    "ZeroStrategy",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(fabric_binding_module(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
