"""Reads what `torch.save` wrote, without executing any of it.

torch's own restricted unpickler does the work; tensors stay on disk, mapped, until somebody reads them. What a file may
name beyond torch's allow-list are stand-ins that the format's reader passes in, and what the user has allowed with
`torch.serialization.add_safe_globals`.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from lightning_superscale.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
_NAMED = re.compile(r"GLOBAL (\S+)")

StandIn = tuple[Callable[..., Any], str]


class Inert:
    """Stands in for a class that a file names: keeps what the file says of an object, and runs nothing."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args = args


def load_torch_file(path: Path, stand_ins: Sequence[StandIn] = ()) -> Any:
    """Load what `torch.save` wrote to `path`; its tensors are mapped, on the CPU, and private to this process.

    While they are, the file may be replaced or removed, but not rewritten in place.

    Args:
        path: a zip archive of torch >= 1.6, or an older stream, whose tensors are read into memory.
        stand_ins: (class, full name in the file), for classes that the format is known to hold.

    Raises:
        CheckpointError: no such file, another format, a damaged file, or one that names anything that is not allowed.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == _ZIP_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} can't be opened: {error.strerror}.") from error
    return _load(path, str(path), stand_ins, mmap=is_zip)


def load_torch_bytes(data: bytes, where: str) -> Any:
    """Load what `torch.save` wrote, from memory; `where` names the file and the part of it.

    Raises:
        CheckpointError: as `load_torch_file`.
    """
    return _load(io.BytesIO(data), where, (), mmap=False)


def _load(source: Path | IO[bytes], where: str, stand_ins: Sequence[StandIn], *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols that the error below is about
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes make the unpickler raise anything
        name = _offender(error, source)
        if name is not None:
            raise CheckpointError(
                f"{where} names {name}, which tensors and plain data do not need: unpickling it could run code, so "
                "nothing of the file was loaded. If you trust it, import the class and allow it with "
                "torch.serialization.add_safe_globals()."
            ) from error
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{where} is damaged, or not a file of torch.save: {reason}.") from error


def _offender(error: Exception, source: Path | IO[bytes]) -> str | None:
    """The global that was refused; None where the file has another problem."""
    found = _NAMED.search(str(error))
    if found is not None:
        return found[1].rstrip(".,")
    if "Unsupported operand" not in str(error) and "Trying to call reduce" not in str(error):
        return None
    # Opcodes that torch's unpickler does not even know, such as protocol 4's way to name a global.
    try:
        return next((name for name in _globals(source) if not name.startswith(("torch.", "collections."))), None)
    except Exception:  # a damaged pickle names nothing
        return None


def _globals(source: Path | IO[bytes]) -> Iterator[str]:
    for stream in _pickles(source):
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)


def _pickles(source: Path | IO[bytes]) -> Iterator[IO[bytes]]:
    """The pickle of a zip archive, or those with which an older stream begins."""
    if not isinstance(source, Path):
        source.seek(0)
    with source.open("rb") if isinstance(source, Path) else source as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith("/data.pkl"):
                        yield io.BytesIO(archive.read(name))
        else:
            file.seek(0)
            for _ in range(4):  # magic number, protocol, system, object
                yield file
