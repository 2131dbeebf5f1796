"""The JSON form of a checkpoint's values beside tensors: numbers, strings, containers, and a fixed list of other types.

A value of a type that JSON lacks becomes an object {"$": tag, ...}; the tags are listed in docs/checkpoint-format.md.
Tensors go into the data files, and the JSON holds their names. Nothing is pickled: a class is only looked up by name in
`torch.serialization.get_safe_globals()`, where users list the classes that they trust.
"""

from __future__ import annotations

import argparse
import base64
import collections
import dataclasses
import datetime
import enum
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from torch import Tensor

from lightning_superscale.checkpoint.format.malformed import malformed_as_error
from lightning_superscale.errors import CheckpointError

_TAG = "$"
_FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "bool": bool}
_PLAIN = (type(None), bool, int, str)


def encode(value: object, where: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a value into JSON that `decode` turns back.

    Args:
        value: the value.
        where: place of the value, such as "rest", for messages and for the names of tensors within it.
        tensors: takes each tensor that is found, by its name; a detached view of it, not a copy.

    Raises:
        CheckpointError: names the place of a value that can't be saved, and what to do.
    """
    return _Encoder(tensors).encode(value, where)


def decode(value: Any, where: str, tensor: Callable[[str], Tensor]) -> Any:
    """Turn JSON that `encode` made back into the value.

    Args:
        value: JSON that `encode` returned.
        where: place of the value, such as "rest", for messages.
        tensor: returns the tensor of a name.

    Raises:
        CheckpointError: a tag or class is not known here, or the value has a form that `encode` never makes; names the
            place, and what to do.
    """
    with malformed_as_error(f"{where} is no value of a checkpoint"):
        return _decode(value, where, tensor)


def _decode(value: Any, where: str, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, f"{where}[{i}]", tensor) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item, f"{where}/{key}", tensor) for key, item in value.items()}
    tag = value[_TAG]
    if not isinstance(tag, str) or tag not in _DECODERS:
        raise CheckpointError(f"{where} is of kind {tag!r}, which this version does not know. Upgrade.")
    try:
        return _DECODERS[tag](value, where, tensor)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{where} is no valid {tag!r}: {error!r}") from error


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


# Lightning saves the class of hyperparameters beside them; these two are the classes of omegaconf's.
_KNOWN_CLASSES = {_class_name(cls): cls for cls in (DictConfig, ListConfig)}


def _class_form(cls: type) -> dict[str, Any] | None:
    """The JSON form of a class; None for a class that loading would refuse."""
    name = _class_name(cls)
    is_trusted = any(cls is (e[0] if isinstance(e, tuple) else e) for e in torch.serialization.get_safe_globals())
    return {_TAG: "class", "v": name} if name in _KNOWN_CLASSES or is_trusted else None


def _safe_class(name: str, where: str) -> Any:
    """The trusted class of a name.

    Raises:
        CheckpointError: no class of that name is trusted; says how to trust one.
    """
    for entry in torch.serialization.get_safe_globals():
        cls = entry[0] if isinstance(entry, tuple) else entry
        if isinstance(cls, type) and _class_name(cls) == name:
            return cls
    short = name.rsplit(":", 1)[-1]
    raise CheckpointError(
        f"{where} is a {name.replace(':', '.')}, and loading constructs no class that was not named as safe. If you "
        f"trust it, call torch.serialization.add_safe_globals([{short}]) before loading."
    )


class _Encoder:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._open: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
        simple = _simple(value)
        if simple is None and isinstance(value, type):
            simple = _class_form(value)
        if simple is not None:
            return simple
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if id(value) in self._open:
            raise CheckpointError(f"{where} contains itself, which can't be saved. Keep it out of the checkpoint.")
        self._open.add(id(value))
        try:
            return self._container(value, where)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any, where: str) -> Any:
        kind = type(value)
        if kind is list:
            return self._items(value, where)
        if kind is dict:
            if all(type(key) is str for key in value) and _TAG not in value:
                return {key: self.encode(item, f"{where}/{key}") for key, item in value.items()}
            return {_TAG: "dict", "v": self._pairs(value, where)}
        if kind in (tuple, collections.deque):
            extra = {"maxlen": value.maxlen} if kind is collections.deque else {}
            return {_TAG: kind.__name__, "v": self._items(value, where), **extra}
        if kind in (set, frozenset):
            return {_TAG: kind.__name__, "v": sorted(self._items(value, where), key=repr)}
        if kind in (collections.OrderedDict, collections.Counter):
            return {_TAG: kind.__name__, "v": self._pairs(value, where)}
        if kind is collections.defaultdict:
            factory = getattr(value.default_factory, "__name__", None)
            if factory is not None and _FACTORIES.get(factory) is not value.default_factory:
                raise _refusal(where, f"a defaultdict that makes {factory}", f"its factory is one of {[*_FACTORIES]}")
            return {_TAG: "defaultdict", "factory": factory, "v": self._pairs(value, where)}
        if kind is argparse.Namespace:
            return {_TAG: "namespace", "v": self._pairs(vars(value), where)}
        return self._object(value, where)

    def _object(self, value: Any, where: str) -> Any:
        kind = type(value)
        if isinstance(value, enum.Enum):
            return {_TAG: "enum", "class": _class_name(kind), "name": value.name}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return {_TAG: "namedtuple", "class": _class_name(kind), "v": self._items(value, where)}
        if isinstance(value, Container):
            if OmegaConf.get_type(value) not in (dict, list):
                raise _refusal(where, "a structured OmegaConf config", "OmegaConf.to_container() makes a dict of it")
            plain = OmegaConf.to_container(value, resolve=False)
            flags = {flag: value._get_flag(flag) for flag in ("struct", "readonly")}
            return {_TAG: "omegaconf", "v": self.encode(plain, where), **flags}
        if dataclasses.is_dataclass(value):
            fields = [field.name for field in dataclasses.fields(value)]
            if not all(field.init for field in dataclasses.fields(value)) or _attributes_beside(value, fields):
                raise _refusal(where, f"a {_class_name(kind)}", "a dataclass has no more state than its init fields")
            return {
                _TAG: "dataclass",
                "class": _class_name(kind),
                "v": {name: self.encode(getattr(value, name), f"{where}/{name}") for name in fields},
            }
        name = _class_name(kind).replace(":", ".")
        raise _refusal(where, f"a {name}", "it is made of numbers, strings and containers")

    def _items(self, values: Any, where: str) -> list[Any]:
        return [self.encode(item, f"{where}[{i}]") for i, item in enumerate(values)]

    def _pairs(self, mapping: Any, where: str) -> list[list[Any]]:
        return [
            [self.encode(key, f"{where}: the key {key!r}"), self.encode(item, f"{where}/{key}")]
            for key, item in mapping.items()
        ]

    def _tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
            raise _refusal(where, f"a {type(value).__name__} with layout {value.layout}", "it is a plain dense tensor")
        if value.is_meta:
            raise _refusal(where, "a tensor on the meta device", "it has values")
        name, count = where, 1
        while name in self._tensors:
            name, count = f"{where}~{count}", count + 1
        self._tensors[name] = value.detach()
        kind = "parameter" if isinstance(value, torch.nn.Parameter) else "tensor"
        return {_TAG: kind, "name": name, **({"grad": True} if value.requires_grad else {})}


def _attributes_beside(value: Any, fields: list[str]) -> set[str]:
    """Attributes of an object that are none of its fields."""
    return set(getattr(value, "__dict__", {})) - set(fields)


def _refusal(where: str, what: str, so_that: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is {what}, which a checkpoint can't hold, as nothing in it is pickled. Change it so that {so_that}, "
        "or keep it out of the state (of hyperparameters: save_hyperparameters(ignore=[...]))."
    )


def _simple(value: Any) -> dict[str, Any] | None:
    """The JSON form of a value without parts; None for all others."""
    kind = type(value)
    if kind in (bytes, bytearray):
        return {_TAG: kind.__name__, "v": base64.b64encode(value).decode()}
    if kind is complex:
        return {_TAG: "complex", "v": [repr(value.real), repr(value.imag)]}
    if isinstance(value, pathlib.PurePath):
        return {_TAG: "path", "v": str(value)}
    if kind in (datetime.datetime, datetime.date, datetime.time):
        if getattr(value, "tzinfo", None) is None or type(value.tzinfo) is datetime.timezone:
            return {_TAG: kind.__name__, "v": value.isoformat()}
    elif kind is datetime.timedelta:
        return {_TAG: "timedelta", "v": [value.days, value.seconds, value.microseconds]}
    elif kind is slice and all(type(part) in _PLAIN for part in (value.start, value.stop, value.step)):
        return {_TAG: "slice", "v": [value.start, value.stop, value.step]}
    elif kind is range:
        return {_TAG: "range", "v": [value.start, value.stop, value.step]}
    return _simple_of_libraries(value)


def _simple_of_libraries(value: Any) -> dict[str, Any] | None:
    kind = type(value)
    if isinstance(value, (np.generic, np.ndarray)) and kind in (np.ndarray, value.dtype.type):
        if value.dtype.kind in "biufcSUMm":
            data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            name = "numpy" if kind is np.ndarray else "numpy scalar"
            return {_TAG: name, "dtype": value.dtype.str, "shape": list(value.shape), "v": data}
    elif kind is torch.Size:
        return {_TAG: "size", "v": list(value)}
    elif kind is torch.device:
        return {_TAG: "device", "v": str(value)}
    elif kind is torch.dtype:
        return {_TAG: "dtype", "v": str(value).removeprefix("torch.")}
    elif kind.__module__ == "torch.torch_version":
        return {_TAG: "torch version", "v": str(value)}
    return None


def _decode_tensor(value: dict[str, Any], tensor: Callable[[str], Tensor]) -> Tensor:
    found = tensor(value["name"])
    if value[_TAG] == "parameter":
        return torch.nn.Parameter(found, requires_grad=value.get("grad", False))
    return found.requires_grad_() if value.get("grad", False) else found


def _decode_array(value: dict[str, Any]) -> Any:
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise ValueError("an array of objects")
    array = np.frombuffer(base64.b64decode(value["v"]), dtype).reshape(value["shape"]).copy()
    return array if value[_TAG] == "numpy" else array[()]


def _decode_enum(value: dict[str, Any], where: str) -> Any:
    return _safe_class(value["class"], where)[value["name"]]


def _decode_dtype(value: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, value["v"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {value['v']}")
    return dtype


def _decode_config(value: dict[str, Any], content: Any) -> Any:
    config = OmegaConf.create(content)
    for flag in ("struct", "readonly"):
        if value.get(flag) is not None:
            config._set_flag(flag, value[flag])
    return config


_Decoder = Callable[[dict[str, Any], str, Callable[[str], Tensor]], Any]


def _with_items(make: Callable[[dict[str, Any], Any], Any]) -> _Decoder:
    """A decoder that decodes the parts in `v`, and makes the value of them."""
    return lambda value, where, tensor: make(value, _decode(value["v"], where, tensor))


def _with_class(make: Callable[[Any, Any], Any]) -> _Decoder:
    """A decoder that looks the class up before it decodes the parts in `v`, as a refused class must make nothing."""
    return lambda value, where, tensor: make(_safe_class(value["class"], where), _decode(value["v"], where, tensor))


_DECODERS: dict[str, _Decoder] = {
    "dict": _with_items(lambda _, v: dict(v)),
    "tuple": _with_items(lambda _, v: tuple(v)),
    "set": _with_items(lambda _, v: set(v)),
    "frozenset": _with_items(lambda _, v: frozenset(v)),
    "deque": _with_items(lambda value, v: collections.deque(v, maxlen=value["maxlen"])),
    "OrderedDict": _with_items(lambda _, v: collections.OrderedDict(v)),
    "Counter": _with_items(lambda _, v: collections.Counter(dict(v))),
    "defaultdict": _with_items(
        lambda value, v: collections.defaultdict(None if value["factory"] is None else _FACTORIES[value["factory"]], v)
    ),
    "namespace": _with_items(lambda _, v: argparse.Namespace(**dict(v))),
    "omegaconf": _with_items(_decode_config),
    "namedtuple": _with_class(lambda cls, v: cls(*v)),
    "dataclass": _with_class(lambda cls, v: cls(**v)),
    "class": lambda value, where, _: _KNOWN_CLASSES.get(value["v"]) or _safe_class(value["v"], where),
    "enum": lambda value, where, _: _decode_enum(value, where),
    "tensor": lambda value, _, tensor: _decode_tensor(value, tensor),
    "parameter": lambda value, _, tensor: _decode_tensor(value, tensor),
    "float": lambda value, _, __: float(value["v"]),
    "complex": lambda value, _, __: complex(*map(float, value["v"])),
    "bytes": lambda value, _, __: base64.b64decode(value["v"]),
    "bytearray": lambda value, _, __: bytearray(base64.b64decode(value["v"])),
    "path": lambda value, _, __: pathlib.Path(value["v"]),
    "datetime": lambda value, _, __: datetime.datetime.fromisoformat(value["v"]),
    "date": lambda value, _, __: datetime.date.fromisoformat(value["v"]),
    "time": lambda value, _, __: datetime.time.fromisoformat(value["v"]),
    "timedelta": lambda value, _, __: datetime.timedelta(*value["v"]),
    "slice": lambda value, _, __: slice(*value["v"]),
    "range": lambda value, _, __: range(*value["v"]),
    "numpy": lambda value, _, __: _decode_array(value),
    "numpy scalar": lambda value, _, __: _decode_array(value),
    "size": lambda value, _, __: torch.Size(value["v"]),
    "device": lambda value, _, __: torch.device(value["v"]),
    "dtype": lambda value, _, __: _decode_dtype(value),
    "torch version": lambda value, _, __: str(value["v"]),
}
