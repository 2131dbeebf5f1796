"""Reads Lightning checkpoint files: DDP's, FSDP's and ModelParallel's "full" ones, and this package's; and state_dicts.

Such a file tells neither buffers from frozen weights nor the class of an optimizer. Weights that an optimizer has count
as trainable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import ForeignSource, Table, check_dense, whole_tensor
from lightning_superscale.checkpoint.foreign.torch_files import load_torch_file
from lightning_superscale.checkpoint.foreign.torch_optimizer import NamesMissing, read_optimizer
from lightning_superscale.checkpoint.state import MODEL, OptimizerRecord, TensorKey
from lightning_superscale.errors import CheckpointError

# By optimizer, the names of its parameters, in its order.
Names = Sequence[Sequence[str]]

EXTRA_STATE = "extra_state"
# Lightning's migrations ask for the release whose layout a checkpoint has: this one, for states that were not
# Lightning's.
LAYOUT_VERSION = {"pytorch-lightning_version": "2.6.0"}
# Entry of this package's exports, beside those that Lightning looks at: `Names` of the optimizers.
# torch's own "param_names" would turn an optimizer that loads them into one of named parameters only.
OPTIMIZER_NAMES = "lightning_superscale.optimizer_names"


def is_state_dict(content: Any) -> bool:
    """Whether the content of a file is a module's `state_dict()` by itself."""
    return isinstance(content, Mapping) and bool(content) and all(isinstance(one, Tensor) for one in content.values())


def open_lightning(path: Path, names: Names | None = None) -> ForeignSource:
    """Open a Lightning checkpoint file; its tensors stay on disk.

    Args:
        path: the file.
        names: names of each optimizer's parameters, in the optimizer's order; needed where the file numbers parameters
            and holds no names.

    Raises:
        CheckpointError: the file is no Lightning checkpoint, is damaged or names code, or `names` do not fit it.
    """
    file = str(path)
    checkpoint = load_torch_file(path)
    if is_state_dict(checkpoint):
        checkpoint = {"state_dict": checkpoint}
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f'{file} is no Lightning checkpoint: it has no "state_dict" of tensors, and is not a state_dict itself.'
        )
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    names = _names_in(checkpoint, file) if names is None else names
    table, aliases = _weights(tensors, file, {name for group in names or () for name in group})
    packed = checkpoint.get("optimizer_states", [])
    records, missing = _optimizers(packed, table, aliases, file, names)
    apart = ("state_dict", "optimizer_states", OPTIMIZER_NAMES)
    rest = {key: value for key, value in checkpoint.items() if key not in apart}
    rest.update(extra_state(weights))
    step = checkpoint.get("global_step")
    step = step if isinstance(step, int) else None
    return ForeignSource(file, table, step, records, aliases, lambda: rest, missing)


def _names_in(checkpoint: Mapping[str, Any], file: str) -> Names | None:
    names = checkpoint.get(OPTIMIZER_NAMES)
    is_nested = isinstance(names, (list, tuple)) and all(isinstance(own, (list, tuple)) for own in names)
    if names is not None and not (is_nested and all(isinstance(name, str) for own in names for name in own)):
        raise CheckpointError(f"{file} is damaged: {OPTIMIZER_NAMES!r} is no list of names for each optimizer.")
    return names


def _weights(weights: Mapping[str, Tensor], file: str, preferred: set[str]) -> tuple[Table, dict[str, str]]:
    """The table of the weights, and the aliases of tied ones.

    A tied weight is in the table once, under its name in `preferred`, or else under its first name.
    """
    by_place: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in weights.items():
        check_dense(tensor, file, repr(name))
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        by_place.setdefault((*place, tensor.dtype) if tensor.numel() else (name,), []).append(name)
    table, aliases = Table(), dict[str, str]()
    for tied in by_place.values():
        first = next((name for name in tied if name in preferred), tied[0])
        table[TensorKey(MODEL, first)] = whole_tensor(weights[first], "model", file)
        aliases.update({name: first for name in tied if name != first})
    return table, aliases


def _optimizers(
    packed: Any, table: Table, aliases: Mapping[str, str], file: str, names: Names | None
) -> tuple[tuple[OptimizerRecord, ...], str]:
    if names is not None and isinstance(packed, (list, tuple)) and len(names) != len(packed):
        raise CheckpointError(
            f"{file} has {len(packed)} optimizers, names were given for {len(names)}. Pass those of the module that "
            "was saved."
        )
    if names is not None:
        names = [[aliases.get(name, name) for name in own] for own in names]
    return read_optimizers(packed, table, file, names)


def read_optimizers(
    packed: Sequence[Mapping[str, Any]], table: Table, file: str, names: Names | None
) -> tuple[tuple[OptimizerRecord, ...], str]:
    """Add the states of all optimizers to the weights in a table, and mark those that they have as trainable.

    Args:
        packed: each optimizer's state, as `read_optimizer` takes it.
        table: weights; takes the states.
        file: the file, for messages.
        names: names of each optimizer's parameters, in its order; None where the file has them.

    Returns:
        The optimizers' records and ""; or no records, and the reason why their parameters have no names.

    Raises:
        CheckpointError: the states are not as torch saves them, or `names` do not fit.
    """
    if not isinstance(packed, (list, tuple)) or not all(isinstance(one, Mapping) for one in packed):
        raise CheckpointError(f"the optimizers in {file} are not as torch saves them: expected a list of dicts.")
    shapes = {key.name: entry.info.shape for key, entry in table.items() if key.section == MODEL}
    states, records = Table(), []
    try:
        for index, one in enumerate(packed):
            found, record = read_optimizer(index, one, shapes, file, None if names is None else names[index])
            states.update(found)
            records.append(record)
    except NamesMissing as missing:
        return (), str(missing)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the optimizers in {file} are not as torch saves them: {error!r}.") from error
    table.update(states)
    _mark_trainable(table, records)
    return tuple(records), ""


def extra_state(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `StateSource.rest` with the values of a state_dict that are no tensors (`Module.get_extra_state`).

    Returns:
        {EXTRA_STATE: values by name}; empty where all values are tensors.
    """
    extra = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
    return {EXTRA_STATE: extra} if extra else {}


def _mark_trainable(table: Table, records: Sequence[OptimizerRecord]) -> None:
    """Mark the weights that an optimizer has as trainable."""
    for record in records:
        for group in record.names:
            for name in group:
                key = TensorKey(MODEL, name)
                if key in table:
                    table[key] = replace(table[key], info=replace(table[key].info, trainable=True))
