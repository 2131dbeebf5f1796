"""Reads DeepSpeed's universal checkpoints: a directory per parameter, in the dialects of stages 1 and 2 and of stage 3.

DeepSpeed itself loads neither frozen weights nor buffers from universal checkpoints, and in stage 3 it gives
every parameter group the options of the first. The files hold frozen weights, buffers and all options, and this reader
loads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import (
    ForeignChunk,
    ForeignSource,
    ForeignTensor,
    Table,
    reader,
    whole_tensor,
)
from lightning_superscale.checkpoint.foreign.deepspeed_files import (
    ModelFiles,
    class_name,
    load_deepspeed_file,
    loss_scaler,
    model_entries,
    options_of,
    read_model_files,
    step_tensor,
)
from lightning_superscale.checkpoint.state import (
    MASTER,
    MODEL,
    OptimizerRecord,
    Role,
    TensorInfo,
    TensorKey,
    optimizer_section,
)
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box

_SECTION = optimizer_section(0)
_STATE_FILE = "optimizer_state.pt"


def has_universal_states(folder: Path) -> bool:
    """Whether `folder` has the optimizer file of a universal checkpoint."""
    return (folder / "zero" / _STATE_FILE).is_file()


def open_deepspeed_universal(folder: Path) -> ForeignSource:
    """Open a universal checkpoint; no tensor's values are read.

    Args:
        folder: a tag's directory, as `find_folder` returns it.

    Raises:
        CheckpointError: files are missing or damaged, or have a layout that can't be read.
    """
    files = read_model_files(folder)
    state_file = folder / "zero" / _STATE_FILE
    saved = load_deepspeed_file(state_file)
    if not isinstance(saved, Mapping) or "param_groups" not in saved:
        raise CheckpointError(f'{state_file} is no optimizer file of DeepSpeed: it lacks "param_groups".')
    masters, table, values = dict[str, ForeignTensor](), Table(), dict[str, dict[str, Any]]()
    for index, shapes in enumerate(files.shapes):
        for name, shape in shapes.items():
            found = _parameter(folder, name, shape)
            if "fp32" not in found:
                raise CheckpointError(f"{folder}/zero/{name} lacks fp32.pt. Copy the whole checkpoint.")
            masters[name] = found.pop("fp32")
            for key, entry in found.items():
                table[TensorKey(_SECTION, name, key)] = entry
            _add_scalars(table, values, saved, index, name, state_file)
    model = model_entries(files, masters)
    for name, master in masters.items():
        if model[TensorKey(MODEL, name)].info.dtype != torch.float32:  # an fp32 weight is its own master
            table[TensorKey(_SECTION, name, MASTER)] = master
    groups = saved["param_groups"]
    record = OptimizerRecord(class_name(files.config), options_of(groups), _names(files, groups, state_file), values)
    rest = {**files.rest, "deepspeed": {**files.rest["deepspeed"], "loss_scaler": loss_scaler(saved)}}
    return ForeignSource(str(folder), {**model, **table}, files.step, (record,), files.aliases, lambda: rest)


def _parameter(folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, ForeignTensor]:
    """The tensors in a parameter's directory, by state key."""
    if Path(name).name != name:
        raise CheckpointError(f"{folder} has a parameter named {name!r}, which is no name of a directory.")
    place, found = folder / "zero" / name, dict[str, ForeignTensor]()
    if not place.is_dir():  # Lightning before 2.1 wrapped the module, and its names
        place = folder / "zero" / f"_forward_module.{name}"
    for file in sorted(place.glob("*.pt")):
        value = load_deepspeed_file(file)
        if isinstance(value, Mapping):
            if "param" not in value or value.get("is_expert_param"):
                raise CheckpointError(f"{file} holds an expert's weights, or none; that can't be read.")
            value = value["param"]
        if file.stem == "step":
            found["step"] = whole_tensor(_step(value, file), "scalar", str(file))
        elif isinstance(value, Tensor) and value.numel() == torch.Size(shape).numel():
            chunk = ForeignChunk(whole_box(shape), reader(value.reshape(shape)), str(file))
            role: Role = "master" if file.stem == "fp32" else "state"
            found[file.stem] = ForeignTensor(TensorInfo(value.dtype, shape, role), (chunk,))
        else:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{file} should hold a tensor of shape {shape}, found {what}.")
    return found


def _step(value: Any, file: Path) -> Tensor:
    step = step_tensor(value) if isinstance(value, (Tensor, int, float)) else None
    if step is None:
        raise CheckpointError(f"{file} should hold a number of steps, found {type(value).__name__}.")
    return step


def _add_scalars(
    table: Table, values: dict[str, dict[str, Any]], saved: Mapping[str, Any], index: int, name: str, file: Path
) -> None:
    """Add a parameter's states that are not per element to `table` or, where they are no tensors, to `values`.

    Stage 3 keeps them in rank 0's optimizer state; DeepSpeed's own optimizers keep the step in a parameter group.
    """
    inner = saved.get("optimizer_state_dict") or {}
    own = dict(inner.get("state", {}).get(index, {}))
    groups = saved["param_groups"]
    counted = next((group["step"] for group in groups if "step" in group), saved.get("base_optimizer_state_step"))
    if "step" not in own and counted is not None:
        own["step"] = counted
    for key, value in own.items():
        tensor = step_tensor(value) if key == "step" else value
        key_of = TensorKey(_SECTION, name, key)
        if key_of in table or (isinstance(tensor, Tensor) and tensor.dim()):
            continue  # this is rank 0's shard of a per-element state
        if isinstance(tensor, Tensor):
            table[key_of] = whole_tensor(tensor, "scalar", str(file))
        else:
            values.setdefault(name, {})[key] = tensor


def _names(files: ModelFiles, groups: Sequence[Mapping[str, Any]], file: Path) -> tuple[tuple[str, ...], ...]:
    if not files.is_sharded:
        subs: list[list[int]] = [[index] for index in range(len(files.shapes))]
    else:
        subs = [list(group["params"]) for group in groups]
    if len(subs) != len(groups) or sorted(sub for group in subs for sub in group) != list(range(len(files.shapes))):
        raise CheckpointError(
            f"{file} has {len(groups)} parameter groups of parts {subs}, and {files.file} has "
            f"{len(files.shapes)} parts."
        )
    return tuple(tuple(name for sub in group for name in files.shapes[sub]) for group in subs)
