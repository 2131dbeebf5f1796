"""Reads Hugging Face weights: one safetensors file, or shards with an index.

The format holds neither optimizers nor steps, and does not tell buffers and frozen weights from other weights. Tied
weights are known where a file's header names them, as `safetensors.torch.save_model` does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import ForeignChunk, ForeignSource, ForeignTensor, Index, Table
from lightning_superscale.checkpoint.format.malformed import parse
from lightning_superscale.checkpoint.state import MODEL, TensorInfo, TensorKey
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import whole_box

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip


def open_hf(path: Path) -> ForeignSource:
    """Open a safetensors file, or a directory with one or with shards and their index.

    Raises:
        CheckpointError: files are missing or damaged, or the index does not fit them.
    """
    table, aliases = Table(), dict[str, str]()
    for file, expected in _shards(path).items():
        found, tied = _open_file(file)
        if expected is not None and expected != set(found):
            raise CheckpointError(
                f"{file} should hold {len(expected)} tensors, says the index; it lacks "
                f"{sorted(expected - set(found))[:5]} and has {sorted(set(found) - expected)[:5]} beside them. It "
                "belongs to another checkpoint, or is old."
            )
        table.update({TensorKey(MODEL, name): entry for name, entry in found.items()})
        aliases.update(tied)
    aliases = {alias: name for alias, name in aliases.items() if TensorKey(MODEL, name) in table}
    return ForeignSource(str(path), table, aliases=aliases)


def find_index(folder: Path) -> Path | None:
    """The index file of the shards in a directory; None without one."""
    return next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """Each file, with the names of its tensors in the index; None for the names where there is no index."""
    if path.is_file():
        return {path: None}
    index = find_index(path)
    if index is None:
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(
                f"{path} has {len(files)} safetensors files and no *.safetensors.index.json, so which belong together "
                "is unknown. Pass one of the files, or copy the index too."
            )
        return {files[0]: None}
    try:
        weight_map = parse(index.read_bytes(), str(index))["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise CheckpointError(f"{index} names the file {file!r}; only files beside it are read.")
            shards.setdefault(path / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index} is damaged, or no index of safetensors: {error!r}.") from error
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {missing[:5]}, which {index.name} names. Copy all {len(shards)} files.")
    return dict(shards)


def _open_file(path: Path) -> tuple[dict[str, ForeignTensor], dict[str, str]]:
    """A file's tensors by name, and the aliases of tied ones that its header names."""
    try:
        file: Any = safe_open(path, framework="pt")
        entries, metadata = {}, file.metadata() or {}
        for name in file.keys():  # noqa: SIM118
            view = file.get_slice(name)
            code, shape = view.get_dtype(), tuple(view.get_shape())
            if code not in DTYPES:
                raise CheckpointError(f"{name!r} in {path} has dtype {code}, which torch does not have.")
            chunk = ForeignChunk(whole_box(shape), _reader(file, path, name), str(path))
            entries[name] = ForeignTensor(TensorInfo(DTYPES[code], shape, "model"), (chunk,))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}.") from error
    return entries, {alias: name for alias, name in metadata.items() if alias not in entries and name in entries}


def _reader(file: Any, path: Path, name: str) -> Callable[[Index], Tensor]:
    def read(index: Index) -> Tensor:
        try:
            # A slice reads only its rows; a tensor without dims has no slices.
            found: Tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name!r} in {path} can't be read: {error}.") from error
        return found

    return read
