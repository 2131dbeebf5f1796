"""A summary of a checkpoint of any format, made without reading tensors' values and without running any of its code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_superscale.checkpoint.foreign.lightning import Names
from lightning_superscale.checkpoint.foreign.lightning_dirs import META
from lightning_superscale.checkpoint.foreign.registry import detect
from lightning_superscale.checkpoint.foreign.torch_files import load_torch_file
from lightning_superscale.checkpoint.format import json_codec as rest_json
from lightning_superscale.checkpoint.format.malformed import malformed_as_error
from lightning_superscale.checkpoint.format.manifest import MANIFEST_NAME
from lightning_superscale.checkpoint.load.reader import SavedState
from lightning_superscale.checkpoint.state import StateSource, TensorInfo, TensorKey
from lightning_superscale.checkpoint.storage.files import local_path
from lightning_superscale.checkpoint.tools.chunks import num_bytes
from lightning_superscale.checkpoint.tools.view import open_state
from lightning_superscale.errors import CheckpointError

OURS = "lightning-superscale"
CLASSES = {
    "model": "weights",
    "buffer": "buffers",
    "master": "masters",
    "state": "optimizer states",
    "scalar": "scalars",
    "extra": "extras",
}


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One tensor of a checkpoint, without its values.

    Attributes:
        num_pieces: number of the tensor's chunks in files; None where the format's reader does not tell it.
    """

    key: TensorKey
    info: TensorInfo
    num_pieces: int | None


@dataclass(frozen=True, slots=True)
class OptimizerSummary:
    """One optimizer, without its states.

    Attributes:
        class_name: name of the optimizer's class; "" where the format does not say.
        names: each group's parameters, by name, in the optimizer's order.
        groups: each group's options.
    """

    class_name: str
    names: tuple[tuple[str, ...], ...]
    groups: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """The facts about a checkpoint that are known without its values.

    Attributes:
        path: path or URL of the checkpoint.
        format: "lightning-superscale", or the name of one of `foreign.registry.FORMATS`.
        schema: version of the format; "" where it has none.
        step: optimizer steps taken; None where the format does not say.
        world: number of ranks that wrote it; None where the format does not say.
        libraries: versions of the libraries that wrote it, by name.
        tensors: all tensors, by key.
        optimizers: all optimizers, by index.
        optimizers_missing: why the optimizers are unknown; "" where they are known.
        aliases: name of a tied tensor -> the name under which it is saved.
        rest: names of the entries that are neither weights nor optimizers; None where finding them would read values.
        files: size in bytes of each file, by name.
    """

    path: str
    format: str
    schema: str
    step: int | None
    world: int | None
    libraries: Mapping[str, str]
    tensors: tuple[TensorSummary, ...]
    optimizers: tuple[OptimizerSummary, ...]
    optimizers_missing: str
    aliases: Mapping[str, str]
    rest: tuple[str, ...] | None
    files: Mapping[str, int]

    def classes(self) -> dict[str, list[TensorSummary]]:
        """Tensors by class ("weights", "masters", ...), in the order of `CLASSES`, without those that are empty."""
        found: dict[str, list[TensorSummary]] = {name: [] for name in CLASSES.values()}
        for tensor in self.tensors:
            found[CLASSES[tensor.info.role]].append(tensor)
        return {name: tensors for name, tensors in found.items() if tensors}

    def to_json(self) -> dict[str, Any]:
        """The summary as values that `json.dumps` takes; sizes in bytes."""
        return {
            "path": self.path,
            "format": self.format,
            "schema": self.schema or None,
            "step": self.step,
            "world": self.world,
            "libraries": dict(self.libraries),
            "classes": {
                name: {
                    "tensors": len(tensors),
                    "dtypes": sorted({dtype_text(t.info) for t in tensors}),
                    "numel": sum(numel_of(t.info) for t in tensors),
                    "bytes": sum(num_bytes(t.info) for t in tensors),
                }
                for name, tensors in self.classes().items()
            },
            "tensors": [
                {
                    "section": t.key.section,
                    "name": t.key.name,
                    "state": t.key.state or None,
                    "dtype": dtype_text(t.info),
                    "shape": list(t.info.shape),
                    "role": t.info.role,
                    "trainable": t.info.trainable,
                    "pieces": t.num_pieces,
                }
                for t in self.tensors
            ],
            "optimizers": [
                {
                    "class": one.class_name or None,
                    "groups": [
                        {"names": list(names), **{key: _plain(value) for key, value in group.items()}}
                        for names, group in zip(one.names, one.groups, strict=True)
                    ],
                }
                for one in self.optimizers
            ],
            "optimizers_missing": self.optimizers_missing or None,
            "aliases": dict(self.aliases),
            "rest": None if self.rest is None else list(self.rest),
            "files": dict(self.files),
        }


def dtype_text(info: TensorInfo) -> str:
    """The name of a tensor's dtype, such as "float32"."""
    return str(info.dtype).removeprefix("torch.")


def numel_of(info: TensorInfo) -> int:
    """The number of elements of an unsharded tensor."""
    return num_bytes(info) // info.dtype.itemsize


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def summarize(path: str, names: Names | None = None) -> Summary:
    """Summarize a checkpoint of any known format. One process calls it.

    Args:
        path: file, folder, or a URL that fsspec knows (our format only).
        names: names of each optimizer's parameters, in its order, for formats that number parameters.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged in a way that shows without its values.
    """
    source = open_state(path, names)
    try:
        with malformed_as_error(f"{path} holds what can't be told"):
            return _of_ours(source) if isinstance(source, SavedState) else _of_foreign(source, path)
    finally:
        source.close()


def _of_ours(source: SavedState) -> Summary:
    manifest = source.manifest
    return Summary(
        path=source.path,
        format=OURS,
        schema=manifest.schema,
        step=manifest.step,
        world=manifest.world,
        libraries=manifest.libs,
        tensors=tuple(
            TensorSummary(key, record.info, len(record.chunks)) for key, record in sorted(manifest.tensors.items())
        ),
        optimizers=tuple(
            OptimizerSummary(
                str(fields["class"]),
                tuple(tuple(names) for names in fields["names"]),
                tuple(_group_of(group) for group in fields["groups"]),
            )
            for fields in manifest.optimizers
        ),
        optimizers_missing="",
        aliases=manifest.aliases,
        rest=tuple(sorted(dict(source.rest_json))),
        files={MANIFEST_NAME: len(manifest.to_bytes()), **{name: file.size for name, file in manifest.files.items()}},
    )


class _Unread(Exception):
    """A value in JSON form holds a tensor, which is not read."""


def _group_of(encoded: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's options, without reading the tensors among them."""

    def unread(name: str) -> Any:
        raise _Unread

    found = {}
    for key, value in encoded.items():
        try:
            found[key] = rest_json.decode(value, key, unread)
        except (_Unread, CheckpointError):
            found[key] = f"<{value['$']}>" if isinstance(value, dict) and "$" in value else "<not read>"
    return found


def _of_foreign(source: StateSource, path: str) -> Summary:
    place = Path(local_path(path))
    kind = detect(place)
    try:
        optimizers = tuple(OptimizerSummary(one.class_name, one.names, one.groups) for one in source.optimizers)
        missing = ""
    except CheckpointError as error:
        optimizers, missing = (), str(error)
    # The entries beside weights in a checkpoint of torch.distributed.checkpoint are known only once they are read.
    rest: Mapping[str, Any] | None = None
    if kind == "lightning-sharded":
        rest = load_torch_file(place / META)
    elif kind != "dcp":
        rest = source.rest
    return Summary(
        path=path,
        format=kind,
        schema="",
        step=source.step,
        world=None,
        libraries=_libraries(rest or {}),
        tensors=tuple(TensorSummary(key, info, None) for key, info in sorted(source.tensors.items())),
        optimizers=optimizers,
        optimizers_missing=missing,
        aliases=source.aliases,
        rest=None if rest is None else tuple(sorted(map(str, rest))),
        files=_files(place),
    )


def _libraries(rest: Mapping[str, Any]) -> dict[str, str]:
    found = {"pytorch-lightning": rest.get("pytorch-lightning_version")}
    own = rest.get("deepspeed")
    found["deepspeed"] = own.get("ds_version") if isinstance(own, Mapping) else None
    return {name: str(version) for name, version in found.items() if version is not None}


def _files(place: Path) -> dict[str, int]:
    if place.is_file():
        return {place.name: place.stat().st_size}
    found = {}
    for folder, _, names in os.walk(place):
        for name in names:
            file = Path(folder, name)
            found[str(file.relative_to(place))] = file.stat().st_size
    return dict(sorted(found.items()))
