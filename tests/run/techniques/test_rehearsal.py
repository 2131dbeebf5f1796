"""A rehearsed training step measures what torch does, and training goes on as if it had never run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.run.techniques.registry import TECHNIQUES
from lightning_superscale.run.techniques.technique import ModuleTechnique
from tests.helpers.trainers import Regressor, dataset, fit

STRATEGIES = {
    "device": {},
    "cpu": {"offload": "cpu"},
    "superoffload": {"offload": "superoffload"},
    "zenflow": {"offload": {"engine": "zenflow", "zenflow": {"topk": 0.25, "update_interval": 2}}},
    "weight flow": {"offload": {"engine": "cpu", "weights": "flow", "wrap": ["Linear"]}},
}


class Probe(ModuleTechnique):
    """Rehearses the first batch twice."""

    def __init__(self) -> None:
        self.found = []

    def first_batch(self, batch, rehearse) -> None:
        for _ in range(2):
            self.found.append(rehearse(lambda: [x.clone() for x in batch]))


@pytest.fixture
def probe(monkeypatch):
    made = Probe()
    monkeypatch.setitem(TECHNIQUES, "probe", lambda facts: made)
    return made


class Traced(Regressor):
    """Draws numbers of every generator, changes a buffer and replaces another, and writes to its batch."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.counted = factor, None
        self.register_buffer("num_steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.num_steps += 1
        self.last = self.num_steps + batch_idx
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        batch[0].mul_(1 + 0.1 * noise)
        dropped = [torch.nn.functional.dropout(batch[0], 0.2, self.training), batch[1]]
        loss = self.loss(dropped) * self.factor
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"noise": noise}, on_epoch=True)
        if not self.training:
            self.log("rehearsed", 1.0)
        elif batch_idx == 0:
            assembly, phases = self.trainer.strategy.assembly, self.trainer.strategy.phase_seconds
            self.counted = None if assembly.link is None else (assembly.link.bytes.d2h, assembly.link.bytes.h2d)
            assert phases.forward == phases.backward == phases.step == 0
        return {"loss": loss, "noise": noise}


def _seeded() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def _trained(options, **flags):
    _seeded()
    module = Traced()
    run = fit(module, lss.SuperScaleStrategy(**options), max_epochs=1, **flags)
    drawn = float(torch.rand(())), random.random(), np.random.rand()
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    return module, drawn, metrics, run.strategy.explain().split("\n\n")[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_training_is_bit_for_bit_what_it_is_without(name, precision, monkeypatch):
    plain = _trained(STRATEGIES[name], precision=precision)
    probe = Probe()
    monkeypatch.setitem(TECHNIQUES, "probe", lambda facts: probe)
    module, *rest = _trained(STRATEGIES[name], precision=precision)
    assert len(probe.found) == 2
    assert probe.found[0] == probe.found[1]  # with the same random numbers
    for (key, x), y in zip(module.state_dict().items(), plain[0].state_dict().values(), strict=True):
        assert torch.equal(x, y), key
    assert rest == list(plain[1:])
    assert module.training
    assert module.counted == plain[0].counted
    assert "rehearsed" not in rest[1]


def _by_torch(factor: float = 1.0) -> tuple[float, dict[str, float]]:
    module = Regressor().eval()
    loss = module.loss([x[:8] for x in dataset().tensors]) * factor
    loss.backward()
    return float(loss.detach()), {
        name: float(param.grad.double().norm()) for name, param in module.named_parameters() if param.grad is not None
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_loss_and_norms_are_torchs(name, probe):
    fit(Regressor(), lss.SuperScaleStrategy(**STRATEGIES[name]), max_steps=1)
    loss, norms = _by_torch()
    # Both run torch's own operations in one order; norms are sums of at most 561 squares, whose order differs.
    assert probe.found[0].loss == loss
    assert probe.found[0].norms == pytest.approx(norms, rel=1e-6)
    assert probe.found[0].eps == torch.finfo(torch.float32).eps


def test_gradients_that_overflow_are_measured_with_a_lower_loss_scale(probe):
    class Loud(Regressor):
        def loss(self, batch):
            return super().loss(batch) * 2.0**10

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())  # without a scheduler: the step itself overflows too

    fit(Loud(), lss.SuperScaleStrategy(), max_steps=1, precision="16-true")
    loss, norms = _by_torch(2.0**10)
    # eps of fp16 is 2^-10; errors of some roundings average out in a norm.
    assert probe.found[0].loss == pytest.approx(loss, rel=2.0**-8)
    assert probe.found[0].norms == pytest.approx(norms, rel=2.0**-5)
    assert probe.found[0].eps == torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("returned", "told"), [(None, "NoneType"), (torch.ones(2), r"a tensor \[2\]"), (torch.ones(()), r"a tensor \[\]")]
)
def test_a_step_without_a_loss_is_refused(probe, returned, told):
    class Lossless(Regressor):
        def training_step(self, batch, batch_idx):
            return returned

    with pytest.raises(lss.SuperScaleError, match=f"training_step returned {told}"):
        fit(Lossless(), lss.SuperScaleStrategy(), max_steps=1)


def test_a_batch_is_rehearsed_once(probe):
    fit(Regressor(), lss.SuperScaleStrategy(), max_epochs=2)
    assert len(probe.found) == 2


def test_factors_that_may_be_rounded_are_the_coarsest_numbers(probe, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    fit(Regressor(), lss.SuperScaleStrategy(), max_steps=1)
    assert probe.found[0].eps == 2.0**-10
