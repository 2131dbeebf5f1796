"""fp16 in manual optimization: every gradient is scaled once, or the step is refused."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_superscale as lss
from tests.helpers.backward_patterns import TwoTowers, loss_of, weights_of
from tests.helpers.backward_runs import ADAMW, Batches, batch
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import trainer

NUM_BATCHES = 10
SCALED_ONCE = ("non-scalar", "gradient from outside", "loss and non-scalar", "thrown away")
REFUSED = ("raw", "raw, then scaled", "by hand")
STRATEGIES = {
    "superscale": {"zero": 0},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "superoffload": {"zero": 2, "offload": "superoffload"},
}


class Towers(L.LightningModule):
    """Encoders in fp16, and gradients of what they make that come from elsewhere."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.way = TwoTowers(), way

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), **ADAMW)

    def training_step(self, x, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        backward_in_fp16(self.net, x, self.way, self.manual_backward, self.trainer.precision_plugin.scaler.scale)
        self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()


def backward_in_fp16(net: TwoTowers, x: torch.Tensor, way: str, backward, scale: float) -> None:
    """Forward under autocast is the caller's; `backward` multiplies by `scale`."""
    embedding = net.vision(x)
    if way == "non-scalar":
        backward(embedding, gradient=weights_of(embedding).to(embedding.dtype))
    elif way == "gradient from outside":
        received = embedding.detach().requires_grad_()
        backward(loss_of(net.text(received).float()))
        backward(embedding, gradient=received.grad / scale)
    elif way == "loss and non-scalar":
        backward(loss_of(embedding.float()), retain_graph=True)
        backward(embedding, gradient=weights_of(embedding).to(embedding.dtype))
    elif way == "raw":
        loss_of(embedding.float()).backward()
    elif way == "raw, then scaled":
        embedding.backward(weights_of(embedding).to(embedding.dtype), retain_graph=True)
        backward(loss_of(embedding.float()))
    elif way == "thrown away":
        embedding.backward(weights_of(embedding).to(embedding.dtype), retain_graph=True)
        for param in net.parameters():
            param.grad = None
        backward(loss_of(embedding.float()))
    elif way == "by hand":
        backward(loss_of(embedding.float()))
        net.vision.first.weight.grad = torch.ones_like(net.vision.first.weight)


def plain_fp16(way: str) -> tuple[dict[str, torch.Tensor], float]:
    net = TwoTowers()
    optimizer = torch.optim.AdamW(net.parameters(), **ADAMW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    for k in range(NUM_BATCHES):
        optimizer.zero_grad()
        scale = scaler.get_scale()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            backward_in_fp16(
                net, batch(k, 0), way, lambda t, s=scale, **how: (t * torch.tensor(s)).backward(**how), scale
            )
        scaler.scale(torch.ones(()))  # what GradScaler wants to see before it unscales
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
    return {name: param.detach() for name, param in net.named_parameters()}, scaler.get_scale()


def fit_fp16(rank: int, world_size: int, way: str, strategy: dict) -> tuple[dict[str, torch.Tensor], float] | str:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    module, plugin = Towers(way), lss.SuperScalePrecision("16-mixed", scaler=scaler)
    flags = {"plugins": [plugin], "devices": world_size, "max_epochs": 1, "use_distributed_sampler": False}
    try:
        trainer(lss.SuperScaleStrategy(**strategy), **flags).fit(
            module, DataLoader(Batches(NUM_BATCHES, 0), batch_size=None)
        )
    except lss.SuperScaleError as error:
        return str(error)
    return {name: param.detach().clone() for name, param in module.net.named_parameters()}, plugin.scaler.scale


@pytest.mark.parametrize("way", SCALED_ONCE)
@pytest.mark.parametrize("name", ["superscale", "superoffload"])
def test_gradients_are_scaled_once(name, way):
    expected, scale = plain_fp16(way)
    weights, found_scale = fit_fp16(0, 1, way, STRATEGIES[name])
    assert found_scale == scale < 2.0**22  # some steps overflowed
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("name", ["superscale", "superoffload"])
def test_gradients_that_nobody_scaled_are_refused_by_name(name, way):
    found = fit_fp16(0, 1, way, STRATEGIES[name])
    assert isinstance(found, str)
    assert "'net.vision." in found
    assert "was not made by self.manual_backward()" in found


def _all_ways(rank: int, world_size: int):
    return {
        (name, way): fit_fp16(rank, world_size, way, strategy)
        for name, strategy in STRATEGIES.items()
        if IS_ALL or name in ("zero2", "zero3")
        for way in (*SCALED_ONCE, *REFUSED)
        if (name, way) != ("zero3", "by hand")  # nothing sharded can be put there, which is refused anyway
    }


def test_the_same_at_two_ranks():
    """Both get the same batches, whose halved gradients add up to them. Their norms are added in another precision.

    That changes a clip coefficient, and a step, by some units of roundoff.
    """
    expected = {way: plain_fp16(way) for way in SCALED_ONCE}
    for found in run_ranks(2, _all_ways, limit_s=200):
        for (name, way), result in found.items():
            if way in REFUSED:
                assert isinstance(result, str), f"{name}, {way}"
                assert "was not made by self.manual_backward()" in result, f"{name}, {way}"
                continue
            weights, scale = result
            assert scale == expected[way][1], f"{name}, {way}"
            for key, value in expected[way][0].items():
                torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}, {way}: {key}")
