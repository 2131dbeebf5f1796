"""Dtypes that a model under Fabric takes and gives are those of Fabric's own plugins."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.plugins import precision as fabrics

from lightning_superscale.plugins.fabric.lightning import SuperScalePrecision

STOCK = {
    "32-true": fabrics.Precision(),
    "bf16-mixed": fabrics.MixedPrecision("bf16-mixed", "cpu"),
    "bf16-true": fabrics.HalfPrecision("bf16-true"),
    "64-true": fabrics.DoublePrecision(),
}


@pytest.mark.parametrize(("name", "stock"), STOCK.items())
def test_inputs_and_outputs_are_converted_as_fabrics_own_plugins_do(name, stock):
    ours = SuperScalePrecision(name)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        x = {"x": torch.ones(2, dtype=dtype)}
        assert ours.convert_input(x)["x"].dtype == stock.convert_input(x)["x"].dtype
        assert ours.convert_output(x)["x"].dtype == stock.convert_output(x)["x"].dtype
