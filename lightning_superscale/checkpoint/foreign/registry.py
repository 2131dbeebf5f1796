"""All foreign formats: each recognises a checkpoint by its content, and opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning_superscale.checkpoint.foreign.dcp import METADATA
from lightning_superscale.checkpoint.foreign.deepspeed_files import find_folder
from lightning_superscale.checkpoint.foreign.deepspeed_native import has_native_states, open_deepspeed_native
from lightning_superscale.checkpoint.foreign.deepspeed_universal import has_universal_states, open_deepspeed_universal
from lightning_superscale.checkpoint.foreign.hf import find_index, open_hf
from lightning_superscale.checkpoint.foreign.lightning import Names, open_lightning
from lightning_superscale.checkpoint.foreign.lightning_dirs import META, open_sharded
from lightning_superscale.checkpoint.format.malformed import malformed_as_error, parse
from lightning_superscale.checkpoint.state import StateSource
from lightning_superscale.errors import CheckpointError

Opener = Callable[["Names | None"], StateSource]


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A checkpoint format of another program, with a function that recognises its checkpoints.

    Attributes:
        name: name of the format in commands and errors.
        looks_like: the files of a checkpoint of this format, in words, for the error of a path that no format
            recognises; empty where another format's text covers them.
        recognise: returns a function that opens the checkpoint at an existing path, or None where the path has none of
            this format. It may read names and the first bytes of files, and raises no error for a path that belongs to
            another format.
    """

    name: str
    looks_like: str
    recognise: Callable[[Path], Opener | None]


def _lightning(path: Path) -> Opener | None:
    # Any file of no other format counts: files of torch.save have no mark that all of its versions share.
    if not path.is_file() or _is_safetensors(path):
        return None
    return lambda names: open_lightning(path, names)


def _sharded(path: Path, *, is_lightning: bool) -> Opener | None:
    if not (path / METADATA).is_file() or (path / META).is_file() != is_lightning:
        return None
    return lambda names: open_sharded(path, names)


def _deepspeed(path: Path) -> Opener | None:
    folder = find_folder(path) if path.is_dir() else None
    return (lambda _: open_deepspeed_native(folder)) if folder is not None and has_native_states(folder) else None


def _deepspeed_universal(path: Path) -> Opener | None:
    folder = find_folder(path) if path.is_dir() else None
    return (lambda _: open_deepspeed_universal(folder)) if folder is not None and has_universal_states(folder) else None


def _safetensors(path: Path) -> Opener | None:
    if path.is_file():
        return (lambda _: open_hf(path)) if _is_safetensors(path) else None
    has_any = find_index(path) is not None or any(path.glob("*.safetensors"))
    return (lambda _: open_hf(path)) if has_any else None


# The first format that recognises a checkpoint reads it, so a format comes before those that would take its files too.
FORMATS = [
    ForeignFormat("lightning", "a Lightning .ckpt file, or a state_dict by torch.save", _lightning),
    ForeignFormat(
        "lightning-sharded",
        "a Lightning FSDP or ModelParallel directory (.metadata and meta.pt)",
        partial(_sharded, is_lightning=True),
    ),
    ForeignFormat(
        "dcp", "a directory of torch.distributed.checkpoint (.metadata)", partial(_sharded, is_lightning=False)
    ),
    ForeignFormat(
        "deepspeed",
        "a DeepSpeed directory (*_model_states.pt, or `latest` naming one) with *_optim_states.pt "
        "or zero/optimizer_state.pt",
        _deepspeed,
    ),
    ForeignFormat("deepspeed-universal", "", _deepspeed_universal),
    ForeignFormat("safetensors", "a .safetensors file, or a directory with one or with an index", _safetensors),
]


def detect(path: str | Path) -> str:
    """The name of a checkpoint's format, one of those in `FORMATS`.

    A directory with both kinds of DeepSpeed's checkpoints is "deepspeed"; pass the directory of the universal one to
    read that.

    Raises:
        CheckpointError: the path does not exist, or is of no known format; says what was looked for.
    """
    return _decide(Path(path))[0]


def open_foreign(path: str | Path, names: Names | None = None) -> StateSource:
    """Open a checkpoint of any foreign format; no tensor's values are read. One process calls it, for itself.

    Args:
        path: file or directory.
        names: names of each optimizer's parameters, in the optimizer's order, for formats that number parameters;
            `torch_optimizer.parameter_names` returns them. Formats that name parameters ignore it.

    Raises:
        CheckpointError: the path is of no known format, or its checkpoint is damaged or incomplete, names code, or has
            a layout that can't be read.
    """
    kind, opener = _decide(Path(path))
    with malformed_as_error(f"{path} is not as a checkpoint of its format, {kind}, is written"):
        return opener(names)


def _decide(path: Path) -> tuple[str, Opener]:
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: no such file or directory.")
    for known in FORMATS:
        opener = known.recognise(path)
        if opener is not None:
            return known.name, opener
    has = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else "other content"
    looked_for = "; ".join(known.looks_like for known in FORMATS if known.looks_like)
    raise CheckpointError(f"{path} is no checkpoint that is known. Looked for: {looked_for}. It has {has}.")


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with a length and a JSON object of that length."""
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if path.suffix == ".safetensors":
            return True
        if len(head) < 8 or not 2 <= length <= 100_000_000:  # the limit of the format
            return False
        try:
            return isinstance(parse(file.read(length), str(path)), dict)
        except CheckpointError:
            return False
