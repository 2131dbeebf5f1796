"""The precision plugin: translation of stock plugins, dtypes, and refusals."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision

import lightning_superscale as lss
from tests.helpers.trainers import Regressor, fit, loader, trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_stock_precision_is_translated(precision):
    run = trainer("superoffload", precision=precision)
    assert type(run.precision_plugin) is lss.SuperScalePrecision
    assert run.precision_plugin.precision == precision


@pytest.mark.parametrize(
    "plugin", [HalfPrecision("bf16-true"), MixedPrecision("bf16-mixed", "cpu")], ids=["half", "mixed"]
)
def test_stock_plugin_object_is_translated(plugin):
    run = trainer(lss.SuperScaleStrategy(precision_plugin=plugin))
    assert run.precision_plugin.precision == plugin.precision


def test_the_plugin_says_its_device_as_lightnings_own_does():
    assert trainer("superscale", precision="bf16-mixed").precision_plugin.device == "cpu"


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_autocast_has_the_device_where_nothing_is_trained(verb):
    run = trainer("superscale", precision="bf16-mixed")
    run.precision_plugin.run_on("of an earlier run")
    getattr(run, verb)(Regressor(), loader(), verbose=False)
    assert run.precision_plugin.device == "cpu"


def test_our_plugin_in_plugins_is_kept():
    plugin = lss.SuperScalePrecision("bf16-true")
    assert trainer("superoffload", plugins=[plugin]).precision_plugin is plugin


def test_unknown_precision_is_refused_with_the_closest():
    with pytest.raises(lss.SuperScaleError, match="precision='bf16-ture' is not one of.*did you mean 'bf16-true'"):
        lss.SuperScalePrecision("bf16-ture")


@pytest.mark.parametrize(
    ("precision", "weights", "activations"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_in_the_forward(precision, weights, activations):
    seen = {}

    class Look(Regressor):
        def training_step(self, batch, batch_idx):
            seen["weights"] = self.net[0].weight.dtype
            seen["activations"] = self.net(batch[0]).dtype
            seen["made"] = torch.zeros(1).dtype
            return super().training_step(batch, batch_idx)

    fit(Look(), "superoffload", precision=precision)
    assert seen["weights"] == weights
    assert seen["activations"] == activations
    assert seen["made"] == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_arguments_to_step_are_refused():
    class Arguments(Regressor):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer.step(closure=closure, surprise=1)

    with pytest.raises(lss.SuperScaleError, match="takes only a closure under this strategy, found 'surprise'"):
        fit(Arguments(), "superoffload")
