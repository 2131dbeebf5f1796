"""Modules whose own code reads or writes weights outside of the forward of the module that owns them.

Each keeps what it saw in `seen`: a run is right if that, and the trained weights, are those of a run under plain
Lightning.
"""

from __future__ import annotations

import copy

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.trainers import loader, trainer


class Reads(L.LightningModule):
    """A regressor; subclasses read or write weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(17, 600), nn.GELU(), nn.Linear(600, 600), nn.GELU(), nn.Linear(600, 5))
        self.more()
        self.seen: list[float] = []

    def more(self) -> None: ...

    def see(self) -> None:
        self.seen.append(float(sum(p.detach().double().sum() for p in self.net.parameters())))

    def loss(self, batch):
        x, y = batch
        return F.mse_loss(self.net(x).float(), y.float())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.seen.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(float(self.loss(batch)))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


class Teacher(Reads):
    """A mean teacher, updated before the forward."""

    def more(self):
        self.mean = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p, q in zip(self.net.parameters(), self.mean.parameters(), strict=True):
                q.mul_(0.9).add_(p, alpha=0.1)
            target = self.mean(batch[0])
        return F.mse_loss(self.net(batch[0] + 0.1), target) + super().training_step(batch, batch_idx)


class Prototypes(Reads):
    """Rows that are normalised, in place, before the forward."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net[4].weight.copy_(F.normalize(self.net[4].weight, dim=1))
        return super().training_step(batch, batch_idx)


class PenaltyFirst(Reads):
    """A penalty on weights, with a gradient of its own, computed before the forward."""

    def training_step(self, batch, batch_idx):
        weight = self.net[4].weight
        penalty = (weight @ weight.T - torch.eye(5, dtype=weight.dtype)).pow(2).sum() * 0.1
        return penalty + super().training_step(batch, batch_idx)


class AsData(Reads):
    """Writes through `param.data`, which raise no version, and memory given by assignment."""

    def on_train_batch_end(self, *_):
        for param in self.net[0].parameters():
            param.data.clamp_(-0.05, 0.05)
        self.net[2].weight.data = self.net[2].weight.data * 0.9

    def on_train_epoch_end(self):
        vector = nn.utils.parameters_to_vector(self.net[4].parameters())
        nn.utils.vector_to_parameters(vector * 0.9, self.net[4].parameters())


class Alias(Reads):
    """Views that are made once and read, and written, at every step."""

    def on_fit_start(self):
        self.views = [self.net[0].weight.data, self.net[2].weight.detach().view(-1), self.net[4].bias.detach().numpy()]

    def training_step(self, batch, batch_idx):
        self.seen += [float(view.sum()) for view in self.views]
        self.views[1].clamp_(-0.04, 0.04)
        return super().training_step(batch, batch_idx)

    def on_fit_end(self):
        self.views = []


class InEveryHook(Reads):
    """Looks at all weights in every hook that Lightning has, whatever its name."""

    def lr_scheduler_step(self, scheduler, metric):
        self.see()
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


# These run only with checkpoints.
_OF_CHECKPOINTS = {"on_load_checkpoint", "on_save_checkpoint"}


def _looking(name):
    def hook(self, *args, **kwargs):
        self.see()
        result = getattr(super(InEveryHook, self), name)(*args, **kwargs)
        self.see()
        return result

    return hook


for _name in dir(L.LightningModule):
    if _name.startswith("on_") and _name not in _OF_CHECKPOINTS:
        setattr(InEveryHook, _name, _looking(_name))

MODULES = (Teacher, Prototypes, PenaltyFirst, AsData, Alias, InEveryHook)


def outcome(cls, strategy, devices: int = 1, **flags):
    """What a module saw, and its weights after two epochs."""
    module = cls()
    run = trainer(strategy, devices=devices, **flags)
    run.fit(module, loader(), loader(16))
    return module.seen, {name: value.detach().clone() for name, value in module.state_dict().items()}


def differences(expected, found) -> list[str]:
    """What two outcomes have not alike, to the last bit."""
    wrong = [name for name, value in expected[1].items() if not torch.equal(value, found[1][name])]
    return (
        wrong
        + [
            f"seen[{i}]: {b} instead of {a}"
            for i, (a, b) in enumerate(zip(expected[0], found[0], strict=True))
            if a != b
        ][:3]
    )


class ClipsThenLooks(Reads):
    """Looks at clipped gradients, and adds to them, as DP-SGD adds its noise after clipping."""

    def on_after_backward(self):
        self.seen.append(float(sum(p.grad.double().sum() for p in self.net.parameters())))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for param in self.net.parameters():
            self.seen.append(float(param.grad.double().sum()))
            param.grad.add_(0.01)


class ClipsByHand(Reads):
    """As above, under manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        for param in self.net.parameters():
            self.seen.append(float(param.grad.double().sum()))
            param.grad.add_(0.01)
        optimizer.step()


class StartsOver(Reads):
    """Empties, edits and reads the optimizer's own state between steps."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        state = self.optimizers().optimizer.state
        self.seen += [float(state[p]["exp_avg"].double().sum()) for p in self.net.parameters() if p in state]
        if batch_idx == 1:
            state.clear()
        if batch_idx == 3:
            for own in state.values():
                own["exp_avg"].mul_(0.5)


class LoadsStates(Reads):
    """Gives the optimizer whole states, as `optimizer.load_state_dict` leaves them."""

    def on_train_epoch_start(self):
        optimizer = self.optimizers().optimizer
        params = list(self.net.parameters())
        state = {
            i: {"step": torch.tensor(3.0), "exp_avg": torch.full(p.shape, 0.1), "exp_avg_sq": torch.full(p.shape, 0.2)}
            for i, p in enumerate(params)
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
