"""Checkpoints of tensor-parallel runs hold whole tensors: any number of ranks, and plain Lightning, go on from them."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch.distributed.tensor import DTensor

import lightning_superscale as lss
from tests.helpers.ranks import run_ranks
from tests.helpers.tensor_parallel import LanguageModel, Saves, dealt_loader, token_loader, whole
from tests.helpers.trainers import trainer

# Two fp32 evaluations of four steps in different orders; what roundoff does to exactly this training is measured in
# test_tensor_parallel.py (2e-7 of a weight). A moment or a step count that is lost changes weights by 1e-3 and more.
TOLERANCE = 2e-6


class Loaded(L.Callback):
    """The optimizer's whole state before the first step."""

    def on_train_start(self, trainer, module):
        self.state = copy.deepcopy(trainer.strategy.optimizer_state(trainer.optimizers[0])["state"])


def strategy(offload=None):
    return lss.SuperScaleStrategy(zero={"stage": 3, "tensor_parallel": 2}, offload=offload)


def fit(world_size, module, offload, *, max_epochs=2, callbacks=(), ckpt_path=None):
    runner = trainer(strategy(offload), devices=world_size, max_epochs=max_epochs, callbacks=list(callbacks))
    runner.fit(module, token_loader(16 // world_size), ckpt_path=ckpt_path)
    return runner


def _save(rank, world_size, folder):
    """Two epochs, saved between and after; two more runs that stop and go on; evaluation without a fit."""
    module = LanguageModel("sequence")
    runner = fit(world_size, module, "superoffload", callbacks=[Saves(f"{folder}/between.ckpt")])
    runner.save_checkpoint(f"{folder}/after.ckpt")
    resumed, other = LanguageModel("sequence"), LanguageModel("vocabulary")  # checkpoints know of no plan
    fit(world_size, resumed, None, ckpt_path=f"{folder}/between.ckpt")
    fit(world_size, other, "cpu", ckpt_path=f"{folder}/between.ckpt")
    evaluated = LanguageModel("rowwise")
    own = trainer(strategy(), devices=world_size)
    own.validate(evaluated, token_loader(4), ckpt_path=f"{folder}/after.ckpt", verbose=False)
    again = own.validate(module, token_loader(4), verbose=False)[0]["val_loss"]  # after a fit, on what it left
    averaged = LanguageModel("sequence")
    ema = lss.ShardedEMA(decay=0.5)
    fit(world_size, averaged, "cpu", callbacks=[ema, Saves(f"{folder}/averaged.ckpt")])
    return {
        "trained": whole(module),
        "resumed": whole(resumed),
        "resumed with another plan": whole(other),
        "val_loss": float(own.callback_metrics["val_loss"]),
        "val_loss again": float(again),
        "averaged": whole(averaged),
        "placed": [isinstance(p, DTensor) for p in module.net.blocks[0].attention.parameters()],
    }


def _resume(rank, world_size, path):
    """What a plain Lightning checkpoint becomes at two ranks: the state that was loaded, and the last weights."""
    module, look = LanguageModel("vocabulary"), Loaded()
    fit(world_size, module, "superoffload", callbacks=[look], ckpt_path=path)
    return look.state, whole(module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder):
    return run_ranks(4, _save, str(folder), limit_s=120)


@pytest.fixture(scope="module")
def plain(folder):
    """Plain Lightning on one device with the same batches, saved after the first of two epochs."""
    module = LanguageModel(None)
    saves = Saves(f"{folder}/plain.ckpt")
    trainer(max_epochs=2, callbacks=[saves]).fit(module, dealt_loader(8))
    return module


def test_a_resumed_run_ends_as_one_that_was_never_stopped(saved):
    for results in saved:
        assert all(results["placed"]), "the module is left as configure_model made it"
        for name, expected in saved[0]["trained"].items():
            assert torch.equal(results["trained"][name], expected), name
            assert torch.equal(results["resumed"][name], expected), name
            other = results["resumed with another plan"][name]
            torch.testing.assert_close(other, expected, rtol=0, atol=TOLERANCE, msg=name)


def test_plain_lightning_goes_on_from_a_tensor_parallel_checkpoint(saved, folder):
    checkpoint = torch.load(folder / "after.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == LanguageModel(None).state_dict().keys()
    for name, value in checkpoint["state_dict"].items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, saved[0]["trained"][name]), name
    states = checkpoint["optimizer_states"][0]["state"]
    for index, param in enumerate(LanguageModel(None).parameters()):
        assert states[index]["exp_avg"].shape == param.shape
        assert float(states[index]["step"]) == 4
    module = LanguageModel(None)
    trainer(max_epochs=2).fit(module, dealt_loader(8), ckpt_path=folder / "between.ckpt")
    for name, expected in saved[0]["trained"].items():
        torch.testing.assert_close(module.state_dict()[name], expected, rtol=0, atol=TOLERANCE, msg=name)


def test_tensor_parallel_ranks_go_on_from_a_plain_checkpoint(plain, folder):
    states = torch.load(folder / "plain.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    (loaded, weights), (nothing, same) = run_ranks(2, _resume, str(folder / "plain.ckpt"), limit_s=60)
    assert nothing == {}, "rank 0 writes checkpoints"
    for index, state in states.items():
        for key, value in state.items():
            assert torch.equal(loaded[index][key], value), f"{key} of {index}"
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=TOLERANCE, msg=name)
        assert torch.equal(weights[name], same[name])


def test_evaluation_without_a_fit_loads_whole_weights(saved, folder):
    module = LanguageModel(None)
    runner = trainer()
    runner.validate(module, token_loader(4), ckpt_path=folder / "after.ckpt", verbose=False)
    for results in saved:
        # Rank-wise means of other subsets of samples than one device has; their average is its.
        assert results["val_loss"] == results["val_loss again"]
    both = (saved[0]["val_loss"] + saved[2]["val_loss"]) / 2
    assert both == pytest.approx(float(runner.callback_metrics["val_loss"]), abs=1e-6)


def test_averaged_weights_equal_one_device(saved, folder):
    module = LanguageModel(None)
    runner = trainer("superscale", max_epochs=2, callbacks=[lss.ShardedEMA(decay=0.5), Saves(f"{folder}/one.ckpt")])
    runner.fit(module, dealt_loader(8))
    for name, expected in module.state_dict().items():
        for results in saved:
            torch.testing.assert_close(results["averaged"][name], expected, rtol=0, atol=TOLERANCE, msg=name)
    theirs, own = (torch.load(folder / f, weights_only=True)["sharded_ema"] for f in ("averaged.ckpt", "one.ckpt"))
    for name, expected in own.items():
        torch.testing.assert_close(theirs[name], expected, rtol=0, atol=TOLERANCE, msg=name)
