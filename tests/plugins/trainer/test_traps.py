"""The thirteen traps of a third-party sharded strategy, as far as one rank meets them. Each test names its trap."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn
from torch.utils.data import DistributedSampler, RandomSampler

import lightning_superscale as lss
from tests.helpers.trainers import Regressor, assert_same_weights, fit, loader, trainer

NAMES = ("superscale", "superoffload")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_trap_1_sampler_with_one_rank_stays_the_users(name):
    seen = []

    class Spy(Regressor):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    def order(strategy):
        seen.clear()
        L.seed_everything(5, verbose=False)
        run = trainer(strategy, max_epochs=1)
        run.fit(Spy(), loader(shuffle=True))
        assert isinstance(run.train_dataloader.sampler, RandomSampler)
        assert not isinstance(run.train_dataloader.sampler, DistributedSampler)
        return list(seen)

    assert order(name) == order("auto")
    assert len(seen) == 6


class Compilable(Regressor):
    """Without self.log, which Python 3.11's dynamo can't trace in plain Lightning either."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_trap_2_compiled_module_trains_like_the_plain_one(name, precision):
    plain = Compilable()
    fit(plain, name, precision=precision)
    compiled = Compilable()
    fit(torch.compile(compiled, backend="eager"), name, precision=precision)
    assert_same_weights(compiled, plain)


def test_trap_3_validation_in_inference_mode_leaves_training_exact(name):
    plain, ours = Regressor(), Regressor()
    fit(plain, "auto", validate=True, val_check_interval=2)
    fit(ours, name, validate=True, val_check_interval=2)
    assert_same_weights(ours, plain)


def test_trap_4_one_process_has_no_launcher_and_runs_in_notebooks(name, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    run = trainer(name)
    assert run.strategy.launcher is None
    run.fit(Regressor(), loader())


def test_trap_5_after_teardown_the_module_holds_whole_plain_weights(name):
    module = Regressor()
    fit(module, name)
    storages = set()
    for key, tensor in module.state_dict().items():
        assert type(tensor) is torch.Tensor, key
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key
        storages.add(tensor.untyped_storage().data_ptr())
    assert len(storages) == len(module.state_dict())


class Unpicklable:
    """Something that torch.load(weights_only=True) refuses."""


class WithExtra(Regressor):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["extra"] = Unpicklable()


def test_trap_6_weights_only_reaches_the_loader(name, tmp_path):
    first = WithExtra()
    run = fit(first, name, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    resumed = WithExtra()
    again = trainer(name, max_epochs=2)
    again.fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert again.global_step == 12


class CountingIO(TorchCheckpointIO):
    saved = 0

    def save_checkpoint(self, *args, **kwargs):
        CountingIO.saved += 1
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda io: io, AsyncCheckpointIO], ids=["plain", "async"])
def test_trap_7_the_users_checkpoint_io_is_used(name, wrap, tmp_path):
    CountingIO.saved = 0
    run = trainer(name, plugins=[wrap(CountingIO())] if wrap is not AsyncCheckpointIO else [AsyncCheckpointIO()])
    run.fit(Regressor(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.strategy.checkpoint_io.teardown()
    assert (tmp_path / "a.ckpt").is_file()
    assert CountingIO.saved == (0 if wrap is AsyncCheckpointIO else 1)


def test_trap_8_optimizer_objects_groups_and_schedulers_stay_the_users(name, tmp_path):
    kept = {}

    class Keeper(Regressor):
        def configure_optimizers(self):
            kept["conf"] = super().configure_optimizers()
            kept["params"] = [list(g["params"]) for g in kept["conf"]["optimizer"].param_groups]
            return kept["conf"]

        def on_train_start(self):
            assert self.optimizers().optimizer is kept["conf"]["optimizer"]
            assert self.lr_schedulers() is kept["conf"]["lr_scheduler"]["scheduler"]
            for group, params in zip(kept["conf"]["optimizer"].param_groups, kept["params"], strict=True):
                assert all(a is b for a, b in zip(group["params"], params, strict=True))

    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    fit(Keeper(), name, callbacks=[LearningRateMonitor("step")], logger=logger, log_every_n_steps=1)
    rates = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "lr-AdamW/pg1" in rates
    assert "0.0099" in rates  # cosine from 0.01: the scheduler ran


class Gan(L.LightningModule):
    """Two optimizers, manual optimization, toggled, one clipped by hand and one through Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(2)
        self.gen = nn.Sequential(nn.Linear(17, 16), nn.Tanh(), nn.Linear(16, 5))
        self.dis = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        x, y = (t.to(self.gen[0].weight.dtype) for t in batch)
        opt_g, opt_d = self.optimizers()
        self.toggle_optimizer(opt_g)
        opt_g.zero_grad()
        self.manual_backward(self.dis(self.gen(x)).float().mean())
        self.clip_gradients(opt_g, 0.01, "norm")
        opt_g.step()
        self.untoggle_optimizer(opt_g)
        with opt_d.toggle_model(sync_grad=batch_idx % 2 == 1):
            self.manual_backward((self.dis(y).float() - self.dis(self.gen(x).detach()).float()).pow(2).mean())
            if batch_idx % 2:
                nn.utils.clip_grad_value_(self.dis.parameters(), 0.002)
                opt_d.step()
                opt_d.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.gen.parameters(), lr=1e-2), torch.optim.SGD(self.dis.parameters(), lr=0.1)]


def test_trap_8_and_12_two_optimizers_in_manual_optimization_equal_plain(name):
    plain, ours = Gan(), Gan()
    fit(plain)
    fit(ours, name)
    assert_same_weights(ours, plain)


def test_trap_8_parameter_group_added_by_a_finetuning_callback_trains(name):
    class Tuned(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def run(strategy):
        module = Tuned()
        before = module.backbone.weight.detach().clone()
        callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        fit(module, strategy, max_epochs=3, callbacks=[callback])
        assert not torch.equal(module.backbone.weight, before)
        return module

    assert_same_weights(run(name), run("auto"))


def test_trap_9_setup_leaves_initial_weights_bit_for_bit(name):
    module = Regressor()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({key: torch.equal(value, before[key]) for key, value in pl_module.state_dict().items()})

    fit(module, name, callbacks=[Look()])
    assert len(seen) == len(before)
    assert all(seen.values())


def test_trap_10_sampler_arguments_and_throughput_monitor(name):
    run = trainer(name)
    assert run.strategy.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
    from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

    bf16 = trainer(name, precision="bf16-true")
    assert _plugin_to_compute_dtype(bf16.precision_plugin) in (torch.bfloat16, torch.float32)


def test_trap_11_accumulation_scheduler_summary_and_checkpoint_callbacks_work(name, tmp_path):
    def run(strategy, where):
        module = Regressor()
        callbacks = [
            GradientAccumulationScheduler({0: 1, 1: 3}),
            ModelSummary(max_depth=2),
            ModelCheckpoint(where, monitor="val_loss", save_top_k=2, save_last=True),
        ]
        fit(module, strategy, max_epochs=3, validate=True, enable_checkpointing=True, callbacks=callbacks)
        assert (where / "last.ckpt").is_file()
        return module

    assert_same_weights(run(name, tmp_path / "a"), run("auto", tmp_path / "b"))


@pytest.mark.parametrize("make", [lambda: StochasticWeightAveraging(1e-3, 1), WeightAveraging], ids=["SWA", "EMA"])
def test_trap_11_weight_averaging_equals_plain(name, make):
    class Simple(Regressor):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def run(strategy):
        module = Simple()
        fit(module, strategy, max_epochs=4, callbacks=[make()])
        return module

    assert_same_weights(run(name), run("auto"))


def test_trap_12_clip_and_accumulate_flags_are_rejected_in_manual_optimization(name):
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(Gan(), name, gradient_clip_val=1.0)


def test_trap_13_collectives_of_one_process_need_no_process_group(name):
    run = trainer(name)
    run.fit(Regressor(), loader())
    assert not torch.distributed.is_initialized()
    strategy = run.strategy
    assert strategy.broadcast({"a": 1}) == {"a": 1}
    assert strategy.reduce_boolean_decision(True) is True
    assert strategy.reduce_boolean_decision(False) is False
    assert torch.equal(strategy.reduce(torch.tensor(3.0)), torch.tensor(3.0))
    assert torch.equal(strategy.all_gather(torch.tensor([3.0])), torch.tensor([3.0]))
    strategy.barrier()


def test_a_shard_size_that_does_not_fit_is_refused_before_processes_start():
    strategy = lss.SuperScaleStrategy(zero={"stage": 2, "shard_size": 3})
    with pytest.raises(lss.SuperScaleError, match=r"shard_size=3 does not divide the 4 .* Use one of 1, 2, 4"):
        trainer(strategy, devices=4)
