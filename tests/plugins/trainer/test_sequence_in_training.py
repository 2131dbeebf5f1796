"""What users do around a step, with sequences that ranks share, gives what it gives on one process.

Tolerance: as in test_sequence_parallel.py.
"""

from __future__ import annotations

import dataclasses
import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import lightning_superscale as lss
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import VOCABULARY, LanguageModel, Texts
from tests.helpers.trainers import trainer


def run_of(world_size, **flags) -> L.Trainer:
    L.seed_everything(5, verbose=False)
    strategy = lss.SuperScaleStrategy(zero=1, sequence=world_size if world_size > 1 else None)
    return trainer(strategy, devices=world_size, **{"max_epochs": 1, "limit_train_batches": 5, **flags})


def fit(world_size, module, data, held=None, **flags):
    """Losses and logged values."""
    run = run_of(world_size, **flags)
    run.fit(module, data, held)
    return [*module.losses, *(float(value) for _, value in sorted(run.callback_metrics.items()))]


class ByHand(LanguageModel):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(first, 0.1, "norm")
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    def configure_optimizers(self):
        rest = [param for name, param in self.model.named_parameters() if not name.startswith("embed")]
        return torch.optim.AdamW(self.model.embed.parameters(), lr=1e-2), torch.optim.SGD(rest, lr=1e-2)


class Watcher(L.Callback):
    """Reads batches and outputs."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += [float(batch[0].sum()), *batch[0].shape]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += [float(outputs["loss"].detach()), float(outputs["logits"].mean()), *outputs["logits"].shape]

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen += [float(outputs["logits"].mean()), *outputs["logits"].shape]


class Outputs(LanguageModel):
    def training_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), "logits": logits.detach()}

    def validation_step(self, batch, batch_idx):
        return {"logits": self.model(batch[0])}


class Dropping(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def loss(self, batch):
        return functional.cross_entropy(self.drop(self.model(batch[0])).flatten(0, 1), batch[1].flatten())


class Stream(IterableDataset):
    def __iter__(self):
        texts = Texts()
        return iter([texts[at] for at in range(len(texts))])


@dataclasses.dataclass
class Pair:
    ids: torch.Tensor
    labels: torch.Tensor


class OfPairs(LanguageModel):
    def loss(self, batch):
        return super().loss((batch.ids, batch.labels))


class OfNames(LanguageModel):
    def loss(self, batch):
        return super().loss((batch["ids"], batch["labels"]))


class OfSources(LanguageModel):
    def loss(self, batch):
        return sum(super(OfSources, self).loss(one) for one in batch.values())


def stacked(items):
    return [torch.stack(one) for one in zip(*items, strict=True)]


def named(items):
    return dict(zip(("ids", "labels"), stacked(items), strict=True))


def paired(items):
    return Pair(*stacked(items))


def watched(n):
    watcher = Watcher()
    fit(n, Outputs(), DataLoader(Texts(), 2), DataLoader(Texts(4), 2), callbacks=[watcher])
    return watcher.seen


def validated_before(n):
    module, run = LanguageModel(), run_of(n, num_sanity_val_steps=2)
    (before,) = run.validate(module, DataLoader(Texts(4), 2), verbose=False)
    run.fit(module, DataLoader(Texts(), 2), DataLoader(Texts(4), 2))
    return [*before.values(), *module.losses, *(float(v) for _, v in sorted(run.callback_metrics.items()))]


def found_rate(n):
    module = LanguageModel()
    module.lr = 1e-3
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=module.lr)
    folder = os.getcwd()
    return (
        Tuner(run_of(n, default_root_dir=folder))
        .lr_find(module, DataLoader(Texts(), 2), num_training=5)
        .results["loss"]
    )


DOES = {
    "steps by hand with two optimizers": lambda n: fit(n, ByHand(), DataLoader(Texts(), 2)),
    "validates before and within": validated_before,
    "reads batches and outputs": watched,
    "drops": lambda n: fit(n, Dropping(), DataLoader(Texts(16, 13), 2)),
    "averages weights": lambda n: fit(
        n, LanguageModel(), DataLoader(Texts(), 2), DataLoader(Texts(4), 2), callbacks=[EMAWeightAveraging(decay=0.5)]
    ),
    "finds a rate": found_rate,
    "streams": lambda n: fit(n, LanguageModel(), DataLoader(Stream(), 2)),
    "samples batches": lambda n: fit(
        n, LanguageModel(), DataLoader(Texts(), batch_sampler=BatchSampler(SequentialSampler(Texts()), 3, False))
    ),
    "shuffles": lambda n: fit(n, LanguageModel(), DataLoader(Texts(), 2, shuffle=True)),
    "names tensors": lambda n: fit(n, OfNames(), DataLoader(Texts(), 2, collate_fn=named)),
    "pairs tensors": lambda n: fit(n, OfPairs(), DataLoader(Texts(), 2, collate_fn=paired)),
    "combines loaders": lambda n: fit(
        n, OfSources(), CombinedLoader({"a": DataLoader(Texts(), 2), "b": DataLoader(Texts(8, 10), 2)}, "min_size")
    ),
}


def do_all(rank, world_size):
    return {name: does(world_size) for name, does in DOES.items()}


@pytest.fixture(scope="module")
def shared():
    return run_ranks(2, do_all, limit_s=200.0)


@pytest.mark.parametrize("name", DOES)
def test_it_is_as_on_one_process(shared, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = DOES[name](1)
    assert len(expected) >= 4
    for found in shared:
        assert found[name] == pytest.approx(expected, abs=1e-4)


class Augmented(Texts):
    """Random texts that differ between ranks."""

    def __getitem__(self, index):
        ids, labels = super().__getitem__(index)
        return (ids + int(os.environ["RANK"])) % VOCABULARY, labels


class Longer(Texts):
    def __init__(self) -> None:
        super().__init__(tokens=14 + int(os.environ["RANK"]))


class Images(Texts):
    def __getitem__(self, index):
        return torch.ones(3)


class ImagesOnOne(Texts):
    def __getitem__(self, index):
        return torch.ones(3) if os.environ["RANK"] == "1" else super().__getitem__(index)


REFUSED = {
    Augmented: "ranks 0 and 1 share the sequences of one batch, and got other ones: training batch 0 has 0 [2, 14]",
    Longer: "and [2, 15] int64 with checksum",
    Images: "[batch, tokens] of whole numbers; found one tensor [2, 3] float32",
    ImagesOnOne: "on rank 0, and absent on rank 1",
}


def refuse_all(rank, world_size):
    said = []
    for kind in REFUSED:
        with pytest.raises(lss.SuperScaleError) as refused:
            fit(world_size, LanguageModel(), DataLoader(kind(), 2))
        said.append(str(refused.value))
    return said


def test_batches_that_can_not_be_shared_are_refused_on_all_ranks():
    first, second = run_ranks(2, refuse_all)
    assert first == second
    for text, expected in zip(first, REFUSED.values(), strict=True):
        assert expected in text
