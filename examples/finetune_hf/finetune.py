"""Fine-tune an unmodified Hugging Face causal LM with `Trainer(strategy="superoffload")`.

    python examples/finetune_hf/finetune.py --steps 40
    python examples/finetune_hf/finetune.py --gradient_checkpointing

The model is built from its config, so nothing is downloaded: a small Llama with tied embeddings over bytes.
With weights at hand, `LlamaForCausalLM(config)` becomes `AutoModelForCausalLM.from_pretrained(...)`.
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
from transformers import LlamaForCausalLM, PreTrainedModel

from examples.finetune_hf.training import (
    FineTuner,
    build_llama,
    data_of,
    options_of,
    print_losses,
    run_as_program,
    trainer_of,
    validation_loss,
)


def reload_weights(checkpoint: Path, seq_len: int) -> LlamaForCausalLM:
    """A fresh Hugging Face model with the weights of the Lightning checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model = build_llama(seq_len)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval()


def activation_bytes(model: PreTrainedModel, seq_len: int, batch_size: int) -> int:
    """Bytes that a forward keeps for backward, apart from the weights themselves."""
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.train()(input_ids=torch.zeros(batch_size, seq_len, dtype=torch.long), use_cache=False).logits
    del out
    return sum(kept.values())


def run(options: argparse.Namespace) -> None:
    L.seed_everything(0, verbose=False)
    data, model = data_of(options), build_llama(options.seq_len)
    if options.gradient_checkpointing:
        before = activation_bytes(model, options.seq_len, options.batch_size)
        model.gradient_checkpointing_enable()
        after = activation_bytes(model, options.seq_len, options.batch_size)
        print(f"Activations that forward keeps in fp32: {before / 1e6:.0f} MB, with checkpointing {after / 1e6:.0f} MB")
    module = FineTuner(model, options.lr, warmup_steps=max(1, options.steps // 10))
    trainer = trainer_of(options)
    before_loss = validation_loss(trainer, module, data)
    trainer.fit(module, data)
    trainer.save_checkpoint(options.output)
    after_loss = validation_loss(trainer, module, data)
    module.model = reload_weights(options.output, options.seq_len)
    rows = [
        ("before", before_loss),
        ("after", after_loss),
        (f"after, weights reloaded from {options.output}", validation_loss(trainer, module, data)),
    ]
    print_losses(data, rows)


def main(args: list[str] | None = None) -> int:
    parser = options_of(__doc__, "runs/finetune_hf/model.ckpt")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute blocks in backward")
    return run_as_program(functools.partial(run, parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
