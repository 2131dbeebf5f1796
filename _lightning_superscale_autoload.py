"""Registers lightning-superscale's strategy names as soon as Lightning is imported. Standard library only.

torch calls `install()` at the end of `import torch`, through the `torch.backends` entry point. That hook
is meant for device backends; it is the only one that runs before Lightning checks a strategy's name. So
the hook must never fail, and it must cost nothing: it adds a finder that waits for Lightning's strategies
module and leaves every other import to the finders behind it. `LSS_AUTOLOAD=0` switches it off.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

_WATCHED = (
    "lightning.pytorch.strategies",
    "pytorch_lightning.strategies",
    "lightning.fabric.strategies",
    "lightning_fabric.strategies",
)


def _register(strategies_module: str) -> None:
    try:
        from lightning_superscale.plugins.registry import register_with

        register_with(strategies_module.removesuffix(".strategies"))
    except Exception as error:
        if os.environ.get("LSS_AUTOLOAD_DEBUG"):
            print(f"lightning-superscale could not register with {strategies_module}: {error!r}", file=sys.stderr)


class _RegisteringLoader(importlib.abc.Loader):
    """Runs the real loader of a strategies module, then registers the strategy names with it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        _register(module.__name__)


class _StrategiesFinder(importlib.abc.MetaPathFinder):
    """Finds only Lightning's strategies modules, through the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec  # type: ignore[no-any-return]
        return None


def install() -> None:
    """Register the names with every Lightning that is imported already, or once it will be. Never raises."""
    try:
        if os.environ.get("LSS_AUTOLOAD", "1") == "0" and "lightning_superscale" not in sys.modules:
            return
        for name in _WATCHED:
            if name in sys.modules:
                _register(name)
        if not any(isinstance(finder, _StrategiesFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _StrategiesFinder())
    except Exception as error:
        if os.environ.get("LSS_AUTOLOAD_DEBUG"):
            print(f"lightning-superscale could not install its autoload: {error!r}", file=sys.stderr)
