"""Checkpoints of Fabric: resumed bit for bit, under the Trainer and back, and refused before anything changes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale import CheckpointError
from tests.helpers.trainers import loader, trainer
from tests.plugins.fabric.loops import adamw, assert_equal, launched, loop, model


class Module(L.LightningModule):
    """The loop's model, whose names are those of the bare one."""

    def __init__(self) -> None:
        super().__init__()
        for name, part in model().named_children():
            self.add_module(name, part)

    def __getitem__(self, number: int) -> nn.Module:
        return self._modules[str(number)]

    def __iter__(self):
        return iter(self._modules.values())

    def forward(self, x):
        for part in self:
            x = part(x)
        return x

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return adamw(self)


def started(strategy, plain):
    fabric = launched(strategy)
    module, optimizer = fabric.setup(plain, adamw(plain))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return fabric, {"model": module, "optimizer": optimizer, "scheduler": scheduler, "step": 0}


@pytest.mark.parametrize("saved_by", ["superscale", "superoffload"])
def test_a_loop_goes_on_from_its_checkpoint_bit_for_bit_under_another_strategy(tmp_path, saved_by):
    fabric, state = started(saved_by, first := model())
    loop(fabric, state["model"], state["optimizer"])
    state["scheduler"].step()
    fabric.save(tmp_path / "saved", {**state, "step": 3})
    other, resumed = started("zero1", second := model())
    assert other.load(tmp_path / "saved", resumed) == {}
    assert resumed["step"] == 3
    assert resumed["scheduler"].state_dict() == state["scheduler"].state_dict()
    loop(fabric, state["model"], state["optimizer"])
    loop(other, resumed["model"], resumed["optimizer"])
    assert_equal(dict(first.state_dict()), dict(second.state_dict()))
    found = other.load(tmp_path / "saved")
    assert found["step"] == 3
    assert found.keys() == {"model", "optimizer", "scheduler", "step"}
    for one in (fabric, other):
        one.strategy.teardown()


def assert_both_go_on_alike(fabric, state, ours, saved, *, max_epochs):
    """A Trainer that goes on from a checkpoint ends its epoch with the weights of a loop that has the same state."""
    runner = trainer("superscale", max_epochs=max_epochs, plugins=[lss.UniversalCheckpointIO()])
    runner.fit(again := Module(), loader(), ckpt_path=str(saved), weights_only=False)
    for x, y in loader():
        fabric.backward(nn.functional.mse_loss(state["model"](x), y))
        state["optimizer"].step()
        state["optimizer"].zero_grad()
    assert_equal(dict(ours.state_dict()), dict(again.state_dict()))
    fabric.strategy.teardown()


def test_a_trainers_checkpoint_goes_on_under_fabric(tmp_path):
    module = Module()
    runner = trainer("superoffload", plugins=[lss.UniversalCheckpointIO()], max_epochs=1)
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "saved")
    fabric, state = started("superscale", ours := Module())
    rest = fabric.load(tmp_path / "saved", {"model": state["model"], "optimizer": state["optimizer"]})
    assert rest["global_step"] == 6
    assert_equal(dict(ours.state_dict()), dict(module.state_dict()))
    assert_both_go_on_alike(fabric, state, ours, tmp_path / "saved", max_epochs=2)


def test_fabrics_checkpoint_goes_on_under_the_trainer(tmp_path):
    fabric, state = started("superoffload", ours := Module())
    loop(fabric, state["model"], state["optimizer"])
    fabric.save(tmp_path / "saved", {"model": state["model"], "optimizer": state["optimizer"], "step": 3})
    assert_both_go_on_alike(fabric, state, ours, tmp_path / "saved", max_epochs=1)


def test_what_cannot_be_saved_or_loaded_is_refused_and_nothing_changed(tmp_path):
    fabric, state = started("superscale", plain := model())
    with pytest.raises(CheckpointError, match=r"filter=.*'model'"):
        fabric.save(tmp_path / "no", state, filter={"model": lambda name, value: True})
    with pytest.raises(CheckpointError, match="'teacher' is a Linear that fabric.setup"):
        fabric.save(tmp_path / "no", {**state, "teacher": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match="'step', and none of it is the module"):
        fabric.save(tmp_path / "no", {"step": 3})
    assert not (tmp_path / "no").exists()
    fabric.save(tmp_path / "saved", {"model": state["model"]})
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with torch.no_grad():
        plain[0].weight.add_(1.0)
    with pytest.raises(CheckpointError, match=r"has no 'optimizer', 'scheduler', 'step', and nothing was changed"):
        fabric.load(tmp_path / "saved", state)
    assert torch.equal(plain[0].weight, before["0.weight"] + 1.0)
    fabric.load(tmp_path / "saved", {"model": state["model"], "step": 5}, strict=False)
    assert_equal(dict(plain.state_dict()), before)
    fabric.strategy.teardown()


def test_what_plain_fabric_saved_goes_on_by_the_users_names(tmp_path):
    plain_fabric, state = started("auto", first := model())
    loop(plain_fabric, state["model"], state["optimizer"])
    plain_fabric.save(tmp_path / "plain.ckpt", {**state, "step": 3})
    fabric, resumed = started("superoffload", second := model())
    assert fabric.load(tmp_path / "plain.ckpt", resumed) == {}
    assert resumed["step"] == 3
    loop(plain_fabric, state["model"], state["optimizer"])
    loop(fabric, resumed["model"], resumed["optimizer"])
    assert_equal(dict(first.state_dict()), dict(second.state_dict()))
    renamed = {"net": resumed["model"]}
    with pytest.raises(CheckpointError, match=r"no weights under 'net'.*it has 'model', 'optimizer'"):
        fabric.load(tmp_path / "plain.ckpt", renamed)
    fabric.strategy.teardown()


@pytest.mark.parametrize("strategy", ["superscale", "zero3", "superoffload"])
def test_raw_state_dicts_load_into_module_and_optimizer(tmp_path, strategy):
    plain_fabric, state = started("auto", first := model())
    loop(plain_fabric, state["model"], state["optimizer"])
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    torch.save(state["optimizer"].state_dict(), tmp_path / "optimizer.pt")
    fabric, own = started(strategy, second := model())
    fabric.load_raw(tmp_path / "weights.pt", own["model"])
    fabric.load_raw(tmp_path / "optimizer.pt", own["optimizer"])
    loop(plain_fabric, state["model"], state["optimizer"])
    loop(fabric, own["model"], own["optimizer"])
    with pytest.raises(CheckpointError, match=r"weights.pt is no state dict of an optimizer.*'0.weight'"):
        fabric.load_raw(tmp_path / "weights.pt", own["optimizer"])
    fabric.strategy.teardown()
    assert_equal(dict(first.state_dict()), dict(second.state_dict()))


def test_states_of_other_parameter_groups_are_refused_and_weights_stay(tmp_path):
    fabric, state = started("superoffload", model())
    loop(fabric, state["model"], state["optimizer"])
    fabric.save(tmp_path / "ours", {"model": state["model"], "optimizer": state["optimizer"]})
    fabric.strategy.teardown()
    plain_fabric, other = started("auto", model())
    plain_fabric.save(tmp_path / "plain.ckpt", {"model": other["model"], "optimizer": other["optimizer"]})
    fabric, plain = launched("superscale"), model()
    module, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters()))
    with torch.no_grad():
        plain[0].weight.add_(1.0)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    for path in ("ours", "plain.ckpt"):
        with pytest.raises(CheckpointError, match=r"parameter groups of AdamW differ: \[2, 4\] parameters in the"):
            fabric.load(tmp_path / path, {"model": module, "optimizer": optimizer})
        assert_equal(dict(plain.state_dict()), before)
    fabric.strategy.teardown()


def test_the_loss_scale_goes_on_from_a_checkpoint(tmp_path):
    fabric, plain = launched("superoffload", precision="16-true"), model()
    module, optimizer = fabric.setup(plain, adamw(plain))
    weights = {name: value.clone() for name, value in plain.named_parameters()}
    fabric.backward(module(torch.ones(4, 17)).sum() * float("inf"))
    norm = fabric.clip_gradients(module, optimizer, max_norm=1.0)  # no error: the step is dropped
    assert not norm.isfinite()
    optimizer.step()
    optimizer.zero_grad()
    assert fabric.strategy.precision.scaler.scale == 2.0**15
    assert_equal({name: value.detach() for name, value in plain.named_parameters()}, weights)
    fabric.save(tmp_path / "saved", {"model": module, "optimizer": optimizer})
    fabric.strategy.teardown()
    other, again = launched("superscale", precision="16-true"), model()
    module, optimizer = other.setup(again, adamw(again))
    assert other.strategy.precision.scaler.scale == 2.0**16
    other.load(tmp_path / "saved", {"model": module, "optimizer": optimizer})
    assert other.strategy.precision.scaler.scale == 2.0**15
    other.strategy.teardown()
