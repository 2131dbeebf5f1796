"""Ranks that share sequences and cut weights over a tensor axis give the training of one process.

Tolerance: one process adds what four ranks add in another order. Sums are over at most 26 features and the 48 tokens of
a batch, each with one rounding a term (2^-53, 2^-24), through two blocks and four steps: some thousand roundings are
1e-12 of the largest value in fp64, and some hundred, of random signs, 1e-5 in fp32.
A gradient that is missing or added twice is off by the whole of it.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import lightning_superscale as lss
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import LanguageModel, Saves, dealt_loader, rank_batches, train_plain, whole, whole_of
from tests.helpers.trainers import trainer

MAX_NORM = 0.1
# By name: the plan, the engine, settings of the sequence axis, the optimizer and flags of the Trainer.
CASES = {
    "exact": ("vocabulary", None, {"mode": "ulysses"}, "SGD", {"precision": "64-true"}),
    "clipped": ("rowwise", None, {"mode": "ring", "checkpoint_blocks": True}, "SGD", {"gradient_clip_val": MAX_NORM}),
    "offloaded": ("vocabulary", "superoffload", {}, "AdamW", {"gradient_clip_val": MAX_NORM}),
}
STAGE_3 = {"stage": 3, "tensor_parallel": 2}


class Recorded(LanguageModel):
    """Keeps its first step's gradients, whole."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.grads: dict[str, torch.Tensor] = {}

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net, batch[0])
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer):
        if not self.grads and self.optimizer == "SGD":
            self.grads = {name: whole_of(param.grad) for name, param in self.net.named_parameters()}


def loss_of(net, ids):
    return functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def fit(rank, world_size, folder, kind, engine, sequence, optimizer, flags):
    """Losses, gradients of the first step, and weights, whole."""
    module = Recorded(kind, optimizer)
    strategy = lss.SuperScaleStrategy(zero=STAGE_3, offload=engine, sequence={"size": 2, **sequence})
    saves = [Saves(f"{folder}/saved.ckpt")] if sequence.get("mode") == "ring" else []
    runner = trainer(strategy, devices=world_size, max_epochs=2, callbacks=saves, **flags)
    runner.fit(module, dealt_loader(8))
    return module.losses, module.grads, whole(module.net)


def fit_all(rank, world_size, folder):
    try:
        fit(rank, world_size, folder, "sequence", None, {}, "SGD", {})
        refused = ""
    except lss.SequenceParallelError as error:
        refused = str(error)
    return {"refused": refused, **{name: fit(rank, world_size, folder, *case) for name, case in CASES.items()}}


def in_one_process(optimizer, flags):
    dtype = torch.float64 if flags.get("precision") == "64-true" else torch.float32
    net = LanguageModel(None).net.to(dtype)
    loss_of(net, rank_batches(0, 1, 8)[0][0]).backward()
    grads = {name: param.grad for name, param in net.named_parameters()}
    trained, losses, _ = train_plain(1, 8, optimizer=optimizer, max_norm=flags.get("gradient_clip_val"), dtype=dtype)
    return losses, grads, dict(trained.named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def four(folder):
    return run_ranks(4, fit_all, folder, limit_s=240)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(four, name):
    *_, optimizer, flags = CASES[name]
    losses, grads, weights = in_one_process(optimizer, flags)
    allowed = 1e-12 if "precision" in flags else 1e-5
    for found_losses, found_grads, found_weights in (of_rank[name] for of_rank in four):
        assert found_losses == pytest.approx(losses, rel=allowed)
        assert_near(found_weights, weights, allowed)
        if optimizer == "SGD" and "gradient_clip_val" not in flags:
            assert_near(found_grads, grads, allowed)


def test_one_process_goes_on_where_four_ranks_saved(four, folder):
    module = Recorded(None, "SGD")
    runner = trainer(lss.SuperScaleStrategy(), devices=1, max_epochs=2, gradient_clip_val=MAX_NORM)
    runner.fit(module, dealt_loader(8), ckpt_path=f"{folder}/saved.ckpt")
    losses, _, weights = four[0]["clipped"]
    assert module.losses == pytest.approx(losses[2:], rel=1e-5)
    assert_near(whole(module.net), weights, 1e-5)


def assert_near(found, expected, allowed):
    assert found.keys() == expected.keys()
    largest = max(float(one.detach().abs().max()) for one in expected.values())
    for name, one in expected.items():
        assert float((found[name] - one.detach()).abs().max()) <= allowed * largest, name


def test_a_plan_that_cuts_tokens_is_refused_on_every_rank(four):
    told = "sequence=2 with ZeroConfig.tensor_parallel=2: the plan lays 'net.embed' (Embedding) out as"
    assert all(told in of_rank["refused"] for of_rank in four)
