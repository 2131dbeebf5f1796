"""Lets the forward of single modules run through a function: their hooks stay outside, names and state dicts too."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class Rerouting:
    """Modules of one purpose whose forward runs through a function of their own, until they are released.

    Modules get a subclass of their class, as fully_shard gives them: hooks run around it, and once. Copies and pickles
    know nothing of it.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
        # Of one class for each, so that modules of one class remain that.
        self._class_of = functools.cache(self._make_class)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._calls

    def reroute(self, module: nn.Module, call: Callable[..., Any]) -> Callable[[], None]:
        """Run a module's forward through `call`, which gets the plain forward and the arguments.

        Returns:
            what gives the module its own class back; it holds the module weakly.
        """
        cls: Any = type(module)
        self._calls[module] = call
        module.__class__ = self._class_of(cls)
        reference = weakref.ref(module)

        def release() -> None:
            found = reference()
            if found is not None:
                self._calls.pop(found, None)
                if type(found) is self._class_of(cls):
                    found.__class__ = cls

        return release

    def _make_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        calls = self._calls

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            plain = functools.partial(cls.forward, self)
            call = calls.get(self)
            return plain(*args, **kwargs) if call is None else call(plain, *args, **kwargs)

        def reduce(self: nn.Module, protocol: Any) -> Any:
            """As the module's own class does: copies and files know nothing of a run."""
            rerouted, self.__class__ = type(self), cls
            try:
                return self.__reduce_ex__(protocol)
            finally:
                self.__class__ = rerouted

        members = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
        return type(cls.__name__, (cls,), {**members, "__qualname__": cls.__qualname__})
