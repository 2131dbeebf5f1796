"""Publish-before-forward gates: a module's forward waits until the weights it owns have arrived.

[Note: Which gate] Every read of a parameter waits by itself ([Note: Watched weights] in optim/weights/watch.py). A gate
waits a little before, once for all weights of a module, so that the operations of its forward cost nothing. What no
operation of Python's reads, only a gate can guard: a gate at the owning module where a C++ extension gets the weights
inside of that module's forward, and the root gate, at the start of the training step, where it gets them elsewhere. The
gate of each unit is chosen by observation: a unit starts at the root gate, and leaves it once a gradient of each of its
parameters was explained, by a module that owns the parameter and ran in that step, or by a read that was seen. A unit
with a gradient that nothing explains stays at the root gate for good.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_superscale.optim.transport import Transport
from lightning_superscale.optim.unit import ShardUnit
from lightning_superscale.timeline import UNTIMED, DeviceWaits


class PublishGates:
    """Forward pre-hooks of one model over one transport.

    Args:
        root: the module whose submodules own the transport's parameters.
        per_module: False keeps every unit at the root gate (compiled models: a hook per module would
            break their graphs).

        waits: measures the device's waits at modules' gates.

    Attributes:
        waited_seconds: seconds that modules' gates kept the host inside forward, so far.
    """

    def __init__(
        self, root: nn.Module, transport: Transport, *, per_module: bool, waits: DeviceWaits = UNTIMED.waits
    ) -> None:
        self.waited_seconds = 0.0
        self._waits = waits
        self._transport = transport
        self._hooks: list[RemovableHandle] = []
        self._owners: dict[nn.Parameter, list[nn.Module]] = {}
        self._entered: set[nn.Module] = set()
        self._explained: set[nn.Parameter] = set()
        self._read_elsewhere: set[nn.Parameter] = set()
        self._at_modules: set[int] = set()
        self._at_root_for_good: set[int] = set()
        self._is_per_module = per_module
        if not per_module:
            return
        for module in root.modules():
            units: dict[int, ShardUnit] = {}
            # A compiled TorchScript module runs its submodules without their hooks.
            for param in module.parameters(recurse=isinstance(module, torch.jit.ScriptModule)):
                place = transport.place_of(param)
                if place is not None:
                    units[place[0].index] = place[0]
                    self._owners.setdefault(param, []).append(module)
            if units:
                self._hooks.append(module.register_forward_pre_hook(self._hook(tuple(units.values()))))
        for param in self._owners:
            if not param.requires_grad:
                continue  # a frozen one with states of a checkpoint, whose unit stays at the root gate
            self._hooks.append(param.register_post_accumulate_grad_hook(self._observe))  # type: ignore[no-untyped-call]

    def _hook(self, units: tuple[ShardUnit, ...]) -> Callable[[nn.Module, object], None]:
        def wait(module: nn.Module, _inputs: object) -> None:
            self._entered.add(module)
            start = perf_counter()
            with self._waits.gate():
                self._transport.wait_published(units)
            self.waited_seconds += perf_counter() - start

        return wait

    def _observe(self, param: nn.Parameter) -> None:
        place = self._transport.place_of(param)
        if place is None:
            return
        unit = place[0]
        if id(param) in unit.store.watch.read:
            self._read_elsewhere.add(param)
        if param in self._read_elsewhere or any(owner in self._entered for owner in self._owners[param]):
            self._explained.add(param)
            if unit.index not in self._at_modules and self._explained.issuperset(unit.params):
                self._at_modules.add(unit.index)
        else:
            self._at_root_for_good.add(unit.index)

    def is_at_modules(self, unit: ShardUnit) -> bool:
        """Whether the gates of the unit's modules guard it, so that the root gate does not wait for it."""
        return unit.index in self._at_modules and unit.index not in self._at_root_for_good

    def enter_step(self) -> None:
        """Pass the root gate: wait for every unit that its modules' gates don't guard."""
        self._entered.clear()
        at_root = [unit for unit in self._transport.units if not self.is_at_modules(unit)]
        self._transport.wait_published(at_root)
        if self._is_per_module:
            for unit in at_root:
                if unit.index not in self._at_root_for_good:
                    unit.store.watch.observe()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
