"""The recipes of docs/extending.md, executed as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.checkpoint.foreign.registry import FORMATS, detect
from lightning_superscale.cli.command import main
from lightning_superscale.config.offload import ENGINES
from lightning_superscale.run.techniques.registry import TECHNIQUES
from tests.helpers.trainers import Regressor, loader, trainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture
def recipe(request, monkeypatch):
    """The module that the code of one section of the page makes; the registries are as before afterwards."""
    engines, techniques, formats = dict(ENGINES), dict(TECHNIQUES), list(FORMATS)
    _, _, section = PAGE.read_text().partition(f"\n## {request.param}\n")
    section, _, _ = section.partition("\n## ")
    made = ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", made)
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), made.__dict__)
    yield made
    for registry, before in ((ENGINES, engines), (TECHNIQUES, techniques)):
        registry.clear()
        registry.update(before)
    FORMATS[:] = formats


def trained(strategy, **flags) -> Regressor:
    module = Regressor()
    module.told = []
    module.on_train_end = lambda: module.told.append(getattr(module.trainer.strategy, "explain", str)())
    trainer(strategy, **flags).fit(module, loader())
    return module


def differ(one: Regressor, other: Regressor) -> bool:
    return not torch.equal(one.net[0].weight, other.net[0].weight)


@pytest.mark.parametrize("recipe", ["An offload engine"], indirect=True)
def test_the_offload_engine_of_the_page_trains(recipe):
    ours = trained(recipe.strategy)
    assert "with gradients on a grid" in ours.told[0]
    assert differ(ours, trained("auto"))  # it stepped, and as the page says


@pytest.mark.parametrize("recipe", ["A module technique"], indirect=True)
def test_the_module_technique_of_the_page_trains_and_resumes(recipe, tmp_path):
    run = trainer("superoffload", max_epochs=1)
    run.fit(Regressor(), loader())
    run.save_checkpoint(tmp_path / "first.ckpt")
    resumed, told = Regressor(), []
    resumed.on_train_end = lambda: told.append(resumed.trainer.strategy.explain())
    trainer("superoffload").fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt")
    straight = trained("superoffload")
    for explained in (told[0], straight.told[0]):
        assert "inputs of 12 training batches were limited to 0.5" in explained
    assert not differ(resumed, straight)
    del TECHNIQUES["limited inputs"]
    assert differ(straight, trained("superoffload"))


@pytest.mark.parametrize("recipe", ["A foreign checkpoint format"], indirect=True)
def test_the_format_of_the_page_is_read(recipe, tmp_path, capsys):
    module, other = trained("auto", max_epochs=1), Regressor()
    path = tmp_path / "weights.npz"
    np.savez(path, **{name: value.numpy() for name, value in module.state_dict().items()})
    assert detect(path) == "numpy"
    run = trainer("superscale", plugins=[lss.UniversalCheckpointIO()])
    run.validate(other, loader(16), ckpt_path=str(path), verbose=False)
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert main(["checkpoint", "inspect", str(path)]) == 0
    assert "numpy" in capsys.readouterr().out
