"""ZenFlow in a Trainer: equal to AdamW where nothing is late, resumed at any step, over ranks, and what it refuses."""

from __future__ import annotations

import re
import threading

import lightning as L
import pytest
import torch

import lightning_superscale as lss
from lightning_superscale.offload.superoffload.state import DeferredState
from lightning_superscale.offload.zenflow import auto
from lightning_superscale.offload.zenflow.state import SplitState
from lightning_superscale.offload.zenflow.sums import GradientSums
from tests.helpers.extent import IS_ALL
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, assert_same_weights, fit, loader, trainer

NUM_STEPS = 14
OPTIONS = {
    "overlap": {"topk": 0.3, "update_interval": 3, "select_interval": 5, "warmup_steps": 2},
    "sync": {"topk": 0.3, "update_interval": 3, "select_interval": 6, "overlap": False},
    "sums on the device": {"topk": 0.3, "update_interval": 3, "select_interval": 5, "accumulate_on": "device"},
    "no column": {"topk": 0.0, "update_interval": 4, "deferred_lr": "sqrt"},
    "no column, counted once": {"topk": 0.0, "update_interval": 3, "deferred_lr": "none"},
}
FLAGS = {"max_steps": NUM_STEPS, "max_epochs": -1}
EPOCHS = {"max_epochs": NUM_STEPS}  # of one batch each: Lightning resumes at the start of an epoch


def strategy(zero: int = 2, gpu_fraction=0, **options):
    offload = {"engine": "zenflow", "gpu_fraction": gpu_fraction, "zenflow": options}
    return lss.SuperScaleStrategy(zero=zero, offload=offload)


def test_the_name_is_all_that_is_needed():
    module = Regressor()
    run = fit(module, "zenflow", **FLAGS)
    assert type(run.strategy) is lss.ZenFlowStrategy
    told = run.strategy.explain()
    assert "10% of the columns step on the device at every step, the others on the host in windows of 4 steps" in told
    assert not any(param.isnan().any() for param in module.parameters())


@pytest.mark.parametrize(
    "flags",
    [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.003, **{}}],
    ids=["plain", "clip", "accumulate"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("gpu_fraction", [0, 0.4])
def test_with_all_columns_selected_it_is_adamw(flags, precision, gpu_fraction):
    module, plain = Regressor(), Regressor()
    fit(module, strategy(topk=1.0, gpu_fraction=gpu_fraction), precision=precision, **FLAGS, **flags)
    fit(plain, precision=precision, **FLAGS, **flags)
    assert_same_weights(module, plain)


class SavesEachStep(L.Callback):
    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


class Notes(L.Callback):
    """Whole weights after each step."""

    def __init__(self) -> None:
        self.weights = {}

    def on_train_batch_end(self, trainer, module, *_):
        with trainer.strategy.full_params() as weights:
            self.weights[trainer.global_step] = [weights[name].clone() for name, _ in module.named_parameters()]


def assert_resumes_at_each_step(tmp_path, options, precision, **flags):
    """A run that saved at every step equals one that did not, and goes on from each checkpoint as if nothing were."""
    expected, notes, saved = Regressor(), Notes(), Regressor()
    flags = {"precision": precision, **EPOCHS, **flags}
    fit(expected, strategy(**options), num=8, callbacks=[notes], **flags)
    fit(saved, strategy(**options), num=8, callbacks=[SavesEachStep(tmp_path)], **flags)
    assert_same_weights(saved, expected)
    for step in range(1, NUM_STEPS, 1 if IS_ALL else 2):
        resumed, seen = Regressor(), Notes()
        run = trainer(strategy(**options), callbacks=[seen], **flags)
        run.fit(resumed, loader(8), ckpt_path=f"{tmp_path}/{step}.ckpt")
        for at, weights in seen.weights.items():
            assert all(map(torch.equal, weights, notes.weights[at])), (step, at)
        assert max(seen.weights) == NUM_STEPS
        assert_same_weights(resumed, expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_run_resumes_at_each_step_of_a_window(tmp_path, options, precision):
    assert_resumes_at_each_step(tmp_path, options, precision)


@pytest.mark.parametrize("low", [{"optimizer_states": "bf16"}, {"kahan": True}], ids=["stochastic", "compensated"])
def test_a_run_with_16_bit_states_resumes_at_each_step_of_a_window(tmp_path, low):
    precision = lss.SuperScalePrecision("bf16-true", master_weights="bf16", seed=3, **low)
    assert_resumes_at_each_step(tmp_path, OPTIONS["overlap"], None, plugins=[precision])


def test_a_universal_checkpoint_resumes_at_each_step_too(tmp_path):
    assert_resumes_at_each_step(
        tmp_path, OPTIONS["overlap"], "32-true", plugins=[lss.UniversalCheckpointIO()], gradient_clip_val=0.05
    )


@pytest.mark.parametrize(
    ("saved", "resumed", "columns"),
    [
        ({}, {"topk": 0.5}, "5 columns of 'net.0.weight'.*would have 9 of 17"),
        ({}, {"exclude": ["net.0.weight"]}, "5 columns of 'net.0.weight'.*would have none, as it is not split"),
        ({"exclude": ["net.0.weight"]}, {}, "0 columns of 'net.0.weight'.*would have 5 of 17"),
        ({"topk": 0}, {"topk": 1}, "0 columns of 'net.0.weight'.*would have 17 of 17"),
    ],
)
def test_a_checkpoint_within_a_window_names_the_topk_that_it_needs(tmp_path, saved, resumed, columns):
    options = OPTIONS["overlap"]
    fit(Regressor(), strategy(**{**options, **saved}), num=8, callbacks=[SavesEachStep(tmp_path)], **EPOCHS)
    run = trainer(strategy(**{**options, **resumed}), **EPOCHS)
    module, begun = Regressor(), []
    module.on_train_start = lambda: begun.append(True)
    with pytest.raises(lss.SuperScaleError, match=columns + ".*topk and exclude"):
        run.fit(module, loader(8), ckpt_path=f"{tmp_path}/7.ckpt")
    assert not begun


AUTO = {"topk": "auto", "update_interval": "auto", "select_interval": 4}


@pytest.mark.parametrize("accumulate_on", ["host", "device"])
def test_what_warm_up_chose_is_kept_by_a_checkpoint(tmp_path, monkeypatch, accumulate_on):
    monkeypatch.setattr(auto, "choose_interval", lambda ranks: auto.Chosen(3, "update_interval=3"))
    notes, options = Notes(), {**AUTO, "accumulate_on": accumulate_on}
    run = fit(Regressor(), strategy(**options), num=8, callbacks=[notes, SavesEachStep(tmp_path)], **EPOCHS)
    told = run.strategy.explain()
    assert "the share of the columns that warm-up shows" in told
    assert "- update_interval=3 (update_interval='auto')" in told
    assert re.search(r"- topk=0\.\d+: these columns hold \d+ % of the gradient's energy \(topk='auto'\)", told)
    monkeypatch.setattr(auto, "choose_interval", lambda ranks: auto.Chosen(5, "update_interval=5"))
    for step in (9, 10, 11, 13):
        resumed, seen = Regressor(), Notes()
        run = trainer(strategy(**options), callbacks=[seen], **EPOCHS)
        run.fit(resumed, loader(8), ckpt_path=f"{tmp_path}/{step}.ckpt")
        for at, weights in seen.weights.items():
            assert all(map(torch.equal, weights, notes.weights[at])), (step, at)
        told = run.strategy.explain()
        assert "- update_interval=3: the checkpoint that this run resumed from has it (update_interval='auto')" in told
        assert "these columns hold" not in told


def test_warm_up_before_a_choice_is_adamw():
    module, plain = Regressor(), Regressor()
    flags = {**FLAGS, "max_steps": 8}
    fit(module, strategy(**AUTO), **flags)
    fit(plain, **flags)
    assert_same_weights(module, plain)


def _over_ranks(rank, world_size, folder):
    results = {}
    for zero in (0, 1, 2, 3):
        for name in ("overlap", "no column"):
            notes, flags = Notes(), {"devices": world_size, **EPOCHS}
            run = trainer(
                strategy(zero, **OPTIONS[name]), callbacks=[notes, SavesEachStep(f"{folder}/{zero}/{name}")], **flags
            )
            run.fit(Regressor(), loader(16))
            results[zero, name] = notes.weights
    run = trainer(strategy(2, **AUTO), devices=world_size, **EPOCHS)
    run.fit(Regressor(), loader(16))
    results["auto"] = [param.detach().clone() for param in run.lightning_module.parameters()]
    return results


def test_ranks_choose_the_same_columns_whatever_is_sharded(tmp_path):
    """And one rank goes on from what two saved: selection, open window and what is on its way are of whole tensors."""
    over_ranks = run_ranks(2, _over_ranks, str(tmp_path))
    assert all(map(torch.equal, *(results["auto"] for results in over_ranks)))
    for results in over_ranks:
        for name in ("overlap", "no column"):
            for zero in (1, 2, 3):
                for step, weights in results[zero, name].items():
                    assert all(map(torch.equal, weights, results[0, name][step])), (zero, name, step)
    for step in (3, 7):
        resumed = {}
        for zero in (0, 2, 3):
            seen = Notes()
            run = trainer(strategy(**OPTIONS["overlap"]), callbacks=[seen], **EPOCHS)
            run.fit(Regressor(), loader(8), ckpt_path=f"{tmp_path}/{zero}/overlap/{step}.ckpt")
            resumed[zero] = seen.weights
        for zero in (2, 3):
            for at, weights in resumed[zero].items():
                assert all(map(torch.equal, weights, resumed[0][at])), (zero, step, at)


def test_other_optimizers_are_refused_by_name():
    class WithSGD(Regressor):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(lss.SuperScaleError, match="zenflow steps Adam and AdamW by columns; SGD is not"):
        fit(WithSGD(), "zenflow")


def test_weights_that_flow_are_refused_by_name():
    offload = {"engine": "zenflow", "weights": "flow", "wrap": ["Linear"]}
    with pytest.raises(lss.SuperScaleError, match="weights='flow' keeps weights in host memory, and zenflow"):
        fit(Regressor(), lss.SuperScaleStrategy(offload=offload))


def test_a_pattern_that_matches_no_parameter_is_refused_with_names_like_it():
    with pytest.raises(
        lss.SuperScaleError, match=r"'net.O.weight' matches none of \d+. Names like it: .*'net.0.weight'"
    ):
        fit(Regressor(), strategy(exclude=["net.3.*", "net.O.weight"]))


class LooksAtWeights(L.Callback):
    """Lets work on the host fail from the third step on, and sees weights after each, by full_params or validation.

    Attributes:
        seen_after: the number of steps before the last look.
    """

    def __init__(self, how: str) -> None:
        self.how = how
        self.is_failing = False
        self.seen_after = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_failing = trainer.global_step >= 2

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.how == "full_params":
            with trainer.strategy.full_params():
                self.seen_after = trainer.global_step

    def on_validation_batch_start(self, trainer, *args):
        self.seen_after = trainer.global_step


@pytest.mark.parametrize("how", ["validation", "full_params"])
@pytest.mark.parametrize(
    ("engine", "work"),
    [
        ("zenflow", (SplitState, "update_host")),
        ("zenflow", (GradientSums, "absorb")),
        ("superoffload", (DeferredState, "settle")),
    ],
    ids=["a window's update", "a step's sum", "a step of superoffload"],
)
def test_an_error_of_the_host_is_raised_before_weights_that_lack_its_work_are_seen(how, engine, work, monkeypatch):
    seen, plain = LooksAtWeights(how), getattr(*work)

    def fail(*args, **kwargs):
        if seen.is_failing:
            raise MemoryError("no host memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(*work, fail)
    options = {"zenflow": {"update_interval": 3}} if engine == "zenflow" else {}
    chosen = lss.SuperScaleStrategy(offload={"engine": engine, "gpu_fraction": 0, **options})
    run = trainer(chosen, callbacks=[seen], val_check_interval=1, **FLAGS)
    threads, module = set(threading.enumerate()), Regressor()
    with pytest.raises(MemoryError, match="no host memory"):
        run.fit(module, loader(), loader() if how == "validation" else None)
    assert seen.seen_after == 2
    assert set(threading.enumerate()) <= threads, "a thread was left behind"
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in module.parameters()), "memory of the run was kept"
