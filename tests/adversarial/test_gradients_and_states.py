"""What user code does to gradients and to the optimizer's own state counts, as it does under plain Lightning."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DDPStrategy

import lightning_superscale as lss
from tests.adversarial.reading_modules import (
    ClipsByHand,
    ClipsThenLooks,
    LoadsStates,
    StartsOver,
    differences,
    outcome,
)
from tests.helpers.ranks import run_ranks

STRATEGIES = {
    "superscale": lambda: "superscale",
    "cpu": lambda: lss.SuperScaleStrategy(offload="cpu"),
    "superoffload": lambda: "superoffload",
}
CLIPS = ({"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.002, "gradient_clip_algorithm": "value"}, {})


def found(cls, name, strategy, devices=1, oracle="auto", **flags):
    return differences(outcome(cls, oracle, devices, **flags), outcome(cls, strategy, devices, **flags))


@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_are_clipped_where_user_code_sees_them(name):
    for clip in CLIPS:
        assert found(ClipsThenLooks, name, STRATEGIES[name](), **clip) == [], clip
    assert found(ClipsByHand, name, STRATEGIES[name]()) == []


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("cls", [StartsOver, LoadsStates])
def test_states_that_user_code_empties_edits_or_loads_are_used(cls, name):
    assert found(cls, name, STRATEGIES[name]()) == []


def test_the_norm_before_clipping_is_told():
    from tests.helpers.trainers import loader, trainer

    class Tells(ClipsThenLooks):
        def on_train_batch_end(self, *_):
            self.norms = [*getattr(self, "norms", []), float(self.trainer.strategy.grad_norm())]

    module = Tells()
    trainer("superoffload", gradient_clip_val=0.05, max_steps=2).fit(module, loader())
    assert min(module.norms) > 0.06


def _over_ranks(rank: int, world_size: int):
    wrong = {}
    for name in ("zero1", "zero2", "superoffload"):
        for cls, flags in ((ClipsThenLooks, CLIPS[0]), (ClipsThenLooks, CLIPS[1]), (LoadsStates, {})):
            if diff := found(cls, name, name, world_size, DDPStrategy(), **flags):
                wrong[name, cls.__name__] = diff
    return wrong


def test_over_ranks():
    assert run_ranks(2, _over_ranks) == [{}, {}]
