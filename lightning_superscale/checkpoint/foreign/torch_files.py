"""Reads files of `torch.save`, without executing any code of them.

torch's own restricted unpickler does the work; tensors stay on disk, mapped, until their values are read. Beside
torch's allow-list, a file may name classes for which the format's reader passes stand-ins, and classes that the user
has allowed with `torch.serialization.add_safe_globals`.
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
    """A stand-in for a class that a file names: keeps the arguments of an object, and runs nothing.

    Attributes:
        args: arguments that the file gives the object's constructor.
    """

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args = args


def load_torch_file(path: Path, stand_ins: Sequence[StandIn] = ()) -> Any:
    """Load the object that `torch.save` wrote to `path`; no code of the file runs.

    Tensors are mapped, on the CPU, and private to this process. While they are mapped, the file may be replaced or
    removed, but not rewritten in place.

    Args:
        path: a zip archive of torch >= 1.6, or an older stream, whose tensors are read into memory.
        stand_ins: pairs of a class and the full name in the file that it stands in for.

    Raises:
        CheckpointError: the file is missing, of another format or damaged, or names a class that is not allowed.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == _ZIP_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} can't be opened: {error.strerror}.") from error
    return _load(path, str(path), stand_ins, mmap=is_zip)


def load_torch_bytes(data: bytes, where: str) -> Any:
    """Load an object from bytes that `torch.save` wrote.

    Args:
        where: the file and the part of it, for messages.

    Raises:
        CheckpointError: the bytes are of another format or damaged, or name a class that is not allowed.
    """
    return _load(io.BytesIO(data), where, (), mmap=False)


def _load(source: Path | IO[bytes], where: str, stand_ins: Sequence[StandIn], *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; the error below covers it
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
    # The pickle has opcodes that torch's unpickler does not know, such as protocol 4's for naming a global.
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
    """The pickle of a zip archive, or the pickles that an older stream begins with."""
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
