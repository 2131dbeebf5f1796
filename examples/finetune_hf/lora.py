"""Fine-tune an unmodified Hugging Face model with LoRA (peft) under any strategy, and save the adapter alone.

    python examples/finetune_hf/finetune.py                   # makes the base model
    python examples/finetune_hf/lora.py                       # adapts it to English prose
    python examples/finetune_hf/lora.py --strategy zero3

The base model's weights are frozen, so only the adapter has gradients, masters and moments. The adapter is what peft
saves and loads: a few files beside a base model that stays as it is.
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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from examples.finetune_hf.finetune import reload_weights
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

PROSE = Path(__file__).resolve().parents[2] / "docs"  # this package's documentation


def adapted(base: PreTrainedModel, rank: int = 8) -> PeftModel:
    """The base model with an adapter in every attention."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))


def run(options: argparse.Namespace) -> None:
    L.seed_everything(0, verbose=False)
    data = data_of(options)

    def base() -> PreTrainedModel:
        if options.base.exists():
            return reload_weights(options.base, options.seq_len)
        torch.manual_seed(0)
        return build_llama(options.seq_len)

    if not options.base.exists():
        print(f"No base model at {options.base}: adapting random weights. Run finetune.py first.")
    module = FineTuner(adapted(base()), options.lr, warmup_steps=max(1, options.steps // 10))
    trainable, total = module.model.get_nb_trainable_parameters()
    print(f"{trainable:,} of {total:,} parameters train")
    trainer = trainer_of(options)
    before = validation_loss(trainer, module, data)
    trainer.fit(module, data)
    after = validation_loss(trainer, module, data)
    if trainer.is_global_zero:  # after fit() every rank has whole weights
        module.model.save_pretrained(options.output)
    size = sum(file.stat().st_size for file in Path(options.output).iterdir())
    module.model = PeftModel.from_pretrained(base().to(torch.bfloat16), options.output)
    loaded = validation_loss(trainer, module, data)
    rows = [("before", before), ("after", after), (f"after, adapter loaded by peft from {options.output}", loaded)]
    print_losses(data, rows)
    print(f"The adapter takes {size / 1e3:.0f} kB")


def main(args: list[str] | None = None) -> int:
    parser = options_of(__doc__, "runs/finetune_hf/adapter", steps=60)
    parser.set_defaults(data=str(PROSE))
    parser.add_argument("--base", type=Path, default=Path("runs/finetune_hf/model.ckpt"), help="of finetune.py")
    return run_as_program(functools.partial(run, parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
