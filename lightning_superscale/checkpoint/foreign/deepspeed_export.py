"""Writes a training state as a DeepSpeed universal checkpoint, in the dialect of stages 1 and 2 or of stage 3.

With `"checkpoint": {"load_universal": true}`, DeepSpeed (0.19.8) loads master weights, Adam's moments, steps and
parameter groups from it. DeepSpeed loads buffers and frozen weights from no universal checkpoint; they are written for
readers that do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_superscale.checkpoint.foreign.deepspeed_files import OWN_KEYS, step_tensor
from lightning_superscale.checkpoint.foreign.lightning import EXTRA_STATE
from lightning_superscale.checkpoint.foreign.staging import copies_on_disk, read_tensor, staged
from lightning_superscale.checkpoint.state import (
    MASTER,
    MODEL,
    OptimizerRecord,
    StateSource,
    TensorKey,
    optimizer_section,
)
from lightning_superscale.errors import CheckpointError

Dialect = Literal["zero12", "zero3"]
OptimizerKind = Literal["torch", "deepspeed"]

TAG = "universal"
_VERSION = "0.19.8"  # the release whose files these equal; DeepSpeed refuses files without a version
_SECTION = optimizer_section(0)
_MOMENTS = ("exp_avg", "exp_avg_sq")


def export_deepspeed_universal(
    source: StateSource, path: Path, dialect: Dialect, *, optimizer: OptimizerKind = "torch"
) -> None:
    """Write the directory `path`, for `engine.load_checkpoint(path)`.

    DeepSpeed's stage 3 gives all groups the options of the first. Options in which groups differ are therefore kept
    out of the first group and written where only `open_foreign` looks, so that DeepSpeed leaves each group with the
    options that its optimizer was built with. One process calls it; memory stays at one tensor.

    Args:
        source: the state.
        path: directory to make; its parents are made where they are missing.
        dialect: "zero12" for DeepSpeed's stages 1 and 2, "zero3" for stage 3.
        optimizer: the kind of optimizer that DeepSpeed will run: "torch" keeps steps as tensors, "deepspeed" as
            integers.

    Raises:
        CheckpointError: `path` exists, the source is damaged, or DeepSpeed can't hold the state: several optimizers or
            none, states other than Adam's, different steps within a group (in stage 3, within all groups).
    """
    record = _only_optimizer(source)
    step = _check_states(source, record, dialect)
    with staged(path) as staging:
        folder = staging / path.name / TAG
        for names in record.names:
            for name in names:
                _write_parameter(source, folder / "zero" / name, name, dialect, optimizer)
        torch.save(_optimizer_state(record, dialect, optimizer, step), folder / "zero" / "optimizer_state.pt")
        state = _model_state(source, record, dialect, staging / "tensors")
        file = "mp_rank_00_model_states.pt"
        torch.save(state, folder / (f"zero_pp_rank_0_{file}" if dialect == "zero3" else file))
        for pointer in ("latest_universal", "latest"):
            (staging / path.name / pointer).write_text(TAG)


def _only_optimizer(source: StateSource) -> OptimizerRecord:
    if len(source.optimizers) != 1:
        raise CheckpointError(
            f"{source.path} has {len(source.optimizers)} optimizers, DeepSpeed has one. Export weights alone as "
            "safetensors."
        )
    strange = [name for names in source.optimizers[0].names for name in names if Path(name).name != name]
    if strange:
        raise CheckpointError(f"DeepSpeed has a directory per parameter, and {strange[:5]} are no names of one.")
    return source.optimizers[0]


def _check_states(source: StateSource, record: OptimizerRecord, dialect: Dialect) -> list[int]:
    """Every group's step, after a check that DeepSpeed can hold the states."""
    known = {*_MOMENTS, "step", MASTER}
    for key in source.tensors:
        if key.section == _SECTION and key.state not in known:
            raise CheckpointError(f"{key} in {source.path} is a state that DeepSpeed does not load; it knows Adam's.")
    found = []
    for names in record.names:
        steps = {name: _step(source, record, name) for name in names}
        lacking = [
            n
            for n in names
            if steps[n] is None or any(TensorKey(_SECTION, n, k) not in source.tensors for k in _MOMENTS)
        ]
        if lacking:
            raise CheckpointError(
                f"{source.path} has no Adam states of {lacking[:5]}, which DeepSpeed needs of all. They had no "
                "gradient yet, or the optimizer is not Adam."
            )
        found.append(steps)
    distinct = [sorted(set(steps.values())) for steps in found]
    if dialect == "zero3":
        distinct = [sorted({step for steps in distinct for step in steps})] * len(found)
    if any(len(steps) > 1 for steps in distinct):
        raise CheckpointError(
            f"parameters in {source.path} have taken different numbers of steps ({distinct}); DeepSpeed counts them "
            + ("once for all." if dialect == "zero3" else "once per group.")
        )
    return [steps[0] if steps else 0 for steps in distinct]


def _step(source: StateSource, record: OptimizerRecord, name: str) -> Any:
    key = TensorKey(_SECTION, name, "step")
    if key in source.tensors:
        return int(read_tensor(source, key).item())
    return record.values.get(name, {}).get("step")


def _write_parameter(source: StateSource, folder: Path, name: str, dialect: Dialect, optimizer: OptimizerKind) -> None:
    folder.mkdir(parents=True)
    master = TensorKey(_SECTION, name, MASTER)
    keys = {"fp32": master if master in source.tensors else TensorKey(MODEL, name)}
    keys.update({state: TensorKey(_SECTION, name, state) for state in _MOMENTS})
    for state, key in keys.items():
        tensor = read_tensor(source, key, torch.float32)
        torch.save(
            {"param": tensor, "cat_dim": 0} if dialect == "zero12" else tensor.reshape(-1), folder / f"{state}.pt"
        )
    if dialect == "zero12":
        step = _step(source, source.optimizers[0], name)
        torch.save(_step_value(step, optimizer), folder / "step.pt")


def _step_value(step: int, optimizer: OptimizerKind) -> Any:
    return step if optimizer == "deepspeed" else step_tensor(step)


def _optimizer_state(
    record: OptimizerRecord, dialect: Dialect, optimizer: OptimizerKind, steps: list[int]
) -> dict[str, Any]:
    groups = [{**group, "params": [index]} for index, group in enumerate(record.groups)]
    if optimizer == "deepspeed":
        groups = [{**group, "step": step} for group, step in zip(groups, steps, strict=True)]
    state: dict[str, Any] = {
        "ds_version": _VERSION,
        "zero_stage": 3 if dialect == "zero3" else 1,
        "param_groups": groups,
    }
    if dialect == "zero3":
        state["optimizer_state_dict"] = {
            "state": {index: {"step": _step_value(step, optimizer)} for index, step in enumerate(steps)},
            "param_groups": [_common(groups)] + groups[1:],
        }
    return state


def _common(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The first group, without the options in which another group differs from it."""
    first = groups[0]
    same = {key: value for key, value in first.items() if all(key in group and group[key] == value for group in groups)}
    return {**same, "params": first["params"]}


def _model_state(source: StateSource, record: OptimizerRecord, dialect: Dialect, scratch: Path) -> dict[str, Any]:
    trained = {name for names in record.names for name in names}
    infos = {key: info for key, info in source.tensors.items() if key.section == MODEL}
    is_placeholder = {key: dialect == "zero3" and key.name in trained for key in infos}
    values = {
        key.name: tensor
        for key, tensor in copies_on_disk(source, [k for k in infos if not is_placeholder[k]], scratch).items()
    }
    frozen = [k.name for k, info in infos.items() if info.role != "buffer" and k.name not in trained]
    module: dict[str, Any] = {}
    for key, info in infos.items():
        if dialect == "zero3" and info.role != "buffer":
            module[key.name] = torch.empty(0, dtype=info.dtype)
        else:
            module[key.name] = values[key.name]
    module.update({alias: module[name] for alias, name in source.aliases.items()})
    rest = dict(source.rest)
    own = rest.pop("deepspeed", {})
    module.update(rest.pop(EXTRA_STATE, {}))
    clash = sorted(rest.keys() & OWN_KEYS)
    if clash:
        raise CheckpointError(f"{source.path} has entries named as DeepSpeed's own: {clash}.")
    step = source.step or 0
    return {
        "module": module,
        "buffer_names": [key.name for key, info in infos.items() if info.role == "buffer"],
        "optimizer": None,
        "param_shapes": [{n: torch.Size(infos[TensorKey(MODEL, n)].shape) for n in names} for names in record.names],
        "frozen_param_shapes": {name: torch.Size(infos[TensorKey(MODEL, name)].shape) for name in frozen},
        "shared_params": dict(source.aliases),
        "frozen_param_fragments": {name: values[name] for name in frozen},
        **{key: own.get(key) for key in ("lr_scheduler", "data_sampler", "random_ltd")},
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": _number(own, "global_samples"),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"optimizer": {"type": record.class_name}} if record.class_name else {},
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        **rest,
    }


def _number(own: Mapping[str, Any], key: str) -> int:
    return int(own.get(key) or 0)
