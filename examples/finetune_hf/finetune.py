"""Fine-tune an unmodified Hugging Face causal LM with `Trainer(strategy="superoffload")`.

    python examples/finetune_hf/finetune.py --steps 40

The model is built from its config, so nothing is downloaded: a small Llama with tied embeddings over bytes.
With weights at hand, `LlamaForCausalLM(config)` becomes `AutoModelForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout, installed or not

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402

import lightning_superscale  # noqa: E402 (registers the strategy names)
from examples.language_model.data import DataError, TextData  # noqa: E402


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
        self.print(f"\n{self.trainer.strategy.explain()}\n")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if (self.global_step + 1) % 20 == 0:
            self.print(f"step {self.global_step + 1:>4}  training loss {loss.item():.3f}", flush=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build_model(seq_len: int) -> LlamaForCausalLM:
    """A Llama of 2 M parameters over bytes, input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def reload_weights(checkpoint: Path, seq_len: int) -> LlamaForCausalLM:
    """A fresh Hugging Face model with the weights of the Lightning checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model = build_model(seq_len)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval()


def parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="text file or directory (default: the Python standard library)")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--strategy", default="superoffload", choices=("superoffload", "superscale"))
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_hf/model.ckpt"))
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> None:
    L.seed_everything(0, verbose=False)
    data = TextData(options.data, seq_len=options.seq_len, batch_size=options.batch_size, num_val_windows=64)
    module = FineTuner(build_model(options.seq_len), options.lr, warmup_steps=max(1, options.steps // 10))
    trainer = L.Trainer(
        strategy=options.strategy,
        precision="bf16-true",
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
    before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    trainer.fit(module, data)
    trainer.save_checkpoint(options.output)
    after = trainer.validate(module, data, verbose=False)[0]["val_loss"]

    module.model = reload_weights(options.output, options.seq_len)
    reloaded = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    entropy = data.corpus.validation_order0_bits
    print(f"\nValidation loss in nats per byte, and bits (order-0 entropy: {entropy:.3f} bits)")
    rows = [("before", before), ("after", after), (f"after, weights reloaded from {options.output}", reloaded)]
    for name, loss in rows:
        print(f"  {loss:.4f} ({loss / math.log(2):.3f})  {name}")


def main(args: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        run(parse_args(args))
    except (DataError, lightning_superscale.SuperScaleError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
