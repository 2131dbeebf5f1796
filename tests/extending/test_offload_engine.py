"""An offload engine is a class and a line in ENGINES: trained, explained, counted, refused, saved and resumed."""

from __future__ import annotations

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.config.offload import ENGINES
from tests.extending import late_engine
from tests.helpers.trainers import Regressor, assert_same_weights, loader, trainer

NUM_STEPS = 6  # of one epoch


@pytest.fixture(autouse=True)
def _one_registry_line(monkeypatch):
    monkeypatch.setitem(ENGINES, "late", f"{late_engine.__name__}:LateEngine")


class LateByHand(Regressor):
    """The same training by plain PyTorch: a step is taken with the gradients that the last step clipped."""

    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.max_norm = max_norm
        self.kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        params = [param for param in self.parameters() if param.grad is not None]
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        new = {param: param.grad.clone() for param in params}
        for param in params:
            param.grad = self.kept.get(param)
        optimizer.step()
        self.kept = new
        self.lr_schedulers().step()


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_it_trains_as_a_hand_written_loop(max_norm):
    ours, plain = Regressor(), LateByHand(max_norm)
    trainer(lss.SuperScaleStrategy(offload="late"), gradient_clip_val=max_norm).fit(ours, loader())
    trainer("auto").fit(plain, loader())
    assert_same_weights(ours, plain)


def test_it_is_explained_and_counted():
    seen = []

    class Asks(Regressor):
        def on_train_end(self):
            plan = self.trainer.strategy.plan
            seen.append((self.trainer.strategy.explain(), {row.name: row for row in plan.bytes}))

    trainer(lss.SuperScaleStrategy(offload="late")).fit(Asks(), loader())
    text, rows = seen[0]
    assert "late" in text
    assert "the 'late' engine steps on the host, one step late" in text
    masters, late = rows["master weights"], rows["late gradients"]
    assert late.host_bytes == masters.host_bytes > 0
    assert late.device_bytes == 0


def test_what_it_refuses_is_refused_before_training():
    precision = lss.SuperScalePrecision("bf16-true", master_weights="bf16", optimizer_states="bf16")
    run = trainer(lss.SuperScaleStrategy(offload="late"), plugins=[precision])
    with pytest.raises(ValueError, match="the late engine keeps fp32 states"):
        run.fit(Regressor(), loader())


@pytest.mark.parametrize("is_universal", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(is_universal, tmp_path):
    def strategy():
        return lss.SuperScaleStrategy(offload="late", checkpoint={} if is_universal else None)

    straight, first, second = Regressor(), Regressor(), Regressor()
    trainer(strategy(), max_epochs=2).fit(straight, loader())
    run = trainer(strategy(), max_epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "late.ckpt")
    trainer(strategy(), max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "late.ckpt")
    assert_same_weights(second, straight)


def test_a_misspelt_engine_is_refused_with_the_new_name():
    with pytest.raises(lss.SuperScaleError, match="unknown offload engine 'lat': .*'late'.*did you mean 'late'"):
        lss.OffloadConfig(engine="lat")
