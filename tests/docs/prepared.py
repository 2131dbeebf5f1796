"""What blocks of pages find before they run: files in their folder, and stand-ins for the reader's own names."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import lightning_superscale as lss
from examples.language_model.model import GPT, GPTConfig
from tests.helpers.foreign import unpack
from tests.helpers.trainers import dataset, loader, trainer


class MyModule(L.LightningModule):
    """The reader's module: small, all of it trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(17, 5)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs).float(), targets.float())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


# The reader's own things, which a page may use without making them. A block that names anything else makes it.
_STAND_INS: dict[str, Callable[[], Any]] = {
    "L": lambda: L,
    "lss": lambda: lss,
    "MyModule": lambda: MyModule,
    "GPT": lambda: partial(GPT, GPTConfig(context=16, num_layers=2, dim=16, num_heads=2)),
    "module": MyModule,
    "data": loader,
    "MyDataset": lambda: dataset,
}
# Page -> the stand-ins that its blocks use.
NAMES: dict[str, tuple[str, ...]] = {
    "README.md": ("MyModule",),
    "docs/elastic.md": ("MyModule", "MyDataset"),
    "docs/tasks/load-anywhere.md": ("MyModule",),
    "docs/tasks/resume.md": ("MyModule", "data"),
    "docs/tasks/trace.md": ("module", "data"),
    "docs/techniques/sequence.md": ("GPT",),
}


def names_for(page: str) -> dict[str, Any]:
    """The stand-ins of a page, by name."""
    return {name: _STAND_INS[name]() for name in NAMES.get(page, ())}


def _checkpoint(path: str) -> None:
    """A universal checkpoint of a short run."""
    run = trainer("superscale", max_epochs=1, plugins=[lss.UniversalCheckpointIO()])
    run.fit(MyModule(), loader(16))
    run.save_checkpoint(path)


_TRAIN = """
from tests.docs.prepared import MyModule
from tests.helpers.trainers import fit

fit(MyModule(), "superoffload", max_epochs=1)
"""


def _readme() -> None:
    Path("ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    for name in ("last.ckpt", "a.ckpt", "b.ckpt"):
        _checkpoint(name)
    unpack("zero1", Path("fixtures")).rename("deepspeed_run")


def _load_anywhere() -> None:
    _checkpoint("last.ckpt")


def _trace() -> None:
    Path("train.py").write_text(_TRAIN)


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def _simulate() -> None:
    Path("llama").mkdir()
    Path("llama/config.json").write_text(json.dumps(_LLAMA))


_FSDP = """
class_path: lightning.pytorch.strategies.FSDPStrategy
init_args: {sharding_strategy: SHARD_GRAD_OP, cpu_offload: true}
"""


def _from_fsdp() -> None:
    Path("fsdp.yaml").write_text(_FSDP)


# Page -> what makes the files that its commands and blocks read, in the current folder.
PREPARE: dict[str, Callable[[], None]] = {
    "README.md": _readme,
    "docs/from-fsdp.md": _from_fsdp,
    "docs/tasks/load-anywhere.md": _load_anywhere,
    "docs/tasks/simulate.md": _simulate,
    "docs/tasks/trace.md": _trace,
}


def prepare(page: str) -> None:
    """Make the files of a page in the current folder."""
    PREPARE.get(page, lambda: None)()
