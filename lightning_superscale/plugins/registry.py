"""Strategy names, and their registration with whichever Lightning is imported.

Registry values are factories, so that the package's plugins are imported only when a name is chosen.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

# Lightning's import name -> the module of this package that binds the plugins to it.
BINDINGS = {
    "lightning.pytorch": "lightning_superscale.plugins.pytorch",
    "pytorch_lightning": "lightning_superscale.plugins.pytorch_lightning",
}

# Fabric's import name -> the module of this package that binds the plugins to it.
FABRIC_BINDINGS = {
    "lightning.fabric": "lightning_superscale.plugins.fabric.lightning",
    "lightning_fabric": "lightning_superscale.plugins.fabric.lightning_fabric",
}

# Name -> class, its arguments, and its description in the registry.
STRATEGY_NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "superscale": (
        "SuperScaleStrategy",
        {},
        "One strategy for sharding, offload and precision; defaults to plain training",
    ),
    "superoffload": ("SuperOffloadStrategy", {}, "Optimizer states and step in host memory"),
    "zenflow": ("ZenFlowStrategy", {}, "Important columns stepped at once, the others on the host every few steps"),
    "zero1": ("ZeroStrategy", {"zero": 1}, "Optimizer states sharded over ranks"),
    "zero2": ("ZeroStrategy", {"zero": 2}, "Optimizer states and gradients sharded over ranks"),
    "zero3": ("ZeroStrategy", {"zero": 3}, "Optimizer states, gradients and weights sharded over ranks"),
}


class LazyStrategy:
    """A registry value: builds the class it names, importing it first."""

    def __init__(self, binding: str, class_name: str) -> None:
        self.binding = binding
        self.class_name = class_name

    def __call__(self, **init_params: Any) -> Any:
        return getattr(importlib.import_module(self.binding), self.class_name)(**init_params)


def register_with(lightning_name: str) -> None:
    """Add our names to the registry of one imported Lightning or Fabric. Calling it again changes nothing."""
    strategies = sys.modules[f"{lightning_name}.strategies"]
    is_fabric = lightning_name in FABRIC_BINDINGS
    registry = strategies.STRATEGY_REGISTRY if is_fabric else strategies.StrategyRegistry
    binding = (FABRIC_BINDINGS if is_fabric else BINDINGS)[lightning_name]
    for name, (class_name, init_params, description) in STRATEGY_NAMES.items():
        factory = LazyStrategy(binding, class_name)
        if name not in registry:
            registry.register(name, factory, description=description, **init_params)
        # The CLI's `--trainer.strategy package.Class` is looked up here too, in lower case.
        for key in (f"lightning_superscale.{class_name}".lower(), f"{binding}.{class_name}".lower()):
            if key not in registry:
                registry.register(key, factory, description=description)
        for method in ("spawn", "fork"):
            if f"{name}_{method}" not in registry:
                registry.register(
                    f"{name}_{method}", factory, description=description, start_method=method, **init_params
                )


def binding_module() -> Any:
    """The plugins for the Lightning in use: the one that is imported, `lightning.pytorch` if both or none are."""
    return _first_imported(BINDINGS)


def fabric_binding_module() -> Any:
    """The plugins for the Fabric in use: the one that is imported, `lightning.fabric` if both or none are."""
    return _first_imported(FABRIC_BINDINGS)


def _first_imported(bindings: dict[str, str]) -> Any:
    name = next((name for name in bindings if f"{name}.strategies" in sys.modules), next(iter(bindings)))
    return importlib.import_module(bindings[name])
