"""An estimate on the terminal."""

from __future__ import annotations

import io

import torch
from rich.console import Console

import lightning_superscale as lss
from lightning_superscale.cli.estimate.table import show
from tests.estimation.models import Images


def test_every_strategy_has_a_row():
    with torch.device("meta"):
        module = Images()
    found = lss.estimate(module, batch=Images.batch(8), devices=2)
    text = io.StringIO()
    show(found, Console(file=text, width=240))
    lines = text.getvalue().splitlines()
    assert sum("not AdamW's result" in line for line in lines) == 2
    for one in found.strategies:
        row = next(line for line in lines if line.startswith(f"│ {one.line.removeprefix('strategy=')} "))
        assert f"{one.time.total:.3f}" in row
        assert f"{one.tokens_per_s:,.0f}" in row
