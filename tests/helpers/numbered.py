"""Runs that record which samples each step used."""

from __future__ import annotations

from contextlib import suppress

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_superscale as lss
from tests.helpers.trainers import trainer


class Numbers(Dataset):
    """Samples that are their own numbers."""

    def __init__(self, num: int = 24) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> int:
        return index


class Recorder(L.LightningModule):
    """Notes, for each step, the samples of this rank; a run that goes on writes over what the one before lost."""

    def __init__(self, seen: dict[int, list[int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(1, 1)
        self.seen = seen
        self.steps_of_this_run: set[int] = set()

    def training_step(self, batch, batch_idx):
        step = self.global_step
        if step not in self.steps_of_this_run:
            self.seen[step] = []
        self.steps_of_this_run.add(step)
        if isinstance(batch, dict):  # of several loaders, of which one may have ended
            batch = torch.cat([part for part in batch.values() if part is not None])
        self.seen[step] += batch.tolist()
        return self.net(batch.float()[:, None]).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def numbers_loader(batch_size: int, num: int = 24, **options) -> DataLoader:
    data = Numbers(num)
    return DataLoader(data, batch_size=batch_size, sampler=lss.ResumableSampler(data, seed=3), **options)


class Stopped(Exception):
    """Ends a run as a crash does."""


class SavesAt(L.Callback):
    """Saves a checkpoint at the n-th call of a hook, and ends the run there."""

    def __init__(self, hook: str, count: int, path: str) -> None:
        self.left = count

        def save(trainer, *args, **kwargs):
            if trainer.sanity_checking:
                return
            self.left -= 1
            if self.left == 0:
                trainer.save_checkpoint(path)
                raise Stopped

        setattr(self, hook, save)


def run(seen, loaders, strategy="superscale", *, val=None, ckpt_path=None, **flags) -> L.Trainer:
    """Train, and return the Trainer, also where a callback stopped it."""
    made = trainer(strategy, **{"max_epochs": 3, **flags})
    with suppress(Stopped):
        made.fit(Recorder(seen), loaders, val, ckpt_path=ckpt_path)
    return made
