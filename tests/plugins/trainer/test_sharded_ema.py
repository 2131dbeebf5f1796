"""ShardedEMA: the same averages whatever is sharded, seen by validation, left in the model, and kept by checkpoints."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import lightning_superscale as lss
from lightning_superscale.errors import SuperScaleError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, loader, trainer

DECAY = 0.8
STRATEGIES = ("ddp", "zero1", "zero3", "superoffload")


class Recorder(L.Callback):
    """The averages as the formula says, from whole weights."""

    def on_train_start(self, trainer, module):
        self.averages = [p.detach().float().clone() for p in module.net.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for average, param in zip(self.averages, module.net.parameters(), strict=True):
            average.lerp_(param.detach().float(), 1 - DECAY)


class Plain(Regressor):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def make(name):
    return DDPStrategy(find_unused_parameters=True) if name == "ddp" else name


def fit(name, *callbacks, ckpt_path=None, **flags):
    module = Plain()
    runner = trainer(make(name), devices=2, callbacks=list(callbacks), **flags)
    runner.fit(module, loader(48), loader(16), ckpt_path=ckpt_path)
    return module, runner


def average(rank, world_size, folder):
    results = {}
    for name in STRATEGIES:
        module, runner = fit(name, lss.ShardedEMA(DECAY))
        weights = {key: value.clone() for key, value in module.net.state_dict().items() if "running" not in key}
        results[name] = weights, float(runner.callback_metrics["val_loss"])
    recorder = Recorder()
    fit("ddp", recorder)
    results["formula"] = [a.clone() for a in recorder.averages]
    for first, second in (("zero3", "ddp"), ("ddp", "zero3")):
        path = Path(folder) / f"{first}.ckpt"
        fit(first, lss.ShardedEMA(DECAY), max_epochs=1)[1].save_checkpoint(path)
        results[first, second] = "sharded_ema" in torch.load(path, weights_only=False)
    return results


def test_averages_are_the_formulas_under_every_strategy(tmp_path):
    for rank, results in enumerate(run_ranks(2, average, str(tmp_path), limit_s=200)):
        expected, loss = results["ddp"]
        for value, formula in zip([v for k, v in expected.items() if "num" not in k], results["formula"], strict=True):
            assert torch.equal(value, formula)
        for name in STRATEGIES[1:]:
            weights, own_loss = results[name]
            assert own_loss == loss or rank, name  # DDP validates each rank with its own batch statistics
            for key, value in expected.items():
                assert torch.equal(weights[key], value), f"{name}: {key}"
        assert results["zero3", "ddp"]
        assert results["ddp", "zero3"]


class StopAfter(L.Callback):
    """Saves a checkpoint in the middle, as if the run had ended there."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def resume(rank, world_size, folder):
    results = []
    for first, second in (("zero3", "zero1"), ("zero1", "zero3")):
        path = Path(folder) / f"{first}.ckpt"
        whole, _ = fit(first, lss.ShardedEMA(DECAY), StopAfter(path))
        rest, _ = fit(second, lss.ShardedEMA(DECAY), ckpt_path=path)
        pairs = zip(whole.net.parameters(), rest.net.parameters(), strict=True)
        results.append(all(torch.equal(a, b) for a, b in pairs))
    return results


def test_a_resumed_run_goes_on_with_its_averages_at_another_stage(tmp_path):
    assert run_ranks(2, resume, str(tmp_path), limit_s=120) == [[True, True], [True, True]]


@pytest.mark.parametrize(("options", "message"), [({"decay": 1.0}, "decay"), ({"every_n_steps": 0}, "every_n_steps")])
def test_bad_settings_are_refused(options, message):
    with pytest.raises(SuperScaleError, match=message):
        lss.ShardedEMA(**options)
