"""An exception at any place of user code on one of two ranks ends both, and the other one says whose it was."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_superscale as lss
from tests.helpers.ends import ends_of
from tests.helpers.extent import IS_ALL
from tests.helpers.trainers import Regressor, dataset, trainer

# Far below any timeout of a collective (30 minutes), and enough for a machine that has other things to do.
SECONDS = 80.0
WHAT = "bad sample 17"
STRATEGIES = {
    "zero2": {"zero": {"stage": 2, "assume_elementwise": True}},
    "zero3": {"zero": {"stage": 3, "assume_elementwise": True}},
    "superoffload": {"zero": {"stage": 2, "assume_elementwise": True}, "offload": "superoffload"},
}

HOOKS = (
    *("setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start"),
    *("on_train_batch_start", "training_step", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("optimizer_step", "lr_scheduler_step", "on_before_zero_grad", "on_train_batch_end", "on_train_epoch_end"),
    *("on_validation_start", "validation_step", "on_validation_epoch_end", "on_save_checkpoint", "on_train_end"),
    "on_fit_end",
)
ENDS = ("on_train_end", "on_fit_end")
OTHERS = ("dataset", "a worker's dataset", "collate", "forward of a layer", "backward of a function", "optimizer")
PLACES = (*HOOKS, *OTHERS)


class Fails:
    """Raises on rank 1 at one place, the third time that it is reached, or the first where it is reached but once."""

    def __init__(self, place: str, rank: int) -> None:
        self.place, self.rank = place, rank
        once = (
            "setup",
            "configure",
            "on_fit",
            "on_train_start",
            "on_train_end",
            "epoch",
            "on_val",
            "validation",
            "save",
        )
        self.left = 1 if any(word in place for word in once) else 3

    def at(self, place: str) -> None:
        if place == self.place and self.rank == 1:
            self.left -= 1
            if self.left == 0:
                raise ValueError(WHAT)


class Data(Dataset):
    def __init__(self, fails: Fails) -> None:
        self.data, self.fails = dataset(64), fails

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.fails.at("dataset")
        self.fails.at("a worker's dataset")
        return self.data[index]


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.fails.at("backward of a function")
        return grad, None


class FailingAdamW(torch.optim.AdamW):
    fails: Fails

    def zero_grad(self, set_to_none=True):
        self.fails.at("optimizer")
        super().zero_grad(set_to_none)


class Failing(Regressor):
    def __init__(self, fails: Fails) -> None:
        super().__init__()
        self.fails = fails
        self.net.register_forward_pre_hook(lambda *args: fails.at("forward of a layer"))

    def loss(self, batch):
        return Backward.apply(super().loss(batch), self.fails)

    def configure_optimizers(self):
        self.fails.at("configure_optimizers")
        optimizer = FailingAdamW(self.parameters(), lr=1e-3)
        optimizer.fails = self.fails
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _failing(name):
    def hook(self, *args, **kwargs):
        self.fails.at(name)
        return getattr(Regressor, name)(self, *args, **kwargs)

    return hook


for _name in HOOKS:
    if _name != "configure_optimizers":
        setattr(Failing, _name, _failing(_name))


class Saves(L.Callback):
    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)


def fit_that_fails(rank, world_size, strategy, place, path):
    fails = Fails(place, rank)

    def collate(samples):
        fails.at("collate")
        return torch.utils.data.default_collate(samples)

    workers = {"num_workers": 1, "multiprocessing_context": "fork"} if place == "a worker's dataset" else {}
    loader = DataLoader(Data(fails), batch_size=8, collate_fn=collate, **workers)
    run = trainer(
        lss.SuperScaleStrategy(**STRATEGIES[strategy]), devices=world_size, max_epochs=3, callbacks=[Saves(path)]
    )
    run.fit(Failing(fails), loader, DataLoader(dataset(32), batch_size=8))


SHORT = [("superoffload", "a worker's dataset")]
WIDE = [(strategy, place) for strategy in STRATEGIES for place in PLACES]


@pytest.mark.parametrize(("strategy", "place"), WIDE if IS_ALL else SHORT)
def test_an_exception_on_one_rank_ends_both_and_is_named(strategy, place, tmp_path):
    other, failed = ends_of(2, fit_that_fails, strategy, place, str(tmp_path / "saved.ckpt"))
    assert failed.code == 1, failed.said
    assert WHAT in failed.said
    if place not in ENDS or other.code != 0:  # rank 0 may be through when rank 1 fails
        assert other.code not in (0, None), other.said
        assert "rank 1" in other.said
        assert WHAT in other.said
    assert max(other.seconds, failed.seconds) < SECONDS
