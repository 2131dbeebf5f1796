"""Saving: every rank writes its part of a training state, and the checkpoint appears complete or not at all.

`prepare` looks at the state and divides the work; `write` needs the result of `prepare` alone, and so can run while
training goes on. Both go by phases ([Note: Phases] in phases.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_superscale import __version__
from lightning_superscale.checkpoint.format import json_codec as rest_json
from lightning_superscale.checkpoint.format.blocks import FileDigest, hex_digest
from lightning_superscale.checkpoint.format.chunks import Chunk
from lightning_superscale.checkpoint.format.dtypes import dtype_name
from lightning_superscale.checkpoint.format.manifest import REST_NAME, FileRecord, Manifest, blocks_name
from lightning_superscale.checkpoint.format.payload import PayloadWriter, is_wrapper
from lightning_superscale.checkpoint.phases import attempt
from lightning_superscale.checkpoint.save.plan import WRITE_THREADS, WriteItem, divide, plan_file, plan_files
from lightning_superscale.checkpoint.save.table import ChunkTable, records_of, table_of
from lightning_superscale.checkpoint.state import EXTRA, LocalState, TensorInfo, TensorKey
from lightning_superscale.checkpoint.storage.local import Target, new_uuid, target_at
from lightning_superscale.comm.collectives import gather_objects
from lightning_superscale.comm.mesh import DataMesh
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, whole_box


class Values(Protocol):
    """The values of a write item, which are written later."""

    def use(self) -> AbstractContextManager[Tensor]:
        """The values as a tensor of the item's shape and dtype, which stays as it is while the context is open."""


class HeldValues:
    """Values that nobody changes before they are written."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def use(self) -> AbstractContextManager[Tensor]:
        return nullcontext(self.tensor)


@dataclass(frozen=True, slots=True)
class OwnItem:
    """A write item of this rank, and its values, of shape `item.box.size`."""

    item: WriteItem
    values: Values


@dataclass(frozen=True, slots=True)
class PreparedSave:
    """One rank's part of a state, ready to be written.

    Attributes:
        tensors: all tensors of the checkpoint, with those within `rest` and the optimizers.
        own: this rank's items.
        nbytes: bytes of all ranks' items.
        step: optimizer steps taken; None where unknown.
        rest: content of rest.json; of use on rank 0 only, like `optimizers` and `aliases`.
        optimizers: the optimizers in the form of the manifest, by index.
        aliases: name of a tied parameter or buffer -> the name under which its tensor is saved.
    """

    tensors: dict[TensorKey, TensorInfo]
    own: tuple[OwnItem, ...]
    nbytes: int
    step: int | None
    rest: bytes
    optimizers: tuple[dict[str, Any], ...]
    aliases: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rank's message to the others before a save: a digest of its tensors' descriptions, and its boxes.

    Attributes:
        boxes: the rank's boxes of each tensor, in the order of the sorted keys.
        extras: tensors within the rest and the optimizers; on rank 0 only.
    """

    digest: str
    boxes: tuple[tuple[Box, ...], ...]
    extras: dict[TensorKey, TensorInfo] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Written:
    """The files and chunks that one rank wrote."""

    files: dict[str, FileRecord]
    chunks: ChunkTable


def save(path: str, state: LocalState, mesh: DataMesh, *, step: int | None = None) -> None:
    """Write a checkpoint at `path`, and replace one that is there. Every rank calls it, with its own shards.

    Args:
        path: a folder that all hosts see, or a URL that fsspec knows; the same on every rank.
        state: this rank's shards, and the description of all tensors.
        mesh: the ranks that save.
        step: optimizer steps taken.

    Raises:
        CheckpointError: on every rank, when any failed; names that rank and the reason. A checkpoint that was at `path`
            is untouched.
    """
    check_place(path, mesh)
    write(path, prepare(state, mesh, step=step), mesh)


def check_place(path: str, mesh: DataMesh) -> None:
    """Refuse a place at which something else lies than a checkpoint or nothing. Every rank calls it, before all work.

    Raises:
        CheckpointError: on every rank: names the path as it was resolved, and what lies there.
    """
    attempt(mesh, lambda: target_at(path).check() if mesh.world.rank == 0 else None, _not_written(path))


def prepare(state: LocalState, mesh: DataMesh, *, step: int | None = None) -> PreparedSave:
    """Check a state and divide the work. Every rank calls it. The values stay where they are, uncopied.

    Raises:
        CheckpointError: on every rank: a value can't be saved, or the ranks' shards don't cover their tensors.
    """
    extras: dict[str, Tensor] = {}
    encoded: dict[str, Any] = {}

    def look() -> _Offer:
        keys = sorted(state.tensors)
        for key in keys:
            _check_shards(key, state)
        if mesh.world.rank == 0:
            encoded["rest"] = rest_json.encode(state.rest, "rest", extras)
            encoded["optimizers"] = [_encode_optimizer(state, i, extras) for i in range(len(state.optimizers))]
        infos = {_extra_key(name): TensorInfo(t.dtype, tuple(t.shape), "extra") for name, t in extras.items()}
        for key, info in infos.items():
            dtype_name(info.dtype, key)
        facts = repr([(key, state.tensors[key]) for key in keys])
        # Tensors that are cut alike share one tuple, also in the message: `divide` looks at it once.
        alike: dict[tuple[Box, ...], tuple[Box, ...]] = {}
        cuts = (tuple(shard.box for shard in state.shards.get(key, ())) for key in keys)
        boxes = tuple(alike.setdefault(cut, cut) for cut in cuts)
        return _Offer(hashlib.blake2b(facts.encode()).hexdigest(), boxes, infos)

    offers = attempt(mesh, look, "the state can't be saved")
    _check_equal(state, [offer.digest for offer in offers], mesh)
    keys = sorted(state.tensors)
    held = [dict(zip(keys, offer.boxes, strict=True)) for offer in offers]
    tensors = {**state.tensors, **offers[0].extras}
    held[0] |= {key: (whole_box(info.shape),) for key, info in offers[0].extras.items()}
    items = divide(tensors, held)
    values = {(key, shard.box): shard.tensor for key, shards in state.shards.items() for shard in shards}
    values |= {(_extra_key(name), whole_box(tensor.shape)): tensor for name, tensor in extras.items()}
    return PreparedSave(
        tensors=tensors,
        own=tuple(
            OwnItem(item, HeldValues(values[item.key, item.shard][item.box.within(item.shard)]))
            for item in items[mesh.world.rank]
        ),
        nbytes=sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors.values()),
        step=step,
        rest=json.dumps(encoded.get("rest"), separators=(",", ":"), allow_nan=False).encode(),
        optimizers=tuple(encoded.get("optimizers", ())),
        aliases=dict(state.aliases),
    )


def write(path: str, prepared: PreparedSave, mesh: DataMesh) -> None:
    """Write a prepared save to files, and give the finished checkpoint its name. Every rank calls it.

    Raises:
        CheckpointError: on every rank, when any failed; names that rank and the reason. A checkpoint that was at `path`
            is untouched.
    """
    target = target_at(path)
    is_first = mesh.world.rank == 0
    try:
        uuid = attempt(mesh, lambda: _begin(target, prepared) if is_first else "", _not_written(path))[0]
        written = attempt(mesh, lambda: _write_own(target, prepared, uuid, mesh), _not_written(path))
        attempt(mesh, lambda: _publish(target, prepared, uuid, written) if is_first else None, _not_written(path))
    except BaseException:
        if is_first:
            target.abort()
        raise


def _not_written(path: str) -> str:
    return f"the checkpoint {path} was not written, and what was there is as it was"


def _extra_key(name: str) -> TensorKey:
    return TensorKey(EXTRA, name)


def _check_shards(key: TensorKey, state: LocalState) -> None:
    info = state.tensors[key]
    dtype_name(info.dtype, key)
    for shard in state.shards.get(key, ()):
        if is_wrapper(shard.tensor) or shard.tensor.layout is not torch.strided:
            raise CheckpointError(
                f"{key}: a plain dense tensor was expected, found a {type(shard.tensor).__name__} with layout "
                f"{shard.tensor.layout}. Give the part that this rank holds, such as a DTensor's to_local()."
            )
        if tuple(shard.tensor.shape) != shard.box.size or shard.tensor.dtype != info.dtype:
            raise CheckpointError(
                f"{key}: a shard of shape {shard.box.size} and {info.dtype} was announced, found "
                f"{tuple(shard.tensor.shape)} and {shard.tensor.dtype}."
            )


def _encode_optimizer(state: LocalState, index: int, extras: dict[str, Tensor]) -> dict[str, Any]:
    record = state.optimizers[index]
    where = f"optimizers[{index}]"
    return {
        "class": record.class_name,
        "groups": rest_json.encode(list(record.groups), f"{where}/groups", extras),
        "names": [list(names) for names in record.names],
        "values": rest_json.encode(record.values, f"{where}/values", extras),
        **({"rule": rest_json.encode(record.rule, f"{where}/rule", extras)} if record.rule else {}),
    }


def _check_equal(state: LocalState, digests: Sequence[str], mesh: DataMesh) -> None:
    """Refuse ranks that describe different tensors. Every rank calls it, and all see the same digests."""
    if len(set(digests)) == 1:
        return
    listed = gather_objects(mesh, {str(key): str(info) for key, info in state.tensors.items()})
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    name = next(name for name in sorted({*listed[0], *listed[other]}) if listed[0].get(name) != listed[other].get(name))
    raise CheckpointError(
        f"ranks differ in what they save: {name} is {listed[0].get(name, 'absent')} on rank 0 and "
        f"{listed[other].get(name, 'absent')} on rank {other}. Every rank must list every tensor."
    )


def _begin(target: Target, prepared: PreparedSave) -> str:
    uuid = new_uuid()
    target.begin(uuid, prepared.nbytes + len(prepared.rest))
    return uuid


def _write_own(target: Target, prepared: PreparedSave, uuid: str, mesh: DataMesh) -> _Written:
    target.join(uuid)
    files: dict[str, FileRecord] = {}
    chunks: list[tuple[TensorKey, Chunk]] = []
    planned = plan_files(mesh.world.rank, [one.item for one in prepared.own], prepared.tensors)
    names = {name: [prepared.own[i] for i in indices] for name, indices in planned.items()}
    with ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="checkpoint writer") as threads:
        tasks = [threads.submit(_write_file, target, name, names[name], prepared, uuid) for name in names]
    for name, task in zip(names, tasks, strict=True):
        digest, own = task.result()
        files[name] = FileRecord(digest.size, digest.xxh3)
        chunks += own
        files[blocks_name(name)] = _write_bytes(target, blocks_name(name), digest.blocks)
    target.seal()
    return _Written(files, table_of(chunks, prepared.tensors))


def _write_file(
    target: Target, name: str, own: Sequence[OwnItem], prepared: PreparedSave, uuid: str
) -> tuple[FileDigest, list[tuple[TensorKey, Chunk]]]:
    plan = plan_file(name, [one.item for one in own], prepared.tensors, uuid)
    writer = PayloadWriter(target.create(name))
    writer.write(plan.header)
    for i in plan.order:
        with own[i].values.use() as tensor:
            writer.write_tensor(tensor)
    return writer.finish(), [*plan.chunks]


def _write_bytes(target: Target, name: str, data: bytes) -> FileRecord:
    file = target.create(name)
    file.write(memoryview(data))
    file.close()
    return FileRecord(len(data), hex_digest(data))


def _publish(target: Target, prepared: PreparedSave, uuid: str, written: Sequence[_Written]) -> None:
    files = {name: file for one in written for name, file in one.files.items()}
    files[REST_NAME] = _write_bytes(target, REST_NAME, prepared.rest)
    manifest = Manifest(
        uuid=uuid,
        step=prepared.step,
        world=len(written),
        writers=sum(bool(one.files) for one in written),
        libs={
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "lightning-superscale": __version__,
        },
        files=files,
        tensors=records_of([one.chunks for one in written], prepared.tensors, files),
        optimizers=prepared.optimizers,
        aliases=prepared.aliases,
        root=target.root,
    )
    manifest.check(target.path)
    target.publish(manifest.to_bytes())


def with_values(prepared: PreparedSave, values: Sequence[Values]) -> PreparedSave:
    """A copy of a prepared save that writes other values, one for each item of `prepared.own`, in its order."""
    own = tuple(replace(one, values=new) for one, new in zip(prepared.own, values, strict=True))
    return replace(prepared, own=own)
