"""An estimate on the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import lightning_superscale as lss
from lightning_superscale.cli.estimate.table import show
from tests.estimation.models import Images


@pytest.fixture(scope="module")
def found():
    with torch.device("meta"):
        module = Images()
    return lss.estimate(module, batch=Images.batch(8), devices=2)


def lines_of(found, width):
    text = io.StringIO()
    show(found, Console(file=text, width=width))
    return text.getvalue().splitlines()


def test_every_strategy_has_a_row(found):
    lines = lines_of(found, 240)
    assert sum("not AdamW's result" in line for line in lines) == 2
    for one in found.strategies:
        row = next(line for line in lines if line.startswith(f"│ {one.line.removeprefix('strategy=')} "))
        assert f"{one.time.total:.3f}" in row
        assert f"{one.tokens_per_s:,.0f}" in row


def test_a_narrow_terminal_cuts_no_number_off(found):
    lines = lines_of(found, 80)
    tables = [line for line in lines if line[:1] in "┏┃┡│├└"]
    assert max(map(len, tables)) <= 80
    assert not any("…" in line for line in lines)
    for number, one in enumerate(found.strategies, 1):
        assert any(line.startswith(f"{number:2} {one.line}") for line in lines)
        rows = [line for line in tables if line.startswith(f"│ {number:2} ")]
        shown = {cell.strip() for row in rows for cell in row.split("│")}
        time = one.time
        for seconds in (time.total, time.forward, time.backward, time.optimizer, time.ranks):
            assert f"{seconds:.3f}" in shown
        assert {f"{one.host_bytes / 2**30:.1f}", f"{one.tokens_per_s:,.0f}", f"{one.mfu:.0%}"} <= shown


def test_copies_of_activations_have_a_column_where_there_are_any(found):
    assert not any("activations" in line for line in lines_of(found, 240))
    late = [replace(one, time=replace(one.time, activations=7.125)) for one in found.strategies]
    for width in (80, 240):
        lines = lines_of(replace(found, strategies=late), width)
        assert sum("activations" in line for line in lines) == 1
        rows = [[cell.strip() for cell in line.split("│")] for line in lines]
        assert sum("7.125" in row for row in rows) >= len(late)


def test_what_is_recommended_can_be_pasted_with_its_imports(found):
    found = replace(found, strategies=[one for one in found.strategies if "weights='flow'" in one.line])
    printed = lines_of(found, 200)
    imports = next(line for line in printed if line.startswith("from "))
    recommended = next(line for line in printed if line.startswith("Recommended: "))
    names = {"Trainer": lambda strategy: strategy}
    exec(imports, names)
    assert isinstance(eval(recommended.removeprefix("Recommended: "), names), lss.SuperScaleStrategy)
