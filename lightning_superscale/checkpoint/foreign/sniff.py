"""Which format a foreign checkpoint has, by its content, and the source that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lightning_superscale.checkpoint.foreign.dcp import METADATA
from lightning_superscale.checkpoint.foreign.deepspeed_files import find_folder
from lightning_superscale.checkpoint.foreign.deepspeed_native import has_native_states, open_deepspeed_native
from lightning_superscale.checkpoint.foreign.deepspeed_universal import has_universal_states, open_deepspeed_universal
from lightning_superscale.checkpoint.foreign.hf import find_index, open_hf
from lightning_superscale.checkpoint.foreign.lightning import Names, open_lightning
from lightning_superscale.checkpoint.foreign.lightning_dirs import META, open_sharded
from lightning_superscale.checkpoint.state import StateSource
from lightning_superscale.errors import CheckpointError

Format = Literal["lightning", "lightning-sharded", "dcp", "deepspeed", "deepspeed-universal", "safetensors"]

_LOOKED_FOR = (
    "a Lightning .ckpt file; a Lightning FSDP or ModelParallel directory (.metadata and meta.pt); a directory of "
    "torch.distributed.checkpoint (.metadata); a DeepSpeed directory (*_model_states.pt, or `latest` naming one) with "
    "*_optim_states.pt or zero/optimizer_state.pt; a .safetensors file, or a directory with one or with an index"
)


def detect(path: str | Path) -> Format:
    """The format of a checkpoint.

    A directory that has both of DeepSpeed's kinds is "deepspeed"; pass the universal one's own directory to read that.

    Raises:
        CheckpointError: no such path, or none of the formats that are known; says what was looked for.
    """
    return _decide(Path(path))[0]


def open_foreign(path: str | Path, names: Names | None = None) -> StateSource:
    """Open a checkpoint of any known format; reads no tensor's values.

    Args:
        path: file or directory.
        names: of each optimizer's parameters, in the optimizer's order, for formats that number them: see
            `torch_optimizer.parameter_names`. Formats that name them take no notice.

    Raises:
        CheckpointError: no known format, or a checkpoint of one that is damaged, incomplete, names code, or has a
            layout that can't be read.
    """
    _, opener = _decide(Path(path))
    return opener(names)


def _decide(path: Path) -> tuple[Format, Callable[[Names | None], StateSource]]:
    if path.is_file():
        if _is_safetensors(path):
            return "safetensors", lambda _: open_hf(path)
        return "lightning", lambda names: open_lightning(path, names)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: no such file or directory.")
    if (path / METADATA).is_file():
        kind: Format = "lightning-sharded" if (path / META).is_file() else "dcp"
        return kind, lambda names: open_sharded(path, names)
    folder = find_folder(path)
    if folder is not None and has_native_states(folder):
        return "deepspeed", lambda _: open_deepspeed_native(folder)
    if folder is not None and has_universal_states(folder):
        return "deepspeed-universal", lambda _: open_deepspeed_universal(folder)
    if find_index(path) is not None or any(path.glob("*.safetensors")):
        return "safetensors", lambda _: open_hf(path)
    has = sorted(entry.name for entry in path.iterdir())[:8]
    raise CheckpointError(f"{path} is no checkpoint that is known. Looked for: {_LOOKED_FOR}. It has {has}.")


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with a length and a JSON object of that length."""
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if path.suffix == ".safetensors":
            return True
        if len(head) < 8 or not 2 <= length <= 100_000_000:  # what the format allows
            return False
        try:
            return isinstance(json.loads(file.read(length)), dict)
        except ValueError:
            return False
