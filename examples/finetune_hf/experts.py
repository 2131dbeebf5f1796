"""Train an unmodified Hugging Face mixture of experts, whose experts are each left out by some steps.

    python examples/finetune_hf/experts.py
    python examples/finetune_hf/experts.py --strategy zero3

A Switch Transformer's encoder fills in bytes that are hidden from it. Each byte goes to one expert. An expert that no
byte of a step went to has no gradient, and the step leaves it as it is, moments and weight decay included, as AdamW in
a plain process does.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

# torch's threads spin while they wait, which on busy cores slows a step many times over. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

import lightning as L
import torch
from torch import Tensor, nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from examples.finetune_hf.training import (
    FineTuner,
    data_of,
    options_of,
    print_losses,
    run_as_program,
    trainer_of,
    validation_loss,
)

HIDDEN = 256  # the token that stands for a hidden byte
HIDDEN_SHARE = 0.15


def build_encoder(num_experts: int, width: int = 96, num_layers: int = 4) -> SwitchTransformersEncoderModel:
    """An encoder over bytes; every second block has experts."""
    config = SwitchTransformersConfig(
        vocab_size=257,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=num_layers,
        num_heads=4,
        num_experts=num_experts,
        num_sparse_encoder_layers=num_layers // 2,
        expert_capacity=64,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    return SwitchTransformersEncoderModel(config)


class FillIn(FineTuner):
    """Predicts hidden bytes, and counts the experts that steps have left out."""

    def __init__(self, model: SwitchTransformersEncoderModel, lr: float, warmup_steps: int) -> None:
        super().__init__(model, lr, warmup_steps)
        self.head = nn.Linear(model.config.d_model, 256)
        self.num_left_out: list[int] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, _ = batch
        generator = torch.Generator().manual_seed(int(inputs.sum()))  # the same places whenever a batch comes
        is_hidden = (torch.rand(inputs.shape, generator=generator) < HIDDEN_SHARE).to(inputs.device)
        states = self.model(input_ids=inputs.masked_fill(is_hidden, HIDDEN)).last_hidden_state
        return nn.functional.cross_entropy(self.head(states[is_hidden]).float(), inputs[is_hidden])

    def on_after_backward(self) -> None:
        experts = [part for name, part in self.model.named_modules() if name.rpartition(".")[2].startswith("expert_")]
        self.num_left_out.append(sum(all(p.grad is None for p in expert.parameters()) for expert in experts))


def run(options: argparse.Namespace) -> None:
    L.seed_everything(0, verbose=False)
    data = data_of(options)
    module = FillIn(build_encoder(options.experts), options.lr, warmup_steps=max(1, options.steps // 10))
    trainer = trainer_of(options)
    before = validation_loss(trainer, module, data)
    trainer.fit(module, data)
    rows = [("before", before), ("after", validation_loss(trainer, module, data))]
    print_losses(data, rows)
    mean = sum(module.num_left_out) / max(1, len(module.num_left_out))
    print(f"Experts that a step left out: {mean:.1f} of {2 * options.experts} in the mean")


def main(args: list[str] | None = None) -> int:
    parser = options_of(__doc__, "", steps=60)
    parser.set_defaults(precision="bf16-mixed")  # the model's router gives itself fp32 weights in forward
    parser.add_argument("--experts", type=int, default=16, help="of each sparse block")
    return run_as_program(functools.partial(run, parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
