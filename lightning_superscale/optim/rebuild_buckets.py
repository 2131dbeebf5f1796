"""Moves parameters into other units and their states to other homes while training, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_superscale.optim.bucketing import Grouping, NamedParam, is_same_cut
from lightning_superscale.optim.transport import Transport
from lightning_superscale.optim.unit_state import UnitState


class RegroupedEngine(Protocol):
    """The members of an optimizer engine that `regroup` uses."""

    transport: Transport
    states: list[UnitState]

    def named_params(self) -> list[NamedParam]: ...
    def wait_idle(self) -> None: ...
    def flush(self) -> None: ...
    def start_over(self) -> None: ...
    def adopt(self, params: Sequence[nn.Parameter]) -> None: ...
    def own_state_of(self, param: nn.Parameter) -> Mapping[str, Any]: ...
    def master_of(self, param: nn.Parameter) -> Tensor | None: ...
    def load_param_state(self, param: nn.Parameter, state: Mapping[str, Any], master: Tensor | None) -> None: ...


def regroup(engine: RegroupedEngine, grouping: Grouping) -> bool:
    """Make units follow `grouping`. Every rank calls it between two steps, with an equal grouping.

    Units are made one after the other, and an old unit is freed with its last parameter, so few states exist twice.

    Returns:
        whether anything moved.
    """
    transport, named = engine.transport, engine.named_params()
    members = transport.units_of(named, grouping)
    cut = [[param for _, param in unit] for unit in members]
    if transport.grouping.on_device == grouping.on_device and is_same_cut((u.params for u in transport.units), cut):
        return False
    engine.wait_idle()
    engine.flush()
    masters = {param: engine.master_of(param) for _, param in named}
    transport.regroup(grouping)
    engine.start_over()
    for params in cut:
        engine.adopt(params)
        for param in params:
            engine.load_param_state(param, dict(engine.own_state_of(param)), masters.pop(param))
    return True
