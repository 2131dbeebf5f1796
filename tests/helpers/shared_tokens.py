"""A model that takes its own part of every sample's tokens, and its training in one process on whole samples."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_superscale.comm.in_graph import AxisLink
from lightning_superscale.sequence.loss import cross_entropy

WIDTH, HIDDEN, VOCABULARY, LENGTH = 12, 26, 20, 8
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class RowWise(nn.Module):
    """A network whose layers see one token at a time, so that parts of a sample need nothing of one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def samples(num: int = 16) -> TensorDataset:
    """Tokens and labels, of which some don't count: more on the later half of a sample than on the first."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (num, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (num, LENGTH), generator=generator)
    labels[torch.rand(num, LENGTH, generator=generator) < torch.linspace(0, 0.8, LENGTH)] = -100
    return TensorDataset(tokens, labels)


class SharedTokens(L.LightningModule):
    """What a user writes who cuts sequences by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RowWise()
        self.losses: list[float] = []
        self.norms: list[float] = []

    @property
    def link(self) -> AxisLink:
        return AxisLink.along_sequence(self.trainer.strategy.run.environment.mesh)

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net, batch, self.link)
        self.losses.append(float(loss.detach()))
        self.log("loss", loss.detach())
        self.log("num_samples", float(len(batch[0])), reduce_fx="sum", sync_dist=True, on_step=False, on_epoch=True)
        self.log("largest", batch[0].max().float(), reduce_fx="max", sync_dist=True, on_step=False, on_epoch=True)
        self.log("mean_loss", loss.detach(), sync_dist=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), **ADAMW)


def loss_of(net: nn.Module, batch, link: AxisLink) -> torch.Tensor:
    tokens, labels = (part.chunk(link.size, dim=1)[link.rank] for part in batch)
    return cross_entropy(net(tokens).float(), labels, link)


def shared_loader(batch_size: int) -> DataLoader:
    return DataLoader(samples(), batch_size=batch_size)


def dealt_loader(batch_size: int) -> DataLoader:
    """For one device: the same batches as ranks get together, since Lightning shuffles what it distributes."""
    return DataLoader(samples(), batch_size=batch_size, sampler=DistributedSampler(samples(), 1, 0, shuffle=True))


def dealt(epoch: int, num_data: int, batch_size: int) -> list[list[list[torch.Tensor]]]:
    """By step, the batch of every rank with samples of its own, as the sampler that Lightning puts in deals them."""
    data, of_ranks = samples(), []
    for rank in range(num_data):
        sampler = DistributedSampler(data, num_data, rank, shuffle=True)
        sampler.set_epoch(epoch)
        of_ranks.append(list(sampler))
    starts = range(0, len(of_ranks[0]), batch_size)
    return [[[t[mine[start : start + batch_size]] for t in data.tensors] for mine in of_ranks] for start in starts]


def train_plain(num_data: int, batch_size: int, *, dtype=torch.float32, max_norm=None, accumulate=1, epochs=2):
    """Training in one process on whole samples: (network, mean losses of micro-batches, gradient norms)."""
    net = RowWise().to(dtype)
    optimizer, losses, norms = torch.optim.AdamW(net.parameters(), **ADAMW), [], []
    for epoch in range(epochs):
        for number, batches in enumerate(dealt(epoch, num_data, batch_size), start=1):
            flat = [(net(tokens).flatten(0, 1), labels.flatten()) for tokens, labels in batches]
            loss = sum(nn.functional.cross_entropy(*pair) for pair in flat) / num_data
            (loss / accumulate).backward()
            losses.append(float(loss.detach()))
            if number % accumulate == 0:
                norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), max_norm or float("inf"))))
                optimizer.step()
                optimizer.zero_grad()
    return net, losses, norms
