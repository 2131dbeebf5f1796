"""Hooks of strategies, precision plugins, modules and callbacks are called in the order of Lightning's strategies."""

from __future__ import annotations

import os
import time
from unittest import mock

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy

import lightning_superscale as lss
from tests.adversarial.reading_modules import Reads
from tests.helpers.trainers import loader, trainer


@pytest.fixture(autouse=True)
def environment():
    """DDP leaves LOCAL_RANK there, by which a script of a later test would take itself for a launched rank."""
    with mock.patch.dict(os.environ):
        yield


# What a strategy calls of itself, where it likes.
OWN = {
    *("strategy.set_world_ranks", "strategy.model_to_device", "strategy.block_backward_sync"),
    # How dtypes are set, and the inside of clip_gradients.
    *("precision.tensor_init_context", "precision.clip_grad_by_norm", "precision.main_params"),
    "strategy.setup_module",
}
COLLECTIVES = {"all_gather", "barrier", "broadcast", "reduce", "reduce_boolean_decision"}
MODULE_HOOKS = {
    *("setup", "teardown", "configure_model", "configure_optimizers", "configure_gradient_clipping", "backward"),
    *("optimizer_step", "optimizer_zero_grad", "training_step", "validation_step", "lr_scheduler_step"),
    "transfer_batch_to_device",
}


def names_of(cls, kept=()):
    return [name for name in dir(cls) if name.startswith("on_") or name in kept]


def logging(log, label, name, base):
    def hook(self, *args, **kwargs):
        log.append(f"{label}.{name}")
        return base(self, *args, **kwargs)

    return hook


def calls(strategy, *, is_automatic: bool, **flags) -> list[str]:
    """The hooks that one fit calls, in their order."""
    log: list[str] = []

    class Traced(Reads):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = is_automatic

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if is_automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    for name in names_of(L.LightningModule, MODULE_HOOKS):
        setattr(Traced, name, logging(log, "module", name, getattr(Traced, name)))
    hooks = {name: logging(log, "callback", name, getattr(L.Callback, name)) for name in names_of(L.Callback)}
    run = trainer(
        strategy, max_epochs=1, limit_train_batches=2, callbacks=[type("Traces", (L.Callback,), hooks)()], **flags
    )
    # The public methods of Lightning's base classes, on this one strategy and its precision plugin.
    for label, one, base in (
        ("strategy", run.strategy, Strategy),
        ("precision", run.strategy.precision_plugin, Precision),
    ):
        for name, value in {**vars(base.__mro__[1]), **vars(base)}.items():
            if callable(value) and not name.startswith("_") and name not in COLLECTIVES:
                found = getattr(type(one), name)
                setattr(one, name, logging(log, label, name, found).__get__(one))
    run.fit(Traced(), loader(), loader(8))
    return [call for call in log if call not in OWN]


@pytest.mark.parametrize(
    ("is_automatic", "flags"),
    [(True, {"gradient_clip_val": 1.0}), (True, {"accumulate_grad_batches": 2}), (False, {})],
    ids=["clipped", "accumulated", "manual"],
)
def test_hooks_are_called_in_the_order_of_other_strategies(is_automatic, flags):
    single = calls("auto", is_automatic=is_automatic, **flags)
    try:
        ddp = calls(DDPStrategy(), is_automatic=is_automatic, **flags)
    finally:
        dist.destroy_process_group()
    assert {"strategy.pre_backward", "strategy.post_backward", "precision.optimizer_step"} <= set(single)
    assert ddp == single
    for strategy in ("superscale", lss.SuperScaleStrategy(offload="cpu"), "superoffload"):
        assert calls(strategy, is_automatic=is_automatic, **flags) == single


def test_a_plugin_of_the_users_own_may_step_the_optimizer():
    seen = []

    class Plugin(lss.SuperScalePrecision):
        def optimizer_step(self, optimizer, model, closure, **kwargs):
            seen.append(type(optimizer).__name__)
            return super().optimizer_step(optimizer, model, closure, **kwargs)

    trainer("superoffload", plugins=[Plugin()], max_steps=2).fit(Reads(), loader())
    assert seen == ["AdamW", "AdamW"]


def test_training_does_not_read_a_clock_that_a_test_has_replaced(monkeypatch):
    def stopped():
        raise AssertionError("a clock of the test's")

    monkeypatch.setattr(time, "perf_counter", stopped)
    module = Reads()
    trainer("superoffload", max_steps=2).fit(module, loader())
    assert len(module.seen) == 2
