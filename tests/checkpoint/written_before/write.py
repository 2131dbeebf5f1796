"""Writes a checkpoint of every strategy as this version does: `python -m tests.checkpoint.written_before.write v1.2`.

Run it once for a version whose checkpoints must be read for ever, into a new folder, and never over an old one: what
lies in `v<version>` was written by that version's own code.

The module's gradients are sums of small multiples of powers of two, which no order of summing rounds, and AdamW takes
IEEE's square root. So the recorded weights are the same bits on every machine.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
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

SAVED_STEP, LAST_STEP = 3, 5


class Scale(nn.Module):
    def __init__(self, first: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(5 * 16).view(5, 16) / 64 + first)
        self.bias = nn.Parameter(torch.full((16,), first))


class Linear(L.LightningModule):
    """Linear in its weights: gradients depend on the batch and on the step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(first) for first in (0.5, -0.25, 1.0)])
        self.frozen = nn.Parameter(torch.full((3,), 0.75), requires_grad=False)
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        self.count += 1
        (x,) = batch
        return sum(block(x) for block in self.blocks) * (self.global_step + 1)

    def configure_optimizers(self):
        weights = [block.weight for block in self.blocks]
        biases = [block.bias for block in self.blocks]
        groups = [{"params": weights, "weight_decay": 0.25}, {"params": biases, "lr": 2.0**-7, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2.0**-6, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Block(Scale):
    def forward(self, x):
        return ((x * self.weight).sum() + (self.bias * x[0]).sum()) / 128


class Case(NamedTuple):
    """Attributes: strategy: makes it, given a checkpoint config or None."""

    num_ranks: int
    strategy: Callable[[Any], Any]
    precision: Any
    is_universal: bool


def _low() -> Any:
    return lss.SuperScalePrecision("bf16-true", master_weights="bf16", optimizer_states="bf16", seed=5)


def _scaled() -> Any:
    return lss.SuperScalePrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2))


def _of(**how: Any) -> Callable[[Any], Any]:
    return lambda checkpoint: lss.SuperScaleStrategy(checkpoint=checkpoint, **how)


FLOW = {"engine": "superoffload", "weights": "flow"}
CASES = {
    "superscale-32": Case(1, _of(), "32-true", False),
    "superscale-low": Case(1, _of(), _low, True),
    "superoffload-bf16": Case(1, _of(zero=2, offload="superoffload"), "bf16-true", False),
    "superoffload-16-mixed": Case(1, _of(zero=2, offload="superoffload"), _scaled, True),
    "cpu-bf16-mixed": Case(1, _of(offload="cpu"), "bf16-mixed", False),
    "cpu-16-mixed": Case(1, _of(offload="cpu"), _scaled, False),
    "cpu-bf16": Case(1, _of(offload="cpu"), "bf16-true", True),
    "flow-bf16": Case(1, _of(offload=FLOW), "bf16-true", False),
    "flow-32": Case(1, _of(offload=FLOW), "32-true", True),
    "zero1-32": Case(2, _of(zero=1), "32-true", False),
    "zero1-bf16": Case(2, _of(zero=1), "bf16-true", True),
    "zero2-low": Case(2, _of(zero=2), _low, False),
    "zero2-bf16-mixed": Case(2, _of(zero=2), "bf16-mixed", True),
    "zero3-bf16": Case(2, _of(zero=3), "bf16-true", False),
    "zero3-32": Case(2, _of(zero=3), "32-true", True),
    "zero3-superoffload-bf16": Case(2, _of(zero=3, offload="superoffload"), "bf16-true", False),
    "zero3-superoffload-low": Case(2, _of(zero=3, offload="superoffload"), _low, True),
}


def batches() -> DataLoader:
    """One batch of one sample per rank and epoch."""
    samples = (torch.arange(2 * 5 * 16).view(2, 5, 16) % 7 - 3).float()
    return DataLoader(TensorDataset(samples), batch_size=None)


class Squeeze(Linear):
    """A sample comes with a batch dim where Lightning's sampler deals samples."""

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return super().training_step([x.reshape(5, 16)], batch_idx)


def runner(case: Case, num_steps: int) -> L.Trainer:
    precision = {"precision": case.precision} if isinstance(case.precision, str) else {"plugins": [case.precision()]}
    return trainer(
        case.strategy({} if case.is_universal else None),
        devices=case.num_ranks,
        max_epochs=num_steps,
        limit_train_batches=1,
        gradient_clip_val=0.5,
        **precision,
    )


def end_of(run: L.Trainer, module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights, and the loss scale where there is one."""
    scaler = getattr(run.precision_plugin, "scaler", None)
    scale = {} if scaler is None else {"loss scale": torch.tensor(scaler.scale)}
    return {**{name: tensor.detach().clone() for name, tensor in module.state_dict().items()}, **scale}


def write_all(rank: int, world_size: int, folder: str) -> None:
    """Writes every case of this many ranks: its checkpoint, and what an uninterrupted run ends with."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if case.num_ranks != world_size:
            continue
        whole, part = Squeeze(), Squeeze()
        straight = runner(case, LAST_STEP)
        straight.fit(whole, batches())
        run = runner(case, SAVED_STEP)
        run.fit(part, batches())
        run.save_checkpoint(Path(folder) / name / "before.ckpt")
        if rank == 0:
            save_file(end_of(straight, whole), Path(folder) / name / "expected.safetensors")


def resume_all(rank: int, world_size: int, folder: str) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """What each case of this many ranks ends with, resumed from its checkpoint, and after how many steps."""
    torch.set_num_threads(1)
    ends = {}
    for name, case in CASES.items():
        if case.num_ranks == world_size:
            module = Squeeze()
            run = runner(case, LAST_STEP)
            run.fit(module, batches(), ckpt_path=Path(folder) / name / "before.ckpt")
            ends[name] = (end_of(run, module), run.global_step)
    return ends


def main(target: Path) -> None:
    if target.exists():
        raise SystemExit(f"{target} exists: what an older version wrote stays as it is")
    with tempfile.TemporaryDirectory() as folder:
        write_all(0, 1, folder)
        run_ranks(2, write_all, folder)
        target.mkdir(parents=True)
        for name in CASES:
            shutil.make_archive(str(target / name), "zip", Path(folder) / name)


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
