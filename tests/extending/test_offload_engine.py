"""An offload engine is a class and a line in ENGINES: trained, explained, counted, refused, saved and resumed."""

from __future__ import annotations

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.checkpoint.foreign.lightning_export import export_lightning
from lightning_superscale.checkpoint.foreign.registry import open_foreign
from lightning_superscale.checkpoint.load.reader import open_checkpoint
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
        self.num_steps, self.bound = 0, torch.tensor(0.0)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        params = [param for param in self.parameters() if param.grad is not None]
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        self.num_steps += 1
        if self.num_steps <= late_engine.NUM_ON_TIME:
            largest = torch.stack([param.grad.abs().amax() for param in params]).amax()
            self.bound = torch.maximum(self.bound, late_engine.BOUND_SHARE * largest)
        else:
            new = {param: param.grad.clamp(-self.bound, self.bound) for param in params}
            for param in params:
                param.grad = self.kept.get(param)
            self.kept = new
        optimizer.step()
        self.lr_schedulers().step()

    def catch_up(self):
        """Apply what is kept, with the learning rate of now."""
        for param in self.parameters():
            param.grad = self.kept.get(param)
        self.kept = {}
        self.optimizers().optimizer.step()


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
    assert late.arithmetic == masters.arithmetic


def test_what_it_refuses_is_refused_before_training():
    precision = lss.SuperScalePrecision("bf16-true", master_weights="bf16", optimizer_states="bf16")
    run = trainer(lss.SuperScaleStrategy(offload="late"), plugins=[precision])
    with pytest.raises(ValueError, match="the late engine keeps fp32 states"):
        run.fit(Regressor(), loader())


class CaughtUpByHand(LateByHand):
    """Applies what it kept before it validates."""

    def on_validation_start(self):
        self.catch_up()


class Judged:
    """Keeps the losses that validation saw."""

    def on_train_start(self):
        self.losses = []

    def on_validation_epoch_end(self):
        self.losses.append(self.trainer.callback_metrics["val_loss"].clone())


@pytest.mark.parametrize("is_caught_up", [True, False])
def test_evaluation_begins_with_what_was_kept_back_where_a_rule_says_so(is_caught_up, monkeypatch):
    name = "CaughtUpEngine" if is_caught_up else "LateEngine"
    monkeypatch.setitem(ENGINES, "late", f"{late_engine.__name__}:{name}")
    ours = type("Ours", (Judged, Regressor), {})()
    plain = type("Plain", (Judged, CaughtUpByHand if is_caught_up else LateByHand), {})(None)
    trainer(lss.SuperScaleStrategy(offload="late")).fit(ours, loader(), loader())
    trainer("auto").fit(plain, loader(), loader())
    assert_same_weights(ours, plain)
    assert torch.equal(torch.stack(ours.losses), torch.stack(plain.losses))


def test_a_checkpoint_of_another_engine_begins_the_rules_own_state_anew(tmp_path):
    """Moments come from it; the rule, of which it has nothing, is as new."""
    run = trainer(lss.SuperScaleStrategy(offload="cpu"), max_epochs=1)
    run.fit(Regressor(), loader())
    run.save_checkpoint(tmp_path / "cpu.ckpt")
    saved = torch.load(tmp_path / "cpu.ckpt", weights_only=True)
    assert set(saved["optimizer_states"][0]) == {"state", "param_groups"}
    resumed = trainer(lss.SuperScaleStrategy(offload="late"), max_epochs=2)
    resumed.fit(Regressor(), loader(), ckpt_path=tmp_path / "cpu.ckpt")
    resumed.save_checkpoint(tmp_path / "late.ckpt")
    rule = torch.load(tmp_path / "late.ckpt", weights_only=True)["optimizer_states"][0]["rule_state"]
    assert rule["num_steps"] == NUM_STEPS
    trainer(lss.SuperScaleStrategy(offload="cpu"), max_epochs=3).fit(
        Regressor(), loader(), ckpt_path=tmp_path / "late.ckpt"
    )


class SavesOnItsWay(Regressor):
    """Saves after its first epoch, while training goes on, and is killed there where that is asked."""

    def __init__(self, path, *, is_killed: bool) -> None:
        super().__init__()
        self.path, self.is_killed = path, is_killed

    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            self.trainer.save_checkpoint(self.path)
            if self.is_killed:
                raise KeyboardInterrupt


@pytest.mark.parametrize("is_universal", [False, True])
def test_a_killed_run_goes_on_as_the_uninterrupted_one(is_universal, tmp_path):
    def strategy():
        return lss.SuperScaleStrategy(offload="late", checkpoint={} if is_universal else None)

    straight = SavesOnItsWay(tmp_path / "straight", is_killed=False)
    killed = SavesOnItsWay(tmp_path / "late.ckpt", is_killed=True)
    trainer(strategy()).fit(straight, loader())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(strategy()).fit(killed, loader())
    resumed = Regressor()
    trainer(strategy()).fit(resumed, loader(), ckpt_path=tmp_path / "late.ckpt")
    assert_same_weights(resumed, straight)


def test_a_rules_own_state_goes_through_conversions(tmp_path):
    run = trainer(lss.SuperScaleStrategy(offload="late", checkpoint={}), max_epochs=1)
    run.fit(Regressor(), loader())
    run.save_checkpoint(tmp_path / "universal")
    export_lightning(open_checkpoint(str(tmp_path / "universal")), tmp_path / "lightning.ckpt")
    rule = torch.load(tmp_path / "lightning.ckpt", weights_only=True)["optimizer_states"][0]["rule_state"]
    assert rule["num_steps"] == NUM_STEPS
    assert rule["bound"] > 0
    one = open_foreign(tmp_path / "lightning.ckpt").optimizers[0]
    two = open_checkpoint(str(tmp_path / "universal")).optimizers[0]
    assert one.rule.keys() == two.rule.keys() == rule.keys()
    assert torch.equal(one.rule["bound"], two.rule["bound"])


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
