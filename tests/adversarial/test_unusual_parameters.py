"""Parameters that torch's optimizers take and that are unlike most are trained as torch trains them, or are refused."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import lightning_superscale as lss
from lightning_superscale import UniversalCheckpointIO
from tests.adversarial.reading_modules import Reads, differences, outcome
from tests.helpers.extent import IS_ALL, only_in_test_all
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import loader, trainer

STRATEGIES = {
    "superscale": lambda: "superscale",
    "cpu": lambda: lss.SuperScaleStrategy(offload="cpu"),
    "superoffload": lambda: "superoffload",
}
EACH = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
TWICE = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")


class Twice(Reads):
    """A parameter twice in one group, which torch steps twice, and clips twice."""

    def configure_optimizers(self):
        params = list(self.net.parameters())
        return torch.optim.AdamW([*params, params[0], params[3]], lr=1e-2)


@EACH
@TWICE
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.05}])
def test_a_parameter_twice_in_a_group_is_stepped_twice(make, clip):
    assert differences(outcome(Twice, "auto", **clip), outcome(Twice, make(), **clip)) == []


@EACH
@TWICE
def test_and_is_saved_and_resumed(make, tmp_path):
    found = []
    for strategy in ("auto", make()):
        first = trainer(strategy)
        first.fit(Twice(), loader())
        first.save_checkpoint(tmp_path / "twice.ckpt")
        module = Twice()
        trainer(make() if strategy != "auto" else "auto", max_epochs=4).fit(
            module, loader(), ckpt_path=tmp_path / "twice.ckpt"
        )
        found.append((module.seen, dict(module.state_dict())))
    assert differences(*found) == []


class Shared(Reads):
    """The middle layer is in two optimizers, of which one is not Adam, and both step at every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.net[:3].parameters(), lr=1e-2),
            torch.optim.SGD(self.net[2:].parameters(), lr=1e-2, momentum=0.9),
            torch.optim.AdamW(self.net.parameters(), lr=1e-3),
        ]


def test_a_parameter_may_be_in_two_optimizers_where_nothing_has_masters(tmp_path):
    assert differences(outcome(Shared, "auto"), outcome(Shared, "superscale")) == []


@pytest.mark.parametrize(
    ("make", "flags", "reason"),
    [
        (STRATEGIES["cpu"], {}, "two would each keep a master of it in host memory"),
        (STRATEGIES["superscale"], {"precision": "bf16-true"}, "two would each keep a master of it, since it is"),
    ],
)
def test_and_is_refused_where_each_would_keep_a_master(make, flags, reason):
    with pytest.raises(lss.SuperScaleError, match=f"'net.2.weight' is in optimizer 0 and in optimizer 1.*{reason}"):
        outcome(Shared, make(), **flags)


class Spectral(Reads):
    """Complex weights and weights in double precision beside others."""

    def more(self):
        self.filter = nn.Parameter(torch.randn(17, 17, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn((), dtype=torch.complex128))
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def loss(self, batch):
        x, y = batch
        mixed = torch.fft.ifft(torch.fft.fft(x.float()) @ self.filter * self.phase).real.float()
        return (self.net(mixed) + self.bias - y).square().mean().float()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@EACH
@pytest.mark.parametrize("flags", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}], ids=repr)
def test_complex_and_double_parameters_are_trained_as_by_torch(make, flags):
    assert differences(outcome(Spectral, "auto", **flags), outcome(Spectral, make(), **flags)) == []


class GetsComplexLater(Spectral):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)

    def on_train_epoch_start(self):
        self.optimizers().optimizer.add_param_group({"params": [self.filter]})


def test_a_complex_parameter_that_comes_after_the_kernel_was_chosen_is_refused_by_name():
    with pytest.raises(lss.SuperScaleError, match="'filter' is torch.complex64.*Give it to the optimizer in configure"):
        outcome(GetsComplexLater, "superoffload")


class InDouble(Reads):
    """Under 64-true batches, and tensors that user code makes, are in double precision."""

    def loss(self, batch):
        assert torch.ones(1).dtype == batch[0].dtype == self.net[0].weight.dtype == torch.float64
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


@EACH
def test_64_true_trains_as_under_other_strategies(make):
    flags = {"precision": "64-true", "gradient_clip_val": 0.05}
    assert differences(outcome(InDouble, "auto", **flags), outcome(InDouble, make(), **flags)) == []


def test_what_has_fewer_digits_than_64_true_is_refused():
    for key in ("gradient_accumulation", "gradient_reduction"):
        with pytest.raises(lss.SuperScaleError, match=f"{key}='fp32' can't work: it has fewer digits"):
            lss.SuperScalePrecision("64-true", **{key: "fp32"})
    with pytest.raises(lss.SuperScaleError, match="did you mean '64-true'"):
        lss.SuperScalePrecision("64")


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("superscale", None),
        ("superoffload", lss.CheckpointConfig()),
        pytest.param("superscale", lss.CheckpointConfig(), marks=only_in_test_all),
        pytest.param("superoffload", None, marks=only_in_test_all),
        pytest.param("cpu", None, marks=only_in_test_all),
    ],
)
def test_double_and_complex_states_are_saved_and_resumed(name, checkpoint, tmp_path):
    make = STRATEGIES[name]

    class Savable(Spectral):
        def more(self):
            super().more()
            self.phase = nn.Parameter(torch.randn((), dtype=torch.complex64))  # safetensors has no complex128

    plugins = [] if checkpoint is None else [UniversalCheckpointIO(checkpoint)]
    first = trainer(make(), plugins=plugins)
    first.fit(Savable(), loader())
    first.save_checkpoint(tmp_path / "saved")
    module, whole = Savable(), Savable()
    trainer(make(), plugins=plugins, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "saved")
    trainer("auto", max_epochs=4).fit(whole, loader())
    assert differences((whole.seen[12:], dict(whole.state_dict())), (module.seen, dict(module.state_dict()))) == []


def _over_ranks(rank: int, world_size: int):
    wrong = {"shared": differences(*(outcome(Shared, s, world_size) for s in (DDPStrategy(), "superscale")))}
    expected = outcome(Twice, DDPStrategy(), world_size)
    for name in ("superscale", "zero2", "superoffload", "zero3") if IS_ALL else ("zero2",):
        wrong[name] = differences(expected, outcome(Twice, name, world_size))
    expected = outcome(Spectral, DDPStrategy(), world_size)
    for name in ("superscale", "zero2", "superoffload", "zero3") if IS_ALL else ("zero3",):
        wrong[name, "spectral"] = differences(expected, outcome(Spectral, name, world_size))
    with pytest.raises(lss.SuperScaleError, match="two would each gather its new weights"):
        outcome(Shared, "zero2", world_size)
    return {name: diff for name, diff in wrong.items() if diff}


@TWICE
def test_over_ranks():
    assert run_ranks(2, _over_ranks) == [{}, {}]
