"""The strategy through the Trainer: exactness, resume, what it prints, and how it refuses."""

from __future__ import annotations

import sys

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.trainers import Regressor, assert_same_weights, fit, loader, trainer

NAMES = ("superscale", "superoffload")


@pytest.fixture(params=[*NAMES, "cpu"])
def name(request, monkeypatch):
    if request.param != "cpu":
        return request.param
    registry = sys.modules["lightning.pytorch.strategies"].StrategyRegistry
    entry = {**registry["superscale"], "init_params": {"offload": "cpu"}}
    monkeypatch.setitem(registry, "superscale_on_the_host", entry)
    return "superscale_on_the_host"


FLAGS = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 4},
    "accumulate and clip": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_equals_plain_lightning_bit_for_bit(name, precision, flags):
    plain, ours = Regressor(), Regressor()
    fit(plain, "auto", precision=precision, **flags)
    fit(ours, name, precision=precision, **flags)
    assert_same_weights(ours, plain)


class Linear(L.LightningModule):
    """No batch norm, so that a hand-written loop has nothing else to keep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(17, 33), nn.GELU(), nn.Linear(33, 5))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x) - y).float().pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_bf16_true_equals_a_hand_written_master_loop(name, max_norm):
    ours = Linear()
    run = trainer(name, precision="bf16-true", gradient_clip_val=max_norm)
    run.fit(ours, loader())
    plain = Linear().to(torch.bfloat16)
    oracle = PlainMasterAdamW(plain.parameters(), max_norm=max_norm, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        for x, y in loader():
            oracle.zero_grad()
            plain.training_step((x.bfloat16(), y.bfloat16()), 0).backward()
            oracle.step()
    assert_same_weights(ours, plain)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_resumed_run_equals_the_uninterrupted_one(name, precision, tmp_path):
    straight = Regressor()
    fit(straight, name, precision=precision, max_epochs=4)
    first = Regressor()
    fit(first, name, precision=precision, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Regressor()
    trainer(name, precision=precision, max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(resumed, straight)


@pytest.mark.parametrize("direction", ["ours to plain", "plain to ours"])
def test_checkpoints_pass_between_ours_and_plain_lightning(direction, tmp_path):
    before, after = ("superoffload", "auto") if direction == "ours to plain" else ("auto", "superoffload")
    straight = Regressor()
    fit(straight, "auto", max_epochs=4)
    first = Regressor()
    fit(first, before, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Regressor()
    trainer(after, max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(resumed, straight)


def test_validate_test_predict_and_a_second_fit(name):
    module = Regressor()
    run = trainer(name, max_epochs=1)
    run.fit(module, loader(), loader())
    assert "val_loss" in run.validate(module, loader(), verbose=False)[0]
    assert "val_loss" in run.test(module, loader(), verbose=False)[0]
    assert len(run.predict(module, loader())) == 6
    again = trainer(name, max_epochs=1)
    again.fit(module, loader())
    assert again.global_step == 6


def test_weights_edited_in_place_between_steps_are_kept(name):
    class Clamped(Regressor):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                for param in self.net[0].parameters():
                    param.clamp_(-0.05, 0.05)

    plain, ours = Clamped(), Clamped()
    fit(plain)
    fit(ours, name)
    assert_same_weights(ours, plain)


def test_gradients_changed_in_the_users_hooks_are_what_steps(name):
    class Halved(Regressor):
        def on_after_backward(self):
            for param in self.net.parameters():
                param.grad.mul_(0.5)

    plain, ours = Halved(), Halved()
    fit(plain)
    fit(ours, name)
    assert_same_weights(ours, plain)


def test_users_own_clipping_hook_is_obeyed(name):
    class Own(Regressor):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            nn.utils.clip_grad_value_(self.net.parameters(), 0.002)
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")

    plain, ours = Own(), Own()
    fit(plain)
    fit(ours, name)
    assert_same_weights(ours, plain)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_training_step_that_returns_none_is_skipped(name):
    class Skips(Regressor):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    plain, ours = Skips(), Skips()
    fit(plain)
    fit(ours, name)
    assert_same_weights(ours, plain)


def test_exception_in_backward_leaves_the_state_of_the_step_before(name):
    class Breaks(Linear):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 4:
                loss.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("broken on purpose")))
            return loss

    module, twin = Breaks(), Linear()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(module, name)
    fit(twin, "auto", max_steps=4, max_epochs=-1)
    assert_same_weights(module, twin)


def test_explain_counts_the_bytes_of_every_class(name):
    texts = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            texts.append(trainer.strategy.explain())
            plan = trainer.strategy.plan
            rows = {row.name: row for row in plan.bytes}
            numel = sum(
                u.shard.shard_numel for e in trainer.strategy.assembly.engines.values() for u in e.transport.units
            )
            is_offloaded = plan.engine != "resident"
            states = rows["optimizer states"]
            assert (states.host_bytes, states.device_bytes) == ((8 * numel, 0) if is_offloaded else (0, 8 * numel))
            assert rows["weights"].device_bytes == 2 * numel
            masters = rows["master weights"]
            assert masters.host_bytes + masters.device_bytes == 4 * numel
            assert rows["frozen weights"].device_bytes == 2 * 30

    fit(Regressor(), name, precision="bf16-true", callbacks=[Look()])
    for word in ("optimizer engine", "optimizer kernel", "master weights", "bfloat16", "trainable"):
        assert word in texts[0]


def test_gradients_leave_during_backward_only_where_nobody_looks():
    reasons = {}

    def why(module, **flags):
        class Look(L.pytorch.callbacks.ModelSummary):
            pass

        run = trainer("superoffload", max_steps=1, **flags)
        strategy = run.strategy
        original = strategy._start_training

        def assemble(t):
            original(t)
            reasons["text"] = strategy.explain()

        strategy._start_training = assemble
        run.fit(module, loader())
        return reasons["text"]

    class Reads(Regressor):
        def on_before_optimizer_step(self, optimizer):
            assert self.net[0].weight.grad is not None

    assert "gradients leave for the host during backward" in why(Regressor())
    assert "gradients stay in param.grad until the step: Reads.on_before_optimizer_step" in why(Reads())


def test_grad_norm_after_fit_steps(name):
    norms = []

    class Norms(Linear):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            norms.append(self.trainer.strategy.grad_norm().item())

    fit(Norms(), name)
    expected = []

    class Plain(Linear):
        def on_before_optimizer_step(self, optimizer):
            expected.append(nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    fit(Plain())
    assert norms == pytest.approx(expected, rel=1e-5)


# Bad input: one clear error before work is lost.


def test_model_without_trainable_parameters_is_refused(name):
    module = Regressor().requires_grad_(False)
    with pytest.raises(
        lss.SuperScaleError, match="Regressor has no trainable parameters.*found 10 parameters, all frozen"
    ):
        fit(module, name)


def test_optimizer_on_another_modules_parameters_is_refused(name):
    class Foreign(Regressor):
        def configure_optimizers(self):
            return torch.optim.AdamW([*self.parameters(), *nn.Linear(2, 3).parameters()])

    message = r"optimizer 0 \(AdamW\), parameter group 0 holds a parameter of shape \(3, 2\) that Foreign does not own"
    with pytest.raises(lss.SuperScaleError, match=message):
        fit(Foreign(), name)


def test_optimizer_of_frozen_parameters_only_is_refused(name):
    class Frozen(Regressor):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.frozen.parameters())

    with pytest.raises(
        lss.SuperScaleError, match="none of the 2 parameters that the optimizers of Frozen hold is trainable"
    ):
        fit(Frozen(), name)


@pytest.mark.parametrize("name", ["cpu", "superoffload"], indirect=True)
def test_one_parameter_in_two_optimizers_is_refused_where_states_are_on_the_host(name):
    class Twice(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.AdamW(self.parameters()), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]

    with pytest.raises(
        lss.SuperScaleError, match=r"parameter 'net.2.weight' is in optimizer 0 and in optimizer 1 \(SGD\)"
    ):
        fit(Twice(), name)


def test_nan_loss_with_error_if_nonfinite_names_the_parameters():
    class Nan(Linear):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 3 else loss

    module, twin = Nan(), Linear()
    with pytest.raises(
        lss.SuperScaleError, match=r"gradients of 4 of 4 parameters are NaN or infinite \(net.0.weight, "
    ):
        fit(module, lss.SuperOffloadStrategy(error_if_nonfinite=True))
    fit(twin, "auto", max_steps=3, max_epochs=-1)
    assert_same_weights(module, twin)


def test_unknown_engine_is_refused_where_it_is_written():
    with pytest.raises(lss.SuperScaleError, match="unknown offload engine 'superofload'.*did you mean 'superoffload'"):
        lss.SuperScaleStrategy(offload="superofload")


def test_misspelt_strategy_name_gets_lightnings_error():
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='superofload'`"):
        trainer("superofload")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_parameters_that_torch_can_not_step_are_refused_by_name(name):
    class Half(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex32))

    with pytest.raises(lss.SuperScaleError, match=r"trainable parameter 'phase' is torch.complex32"):
        fit(Half(), name)


def test_checkpoint_of_other_parameter_groups_is_refused(tmp_path):
    run = fit(Linear(), "superoffload", max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")

    class Grouped(Linear):
        def configure_optimizers(self):
            return torch.optim.AdamW([{"params": m.parameters()} for m in (self.net[0], self.net[2])])

    with pytest.raises(lss.SuperScaleError, match=r"parameter groups of \[4\] parameters, this run's has \[2, 2\]"):
        trainer("superoffload").fit(Grouped(), loader(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.filterwarnings("ignore:.*Lazy modules are a new feature.*", "ignore:.*contains uninitialized parameters.*")
def test_lazy_parameters_are_refused_by_name(name):
    class Lazy(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(3)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters())

    with pytest.raises((lss.SuperScaleError, RuntimeError), match="'head.weight' has no shape yet"):
        fit(Lazy(), name)
