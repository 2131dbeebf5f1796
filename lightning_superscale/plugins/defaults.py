"""Makes a variant of a class that differs in the defaults of its constructor alone: a preset is one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

_Class = TypeVar("_Class", bound=type)


def with_defaults(**defaults: Any) -> Callable[[_Class], _Class]:
    """Make a class decorator that gives the inherited constructor other defaults and changes nothing else.

    Raises:
        TypeError: a default for a name that is no parameter with a default; lists the parameters that are.
    """

    def decorate(cls: _Class) -> _Class:
        cls.__init__ = _with_other_defaults(cls, defaults)  # type: ignore[misc]
        return cls

    return decorate


def _with_other_defaults(cls: Any, defaults: dict[str, Any]) -> FunctionType:
    """A constructor that calls the next class's with other defaults, and shows its names, types and module as ever."""
    init = cls.__init__
    if not isinstance(init, FunctionType):
        raise TypeError(f"with_defaults expects a class with a constructor in Python, found {cls.__name__} without.")
    shown = inspect.signature(init)
    names = [param.name for param in shown.parameters.values() if param.default is not param.empty]
    unknown = [name for name in defaults if name not in names]
    if unknown:
        raise TypeError(
            f"with_defaults of {cls.__name__} expects parameters that have a default, which are {', '.join(names)}; "
            f"found {', '.join(unknown)}."
        )
    params = [param.replace(default=defaults.get(param.name, param.default)) for param in shown.parameters.values()]
    signature = shown.replace(parameters=params)
    names_self = params[0].name

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError as error:  # it names no class
            raise TypeError(f"{type(self).__name__}() {error}; its arguments are {', '.join(names)}.") from None
        given.apply_defaults()
        del given.arguments[names_self]
        super(cls, self).__init__(**given.arguments)

    # Annotations are text that is evaluated in a function's globals, so it gets those of the inherited constructor.
    shows: Any = FunctionType(__init__.__code__, init.__globals__, init.__name__, None, __init__.__closure__)
    # functools.wraps would lead inspect.signature to the constructor with the old defaults.
    shows.__module__, shows.__qualname__, shows.__doc__ = init.__module__, init.__qualname__, init.__doc__
    shows.__annotations__, shows.__signature__ = dict(init.__annotations__), signature
    return cast(FunctionType, shows)
