"""Under manual optimization user code sees what DDP shows: averages over ranks after each backward."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import lightning_superscale as lss
from tests.adversarial.reading_modules import Reads, differences, outcome
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks

STRATEGIES = {
    "superscale": lambda: "superscale",
    "zero1": lambda: "zero1",
    "zero2": lambda: "zero2",
    "superoffload": lambda: "superoffload",
    "cpu": lambda: lss.SuperScaleStrategy(zero=2, offload="cpu"),
    "weights that flow": lambda: lss.SuperScaleStrategy(
        zero=2, offload=lss.OffloadConfig(weights="flow", wrap=["Linear"])
    ),
}


class Manual(Reads):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def see_gradients(self):
        self.seen += [float(p.grad.double().sum()) for p in self.net.parameters() if p.grad is not None]

    def backward_of(self, batch):
        self.manual_backward(self.loss(batch))
        self.see_gradients()


class TwoBackwards(Manual):
    """Clips by torch's own function, between and after two backward calls, and scales and replaces gradients."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_of(batch)
        self.seen.append(float(nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)))
        self.backward_of([part.flip(0) * 0.5 for part in batch])
        for param in self.net[0].parameters():
            param.grad.mul_(0.5)
        self.net[4].weight.grad = self.net[4].weight.grad * 2
        self.seen.append(float(nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)))
        self.see_gradients()
        optimizer.step()
        self.see_gradients()


class SharpByHand(Manual):
    """Sharpness-aware minimization: the perturbation has to be the same on all ranks."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_of(batch)
        with torch.no_grad():
            moves = [p.grad * 0.1 for p in self.net.parameters()]
            for param, move in zip(self.net.parameters(), moves, strict=True):
                param.add_(move)
        optimizer.zero_grad()
        self.backward_of(batch)
        with torch.no_grad():
            for param, move in zip(self.net.parameters(), moves, strict=True):
                param.sub_(move)
        optimizer.step()


class Guards(Manual):
    """Leaves out a step whose gradients are not finite; those of one rank are not, and all ranks see it."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_of([part * (float("nan") if self.global_rank == batch_idx == 1 else 1.0) for part in batch])
        self.seen = [value for value in self.seen if value == value]
        if all(bool(param.grad.isfinite().all()) for param in self.net.parameters()):
            optimizer.step()


class Accumulates(Manual):
    """Averages once for two backward calls, and clips through Lightning."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with self.trainer.strategy.block_backward_sync():
            self.backward_of(batch)
        self.backward_of([part.flip(0) for part in batch])
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        self.see_gradients()
        optimizer.step()


class InTurns(Manual):
    """Two optimizers in turns; gradients of the first stay where they are while the second's are made."""

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net[i:j].parameters(), lr=1e-2) for i, j in ((0, 2), (2, 5))]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            with optimizer.toggle_model():
                self.backward_of(batch)
                optimizer.step()
        self.see_gradients()


FLAGS = {} if IS_ALL else {"max_epochs": 1, "limit_train_batches": 2}
MODULES = (TwoBackwards, SharpByHand, Guards, Accumulates, InTurns)


def _over_ranks(rank: int, world_size: int):
    wrong = {}
    for cls in MODULES:
        expected = outcome(cls, DDPStrategy(find_unused_parameters=True), world_size, **FLAGS)
        for name, make in STRATEGIES.items():
            if (IS_ALL or name in ("zero2", "superoffload")) and (
                diff := differences(expected, outcome(cls, make(), world_size, **FLAGS))
            ):
                wrong[name, cls.__name__] = diff
    return wrong


def test_gradients_are_those_of_ddp():
    assert run_ranks(2, _over_ranks) == [{}, {}]


class OfShards(Manual):
    """The same with rows, as FSDP2 shows them."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for scale in (1.0, 0.5):
            self.manual_backward(self.loss([part * scale for part in batch]))
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)
            self.seen.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()


class Sparse(TwoBackwards):
    """A gradient of one rank that can't be averaged."""

    def more(self):
        self.net.append(nn.Embedding(4, 5, sparse=True))

    def loss(self, batch):
        x, y = batch
        loss = (self.net[:5](x) - y).square().mean()
        return loss + self.net[5](torch.arange(2)).sum() if self.global_rank else loss


def _of_shards(rank: int, world_size: int):
    with pytest.raises(lss.SuperScaleError) as caught:
        outcome(Sparse, "zero2", world_size)
    return str(caught.value), *(outcome(OfShards, make, world_size, **FLAGS) for make in (DDPStrategy(), "zero3"))


def test_rows_are_averages_too_and_a_gradient_that_can_be_none_is_refused_on_all_ranks():
    for text, expected, found in run_ranks(2, _of_shards):
        assert "rank 1: parameter 'net.5.weight' has a gradient of layout torch.sparse_coo" in text
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        for name, value in expected[1].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
