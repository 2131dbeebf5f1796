"""Training with the long-context kit is training without it, and keeps less.

Recomputed blocks give the same bits, wherever their inputs are kept. Tiles round otherwise: a gradient below 1 is a sum
of some dozen terms in fp32, which is right to about 16 * 2^-24 = 1e-6. AdamW divides it by at least `EPS`, so that a
step moves a weight by at most lr * 1e-6 / EPS = 1e-5 elsewhere, and four steps by 4e-5 (`FAR`). A part that is missing
or counted twice moves weights by whole steps of lr = 1e-2.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_superscale import OffloadConfig, SequenceConfig, SuperScaleStrategy
from lightning_superscale.errors import SettingError
from lightning_superscale.torch_private import TorchDispatchMode, tree_leaves
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import assert_same_weights, trainer

H, V, HEADS, NUM, SAMPLES, TOKENS = 16, 96, 4, 2, 2, 24
LR, EPS, FAR = 1e-2, 1e-3, 4e-5

RECOMPUTE = {"tile_loss": False, "checkpoint_blocks": True}
OFFLOAD = {**RECOMPUTE, "offload_activations": True}
LOSS = {"tile_loss": True}
ALL = {"tile_loss": True, "tile_mlp": 5, "checkpoint_blocks": True, "offload_activations": True}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, H)

    def forward(self, x):
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(H), Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H))

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Network(nn.Module):
    """As transformers writes them: labels make the loss inside of forward, from shifted logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, H), nn.LayerNorm(H)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM))
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if labels is None else (loss_of(logits, labels), logits)


def loss_of(logits, labels):
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, V).float(), labels[..., 1:].reshape(-1))


class Model(L.LightningModule):
    """Knows nothing of the kit."""

    def __init__(self, *, is_inside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net, self.is_inside, self.losses, self.largest = Network(), is_inside, [], 0

    def training_step(self, ids, _index):
        with LargestLogits() as seen:
            loss = self.net(ids, ids)[0] if self.is_inside else loss_of(self.net(ids), ids)
        self.largest = max(self.largest, seen.largest)
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, ids, _index):
        self.log("val_loss", loss_of(self.net(ids), ids))

    def predict_step(self, ids, _index):
        return self.net(ids)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=LR, eps=EPS)


class LargestLogits(TorchDispatchMode):
    """The most elements of any tensor whose last dim has the classes."""

    largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == V:
                self.largest = max(self.largest, x.numel())
        return out


def texts(num: int = 4 * SAMPLES) -> DataLoader:
    ids = torch.randint(V, (num, TOKENS), generator=torch.Generator().manual_seed(1))
    return DataLoader(ids, batch_size=SAMPLES)


def fit(options, kit, *, world_size: int = 1, size: int = 1, is_inside: bool = False, validates=False, **flags):
    """The module after four steps, and what `explain()` says."""
    L.seed_everything(5, verbose=False)
    sequence = SequenceConfig(size=size, **(kit or {"tile_loss": False}))
    strategy = SuperScaleStrategy(**options, sequence=sequence)
    module, run = Model(is_inside=is_inside), trainer(strategy, devices=world_size, **{"max_epochs": 1, **flags})
    run.fit(module, texts(), texts() if validates else None)
    return module, strategy, run


CASES = {
    "resident": ({"zero": 0}, {}),
    "superoffload": ({"zero": 0, "offload": "superoffload"}, {}),
    "weight flow": ({"zero": 0, "offload": OffloadConfig(weights="flow")}, {}),
    "accumulation": ({"zero": 0}, {"accumulate_grad_batches": 2}),
}


@pytest.fixture(scope="module")
def plain():
    return {name: fit(options, None, **flags)[0] for name, (options, flags) in CASES.items()}


@pytest.mark.parametrize("kit", [RECOMPUTE, OFFLOAD], ids=["recompute", "offload"])
@pytest.mark.parametrize("name", CASES)
def test_recomputed_blocks_have_the_bits_of_a_run_without(plain, name, kit):
    options, flags = CASES[name]
    module, strategy, _ = fit(options, kit, **flags)
    assert_same_weights(module, plain[name])
    assert all(map(torch.equal, module.losses, plain[name].losses))
    assert f"checkpoint_blocks: {NUM} blocks are recomputed in backward" in strategy.explain()
    # The input of a block is H elements of 4 bytes.
    assert f"take {H * 4} bytes per token" in strategy.explain()
    if kit is OFFLOAD:
        sent = 4 * NUM * SAMPLES * TOKENS * H * 4 / 2**10
        assert f"{sent:.1f} KiB went to the host and {sent:.1f} KiB came back" in strategy.explain()


def assert_near(module, plain, far=FAR):
    for (name, x), y in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=far, msg=lambda text, name=name: f"{name}: {text}")
    for x, y in zip(module.losses, plain.losses, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=16 * 2**-24 * 8)


@pytest.mark.parametrize("kit", [LOSS, {**LOSS, "tile_mlp": 5}, ALL], ids=["loss", "loss and mlp", "all"])
@pytest.mark.parametrize("name", CASES)
def test_tiles_train_as_a_run_without(plain, name, kit):
    options, flags = CASES[name]
    module, strategy, _ = fit(options, kit, **flags)
    assert_near(module, plain[name])
    assert "tile_loss: 4 losses ran without their logits" in strategy.explain()
    assert f"{H * 4} bytes per token ({H} features) and 6.0 KiB once are kept in place of {V * 4}" in strategy.explain()
    num_tokens = SAMPLES * (TOKENS - 1)
    assert plain[name].largest >= num_tokens * V
    assert 0 < module.largest < num_tokens * V
    if "tile_mlp" in kit:
        assert f"tile_mlp=5: {NUM} modules (net.blocks.0.mlp, ...)" in strategy.explain()


def test_16_bits(plain):
    """bf16 has 8 bits, and losses of about 5 differ by a few of its roundings."""
    flags = {"precision": "bf16-true"}
    without = fit({"zero": 0}, None, **flags)[0]
    assert_same_weights(fit({"zero": 0}, OFFLOAD, **flags)[0], without)
    tiled = fit({"zero": 0}, LOSS, **flags)[0]
    for x, y in zip(tiled.losses, without.losses, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2**-7, atol=0)


def test_8_bits_state_their_error():
    module, strategy, _ = fit({"zero": 0}, {**RECOMPUTE, "boundary_bits": 8})
    without = fit({"zero": 0}, None)[0]
    assert torch.equal(module.losses[0], without.losses[0])
    # One scale of 4 bytes for H features; and an error of at most half a step of 1 / 127 of the largest.
    assert f"inputs of blocks take {1 + 4 / H:.3f} bytes per element" in strategy.explain()
    assert "of a block's norm (first batch)" in strategy.explain()
    assert not all(map(torch.equal, module.parameters(), without.parameters()))


def test_evaluation_and_predictions_are_plain():
    module, strategy, run = fit({"zero": 0}, ALL, validates=True)
    _, _, other = fit({"zero": 0}, None, validates=True)
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(float(other.callback_metrics["val_loss"]), abs=1e-4)
    (first, *_) = run.predict(module, texts())
    assert type(first) is torch.Tensor
    with torch.no_grad():
        torch.testing.assert_close(first, module.net(next(iter(texts()))), rtol=0, atol=1e-6)


def test_the_module_is_given_back():
    module, _, _ = fit({"zero": 0}, ALL)
    assert all(type(block) is Block and type(block.mlp) is nn.Sequential for block in module.net.blocks)


def _over_ranks(rank, world_size, size):
    found = []
    for options in ({"zero": 0}, {"zero": 1}, {"zero": 2, "offload": "superoffload"}, {"zero": 3}):
        how = {"world_size": world_size, "size": size, "is_inside": options["zero"] == 3}
        without, _, run = fit(options, None, **how)
        module, strategy, _ = fit(options, ALL, **how)
        assert_near(module, without)
        exact, _, _ = fit(options, OFFLOAD, **how)
        assert_same_weights(exact, without)
        found.append((module.largest, strategy.explain()))
    outside = fit({"zero": 3}, LOSS, world_size=world_size, size=size)
    assert_near(outside[0], without)
    return found, outside[1].explain()


@pytest.mark.parametrize("size", [1, 2])
def test_over_ranks_with_sharded_weights_and_sequences(size):
    for found, outside in run_ranks(2, _over_ranks, size, limit_s=240):
        for largest, explained in found:
            assert 0 < largest < SAMPLES * (TOKENS - 1) * V // size
            assert "losses ran without their logits" in explained
            assert "blocks are recomputed in backward" in explained
        assert "left the module whose weights are freed" in outside


def test_options_of_recomputed_blocks_and_of_tiles_need_them():
    for kit in ({"offload_activations": True}, {"boundary_bits": 8}):
        with pytest.raises(SettingError, match="no blocks are recomputed"):
            SequenceConfig(**kit)
    with pytest.raises(SettingError, match="say of how many tokens"):
        SequenceConfig(mlps=["Block"])


def test_a_model_that_recomputes_itself_is_left_alone_and_named():
    class Recomputing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net.gradient_checkpointing = True

    strategy = SuperScaleStrategy(zero=0, sequence=SequenceConfig(**RECOMPUTE))
    trainer(strategy, max_steps=1).fit(Recomputing(), texts())
    assert "the model recomputes its blocks itself (net has gradient checkpointing on)" in strategy.explain()


def test_a_model_without_blocks_or_mlps_is_refused():
    class Flat(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net.blocks = nn.ModuleList()

    for kit, told in ((RECOMPUTE, "no repeated blocks"), ({"tile_mlp": 4}, "found no MLP")):
        with pytest.raises(Exception, match=told):
            trainer(SuperScaleStrategy(sequence=SequenceConfig(**kit)), max_epochs=1).fit(Flat(), texts())
