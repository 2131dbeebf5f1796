"""Optimizer states of a checkpoint for the optimizers of this run, matched by the names of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.checkpoint.state import MASTER, MODEL, RULE_STATE, TensorKey
from lightning_superscale.comm.dtensor import local_rows
from lightning_superscale.errors import CheckpointError, SuperScaleError
from lightning_superscale.layout.box import Box, whole_box
from lightning_superscale.layout.rows import ParamSlice
from lightning_superscale.offload.engine import left_behind_by
from lightning_superscale.optim.engine import OptimizerEngine
from lightning_superscale.run.state.collect import canonical
from lightning_superscale.run.state.lazy_tensor import LazyTensor
from lightning_superscale.run.state.restore import fill, read_boxes, read_whole


def has_names(packed: Mapping[str, Any]) -> bool:
    """Whether torch's packed state names the parameters that it numbers."""
    return all("param_names" in group for group in packed["param_groups"])


def by_name(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Torch's packed state with its parameters named instead of numbered."""
    name_of = {
        number: name
        for group in packed["param_groups"]
        for number, name in zip(group["params"], group.get("param_names", group["params"]), strict=True)
    }
    groups = [
        {**{k: v for k, v in group.items() if k != "param_names"}, "params": [name_of[n] for n in group["params"]]}
        for group in packed["param_groups"]
    ]
    return {"state": {name_of[number]: state for number, state in packed["state"].items()}, "param_groups": groups}


def renumbered(packed: Mapping[str, Any], names: tuple[str, ...], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state for one that may number the same parameters otherwise, without this package's masters.

    Args:
        packed: torch's packed state, each group with "param_names".
        names: the names of `optimizer`'s parameters, in its order.

    Raises:
        CheckpointError: other groups of parameters.
    """
    saved, names = by_name(packed), tuple(map(canonical, names))
    iterator = iter(range(len(names)))
    own_numbers = [[next(iterator) for _ in group["params"]] for group in optimizer.param_groups]
    check_groups(saved, [[names[n] for n in numbers] for numbers in own_numbers], optimizer)
    number_of = {name: number for number, name in enumerate(names)}
    states = {
        number_of[name]: {key: value for key, value in state.items() if key != MASTER}
        for name, state in saved["state"].items()
    }
    groups = []
    for theirs, own, numbers in zip(saved["param_groups"], optimizer.param_groups, own_numbers, strict=True):
        named = {"param_names": own["param_names"]} if "param_names" in own else {}
        groups.append({**theirs, "params": numbers, **named})
    return {"state": {number: state for number, state in states.items() if state}, "param_groups": groups}


def check_groups(saved: Mapping[str, Any], own: list[list[str]], optimizer: Optimizer) -> None:
    """Compare the parameter groups of a checkpoint with an optimizer's.

    Args:
        own: the names of the optimizer's parameters, by group.

    Raises:
        CheckpointError: the checkpoint has other groups; says what differs.
    """
    theirs = [list(group["params"]) for group in saved["param_groups"]]
    if [sorted(group) for group in theirs] == [sorted(group) for group in own]:
        return
    sizes = f"{[len(group) for group in theirs]} parameters in the checkpoint and {[len(group) for group in own]} here"
    differing = sorted({*(n for g in theirs for n in g)} ^ {*(n for g in own for n in g)})
    which = f"; only one side has {', '.join(differing[:5])}" if differing else "; parameters changed their groups"
    raise CheckpointError(
        f"the parameter groups of {type(optimizer).__name__} differ: {sizes}{which}. Build the optimizer as it was "
        "when it was saved."
    )


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter's first name, as checkpoints have it."""
    return {param: canonical(name) for name, param in module.named_parameters()}


def _saved_for(optimizer: Optimizer, packed: Mapping[str, Any], name_of: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Torch's packed state by name, once its parameter groups were found to be the optimizer's.

    Raises:
        CheckpointError: other groups of parameters.
    """
    saved = by_name(packed)
    check_groups(saved, [[name_of[param] for param in group["params"]] for group in optimizer.param_groups], optimizer)
    return saved


def _take_groups(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Set the options of an optimizer's groups to the saved ones; its parameters stay."""
    for theirs, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group.update({key: value for key, value in theirs.items() if key != "params"})


def load_placed_states(optimizer: Optimizer, packed: Mapping[str, Any], name_of: Mapping[nn.Parameter, str]) -> None:
    """Load a checkpoint's states into a torch optimizer, each placed as its parameter is. Every rank calls it.

    Raises:
        CheckpointError: other groups of parameters; nothing was changed.
    """
    saved = _saved_for(optimizer, packed, name_of)
    targets: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for theirs, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        has_steps_on_device = bool(theirs.get("fused") or theirs.get("capturable"))
        for param in group["params"]:
            for key, value in saved["state"].get(name_of[param], {}).items():
                if key == MASTER:
                    continue
                if isinstance(value, Tensor):
                    at = f"{name_of[param]} {key}"
                    values[at] = value
                    value = targets[at] = _place_for(value, key, param, has_steps_on_device=has_steps_on_device)
                states.setdefault(param, {})[key] = value
    fill(targets, values)
    _take_groups(optimizer, saved)
    optimizer.state.clear()
    for param, state in states.items():
        optimizer.state[param] = state


def _place_for(value: Tensor, key: str, param: nn.Parameter, *, has_steps_on_device: bool) -> Tensor:
    """Memory for a state where torch has it: beside its parameter, and sharded like it where it has its shape."""
    if key != "step" and tuple(value.shape) == tuple(param.shape):
        return torch.empty_like(param.detach(), dtype=value.dtype)
    device = param.device if key != "step" or has_steps_on_device else torch.device("cpu")
    return torch.empty(tuple(value.shape), dtype=value.dtype, device=device)


def check_optimizer_states(
    module: nn.Module, optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a checkpoint's states that are of other parameter groups than the optimizers', before anything changes.

    Args:
        states: torch's packed state of each optimizer, whole or lazy.

    Raises:
        CheckpointError: other groups of parameters; says what differs.
    """
    name_of = names_of(module)
    for optimizer, saved in zip(optimizers, states, strict=True):
        if has_names(saved):
            _saved_for(optimizer, saved, name_of)
            continue
        here, there = ([len(group["params"]) for group in of["param_groups"]] for of in (vars(optimizer), saved))
        if here != there:
            raise CheckpointError(
                f"the parameter groups of {type(optimizer).__name__} differ: {there} parameters in the checkpoint and "
                f"{here} here. Build the optimizer as it was when it was saved."
            )


def load_optimizer_states(
    engine_of: Callable[[Optimizer], OptimizerEngine | None],
    optimizers: Sequence[Optimizer],
    states: Sequence[Mapping[str, Any]],
    fqn_of: Mapping[nn.Parameter, str],
    offload: str | None = None,
) -> None:
    """Load a checkpoint's state of each optimizer, in the order of `configure_optimizers`. Every rank calls it.

    Args:
        offload: the offload engine that steps them; None for none.
        engine_of: finds the engine that steps an optimizer; gives None for an optimizer without one.
        states: torch's packed states, whole or lazy; none where they were taken out of the checkpoint so that
            optimizers start over.

    Warns:
        UserWarning: another offload engine wrote the checkpoint, and something of it is dropped.

    Raises:
        SuperScaleError: another number of optimizers, or other parameter groups.
    """
    if not states:
        return
    if len(states) != len(optimizers):
        raise SuperScaleError(
            f"the checkpoint has states of {len(states)} optimizers, configure_optimizers returned {len(optimizers)}."
        )
    for optimizer, saved in zip(optimizers, states, strict=True):
        engine = engine_of(optimizer)
        state, weights_lag = without_left_behind(
            saved, offload, tells=engine is None or engine.ranks.mesh.world.rank == 0
        )
        if engine is None:
            optimizer.load_state_dict(dict(read_whole(state)))
        elif has_names(state):
            load_engine_state(engine, state, fqn_of)
        else:
            engine.load_state_dict(state)
        if engine is not None and weights_lag:
            engine.follow_masters()


def without_left_behind(packed: Mapping[str, Any], own: str | None, *, tells: bool) -> tuple[Mapping[str, Any], bool]:
    """Take out of torch's packed state what only an offload engine that the run does not have can go on from.

    Args:
        own: the run's offload engine; None for none.
        tells: whether this rank warns.

    Returns:
        the state, and whether masters have updates that weights lack.

    Warns:
        UserWarning: something is dropped; says what, and what to do.
    """
    rule = packed.get(RULE_STATE, {})
    left = left_behind_by(rule, own)
    if not left:
        return packed, False
    for one in left.values():
        if tells and one.dropped is not None:
            warnings.warn(one.dropped, stacklevel=2)
    keys = frozenset(key for one in left.values() for key in one.keys)
    states = {
        param: {key: value for key, value in state.items() if key not in keys}
        for param, state in packed["state"].items()
    }
    rest = {name: value for name, value in rule.items() if name.partition(".")[0] not in left}
    return {**packed, "state": states, RULE_STATE: rest}, any(one.weights_lag for one in left.values())


def load_engine_state(engine: OptimizerEngine, packed: Mapping[str, Any], fqn_of: Mapping[nn.Parameter, str]) -> None:
    """Load a checkpoint's state of an optimizer into its engine, this rank's rows of each tensor. Every rank calls it.

    A master weight that the checkpoint lacks is read from the checkpoint's fp32 weight, if it has one.

    Raises:
        CheckpointError: other groups of parameters; nothing was changed.
    """
    saved = _saved_for(engine.optimizer, packed, fqn_of)
    wanted: list[tuple[LazyTensor, Box, Tensor]] = []
    opened = next((v.opened for s in saved["state"].values() for v in s.values() if isinstance(v, LazyTensor)), None)
    states = {}
    for param in engine.params():
        state = dict(saved["state"].get(fqn_of[param], {}))
        is_stepped = bool(state) or param.requires_grad  # what is frozen gets no states of its fp32 weight
        if is_stepped and MASTER not in state and opened is not None and param.dtype != torch.float32:
            weight = TensorKey(MODEL, fqn_of[param])
            if weight in opened.source.tensors and opened.source.tensors[weight].dtype == torch.float32:
                state[MASTER] = opened.lazy(weight)
        states[param] = {
            key: _wanted(value, key, param, engine.piece_of(param), wanted) for key, value in state.items()
        }
    read_boxes(wanted, opened)
    _take_groups(engine.optimizer, saved)
    engine.take_states({p: state for p, state in states.items() if state}, packed.get(RULE_STATE, {}))


def _wanted(
    value: Any,
    key: str,
    param: nn.Parameter,
    piece: ParamSlice | None,
    wanted: list[tuple[LazyTensor, Box, Tensor]],
) -> Any:
    """The value of a state in this run: for a lazy tensor, memory for this rank's part, whose read joins `wanted`."""
    if not isinstance(value, LazyTensor):
        return value
    shape = tuple(value.shape)
    if piece is None or key == "step" or shape != tuple(param.shape):
        out = torch.empty(shape, dtype=value.dtype)
        wanted.append((value, whole_box(shape), out))
        return out
    out = torch.empty(piece.local_shape, dtype=value.dtype)
    if out.numel():
        wanted.append((value, Box(local_rows(out, piece, param).offset, tuple(out.shape)), out))
    return out
