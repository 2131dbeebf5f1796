"""ZenFlow by hand as an optimizer of plain Lightning, and a module whose parameters are of every kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import lightning as L
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_superscale.config import ZenFlowConfig
from lightning_superscale.ops.state_dtypes import FP32_STATES, StateDtypes
from lightning_superscale.optim.param_update import adamw_hyper
from tests.helpers.zenflow_by_hand import Share, ZenFlowByHand


class ByHandAdamW(torch.optim.AdamW):
    """AdamW as ZenFlow has it, one matrix operation after the other; the oracle of whole trainings.

    Args:
        names: of all parameters.
        whole: parameters that the host has whole.
        resident: those that the device has whole, which are stepped as by AdamW.
        max_norm, clip_value: clip gradients in fp32, where Lightning's own clipping would round to 16 bits.
        dtypes: of masters and moments.
    """

    def __init__(
        self,
        params,
        config: ZenFlowConfig,
        *,
        names: Mapping[nn.Parameter, str],
        whole: Collection[nn.Parameter] = (),
        resident: Collection[nn.Parameter] = (),
        max_norm: float | None = None,
        clip_value: float | None = None,
        dtypes: StateDtypes = FP32_STATES,
        **adamw,
    ) -> None:
        super().__init__(params, **adamw)
        self.names = names
        self.whole, self.resident = set(whole), set(resident)
        self.max_norm, self.clip_value = max_norm, clip_value
        self.by_hand = ZenFlowByHand(nn.Module(), config, dtypes=dtypes)
        self.counts: dict[nn.Parameter, int] = {}

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.meet()
        params, scale = [param for group in self.param_groups for param in group["params"]], 1.0
        if self.max_norm is not None:
            norm = nn.utils.get_total_norm([param.grad.float() for param in params if param.grad is not None])
            scale = float((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        hypers = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.counts[param] += 1
                    hypers[param] = adamw_hyper(
                        self, group, self.counts[param], scale, self.clip_value, device=torch.device("cpu")
                    )
        self.by_hand.step([hypers.get(one.weight) for one in self.by_hand.of])
        return loss

    def meet(self) -> None:
        """Begin with the parameters of groups that are new."""
        params = [param for group in self.param_groups for param in group["params"]]
        new = [param for param in params if param not in self.counts]
        self.by_hand.take((self.names[param], self._kind(param), param) for param in new)
        self.counts.update(dict.fromkeys(new, 0))

    def _kind(self, param: nn.Parameter) -> Share:
        return "resident" if param in self.resident else "whole" if param in self.whole else "split"

    def finish(self) -> None:
        """Apply all that is kept back."""
        self.by_hand.finish()


class Zoo(L.LightningModule):
    """Parameters of every kind: convolutions, an embedding tied to the head, weights of three memory formats, a
    scalar, empty ones, some whose gradient is zero, some that every other batch uses, a frozen and an unused one.

    Args:
        by_hand: ZenFlow by hand steps it, with these options; None for AdamW.
        options: more arguments of `ByHandAdamW`, parameters by name.
        recomputes: whether activations are made anew in backward.
    """

    def __init__(self, by_hand: ZenFlowConfig | None = None, options: dict | None = None, *, recomputes: bool = False):
        super().__init__()
        torch.manual_seed(3)
        self.by_hand, self.options, self.recomputes = by_hand, options or {}, recomputes
        self.inp = nn.Linear(17, 24)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.embed = nn.Embedding(11, 9)
        self.head = nn.Linear(9, 11, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(9, 7).t() * 0.3)
        self.inside = nn.Parameter(torch.randn(3, 5, 4).permute(1, 0, 2))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty, self.hollow = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(3, 0))
        self.silent = nn.Linear(17, 5)
        self.sometimes = nn.Linear(17, 9)
        self.norm = nn.LayerNorm(9)
        self.mix = nn.Linear(72, 9)
        self.out = nn.Linear(7, 5)
        self.unused = nn.Linear(4, 6)
        self.frozen = nn.Linear(11, 5).requires_grad_(False)
        self.num_batches = 0

    def body(self, x: torch.Tensor) -> torch.Tensor:
        image = nn.functional.gelu(self.inp(x)).view(-1, 1, 4, 6)
        image = self.last(nn.functional.gelu(self.conv(image)).contiguous(memory_format=torch.channels_last))
        return self.norm(self.mix(image.flatten(1)) * self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.body, x, use_reentrant=False) if self.recomputes else self.body(x)
        h = h + self.embed((x[:, :4].float().abs() * 10).long() % 11).mean(1)
        if self.num_batches % 2 == 0:
            h = h + self.sometimes(x)
        y = self.out(h @ self.turned.t()) + self.frozen(self.head(h)) + 0.0 * self.silent(x)
        return y + torch.einsum("oij,bj->bo", 0.1 * self.inside, x[:, :4]) + self.empty.sum() + self.hollow.sum()

    def loss(self, batch) -> torch.Tensor:
        return nn.functional.mse_loss(self(batch[0]).float(), batch[1].float())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.num_batches += 1
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def groups(self) -> list[dict]:
        """Two groups: the second has its own learning rate, weight decay, betas and eps."""
        first = [*self.inp.parameters(), *self.mix.parameters(), self.turned, self.scale, self.empty, self.inside]
        rest = [param for param in self.parameters() if not any(param is one for one in first)]
        other = {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.8, 0.97), "eps": 1e-6}
        return [{"params": first}, {"params": rest, **other}]

    def optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        if self.by_hand is None:
            return torch.optim.AdamW(groups, lr=1e-2)
        params = dict(self.named_parameters())
        resident = [params[name] for name in self.options.get("resident", ())]
        names = {param: name for name, param in params.items()}
        options = {**self.options, "names": names, "resident": resident, "whole": [self.inside]}
        return ByHandAdamW(groups, self.by_hand, lr=1e-2, **options)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.groups())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def teardown(self, stage):
        if self.by_hand is not None and self.finishes:
            optimizers = self.optimizers()
            for one in optimizers if isinstance(optimizers, list) else [optimizers]:
                one.optimizer.finish()

    finishes = True
