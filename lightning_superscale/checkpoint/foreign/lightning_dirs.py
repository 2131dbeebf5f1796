"""Reads the checkpoint directories of Lightning's FSDP and ModelParallel strategies, and plain directories of DCP.

Lightning puts weights under "model" (FSDP) or "state_dict" (ModelParallel), states under "optimizer_<i>", by names of
parameters, and the rest of its checkpoint into meta.pt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import ForeignSource, ForeignTensor, Table
from lightning_superscale.checkpoint.foreign.dcp import METADATA, DcpFolder, open_dcp_folder
from lightning_superscale.checkpoint.foreign.lightning import EXTRA_STATE, Names, read_optimizers
from lightning_superscale.checkpoint.foreign.torch_files import load_torch_file
from lightning_superscale.checkpoint.state import MODEL, OptimizerRecord, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box

META = "meta.pt"
_MODEL_ROOTS = ("state_dict", "model")
_OPTIMIZER_ROOT = re.compile(r"optim(?:izer)?(?:_(\d+))?")


def open_sharded(folder: Path, names: Names | None = None) -> ForeignSource:
    """Open a directory of torch.distributed.checkpoint, with Lightning's meta.pt or without.

    Args:
        folder: a directory with the file `.metadata`.
        names: names of each optimizer's parameters, in the optimizer's order; needed for states that are numbered.

    Raises:
        CheckpointError: a file is missing, damaged or names code, or `names` do not fit.
    """
    found = open_dcp_folder(folder)
    meta = load_torch_file(folder / META) if (folder / META).is_file() else {}
    if not isinstance(meta, Mapping):
        raise CheckpointError(f"{folder / META} should hold a dict, found {type(meta).__name__}.")
    root, roots = _model_root(found)
    table, others = Table(), dict[str, tuple[Any, ...]]()
    numbered: dict[int, dict[str, Any]] = {}
    for key, full_path in found.paths.items():
        path = full_path[len(root) :] if full_path[: len(root)] == root else full_path
        owner = _OPTIMIZER_ROOT.fullmatch(str(path[0])) if roots and len(path) > 1 else None
        if owner is not None:
            _put(numbered.setdefault(int(owner[1] or 0), {}), path[1:], _item(found, key))
        elif roots and path[0] not in roots:
            others[key] = path
        else:
            name = path[1:] if roots else path
            if key in found.tensors and len(name) == 1:
                table[TensorKey(MODEL, str(name[0]))] = found.tensors[key]
            else:  # an entry of nn.Module.get_extra_state
                others[key] = (EXTRA_STATE, *name)
    if not table:
        raise CheckpointError(f"{folder / METADATA} names no weights.")
    records, missing = _optimizers(numbered, table, str(folder), names)

    def rest() -> dict[str, Any]:
        tree = dict(meta)
        for key, path in others.items():
            _put(tree, path, _whole(found.tensors[key]) if key in found.tensors else found.value(key))
        return tree

    return ForeignSource(str(folder), table, meta.get("global_step"), records, {}, rest, missing)


def _whole(entry: ForeignTensor) -> Tensor:
    tensor, box = torch.empty(entry.info.shape, dtype=entry.info.dtype), whole_box(entry.info.shape)
    for chunk in entry.chunks:
        tensor[chunk.box.within(box)] = chunk.read(chunk.box.within(chunk.box)).detach()
    return tensor


def _model_root(found: DcpFolder) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The place of the model in the nested state.

    Returns:
        The beginning of the model's paths, and the key that holds weights there; no key where the entire state is a
        module's.
    """
    heads = dict.fromkeys(path[0] for path in found.paths.values() if len(path) > 2)
    # torch's tutorial wraps model and optimizer into one "app".
    for prefix in [(), *((head,) for head in heads)]:
        depth = len(prefix)
        below = {path[depth] for path in found.paths.values() if path[:depth] == prefix and len(path) > depth + 1}
        root = next((name for name in _MODEL_ROOTS if name in below), None)
        if root is not None:
            return prefix, (root,)
    return (), ()


def _item(found: DcpFolder, key: str) -> Any:
    return found.tensors[key] if key in found.tensors else found.value(key)


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    """Put a value at its path in the nested state, where the elements of lists have their numbers as keys."""
    for step in path[:-1]:
        tree = tree.setdefault(step, {})
    tree[path[-1]] = value


def _listed(tree: Any) -> Any:
    """A nested state in which mappings with keys 0, 1, ... are lists again."""
    if isinstance(tree, dict) and tree and set(tree) == set(range(len(tree))):
        return [_listed(tree[index]) for index in range(len(tree))]
    return {key: _listed(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _optimizers(
    numbered: Mapping[int, dict[str, Any]], table: Table, file: str, names: Names | None
) -> tuple[tuple[OptimizerRecord, ...], str]:
    if sorted(numbered) != list(range(len(numbered))) or (names is not None and len(names) != len(numbered)):
        raise CheckpointError(
            f"{file} has optimizers {sorted(numbered)}, expected {'those from 0' if names is None else len(names)}."
        )
    packed = [
        {"state": numbered[i].get("state", {}), "param_groups": _listed(numbered[i].get("param_groups"))}
        for i in range(len(numbered))
    ]
    return read_optimizers(packed, table, file, names)
