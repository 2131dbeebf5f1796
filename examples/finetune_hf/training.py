"""What the examples of this folder share: the LightningModule around a Hugging Face model, the Trainer, the options."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable

import lightning as L
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lightning_superscale  # registers the strategy names
from examples.language_model.data import DataError, TextData


class FineTuner(L.LightningModule):
    """Any Hugging Face causal LM. The model is used as it is; nothing in it is wrapped or replaced."""

    def __init__(self, model: PreTrainedModel, lr: float, warmup_steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.warmup_steps = model, lr, warmup_steps

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def on_fit_start(self) -> None:
        explain = getattr(self.trainer.strategy, "explain", None)
        if explain is not None:
            self.print(f"\n{explain()}\n")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if (self.global_step + 1) % 20 == 0:
            self.print(f"step {self.global_step + 1:>4}  training loss {loss.item():.3f}", flush=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> dict:
        trainable = [param for param in self.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build_llama(seq_len: int, hidden_size: int = 192, num_layers: int = 4) -> LlamaForCausalLM:
    """A Llama over bytes, 2 M parameters unless told otherwise, input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def options_of(doc: str, output: str, steps: int = 80) -> argparse.ArgumentParser:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="text file or directory (default: the Python standard library)")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--strategy", default="superoffload", help="superoffload, zero3, superscale, ...")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--output", default=output)
    return parser


def data_of(options: argparse.Namespace) -> TextData:
    return TextData(options.data, seq_len=options.seq_len, batch_size=options.batch_size, num_val_windows=64)


def trainer_of(options: argparse.Namespace) -> L.Trainer:
    return L.Trainer(
        strategy=options.strategy,
        precision=options.precision,
        gradient_clip_val=1.0,
        devices=1,
        max_steps=options.steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning_superscale.ScaleMonitor()],
    )


def validation_loss(trainer: L.Trainer, module: L.LightningModule, data: TextData) -> float:
    """Mean loss in nats per predicted byte."""
    return trainer.validate(module, data, verbose=False)[0]["val_loss"]


def print_losses(data: TextData, rows: Iterable[tuple[str, float]]) -> None:
    entropy = data.corpus.validation_order0_bits
    print(f"\nValidation loss in nats per byte, and bits (order-0 entropy: {entropy:.3f} bits)")
    for name, loss in rows:
        print(f"  {loss:.4f} ({loss / math.log(2):.3f})  {name}")


def run_as_program(run: Callable[[], None]) -> int:
    """Run, and say what the user can correct in one line; gives the exit code."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        run()
    except (DataError, lightning_superscale.SuperScaleError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
