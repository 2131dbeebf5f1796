"""The whole kit on one language model, under transports and weight flow: the bits of plain training without it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_superscale import OffloadConfig, SuperScaleStrategy
from lightning_superscale.offload.link.link import CpuLink
from lightning_superscale.sequence.memory.activation_offload import ActivationOffload
from lightning_superscale.sequence.memory.checkpointing import BlockCheckpoints, RecomputePolicy
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes
from lightning_superscale.sequence.memory.tiled_loss import tiled_cross_entropy
from lightning_superscale.sequence.memory.tiled_mlp import TiledForward
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import assert_same_weights, trainer

B, S, H, V, HEADS, NUM = 2, 16, 32, 64, 4, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(H), nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.mlp = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H), nn.Dropout(0.1))
        self.calls = [self.mlp]

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        h = x + F.dropout(self.out(h), 0.1, self.training)
        return h + self.calls[0](h)


class LanguageModel(L.LightningModule):
    """Tied embeddings, blocks and a tiled loss; MLPs run in tiles, and blocks are recomputed, if it is told to."""

    def __init__(self, *, recomputes: bool, tile: int = S) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(V, H), nn.LayerNorm(H)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM))
        self.tile, self.link, self.losses = tile, CpuLink(), []
        for i, block in enumerate(self.blocks):
            block.calls = [TiledForward(block.mlp, tile=tile, name=f"blocks.{i}.mlp")]
        if recomputes:
            self.offload = ActivationOffload(self.link, torch.device("cpu"))
            named = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
            self.checkpoints = [BlockCheckpoints(named, RecomputePolicy(), self.offload)]

    def loss(self, ids):
        h = self.embed(ids[:, :-1])
        for block in self.blocks:
            h = block(h)
        return tiled_cross_entropy(self.norm(h), self.embed.weight, ids[:, 1:], tile=self.tile)

    def training_step(self, ids, _index):
        loss = self.loss(ids)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, ids, _index):
        self.losses.append(self.loss(ids))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches():
    ids = torch.randint(0, V, (6 * B, S + 1), generator=torch.Generator().manual_seed(3))
    return DataLoader(ids, batch_size=B)


def fit(strategy, *, recomputes, **flags):
    model = LanguageModel(recomputes=recomputes)
    torch.manual_seed(4)
    trainer(strategy, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5, **flags).fit(
        model, batches(), batches()
    )
    return model


STRATEGIES = {
    "plain": lambda: "auto",
    "superscale": lambda: "superscale",
    "superoffload": lambda: "superoffload",
    "weight flow": lambda: SuperScaleStrategy(zero=0, offload=OffloadConfig(weights="flow")),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_with_the_kit_has_the_bits_of_the_same_strategy_without_it(strategy):
    model, plain = (fit(STRATEGIES[strategy](), recomputes=recomputes) for recomputes in (True, False))
    assert_same_weights(model, plain)
    assert all(map(torch.equal, model.losses, plain.losses))
    # 12 training steps in two epochs, each with every block's input out and in; evaluations keep nothing.
    assert model.link.bytes.d2h == model.link.bytes.h2d == 12 * NUM * B * S * H * 4
    assert model.offload.lent_bytes == 0


def test_only_results_of_attention_and_of_the_loss_stay_on_the_device():
    model = LanguageModel(recomputes=True, tile=4)
    ids = next(iter(batches()))
    with SavedBytes([*model.parameters()]) as saved:
        model.loss(ids)
    tokens = B * S
    # The indices of the embedding; the last norm's input, mean and deviation; the loss' gradients of hidden states and
    # of the weight, and the number of tokens. Attention's results are the checkpoints', which autograd does not see.
    assert saved.nbytes == B * (S + 1) * 8 + tokens * (H * 4 + 2 * 4) + tokens * H * 4 + V * H * 4 + 8


def _sharded(rank, world_size):
    del rank
    models = []
    for recomputes in (True, False):
        model = LanguageModel(recomputes=recomputes)
        torch.manual_seed(4)
        # The loss reads the embedding outside of its module, where stage 3 has only a part of it.
        model.loss = lambda ids, model=model: _untied_loss(model, ids)
        trainer("zero3", devices=world_size, max_epochs=1).fit(model, batches())
        models.append(model)
    assert_same_weights(*models)
    assert all(map(torch.equal, *(model.losses for model in models)))
    return models[0].link.bytes.d2h


def _untied_loss(model, ids):
    h = model.embed(ids[:, :-1])
    for block in model.blocks:
        h = block(h)
    return model.norm(h).square().mean()


def test_over_sharded_weights_too():
    assert run_ranks(2, _sharded, limit_s=100) == [3 * NUM * B * S * H * 4] * 2
