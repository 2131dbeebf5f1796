"""A user's script that is started again and again: `elastic.py STRATEGY FOLDER [STEP RANK]`.

It goes on from the last checkpoint of the folder, on as many ranks as there are. With STEP and RANK it kills that rank
at that step, the first time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_superscale as lss
from tests.helpers.trainers import trainer

GLOBAL_BATCH = 8


class Quarters(Dataset):
    """64 samples whose entries are quarters, so that sums of a few products are exact."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return index, torch.randint(-4, 5, (6,), generator=generator) / 4


class Linear(L.LightningModule):
    """A loss that is linear in the weights: gradients are means of samples, exact in fp32 in any order of summation."""

    def __init__(self, folder: Path, dies: tuple[int, int] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5, bias=False))
        self.folder, self.dies = folder, dies
        # Tells the records of one start of all ranks from those of the next.
        self.start = len(list(folder.glob("checkpoints/*.ckpt")))

    def training_step(self, batch, batch_idx):
        ids, x = batch
        line = json.dumps({"step": self.global_step, "ids": ids.tolist(), "start": self.start})
        with open(self.folder / f"seen-{self.global_rank}.jsonl", "a") as file:
            file.write(line + "\n")
        died = self.folder / "died"
        if self.dies == (self.global_step, self.global_rank) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        data = Quarters()
        size = GLOBAL_BATCH // self.trainer.world_size
        return DataLoader(data, batch_size=size, sampler=lss.ResumableSampler(data, seed=1))


STRATEGIES = {
    "zero3 superoffload": lambda: lss.ZeroStrategy(zero=3, offload="superoffload"),
    "zero2": lambda: "zero2",
}


def main(name: str, place: str, *dies: str) -> None:
    torch.set_num_threads(1)
    folder = Path(place)
    saves = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=3, save_top_k=-1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    run = trainer(
        STRATEGIES[name](),
        devices=ranks,
        max_steps=20,
        max_epochs=-1,
        callbacks=[saves],
        plugins=[lss.UniversalCheckpointIO()],
        enable_checkpointing=True,
    )
    module = Linear(folder, tuple(map(int, dies)) or None)
    run.fit(module, ckpt_path=lss.last_checkpoint(folder / "checkpoints"))
    if run.global_rank == 0:
        torch.save(module.state_dict(), folder / "end.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
