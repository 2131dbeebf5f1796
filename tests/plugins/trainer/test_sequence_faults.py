"""Ranks that share sequences and fail, or that can't share them: all of them say why, in time."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_superscale.errors import SequenceParallelError
from tests.helpers.ends import ends_of
from tests.helpers.ranks import run_ranks
from tests.helpers.sequence import LanguageModel, Texts, fitted
from tests.helpers.trainers import trainer

# Far below any timeout of a collective (30 minutes), and above the watch's patience.
SECONDS = 40.0


class Failing(LanguageModel):
    """Raises or dies on one rank in its third step: in a layer, in backward, or after the step."""

    def __init__(self, place: str, dies: bool) -> None:
        super().__init__()
        self.place, self.dies, self.at = place, dies, -1
        self.model.mlps[1].register_forward_hook(lambda *_: self.fail("forward"))
        self.model.mlps[0][1].register_full_backward_hook(lambda *_: self.fail("backward"))

    def fail(self, place: str) -> None:
        if place == self.place and self.at == 2 and self.global_rank == 1:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("bad sample 17")

    def on_train_batch_start(self, batch, batch_idx):
        self.at = batch_idx

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.fail("between")


def fail(rank, world_size, place, dies, zero):
    fitted(world_size, {"zero": zero, "sequence": world_size}, Texts(), module=Failing(place, dies))


@pytest.mark.parametrize(
    ("place", "dies", "zero"),
    [("forward", False, 1), ("backward", False, 3), ("between", False, 0), ("forward", True, 3), ("backward", True, 1)],
)
def test_a_rank_that_fails_is_named_by_the_one_that_shares_its_sequences(place, dies, zero):
    first, second = ends_of(2, fail, place, dies, zero)
    assert first.code not in (0, None), first
    assert second.code == (-signal.SIGKILL if dies else 1)
    assert ("rank 1" if dies else "rank 1 failed: ValueError: bad sample 17") in first.said
    assert first.seconds < SECONDS


class Compiled(LanguageModel):
    """Compiles a part of itself."""

    def __init__(self, what: str) -> None:
        super().__init__()
        if what == "a function":
            self.model.mlps[0].forward = torch.compile(self.model.mlps[0].forward, backend="eager")
        if what == "one rank" and os.environ["RANK"] == "1":
            self.model.attentions[0] = torch.compile(self.model.attentions[0], backend="eager")


def compiled(rank, world_size, what):
    """What the fit raised, and how many steps it had begun."""
    from lightning_superscale import SuperScaleStrategy

    module = Compiled(what)
    run = trainer(SuperScaleStrategy(zero=1, sequence=world_size), devices=world_size)
    try:
        run.fit(torch.compile(module, backend="eager") if what == "the module" else module, DataLoader(Texts(), 2))
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(module.losses)
    return "nothing", len(module.losses)


def all_compiled(rank, world_size, whats):
    return [compiled(rank, world_size, what) for what in whats]


def test_what_is_compiled_as_a_whole_or_on_one_rank_is_refused_before_any_step():
    whats = ["the module", "one rank", "a function"]
    for whole, one_rank, function in run_ranks(2, all_compiled, whats):
        assert whole[0].startswith("SequenceParallelError: sequence=2 with torch.compile(Compiled) on ranks 0, 1")
        assert "rank 0 compiled no module of Compiled, rank 1 ['model.attentions.0']" in one_rank[0]
        assert "meets a tensor of tokens in a function that torch.compile compiles" in function[0]
        assert whole[1] == one_rank[1] == function[1] == 0


class Gathers(LanguageModel):
    """Gathers its logits over ranks, and keeps them."""

    def __init__(self, *, sync_grads: bool = False) -> None:
        super().__init__()
        self.sync_grads = sync_grads

    def training_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.gathered = self.all_gather(logits, sync_grads=self.sync_grads)
        with torch.no_grad():
            self.kept = nn.functional.softmax(logits, -1)
        return super().training_step(batch, batch_idx)


def gather(rank, world_size):
    """What one rank gathered in its first step, and what the other way said."""
    module = Gathers()
    sequence = {"sequence": world_size} if world_size > 1 else {}
    fitted(world_size, sequence, Texts(), module=module, limit_train_batches=1)
    if world_size == 1:
        return module.gathered.detach()
    with pytest.raises(SequenceParallelError) as refused:
        fitted(world_size, sequence, Texts(), module=Gathers(sync_grads=True), limit_train_batches=1)
    return type(module.gathered), module.gathered.detach(), str(refused.value)


def test_all_gather_gives_whole_tensors_of_every_rank_and_refuses_gradients():
    expected = gather(0, 1)
    for kind, found, refusal in run_ranks(2, gather):
        assert kind is torch.Tensor
        for of_rank in found:  # fp32 products of 24 numbers near 5
            torch.testing.assert_close(of_rank, expected, rtol=0, atol=1e-4)
        assert "all_gather(sync_grads=True) of a tensor [2, 14, 29]" in refusal
