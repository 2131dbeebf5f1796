"""The LightningModule: loss, validation in bits per byte, AdamW with warmup and cosine decay."""

from __future__ import annotations

import math
from dataclasses import asdict

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from examples.language_model.model import GPT, GPTConfig


class LanguageModel(L.LightningModule):
    """Trains a GPT to predict the next byte. Nothing in here knows which strategy runs it.

    Args:
        gpt: the model's shape.
        lr: peak learning rate.
        min_lr_ratio: the last step's learning rate, as a share of the peak.
        warmup_steps: steps over which the learning rate rises.
        weight_decay: of matrices; vectors (norms) and the embedding are not decayed.
        betas: AdamW's.
    """

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),  # noqa: B008 (frozen)
        lr: float = 3e-3,
        min_lr_ratio: float = 0.05,
        warmup_steps: int = 40,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__()
        # load_from_checkpoint gives back what is saved here: plain values, which a checkpoint can hold safely.
        gpt = GPTConfig(**gpt) if isinstance(gpt, dict) else gpt
        self.save_hyperparameters(
            {
                "gpt": asdict(gpt),
                "lr": lr,
                "min_lr_ratio": min_lr_ratio,
                "warmup_steps": warmup_steps,
                "weight_decay": weight_decay,
                "betas": tuple(betas),
            }
        )
        self.gpt = GPT(gpt)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean negative log-likelihood in nats per byte, fp32."""
        inputs_BT, targets_BT = batch
        logits_BTV = self.gpt(inputs_BT)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    def on_fit_start(self) -> None:
        explain = getattr(self.trainer.strategy, "explain", None)
        if explain is not None:
            self.print(f"\n{explain()}\n")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        # Loggers take this as their step. Lightning's own count is one too high after a resume from a
        # checkpoint of an epoch's end.
        self.log("step", self.global_step + 1.0)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        bits = self.loss(batch) / math.log(2)
        self.log("val_bits_per_byte", bits, prog_bar=True, batch_size=len(batch[0]))
        self.log("step", float(self.global_step), batch_size=len(batch[0]))

    def parameter_groups(self) -> list[dict]:
        """Matrices, which decay, and the rest."""
        matrices = [p for name, p in self.named_parameters() if p.ndim > 1 and "embedding" not in name]
        rest = [p for name, p in self.named_parameters() if p.ndim <= 1 or "embedding" in name]
        return [
            {"params": matrices, "weight_decay": self.hparams.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.hparams.lr, betas=self.hparams.betas)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_ratio(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_ratio(self, step: int, total_steps: int) -> float:
        """Linear from 0 over the warmup, then cosine down to `min_lr_ratio` at the last step."""
        warmup = min(self.hparams.warmup_steps, total_steps // 2)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        low = self.hparams.min_lr_ratio
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
