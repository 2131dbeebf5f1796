"""Frozen settings that users fill in, from Python or YAML, and their validation.

Arguments that take a config object also take a mapping with the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Optional, TypeVar, Union  # noqa: F401 # fields' annotations are read here

from lightning_superscale.config.checkpoint import CheckpointConfig
from lightning_superscale.config.offload import ENGINES, OffloadConfig
from lightning_superscale.config.values import (  # noqa: F401 # likewise
    Between,
    ModuleNames,
    PositiveInt,
    Share,
    ThreadCount,
    shown,
)
from lightning_superscale.config.zero import Stage, ZeroConfig  # noqa: F401
from lightning_superscale.errors import SettingError, did_you_mean

__all__ = [
    "CheckpointConfig",
    "OffloadConfig",
    "ZeroConfig",
    "config_from_mapping",
    "resolve_checkpoint",
    "resolve_offload",
    "resolve_zero",
]

_C = TypeVar("_C")

# Pickles and torch's list of safe globals know a class by its module. A checkpoint that holds a config as a
# hyperparameter names this module, so that the class's own file may change.
for _config in (CheckpointConfig, OffloadConfig, ZeroConfig):
    _config.__module__ = __name__


def config_from_mapping(config_class: type[_C], values: Mapping[str, Any], where: str) -> _C:
    """Build a config from a mapping, refusing keys that it does not have.

    Args:
        config_class: a dataclass of this module.
        values: the config's fields, by name.
        where: name of the mapping, for messages.

    Raises:
        SettingError: a key is unknown, or a value is not allowed; names an unknown key, the known keys and the
            closest one.
    """
    known = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise SettingError(
                f"{where} has no key {shown(key)}: expected one of {', '.join(map(repr, known))}"
                f"{did_you_mean(str(key), known)}"
            )
    return config_class(**values)


def resolve_zero(value: Union[int, ZeroConfig, Mapping[str, Any]]) -> ZeroConfig:
    """The ZeroConfig of a stage, a config object or a mapping.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    if isinstance(value, ZeroConfig):
        return value
    if isinstance(value, Mapping):
        return config_from_mapping(ZeroConfig, value, "zero")
    if isinstance(value, int) and not isinstance(value, bool):
        return ZeroConfig(stage=value)
    raise SettingError(f"zero takes 0, 1, 2, 3, a ZeroConfig or a mapping, found {shown(value)}.")


def resolve_offload(value: Union[str, OffloadConfig, Mapping[str, Any], None]) -> OffloadConfig | None:
    """The OffloadConfig of an engine's name, a config object or a mapping; None, for no offloading, stays None.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    if value is None or isinstance(value, OffloadConfig):
        return value
    if isinstance(value, Mapping):
        return config_from_mapping(OffloadConfig, value, "offload")
    if isinstance(value, str):
        return OffloadConfig(engine=value)
    raise SettingError(
        f"offload takes None, {', '.join(map(repr, ENGINES))}, an OffloadConfig or a mapping, found {shown(value)}."
    )


def resolve_checkpoint(value: Union[CheckpointConfig, Mapping[str, Any], None]) -> CheckpointConfig:
    """The CheckpointConfig of a config object or a mapping; the default one for None.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    if value is None:
        return CheckpointConfig()
    if isinstance(value, CheckpointConfig):
        return value
    if isinstance(value, Mapping):
        return config_from_mapping(CheckpointConfig, value, "checkpoint")
    raise SettingError(f"checkpoint takes None, a CheckpointConfig or a mapping, found {shown(value)}.")
