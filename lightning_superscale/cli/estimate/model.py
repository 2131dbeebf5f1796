"""Builds the model that a command line names, without memory for its weights."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_superscale.errors import SettingError, did_you_mean


def build_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device.

    Args:
        name: "package.module:Class", a function that returns a module, or a folder or config.json of a Hugging Face
            model. Modules of the working directory are found.
        arguments: keywords of the class or function.

    Raises:
        SettingError: there is no such model, or it can't be built; says why.
    """
    path = Path(name)
    if path.exists():
        return _hugging_face(path / "config.json" if path.is_dir() else path)
    module_name, separator, attribute = name.partition(":")
    if not separator or not attribute:
        raise SettingError(
            f"expected a model as package.module:Class, or a folder or config.json of a Hugging Face model; found "
            f"{name!r}, which is neither and no file. Nothing is downloaded: get the config.json of a model on the Hub "
            "first (hf download NAME config.json --local-dir FOLDER)"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingError(f"{module_name!r} of {name!r} can't be imported: {error}") from error
    finally:
        sys.path.pop(0)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SettingError(f"{module_name} has no {attribute!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    try:
        with torch.device("meta"):
            model = found(**arguments) if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:
        raise SettingError(f"{name} could not be built with {dict(arguments)}: {error!r}") from error
    if not isinstance(model, nn.Module):
        raise SettingError(f"{name} gave an object of type {type(model).__name__}; expected a torch.nn.Module")
    return model


def _hugging_face(path: Path) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise SettingError(f"{path} is a Hugging Face model's: pip install transformers") from error
    try:
        content = json.loads(path.read_text())
        config = transformers.AutoConfig.for_model(**content)
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingError(f"{path} is no config.json of a causal language model: {error}") from error
    return model
