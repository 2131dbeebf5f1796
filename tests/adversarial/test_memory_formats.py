"""Weights keep the memory format that user code gave them, and get the bits that torch gives in that format."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F

import lightning_superscale as lss
from lightning_superscale import UniversalCheckpointIO
from tests.adversarial.reading_modules import Reads, differences
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer

STRATEGIES = {
    "superscale": lambda: "superscale",
    "cpu": lambda: lss.SuperScaleStrategy(offload="cpu"),
    "superoffload": lambda: "superoffload",
    "weights that flow": lambda: lss.SuperScaleStrategy(
        offload=lss.OffloadConfig(weights="flow", wrap=["Conv2d", "Conv3d", "Linear"])
    ),
}
EACH = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)


def each_or(*by_default):
    """Every strategy with every case in `make test-all`; these pairs of a strategy and a case in the default suite."""
    marks = {True: (), False: (only_in_test_all,)}
    cases = dict.fromkeys(case for _, case in by_default)
    return [
        pytest.param(make, case, marks=marks[(name, case) in by_default], id=f"{name}-{case}")
        for name, make in STRATEGIES.items()
        for case in cases
    ]


class Images(Reads):
    """Convolutions in channels_last and channels_last_3d, some of them 1x1, and a Linear whose weight is transposed."""

    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW

    def more(self):
        self.flat = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 1)).to(
            memory_format=torch.channels_last
        )
        self.deep = nn.Conv3d(2, 4, (1, 2, 2)).to(memory_format=torch.channels_last_3d)
        self.last = nn.Linear(12, 5)
        self.last.weight.data = self.last.weight.data.t().contiguous().t()

    def loss(self, batch):
        x, y = batch
        dtype = self.last.weight.dtype
        image = x[:, :16].reshape(-1, 4, 2, 2).to(dtype, memory_format=torch.channels_last)
        volume = x[:, :16].reshape(-1, 2, 2, 2, 2).to(dtype, memory_format=torch.channels_last_3d)
        seen = self.flat(image).mean((2, 3)), self.deep(volume).mean((3, 4)).flatten(1)[:, :6]
        return F.mse_loss(self.last(torch.cat(seen, 1)).float(), y.float())

    def configure_optimizers(self):
        modules = nn.ModuleList([self.flat, self.deep, self.last])
        return self.optimizer_class(modules.parameters(), lr=1e-2)

    def strides(self):
        return {name: param.stride() for name, param in self.named_parameters()}

    def on_train_start(self):
        self.during = self.strides()


class ByMomentum(Images):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class ByAdagrad(Images):
    """Makes its states in its constructor."""

    optimizer_class = torch.optim.Adagrad


def run(cls, strategy, devices=1, **flags):
    module = cls()
    fitted = trainer(strategy, devices=devices, **flags)
    fitted.fit(module, loader())
    return module, fitted


def outcome_of(module):
    return module.seen, {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_alike(cls, make, **flags):
    expected, (found, _) = run(cls, "auto", **flags)[0], run(cls, make(), **flags)
    assert differences(outcome_of(expected), outcome_of(found)) == []
    assert found.during == found.strides() == cls().strides()


@pytest.mark.parametrize(
    ("make", "cls"), each_or(*((name, Images) for name in STRATEGIES), ("cpu", ByMomentum), ("superscale", ByAdagrad))
)
def test_weights_keep_their_strides_and_bits(cls, make):
    assert_alike(cls, make)


@EACH
def test_clipped_and_looked_at(make):
    class Looks(Images):
        def on_before_optimizer_step(self, optimizer):
            self.seen += [float(p.grad.double().sum()) for p in self.flat.parameters()]

    assert_alike(Looks, make, gradient_clip_val=0.05)


@pytest.mark.parametrize("name", ["superscale", "superoffload"])
def test_masters_of_16_bit_weights(name):
    module, fitted = run(Images, name, precision="bf16-true")
    assert module.during == module.strides() == Images().strides()
    module, fitted = run(Images, name)
    for param, state in fitted.optimizers[0].state.items():
        assert state["exp_avg"].stride() == param.stride()


@pytest.mark.parametrize(("make", "is_universal"), each_or(("superscale", True), ("superoffload", False)))
def test_checkpoints_are_read_both_ways(make, is_universal, tmp_path):
    """By runs in this format and by those with contiguous weights, under this strategy and without."""

    class Contiguous(Images):
        def more(self):
            super().more()
            for param in self.parameters():
                param.data = param.data.contiguous()

    plugins = [UniversalCheckpointIO()] if is_universal else []
    whole, _ = run(Images, "auto", max_epochs=4)
    for first in (make, lambda: "auto"):
        _, fitted = run(Images, first(), plugins=plugins)
        fitted.save_checkpoint(tmp_path / "saved")
        for strategy, cls in ((make(), Images), ("auto", Images), (make(), Contiguous)):
            module = cls()
            trainer(strategy, max_epochs=4, plugins=plugins).fit(module, loader(), ckpt_path=tmp_path / "saved")
            assert module.strides() == cls().strides()
            for name, value in whole.state_dict().items():
                if cls is Images:
                    assert torch.equal(module.state_dict()[name], value), name
                else:  # torch's convolutions have other bits in another format
                    torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-4)


class ByRows(Images):
    """Every row is in one piece, so that ranks can share them; a transposed weight is contiguous there."""

    def more(self):
        super().more()
        self.last.weight.data = self.last.weight.data.contiguous()


def _over_ranks(rank: int, world_size: int):
    wrong = {}
    expected = outcome_of(run(ByRows, DDPStrategy(find_unused_parameters=True), world_size)[0])
    for name in ("superscale", "zero1", "zero2", "superoffload", "zero3") if IS_ALL else ("zero2", "superoffload"):
        module, _ = run(ByRows, name, world_size)
        wrong[name] = differences(expected, outcome_of(module))
        # FSDP2 does not tell the two formats of a 1x1 convolution apart.
        kept = {k: v for k, v in ByRows().strides().items() if name != "zero3" or k != "flat.1.weight"}
        wrong[name] += [key for key, v in kept.items() if not module.during[key] == module.strides()[key] == v]
    return {name: diff for name, diff in wrong.items() if diff}


def test_over_ranks():
    assert run_ranks(2, _over_ranks) == [{}, {}]
