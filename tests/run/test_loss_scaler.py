"""fp16: losses are scaled, steps that overflow are dropped on all ranks, and nothing else changes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import lightning_superscale as lss
from lightning_superscale.run.loss_scaler import LossScaler
from tests.helpers.plain import PlainMasterAdamW
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import assert_same_weights, dataset, loader, trainer

NUM_STEPS = 12
BATCH = 8


def grad_scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**14, "growth_interval": 3, **options})


class Net(L.LightningModule):
    """Its loss overflows in fp16 at the steps of `broken`: there the scaled gradient of the last layer is infinite."""

    broken = (2, 3, 7)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(17, 32), nn.GELU(), nn.Linear(32, 5))
        self.num_batches = 0

    def loss(self, batch, step: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).float(), y.float())
        return loss * float("inf") if step in self.broken and self.is_broken_here() else loss

    def is_broken_here(self) -> bool:
        return True

    def training_step(self, batch, batch_idx):
        self.num_batches += 1
        return self.loss(batch, self.num_batches - 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class BreaksOnOneRank(Net):
    def is_broken_here(self) -> bool:
        return self.trainer.global_rank == 1


class Manual(Net):
    """Two optimizers that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.num_batches += 1
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, self.num_batches - 1))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]


def batches():
    data = dataset(NUM_STEPS * BATCH)
    return [tuple(t[i : i + BATCH] for t in data.tensors) for i in range(0, NUM_STEPS * BATCH, BATCH)]


def plain_mixed(max_norm: float) -> tuple[nn.Module, float]:
    """16-mixed as PyTorch documents it."""
    module, scaler = Net(), grad_scaler()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = module.loss(batch, step)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if max_norm:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
    return module, scaler.get_scale()


def plain_true(max_norm: float) -> tuple[nn.Module, float]:
    """16-true with fp32 masters: gradients leave fp16 before they are unscaled."""
    module, scaler = Net().half(), LossScaler(2.0**14, growth_interval=3)
    oracle = PlainMasterAdamW(module.parameters(), lr=1e-2)
    oracle.max_norm = max_norm or None
    for step, (x, y) in enumerate(batches()):
        oracle.zero_grad()
        (module.loss((x.half(), y.half()), step) * torch.tensor(scaler.scale)).backward()
        is_finite = all(bool(p.grad.isfinite().all()) for p in module.parameters())
        if is_finite:
            oracle.grad_scale = 1 / scaler.scale
            oracle.step()
        scaler.update(has_overflowed=not is_finite)
    return module, scaler.scale


def fit(module, strategy, precision: str, **flags):
    plugin = lss.SuperScalePrecision(precision, scaler=grad_scaler())
    runner = trainer(strategy, plugins=[plugin], max_epochs=1, **flags)
    runner.fit(module, loader(NUM_STEPS * BATCH))
    return runner


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("offload", [None, "cpu", "superoffload"])
@pytest.mark.parametrize(("precision", "plain"), [("16-mixed", plain_mixed), ("16-true", plain_true)])
def test_fp16_trains_as_a_plain_loop_with_a_grad_scaler(precision, plain, offload, max_norm):
    expected, scale = plain(max_norm)
    module = Net()
    runner = fit(module, lss.SuperScaleStrategy(offload=offload), precision, gradient_clip_val=max_norm or None)
    assert_same_weights(module, expected)
    scaler = runner.precision_plugin.scaler
    assert scaler.scale == scale
    assert scaler.num_skipped == 3


def test_looking_ahead_knows_the_scale():
    class Redone(L.Callback):
        def on_train_end(self, trainer, module):
            (engine,) = trainer.strategy.assembly.engines.values()
            engine.flush()
            self.num = engine._rule._host.num_redone

    redone, module = Redone(), Net()
    module.broken = ()
    fit(module, "superoffload", "16-mixed", callbacks=[redone])
    assert redone.num == 0


def _over_ranks(rank: int, world_size: int):
    results = []
    for zero in (0, 1, 2, 3):
        for offload in (None, "superoffload"):
            for precision in ("16-mixed", "16-true"):
                module = BreaksOnOneRank()
                strategy = lss.SuperScaleStrategy(zero=zero, offload=offload)
                runner = fit(module, strategy, precision, devices=world_size)
                scaler = runner.precision_plugin.scaler
                weights = {key: value.clone() for key, value in module.state_dict().items()}
                results.append((precision, scaler.scale, scaler.num_skipped, weights))
    return results


def test_ranks_drop_a_step_together():
    first, second = run_ranks(2, _over_ranks, limit_s=120)
    by_precision: dict[str, dict] = {}
    for mine, other in zip(first, second, strict=True):
        precision, scale, num_skipped, weights = mine
        assert mine[1:3] == other[1:3]
        assert num_skipped == 2  # of the 6 steps that each rank takes
        expected = by_precision.setdefault(precision, weights)
        for key, value in expected.items():
            assert torch.equal(weights[key], other[3][key])
            assert torch.equal(weights[key], value), f"{precision} {key}"


def test_the_scale_is_saved_and_resumed(tmp_path):
    once = Net()
    plugin = lss.SuperScalePrecision("16-mixed", scaler=grad_scaler())
    trainer("superoffload", plugins=[plugin], max_epochs=2).fit(once, loader(NUM_STEPS * BATCH))
    half = Net()
    runner = fit(half, "superoffload", "16-mixed")
    path = str(tmp_path / "half.ckpt")
    runner.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["SuperScalePrecision"]
    assert set(saved) == set(grad_scaler().state_dict())
    rest = Net()
    rest.num_batches = half.num_batches
    again = trainer("superoffload", plugins=[lss.SuperScalePrecision("16-mixed")], max_epochs=2)
    again.fit(rest, loader(NUM_STEPS * BATCH), ckpt_path=path)
    assert_same_weights(rest, once)
    assert again.precision_plugin.scaler.state_dict() == plugin.scaler.state_dict()


def test_the_scale_of_a_run_under_lightnings_plugin_is_taken_over():
    plugin = lss.SuperScalePrecision("16-mixed")
    plugin.on_load_checkpoint({"MixedPrecision": grad_scaler(init_scale=8.0).state_dict()})
    assert plugin.scaler.scale == 8.0


@pytest.mark.parametrize("offload", [None, "superoffload"])
def test_optimizers_that_take_turns(offload):
    module = Manual()
    runner = fit(module, lss.SuperScaleStrategy(offload=offload), "16-mixed")
    plain, scaler = Manual(), LossScaler(2.0**14, growth_interval=3)
    optimizers = plain.configure_optimizers()
    for step, batch in enumerate(batches()):
        for optimizer in optimizers:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = plain.loss(batch, step)
            (loss * scaler.scale).backward()
            params = optimizer.param_groups[0]["params"]
            for param in params:
                param.grad.mul_(1 / scaler.scale)
            is_finite = all(bool(param.grad.isfinite().all()) for param in params)
            if is_finite:
                optimizer.step()
            scaler.update(has_overflowed=not is_finite)
    assert_same_weights(module, plain)
    assert runner.precision_plugin.scaler.scale == scaler.scale


def test_another_optimizer_is_unscaled_too():
    class Sgd(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module, plain, scaler = Sgd(), Sgd(), grad_scaler()
    fit(module, "superscale", "16-mixed")
    optimizer = plain.configure_optimizers()
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = plain.loss(batch, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_weights(module, plain)


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused():
    class Lbfgs(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(lss.SuperScaleError, match="LBFGS evaluates the loss itself, which precision='16-mixed' can't"):
        fit(Lbfgs(), "superscale", "16-mixed")


def test_a_scaler_where_nothing_is_fp16_is_refused():
    with pytest.raises(lss.SuperScaleError, match="'bf16-mixed' scales no losses; found a scaler"):
        lss.SuperScalePrecision("bf16-mixed", scaler=grad_scaler())


def test_non_finite_gradients_are_an_error_once_no_scale_helps():
    class Nan(Net):
        broken = range(100)

    plugin = lss.SuperScalePrecision("16-mixed", scaler=grad_scaler(init_scale=4.0))
    runner = trainer(lss.SuperScaleStrategy(error_if_nonfinite=True), plugins=[plugin], max_epochs=1)
    with pytest.raises(lss.SuperScaleError, match="NaN or infinite"):
        runner.fit(Nan(), loader(NUM_STEPS * BATCH))
    assert plugin.scaler.scale == 1.0
    assert plugin.scaler.num_skipped == 2


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}])
def test_a_scaler_without_sense_is_refused(options):
    with pytest.raises(lss.SuperScaleError, match="a loss scaler needs"):
        LossScaler(**options)


def test_the_scale_moves_as_grad_scalers_does():
    own, other = LossScaler(2.0**14, growth_interval=3), grad_scaler()
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for has_overflowed in [False] * 4 + [True, False, True, True] + [False] * 7:
        weight.grad = torch.full((1,), float("inf") if has_overflowed else 1.0)
        other.scale(torch.ones(1))
        other.step(optimizer)
        other.update()
        own.update(has_overflowed=has_overflowed)
        assert own.scale == other.get_scale()
        assert own.state_dict()["_growth_tracker"] == other.state_dict()["_growth_tracker"]
