"""Weights that user code puts in place of a step's: checkpoints hold them, and resumed runs go on from them."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_superscale as lss
from tests.helpers.extent import only_in_test_all
from tests.helpers.trainers import Regressor, assert_same_weights, loader, trainer

STRATEGIES = {
    "superscale": lambda: "superscale",
    "superoffload": lambda: "superoffload",
    "zenflow": lambda: lss.SuperScaleStrategy(
        offload={
            "engine": "zenflow",
            "zenflow": {"topk": 0.3, "update_interval": 2, "select_interval": 3},
            "gpu_fraction": 0,
        }
    ),
}
EPOCHS = {"max_epochs": 6}  # of one batch each: Lightning resumes at the start of an epoch


class Clamped(Regressor):
    """Keeps its weights small, as a critic's, after the step and before the checkpoint."""

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for param in self.parameters():
                param.clamp_(-0.2, 0.2)


class Projected(Regressor):
    """Scales a weight to norm 1."""

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            self.net[0].weight.div_(self.net[0].weight.norm())


class SavesEachStep(L.Callback):
    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


@pytest.mark.parametrize("make", [Clamped, Projected])
@pytest.mark.parametrize("is_universal", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("32-true", marks=only_in_test_all)])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_run_resumes_from_edited_weights(strategy, precision, is_universal, make, tmp_path):
    def run(callbacks):
        plugins = [lss.UniversalCheckpointIO()] if is_universal else []
        return trainer(strategy(), precision=precision, plugins=plugins, callbacks=callbacks, **EPOCHS)

    straight, saved = make(), make()
    run([]).fit(straight, loader(8))
    run([SavesEachStep(tmp_path)]).fit(saved, loader(8))
    assert_same_weights(saved, straight)
    for step in (1, 2, 3, 4):
        resumed = make()
        run([]).fit(resumed, loader(8), ckpt_path=f"{tmp_path}/{step}.ckpt")
        assert_same_weights(resumed, straight)


@pytest.mark.parametrize(
    "make", [lambda: EMAWeightAveraging(decay=0.5), lambda: lss.ShardedEMA(0.5)], ids=["EMA", "ours"]
)
@pytest.mark.parametrize("is_universal", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [
        STRATEGIES["zenflow"],
        *(pytest.param(STRATEGIES[name], marks=only_in_test_all) for name in ("superscale", "superoffload")),
    ],
)
def test_a_run_with_averages_resumes(strategy, is_universal, make, tmp_path):
    """And gives no state to what is frozen, of which the averages have an fp32 copy."""

    def run(callbacks):
        plugins = [lss.UniversalCheckpointIO()] if is_universal else []
        return trainer(strategy(), precision="bf16-true", plugins=plugins, callbacks=[make(), *callbacks], **EPOCHS)

    straight = Regressor()
    run([SavesEachStep(tmp_path)]).fit(straight, loader(8))
    for step in (1, 3):
        resumed = Regressor()
        again = run([])
        again.fit(resumed, loader(8), ckpt_path=f"{tmp_path}/{step}.ckpt")
        assert_same_weights(resumed, straight)
        assert not again.optimizers[0].state[resumed.frozen.weight]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_averages_that_were_saved_in_place_of_weights_are_loaded_in_fp32_too(tmp_path):
    """And not the masters of the weights that they average."""
    averaging, io = EMAWeightAveraging(decay=0.9), {"plugins": [lss.UniversalCheckpointIO()]}
    run = trainer("superoffload", precision="bf16-true", callbacks=[averaging, SavesEachStep(tmp_path)], **io, **EPOCHS)
    run.fit(Regressor(), loader(8))
    averages = dict(averaging._average_model.module.named_parameters())
    loaded = Regressor()
    trainer("superscale", **io).validate(loaded, loader(8), ckpt_path=f"{tmp_path}/6.ckpt", verbose=False)
    for name, param in loaded.named_parameters():
        assert torch.equal(param, averages[name].float()), name
