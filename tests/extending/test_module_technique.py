"""A module technique is a class and a line in TECHNIQUES: trained, explained, counted, refused, saved and resumed."""

from __future__ import annotations

import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.run.techniques.registry import TECHNIQUES
from tests.extending import fading_technique
from tests.helpers.trainers import Regressor, assert_same_weights, loader, trainer

STRATEGIES = ["superscale", "superoffload", "zero3"]


@pytest.fixture(autouse=True)
def _one_registry_line(monkeypatch):
    monkeypatch.setitem(TECHNIQUES, "fading noise", fading_technique.fading_noise)


class FadingByHand(Regressor):
    """The same training by plain Lightning."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return super().training_step((inputs + fading_technique.noise() * 0.5**self.global_step, targets), batch_idx)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_trains_as_a_hand_written_module(strategy):
    ours, plain, without = Regressor(), FadingByHand(), Regressor()
    trainer(strategy).fit(ours, loader(), loader(16))
    trainer("auto").fit(plain, loader(), loader(16))
    trainer("auto").fit(without, loader(), loader(16))
    assert_same_weights(ours, plain)
    assert not torch.equal(ours.net[0].weight, without.net[0].weight)


def test_evaluation_is_without_it():
    module = Regressor()
    found = trainer("superscale").validate(module, loader(16), verbose=False)
    expected = trainer("auto").validate(module, loader(16), verbose=False)
    assert found == expected


def test_it_is_explained_and_counted():
    seen = []

    class Asks(Regressor):
        def on_train_end(self):
            seen.append((self.trainer.strategy.explain(), self.trainer.strategy.plan))

    run = trainer("superoffload")
    run.fit(Asks(), loader())
    text, plan = seen[0]
    assert "noise on inputs was halved 12 times" in text
    row = next(row for row in plan.bytes if row.name == "noise")
    assert (row.device_bytes, row.host_bytes) == (4 * 17, 0)
    assert run.strategy.explain() == text


def test_what_it_refuses_is_refused_before_training():
    class Other(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.other = self.net
            del self.net

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(lss.SuperScaleError, match="Other has no 'net'"):
        trainer("superscale").fit(Other(), loader())


@pytest.mark.parametrize("is_universal", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(is_universal, tmp_path):
    def strategy():
        return lss.SuperScaleStrategy(offload="superoffload", checkpoint={} if is_universal else None)

    straight, first, second = Regressor(), Regressor(), Regressor()
    trainer(strategy(), max_epochs=2).fit(straight, loader())
    run = trainer(strategy(), max_epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "fading.ckpt")
    trainer(strategy(), max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "fading.ckpt")
    assert_same_weights(second, straight)


@pytest.mark.parametrize("is_universal", [False, True])
def test_a_checkpoint_of_a_technique_that_is_off_is_refused_for_training_and_loads_for_evaluation(
    is_universal, tmp_path, monkeypatch
):
    def strategy():
        return lss.SuperScaleStrategy(checkpoint={} if is_universal else None)

    run = trainer(strategy(), max_epochs=1)
    run.fit(Regressor(), loader())
    path = tmp_path / "fading.ckpt"
    run.save_checkpoint(path)
    monkeypatch.delitem(TECHNIQUES, "fading noise")
    with pytest.raises(lss.SuperScaleError, match="a state of the technique 'fading noise', which this run does with"):
        trainer(strategy(), max_epochs=2).fit(Regressor(), loader(), ckpt_path=path)
    trainer(strategy()).validate(Regressor(), loader(16), ckpt_path=path, verbose=False)


def test_a_checkpoint_without_techniques_says_nothing_of_them(tmp_path, monkeypatch):
    monkeypatch.delitem(TECHNIQUES, "fading noise")
    run = trainer("superoffload", max_epochs=1)
    run.fit(Regressor(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert not [key for key in saved if "technique" in key]
