"""Small LightningModules and a Trainer with the noise turned off."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.plans import taking_turns


def dataset(num: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(num, 17, generator=generator), torch.randn(num, 5, generator=generator))


def loader(num: int = 48, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset(num), batch_size=8, shuffle=shuffle)


class Regressor(L.LightningModule):
    """Two parameter groups, an unused layer, a frozen layer, a buffer and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(17, 33), nn.BatchNorm1d(33), nn.GELU(), nn.Linear(33, 5))
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)

    def loss(self, batch) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.frozen(self.net(x)).float(), y.float())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        first = list(self.net[0].parameters())
        rest = [p for m in (self.net[1], self.net[3], self.unused, self.frozen) for p in m.parameters()]
        optimizer = torch.optim.AdamW([{"params": first, "weight_decay": 0.3}, {"params": rest, "lr": 3e-3}], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(strategy="auto", **flags) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(strategy=strategy, **{**quiet, **flags})


def fit(module: L.LightningModule, strategy="auto", *, num: int = 48, validate: bool = False, **flags) -> L.Trainer:
    run = trainer(strategy, **flags)
    with taking_turns():  # how long a step takes, from which superoffload chooses a plan, is another in every run
        run.fit(module, loader(num), loader(num) if validate else None)
    return run


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), f"{name} differs"
