"""Builds a LightningModule from a checkpoint of any format and layout, without a Trainer, ranks or a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar, Union

import torch

from lightning_superscale.config.values import check_arguments
from lightning_superscale.errors import CheckpointError
from lightning_superscale.plugins.checkpoint.hyper_parameters import refuse_named_code
from lightning_superscale.plugins.lightning_private import load_state_of
from lightning_superscale.run.state.restore import as_lightnings, open_any, read_whole

M = TypeVar("M")


def load_from_checkpoint(
    module_class: type[M],
    path: Union[str, os.PathLike[str]],
    *,
    map_location: Any = "cpu",
    strict: bool = True,
    hparams: Mapping[str, Any] | None = None,
) -> M:
    """Build a LightningModule (or LightningDataModule) from a checkpoint's hyperparameters and load its weights.

    It is `LightningModule.load_from_checkpoint` for every format that UniversalCheckpointIO reads. Optimizer states are
    not read, and no pickle is executed. Nothing that the hyperparameters name is imported or called, unless it was
    listed with `torch.serialization.add_safe_globals`.

    Args:
        module_class: the class to build.
        path: the checkpoint: a file, a directory or a remote address.
        map_location: device of the weights.
        strict: whether the checkpoint must have exactly the module's names.
        hparams: arguments of the class, which take precedence over the checkpoint's.

    Raises:
        CheckpointError: no checkpoint, a format that is not known, damage, or hyperparameters that name code.
        SettingError: a `strict` that is neither true nor false, or hparams that are no mapping.
    """
    check_arguments("load_from_checkpoint", load_from_checkpoint, strict=strict, hparams=hparams)
    load_state = _load_state_of(module_class)
    checkpoint = as_lightnings(open_any(os.fspath(path)))
    refuse_named_code(checkpoint, module_class, hparams or {}, os.fspath(path))
    checkpoint["state_dict"] = read_whole(checkpoint.get("state_dict", {}))
    checkpoint.pop("optimizer_states", None)
    loaded: M = load_state(module_class, checkpoint, strict=strict, **(hparams or {}))
    return loaded.to(torch.device(map_location)) if isinstance(loaded, torch.nn.Module) else loaded


def _load_state_of(module_class: type) -> Any:
    """The function with which the Lightning that the class comes from builds a module of a checkpoint."""
    for base in module_class.__mro__:
        if base.__name__ in ("LightningModule", "LightningDataModule"):
            package = "pytorch_lightning" if base.__module__.startswith("pytorch_lightning") else "lightning.pytorch"
            return load_state_of(package)
    raise CheckpointError(
        f"{module_class.__name__} is no LightningModule or LightningDataModule, so a checkpoint can't build it."
    )
