"""Reads the checkpoints of DeepSpeed's ZeRO, stages 1, 2 and 3, also those of Lightning's DeepSpeedStrategy.

Stages 1 and 2 concatenate each parameter group and cut it into one range per rank; stage 3 cuts each parameter, and
concatenates a sub-group's shards. In both a rank has ranges of flattened parameters, and these are boxes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import (
    ForeignChunk,
    ForeignSource,
    ForeignTensor,
    Table,
    flat_chunks,
    whole_tensor,
)
from lightning_superscale.checkpoint.foreign.deepspeed_files import (
    ModelFiles,
    class_name,
    clean,
    load_deepspeed_file,
    loss_scaler,
    model_entries,
    options_of,
    rank_range,
    read_model_files,
    step_tensor,
)
from lightning_superscale.checkpoint.state import (
    MASTER,
    MODEL,
    OptimizerRecord,
    TensorInfo,
    TensorKey,
    optimizer_section,
)
from lightning_superscale.errors import CheckpointError

_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_SECTION = optimizer_section(0)
_WEIGHTS = "fp32"


def has_native_states(folder: Path) -> bool:
    """Whether `folder` has the optimizer file of a rank."""
    return any(_OPTIM_FILE.fullmatch(file.name) for file in folder.glob("*_optim_states.pt"))


@dataclass(frozen=True, slots=True)
class _Flat:
    """One rank's flat partition of a group or sub-group.

    Attributes:
        tensors: states by key, and the fp32 weights as "fp32"; each [numel of the partition, with or without padding].
        scalars: states that are not per element, such as the step, by key.
        ranges: by parameter, the offset of its elements in the partition, the number of its first element there, and
            one past that of its last.
        file: the rank's optimizer file, for messages.
    """

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    ranges: dict[str, tuple[int, int, int]]
    file: str


def open_deepspeed_native(folder: Path) -> ForeignSource:
    """Open a checkpoint of DeepSpeed's ZeRO; tensors stay on disk.

    Args:
        folder: a tag's directory, as `find_folder` returns it.

    Raises:
        CheckpointError: files are missing or damaged, or have a layout that can't be read.
    """
    files = read_model_files(folder)
    states = _optimizer_files(files)
    parts, groups = (_sharded if files.is_sharded else _cut)(files, states)
    masters, table, values = _join(files, parts)
    model = model_entries(files, masters)
    for name, master in masters.items():
        if model[TensorKey(MODEL, name)].info.dtype != torch.float32:  # an fp32 weight is its own master
            table[TensorKey(_SECTION, name, MASTER)] = master
    names = _names(files, groups)
    record = OptimizerRecord(class_name(files.config), options_of(groups), names, values)
    rest = {**files.rest, "deepspeed": {**files.rest["deepspeed"], "loss_scaler": loss_scaler(states[0][1])}}
    return ForeignSource(str(folder), {**model, **table}, files.step, (record,), files.aliases, lambda: rest)


def _optimizer_files(files: ModelFiles) -> list[tuple[str, Mapping[str, Any]]]:
    """Every rank's optimizer file and the state in it, by rank."""
    found: dict[int, Path] = {}
    for file in files.folder.glob("*_optim_states.pt"):
        match = _OPTIM_FILE.fullmatch(file.name)
        if match is not None:
            found[int(match[1])] = file
    missing = [rank for rank in range(files.ranks) if rank not in found]
    if missing or len(found) != files.ranks:
        raise CheckpointError(
            f"{files.folder} was written by {files.ranks} ranks, found optimizer states of ranks {sorted(found)}. Copy "
            "the whole checkpoint."
        )
    states = []
    for rank in range(files.ranks):
        state = load_deepspeed_file(found[rank])
        own = state.get("optimizer_state_dict") if isinstance(state, Mapping) else None
        if not isinstance(own, Mapping):
            raise CheckpointError(f'{found[rank]} is no optimizer file of DeepSpeed: it lacks "optimizer_state_dict".')
        states.append((str(found[rank]), own))
    counts = states[0][1].get("partition_count")
    counts = counts if isinstance(counts, (list, tuple)) else [counts]
    if states[0][1].get("ds_zero_partition_groups") or any(count != files.ranks for count in counts):
        raise CheckpointError(
            f"{files.folder} was written by {files.ranks} ranks that share states in parts of {counts} (experts, MiCS "
            "or hpZ), which can't be read. Load it in DeepSpeed without them and save it again."
        )
    return states


# Stages 1 and 2


def _cut(
    files: ModelFiles, states: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[list[list[_Flat]], list[Mapping[str, Any]]]:
    """Each rank's partition of each parameter group, by group and rank; and the optimizer's groups."""
    base = states[0][1].get("base_optimizer_state")
    # An elastic checkpoint has no groups, and their options are lost.
    groups = list(base["param_groups"]) if isinstance(base, Mapping) else [{} for _ in files.shapes]
    parts: list[list[_Flat]] = []
    for index in range(len(files.shapes)):
        done: dict[str, int] = {}
        ranks = []
        for file, state in states:
            mapping = state.get("param_slice_mappings")
            if mapping is None:
                raise CheckpointError(f"{file} lacks param_slice_mappings; DeepSpeed before 0.7 did not write them.")
            ranges = {}
            for name, address in mapping[index].items():
                first = done.get(clean(name), 0)
                done[clean(name)] = first + address.numel
                ranges[clean(name)] = (address.start, first, first + address.numel)
            ranks.append(_flat(file, state, index, groups[index], ranges))
        parts.append(ranks)
    return parts, groups


def _flat(
    file: str, state: Mapping[str, Any], index: int, group: Mapping[str, Any], ranges: dict[str, tuple[int, int, int]]
) -> _Flat:
    base, weights = state["base_optimizer_state"], state["single_partition_of_fp32_groups"][index]
    own = base["state"].get(group["params"][0], {}) if isinstance(base, Mapping) else base[index]
    padded = weights.numel() + state["group_paddings"][index]
    if "step" not in own:
        step = group.get("step", state.get("base_optimizer_state_step"))
        own = own if step is None else {**own, "step": step}
    return _split(file, own, weights, (weights.numel(), padded), ranges)


def _split(
    file: str, own: Mapping[str, Any], weights: Tensor, numels: tuple[int, ...], ranges: dict[str, tuple[int, int, int]]
) -> _Flat:
    flat, scalars = {_WEIGHTS: weights}, dict[str, Any]()
    for key, value in own.items():
        if isinstance(value, Tensor) and key != "step" and value.dim() == 1 and value.numel() in numels:
            flat[key] = value
        elif isinstance(value, Tensor) and value.dim() > 0:
            raise CheckpointError(
                f"{file} has a state {key!r} of shape {tuple(value.shape)} for a flat partition of {numels[0]} values; "
                "which parameter owns which of it is not in the file."
            )
        else:
            scalars[key] = value
    return _Flat(flat, scalars, ranges, file)


# Stage 3


def _sharded(
    files: ModelFiles, states: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[list[list[_Flat]], list[Mapping[str, Any]]]:
    """Each rank's partition of each sub-group, by sub-group and rank; and the groups with sub-groups as "params"."""
    parts = []
    for index, shapes in enumerate(files.shapes):
        ranks = []
        for rank, (file, state) in enumerate(states):
            weights, ranges, offset = state["fp32_flat_groups"][index], {}, 0
            for name, shape in shapes.items():
                numel = torch.Size(shape).numel()
                ranges[name] = (offset, *rank_range(numel, files.ranks, rank))
                offset += -(-numel // files.ranks)
            own = state["optimizer_state_dict"]["state"].get(index, {})
            step = next((g["step"] for g in state["optimizer_state_dict"]["param_groups"] if "step" in g), None)
            own = {**own, "step": step} if "step" not in own and step is not None else own
            ranks.append(_split(file, own, weights, (weights.numel(),), ranges))
        parts.append(ranks)
    return parts, list(states[0][1]["optimizer_state_dict"]["param_groups"])


# All stages


def _join(
    files: ModelFiles, parts: Sequence[Sequence[_Flat]]
) -> tuple[dict[str, ForeignTensor], Table, dict[str, dict[str, Any]]]:
    """The fp32 weights by name; a table of the states; and the states that are no tensors, by name and key."""
    masters: dict[str, ForeignTensor] = {}
    table, values = Table(), dict[str, dict[str, Any]]()
    for shapes, ranks in zip(files.shapes, parts, strict=True):
        keys = dict.fromkeys(key for flat in ranks for key in flat.tensors)
        for name, shape in shapes.items():
            for key in keys:
                chunks = [chunk for flat in ranks for chunk in _chunks_of(flat, key, name, shape)]
                info = TensorInfo(ranks[0].tensors[key].dtype, shape, "master" if key == _WEIGHTS else "state")
                if key == _WEIGHTS:
                    masters[name] = ForeignTensor(info, tuple(chunks))
                else:
                    table[TensorKey(_SECTION, name, key)] = ForeignTensor(info, tuple(chunks))
            for key, value in ranks[0].scalars.items():
                tensor = step_tensor(value) if key == "step" else value
                if isinstance(tensor, Tensor):
                    table[TensorKey(_SECTION, name, key)] = whole_tensor(tensor, "scalar", ranks[0].file)
                elif tensor is not None:
                    values.setdefault(name, {})[key] = tensor
    return masters, table, values


def _chunks_of(flat: _Flat, key: str, name: str, shape: tuple[int, ...]) -> Iterator[ForeignChunk]:
    if name in flat.ranges:
        offset, first, stop = flat.ranges[name]
        values = flat.tensors[key]
        if offset + stop - first > values.numel():
            raise CheckpointError(
                f"{flat.file} has {values.numel()} values of {key}, but {name!r} should end at "
                f"{offset + stop - first}. The file is damaged."
            )
        yield from flat_chunks(shape, first, values[offset : offset + stop - first], flat.file)


def _names(files: ModelFiles, groups: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], ...]:
    if files.is_sharded:
        return tuple(tuple(n for sub in group["params"] for n in files.shapes[sub]) for group in groups)
    return tuple(tuple(shapes) for shapes in files.shapes)
