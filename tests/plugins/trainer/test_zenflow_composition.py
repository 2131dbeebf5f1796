"""ZenFlow beside everything else that a Trainer does, against ZenFlow by hand under plain Lightning, bit for bit.

Each way of training is tried with some settings of ZenFlow in the default suite, and with all of them in the wide one.
Settings in which nothing is late are compared with AdamW itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

import lightning_superscale as lss
from lightning_superscale.config import ZenFlowConfig
from tests.helpers.extent import IS_ALL
from tests.helpers.trainers import Regressor, loader, trainer
from tests.helpers.zenflow_optimizer import ByHandAdamW, Zoo

SETTINGS = {
    "overlap": {"topk": 0.3, "update_interval": 3, "select_interval": 5, "warmup_steps": 2},
    "half": {"topk": 0.5, "update_interval": 2, "select_interval": 3},
    "sync": {"topk": 0.3, "update_interval": 3, "select_interval": 6, "overlap": False},
    "no column": {"topk": 0.0, "update_interval": 4, "deferred_lr": "sqrt"},
    "defaults": {},
    "all columns": {"topk": 1.0},
    "at once": {"topk": 0.3, "update_interval": 1, "select_interval": 1, "overlap": False},
}
LIKE_ADAMW = ("all columns", "at once")


class Manual(Zoo):
    """One optimizer, two backwards per step, clipped by hand."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.manual_backward(0.5 * self.loss((0.5 * batch[0], batch[1])))
        self.num_batches += 1
        self.clip_gradients(optimizer, 0.5, "norm")
        optimizer.step()
        self.lr_schedulers().step()


class Several(Manual):
    """Two optimizers that are toggled; the second rests at every third batch, so that their windows part."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.step_one(first, batch)
        self.num_batches += 1
        if self.num_batches % 3:
            self.step_one(second, batch)

    def step_one(self, optimizer, batch) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [self.optimizer([group]) for group in self.groups()]


class Unfreezes(Zoo):
    """Some parameters are frozen in the first epoch."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mix.requires_grad_(False)
        self.conv.requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.mix.requires_grad_(True)
            self.conv.requires_grad_(True)


class Grows(Zoo):
    """The optimizer gets the second group in the second epoch."""

    def groups(self):
        return super().groups()[:1]

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.optimizers().optimizer.add_param_group(super().groups()[1])

    def configure_optimizers(self):
        return self.optimizer(self.groups())


class WithAdam(Zoo):
    """Adam, whose weight decay is a part of the gradient."""

    def optimizer(self, groups):
        if self.by_hand is None:
            return torch.optim.Adam(groups, lr=1e-2)
        optimizer = super().optimizer([{"weight_decay": 0.0, **group} for group in groups])
        for group in optimizer.param_groups:
            group["decoupled_weight_decay"] = False
        return optimizer


class Averaged(Zoo):
    """The weights after training are averages, which no gradient that was kept back may change."""

    finishes = False


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        make: makes the module; its arguments are those of `Zoo`.
        flags: of both Trainers.
        clips: how the hand-written optimizer clips by itself: under bf16-true, where Lightning would clip in 16 bits,
            and by value, as ZenFlow chooses columns by gradients that are not clipped yet.
        ours, theirs: makes more flags of one of the Trainers.
        wrap: what is done to the module.
        names: settings in the default suite.
        precisions: in the default suite, and the others.
    """

    make: Callable[..., Zoo] = Zoo
    flags: dict[str, Any] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)
    ours: Callable[[], dict[str, Any]] = dict
    theirs: Callable[[], dict[str, Any]] = dict
    wrap: Callable[[L.LightningModule], L.LightningModule] = lambda module: module
    names: tuple[str, ...] = ("overlap",)
    precisions: tuple[str, ...] = ("32-true", "bf16-true", "bf16-mixed")


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=2)


def both(make: Callable[[], Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    return {side: lambda: {"callbacks": [make()]} for side in ("ours", "theirs")}


def compiled_inside(module: Zoo) -> Zoo:
    module.inp = torch.compile(module.inp, backend="eager")
    return module


NORM, VALUE = {"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}
WAYS = {
    "plain": Way(names=("overlap", "half", "sync", "no column", "defaults", *LIKE_ADAMW)),
    "accumulated": Way(flags={"accumulate_grad_batches": 4}, names=("half", "at once")),
    "clipped by norm": Way(flags=NORM, clips={"max_norm": 0.05}, precisions=("bf16-true", "32-true", "bf16-mixed")),
    "clipped by value": Way(flags=VALUE, clips={"clip_value": 0.003}, names=("sync",)),
    "accumulated and clipped": Way(
        flags={**NORM, "accumulate_grad_batches": 2},
        clips={"max_norm": 0.05},
        precisions=("bf16-mixed", "bf16-true", "32-true"),
    ),
    "manual": Way(Manual, names=("overlap", "all columns"), precisions=("32-true", "bf16-mixed")),
    "several optimizers": Way(Several, names=("half", "at once"), precisions=("bf16-true", "32-true", "bf16-mixed")),
    "unfrozen": Way(Unfreezes),
    "grown": Way(Grows, names=("sync",)),
    "Adam": Way(WithAdam, names=("half", "all columns")),
    "recomputed": Way(
        lambda *args: Zoo(*args, recomputes=True), names=("half",), precisions=("bf16-mixed", "bf16-true", "32-true")
    ),
    "compiled inside": Way(wrap=compiled_inside, names=("half",)),
    "compiled": Way(wrap=lambda module: torch.compile(module, backend="aot_eager"), names=()),
    "averaged": Way(Averaged, **both(lambda: EMAWeightAveraging(decay=0.5))),
    "averaged by rows": Way(Averaged, names=("half",), **both(lambda: lss.ShardedEMA(0.5))),
    "overflowing": Way(
        flags=NORM,
        ours=lambda: {"plugins": [lss.SuperScalePrecision("16-mixed", scaler=scaler())]},
        theirs=lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler())]},
        names=("overlap", "at once"),
        precisions=("16-mixed",),
    ),
}


def cases():
    for way, spec in WAYS.items():
        for precision in spec.precisions if IS_ALL else spec.precisions[:1]:
            for name in SETTINGS if IS_ALL else spec.names:
                yield pytest.param(way, name, precision, id=f"{way}-{name}-{precision}")


class Notes(L.Callback):
    """What user code reads: weights after each batch, and the losses of validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append({name: param.detach().clone() for name, param in module.named_parameters()})

    def on_validation_epoch_end(self, trainer, module):
        self.seen.append({"val_loss": trainer.callback_metrics["val_loss"].clone()})


def trained(module, strategy, callbacks=(), max_epochs: int = 3, **flags):
    """What was seen while a module was trained and validated, and its weights after that."""
    notes = Notes()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Detected call of `lr_scheduler.step\\(\\)` before"
        )  # a first step overflowed
        run = trainer(strategy, max_epochs=max_epochs, callbacks=[*callbacks, notes], **flags)
        run.fit(module, loader(48), loader(16))
    return [*notes.seen, {name: value.detach().clone() for name, value in module.state_dict().items()}]


def strategy_of(options: dict[str, Any], *, gpu_fraction: float = 0, zero: int = 2) -> lss.SuperScaleStrategy:
    return lss.SuperScaleStrategy(
        zero=zero, offload={"engine": "zenflow", "gpu_fraction": gpu_fraction, "zenflow": options}
    )


def assert_same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not differing, f"after {at} batches and validations: {differing}"


@pytest.mark.parametrize(("way", "name", "precision"), cases())
def test_it_is_zenflow_by_hand(way, name, precision):
    spec, options = WAYS[way], SETTINGS[name]
    by_hand = None if name in LIKE_ADAMW and precision != "bf16-true" else ZenFlowConfig(**options)
    flags = {} if precision == "16-mixed" else {"precision": precision}
    clips = spec.clips if by_hand and (precision == "bf16-true" or "clip_value" in spec.clips) else {}
    theirs = {key: value for key, value in spec.flags.items() if not clips or not key.startswith("gradient_clip")}
    found = trained(spec.wrap(spec.make()), strategy_of(options), **flags, **spec.flags, **spec.ours())
    expected = trained(spec.wrap(spec.make(by_hand, clips)), "auto", **flags, **theirs, **spec.theirs())
    assert_same(found, expected)


LOW = {
    "stochastic": {"master_weights": "bf16", "optimizer_states": "bf16"},
    "compensated": {"master_weights": "bf16", "kahan": True, "stochastic_rounding": False},
    "moments": {"optimizer_states": "bf16"},
    "nearest": {"master_weights": "bf16", "optimizer_states": "bf16", "kahan": True},
}


def low_cases():
    for at, how in enumerate(LOW):
        for name in SETTINGS if IS_ALL else list(SETTINGS)[at % 3 :: 3]:
            yield pytest.param(how, name, id=f"{how}-{name}")


@pytest.mark.parametrize(("how", "name"), low_cases())
def test_16_bit_states_are_zenflow_by_hand_with_them(how, name):
    options = SETTINGS[name]
    precision = lss.SuperScalePrecision("bf16-true", seed=7, **LOW[how])
    found = trained(Zoo(), strategy_of(options), precision=None, plugins=[precision])
    by_hand = Zoo(ZenFlowConfig(**options), {"dtypes": precision.choices.states})
    assert_same(found, trained(by_hand, "auto", precision="bf16-true"))


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("name", SETTINGS if IS_ALL else ["overlap"])
def test_parameters_that_are_on_the_device_whole_step_as_adamw_steps_them(name, share):
    options, resident = SETTINGS[name], []

    class Told(Zoo):
        def on_train_end(self):
            (engine,) = self.trainer.strategy.assembly.engines.values()
            for unit, state in zip(engine.transport.units, engine.states, strict=True):
                if "host" not in state.homes:
                    resident.extend(piece.fqn for piece in unit.shard.slices)

    found = trained(Told(), strategy_of(options, gpu_fraction=share))
    num_trainable = sum(param.requires_grad for param in Zoo().parameters())
    assert len(resident) == num_trainable if share == 1 else 0 < len(resident) < num_trainable
    by_hand = Zoo(ZenFlowConfig(**options), {"resident": resident})
    assert_same(found, trained(by_hand, "auto"))


@pytest.mark.parametrize("name", ["overlap", "half", "sync"])
def test_stochastic_averages_are_the_weights_after_training(name):
    """The callback puts them in place before an epoch that has no backward, with a window open or an update on its way.

    The updates whose gradients all came before may not change them any more.
    """

    class Plain(Regressor):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module, averaging = Plain(), StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    trained(module, strategy_of(SETTINGS[name]), callbacks=[averaging], max_epochs=4)
    averages = dict(averaging._average_model.named_parameters())
    for key, param in module.named_parameters():
        assert torch.equal(param, averages[key]), key


class LoadsAtTheEnd(Regressor):
    """Goes back to the weights of an earlier step, as code that keeps the best ones does."""

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 5:
            self.best = {name: value.clone() for name, value in self.state_dict().items()}

    def on_train_end(self):
        self.seen = {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(self.best)


def test_hooks_of_the_end_of_training_see_all_gradients_applied_and_have_the_last_word():
    module, plain = LoadsAtTheEnd(), Regressor()
    trained(module, strategy_of(SETTINGS["overlap"]))
    trained(plain, strategy_of(SETTINGS["overlap"]))
    assert_same([module.seen, dict(module.state_dict())], [dict(plain.state_dict()), module.best])


def test_each_step_of_the_optimizer_counts_and_no_micro_batch_does():
    """A window of 2 steps of 3 micro-batches each, as many batches as one of 6 steps has."""
    steps = []

    class Told(Zoo):
        def on_train_batch_end(self, *_):
            (engine,) = self.trainer.strategy.assembly.engines.values()
            steps.append(dict(engine.rule_state())["zenflow.num_steps"])

    trained(Told(), strategy_of(SETTINGS["half"]), accumulate_grad_batches=3, max_epochs=2)
    assert steps == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_the_oracle_tells_a_setting_from_another():
    """Else the comparisons of this file could not fail."""
    one, other = ({**SETTINGS["overlap"], "topk": topk} for topk in (0.3, 0.35))
    found = trained(Zoo(), strategy_of(one))
    for config in (ZenFlowConfig(**other), ZenFlowConfig(**{**one, "update_interval": 2}), None):
        with pytest.raises(AssertionError, match=r"after \d batches"):
            assert_same(found, trained(Zoo(config), "auto"))
    assert isinstance(Zoo(ZenFlowConfig()).configure_optimizers()["optimizer"], ByHandAdamW)
