"""Opens a checkpoint of any format as the dict that Lightning loads, its tensors still on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_superscale.checkpoint.foreign.lightning import EXTRA_STATE, LAYOUT_VERSION, is_state_dict
from lightning_superscale.checkpoint.foreign.registry import detect, open_foreign
from lightning_superscale.checkpoint.foreign.torch_files import load_torch_file
from lightning_superscale.checkpoint.foreign.torch_optimizer import pack_optimizer
from lightning_superscale.checkpoint.load.reader import is_checkpoint, open_checkpoint
from lightning_superscale.checkpoint.local_shards import is_tensor_like, local_shards
from lightning_superscale.checkpoint.state import MASTER, MODEL, ReadRequest, StateSource, TensorKey
from lightning_superscale.checkpoint.storage.files import is_remote
from lightning_superscale.comm.mesh import DataMesh, single_mesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, whole_box
from lightning_superscale.ops.state_dtypes import follow_weights
from lightning_superscale.run.state.collect import canonical
from lightning_superscale.run.state.lazy_tensor import LazyTensor
from lightning_superscale.torch_private import loaders_of


class OpenedCheckpoint:
    """A training state on disk, for all ranks of a mesh to read together.

    Attributes:
        source: the training state; every rank of the mesh calls its `read`.
        mesh: the ranks that read together.
    """

    def __init__(self, source: StateSource, mesh: DataMesh) -> None:
        self.source = source
        self.mesh = mesh

    @cached_property
    def alone(self) -> StateSource:
        """A view of the checkpoint that this rank reads by itself."""
        if self.mesh.is_single or not is_checkpoint(self.source.path):
            return self.source
        return open_checkpoint(self.source.path, check_first=False)

    @cached_property
    def masters(self) -> dict[str, TensorKey]:
        """The master of each weight of which an optimizer has one, by the weight's name."""
        return {key.name: key for key in self.source.tensors if key.state == MASTER}

    def lazy(self, key: TensorKey) -> LazyTensor:
        """One whole tensor of the checkpoint, on the host, whose values are not read yet."""
        return LazyTensor(self, key, self.source.tensors[key])

    def as_lightning(self) -> dict[str, Any]:
        """The checkpoint as `CheckpointIO.load_checkpoint` returns it: lazy tensors, parameters numbered and named."""
        rest = dict(self.source.rest)
        lazies = {key: self.lazy(key) for key in self.source.tensors}
        weights: dict[str, Any] = {key.name: lazy for key, lazy in lazies.items() if key.section == MODEL}
        weights.update({name: weights[first] for name, first in self.source.aliases.items() if first in weights})
        weights.update(rest.pop(EXTRA_STATE, {}))
        checkpoint = {**LAYOUT_VERSION, **rest, "state_dict": weights}
        if self.source.step is not None:
            checkpoint.setdefault("global_step", self.source.step)
        records = self.source.optimizers
        if records:
            states = [pack_optimizer(record, lazies, index) for index, record in enumerate(records)]
            for record, state in zip(records, states, strict=True):
                for group, names in zip(state["param_groups"], record.names, strict=True):
                    group["param_names"] = list(names)
            checkpoint["optimizer_states"] = states
        return checkpoint


def open_any(path: str, mesh: DataMesh | None = None, *, is_all_used: bool = False) -> dict[str, Any]:
    """Open a checkpoint of any format as Lightning's dict. Every rank of the mesh calls it.

    A Lightning file is read as it is, from mapped memory; tensors of all others are lazy.

    Args:
        is_all_used: whether weights and then optimizer states will be loaded. Damage in the states would be found when
            weights have changed already, so all checksums of local files are verified now.

    Raises:
        CheckpointError: no checkpoint, a format that is not known, or damage.
    """
    mesh = mesh or single_mesh()
    if is_checkpoint(path) or is_remote(path):
        source = open_checkpoint(path, mesh)
        if is_all_used and not is_remote(path):
            source.check_all()
        return OpenedCheckpoint(source, mesh).as_lightning()
    if detect(path) == "lightning":
        loaded: dict[str, Any] = load_torch_file(Path(path))
        return loaded
    return OpenedCheckpoint(open_foreign(path), mesh).as_lightning()


def as_lightnings(content: Any) -> Any:
    """What `open_any` returned, as Lightning's own checkpoints are: a module's `state_dict()` has a place in one."""
    if is_state_dict(content):
        content = {"state_dict": content}
    is_one = isinstance(content, Mapping) and "state_dict" in content
    return {**LAYOUT_VERSION, **content} if is_one else content


def is_lazy(values: Mapping[str, Any]) -> bool:
    """Whether any value is a lazy tensor."""
    return any(isinstance(value, LazyTensor) for value in values.values())


def read_boxes(wanted: Sequence[tuple[LazyTensor, Box, Tensor]], opened: OpenedCheckpoint | None = None) -> None:
    """Fill parts of tensors, all at once. Every rank that opened the checkpoint calls it.

    Args:
        wanted: for each read a lazy tensor, the box of it to read, and a tensor of the box's shape to read into.
        opened: a checkpoint whose collective read this rank joins even where it wants nothing of it itself.
    """
    by_source: dict[int, tuple[OpenedCheckpoint, list[ReadRequest]]] = {}
    if opened is not None:
        by_source[id(opened)] = (opened, [])
    for lazy, box, out in wanted:
        by_source.setdefault(id(lazy.opened), (lazy.opened, []))[1].append(ReadRequest(lazy.key, box, out))
    for checkpoint, requests in by_source.values():
        checkpoint.source.read(requests)


def read_whole(values: Any) -> Any:
    """Nested dicts and lists with every lazy tensor read, whole, on the host. Every rank calls it."""
    lazies = {id(lazy): lazy for lazy in _lazies_in(values)}
    read = {number: torch.empty(tuple(lazy.shape), dtype=lazy.dtype) for number, lazy in lazies.items()}
    read_boxes([(lazy, whole_box(tuple(lazy.shape)), read[number]) for number, lazy in lazies.items()])
    return _replaced(values, read)


def _lazies_in(value: Any) -> list[LazyTensor]:
    if isinstance(value, LazyTensor):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [lazy for item in inside for lazy in _lazies_in(item)]


def _replaced(value: Any, read: Mapping[int, Tensor]) -> Any:
    if isinstance(value, LazyTensor):
        return read[id(value)]
    if isinstance(value, Mapping):
        return {key: _replaced(item, read) for key, item in value.items()}
    return [_replaced(item, read) for item in value] if isinstance(value, list) else value


def read_into(target: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Read the lazy tensors of the same names into tensors, whole or sharded, in place. Every rank calls it."""
    wanted = []
    for name, tensor in target.items():
        lazy = values.get(name)
        if isinstance(lazy, LazyTensor):
            wanted += [(lazy, shard.box, shard.tensor) for shard in local_shards(tensor)[2]]
    opened = next((lazy.opened for lazy in values.values() if isinstance(lazy, LazyTensor)), None)
    read_boxes(wanted, opened)


def fill(target: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Overwrite tensors in place, whole or sharded, with lazy or whole ones of the same names. Every rank calls it."""
    with torch.no_grad():
        if is_lazy(values):
            read_into(target, values)
        for name, tensor in target.items():
            value = values.get(name)
            if is_tensor_like(tensor) and isinstance(value, Tensor) and not isinstance(value, LazyTensor):
                for shard in local_shards(tensor)[2]:
                    shard.tensor.copy_(value[shard.box.within(whole_box(value.shape))])


def aligned(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under a module's own names, which wrappers such as torch.compile's may have changed."""
    renamed = {canonical(name): name for name in own}
    return {name if name in own else renamed.get(canonical(name), name): value for name, value in values.items()}


def _masters_for(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """The masters of 16-bit weights that a module takes in fp32, by the weights' names."""
    found = {}
    for name, lazy in values.items():
        dtype = getattr(own.get(name), "dtype", None)
        if isinstance(lazy, LazyTensor) and dtype == torch.float32 and lazy.dtype != torch.float32:
            master = lazy.opened.masters.get(lazy.key.name)
            if master is not None:
                found[name] = lazy.opened.lazy(master)
    return found


def read_weights(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, whole, on the host, for a module whose own are given; no bit is lost where these are fp32.

    Every rank calls it. A 16-bit weight whose master rounds to it is read as that master. Another one is as it is: an
    average of weights has been saved in its place, or an update of the master was on its way to it.
    """
    masters = _masters_for(values, own)
    weights, wide = read_whole(dict(values)), read_whole(masters)
    for name, master in wide.items():
        follow_weights(master, weights[name])
        weights[name] = master
    found: dict[str, Any] = weights
    return found


def fill_weights(own: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Overwrite a module's weights in place, whole or sharded, as `read_weights` gives them. Every rank calls it."""
    masters = _masters_for(values, own)
    fill(own, values)
    wide = {name: torch.empty_like(own[name]) for name in masters}
    fill(wide, masters)
    with torch.no_grad():
        for name, master in wide.items():
            narrow = values[name].dtype
            for held, mine in zip(local_shards(master)[2], local_shards(own[name])[2], strict=True):
                follow_weights(held.tensor, mine.tensor.to(narrow))
                mine.tensor.copy_(held.tensor)


def fitted(
    module: nn.Module, values: Mapping[str, Any], own: Mapping[str, Any], *, strict: bool, allow: Sequence[str]
) -> dict[str, Any]:
    """A checkpoint's state dict under the names that a module has for it.

    Args:
        own: the module's state dict, whole or sharded.

    Raises:
        CheckpointError: it does not fit, and nothing was changed.
    """
    weights = aligned(values, own)
    check_fits(module, weights, own, strict=strict, allow=allow)
    return weights


def check_fits(
    module: nn.Module, values: Mapping[str, Any], own: Mapping[str, Any], *, strict: bool, allow: Sequence[str]
) -> None:
    """Refuse a state dict that does not fit before any weight changes.

    A model is not checked if any of its modules renames or converts entries as it loads them.

    Args:
        own: the module's state dict, whole or sharded.

    Raises:
        CheckpointError: lists missing and unexpected names (with `strict`) and shapes that differ.
    """
    if any(_converts(one) for one in module.modules()):
        return
    own = {name: value for name, value in own.items() if is_tensor_like(value)}
    theirs = {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def ours_to_say(names: Any) -> list[str]:
        return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in allow))

    missing, unexpected = ours_to_say(own.keys() - theirs.keys()), ours_to_say(theirs.keys() - own.keys())
    problems = []
    if strict and missing:
        problems.append(f"it lacks {_listed(missing)}")
    if strict and unexpected:
        problems.append(f"the module has no {_listed(unexpected)}")
    shapes = [
        f"{name} is {tuple(theirs[name].shape)} there and {tuple(own[name].size())} here"
        for name in sorted(own.keys() & theirs.keys())
        if tuple(own[name].size()) != tuple(theirs[name].shape)
    ]
    if shapes:
        problems.append(f"shapes differ: {_listed(shapes)}")
    if problems:
        where = next((lazy.opened.source.path for lazy in theirs.values() if isinstance(lazy, LazyTensor)), "")
        raise CheckpointError(
            f"the checkpoint{f' {where}' if where else ''} does not fit {type(module).__name__}, and nothing was "
            f"changed: {'; '.join(problems)}. Build the model as it was, rename entries in on_load_checkpoint, name "
            "what may differ in CheckpointConfig.allow, or set strict_loading=False."
        )


def _converts(module: nn.Module) -> bool:
    """Whether code that is not torch's has a say in what a module loads; torch's keeps names and shapes."""
    return not all(str(getattr(loader, "__module__", "")).startswith("torch.") for loader in loaders_of(module))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
