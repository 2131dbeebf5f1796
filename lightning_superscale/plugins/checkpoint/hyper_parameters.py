"""Refuses hyperparameters that would make Lightning import or call what a checkpoint names.

[Note: Names in hyperparameters] LightningCLI saves beside hyperparameters the function that built the module
(`_instantiator`) and the module's class (`_class_path`). When a module is built from them, jsonargparse imports every
`class_path` in the values, constructs it, and looks up strings where a parameter is a function or a class. So each name
must be of the class that the caller builds, of a value that the caller passes, or of an object that the caller listed
with `torch.serialization.add_safe_globals`, as for all other code that a checkpoint names. Names are compared with what
is imported already; nothing is imported to find out.
"""

from __future__ import annotations

import argparse
import enum
import importlib.machinery
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_superscale.errors import CheckpointError

_INSTANTIATOR, _CLASS_PATH = "_instantiator", "_class_path"
# Keys under which releases of Lightning before 1.0 saved hyperparameters; Lightning still merges them.
_OLD_KEYS = ("hparams", "module_arguments")
_OF_LIGHTNING = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
_CONTAINERS = (DictConfig, ListConfig, dict)
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_SIMPLE = (str, int, float, bool, complex, bytes, type(None), Path)


def refuse_named_code(checkpoint: Mapping[str, Any], module_class: Any, given: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint whose hyperparameters name code that the caller did not list.

    Args:
        checkpoint: Lightning's dict.
        module_class: the LightningModule or LightningDataModule that is built from it.
        given: arguments that the caller passes, which take precedence over the checkpoint's.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: names the code, its place, and how to list it.
    """
    trusted = _Trusted((module_class, *_listed_by_the_user()))
    _check_type(checkpoint.get(module_class.CHECKPOINT_HYPER_PARAMS_TYPE), trusted, path)
    for key in (*_OLD_KEYS, module_class.CHECKPOINT_HYPER_PARAMS_KEY):
        found = _plain(checkpoint.get(key, {}))
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path}: {key} should be a mapping of hyperparameters, found {type(found)}.")
        where = f"{path}: {key}"
        instantiator = given.get(_INSTANTIATOR, found.get(_INSTANTIATOR))
        if instantiator is None:
            continue
        if _INSTANTIATOR not in given and instantiator not in _OF_LIGHTNING and not trusted.has(instantiator):
            raise _refused(f"{where}/{_INSTANTIATOR}", instantiator)
        builds = found.get(_CLASS_PATH, given.get(_CLASS_PATH))
        if _CLASS_PATH in found and _CLASS_PATH not in given and not trusted.has(builds):
            raise _refused(f"{where}/{_CLASS_PATH}", builds)
        hints = _hints(trusted.resolve(builds) or module_class)
        for name, value in found.items():
            if name not in given and name not in (_INSTANTIATOR, _CLASS_PATH):
                for place, code in _named(value, hints.get(name), f"{where}/{name}", trusted):
                    raise _refused(place, code)


def _check_type(found: Any, trusted: _Trusted, path: str) -> None:
    """Refuse a class of hyperparameters, which Lightning calls, other than those that Lightning saves."""
    if found is None or isinstance(found, str) or found in _CONTAINERS or trusted.is_in(found):
        return
    raise _refused(f"{path}: the type of its hyperparameters", f"{found.__module__}.{found.__qualname__}")


def _plain(value: Any) -> Any:
    """Containers of omegaconf and namespaces as dicts and lists; other values as they are."""
    if isinstance(value, (DictConfig, ListConfig)):
        try:
            return OmegaConf.to_container(value, resolve=True)  # as the building of the module will see it
        except OmegaConfBaseException:
            return OmegaConf.to_container(value, resolve=False)
    return vars(value) if isinstance(value, argparse.Namespace) else value


def _refused(place: str, name: Any) -> CheckpointError:
    return CheckpointError(
        f"{place} names {name!r}, which building the module would import or call. Nothing that a checkpoint names is "
        "run unless you list it, so nothing was built. If you trust it, import it and call "
        "torch.serialization.add_safe_globals([...]) with it, or pass the argument yourself with hparams={...}; "
        f"hparams={{{_INSTANTIATOR!r}: None}} passes the values to the class as they are."
    )


def _listed_by_the_user() -> tuple[Any, ...]:
    entries = torch.serialization.get_safe_globals()
    return tuple(entry[0] if isinstance(entry, tuple) else entry for entry in entries)


@dataclass(frozen=True, slots=True)
class _Trusted:
    """The objects that the caller listed."""

    objects: tuple[Any, ...]

    def is_in(self, found: Any) -> bool:
        return any(found is one for one in self.objects)

    def has(self, name: Any) -> bool:
        return self.resolve(name) is not None

    def resolve(self, name: Any) -> Any:
        """The listed object of a name, in full, or as an imported module re-exports it; None where there is none."""
        if not isinstance(name, str):
            return None
        for one in self.objects:
            module, qualified = getattr(one, "__module__", None), getattr(one, "__qualname__", None)
            if qualified is not None and name in (f"{module}.{qualified}", qualified):
                return one
        found = _imported(name)
        return found if found is not None and self.is_in(found) else None


def _imported(name: str) -> Any:
    """The object of a dotted name, as far as its module is imported already; None otherwise. Runs no code."""
    module, _, attribute = name.rpartition(".")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None


@dataclass(frozen=True, slots=True)
class _Hint:
    """What the annotation of a parameter says about strings that are given for it.

    Attributes:
        is_simple: they stay strings.
        is_any: they stay strings, but mappings and YAML with a `class_path` become objects.
    """

    is_simple: bool
    is_any: bool


_UNTYPED = _Hint(is_simple=False, is_any=True)


def _hints(owner: Any) -> dict[str, _Hint]:
    """The hints of a class's or function's parameters, by name."""
    function = inspect.getattr_static(owner, "__init__") if isinstance(owner, type) else owner
    try:
        annotations = typing.get_type_hints(function)
        names = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError, AttributeError):  # annotations that can't be resolved here
        return {}
    return {
        name: _Hint(_is_simple(annotations[name]), annotations[name] in (Any, object))
        if name in annotations
        else _UNTYPED
        for name in names
    }


def _is_simple(hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, tuple, dict, set, Sequence, Mapping):
        return all(one is Ellipsis or _is_simple(one) for one in inside)
    if origin is not None or not isinstance(hint, type):
        return False
    return hint in _SIMPLE or hint in (list, dict, tuple, set) or issubclass(hint, enum.Enum)


def _named(value: Any, hint: _Hint | None, place: str, trusted: _Trusted) -> Iterator[tuple[str, str]]:
    """The places and names of code in a value that is not listed.

    Args:
        hint: None where the annotation is unknown; strings may be names then.
    """
    if hint is not None and hint.is_simple:
        return
    value = _plain(value)
    if isinstance(value, Mapping) and "class_path" in value:
        yield from _named_in_class(value, place, trusted)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, hint, f"{place}/{key}", trusted)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for i, item in enumerate(value):
            yield from _named(item, hint, f"{place}[{i}]", trusted)
    elif isinstance(value, str):
        yield from _named_in_text(value, hint, place, trusted)


def _named_in_class(value: Mapping[str, Any], place: str, trusted: _Trusted) -> Iterator[tuple[str, str]]:
    """As `_named`, for a mapping that jsonargparse makes an object of."""
    cls = trusted.resolve(value["class_path"])
    if cls is None:
        yield f"{place}/class_path", str(value["class_path"])
    hints = _hints(cls)
    for key, item in value.items():
        arguments = _plain(item)
        if key in ("init_args", "dict_kwargs") and isinstance(arguments, Mapping):
            for name, argument in arguments.items():
                yield from _named(argument, hints.get(name), f"{place}/{key}/{name}", trusted)
        elif key != "class_path":
            yield from _named(item, None, f"{place}/{key}", trusted)


def _named_in_text(text: str, hint: _Hint | None, place: str, trusted: _Trusted) -> Iterator[tuple[str, str]]:
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, (dict, list)):
        yield from _named(parsed, hint, place, trusted)
        return
    if hint is not None and hint.is_any:
        return
    if _may_be_code(text, is_typed=hint is not None) and not trusted.has(text):
        yield place, text


def _may_be_code(text: str, *, is_typed: bool) -> bool:
    """Whether jsonargparse may look a string up: the name of an object, or a file that it would read."""
    if not _DOTTED.fullmatch(text):
        return os.path.isfile(text)
    top, dot, _ = text.partition(".")
    if not dot:
        return is_typed  # the short name of a class that is imported
    return top in sys.modules or importlib.machinery.PathFinder.find_spec(top) is not None
