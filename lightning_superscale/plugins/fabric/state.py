"""Between the state that `fabric.save` and `fabric.load` are given and the dict that universal checkpoints are made of.

The dict is the one that the Trainer's checkpoints have, so that a checkpoint of either loads into the other. The names
that the user gave to module and optimizers stand under FABRIC_KEY, beside the rest of the user's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_superscale.errors import CheckpointError
from lightning_superscale.plugins.fabric.module import RunModule
from lightning_superscale.run.state.restore import read_whole

FABRIC_KEY = "lightning_superscale_fabric"


@runtime_checkable
class Stateful(Protocol):
    """An object that `fabric.save` asks for its state, such as a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class UserState(NamedTuple):
    """A state as the user gave it, by what its values are.

    Attributes:
        module: the name of the module that was set up.
        optimizers: the number of each optimizer that was set up, by name.
        values: all others.
    """

    module: str
    optimizers: dict[str, int]
    values: dict[str, Any]


def sorted_out(state: Mapping[str, Any], module: RunModule | None, optimizers: Sequence[Optimizer]) -> UserState:
    """Find the module and the optimizers that were set up in a state.

    Raises:
        CheckpointError: no module that was set up, or another module or optimizer; names it.
    """
    names, numbers, values = [], {}, {}
    for name, value in state.items():
        if module is not None and (value is module or value is module.module):
            names.append(name)
        elif isinstance(value, Optimizer) and any(value is own for own in optimizers):
            numbers[name] = next(i for i, own in enumerate(optimizers) if own is value)
        elif isinstance(value, (nn.Module, Optimizer)):
            raise CheckpointError(
                f"the state's {name!r} is a {type(value).__name__} that fabric.setup() was not given. Expected the "
                "module and the optimizers that it returned; save the state_dict() of any other."
            )
        else:
            values[name] = value
    if len(names) != 1:
        raise CheckpointError(
            f"the state has {', '.join(map(repr, state)) or 'nothing'}, and {len(names) or 'none'} of it is the module "
            "that fabric.setup() returned. A universal checkpoint is of one module: add it, once."
        )
    return UserState(names[0], numbers, values)


def saved_values(user: UserState) -> dict[str, Any]:
    """The entries of a checkpoint in which the user's names and further values stand.

    Schedulers of torch stand where the Trainer looks for them too, in the state's order.
    """
    schedulers = [one.state_dict() for one in user.values.values() if isinstance(one, LRScheduler)]
    values = {name: one.state_dict() if isinstance(one, Stateful) else one for name, one in user.values.items()}
    named = {"module": user.module, "optimizers": user.optimizers, "values": values}
    return {FABRIC_KEY: named, "lr_schedulers": schedulers}


class FoundState(NamedTuple):
    """A checkpoint by the names that the user gave when it was saved.

    Attributes:
        optimizers: the number of each optimizer whose state it has, by name; None for a checkpoint of a Trainer, which
            has them in the order of `configure_optimizers`.
        values: all that is neither the module's nor an optimizer's.
    """

    module: str | None
    optimizers: dict[str, int] | None
    values: dict[str, Any]


def as_trainers(checkpoint: Mapping[str, Any], user: UserState, path: str) -> Mapping[str, Any]:
    """A checkpoint as the Trainer's are: also one of Fabric's own, by the user's names, or weights alone.

    Raises:
        CheckpointError: no weights of the module; lists the names that are there.
    """
    if "state_dict" in checkpoint:
        return checkpoint
    if all(isinstance(value, Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint}
    if not isinstance(checkpoint.get(user.module), Mapping):
        raise CheckpointError(
            f"the checkpoint {path} has no weights under {user.module!r}, the state's name of the module, and nothing "
            f"was changed; it has {', '.join(map(repr, checkpoint)) or 'nothing'}. Give the module the name there."
        )
    optimizers = [name for name in user.optimizers if name in checkpoint]
    values = {name: value for name, value in checkpoint.items() if name not in (user.module, *optimizers)}
    numbers = {name: number for number, name in enumerate(optimizers)}
    return {
        "state_dict": checkpoint[user.module],
        "optimizer_states": [checkpoint[name] for name in optimizers],
        FABRIC_KEY: {"module": user.module, "optimizers": numbers, "values": values},
    }


def optimizer_state_in(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A checkpoint that is an optimizer's own state dict.

    Raises:
        CheckpointError: it is something else.
    """
    if not {"state", "param_groups"} <= checkpoint.keys():
        raise CheckpointError(
            f"{path} is no state dict of an optimizer: expected 'state' and 'param_groups', found "
            f"{', '.join(map(repr, checkpoint)) or 'nothing'}. Load a whole checkpoint with fabric.load(path, state), "
            "where the state has the module and its optimizers."
        )
    return dict(checkpoint)


def found_in(checkpoint: Mapping[str, Any], user: UserState | None = None) -> FoundState:
    """The names in a checkpoint of Fabric or of a Trainer.

    Args:
        user: the state that is to be loaded, whose schedulers take the names of a Trainer's, in the state's order.
    """
    named = checkpoint.get(FABRIC_KEY)
    if named is None:
        values = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        own = [] if user is None else [name for name, one in user.values.items() if isinstance(one, LRScheduler)]
        values.update(zip(own, checkpoint.get("lr_schedulers", ()), strict=False))
        return FoundState(None, None, values)
    return FoundState(named["module"], dict(named["optimizers"]), dict(named["values"]))


def check_names(user: UserState, found: FoundState, num_states: int, path: str, *, strict: bool) -> None:
    """Refuse a state whose names a checkpoint lacks, before anything changes.

    Args:
        num_states: number of optimizers whose states the checkpoint has.
        strict: whether it must have every name of the state; a missing optimizer is always refused.

    Raises:
        CheckpointError: lists the names on both sides.
    """
    missing = [name for name, number in user.optimizers.items() if _state_number(name, number, found) >= num_states]
    if strict:
        missing += [name for name in user.values if name not in found.values]
    if missing:
        has = [*(found.optimizers or {}), *found.values]
        raise CheckpointError(
            f"the checkpoint {path} has no {', '.join(map(repr, missing))}, and nothing was changed; beside the module "
            f"it has {', '.join(map(repr, has)) or 'nothing'} and states of {num_states} optimizers. Take the name out "
            "of the state, or load with strict=False if it is no optimizer's."
        )


def _state_number(name: str, number: int, found: FoundState) -> int:
    return number if found.optimizers is None else found.optimizers.get(name, len(found.optimizers))


def states_for(user: UserState, found: FoundState, states: Sequence[Any]) -> dict[int, Any]:
    """The checkpoint's state of each optimizer in the user's state, by the optimizer's number."""
    return {number: states[_state_number(name, number, found)] for name, number in user.optimizers.items()}


def load_values(state: dict[str, Any], user: UserState, found: FoundState) -> dict[str, Any]:
    """Load the user's further values into a state, in place; gives what the state has no name for."""
    rest = dict(found.values)
    for name, value in user.values.items():
        if name not in rest:
            continue
        saved = rest.pop(name)
        if isinstance(value, Stateful):
            value.load_state_dict(saved)
        else:
            state[name] = saved
    return rest


def whole(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint as `fabric.load(path)` gives it, by the user's names, tensors whole. Every rank calls it."""
    found, states = found_in(checkpoint), list(checkpoint.get("optimizer_states", []))
    if found.module is None or found.optimizers is None:
        return dict(read_whole(dict(checkpoint)))
    named = {name: states[number] for name, number in found.optimizers.items()}
    return dict(read_whole({found.module: checkpoint["state_dict"], **named, **found.values}))
