"""A language model, its texts and a fit whose sequences ranks share."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from tests.helpers.trainers import trainer
from tests.sequence.tokens.programs import VOCABULARY, Gpt

__all__ = ["VOCABULARY", "LanguageModel", "Texts", "assert_trained_alike", "fitted"]


class Texts(Dataset):
    """Ids and labels [tokens]; some labels don't count."""

    def __init__(self, num: int = 16, tokens: int = 14) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (num, tokens), generator=generator)
        self.labels = torch.randint(VOCABULARY, (num, tokens), generator=generator)
        self.labels[::2, tokens // 2 :] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids[index], self.labels[index]


class LanguageModel(L.LightningModule):
    """Knows nothing of ranks."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.model = Gpt() if model is None else model
        self.losses: list[float] = []

    def loss(self, batch) -> torch.Tensor:
        ids, labels = batch
        return functional.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return {"logits": self.model(batch[0]), "num": len(batch[0])}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(
    world_size: int,
    options: dict[str, Any],
    texts: Dataset,
    *,
    seed: int | None = 5,
    module: LanguageModel | None = None,
    batch_size: int = 2,
    validation: Dataset | None = None,
    **flags: Any,
) -> L.Trainer:
    """The Trainer of a fit with `SuperScaleStrategy(**options)`."""
    from lightning_superscale import SuperScaleStrategy

    if seed is not None:
        L.seed_everything(seed, verbose=False)
    run = trainer(SuperScaleStrategy(**options), devices=world_size, **{"max_epochs": 1, **flags})
    held = None if validation is None else DataLoader(validation, batch_size)
    run.fit(LanguageModel() if module is None else module, DataLoader(texts, batch_size), held)
    return run


def assert_trained_alike(found: tuple[Any, ...], alone: tuple[Any, ...]) -> None:
    """Losses, metrics, predictions and weights of ranks that share sequences, and of one process.

    Tolerances: see plugins/trainer/test_sequence_parallel.py.
    """
    losses, metrics, predicted, weights = found[:4]
    assert losses == pytest.approx(alone[0], abs=1e-5)
    assert metrics == pytest.approx(alone[1], abs=1e-5)
    for one, expected in zip(predicted, alone[2], strict=True):
        assert type(one["logits"]) is torch.Tensor
        # Each sums products of a row of weights, which differ by 3e-4 at most; by how much depends on the instructions
        # that a CPU's kernels round with.
        torch.testing.assert_close(one["logits"], expected["logits"], rtol=0, atol=1e-3)
        assert one["num"] == expected["num"]
    for key, weight in alone[3].items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=3e-4)
