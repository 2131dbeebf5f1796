"""Callbacks of Lightning that change weights from outside: the bits of plain Lightning, or refused at the start."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from lightning_superscale import OffloadConfig, SuperScaleStrategy
from lightning_superscale.errors import SuperScaleError
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, loader, trainer


def pruning(module, method="l1_unstructured", *, reset=False, **more):
    # Plain Lightning resets weights to memory that it goes on training, so that only its first reset is one.
    weights = [(module.net[0], "weight"), (module.net[3], "weight")]
    reset_once = (lambda epoch: epoch == 1) if reset else False
    return ModelPruning(method, weights, amount=0.3, use_lottery_ticket_hypothesis=reset_once, **more)


CALLBACKS = {
    "pruning": pruning,
    "pruning, not permanent": lambda module: pruning(module, make_pruning_permanent=False),
    "pruning with a reset": lambda module: pruning(module, reset=True),
    "pruning of rows": lambda module: pruning(
        module, "ln_structured", pruning_norm=2, pruning_dim=0, use_global_unstructured=False
    ),
    "averaging": lambda module: StochasticWeightAveraging(1e-2, swa_epoch_start=2),
}
ALONE = {
    "superscale": lambda: "superscale",
    "superoffload": lambda: "superoffload",
    "cpu": lambda: SuperScaleStrategy(offload="cpu"),
    "flow": lambda: SuperScaleStrategy(offload=OffloadConfig(weights="flow", wrap=["Linear"])),
}
OVER_RANKS = {
    "zero1": lambda: "zero1",
    "superoffload": lambda: "superoffload",
    "zero2": lambda: "zero2",
    "cpu": lambda: SuperScaleStrategy(zero=2, offload="cpu"),
}


def fit(callback, strategy, devices=1):
    module = Regressor()
    run = trainer(strategy, devices=devices, max_epochs=4, callbacks=[CALLBACKS[callback](module)])
    run.fit(module, loader(48), loader(16))
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def differing(expected, found, rank=0):
    """Names of weights and buffers that differ; statistics of batches are this rank's own on ranks but the first."""
    assert expected.keys() == found.keys()
    names = [key for key in expected if rank == 0 or "running" not in key]
    return [key for key in names if not torch.equal(expected[key], found[key])]


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize("callback", CALLBACKS if IS_ALL else ["pruning", "averaging"])
def test_one_device_gives_the_bits_of_plain_lightning(callback):
    expected = fit(callback, "auto")
    for name in ALONE if IS_ALL else ("superscale", "superoffload"):
        assert not differing(expected, fit(callback, ALONE[name]())), name


def on_ranks(rank, world_size, callbacks, strategies):
    for callback in callbacks:
        expected = fit(callback, DDPStrategy(find_unused_parameters=True), world_size)
        for name in strategies:
            assert not differing(expected, fit(callback, OVER_RANKS[name](), world_size), rank), f"{name}: {callback}"
    said = []
    for callback in ("pruning", "averaging"):
        with pytest.raises(SuperScaleError) as refusal:
            fit(callback, "zero3", world_size)
        said.append(str(refusal.value))
    return said


def test_ranks_give_the_bits_of_ddp_and_stage_3_refuses_by_name():
    short = (["pruning with a reset", "averaging"], ["superoffload"])
    for pruned, averaged in run_ranks(2, on_ranks, *((list(CALLBACKS), list(OVER_RANKS)) if IS_ALL else short)):
        assert "ModelPruning ranks the elements of whole weights" in pruned
        assert "zero=2" in pruned
        assert "StochasticWeightAveraging averages whole weights" in averaged
        assert "ShardedEMA" in averaged
