"""User code that takes a shard of ZeRO-3 for the whole weight, in any hook: works as under DDP, or says what to do."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import grad_norm
from safetensors.torch import save
from torch import nn

from lightning_superscale import SuperScaleStrategy
from lightning_superscale.errors import SuperScaleError
from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import Regressor, loader, trainer


def strategy(name):
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    return SuperScaleStrategy(zero=3, offload=None if name == "zero3" else "superoffload")


def fit(module, name, **flags):
    run = trainer(strategy(name), devices=2, max_epochs=2, **flags)
    run.fit(module, loader(48), loader(16))
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


# What works


class Reads(Regressor):
    """Computes numbers of whole weights and gradients in many hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[str, torch.Tensor]] = []

    def note(self, where, value):
        self.log(where, value)
        self.numbers.append((where, torch.as_tensor(value).detach().clone()))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            before = sum(p.pow(2).sum() for p in self.parameters())
        loss = super().training_step(batch, batch_idx) + 0.0 * before
        self.note("before", before)
        self.note("with gradient", sum(p.pow(2).sum() for p in self.parameters()).detach())
        self.note("largest", self.net[0].weight.abs().max().detach())
        return loss

    def on_before_optimizer_step(self, optimizer):
        for name, norm in grad_norm(self, 2).items():
            self.note(name, norm)

    def on_train_batch_end(self, *_):
        self.note("stacked", torch.stack([p.detach().norm() for p in self.parameters()]).sum())
        self.note("joined", torch.cat([p.detach().flatten() for p in self.parameters()]).norm())
        self.note("array", float(self.net[0].weight.detach().cpu().numpy().sum()))
        self.note("list", sum(map(sum, self.net[3].weight.tolist())))
        self.note("other shape", (self.frozen.weight.detach() - torch.ones(5)).pow(2).mean())

    def validation_step(self, batch, batch_idx):
        self.note("product", (torch.ones(4, 17) @ self.net[0].weight.T).sum())


def plain(module, seed):
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in module.state_dict().items()}


class Writes(Regressor):
    """Writes whole tensors into weights in many hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm = plain(Regressor(), 3), plain(Regressor().net[1], 5)
        self.mask = (torch.arange(33 * 17).view(33, 17) % 3 > 0).float()

    def on_train_start(self):
        self.load_state_dict(self.start)

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            self.net[0].weight.mul_(self.mask)
            self.net[0].bias.copy_(torch.linspace(0, 1, 33))
            self.frozen.bias.add_(0.25)

    def on_before_optimizer_step(self, optimizer):
        self.net[3].weight.data.copy_(self.net[3].weight.detach().clone().clamp_(-0.05, 0.05))
        self.net[3].bias.data.lerp_(torch.ones(5), 0.1)

    def on_train_epoch_start(self):
        self.net[1].load_state_dict(self.norm)


def read_and_write(rank, world_size):
    numbers, written = {}, {}
    for name in ("ddp", "zero3", "z3so"):
        module = Reads()
        fit(module, name)
        numbers[name] = module.numbers
        written[name] = fit(Writes(), name)
    for name in ("zero3", "z3so"):
        for (where, ours), (_, theirs) in zip(numbers[name], numbers["ddp"], strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-5, atol=1e-6, msg=f"{name}: {where}")
        for key, value in written["ddp"].items():
            if rank == 0 or "running" not in key:
                assert torch.equal(written[name][key], value), f"{name}: {key}"


# What is refused


class Pretrained(nn.Sequential):
    """A network with the method of Hugging Face's models, whose weights are in files of safetensors."""

    def save_pretrained(self, folder, state_dict=None):
        return save(state_dict or self.state_dict())


def penalty(module):
    return sum(p.norm() for p in module.parameters())


REFUSED = {
    "a penalty": (lambda m: m.loss_of(1) + penalty(m), r"a loss was computed from the weight 'net.0.weight'.*decay"),
    "first": (lambda m: penalty(m) + m.loss_of(1), r"a loss was computed from the weight 'net.0.weight'.*decay"),
    "a penalty alone": (lambda m: penalty(m.net).backward(), r"a loss was computed from the weight 'net.0.weight'"),
    "a part": (lambda m: nn.functional.linear(torch.ones(2, 17), m.net[0].weight), r"'net.0.weight'.*a part of a mod"),
    "grad": (
        lambda m: torch.autograd.grad(m.loss_of(1), list(m.net.parameters())),
        r"autograd.grad was given .*the weight 'net.0.weight'.*backward\(\) alone",
    ),
    "a copy": (lambda m: copy.deepcopy(m.net), r"copy.deepcopy was given the module 'net'.*ShardedEMA.*full_params"),
    "save_pretrained": (lambda m: m.net.save_pretrained("."), r"save_pretrained\(\) was called on 'net'.*full_params"),
    "safetensors": (lambda m: save(m.net.state_dict()), r"memory of the weight 'net.0.weight'.*full_params"),
    "another shape": (lambda m: m.net[0].weight.data.copy_(torch.ones(4, 3)), r"'net.0.weight'.*\(33, 17\).*\(4, 3\)"),
    "rows": (lambda m: m.net[0].weight.view(3, 187), r"view\(\) needs the whole weight 'net.0.weight'.*no_grad.*full_"),
    "out": (
        lambda m: torch.mm(torch.ones(4, 17), m.net[0].weight.detach().T, out=torch.empty(4, 33)),
        r"mm\(\) failed on the weight 'net.0.weight'.*full_params",
    ),
}  # fmt: skip


class Refused(Regressor):
    """Tries in many hooks what can't work with shards, and notes what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pretrained(*self.net)
        self.said: dict[str, dict[str, str]] = {}

    def loss_of(self, number):
        return self.loss((torch.ones(2, 17), torch.zeros(2, 5)))

    def attempt(self, where):
        for name, (act, _) in REFUSED.items():
            try:
                with torch.enable_grad():
                    act(self)
            except SuperScaleError as error:
                self.said.setdefault(where, {})[name] = str(error)

    def training_step(self, batch, batch_idx):
        self.attempt("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_start(self):
        self.attempt("on_train_start")

    def on_validation_epoch_end(self):
        self.attempt("on_validation_epoch_end")


class InCallback(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.attempt("callback")


class Ends(Regressor):
    """A penalty that is computed first, and whose error nobody catches: the graph holds weights at the end."""

    def training_step(self, batch, batch_idx):
        return penalty(self) + super().training_step(batch, batch_idx)


def try_what_is_refused(rank, world_size):
    module = Refused()
    weights = fit(module, "zero3", callbacks=[InCallback()])
    saved = module.net.save_pretrained(".")  # whole weights again
    copied = copy.deepcopy(module.net)
    assert torch.equal(copied[0].weight, weights["net.0.weight"])
    assert len(saved) > weights["net.0.weight"].nbytes
    with pytest.raises(SuperScaleError) as end:
        fit(Ends(), "zero3")
    return module.said, str(end.value)


def tried(rank, world_size):
    read_and_write(rank, world_size)
    return try_what_is_refused(rank, world_size)


def test_sharded_weights_work_as_whole_ones_or_say_what_to_do():
    for said, end in run_ranks(2, tried):
        assert set(said) == {"training_step", "on_train_start", "on_validation_epoch_end", "callback"}
        for where, errors in said.items():
            assert set(errors) == set(REFUSED), where
            for name, text in errors.items():
                assert re.search(REFUSED[name][1], text, re.DOTALL), f"{where}: {name}: {text}"
        assert re.search(REFUSED["first"][1], end)
