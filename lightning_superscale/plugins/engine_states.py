"""Optimizer states of a checkpoint for the optimizers of this run, matched by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.checkpoint.box import Box, whole_box
from lightning_superscale.checkpoint.state import MASTER, MODEL, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout import ParamSlice
from lightning_superscale.plugins.lazy_tensor import LazyTensor
from lightning_superscale.plugins.opened_checkpoint import fill, read_boxes
from lightning_superscale.plugins.saved_state import canonical
from lightning_superscale.zero.engine import OptimizerEngine
from lightning_superscale.zero.placed import local_rows


def has_names(packed: Mapping[str, Any]) -> bool:
    """Whether torch's packed state names the parameters that it numbers."""
    return all("param_names" in group for group in packed["param_groups"])


def by_name(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Torch's packed state with names for numbers."""
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
    """An optimizer's state for one that may number the same parameters otherwise, without masters of ours.

    Args:
        packed: torch's, each group with "param_names".
        names: of `optimizer`'s parameters, in its order.

    Raises:
        CheckpointError: other groups of parameters.
    """
    names = tuple(map(canonical, names))
    name_of = {
        number: name
        for group in packed["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    iterator = iter(range(len(names)))
    own_numbers = [[next(iterator) for _ in group["params"]] for group in optimizer.param_groups]
    theirs = [[name_of[number] for number in group["params"]] for group in packed["param_groups"]]
    check_groups(theirs, [[names[n] for n in numbers] for numbers in own_numbers], type(optimizer).__name__)
    number_of = {name: number for number, name in enumerate(names)}
    state = {
        number_of[name_of[number]]: {key: value for key, value in values.items() if key != MASTER}
        for number, values in packed["state"].items()
    }
    groups = []
    for saved, own, numbers in zip(packed["param_groups"], optimizer.param_groups, own_numbers, strict=True):
        group = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
        group["params"] = numbers
        if "param_names" in own:
            group["param_names"] = own["param_names"]
        groups.append(group)
    return {"state": {number: values for number, values in state.items() if values}, "param_groups": groups}


def check_groups(theirs: list[list[str]], own: list[list[str]], name: str) -> None:
    """Raises: CheckpointError: the checkpoint has other parameter groups; names what differs."""
    if [sorted(group) for group in theirs] == [sorted(group) for group in own]:
        return
    sizes = f"{[len(group) for group in theirs]} parameters in the checkpoint and {[len(group) for group in own]} here"
    differing = sorted({*(n for g in theirs for n in g)} ^ {*(n for g in own for n in g)})
    which = f"; only one side has {', '.join(differing[:5])}" if differing else "; parameters changed their groups"
    raise CheckpointError(
        f"the parameter groups of {name} differ: {sizes}{which}. Build the optimizer as it was when it was saved."
    )


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter's first name, as checkpoints have it."""
    return {param: canonical(name) for name, param in module.named_parameters()}


def load_placed_states(optimizer: Optimizer, packed: Mapping[str, Any], name_of: Mapping[nn.Parameter, str]) -> None:
    """Give a torch optimizer what a checkpoint has of its states, each placed as its parameter. Every rank calls it.

    Raises:
        CheckpointError: other groups of parameters; nothing was changed.
    """
    saved = by_name(packed)
    own = [[name_of[param] for param in group["params"]] for group in optimizer.param_groups]
    check_groups([list(group["params"]) for group in saved["param_groups"]], own, type(optimizer).__name__)
    targets: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        for key, value in saved["state"].get(name_of[param], {}).items():
            if key == MASTER:
                continue
            state = states.setdefault(param, {})
            if not isinstance(value, Tensor):
                state[key] = value
                continue
            is_placed = key != "step" and tuple(value.shape) == tuple(param.shape)
            like = param.detach() if is_placed else torch.empty(tuple(value.shape))
            empty = (
                torch.empty_like(like, dtype=value.dtype)
                if is_placed
                else like.new_empty(value.shape, dtype=value.dtype)
            )
            state[key] = targets[f"{len(targets)}"] = empty
            values[f"{len(values)}"] = value
    fill(targets, values)
    for theirs, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group.update({key: value for key, value in theirs.items() if key != "params"})
    optimizer.state.clear()
    for param, state in states.items():
        optimizer.state[param] = state


def load_engine_state(engine: OptimizerEngine, packed: Mapping[str, Any], fqn_of: Mapping[nn.Parameter, str]) -> None:
    """Give an engine what a checkpoint has of its optimizer: of each tensor the rows of this rank. Every rank calls it.

    A master that the checkpoint lacks is taken from an fp32 weight there.

    Raises:
        CheckpointError: other groups of parameters; nothing was changed.
    """
    saved = by_name(packed)
    own = [[fqn_of[param] for param in group["params"]] for group in engine.optimizer.param_groups]
    theirs = [list(group["params"]) for group in saved["param_groups"]]
    check_groups(theirs, own, type(engine.optimizer).__name__)
    wanted: list[tuple[LazyTensor, Box, Tensor]] = []
    opened = next((v.opened for s in saved["state"].values() for v in s.values() if isinstance(v, LazyTensor)), None)
    states = {}
    for param in engine.params():
        state = dict(saved["state"].get(fqn_of[param], {}))
        if MASTER not in state and opened is not None and param.dtype != torch.float32:
            weight = TensorKey(MODEL, fqn_of[param])
            if weight in opened.source.tensors and opened.source.tensors[weight].dtype == torch.float32:
                state[MASTER] = opened.lazy(weight)
        states[param] = {
            key: _wanted(value, key, param, engine.piece_of(param), wanted) for key, value in state.items()
        }
    read_boxes(wanted, opened)
    for saved_group, group in zip(saved["param_groups"], engine.optimizer.param_groups, strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
    engine.take_states({param: state for param, state in states.items() if state})


def _wanted(
    value: Any,
    key: str,
    param: nn.Parameter,
    piece: ParamSlice | None,
    wanted: list[tuple[LazyTensor, Box, Tensor]],
) -> Any:
    """Where a value of the checkpoint will be: this rank's rows of one that is cut as its parameter is."""
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
