"""The manifest of a checkpoint: its tensors, where they lie in files, and checksums that prove it complete.

The manifest is JSON, so that anybody can read it and nothing in it runs. docs/checkpoint-format.md describes the
format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from lightning_superscale.checkpoint.format.blocks import hex_digest
from lightning_superscale.checkpoint.format.chunks import Chunk, ChunkColumns, box_of
from lightning_superscale.checkpoint.format.coverage import uncovered
from lightning_superscale.checkpoint.format.dtypes import dtype_name, dtype_of
from lightning_superscale.checkpoint.format.malformed import malformed_as_error, parse
from lightning_superscale.checkpoint.state import Role, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
REST_NAME = "rest.json"
MAJOR, MINOR = 1, 1
# Feature flags that this version can read. A reader refuses a manifest with a flag that it does not know.
KNOWN_FEATURES: frozenset[str] = frozenset()
_READER_OF_COLUMNS = "lucp/1.1"
_SCHEMA = re.compile(r"lucp/(\d+)\.(\d+)")
_HASH_AT_END = re.compile(rb',"xxh3":"([0-9a-f]{16})"\}\n\Z')
_SAFE_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor and its chunks, which cover each element once; many chunks are columns."""

    info: TensorInfo
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file beside the manifest: its size in bytes, and its xxh3-64 checksum in hexadecimal."""

    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of MANIFEST.json: a checkpoint's tensors, optimizers and files.

    Attributes:
        uuid: id of the checkpoint, new with every save.
        step: optimizer steps taken; None where the writer did not say.
        world: number of ranks that saved.
        writers: number of ranks that wrote files.
        libs: versions of Python and of the libraries that wrote the checkpoint.
        files: every file but the manifest, by name relative to `root`.
        tensors: every tensor of the checkpoint, with those within rest.json and the optimizers.
        optimizers: the optimizers' records in JSON form; `json_codec.decode` reads their groups, values and rule.
        aliases: name of a tied tensor -> the name under which it is saved.
        root: folder within the checkpoint that holds the files; "" for the checkpoint's own.
        features: feature flags that a reader must know.
        unknown: optional fields of a newer minor version, kept as they are.
        schema: format version of the writer, as "lucp/major.minor".
        min_reader: least format version that a reader must know; columns of chunks raise it to 1.1 in the file.
    """

    uuid: str
    step: int | None
    world: int
    writers: int
    libs: Mapping[str, str]
    files: Mapping[str, FileRecord]
    tensors: Mapping[TensorKey, TensorRecord]
    optimizers: tuple[dict[str, Any], ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    features: tuple[str, ...] = ()
    unknown: Mapping[str, Any] = field(default_factory=dict)
    schema: str = f"lucp/{MAJOR}.{MINOR}"
    min_reader: str = f"lucp/{MAJOR}.0"

    def to_bytes(self) -> bytes:
        """The content of the file: compact JSON with sorted keys, whose last field is the checksum of the others."""
        names = tuple(sorted(self.files))
        fields = {
            **self.unknown,
            "schema": self.schema,
            "min_reader": self._needed_reader(),
            "features": list(self.features),
            "uuid": self.uuid,
            "step": self.step,
            "world": self.world,
            "writers": self.writers,
            "libs": dict(self.libs),
            "root": self.root,
            "files": {name: {"size": file.size, "xxh3": file.xxh3} for name, file in self.files.items()},
            "tensors": [_tensor_to_json(key, self.tensors[key], names) for key in sorted(self.tensors)],
            "optimizers": list(self.optimizers),
            "aliases": dict(self.aliases),
        }
        body = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        return body[:-1] + f',"xxh3":"{hex_digest(body)}"}}\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read and check a manifest: its checksum, version, fields, names, bounds and coverage.

        Args:
            data: content of the file.
            where: the file, for messages.

        Raises:
            CheckpointError: one of these is wrong; says which.
        """
        with malformed_as_error(f"{where} is not a manifest that lucp/{MAJOR} allows"):
            fields = _checked_json(data, where)
        with malformed_as_error(f"{where} is not a manifest that {fields['schema']} allows"):
            manifest = _from_fields(fields, where)
            manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Check the names of files, the bounds of chunks and the coverage of tensors.

        Args:
            where: the file, for messages.

        Raises:
            CheckpointError: a file name leaves the folder, a chunk lies outside its file or unaligned, or a tensor's
                chunks have gaps or overlap.
        """
        names = tuple(sorted(self.files))
        for name, file in self.files.items():
            if not 0 <= file.size < 2**63:
                raise CheckpointError(f"{where} gives {name} a size that no file has.")
        for name in (*self.files, *([self.root] if self.root else [])):
            if not _SAFE_NAME.fullmatch(name):
                raise CheckpointError(f"{where} names the file {name!r}, which is not one of a checkpoint.")
        file_sizes = torch.tensor([self.files[name].size for name in names], dtype=torch.int64)
        for key, record in self.tensors.items():
            if _is_proven(record, names, file_sizes):
                continue
            why = uncovered(record.info.shape, [chunk.box for chunk in record.chunks])
            if why is not None:
                raise CheckpointError(f"{where}: {key} is not complete: {why}.")
            for chunk in record.chunks:
                stop = chunk.start + chunk.box.numel * record.info.dtype.itemsize
                if chunk.start % record.info.dtype.itemsize:
                    raise CheckpointError(f"{where}: {key} starts at byte {chunk.start} of {chunk.file}, unaligned.")
                if chunk.file not in self.files or chunk.start < 0 or stop > self.files[chunk.file].size:
                    raise CheckpointError(f"{where}: {key} should end at byte {stop} of {chunk.file}, which it lacks.")

    def _needed_reader(self) -> str:
        """The least version that can read the file, as its `min_reader`."""
        has_columns = any(isinstance(record.chunks, ChunkColumns) for record in self.tensors.values())
        return max(self.min_reader, _READER_OF_COLUMNS, key=_version) if has_columns else self.min_reader


def _is_proven(record: TensorRecord, names: tuple[str, ...], file_sizes: torch.Tensor) -> bool:
    """Whether a tensor's chunks, as columns, are known to be complete and within their files, of these sizes."""
    info, chunks = record.info, record.chunks
    if not isinstance(chunks, ChunkColumns) or chunks.names != names:
        return False
    return chunks.are_proven(info.shape, info.dtype.itemsize, file_sizes)


def blocks_name(data_name: str) -> str:
    """The name of the file with the checksums of a data file's blocks."""
    return "blocks/" + data_name.removeprefix("data/").removesuffix(".safetensors") + ".xxh"


def is_data(name: str) -> bool:
    """Whether a file of a checkpoint holds tensors, and so has checksums of its blocks."""
    return name.startswith("data/")


def _version(schema: str) -> tuple[int, ...]:
    found = _SCHEMA.fullmatch(schema)
    return () if found is None else (int(found[1]), int(found[2]))


def _tensor_to_json(key: TensorKey, record: TensorRecord, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "section": key.section,
        "name": key.name,
        **({"state": key.state} if key.state else {}),
        "dtype": dtype_name(record.info.dtype, key),
        "shape": list(record.info.shape),
        "role": record.info.role,
        **({"trainable": True} if record.info.trainable else {}),
        "pieces": _chunks_to_json(record.chunks, names),
    }


def _chunks_to_json(chunks: Sequence[Chunk], names: tuple[str, ...]) -> Any:
    if isinstance(chunks, ChunkColumns):
        return chunks.to_json(names)
    return [
        {"file": p.file, "entry": p.entry, "at": p.start, "offset": list(p.box.offset), "size": list(p.box.size)}
        for p in chunks
    ]


def _chunks_from_json(pieces: Any, names: tuple[str, ...]) -> Sequence[Chunk]:
    if isinstance(pieces, dict):
        return ChunkColumns.from_json(pieces, names)
    return tuple(
        Chunk(str(p["file"]), str(p["entry"]), int(p["at"]), box_of(_ints(p["offset"]), _ints(p["size"])))
        for p in pieces
    )


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(int, values))


def _tensor_from_json(fields: dict[str, Any], names: tuple[str, ...], where: str) -> tuple[TensorKey, TensorRecord]:
    key = TensorKey(str(fields["section"]), str(fields["name"]), str(fields.get("state", "")))
    if fields["role"] not in get_args(Role):
        raise CheckpointError(f"{where}: {key} has the role {fields['role']!r}, which this version does not know.")
    info = TensorInfo(
        dtype_of(fields["dtype"], f"{where}: {key}"),
        tuple(map(int, fields["shape"])),
        fields["role"],
        bool(fields.get("trainable", False)),
    )
    return key, TensorRecord(info, _chunks_from_json(fields["pieces"], names))


def _from_fields(fields: dict[str, Any], where: str) -> Manifest:
    known = {
        "schema", "min_reader", "features", "uuid", "step", "world", "writers", "libs", "root", "files", "tensors",
        "optimizers", "aliases", "xxh3",
    }  # fmt: skip
    names = tuple(sorted(fields["files"]))
    tensors = [_tensor_from_json(tensor, names, where) for tensor in fields["tensors"]]
    if len({key for key, _ in tensors}) != len(tensors):
        raise ValueError("a tensor is listed twice")
    return Manifest(
        uuid=str(fields["uuid"]),
        step=None if fields["step"] is None else int(fields["step"]),
        world=int(fields["world"]),
        writers=int(fields["writers"]),
        libs={str(name): str(version) for name, version in dict(fields["libs"]).items()},
        files={name: FileRecord(int(file["size"]), str(file["xxh3"])) for name, file in fields["files"].items()},
        tensors=dict(tensors),
        optimizers=tuple(_checked_optimizer(optimizer) for optimizer in fields["optimizers"]),
        aliases={str(alias): str(name) for alias, name in dict(fields["aliases"]).items()},
        root=str(fields["root"]),
        features=tuple(fields["features"]),
        unknown={name: value for name, value in fields.items() if name not in known},
        schema=fields["schema"],
        min_reader=fields["min_reader"],
    )


def _checked_optimizer(fields: dict[str, Any]) -> dict[str, Any]:
    """The form of an optimizer: its class, its groups' options, and their parameters' names."""
    groups, names = fields["groups"], fields["names"]
    str(fields["class"]), dict(fields["values"])
    is_alike = isinstance(groups, list) and isinstance(names, list) and len(groups) == len(names)
    if not is_alike or not all(isinstance(group, dict) for group in groups):
        raise ValueError("an optimizer has other groups than names")
    if not all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in names):
        raise ValueError("an optimizer's parameters have no names")
    return fields


def _checked_json(data: bytes, where: str) -> dict[str, Any]:
    """The manifest's fields, after a check of its checksum and of its version."""
    end = _HASH_AT_END.search(data)
    is_whole = end is not None and hex_digest(data[: end.start()] + b"}") == end.group(1).decode()
    fields: dict[str, Any] | None
    try:
        fields = parse(data, where)
    except CheckpointError:
        fields = None
    version = _SCHEMA.fullmatch(str(fields.get("schema"))) if isinstance(fields, dict) else None
    # A later major version may end in another checksum, so the version is checked first.
    if version is not None and int(version[1]) > MAJOR:
        hint = "" if is_whole else " (or it is damaged: its checksum is not one that this version knows)"
        raise CheckpointError(f"{where} has the format {version[0]}; this version reads lucp/{MAJOR}{hint}. Upgrade.")
    if not is_whole:
        raise CheckpointError(
            f"{where} is damaged: it does not have the checksum that it should end with. Load an earlier checkpoint."
        )
    if fields is None or version is None:
        raise CheckpointError(f"{where} is no manifest: a schema such as lucp/{MAJOR}.{MINOR} was expected.")
    reader = _SCHEMA.fullmatch(str(fields.get("min_reader")))
    if reader is None or (int(reader[1]), int(reader[2])) > (MAJOR, MINOR):
        raise CheckpointError(
            f"{where} needs a reader of {fields.get('min_reader')}; this version reads up to lucp/{MAJOR}.{MINOR}. "
            "Upgrade."
        )
    strange = sorted(set(map(str, fields.get("features", ()))) - KNOWN_FEATURES)
    if strange:
        raise CheckpointError(f"{where} uses {', '.join(strange)}, which this version can't read. Upgrade.")
    return fields
