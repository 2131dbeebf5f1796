"""Parameters whose reads wait for the weights that are under way.

[Note: Watched weights] A step returns before its new weights have arrived, and any code may read a parameter then: a
hook, a callback, a training step that normalises a codebook before it calls the module that owns it. No list of hooks
finds every such place. So the parameter itself waits: while its new weights are under way its class is one of torch's
tensor subclasses with `__torch_function__`, which torch calls for every operation that is handed the parameter, in any
thread, whether it reads or writes. The first one waits, and gives the parameter its ordinary class back, so that later
ones cost nothing. Modules' gates (`zero/forward_gates.py`) do the same a little before, once for a whole module.

An operation sees the parameter's class only where Python hands it the parameter. Three other roads are watched apart:

- A view that user code keeps (`self.alias = layer.weight.data`) is an ordinary tensor. Its storage then has more owners
  than this package made, and the weights of such a unit are waited for at once (`zero/buckets/unit.py`).
- `param.data` gives a view whose writes raise no version of the parameter. Its use is noted, and the next step compares
  the weight with its master.
- A C++ extension that is handed a parameter outside of its module's forward. A gradient that arrives although neither
  the module ran nor a read was seen gives it away, and the unit's weights are awaited before each forward from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_superscale.forks import Origin
from lightning_superscale.ops.events import has_streams
from lightning_superscale.optim.weights.param_classes import watched_classes, watcher_of

T = TypeVar("T", bound=Tensor)


class WeightWatch(Generic[T]):
    """Lets reads of one unit's parameters wait for new weights, and notes edits that raise no version.

    Args:
        params: the unit's parameters, or other tensors whose values come late. A former watch over one of them watches
            the others only.
        wait: returns when the unit's new weights have arrived, and calls `arrived`.

    Attributes:
        is_late: whether new weights are under way.
        origin: the process for which they come; a child that is forked from it would wait in vain.
        read: ids of the parameters that were read since `observe`, or while new weights were under way.
    """

    def __init__(self, params: Sequence[T], wait: Callable[[], object]) -> None:
        self.read: set[int] = set()
        self._wait = wait
        self.is_late = False
        self._edited: set[int] = set()
        self._watched: dict[int, tuple[T, type[Any], type[Any]]] = {}
        self._is_everything_watched = True
        self._device = params[0].device if params else torch.device("cpu")
        self._reader: tuple[int, Any] | None = None
        self.origin = Origin()
        for param in params:
            before = watcher_of.get(id(param))
            if before is not None:
                before.forget(param)
            self._add(param)

    def _add(self, param: T) -> None:
        quiet, late = watched_classes(type(param))
        try:
            param.__class__ = quiet
        except TypeError:  # a class whose instances have another layout in memory
            self._is_everything_watched = False
            return
        self._watched[id(param)] = (param, quiet, late)
        watcher_of[id(param)] = self

    def forget(self, param: Tensor) -> None:
        """Watch a parameter no longer, which has its own class again."""
        if self._watched.pop(id(param), None) is not None:
            del watcher_of[id(param)]
            param.__class__ = type(param).plain_class  # type: ignore[attr-defined]

    def expect(self) -> None:
        """New weights are under way: let every read wait for them."""
        self.is_late = True
        if not self._is_everything_watched:
            self._wait()
            return
        self._reader = _reader_on(self._device)
        self._arm()

    def observe(self) -> None:
        """Note the parameters that are read from now on, each until its first read."""
        self.read.clear()
        self._arm()

    def _arm(self) -> None:
        for param, _, late in self._watched.values():
            param.__class__ = late

    def arrived(self) -> None:
        """Nothing is under way any more: reads cost what they cost without a watch."""
        self.is_late = False
        for param, quiet, _ in self._watched.values():
            param.__class__ = quiet

    def on_read(self, param: Tensor) -> None:
        """Wait for a parameter that is about to be read. Any thread may call it."""
        self.read.add(id(param))
        if not self.is_late:
            param.__class__ = self._watched[id(param)][1]
            return
        self.origin.check("a read of a tensor that is being updated")
        stranger = self._reader != _reader_on(self._device)
        self._wait()
        if stranger and has_streams(self._device):
            # The wait has ordered this thread's stream only, and the one that runs the model waits no more.
            torch.cuda.current_stream(self._device).synchronize()

    def note_edit(self, param: Tensor) -> None:
        """Note that code may change a parameter without raising its version."""
        self._edited.add(id(param))

    def is_edited(self, param: Tensor) -> bool:
        """Whether `note_edit` was called for a parameter since `take_edited`."""
        return id(param) in self._edited

    def take_edited(self) -> list[T]:
        """The parameters of `note_edit` since the last call."""
        edited, self._edited = self._edited, set()
        return [self._watched[known][0] for known in edited if known in self._watched]

    def close(self) -> None:
        """Give every parameter its own class back."""
        for param, _, _ in list(self._watched.values()):
            self.forget(param)


def _reader_on(device: torch.device) -> tuple[int, Any]:
    """The thread that runs, and its stream on the device."""
    return threading.get_ident(), torch.cuda.current_stream(device) if has_streams(device) else None
