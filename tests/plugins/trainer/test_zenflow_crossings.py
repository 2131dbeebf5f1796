"""Checkpoints of ZenFlow under other engines and back: what must be equal is, and what is dropped is told."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import lightning_superscale as lss
from lightning_superscale.config import ZenFlowConfig
from tests.helpers.extent import IS_ALL
from tests.helpers.trainers import loader, trainer
from tests.helpers.zenflow_optimizer import ByHandAdamW, Zoo

NUM_STEPS = 10
EPOCHS = {"max_epochs": NUM_STEPS}  # of one batch each: Lightning resumes at the start of an epoch
OPTIONS = {
    "overlap": {"topk": 0.3, "update_interval": 3, "select_interval": 5, "warmup_steps": 2},
    "half": {"topk": 0.5, "update_interval": 2, "select_interval": 3},
    "sync": {"topk": 0.3, "update_interval": 3, "select_interval": 6, "overlap": False},
}
# With overlap windows end in turn: some are open after any step, and some on their way. Without, after the second none.
STEPS = {"overlap": (6, 5), "half": (8, 7), "sync": (6, 7)}
TOLD = {"overlap": {6: 2, 5: 2}, "half": {8: 1, 7: 1}, "sync": {6: 2, 7: 0}}
OTHERS = {"AdamW on the device": None, "superoffload": "superoffload", "cpu": "cpu"}
EACH_IO = pytest.mark.parametrize("is_universal", [False, True])


def strategy(offload) -> lss.SuperScaleStrategy:
    if isinstance(offload, dict):
        offload = {"engine": "zenflow", "gpu_fraction": 0, "zenflow": offload}
    return lss.SuperScaleStrategy(offload=offload)


class SavesAt(L.Callback):
    def __init__(self, folder, steps) -> None:
        self.folder, self.steps = folder, steps

    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


class Notes(L.Callback):
    """Weights after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.weights[trainer.global_step] = {name: p.detach().clone() for name, p in module.named_parameters()}


State = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]
"""By parameter: master, both moments, and the number of steps."""


class NotesStates(L.Callback):
    """Masters and moments of the hand-written optimizer after each step."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}

    def on_train_batch_end(self, trainer, module, *_):
        optimizer: ByHandAdamW = module.optimizers().optimizer
        one_of = {one.weight: one for one in optimizer.by_hand.of}
        self.states[trainer.global_step] = {
            name: (
                one_of[p].master.clone(), one_of[p].exp_avg.clone(), one_of[p].exp_avg_sq.clone(), optimizer.counts[p]
            )
            for name, p in module.named_parameters() if p in one_of
        }  # fmt: skip


class Continued(Zoo):
    """Begins at a step with the states of another run, as a resume does by hand."""

    def __init__(self, states: State, start: int, by_hand: ZenFlowConfig | None = None) -> None:
        super().__init__(by_hand)
        self.states, self.start, self.num_batches = states, start, start

    def configure_optimizers(self):
        found = super().configure_optimizers()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(self.start):
                found["lr_scheduler"]["scheduler"].step()
        return found

    def on_train_start(self):
        optimizer, params = self.optimizers().optimizer, dict(self.named_parameters())
        for name, (master, exp_avg, exp_avg_sq, count) in self.states.items():
            params[name].data.copy_(master)
            if self.by_hand is None and count:
                step = torch.tensor(float(count))
                optimizer.state[params[name]] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if self.by_hand is not None:
            optimizer.meet()
            for one in optimizer.by_hand.of:
                name = next(name for name, p in params.items() if p is one.weight)
                one.master, one.exp_avg, one.exp_avg_sq, optimizer.counts[one.weight] = self.states[name]


def by_hand(states: State, start: int, config: ZenFlowConfig | None = None) -> dict[int, dict[str, torch.Tensor]]:
    notes = Notes()
    trainer(callbacks=[notes], max_epochs=NUM_STEPS - start).fit(Continued(states, start, config), loader(8))
    return {start + step: weights for step, weights in notes.weights.items()}


def resumed(offload, path, start: int, is_universal: bool, callbacks=()) -> dict[int, dict[str, torch.Tensor]]:
    notes, module = Notes(), Zoo()
    module.num_batches = start
    io = {"plugins": [lss.UniversalCheckpointIO()]} if is_universal else {}
    run = trainer(strategy(offload), callbacks=[notes, *callbacks], **EPOCHS, **io)
    run.fit(module, loader(8), ckpt_path=str(path))
    return notes.weights


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for step, weights in found.items():
        differing = [name for name in weights if not torch.equal(weights[name], expected[step][name])]
        assert not differing, f"after step {step}: {differing}"


def saved_by(offload, folder, steps, is_universal: bool) -> None:
    io = {"plugins": [lss.UniversalCheckpointIO()]} if is_universal else {}
    trainer(strategy(offload), callbacks=[SavesAt(folder, steps)], **EPOCHS, **io).fit(Zoo(), loader(8))


@EACH_IO
@pytest.mark.parametrize("name", OPTIONS if IS_ALL else ["overlap", "sync"])
def test_other_engines_go_on_from_its_masters_and_moments_and_tell_what_they_drop(name, is_universal, tmp_path):
    """Also with the update that was on its way: masters and moments have it, and weights follow them."""
    notes = NotesStates()
    trainer(callbacks=[notes], **EPOCHS).fit(Zoo(ZenFlowConfig(**OPTIONS[name])), loader(8))
    saved_by(OPTIONS[name], tmp_path, STEPS[name], is_universal)
    for step in STEPS[name]:
        expected = by_hand(notes.states[step], step)
        for offload in OTHERS.values():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = resumed(offload, tmp_path / f"{step}.ckpt", step, is_universal)
            assert_same(found, expected)
            told = [str(one.message) for one in caught if "engine='zenflow'" in str(one.message)]
            num = TOLD[name][step]
            assert len(told) == (1 if num else 0)
            if num:
                steps = "step" if num == 1 else "steps"
                assert f"within windows: gradients of up to {num} {steps} in columns that the host" in told[0]
                assert "this run drops them. Resume with engine='zenflow' to lose nothing." in told[0]


def test_nothing_of_zenflow_stays_in_what_another_engine_saves(tmp_path):
    saved_by(OPTIONS["overlap"], tmp_path, [6], is_universal=False)
    states = torch.load(tmp_path / "6.ckpt", weights_only=True)["optimizer_states"][0]
    assert any("zenflow_window" in state for state in states["state"].values())
    with pytest.warns(UserWarning, match="this run drops them"):
        resumed("superoffload", tmp_path / "6.ckpt", 6, is_universal=False, callbacks=[SavesAt(tmp_path, [8])])
    states = torch.load(tmp_path / "8.ckpt", weights_only=True)["optimizer_states"][0]
    assert states.keys() == {"state", "param_groups"}
    assert {key for state in states["state"].values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


@EACH_IO
@pytest.mark.parametrize("offload", OTHERS.values() if IS_ALL else ["superoffload"])
def test_it_begins_anew_with_the_states_of_another_engine(offload, is_universal, tmp_path):
    """Its first step is one of warm-up, and columns are chosen by its gradients."""
    saved_by(offload, tmp_path, [4], is_universal)
    states = torch.load(tmp_path / "4.ckpt", weights_only=True) if not is_universal else None
    found = resumed(OPTIONS["overlap"], tmp_path / "4.ckpt", 4, is_universal)
    if states is None:  # the same bits in another format
        saved_by(offload, tmp_path / "lightning", [4], is_universal=False)
        states = torch.load(tmp_path / "lightning" / "4.ckpt", weights_only=True)
    module = Zoo()
    name_of = {param: name for name, param in module.named_parameters()}
    names = [name_of[param] for group in module.groups() for param in group["params"]]
    kept = states["optimizer_states"][0]["state"]
    begun = {
        name: (
            states["state_dict"][name],
            kept[i]["exp_avg"] if i in kept else torch.zeros_like(states["state_dict"][name]),
            kept[i]["exp_avg_sq"] if i in kept else torch.zeros_like(states["state_dict"][name]),
            int(kept[i]["step"]) if i in kept else 0,
        )
        for i, name in enumerate(names)
    }
    assert_same(found, by_hand(begun, 4, ZenFlowConfig(**OPTIONS["overlap"])))


def test_lightnings_own_strategies_tell_what_they_drop_too(tmp_path):
    """They take no masters, so they drop the update that was on its way as well."""
    saved_by(OPTIONS["overlap"], tmp_path, [6], is_universal=True)
    run = trainer(SingleDeviceStrategy("cpu"), plugins=[lss.UniversalCheckpointIO()], **EPOCHS)
    module = Zoo()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader(8), ckpt_path=str(tmp_path / "6.ckpt"))
    told = [str(one.message) for one in caught if "drops" in str(one.message)]
    assert any("gradients of up to 2 steps in columns" in one for one in told)
    assert any("SingleDeviceStrategy drops: moments have it and weights lack it" in one for one in told)
    state = run.optimizers[0].state[module.inp.weight]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
