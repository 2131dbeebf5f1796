"""Common parts of the readers of DeepSpeed's directories: finding files, reading model files, refusing layouts.

Facts about the files were checked against DeepSpeed 0.19.8, which is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import ForeignChunk, ForeignTensor, Table, flat_chunks, whole_tensor
from lightning_superscale.checkpoint.foreign.lightning import extra_state
from lightning_superscale.checkpoint.foreign.torch_files import Inert, load_torch_file
from lightning_superscale.checkpoint.state import MODEL, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OWN_KEYS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "universal_checkpoint_info", "num_experts", "ds_autoep_layers",
}  # fmt: skip
_STAND_INS = [
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Inert, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
]


def load_deepspeed_file(path: Path) -> Any:
    """Load a file that DeepSpeed wrote, with stand-ins for the classes that it names; tensors stay on disk.

    Raises:
        CheckpointError: the file is missing or damaged, or names a class that is not allowed.
    """
    return load_torch_file(path, _STAND_INS)


def find_folder(path: Path) -> Path | None:
    """The directory with the model's files: `path`, or the one that its `latest` or `latest_universal` names.

    Returns:
        None where `path` is no directory of DeepSpeed.

    Raises:
        CheckpointError: `latest` or `latest_universal` names no directory with a model's files.
    """
    if _model_files(path):
        return path
    for pointer in ("latest", "latest_universal"):
        if (path / pointer).is_file():
            tag = (path / pointer).read_text(errors="replace").strip()
            if not tag or Path(tag).name != tag:
                raise CheckpointError(f"{path / pointer} should name a directory beside it, it says {tag[:80]!r}.")
            if _model_files(path / tag):
                return path / tag
            raise CheckpointError(
                f"{path / pointer} names {tag!r}, but {path / tag} has no DeepSpeed *_model_states.pt. Copy the whole "
                "checkpoint."
            )
    return None


def _model_files(folder: Path) -> dict[tuple[int | None, int], Path]:
    files = {}
    for file in sorted(folder.glob("*_model_states.pt")):
        match = _MODEL_FILE.fullmatch(file.name)
        if match is not None:
            files[None if match[1] is None else int(match[1]), int(match[2])] = file
    return files


def clean(name: str) -> str:
    """A parameter's name in the LightningModule, without the prefix of the wrapper that Lightning before 2.1 used."""
    return name.removeprefix("_forward_module.")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The content of a DeepSpeed checkpoint's model files.

    Attributes:
        folder: directory of the files.
        is_sharded: whether stage 3 wrote them; `module` then has placeholders of the weights' dtypes.
        ranks: number of data-parallel ranks that wrote; with sequence parallelism, of both kinds together.
        file: rank 0's model file.
        module: tensors of rank 0's state_dict of the module.
        shapes: shapes of trainable weights, by name, in the order of the flat partitions; one mapping per parameter
            group, in stage 3 per sub-group.
        buffers: names of buffers in `module`.
        frozen_shapes: shapes of weights without gradients, by name; in stages 2 and 3.
        frozen: each rank's flat shards of weights without gradients, by name; in stage 3.
        aliases: name of a tied weight -> the name under which it is saved.
        config: DeepSpeed's configuration of the run.
        step: optimizer steps taken, without those that were skipped.
        rest: entries that the client added (all of Lightning's), and DeepSpeed's own entries under "deepspeed".
    """

    folder: Path
    is_sharded: bool
    ranks: int
    file: Path
    module: Mapping[str, Tensor]
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    buffers: frozenset[str]
    frozen_shapes: dict[str, tuple[int, ...]]
    frozen: tuple[Mapping[str, Tensor], ...]
    aliases: dict[str, str]
    config: Mapping[str, Any]
    step: int
    rest: dict[str, Any]

    @property
    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all trainable weights, by name."""
        return {name: shape for group in self.shapes for name, shape in group.items()}


def read_model_files(folder: Path) -> ModelFiles:
    """Read the model's files in `folder`; weights stay on disk.

    Raises:
        CheckpointError: files are missing or damaged, or have a layout that can't be read (tensor, pipeline or expert
            parallelism, no ZeRO).
    """
    files = _model_files(folder)
    _check_layout(folder, files)
    is_sharded = next(iter(files))[0] is not None
    first = files[0 if is_sharded else None, 0]
    head = _load(first)
    ranks = int(head["dp_world_size"])
    if head.get("param_shapes") is None:
        raise CheckpointError(
            f"{first} was saved without ZeRO (stage 0), whose optimizer states name no parameters. Load it in "
            "DeepSpeed and save it with stage 1, 2 or 3."
        )
    fragments: list[Mapping[str, Tensor]] = []
    if is_sharded and head.get("frozen_param_shapes"):
        missing = [rank for rank in range(ranks) if (rank, 0) not in files]
        if missing:
            raise CheckpointError(
                f"{folder} was written by {ranks} ranks, and the model states of ranks {missing} are missing. Copy the "
                "whole checkpoint."
            )
        fragments = [_named((head if rank == 0 else _load(files[rank, 0]))["frozen_param_fragments"] or {})
                     for rank in range(ranks)]  # fmt: skip
    return ModelFiles(
        folder=folder,
        is_sharded=is_sharded,
        ranks=ranks,
        file=first,
        module=_named({name: value for name, value in head["module"].items() if isinstance(value, Tensor)}),
        shapes=tuple({clean(n): tuple(shape) for n, shape in group.items()} for group in head["param_shapes"]),
        buffers=frozenset(map(clean, head["buffer_names"])),
        frozen_shapes={clean(n): tuple(shape) for n, shape in (head.get("frozen_param_shapes") or {}).items()},
        frozen=tuple(fragments),
        aliases={clean(alias): clean(name) for alias, name in dict(head.get("shared_params") or {}).items()},
        config=head.get("ds_config") or {},
        step=int(head["global_steps"]) - int(head["skipped_steps"]),
        rest=_rest(head),
    )


def _load(file: Path) -> Mapping[str, Any]:
    state = load_deepspeed_file(file)
    needed = ("module", "param_shapes", "buffer_names", "dp_world_size", "global_steps", "skipped_steps")
    missing = [key for key in needed if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise CheckpointError(f"{file} is no model file of DeepSpeed: it lacks {', '.join(missing)}.")
    return dict(state)


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {clean(name): tensor for name, tensor in tensors.items()}


def _check_layout(folder: Path, files: Mapping[tuple[int | None, int], Path]) -> None:
    what = None
    if len({mp_rank for _, mp_rank in files}) > 1:
        what = "tensor or pipeline parallelism"
    elif any(folder.glob("layer_*_expert_*")) or any(folder.glob("expp_rank_*")):
        what = "experts"
    elif any(folder.glob("layer_*-model_*")):
        what = "pipeline parallelism"
    if what is not None:
        raise CheckpointError(
            f"{folder} was saved with {what}, which can't be read: how its parts join is not in the files. Load it in "
            "DeepSpeed with a data-parallel layout and save it again."
        )
    if (None, 0) not in files and (0, 0) not in files:
        raise CheckpointError(f"{folder} lacks the first rank's *_model_states.pt. Copy the whole checkpoint.")


def _rest(head: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in head.items() if key not in OWN_KEYS}
    own = (
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "ds_version",
    )
    extra = extra_state({clean(name): value for name, value in head["module"].items()})
    return {**rest, **extra, "deepspeed": {key: head.get(key) for key in own}}


def loss_scaler(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an fp16 run's loss scaler, by name; empty for a run without one."""
    return dict(vars(state["loss_scaler"])) if "loss_scaler" in state else {}


def model_entries(files: ModelFiles, masters: Mapping[str, ForeignTensor]) -> Table:
    """The weights and buffers of a checkpoint.

    Stage 3 saves no trainable weights. Their values are those of their master weights, rounded to their dtypes, as
    DeepSpeed loads them.

    Args:
        masters: fp32 master weights of all trainable weights, by name.

    Raises:
        CheckpointError: no file has a weight; names it.
    """
    table = Table()
    for name, tensor in files.module.items():
        if name in files.aliases:
            continue
        key, trainable = TensorKey(MODEL, name), name in masters
        if name in files.buffers:
            table[key] = whole_tensor(tensor, "buffer", str(files.file))
        elif not files.is_sharded:
            table[key] = whole_tensor(tensor, "model", str(files.file), trainable=trainable)
        elif trainable:
            table[key] = rounded(masters[name], tensor.dtype)
        else:
            table[key] = _frozen_entry(files, name)
    lost = [name for name in masters if TensorKey(MODEL, name) not in table]
    if lost:
        raise CheckpointError(f"{files.file} lacks weights of which there are optimizer states: {lost[:5]}.")
    return table


def rounded(master: ForeignTensor, dtype: torch.dtype) -> ForeignTensor:
    """The weight of a master weight: the master's values, rounded to `dtype` when they are read."""

    def read(chunk: ForeignChunk) -> ForeignChunk:
        return ForeignChunk(chunk.box, lambda index: chunk.read(index).to(dtype), chunk.file)

    info = TensorInfo(dtype, master.info.shape, "model", trainable=True)
    return ForeignTensor(info, tuple(read(chunk) for chunk in master.chunks))


def _frozen_entry(files: ModelFiles, name: str) -> ForeignTensor:
    shape = files.frozen_shapes.get(name)
    if shape is None or any(name not in parts for parts in files.frozen):
        raise CheckpointError(
            f"{files.folder} has no values of {name!r}: neither a rank's states nor frozen fragments."
        )
    numel, chunks = torch.Size(shape).numel(), list[ForeignChunk]()
    for rank, parts in enumerate(files.frozen):
        start, stop = rank_range(numel, files.ranks, rank)
        chunks += flat_chunks(shape, start, parts[name].reshape(-1)[: stop - start], f"{files.folder} (rank {rank})")
    return ForeignTensor(TensorInfo(files.frozen[0][name].dtype, shape, "model"), tuple(chunks))


def rank_range(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """Elements [start, stop) of a flattened tensor that are a rank's shard in stage 3: equal parts, the last padded."""
    part = -(-numel // ranks)
    return min(rank * part, numel), min((rank + 1) * part, numel)


def class_name(config: Mapping[str, Any]) -> str:
    """The class name of the optimizer in DeepSpeed's configuration; "" where the client made the optimizer."""
    optimizer = config.get("optimizer")
    return str(optimizer.get("type", "")) if isinstance(optimizer, Mapping) else ""


def options_of(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Each group's options, without its parameters and the step that DeepSpeed's own optimizers count there."""
    return tuple({key: value for key, value in group.items() if key not in ("params", "step")} for group in groups)


def step_tensor(value: Any) -> Tensor | None:
    """A step count as an fp32 tensor without dims, as torch's optimizers keep it; a tensor stays as it is.

    Args:
        value: a tensor, a number (of DeepSpeed's own optimizers), or None for no count.
    """
    if value is None:
        return None
    return value if isinstance(value, Tensor) else torch.tensor(float(value))
