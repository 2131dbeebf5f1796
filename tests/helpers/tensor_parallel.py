"""A small transformer whose attention and feed-forward are cut over a tensor axis, and its plan."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WIDTH, HIDDEN, HEADS, VOCABULARY, LENGTH = 12, 26, 2, 20, 6
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        # Under the plan a rank has its heads only, so their number follows from what the projections return.
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.feed_forward = Attention(), SwiGLU()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


COLWISE_ROWWISE = {
    "attention.q": ColwiseParallel(),
    "attention.k": ColwiseParallel(),
    "attention.v": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
    "feed_forward.gate": ColwiseParallel(),
    "feed_forward.up": ColwiseParallel(),
    "feed_forward.down": RowwiseParallel(),
}
# Activations between blocks are cut along the sequence, and norms are placed on the tensor axis too.
SEQUENCE = {
    "norm1": SequenceParallel(),
    "norm2": SequenceParallel(),
    "attention": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    **COLWISE_ROWWISE,
    "attention.out": RowwiseParallel(output_layouts=Shard(1)),
    "feed_forward.down": RowwiseParallel(output_layouts=Shard(1)),
}


def parallelize(net: Transformer, mesh, kind: str) -> None:
    """Cut a transformer over a mesh of one axis: "rowwise", "vocabulary" (embedding and head too) or "sequence"."""
    for block in net.blocks:
        parallelize_module(block, mesh, SEQUENCE if kind == "sequence" else COLWISE_ROWWISE)
    if kind == "vocabulary":
        outer = {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(net, mesh, outer)
    if kind == "sequence":
        outer = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(net, mesh, outer)


def tokens(num: int = 16) -> TensorDataset:
    return TensorDataset(torch.randint(VOCABULARY, (num, LENGTH + 1), generator=torch.Generator().manual_seed(3)))


def token_loader(batch_size: int, num: int = 16) -> DataLoader:
    return DataLoader(tokens(num), batch_size=batch_size)


def dealt_loader(batch_size: int) -> DataLoader:
    """For one device: the same batches as ranks get together, since Lightning shuffles what it distributes."""
    return DataLoader(tokens(), batch_size=batch_size, sampler=DistributedSampler(tokens(), 1, 0, shuffle=True))


def loss_of(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


class LanguageModel(L.LightningModule):
    """What a user of Lightning's ModelParallelStrategy writes.

    Args:
        kind: of plan; None for no plan.
    """

    def __init__(self, kind: str | None = "rowwise", optimizer: str = "AdamW", *, on_meta: bool = False) -> None:
        super().__init__()
        torch.manual_seed(11)
        with torch.device("meta" if on_meta else "cpu"):
            self.net = Transformer()
        self.kind, self.optimizer = kind, optimizer
        self.is_parallel = False
        self.losses: list[float] = []

    def configure_model(self):
        if self.kind is not None and not self.is_parallel:
            parallelize(self.net, self.device_mesh["tensor_parallel"], self.kind)
            self.is_parallel = True

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net, batch[0])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", loss_of(self.net, batch[0]))

    def configure_optimizers(self):
        return optimizer_of(self.net, self.optimizer)


class Saves(L.Callback):
    """Saves at the end of the first epoch, while everything is sharded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def whole_of(x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, whole on every rank."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module, whole on every rank, by name."""
    return {name: whole_of(param) for name, param in module.named_parameters()}


def optimizer_of(net: nn.Module, name: str = "AdamW") -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(net.parameters(), **ADAMW)


def rank_batches(epoch: int, num_data: int, batch_size: int) -> list[list[torch.Tensor]]:
    """By step, the batch of every data-parallel rank, as the sampler that Lightning puts in deals them."""
    data = tokens()
    dealt = []
    for rank in range(num_data):
        sampler = DistributedSampler(data, num_data, rank, shuffle=True)
        sampler.set_epoch(epoch)
        dealt.append(list(sampler))
    steps = range(0, len(dealt[0]), batch_size)
    return [[data.tensors[0][mine[start : start + batch_size]] for mine in dealt] for start in steps]


def train_plain(num_data: int, batch_size: int, *, optimizer: str = "AdamW", max_norm: float | None = None,
                dtype: torch.dtype = torch.float32, trained: str = ""):  # fmt: skip
    """The same training in one process on the global batches: (network, mean losses, gradient norms).

    Args:
        trained: what names of parameters that are not frozen contain.
    """
    net = LanguageModel(None).net.to(dtype)
    for name, param in net.named_parameters():
        param.requires_grad_(trained in name)
    own = optimizer_of(net, optimizer)
    losses, norms = [], []
    for epoch in range(2):
        for batches in rank_batches(epoch, num_data, batch_size):
            loss = sum(F.cross_entropy(net(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()) for b in batches) / num_data
            loss.backward()
            losses.append(float(loss.detach()))
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), max_norm or float("inf"))))
            own.step()
            own.zero_grad()
    return net, losses, norms
