"""Tensor-parallel runs that can't be right: every rank says what is wrong and what to do."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import LanguageModel, loss_of, parallelize, token_loader
from tests.helpers.trainers import trainer

# Far below any timeout of a collective, and above the watch's patience.
SECONDS = 25.0


class OtherMesh(LanguageModel):
    def configure_model(self):
        parallelize(self.net, init_device_mesh("cpu", (2,)), "rowwise")


class NormOfHeads(LanguageModel):
    """A norm that acts on each rank's own heads, and that the plan does not know."""

    def __init__(self) -> None:
        super().__init__()
        attention = self.net.blocks[1].attention
        attention.q = nn.Sequential(attention.q, nn.Unflatten(-1, (-1, 6)), nn.RMSNorm(6), nn.Flatten(-2))
        parameters = list(self.parameters())
        self.configure_optimizers = lambda: torch.optim.SGD(parameters, lr=0.1)

    def configure_model(self):
        q = self.net.blocks[1].attention.q
        self.net.blocks[1].attention.q = q[0]
        super().configure_model()
        q[0] = self.net.blocks[1].attention.q
        self.net.blocks[1].attention.q = q
        self.configure_optimizers = lambda: torch.optim.SGD(self.parameters(), lr=0.1)


class OtherBatches(LanguageModel):
    def training_step(self, batch, batch_idx):
        return loss_of(self.net, (batch[0] + self.global_rank) % 20)


class Overflows(LanguageModel):
    """Has an infinite gradient on one rank of the tensor axis."""

    def configure_model(self):
        super().configure_model()
        if self.global_rank == 1:
            self.net.blocks[0].feed_forward.up.register_forward_hook(_overflow)


def _overflow(module, inputs, output):
    output.register_hook(lambda grad: grad * float("inf"))


STAGE_3 = {"stage": 3, "tensor_parallel": 2}
REFUSED = {
    "a plan without the option": (
        OtherMesh,
        {"stage": 2},
        "is a DTensor already.*set ZeroConfig\\(stage=3, tensor_parallel=...\\)",
    ),
    "a plain norm where heads are cut": (
        NormOfHeads,
        STAGE_3,
        "different gradients of 'net.blocks.1.attention.q.2.weight'.*No weight was changed",
    ),
    "an infinite gradient": (
        Overflows,
        STAGE_3,
        "error_if_nonfinite: the gradients of 11 of 30 parameters are NaN .*net.embed.weight.*are as before",
    ),
    "other batches": (OtherBatches, STAGE_3, "computed different gradients of 'net.*give samplers of your own"),
}


def _refused(rank, world_size):
    said = {}
    for name, (make, zero, _) in REFUSED.items():
        try:
            own = lss.SuperScaleStrategy(zero=zero, error_if_nonfinite=True)
            trainer(own, devices=world_size).fit(make(), token_loader(8))
        except SuperScaleError as error:
            said[name] = str(error)
    return said


def test_what_cannot_be_right_is_refused_on_all_ranks_with_the_remedy():
    for said in run_ranks(2, _refused, limit_s=90):
        for name, (_, _, message) in REFUSED.items():
            with pytest.raises(SuperScaleError, match=message):
                raise SuperScaleError(said.get(name, "nothing"))


@pytest.mark.parametrize("devices", [1, 3])
def test_ranks_that_the_tensor_axis_does_not_divide_are_refused_before_launch(devices):
    with pytest.raises(SuperScaleError, match=f"tensor_parallel=2 does not divide the {devices} rank"):
        trainer(lss.SuperScaleStrategy(zero=STAGE_3), devices=devices)


def test_launchers_that_bring_the_module_back_are_refused():
    with pytest.raises(SuperScaleError, match="start_method='spawn' brings the module back.*Use start_method='popen'"):
        trainer(lss.SuperScaleStrategy(zero=STAGE_3, start_method="spawn"), devices=2)


class Failing(LanguageModel):
    """Raises on one rank between forward and backward, where the others are in collectives of the plan's own."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.global_rank == 1:
            raise ValueError("bad sample 17")
        return loss


def _fails(rank, world_size):
    start = time.monotonic()
    try:
        trainer(lss.SuperScaleStrategy(zero=STAGE_3), devices=world_size).fit(Failing(), token_loader(2))
    except Exception as error:
        return "; ".join([str(error), *getattr(error, "__notes__", [])]), time.monotonic() - start
    return "nothing", time.monotonic() - start


def test_an_exception_on_one_rank_is_told_to_all():
    said = run_ranks(4, _fails, limit_s=90)
    assert said[1][0] == "bad sample 17"
    for rank in (0, 2, 3):
        assert "rank 1 failed: ValueError: bad sample 17" in said[rank][0], said[rank][0]
        assert said[rank][1] < SECONDS
