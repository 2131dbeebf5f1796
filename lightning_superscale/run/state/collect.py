"""Between Lightning's checkpoint, a dict, and the training state that universal checkpoints are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superscale.checkpoint.foreign.lightning import EXTRA_STATE
from lightning_superscale.checkpoint.foreign.torch_optimizer import parameter_names, state_role
from lightning_superscale.checkpoint.local_shards import is_tensor_like, local_shards
from lightning_superscale.checkpoint.state import (
    MODEL,
    RULE_STATE,
    LocalShard,
    LocalState,
    OptimizerRecord,
    Role,
    TensorInfo,
    TensorKey,
    optimizer_section,
)
from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import CheckpointError

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def canonical(name: str) -> str:
    """A name without what torch.compile, FSDP and activation checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class _Collected:
    """Tensors of a state as this rank knows them."""

    def __init__(self) -> None:
        self.infos: dict[TensorKey, TensorInfo] = {}
        self.shards: dict[TensorKey, tuple[LocalShard, ...]] = {}

    def add(self, key: TensorKey, value: Any, role: Role, *, is_trainable: bool = False) -> tuple[int, ...]:
        shape, dtype, held = local_shards(value)
        self.infos[key] = TensorInfo(dtype, shape, role, is_trainable)
        self.shards[key] = held
        return shape


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter or buffer -> its first."""
    first: dict[Tensor, str] = {}
    tied: dict[str, str] = {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for wrapped, tensor in named:
            name = canonical(wrapped)
            if tensor in first:
                tied[name] = first[tensor]
            else:
                first[tensor] = name
    return tied


def local_state(
    checkpoint: Mapping[str, Any], module: nn.Module, optimizers: Sequence[Optimizer], mesh: DataMesh
) -> LocalState:
    """Turn a checkpoint that `trainer.save_checkpoint` dumped into this rank's part of a training state.

    Every rank calls it. Tensors may be whole or sharded (see `local_shards`); a rank may lack tensors that others have.

    Args:
        checkpoint: has "state_dict" and, unless it was saved with weights only, "optimizer_states": torch's, with
            parameters numbered, or named as they are in the module.

    Raises:
        CheckpointError: two ranks describe one tensor differently; raised on every rank.
    """
    own = _Collected()
    aliases, extra_state = _collect_model(own, checkpoint.get("state_dict", {}), module)
    records = [
        _collect_optimizer(own, i, packed, module, optimizers)
        for i, packed in enumerate(checkpoint.get("optimizer_states", []))
    ]
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    if extra_state:
        rest[EXTRA_STATE] = extra_state
    told = gather_objects(mesh, (own.infos, aliases, records))
    return LocalState(
        tensors=_merged([infos for infos, _, _ in told]),
        shards=own.shards,
        optimizers=tuple(max((records[i] for _, _, records in told if i < len(records)), key=_num_names)
                         for i in range(max(len(records) for _, _, records in told))),
        aliases={name: target for _, known, _ in told for name, target in known.items()},
        rest=rest,
    )  # fmt: skip


def _num_names(record: OptimizerRecord) -> int:
    return sum(map(len, record.names))


def _merged(told: Sequence[Mapping[TensorKey, TensorInfo]]) -> dict[TensorKey, TensorInfo]:
    tensors: dict[TensorKey, TensorInfo] = {}
    for rank, infos in enumerate(told):
        for key, info in infos.items():
            known = tensors.setdefault(key, info)
            if known != info:
                raise CheckpointError(
                    f"{key} is {info.dtype} of shape {info.shape} on rank {rank} and {known.dtype} of shape "
                    f"{known.shape} on a rank before it; expected the same on all."
                )
    return tensors


def _collect_model(
    own: _Collected, state: Mapping[str, Any], module: nn.Module
) -> tuple[dict[str, str], dict[str, Any]]:
    state = {canonical(name): value for name, value in state.items()}
    trainable = {canonical(name): p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    buffers = {canonical(name) for name, _ in module.named_buffers(remove_duplicate=False)}
    tied = {name: first for name, first in tied_names(module).items() if name in state and first in state}
    extra: dict[str, Any] = {}
    for name, value in state.items():
        if name in tied:
            continue
        if is_tensor_like(value):
            role: Role = "buffer" if name in buffers else "model"
            own.add(TensorKey(MODEL, name), value, role, is_trainable=trainable.get(name, False))
        else:
            extra[name] = value
    return tied, extra


def _collect_optimizer(
    own: _Collected, index: int, packed: Mapping[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]
) -> OptimizerRecord:
    groups = packed.get("param_groups", [])
    if any(isinstance(number, int) for group in groups for number in group["params"]):
        names = map(canonical, parameter_names(module, optimizers)[index])
        name_of: dict[Any, str] = dict(zip((n for group in groups for n in group["params"]), names, strict=True))
    else:
        name_of = {name: canonical(name) for group in groups for name in group["params"]}
    shapes = {key.name: info.shape for key, info in own.infos.items() if key.section == MODEL}
    values: dict[str, dict[str, Any]] = {}
    for number, state in packed.get("state", {}).items():
        name = name_of[number]
        for key, value in state.items():
            if not is_tensor_like(value):
                values.setdefault(name, {})[key] = value
                continue
            shape = local_shards(value)[0]
            role = state_role(key, shape, shapes.get(name, shape))
            own.add(TensorKey(optimizer_section(index), name, key), value, role)
    return OptimizerRecord(
        class_name=type(optimizers[index]).__name__,
        groups=tuple({k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups),
        names=tuple(tuple(name_of[number] for number in group["params"]) for group in groups),
        values=values,
        rule=dict(packed.get(RULE_STATE, {})),
    )
