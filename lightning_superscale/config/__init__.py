"""Frozen settings that users fill in, from Python or YAML, and their validation.

Arguments that take a config object also take a mapping with the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, TypeVar, Union  # noqa: F401 # fields' annotations are read here

from lightning_superscale.config.checkpoint import CheckpointConfig
from lightning_superscale.config.offload import ENGINES, OffloadConfig
from lightning_superscale.config.sequence import NumBatches, SequenceConfig  # noqa: F401 # likewise
from lightning_superscale.config.values import (  # noqa: F401 # likewise
    Between,
    ModuleNames,
    PositiveInt,
    Share,
    ThreadCount,
    config_from_mapping,
    shown,
)
from lightning_superscale.config.zenflow import Factor, Steps, ZenFlowConfig  # noqa: F401
from lightning_superscale.config.zero import Stage, ZeroConfig  # noqa: F401
from lightning_superscale.errors import SettingError

_Config = TypeVar("_Config")

__all__ = [
    "CheckpointConfig",
    "OffloadConfig",
    "SequenceConfig",
    "ZenFlowConfig",
    "ZeroConfig",
    "config_from_mapping",
    "resolve_checkpoint",
    "resolve_offload",
    "resolve_sequence",
    "resolve_zero",
]

# Pickles and torch's list of safe globals know a class by its module. A checkpoint that holds a config as a
# hyperparameter names this module, so that the class's own file may change.
for _config in (CheckpointConfig, OffloadConfig, SequenceConfig, ZenFlowConfig, ZeroConfig):
    _config.__module__ = __name__


def _given(cls: type[_Config], value: object, key: str) -> _Config | None:
    """The config that a config object or a mapping with its keys is; None for anything else."""
    if isinstance(value, Mapping):
        return config_from_mapping(cls, value, key)
    return value if isinstance(value, cls) else None


def resolve_zero(value: Union[int, ZeroConfig, Mapping[str, Any]]) -> ZeroConfig:
    """The ZeroConfig of a stage, a config object or a mapping.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    given = _given(ZeroConfig, value, "zero")
    if given is not None:
        return given
    if isinstance(value, int) and not isinstance(value, bool):
        return ZeroConfig(stage=value)
    raise SettingError(f"zero takes 0, 1, 2, 3, a ZeroConfig or a mapping, found {shown(value)}.")


def resolve_offload(value: Union[str, OffloadConfig, Mapping[str, Any], None]) -> OffloadConfig | None:
    """The OffloadConfig of an engine's name, a config object or a mapping; None, for no offloading, stays None.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    given = _given(OffloadConfig, value, "offload")
    if value is None or given is not None:
        return given
    if isinstance(value, str):
        return OffloadConfig(engine=value)
    raise SettingError(
        f"offload takes None, {', '.join(map(repr, ENGINES))}, an OffloadConfig or a mapping, found {shown(value)}."
    )


def resolve_sequence(value: Union[int, SequenceConfig, Mapping[str, Any], None]) -> SequenceConfig | None:
    """The SequenceConfig of a number of ranks, a config object or a mapping; None, for no sharing, stays None.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    given = _given(SequenceConfig, value, "sequence")
    if value is None or given is not None:
        return given
    if isinstance(value, int) and not isinstance(value, bool):
        return SequenceConfig(size=value)
    raise SettingError(f"sequence takes None, a number of ranks, a SequenceConfig or a mapping, found {shown(value)}.")


def resolve_checkpoint(value: Union[CheckpointConfig, Mapping[str, Any], None]) -> CheckpointConfig:
    """The CheckpointConfig of a config object or a mapping; the default one for None.

    Raises:
        SuperScaleError: the value is of another kind, or is not allowed.
    """
    given = CheckpointConfig() if value is None else _given(CheckpointConfig, value, "checkpoint")
    if given is not None:
        return given
    raise SettingError(f"checkpoint takes None, a CheckpointConfig or a mapping, found {shown(value)}.")
