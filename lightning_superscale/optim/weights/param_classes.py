"""The classes of watched tensors: one for ordinary times, and one whose operations wait for new values first.

See [Note: Watched weights] in watch.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_superscale.comm.dtensor import write_whole
from lightning_superscale.optim.weights.sharded_operations import operate
from lightning_superscale.torch_private import (
    has_own_torch_function,
    no_torch_function,
    operations_without_reads,
    plainly,
    tree_leaves,
    tree_map,
)

# DTensor's own methods, which hand the parameter to an autograd function instead of an operation.
_READING_METHODS = ("to_local", "full_tensor", "redistribute")

_READS_NOTHING = operations_without_reads()

_data: Any = Tensor.data  # the descriptor, which torch's stubs declare as a tensor


class Watcher(Protocol):
    """Is told what happens to the parameters of one unit."""

    def forget(self, param: Tensor) -> None:
        """Watch a parameter no longer, which has its own class again."""

    def on_read(self, param: Tensor) -> None:
        """Wait for a parameter that is about to be read or written. Any thread may call it."""

    def note_edit(self, param: Tensor) -> None:
        """Note that code may change a parameter without raising its version."""


watcher_of: dict[int, Watcher] = {}
"""By id of the parameter, as long as a unit holds it."""


def set_data(param: Tensor, value: Tensor) -> None:
    """Do `param.data = value` for this package, which is no edit and waits for nothing."""
    plainly(_data.__set__, param, value)


def data_ptr_of(tensor: Tensor) -> int:
    """The address of a watched tensor's first element; waits for nothing."""
    return int(plainly(tensor.data_ptr))


@functools.cache
def watched_classes(cls: type[Any]) -> tuple[type[Any], type[Any]]:
    """Two subclasses of a tensor class: one for ordinary times, and one for the time in which reads wait.

    The former runs operations as `cls` does, at the same cost, and notes uses of `param.data`.
    """
    if hasattr(cls, "plain_class"):
        return watched_classes(cls.plain_class)
    quiet = _quiet_class(cls)
    return quiet, _late_class(cls, quiet)


def _subclass(base: type[Any], cls: type[Any], members: dict[str, Any]) -> type[Any]:
    # Without slots of its own, so that its instances have the layout that instances of `cls` have.
    return type(
        cls.__name__, (base,), {"__slots__": (), "__module__": cls.__module__, "__doc__": cls.__doc__, **members}
    )


def _quiet_class(cls: type[Any]) -> type[Any]:
    def as_plain(name: str) -> Callable[..., Any]:
        """The class's own method, which makes a copy: of the class that the parameter has outside of a run."""

        def method(self: Any, *args: Any) -> Any:
            _on_read(self)
            watched, self.__class__ = type(self), cls
            known = vars(self).pop("name_of_weight", None)  # no business of a copy's, nor of a file's
            try:
                made = getattr(self, name)(*args)
            finally:
                self.__class__ = watched
                if known is not None:
                    self.name_of_weight = known
            return follow(made, known) if known is not None and type(made) is DTensor else made

        return method

    def read_data(self: Any) -> Any:
        _note_edit(self)
        data = _data.__get__(self)
        return follow(data, name_of_weight(self)) if type(data) is DTensor else data

    def write_data(self: Any, value: Tensor) -> None:
        _note_edit(self)
        if isinstance(self, DTensor):  # the shards' memory is FSDP2's, which would not see that they have another
            _on_read(self)
            with torch.no_grad():
                self.copy_(value) if isinstance(value, DTensor) else write_whole(self, value)
        else:
            _data.__set__(self, value)

    copying = {name: as_plain(name) for name in ("__deepcopy__", "__reduce_ex__")}
    # Results of operations on a subclass of plain tensors would be of the subclass.
    handler: dict[str, Any] = {"__torch_function__": no_torch_function()} if cls is Tensor else {}
    if issubclass(cls, DTensor):
        handler = {"__torch_function__": classmethod(_on_shards), "name_of_weight": ""}
    return _subclass(cls, cls, {**copying, **handler, "data": property(read_data, write_data), "plain_class": cls})


def _on_shards(
    quiet: type[Any], func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """Run an operation on sharded weights; see [Note: Operations on shards]. What comes of it is known by a weight."""
    kwargs = kwargs or {}
    if func in _READS_NOTHING:  # first, because engines and FSDP2 ask for such things many times per step
        return plainly(func, *args, **kwargs)
    result = operate(func, args, kwargs, name_of_weight)
    name = next((name for arg in tree_leaves((args, kwargs)) if (name := name_of_weight(arg))), "")
    return tree_map(lambda value: follow(value, name) if type(value) is DTensor else value, result) if name else result


def follow(value: DTensor, name: str) -> DTensor:
    """A DTensor, known from now on as one that comes of the sharded weight of this name."""
    found: Any = value
    found.__class__ = watched_classes(DTensor)[0]
    found.name_of_weight = name
    return value


def name_of_weight(value: object) -> str:
    """The name of the sharded weight that a tensor is or comes of; "" for all else."""
    return getattr(value, "name_of_weight", "") if isinstance(value, DTensor) else ""


def _late_class(cls: type[Any], quiet: type[Any]) -> type[Any]:
    # An operation handler of the class's own may do more than the operation, so all wait.
    reads_nothing = frozenset() if has_own_torch_function(cls) else operations_without_reads()

    def torch_function(
        late: type[Any], func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in reads_nothing:
            return plainly(func, *args, **kwargs)
        _on_read((args, kwargs))
        return func(*args, **kwargs)

    def reading(name: str) -> Callable[..., Any]:
        method = getattr(cls, name)

        @functools.wraps(method)
        def read_first(self: Any, *args: Any, **kwargs: Any) -> Any:
            _on_read(self)
            return method(self, *args, **kwargs)

        return read_first

    methods = {name: reading(name) for name in _READING_METHODS if hasattr(cls, name)}
    handler = {"__torch_function__": classmethod(torch_function), "waits_for_reads": True}
    return _subclass(quiet, cls, {**handler, **methods})


def _on_read(args: Any) -> None:
    for arg in tree_leaves(args):
        if getattr(type(arg), "waits_for_reads", False):
            watcher = watcher_of.get(id(arg))
            if watcher is None:
                arg.__class__ = type(arg).plain_class
            else:
                watcher.on_read(arg)


def _note_edit(param: Any) -> None:
    watcher = watcher_of.get(id(param))
    if watcher is not None:
        watcher.note_edit(param)
