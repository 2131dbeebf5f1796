"""Writes a state's weights for Hugging Face: safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from lightning_superscale.checkpoint.foreign.hf import DTYPES
from lightning_superscale.checkpoint.foreign.staging import staged
from lightning_superscale.checkpoint.state import MODEL, ReadRequest, StateSource, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box, row_box

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SLAB_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Weight:
    name: str
    key: TensorKey
    info: TensorInfo

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.info.shape).numel() * self.info.dtype.itemsize


def export_hf(source: StateSource, path: Path, *, max_shard_bytes: int = 5 << 30, strip_prefix: str = "") -> None:
    """Write the directory `path` with the weights and buffers of a state, each in its dtype.

    A tied weight is written once, and its other names go into the file's header, as `safetensors.torch.save_model`
    does. Memory stays below 64 MiB, or one row where a row is larger. One process calls it.

    Args:
        source: the state.
        path: directory to make; its parents are made where they are missing.
        max_shard_bytes: bytes of weights in one file at most, but for a weight that is larger by itself. A state with
            more goes into several files, and `model.safetensors.index.json` names the file of each weight.
        strip_prefix: prefix that names have in the LightningModule but not in the model, such as "model.".

    Raises:
        CheckpointError: `path` exists, the source is damaged, two names become equal, or safetensors lacks a dtype.
    """
    weights, aliases = _weights(source, strip_prefix)
    shards = _shards(weights, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with staged(path) as staging:
        folder = staging / path.name
        folder.mkdir()
        for name, shard in zip(names, shards, strict=True):
            own = {alias: target for alias, target in aliases.items() if target in {w.name for w in shard}}
            with (folder / name).open("wb") as file:
                _write(source, file, shard, own)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(weight.num_bytes for weight in weights)},
                "weight_map": {w.name: name for name, shard in zip(names, shards, strict=True) for w in shard},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _weights(source: StateSource, prefix: str) -> tuple[list[_Weight], dict[str, str]]:
    weights: dict[str, _Weight] = {}
    for key, info in source.tensors.items():
        if key.section != MODEL:
            continue
        name = key.name.removeprefix(prefix)
        if name in weights:
            raise CheckpointError(f"without {prefix!r}, {key.name!r} and {weights[name].key.name!r} are both {name!r}.")
        if info.dtype not in _CODES:
            raise CheckpointError(f"{key.name!r} is of {info.dtype}, which safetensors does not have.")
        weights[name] = _Weight(name, key, info)
    aliases = {alias.removeprefix(prefix): name.removeprefix(prefix) for alias, name in source.aliases.items()}
    clash = sorted(aliases.keys() & weights.keys())
    if clash:
        raise CheckpointError(f"without {prefix!r}, tied weights have names of others: {clash[:5]}.")
    return list(weights.values()), aliases


def _shards(weights: Sequence[_Weight], max_bytes: int) -> list[list[_Weight]]:
    shards: list[list[_Weight]] = [[]]
    filled = 0
    for weight in weights:
        if shards[-1] and filled + weight.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += weight.num_bytes
    return shards


def _write(source: StateSource, file: IO[bytes], shard: Sequence[_Weight], aliases: dict[str, str]) -> None:
    # Tensors of wide dtypes come first, so that every tensor is aligned.
    ordered = sorted(shard, key=lambda weight: (-weight.info.dtype.itemsize, weight.name))
    header: dict[str, object] = {"__metadata__": {**aliases, "format": "pt"}}
    offset = 0
    for weight in ordered:
        header[weight.name] = {
            "dtype": _CODES[weight.info.dtype],
            "shape": list(weight.info.shape),
            "data_offsets": [offset, offset + weight.num_bytes],
        }
        offset += weight.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for weight in ordered:
        for box in _slabs(weight.info):
            values = torch.empty(box.size, dtype=weight.info.dtype)
            source.read([ReadRequest(weight.key, box, values)])
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def _slabs(info: TensorInfo) -> Iterator[Box]:
    """Boxes that cover a tensor once: runs of its rows, of at most 64 MiB, or of one row where that is larger."""
    rows = info.shape[0] if info.shape else 1
    row_bytes = torch.Size(info.shape[1:]).numel() * info.dtype.itemsize
    step = max(1, _SLAB_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield row_box(info.shape, start, min(rows, start + step))
