"""Every rule by the name of its function. A function without a rule is refused: none computes with a part unseen."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from lightning_superscale.sequence.tokens.call import Call

Rule = Callable[[Call], Any]

_RULES: dict[str, Rule] = {}
_ROOMS = (
    "metadata",
    "elementwise",
    "views",
    "indexing",
    "along_dims",
    "products",
    "reductions",
    "losses",
    "attention",
    "refused",
)

# The first operations of a model: they take each rank's part of what every rank has.
ENTRIES = frozenset({"embedding", "linear", "layer_norm", "rms_norm", "addmm"})


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for functions of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise AssertionError(f"{name} has two rules")
            _RULES[name] = function
        return function

    return register


@functools.cache
def _load() -> None:
    for room in _ROOMS:
        importlib.import_module(f"{__package__}.{room}")


def rule_of(call: Call) -> Rule:
    """The rule of a call's function.

    Raises:
        SequenceParallelError: it has none.
    """
    return _rule_named(call.name)


@functools.cache
def _rule_named(name: str) -> Rule:
    _load()
    found = _RULES.get(name)
    if found is None and is_elementwise(name):
        found = _RULES["elementwise"]
    return found or _refuse_unknown


def _refuse_unknown(call: Call) -> Any:
    call.refuse(
        "is not known to compute each token by itself",
        "Replace it by a function that is, or compute it from whole tensors within whole_sequences().",
    )


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether torch says of a function that it treats each element by itself, and draws no random numbers."""
    for candidate in (name, name.rstrip("_")):
        packet: Any = getattr(torch.ops.aten, candidate, None)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():  # type: ignore[no-untyped-call]
            tags = getattr(packet, overload).tags
            if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
                return True
    return False
