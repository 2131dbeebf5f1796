"""Sees every operation of torch, and says which actor reads and writes which memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.races.clocks import Actor, join
from tests.races.world import World, is_plain, where_am_i

# Operations for whose result the host waits.
_SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
# Operations that touch no memory.
_BOOKKEEPING = {
    "aten::_has_compatible_shallow_copy_type", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::is_same_size",
    "aten::set_",
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where an operation runs.

    Attributes:
        time: the number of this deed of its actor.
        is_mixed: whether it reads or writes both memories.
        given: ids of the allocations that it was given.
    """

    actor: Actor
    time: int
    is_on_host: bool
    is_mixed: bool
    given: set[int]


class Watching(TorchDispatchMode):
    """While open, records what the calling thread's operations touch."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _BOOKKEEPING or func.is_view or not name.startswith("aten::"):
            return func(*args, **kwargs)
        world, where = self._world, where_am_i(name.removeprefix("aten::"))
        with world.lock:
            place = self._place(func, args, kwargs, where)
        made_on_host = world.making_host_memory() if place.is_on_host else contextlib.nullcontext()
        with made_on_host:  # without the lock: threads of torch that free memory may wait for it
            out = func(*args, **kwargs)
            with world.lock:
                self._note_results(out, place, where, is_filled="empty" not in name)
        waits = name in _SYNCHRONIZING or (place.is_mixed and not _is_non_blocking(func, args, kwargs))
        if waits and not place.is_on_host:
            with world.lock:
                join(world.thread.clock, place.actor.clock)
        return out

    def _place(self, func: Any, args: Any, kwargs: Any, where: str) -> _Place:
        """Say where an operation runs, and note what it reads and writes."""
        world = self._world
        reads, writes = _tensors_of(func, args, kwargs)
        given = [*reads, *writes]
        known = {id(t): world.allocation_of(t, where) for t in given}
        # Scalars of the host go along with a launch, so they don't decide where an operation runs.
        deciding = [a for t, a in ((t, known[id(t)]) for t in given) if not (a.is_on_host and t.dim() == 0)]
        hosts = [a for a in deciding if a.is_on_host]
        devices = [a for a in deciding if not a.is_on_host]
        is_scalar_of_host = not deciding and (bool(given) or _makes_scalar(func, args, kwargs))
        is_on_host = is_scalar_of_host or (not devices and (bool(hosts) or world.makes_host_memory))
        actor: Actor = world.thread if is_on_host else world.stream
        if not is_on_host:
            world.launch(actor)
            for t in writes:
                if known[id(t)].is_on_host and t.dim() == 0:  # it was the device's all along
                    known[id(t)].is_on_host, known[id(t)].owner = False, actor
        time = actor.tick()
        name = func._schema.name
        touched = [t for t in reads if "_like" not in name and (is_on_host or t.dim() or not known[id(t)].is_on_host)]
        world.touch(actor, touched, writes, where, time=time)
        return _Place(actor, time, is_on_host, bool(hosts and devices), set(map(id, known.values())))

    def _note_results(self, out: Any, place: _Place, where: str, *, is_filled: bool) -> None:
        for t in filter(is_plain, tree_leaves(out)):
            if t.numel():
                allocation = self._world.allocation_of(t, where)
                if id(allocation) not in place.given and is_filled:
                    self._world.touch(place.actor, [], [t], where, time=place.time)


def _tensors_of(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes, by its schema."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if is_plain(t) and t.numel()]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (writes if is_written else reads).extend(tensors)
    return reads, writes


def _makes_scalar(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation without tensors makes one without dimensions, as `torch.tensor(1.0)` does on the host."""
    size = args[0] if args else kwargs.get("size")
    return isinstance(size, list | tuple | torch.Size) and len(size) == 0


def _is_non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "non_blocking":
            return bool(args[i] if i < len(args) else kwargs.get("non_blocking", False))
    return False
