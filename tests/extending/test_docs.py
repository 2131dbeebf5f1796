"""The recipes of docs/extending.md, executed as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from lightning_superscale.config.offload import ENGINES
from tests.helpers.trainers import Regressor, loader, trainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def test_the_offload_engine_of_the_page_trains(monkeypatch):
    before = dict(ENGINES)
    recipe = ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", recipe)
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), recipe.__dict__)
        told = []

        class Asks(Regressor):
            def on_train_end(self):
                told.append(self.trainer.strategy.explain())

        ours, other = Asks(), Regressor()
        trainer(recipe.strategy).fit(ours, loader())
        trainer("auto").fit(other, loader())
    finally:
        ENGINES.clear()
        ENGINES.update(before)
    assert "with gradients on a grid" in told[0]
    assert not torch.equal(ours.net[0].weight, other.net[0].weight)  # it stepped, and as the page says
