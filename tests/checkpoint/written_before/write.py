"""Writes a checkpoint of every strategy as this version does: `python -m tests.checkpoint.written_before.write v1.2`.

Run it once for a version whose checkpoints must be read for ever, into a new folder, and never over an old one: what
lies in `v<version>` was written by that version's own code.

[Note: The same bits everywhere] Gradients do not depend on weights and are small multiples of powers of two, in every
precision. The squares of each one add up to a square, so that no order of adding them rounds the norm that clips.
Powers of both betas are exact in double, and `fused=True` takes IEEE's square root. What is left are IEEE's own
operations, one element at a time: thread count, instruction set and machine change no bit.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_superscale as lss
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

ROOT = Path(__file__).resolve().parents[3]
SAVED_STEP, LAST_STEP = 3, 5
ROW = (3, -2, 1, 0, 2, -3, 2, -1, 3, -2, 1, 0, 2, -3, 2, -1)  # the squares add up to 64


class Block(nn.Module):
    def __init__(self, first: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4 * 16).view(4, 16) / 64 + first)
        self.bias = nn.Parameter(torch.full((16,), first))

    def forward(self, x):
        return ((x * self.weight).sum() + (x[0] * self.bias).sum()) / 128


class Linear(L.LightningModule):
    """Linear in its weights: gradients depend on the batch and on the step alone. The norm passes 0.5 at step 3."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(first) for first in (0.5, -0.25, 1.0)])
        self.frozen = nn.Parameter(torch.full((3,), 0.75), requires_grad=False)
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        self.count += 1
        x = batch[0][0]
        return sum(block(x) for block in self.blocks) * (self.global_step + 1)

    def configure_optimizers(self):
        weights = [block.weight for block in self.blocks]
        biases = [block.bias for block in self.blocks]
        groups = [{"params": weights, "weight_decay": 0.25}, {"params": biases, "lr": 2.0**-7, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2.0**-6, betas=(0.75, 0.875), fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def batches() -> DataLoader:
    """One batch of one sample per rank and epoch, so that no epoch is left half done. Ranks average 0, 1 and 2."""
    first = torch.tensor([ROW[i:] + ROW[:i] for i in range(4)], dtype=torch.float32)
    return DataLoader(TensorDataset(torch.stack([first, first.abs()])), batch_size=1)


class Case(NamedTuple):
    """One run, and how it is saved.

    Attributes:
        num_ranks: that write and read.
        strategy: a registered name, or arguments of SuperScaleStrategy.
        precision: a name, or what makes the plugin.
        is_universal: the format; otherwise Lightning's own.
        is_after: saved once `fit()` has ended; otherwise while training goes on, as callbacks do.
    """

    num_ranks: int
    strategy: Any
    precision: Any
    is_universal: bool
    is_after: bool = False


def low() -> Any:
    return lss.SuperScalePrecision("bf16-true", master_weights="bf16", optimizer_states="bf16", seed=5)


def scaled() -> Any:
    """The scale grows at steps 2 and 4: one that is not restored ends elsewhere."""
    return lss.SuperScalePrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2))


CPU = {"offload": "cpu"}
FLOW = {"offload": lss.OffloadConfig(weights="flow")}
BOTH = {"zero": 3, "offload": "superoffload"}
CASES = {
    "superscale-32": Case(1, "superscale", "32-true", False),
    "superscale-16-mixed": Case(1, "superscale", scaled, False, is_after=True),
    "superscale-low": Case(1, "superscale", low, True),
    "superoffload-bf16": Case(1, "superoffload", "bf16-true", False),
    "superoffload-32": Case(1, "superoffload", "32-true", False, is_after=True),
    "superoffload-16-mixed": Case(1, "superoffload", scaled, True),
    "cpu-bf16-mixed": Case(1, CPU, "bf16-mixed", False),
    "cpu-low": Case(1, CPU, low, False),
    "cpu-bf16": Case(1, CPU, "bf16-true", True, is_after=True),
    "flow-bf16": Case(1, FLOW, "bf16-true", False),
    "flow-32": Case(1, FLOW, "32-true", True),
    "flow-low": Case(1, FLOW, low, True, is_after=True),
    "zero1-32": Case(2, "zero1", "32-true", False, is_after=True),
    "zero1-bf16": Case(2, "zero1", "bf16-true", True),
    "zero2-low": Case(2, "zero2", low, False),
    "zero2-bf16-mixed": Case(2, "zero2", "bf16-mixed", True, is_after=True),
    "zero3-bf16": Case(2, "zero3", "bf16-true", False),
    "zero3-16-mixed": Case(2, "zero3", scaled, True),
    "zero3-32": Case(2, "zero3", "32-true", True, is_after=True),
    "zero3-superoffload-bf16": Case(2, BOTH, "bf16-true", False, is_after=True),
    "zero3-superoffload-16-mixed": Case(2, BOTH, scaled, False),
    "zero3-superoffload-low": Case(2, BOTH, low, True),
}


class Saves(L.Callback):
    """Not a ModelCheckpoint, whose state holds paths of the machine."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == SAVED_STEP:
            trainer.save_checkpoint(self.path)


def runner(case: Case, num_steps: int, **flags: Any) -> L.Trainer:
    strategy, plugins = case.strategy, []
    if not isinstance(strategy, str):
        strategy = lss.SuperScaleStrategy(**strategy, checkpoint=lss.CheckpointConfig() if case.is_universal else None)
    elif case.is_universal:
        plugins.append(lss.UniversalCheckpointIO())
    if isinstance(case.precision, str):
        flags["precision"] = case.precision
    else:
        plugins.append(case.precision())
    return trainer(
        strategy,
        devices=case.num_ranks,
        max_epochs=num_steps,
        limit_train_batches=1,
        gradient_clip_val=0.5,
        plugins=plugins,
        **flags,
    )


def end_of(run: L.Trainer, module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, and the loss scale where there is one."""
    scaler = getattr(run.precision_plugin, "scaler", None)
    scale = {} if scaler is None else {"loss scale": torch.tensor(scaler.scale)}
    return {**{name: tensor.detach().clone() for name, tensor in module.state_dict().items()}, **scale}


def write_all(rank: int, world_size: int, folder: str) -> None:
    """Writes every case of this many ranks: its checkpoint, and what a run ends with that nothing stopped."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if case.num_ranks != world_size:
            continue
        path = str(Path(folder) / name / "before.ckpt")
        module, straight = Linear(), runner(case, LAST_STEP, callbacks=[] if case.is_after else [Saves(path)])
        straight.fit(module, batches())
        if case.is_after:
            part = runner(case, SAVED_STEP)
            part.fit(Linear(), batches())
            part.save_checkpoint(path)
        if rank == 0:
            save_file(end_of(straight, module), Path(folder) / name / "expected.safetensors")


def resume_all(rank: int, world_size: int, folder: str) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """What each case of this many ranks ends with, resumed from its checkpoint, and after how many steps."""
    torch.set_num_threads(1)
    ends = {}
    for name, case in CASES.items():
        if case.num_ranks == world_size:
            module = Linear()
            run = runner(case, LAST_STEP)
            run.fit(module, batches(), ckpt_path=str(Path(folder) / name / "before.ckpt"))
            ends[name] = (end_of(run, module), run.global_step)
    return ends


def main(target: Path) -> None:
    if target.exists():
        raise SystemExit(f"{target} exists: what an older version wrote stays as it is")
    if Path(lss.__file__).resolve().parents[1] != ROOT:
        # An editable install of another checkout goes before PYTHONPATH and the working directory.
        raise SystemExit(f"expected the package of {ROOT}, found {lss.__file__}: install this checkout")
    with tempfile.TemporaryDirectory() as folder:
        write_all(0, 1, folder)
        run_ranks(2, write_all, folder)
        for path in filter(Path.is_file, Path(folder).rglob("*")):
            if any(str(place).encode() in path.read_bytes() for place in (folder, ROOT, Path.home())):
                raise SystemExit(f"{path} names a folder of this machine")
        target.mkdir(parents=True)
        for name in CASES:
            shutil.make_archive(str(target / name), "zip", Path(folder) / name)


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
