"""Reads directories of torch.distributed.checkpoint: their metadata without its pickle, tensors chunk by chunk.

`.metadata` is a pickle that torch loads with all of pickle's powers. Here every class that it names becomes a stand-in,
made for one load, that only keeps data; a name that the format does not have is refused. A chunk is a file of
torch.save within a file and has to be read entirely; one chunk is in memory at a time.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_superscale.checkpoint.foreign.chunks import ForeignChunk, ForeignTensor, Index
from lightning_superscale.checkpoint.foreign.torch_files import load_torch_bytes
from lightning_superscale.checkpoint.state import TensorInfo
from lightning_superscale.errors import CheckpointError
from lightning_superscale.layout.box import Box

METADATA = ".metadata"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}  # fmt: skip

# Name of a file in the folder, offset of the chunk in it, and length of the chunk, in bytes.
Place = tuple[str, int, int]


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata, as stand-ins, and nothing else."""

    def __init__(self, file: Any, where: str) -> None:
        super().__init__(file)
        self._where = where
        self._made: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            # Each load makes classes of its own, so that changes that a pickle makes to a class end with the load.
            return self._made.setdefault(name, type(name, (_Record,), {}))
        if module == "torch" and name == "Size":
            return self._made.setdefault(name, type(name, (tuple,), {}))
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise CheckpointError(
            f"{self._where} names {module}.{name}, which the metadata of torch.distributed.checkpoint does not have: "
            "unpickling it could run code, so nothing of the checkpoint was loaded."
        )


class _Record:
    """A stand-in for any object of the metadata: keeps its attributes, or its constructor's arguments."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)
        else:
            self.args = tuple(state)


@dataclass(slots=True)
class DcpFolder:
    """A checkpoint of torch.distributed.checkpoint.

    Attributes:
        folder: directory of the checkpoint.
        paths: key -> path of its value in the nested state, such as ("model", "layer.weight"); (key,) where unknown.
        tensors: tensors by key, all with the role "model"; the caller knows their true roles.
        blobs: places of the values that are not tensors, by key.
    """

    folder: Path
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: dict[str, ForeignTensor] = field(default_factory=dict)
    blobs: dict[str, Place] = field(default_factory=dict)
    _held: tuple[Place, Any] | None = None

    def value(self, key: str) -> Any:
        """The value of a key of `blobs`, read from its file.

        Raises:
            CheckpointError: the file is damaged, or names code.
        """
        return self._load(self.blobs[key], key)

    def _load(self, place: Place, key: str) -> Any:
        if self._held is None or self._held[0] != place:
            self._held = None  # one chunk at a time is in memory
            file, offset, length = self.folder / place[0], place[1], place[2]
            try:
                with file.open("rb") as stream:
                    stream.seek(offset)
                    data = stream.read(length)
            except OSError as error:
                raise CheckpointError(f"{file} can't be opened: {error.strerror}.") from error
            if len(data) != length:
                raise CheckpointError(f"{file} ends at {offset + len(data)}, within {key!r}. The file is truncated.")
            self._held = place, load_torch_bytes(data, f"{file} ({key})")
        return self._held[1]

    def reader(self, place: Place, key: str) -> Callable[[Index], Tensor]:
        """A function that reads the values at an index within the chunk at `place`."""

        def read(index: Index) -> Tensor:
            chunk = self._load(place, key)
            if not isinstance(chunk, Tensor):
                raise CheckpointError(f"{self.folder / place[0]} should hold a tensor for {key!r}. It is damaged.")
            return chunk[index]

        return read


def open_dcp_folder(folder: Path) -> DcpFolder:
    """Read the metadata of a checkpoint of torch.distributed.checkpoint; no tensor's values are read.

    Raises:
        CheckpointError: the metadata is missing, damaged or names code, or files that it names are missing.
    """
    where = folder / METADATA
    try:
        with where.open("rb") as file:
            metadata = _Unpickler(file, str(where)).load()
        found = DcpFolder(folder)
        _fill(found, metadata)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{where} can't be opened: {error.strerror}.") from error
    except Exception as error:  # damaged bytes make an unpickler raise anything
        raise CheckpointError(
            f"{where} is damaged, or no metadata of torch.distributed.checkpoint: {error!r}."
        ) from error
    return found


def _fill(found: DcpFolder, metadata: Any) -> None:
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, info in metadata.storage_data.items():
        offset = vars(index).get("offset")
        name = info.relative_path
        if Path(name).name != name:
            raise CheckpointError(f"{found.folder / METADATA} names the file {name!r}; only files beside it are read.")
        if vars(info).get("transform_descriptors"):
            raise CheckpointError(
                f"{found.folder / name} is compressed by {info.transform_descriptors}; save it plainly."
            )
        places[index.fqn, None if offset is None else tuple(offset)] = (name, info.offset, info.length)
    missing = sorted({name for name, _, _ in places.values() if not (found.folder / name).is_file()})
    if missing:
        raise CheckpointError(f"{found.folder} lacks {missing[:5]}, which its metadata names. Copy all its files.")
    for key, item in metadata.state_dict_metadata.items():
        found.paths[key] = tuple((metadata.planner_data or {}).get(key, (key,)))
        if type(item).__name__ == "BytesStorageMetadata":
            found.blobs[key] = places[key, None]
            continue
        shape, chunks = tuple(item.size), []
        for chunk in item.chunks:
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            place = places[key, box.offset] if (key, box.offset) in places else places[key, None]
            chunks.append(ForeignChunk(box, found.reader(place, key), f"{found.folder / place[0]}@{place[1]:020d}"))
        dtype = item.properties.args[0] if item.properties.args else item.properties.dtype
        found.tensors[key] = ForeignTensor(TensorInfo(dtype, shape, "model"), tuple(chunks))
