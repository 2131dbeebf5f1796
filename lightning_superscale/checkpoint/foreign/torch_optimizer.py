"""Conversion of an optimizer's state between `torch.optim.Optimizer.state_dict()` and tensors by parameters' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.checkpoint.foreign.chunks import ForeignTensor, Table, whole_tensor
from lightning_superscale.checkpoint.state import (
    MASTER,
    RULE_STATE,
    OptimizerRecord,
    Role,
    TensorKey,
    optimizer_section,
)
from lightning_superscale.errors import CheckpointError

# States of torch's optimizers that have the parameter's shape; one of another shape shows that names are in the wrong
# order.
_PER_ELEMENT = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", MASTER}

# Shapes of the weights, by name.
Shapes = Mapping[str, tuple[int, ...]]


class NamesMissing(CheckpointError):
    """An optimizer's states are numbered, and neither the file nor the caller names the parameters."""


def parameter_names(module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[tuple[str, ...], ...]:
    """Each optimizer's parameters by name, in the order by which torch numbers their states.

    Raises:
        CheckpointError: an optimizer has a tensor that is no parameter of `module`.
    """
    known = {param: name for name, param in module.named_parameters()}
    found = []
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        strange = [tuple(param.shape) for param in params if param not in known]
        if strange:
            raise CheckpointError(
                f"{type(optimizer).__name__} has tensors of shapes {strange} that are no parameters of "
                f"{type(module).__name__}, so its states have no names. Register them as parameters."
            )
        found.append(tuple(known[param] for param in params))
    return tuple(found)


def read_optimizer(
    index: int, packed: Mapping[str, Any], shapes: Shapes, file: str, names: Sequence[str] | None
) -> tuple[Table, OptimizerRecord]:
    """The states and groups of one optimizer.

    Args:
        index: number of the optimizer.
        packed: "state" and "param_groups", as of `Optimizer.state_dict()`; states are keyed by number or name, and hold
            tensors, ForeignTensors and other values.
        shapes: shapes of the weights, in the module's order.
        file: the file of the tensors, for messages.
        names: names of the parameters, in the order of their numbers; None where the file has them.

    Raises:
        NamesMissing: `names` is None, and the file has none.
        CheckpointError: there are not as many names as parameters, a state belongs to no known parameter, or has
            another shape than its parameter.
    """
    groups = list(packed["param_groups"])
    ids = [number for group in groups for number in group["params"]]
    own = _names(index, groups, ids, names, file)
    if all(isinstance(number, int) for number in ids) and ids != list(range(len(ids))):
        # These are numbers of FSDP.rekey_optim_state_dict, which count in the module's order, frozen weights included.
        place = {name: position for position, name in enumerate(shapes)}
        ids, own = sorted(ids), sorted(own, key=lambda name: place.get(name, len(place)))
    name_of = dict(zip(ids, own, strict=True))
    section, table, values = optimizer_section(index), Table(), dict[str, dict[str, Any]]()
    for number, state in packed["state"].items():
        name = name_of.get(number)
        if name is None or name not in shapes:
            raise CheckpointError(
                f"{file} has a state of parameter {number!r}, " + ("which no group has." if name is None else
                f"named {name!r}, of which it has no weight. Pass the names of the module that was saved.")
            )  # fmt: skip
        for key, value in state.items():
            if isinstance(value, (Tensor, ForeignTensor)):
                entry = whole_tensor(value, "state", file) if isinstance(value, Tensor) else value
                role = state_role(key, entry.info.shape, shapes[name])
                if key in _PER_ELEMENT and role == "scalar":
                    raise CheckpointError(
                        f"{key} of parameter {number!r} in {file} has shape {entry.info.shape}, and {name!r} has "
                        f"{shapes[name]}. Pass the names in the order in which the optimizer was given its parameters."
                    )
                table[TensorKey(section, name, key)] = replace(entry, info=replace(entry.info, role=role))
            else:
                values.setdefault(name, {})[key] = value
    record = OptimizerRecord(
        class_name="",
        groups=tuple({key: value for key, value in group.items() if key != "params"} for group in groups),
        names=tuple(tuple(name_of[number] for number in group["params"]) for group in groups),
        values=values,
        rule=dict(packed.get(RULE_STATE, {})),
    )
    return table, record


def state_role(key: str, shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> Role:
    """The role of a tensor in a parameter's state.

    Args:
        key: the tensor's key in the state.
        shape: shape of the tensor.
        weight_shape: shape of the parameter.
    """
    if shape != weight_shape or key == "step":
        return "scalar"
    return "master" if key == MASTER else "state"


def _names(
    index: int, groups: Sequence[Mapping[str, Any]], ids: Sequence[Any], names: Sequence[str] | None, file: str
) -> list[str]:
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None and all(isinstance(number, str) for number in ids):
        names = list(ids)
    if names is None:
        raise NamesMissing(
            f"{file} numbers the states of optimizer {index} from 0 to {len(ids) - 1} and does not name them. Pass the "
            "names of its parameters in their order (parameter_names(module, optimizers)), or build the optimizer "
            "from named_parameters(), which torch saves."
        )
    if len(names) != len(ids):
        raise CheckpointError(
            f"optimizer {index} in {file} has {len(ids)} parameters, {len(names)} names were given. Pass the names of "
            "the module and optimizer that were saved."
        )
    return list(names)


def pack_optimizer(record: OptimizerRecord, tensors: Mapping[TensorKey, Tensor], index: int) -> dict[str, Any]:
    """An optimizer's state in the form of torch's `state_dict()`, with parameters numbered in the order of the record.

    Args:
        record: the optimizer's groups and values.
        tensors: unsharded tensors; those of the optimizer's section are packed.
        index: number of the optimizer.
    """
    number_of: dict[str, int] = {}
    for names in record.names:
        for name in names:
            number_of[name] = len(number_of)
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.section == optimizer_section(index):
            state.setdefault(number_of[key.name], {})[key.state] = tensor
    for name, values in record.values.items():
        state.setdefault(number_of[name], {}).update(values)
    groups = [
        {**group, "params": [number_of[name] for name in names]}
        for group, names in zip(record.groups, record.names, strict=True)
    ]
    rule = {RULE_STATE: record.rule} if record.rule else {}
    return {"state": dict(sorted(state.items())), "param_groups": groups, **rule}
