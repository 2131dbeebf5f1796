"""Packs an optimizer's state into torch's own format, whole or this rank's rows of it, and unpacks it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_superscale.comm.communicator import Communicator
from lightning_superscale.comm.dtensor import gather_rows, join_parts, local_rows, local_shard, take_rows
from lightning_superscale.errors import SuperScaleError
from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.optim.step_rule import RuleState

MASTER_KEY = "master_param"
# An entry beside "state" and "param_groups", present where a rule keeps a state of its own.
RULE_STATE_KEY = "rule_state"

_kept: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()


class StateHolder(Protocol):
    """The members of an optimizer engine that packing and unpacking use."""

    optimizer: Optimizer
    ranks: Communicator

    def params(self) -> Iterator[nn.Parameter]: ...
    def piece_of(self, param: nn.Parameter) -> ParamSlice | None: ...
    def master_of(self, param: nn.Parameter) -> Tensor | None: ...
    def load_param_state(self, param: nn.Parameter, state: Mapping[str, Any], master: Tensor | None) -> None: ...
    def rule_state(self) -> RuleState: ...
    def load_rule_state(self, saved: RuleState) -> None: ...


def keep_rule_state(optimizer: Optimizer, state: RuleState) -> None:
    """Let `optimizer.state_dict()` have the rule's own state from now on; an empty one removes an earlier one."""
    old = _kept.pop(optimizer, None)
    if old is not None:
        old.remove()
    if state:
        packed = _packed_rule_state(state)

        def add(optimizer: Optimizer, own: dict[str, Any]) -> None:
            own.update(packed)

        _kept[optimizer] = optimizer.register_state_dict_post_hook(add)


def _packed_rule_state(state: RuleState) -> dict[str, Any]:
    """The RULE_STATE_KEY entry of a packed state, tensors copied to the host; no entry for an empty state."""
    if not state:
        return {}
    return {RULE_STATE_KEY: {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in state.items()}}


def pack_state(engine: StateHolder) -> dict[str, Any]:
    """`optimizer.state_dict()` in torch's own format, with each parameter's fp32 master beside its moments.

    A plain optimizer loads it and ignores the masters. Every rank calls it; where states are sharded,
    tensors are whole on rank 0, which writes the checkpoint, and absent on the others.
    """
    packed: dict[str, Any] = engine.optimizer.state_dict()
    states: dict[int, dict[str, Any]] = {index: dict(state) for index, state in packed["state"].items()}
    for index, param in enumerate(engine.params()):
        master = engine.master_of(param)
        if master is not None:
            states.setdefault(index, {})[MASTER_KEY] = master
    if engine.ranks.mesh.num_shares > 1:
        states = _whole(engine, states)
    packed["state"] = states
    return {**packed, **_packed_rule_state(engine.rule_state())}


def pack_local_state(engine: StateHolder, name_of: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """`optimizer.state_dict()` with parameters by name, and of each tensor this rank's rows (`LocalBox`).

    No rank waits for another. Tensors that do not have the shape of the parameter's rows, and all tensors of parameters
    in no unit, are as the optimizer has them.

    Args:
        name_of: names of the module's parameters, by the objects that they are now: sharding and its end replace them.
    """
    packed: dict[str, Any] = engine.optimizer.state_dict()
    params = list(engine.params())
    states: dict[str, dict[str, Any]] = {}
    for index, param in enumerate(params):
        state, master, piece = dict(packed["state"].get(index, {})), engine.master_of(param), engine.piece_of(param)
        if master is not None:
            state[MASTER_KEY] = master
        if piece is not None:
            state = {
                key: local_rows(value, piece, param) if key != "step" and _is_rows(value, piece) else value
                for key, value in state.items()
            }
        if state:
            states[name_of[param]] = state
    names = [name_of[param] for param in params]
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in packed["param_groups"]]
    return {"state": states, "param_groups": groups, **_packed_rule_state(engine.rule_state())}


def _whole(engine: StateHolder, states: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    is_first = engine.ranks.mesh.world.rank == 0
    whole: dict[int, dict[str, Any]] = {}
    for index, param in enumerate(engine.params()):
        state, piece = states.get(index), engine.piece_of(param)
        if state is None:
            continue
        if piece is None or not piece.spec.shape:
            gathered = state  # rank 0 holds the only row of a scalar
        else:
            gathered = {
                key: _gathered(engine.ranks, value, piece, param) if _is_rows(value, piece) else value
                for key, value in state.items()
            }
        if is_first:
            whole[index] = gathered
    return whole


def _gathered(ranks: Communicator, rows: Tensor, piece: ParamSlice, param: nn.Parameter) -> Tensor:
    return join_parts(ranks.tensor, gather_rows(ranks.shard, rows, piece, param.device), param)


def _is_rows(value: Any, piece: ParamSlice) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == piece.local_shape


def unpack_state(engine: StateHolder, packed: Mapping[str, Any]) -> None:
    """Load a state that `pack_state()` packed at any number of ranks, or a plain optimizer's of the same type.

    Raises:
        SuperScaleError: parameter groups of other sizes.
    """
    name = type(engine.optimizer).__name__
    groups, own_groups = packed["param_groups"], engine.optimizer.param_groups
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own_groups]:
        raise SuperScaleError(
            f"the checkpoint's {name} has parameter groups of {[len(g['params']) for g in groups]} parameters, "
            f"this run's has {[len(g['params']) for g in own_groups]}. Build the optimizer as it was when it was saved."
        )
    for group, own_group in zip(groups, own_groups, strict=True):
        own_group.update({key: value for key, value in group.items() if key != "params"})
    saved_index = [index for group in groups for index in group["params"]]
    engine.optimizer.state.clear()
    for index, param in zip(saved_index, engine.params(), strict=True):
        saved = packed["state"].get(index)
        if saved is not None:
            _load_one(engine, param, saved)
    engine.load_rule_state(packed.get(RULE_STATE_KEY, {}))


def _load_one(engine: StateHolder, param: nn.Parameter, saved: Mapping[str, Any]) -> None:
    piece = engine.piece_of(param)
    rest = {key: value for key, value in saved.items() if key != MASTER_KEY}
    master = saved.get(MASTER_KEY)
    if piece is None:
        engine.load_param_state(param, rest, master)
        return

    def local(key: str, value: Any) -> Any:
        is_rows = isinstance(value, Tensor) and key != "step" and value.shape == param.shape
        return take_rows(local_shard(value, param), piece) if is_rows else value

    rows = {key: local(key, value) for key, value in rest.items()}
    engine.load_param_state(param, rows, None if master is None else take_rows(local_shard(master, param), piece))
