"""What users of Lightning do every day works under every strategy as it does under Lightning's own."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data.distributed import DistributedSampler

import lightning_superscale as lss
from tests.adversarial.reading_modules import Reads, differences
from tests.helpers.trainers import dataset, loader, trainer

STRATEGIES = {
    "superscale": lambda: "superscale",
    "cpu": lambda: lss.SuperScaleStrategy(offload="cpu"),
    "superoffload": lambda: "superoffload",
}
EACH = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)


def outcome(module):
    return module.seen, {name: value.detach().clone() for name, value in module.state_dict().items()}


class UnfreezesAll(BaseFinetuning):
    """Everything is frozen when training is set up, and trained from epoch 0 on."""

    def freeze_before_training(self, module):
        self.freeze(module)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 0:
            self.make_trainable(module)


def unfrozen(strategy):
    module = Reads()
    trainer(strategy, callbacks=[UnfreezesAll()]).fit(module, loader())
    return outcome(module)


@EACH
def test_what_is_frozen_at_first_may_be_unfrozen_before_the_first_step(make):
    assert differences(unfrozen("auto"), unfrozen(make())) == []


class UnfreezesLate(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=1e-3)


class TrainsSome(Reads):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def resumed(strategy, path):
    first = trainer(strategy(), callbacks=[UnfreezesLate()])
    first.fit(TrainsSome(), loader())
    first.save_checkpoint(path)
    module = TrainsSome()
    trainer(strategy(), callbacks=[UnfreezesLate()], max_epochs=4).fit(module, loader(), ckpt_path=path)
    return outcome(module)


@EACH
def test_a_run_that_unfroze_a_layer_is_resumed(make, tmp_path):
    expected = resumed(lambda: "auto", tmp_path / "plain.ckpt")
    assert differences(expected, resumed(make, tmp_path / "ours.ckpt")) == []


@EACH
def test_a_checkpoint_without_optimizer_states_lets_optimizers_start_over(make, tmp_path):
    found = []
    for strategy in ("auto", make()):
        first = trainer("auto")
        first.fit(Reads(), loader())
        first.save_checkpoint(tmp_path / "emptied.ckpt")
        saved = torch.load(tmp_path / "emptied.ckpt", weights_only=False)
        saved["optimizer_states"] = []
        torch.save(saved, tmp_path / "emptied.ckpt")
        module = Reads()
        trainer(strategy, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "emptied.ckpt")
        found.append(outcome(module))
    assert differences(*found) == []


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization: evaluates the loss again at perturbed weights, by a closure that has a default."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        kept = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=0.05)
            p.grad = None
        with torch.enable_grad():
            closure()
        for p, before in zip(params, kept, strict=True):
            p.copy_(before).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


class Sharp(Reads):
    def configure_optimizers(self):
        return Sam(self.net.parameters(), lr=0.05)


@EACH
def test_an_optimizer_may_evaluate_the_loss_itself(make):
    found = []
    for strategy in ("auto", make()):
        module = Sharp()
        trainer(strategy).fit(module, loader())
        found.append(outcome(module))
    assert differences(*found) == []


class Sign(torch.optim.Optimizer):
    """An optimizer from elsewhere, whose step calls a closure first if it gets one, as torch's own do."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


class Signed(Reads):
    def configure_optimizers(self):
        return Sign(self.net.parameters(), lr=1e-3)


@EACH
def test_an_optimizer_that_only_takes_a_closure_steps_scaled_losses_without_it(make):
    module = Signed()
    before = module.net[0].weight.detach().clone()
    trainer(make(), plugins=[lss.SuperScalePrecision("16-mixed")]).fit(module, loader())
    assert not torch.equal(module.net[0].weight, before)


class Batched(Reads):
    batch_size = 2

    def train_dataloader(self):
        return torch.utils.data.DataLoader(dataset(), batch_size=self.batch_size)

    val_dataloader = train_dataloader


@EACH
def test_the_batch_size_finder_works_on_one_device(make, tmp_path):
    found = [
        Tuner(trainer(strategy, default_root_dir=tmp_path)).scale_batch_size(Batched(), max_trials=2, steps_per_trial=1)
        for strategy in ("auto", make())
    ]
    assert found[0] == found[1] > 2


class OwnSampler(Reads):
    """Makes a sampler as under DDP, where a process group says how many ranks there are, and logs per epoch."""

    def train_dataloader(self):
        size = {"num_replicas": 1, "rank": 0} if not dist.is_initialized() else {}
        self.seen.append(float(len(size)))
        return torch.utils.data.DataLoader(dataset(), batch_size=8, sampler=DistributedSampler(dataset(), **size))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        self.log("seen", loss, on_epoch=True, on_step=False)
        self.seen.append(float(self.all_gather(loss.detach()).sum()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(float(torch.is_inference_mode_enabled()))

    def val_dataloader(self):
        return loader(16)


@EACH
@pytest.mark.parametrize("is_group_ours", [True, False])
def test_a_distributed_sampler_of_the_users_own_needs_no_numbers_on_one_rank(make, is_group_ours):
    expected, module = OwnSampler(), OwnSampler()
    trainer("auto").fit(expected)
    if not is_group_ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = list(warnings.filters)
            trainer(make()).fit(module)
            assert warnings.filters == before
        assert dist.is_initialized() is not is_group_ours
    finally:
        if not is_group_ours:
            dist.destroy_process_group()
    assert not [one for one in caught if "sync_dist" in str(one.message)]
    assert (expected.seen[0], module.seen[0]) == (2.0, 0.0)
    if is_group_ours:  # Lightning itself looks whether there is a group of gloo
        assert differences((expected.seen[1:], {}), (module.seen[1:], {})) == []
    assert differences(([], outcome(expected)[1]), ([], outcome(module)[1])) == []


def test_trainers_of_other_strategies_are_asked_as_before():
    trainer(lss.SuperScaleStrategy())
    for strategy, expected in (("auto", False), ("ddp", True)):
        assert trainer(strategy)._accelerator_connector.is_distributed is expected


@pytest.mark.parametrize("strategy", ["superscale", "superoffload", "zero2"])
def test_one_process_of_several_that_torchrun_started_does_not_train_alone(strategy, monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=r"1.*2|2.*1"):
        trainer(strategy, devices=1)


class Wide(Reads):
    def more(self):
        self.idle = nn.Linear(3, 3).requires_grad_(False)


def test_a_module_that_stays_frozen_is_refused_at_its_first_backward():
    module = Wide().requires_grad_(False)
    with pytest.raises(lss.SuperScaleError, match="Wide has no trainable parameters.*all frozen"):
        trainer("superoffload").fit(module, loader())
    assert isinstance(module, L.LightningModule)
