"""The thirteen traps of third-party strategies at two ranks, against DDP; one spawn of ranks for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DistributedSampler

from lightning_superscale.errors import SuperScaleError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, dataset, loader, trainer
from tests.plugins.trainer.test_traps import Gan, Unpicklable

STRATEGIES = ("zero1", "zero2", "superoffload", "zero3")


def ddp():
    return DDPStrategy(find_unused_parameters=True)


def fit(module, strategy, *, ckpt_path=None, **flags):
    runner = trainer(ddp() if strategy == "ddp" else strategy, devices=2, **flags)
    runner.fit(module, loader(48), loader(16), ckpt_path=ckpt_path)
    return runner


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equals_ddp(make, name, rank, **flags):
    ours, theirs = make(), make()
    flags_of = {key: (lambda v=value: v() if callable(v) else v) for key, value in flags.items()}
    fit(ours, name, **{key: get() for key, get in flags_of.items()})
    fit(theirs, "ddp", **{key: get() for key, get in flags_of.items()})
    expected = weights(theirs)
    for key, value in weights(ours).items():
        if rank == 0 or "running" not in key:
            assert torch.equal(value, expected[key]), key


def trap_1_every_rank_gets_its_share_of_the_data(name, rank, folder):
    runner = fit(Regressor(), name, max_epochs=1)
    assert isinstance(runner.train_dataloader.sampler, DistributedSampler)
    assert runner.num_training_batches == 3


def trap_2_compiled_module(name, rank, folder):
    class Compilable(Regressor):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    ours, theirs = Compilable(), Compilable()
    fit(torch.compile(ours, backend="aot_eager"), name, max_epochs=1)
    fit(torch.compile(theirs, backend="aot_eager"), "ddp", max_epochs=1)
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


def trap_3_validation_leaves_training_exact(name, rank, folder):
    assert_equals_ddp(Regressor, name, rank, val_check_interval=1)


def trap_5_after_teardown_the_module_holds_whole_plain_weights(name, rank, folder):
    module = Regressor()
    fit(module, name)
    for key, value in module.state_dict().items():
        assert type(value) is torch.Tensor
        assert value.untyped_storage().nbytes() == value.nbytes, key
    trainer(name, devices=2).test(module, loader(16), verbose=False)
    trainer(name, devices=2).predict(module, loader(16))


class WithExtra(Regressor):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["extra"] = Unpicklable()


def trap_6_weights_only_reaches_the_loader(name, rank, folder):
    fit(WithExtra(), name).save_checkpoint(folder / "extra.ckpt")
    runner = trainer(name, devices=2, max_epochs=3)
    runner.fit(WithExtra(), loader(48), loader(16), ckpt_path=folder / "extra.ckpt", weights_only=False)
    assert runner.current_epoch == 3


class CountingIO(TorchCheckpointIO):
    saves = 0

    def save_checkpoint(self, *args, **kwargs):
        CountingIO.saves += 1
        super().save_checkpoint(*args, **kwargs)


def trap_7_the_users_checkpoint_io_is_used(name, rank, folder):
    CountingIO.saves = 0
    fit(Regressor(), name, plugins=[CountingIO()]).save_checkpoint(folder / "io.ckpt")
    assert CountingIO.saves == (1 if rank == 0 else 0)


def trap_7_a_checkpoint_continues_under_either_strategy_and_alone(name, rank, folder):
    whole = Regressor()
    fit(whole, "ddp", max_epochs=3)
    for first, second in ((name, name), (name, "ddp"), ("ddp", name)):
        path = folder / f"{first}-{second}.ckpt"
        fit(Regressor(), first, max_epochs=1).save_checkpoint(path)
        resumed = Regressor()
        fit(resumed, second, max_epochs=3, ckpt_path=path)
        for key, value in weights(resumed).items():
            if rank == 0 or "running" not in key:
                assert torch.equal(value, weights(whole)[key]), f"{first} to {second}: {key}"


def trap_8_optimizer_objects_stay_the_users(name, rank, folder):
    class Keeper(Regressor):
        def configure_optimizers(self):
            self.made = super().configure_optimizers()
            return self.made

    module = Keeper()
    runner = fit(module, name)
    assert runner.optimizers[0] is module.made["optimizer"]
    assert {id(p) for g in runner.optimizers[0].param_groups for p in g["params"]} <= {
        id(p) for p in module.parameters()
    }


def trap_8_a_group_that_a_finetuning_callback_adds_trains(name, rank, folder):
    class Tuned(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def callbacks():
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)]

    ours = Tuned()
    before = ours.backbone.weight.detach().clone()
    fit(ours, name, max_epochs=3, callbacks=callbacks())
    assert not torch.equal(ours.backbone.weight, before)
    # DDP decides which parameters it reduces before the callback unfreezes them, and lets ranks drift apart;
    # here ranks stay equal.
    both = [torch.zeros_like(ours.backbone.weight) for _ in range(2)]
    torch.distributed.all_gather(both, ours.backbone.weight.detach())
    assert torch.equal(both[0], both[1])


def trap_8_and_12_two_optimizers_under_manual_optimization(name, rank, folder):
    ours, theirs = Gan(), Gan()
    fit(ours, name, max_epochs=1)
    fit(theirs, DDPStrategy(find_unused_parameters=True), max_epochs=1)
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


class ToggledGan(Gan):
    """The same, clipped through Lightning; every rank takes its half of the batch."""

    def training_step(self, batch, batch_idx):
        x, y = (t[self.global_rank :: 2] for t in batch)
        opt_g, opt_d = self.optimizers()
        self.toggle_optimizer(opt_g)
        opt_g.zero_grad()
        self.manual_backward(self.dis(self.gen(x)).float().mean())
        self.clip_gradients(opt_g, 0.002, "value")
        opt_g.step()
        self.untoggle_optimizer(opt_g)
        with opt_d.toggle_model(sync_grad=batch_idx % 2 == 1):
            opt_d.zero_grad()
            self.manual_backward((self.dis(y).float() - self.dis(self.gen(x).detach()).float()).pow(2).mean())
            if batch_idx % 2:
                opt_d.step()


def trap_8_and_12_two_optimizers_clipped_through_lightning(name, rank, folder):
    ours, plain = ToggledGan(), ToggledGan()
    fit(ours, name, max_epochs=1, use_distributed_sampler=False)
    expected = one_process_gan(plain)
    for mine, theirs in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def one_process_gan(model):
    """ToggledGan at two ranks by hand: gradients of both ranks' batches, halved and summed in rank order."""
    opt_g, opt_d = model.configure_optimizers()
    data = dataset(48)
    for k in range(6):
        shares = [[t[8 * k : 8 * (k + 1)][rank::2] for t in data.tensors] for rank in range(2)]

        def step(optimizer, params, loss_of, shares=shares, clip=None):
            params = list(params)
            parts = [torch.autograd.grad(loss_of(*share), params) for share in shares]
            for param, *grads in zip(params, *parts, strict=True):
                param.grad = sum(g * 0.5 for g in grads)
            if clip:
                nn.utils.clip_grad_value_(params, clip)
            optimizer.step()

        step(opt_g, model.gen.parameters(), lambda x, y: model.dis(model.gen(x)).mean(), clip=0.002)
        if k % 2:
            step(opt_d, model.dis.parameters(), lambda x, y: (model.dis(y) - model.dis(model.gen(x))).pow(2).mean())
    return model


def trap_9_every_rank_starts_from_rank_zeros_weights(name, rank, folder):
    class Seeded(Regressor):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(100 + rank)
            for param in self.parameters():
                nn.init.normal_(param, std=0.1)

    assert_equals_ddp(Seeded, name, rank)


def trap_10_sampler_arguments(name, rank, folder):
    assert fit(Regressor(), name, max_epochs=1).strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank}


def trap_11_checkpoints_and_weight_averaging(name, rank, folder):
    class Simple(Regressor):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def callbacks(where=folder):
        averages = [] if name == "zero3" else [WeightAveraging()]
        return [ModelCheckpoint(where, monitor="val_loss", save_last=True), *averages]

    if name == "zero3":
        with pytest.raises(SuperScaleError, match="WeightAveraging averages whole weights.*Use ShardedEMA"):
            fit(Simple(), name, callbacks=[WeightAveraging()])
    assert_equals_ddp(Simple, name, rank, callbacks=callbacks, enable_checkpointing=True)
    assert (folder / "last.ckpt").is_file()


def trap_13_collectives(name, rank, folder):
    strategy = fit(Regressor(), name, max_epochs=1).strategy
    assert strategy.broadcast({"from": rank}) == {"from": 0}
    assert strategy.reduce_boolean_decision(rank == 0) is False
    assert strategy.reduce_boolean_decision(rank == 0, all=False) is True
    assert float(strategy.reduce(torch.tensor(float(rank)))) == 0.5
    assert strategy.all_gather(torch.tensor([float(rank)])).flatten().tolist() == [0.0, 1.0]
    strategy.barrier()


TRAPS = {key: value for key, value in globals().items() if key.startswith("trap_")}


def run_traps(rank, world_size, folder):
    """What went wrong, by strategy and trap; empty when nothing did."""
    import traceback

    wrong = {}
    for name in STRATEGIES:
        for key, trap in TRAPS.items():
            where = Path(folder) / name / key
            where.mkdir(parents=True, exist_ok=True)
            try:
                trap(name, rank, where)
            except Exception:
                wrong[name, key] = traceback.format_exc()
                return wrong  # the ranks may be apart
    return wrong


def test_every_trap_at_two_ranks(tmp_path):
    for rank, wrong in enumerate(run_ranks(2, run_traps, str(tmp_path), limit_s=200)):
        for (name, key), trace in wrong.items():
            pytest.fail(f"rank {rank}, {name}, {key}:\n{trace}")
