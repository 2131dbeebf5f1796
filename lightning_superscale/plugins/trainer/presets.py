"""Defaults-only variants of the strategy: the same class with another default, under a name of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from lightning_superscale.plugins.trainer.strategy import SuperScaleStrategyMixin

_Class = TypeVar("_Class", bound=type)


def with_defaults(**defaults: Any) -> Callable[[_Class], _Class]:
    """A class decorator: the constructor that the class inherits, with other defaults and nothing else changed.

    Raises:
        TypeError: the constructor has no parameter of that name with a default; names those that it has.
    """

    def decorate(cls: _Class) -> _Class:
        cls.__init__ = _with_other_defaults(cls, defaults)  # type: ignore[misc]
        return cls

    return decorate


def _with_other_defaults(cls: type, defaults: dict[str, Any]) -> FunctionType:
    """A copy of the constructor itself, so that whoever inspects it finds names, types and their module as ever.

    Its `super()` goes on behind the class that wrote it, so no class between that one and `cls` may have a constructor.
    """
    init = cls.__init__  # type: ignore[misc]
    if not isinstance(init, FunctionType):
        raise TypeError(f"with_defaults expects a class with a constructor in Python, found {cls.__name__} without.")
    params = [param for param in inspect.signature(init).parameters.values() if param.default is not param.empty]
    names = [param.name for param in params]
    unknown = [name for name in defaults if name not in names]
    if unknown:
        raise TypeError(
            f"with_defaults of {cls.__name__} expects parameters that have a default, which are {', '.join(names)}; "
            f"found {', '.join(unknown)}."
        )
    values = {param: defaults.get(param.name, param.default) for param in params}
    by_name = {param.name: value for param, value in values.items() if param.kind is param.KEYWORD_ONLY}
    by_place = tuple(value for param, value in values.items() if param.kind is not param.KEYWORD_ONLY)
    copied = FunctionType(init.__code__, init.__globals__, init.__name__, by_place, init.__closure__)
    # Not functools.wraps: that would show inspect.signature the way to the constructor with the old defaults.
    copied.__module__, copied.__qualname__, copied.__doc__ = init.__module__, init.__qualname__, init.__doc__
    copied.__annotations__, copied.__kwdefaults__ = dict(init.__annotations__), by_name
    return copied


@with_defaults(zero=2, offload="superoffload")
class SuperOffloadStrategyMixin(SuperScaleStrategyMixin):
    """Master weights, optimizer states and the optimizer step in host memory; the device keeps weights.

    On several ranks, masters, states and gradients are sharded (zero=2), so that no step is done twice.

    Args: as SuperScaleStrategy's.
    """


@with_defaults(zero=3)
class ZeroStrategyMixin(SuperScaleStrategyMixin):
    """Optimizer states, gradients and weights sharded over ranks (ZeRO), everything on the device.

    Args: as SuperScaleStrategy's.
    """
