"""What blocks of pages find before they run: files in their folder, and stand-ins for the reader's own names."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

import lightning_superscale as lss
from examples.language_model.model import GPT, GPTConfig
from tests.helpers.foreign import unpack
from tests.helpers.trainers import Regressor, loader, trainer

# The reader's own things, which a page may use without making them. A block that names anything else makes it.
_STAND_INS: dict[str, Callable[[], Any]] = {
    "L": lambda: L,
    "lss": lambda: lss,
    "MyModule": lambda: Regressor,
    "GPT": lambda: partial(GPT, GPTConfig(context=16, num_layers=2, dim=16, num_heads=2)),
    "module": Regressor,
    "data": loader,
}
# Page -> the stand-ins that its blocks use.
NAMES: dict[str, tuple[str, ...]] = {
    "README.md": ("MyModule",),
    "docs/techniques/sequence.md": ("GPT",),
}


def names_for(page: str) -> dict[str, Any]:
    """The stand-ins of a page, by name."""
    return {name: _STAND_INS[name]() for name in NAMES.get(page, ())}


def _checkpoint(path: str) -> None:
    """A universal checkpoint of a short run."""
    run = trainer("superscale", max_epochs=1, plugins=[lss.UniversalCheckpointIO()])
    run.fit(Regressor(), loader(16))
    run.save_checkpoint(path)


_TRAIN = """
from tests.helpers.trainers import Regressor, fit

fit(Regressor(), "superoffload", max_epochs=1)
"""


def _readme() -> None:
    Path("ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    for name in ("last.ckpt", "a.ckpt", "b.ckpt"):
        _checkpoint(name)
    unpack("zero1", Path("fixtures")).rename("deepspeed_run")


# Page -> what makes the files that its commands and blocks read, in the current folder.
PREPARE: dict[str, Callable[[], None]] = {
    "README.md": _readme,
}


def prepare(page: str) -> None:
    """Make the files of a page in the current folder."""
    PREPARE.get(page, lambda: None)()
