"""Train the demo's GPT in a Fabric loop with `Fabric(strategy="superoffload")`, and go on under the Trainer and back.

    python examples/fabric/train.py                  # 60 steps in a loop of our own
    python examples/fabric/train.py --loop trainer   # 60 more under the Trainer, from the loop's checkpoint
    python examples/fabric/train.py                  # and 60 more in the loop, from the Trainer's

`--fresh` starts anew. `--strategy zero3 --devices 2` shards everything over two processes; the next run may have
another strategy and another number of them.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# torch's threads spin while they wait, which on busy cores slows a step many times over. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout, installed or not

import lightning as L  # noqa: E402
import torch  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import lightning_superscale  # noqa: E402 (registers the strategy names)
from examples.language_model.data import DataError, RandomWindows, TextData  # noqa: E402
from examples.language_model.module import LanguageModel  # noqa: E402
from lightning_superscale import UniversalCheckpointIO  # noqa: E402

WARMUP_STEPS = 20
CLIP = 1.0


def optimizer_of(module: LanguageModel) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW and a schedule that does not depend on where a run ends; it counts the steps of all runs."""
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=module.hparams.lr, betas=module.hparams.betas)
    return optimizer, LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))


def batches(windows: RandomWindows, size: int, first: int, steps: int, rank: int, world: int) -> Iterator[list[Tensor]]:
    """This rank's part of the batches from step `first` on: the same windows whatever the number of ranks."""
    for step in range(first, first + steps):
        own = [windows[i] for i in range(step * size + rank, (step + 1) * size, world)]
        yield [torch.stack(column) for column in zip(*own, strict=True)]


def run_fabric(options: argparse.Namespace, data: TextData) -> None:
    fabric = Fabric(strategy=options.strategy, precision=options.precision, devices=options.devices, accelerator="auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    plain = LanguageModel()
    optimizer, schedule = optimizer_of(plain)
    module, optimizer = fabric.setup(plain, optimizer)
    module.mark_forward_method("loss")
    state = {"model": module, "optimizer": optimizer, "schedule": schedule}
    if options.checkpoint.exists():
        fabric.load(options.checkpoint, state)  # of a loop's or of a Trainer's run
    fabric.print(f"Fabric, {options.strategy}, from step {schedule.last_epoch}", flush=True)

    windows = RandomWindows(data.corpus.train, data.seq_len, seed=0)
    parts = batches(windows, data.batch_size, schedule.last_epoch, options.steps, fabric.global_rank, fabric.world_size)
    for batch in parts:
        loss = module.loss(fabric.to_device(batch))
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if schedule.last_epoch % 20 == 0:
            fabric.print(f"step {schedule.last_epoch:>4}  training loss {loss.item():.3f}", flush=True)

    with torch.no_grad():
        losses = [module.loss(fabric.to_device(batch)) for batch in data.val_dataloader()]
    print_bits(fabric.print, torch.stack(losses).mean().item(), schedule.last_epoch, data)
    fabric.save(options.checkpoint, state)
    fabric.strategy.teardown()


class UnderTrainer(LanguageModel):
    """The same module, optimizer and batches, as the Trainer calls them."""

    def __init__(self, data: TextData, steps: int) -> None:
        super().__init__()
        self.data, self.steps = data, steps

    @property
    def schedule(self) -> LambdaLR:
        return self.trainer.lr_scheduler_configs[0].scheduler

    def configure_optimizers(self) -> dict:
        optimizer, schedule = optimizer_of(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        print(f"Trainer, from step {self.schedule.last_epoch}", flush=True)
        windows = RandomWindows(self.data.corpus.train, self.data.seq_len, seed=0)
        parts = batches(windows, self.data.batch_size, self.schedule.last_epoch, self.steps, 0, 1)
        return DataLoader(list(parts), batch_size=None)

    def on_fit_start(self) -> None:
        pass  # the demo prints the plan here


def run_trainer(options: argparse.Namespace, data: TextData) -> None:
    L.seed_everything(0, verbose=False)
    module = UnderTrainer(data, options.steps)
    trainer = L.Trainer(
        strategy=options.strategy,
        precision=options.precision,
        gradient_clip_val=CLIP,
        devices=1,
        max_epochs=1,  # of as many batches as there are steps to take
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        plugins=[UniversalCheckpointIO()],
    )
    trainer.fit(module, ckpt_path=options.checkpoint if options.checkpoint.exists() else None)
    trainer.save_checkpoint(options.checkpoint)
    [metrics] = trainer.validate(module, data, verbose=False)
    print_bits(print, metrics["val_bits_per_byte"] * math.log(2), module.schedule.last_epoch, data)


def print_bits(to: Callable[[str], None], loss: float, step: int, data: TextData) -> None:
    entropy = data.corpus.validation_order0_bits
    to(f"After {step} steps: {loss / math.log(2):.3f} bits per byte in validation (order-0 entropy: {entropy:.3f})")


def parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", default="fabric", choices=("fabric", "trainer"))
    parser.add_argument("--data", default=None, help="text file or directory (default: the Python standard library)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a step, over all processes")
    parser.add_argument("--strategy", default="superoffload")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--devices", type=int, default=1, help="processes of the Fabric loop")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fabric/checkpoint"))
    parser.add_argument("--fresh", action="store_true", help="start anew")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options = parse_args(args)
    if options.fresh and "LOCAL_RANK" not in os.environ:  # the process that starts the others
        shutil.rmtree(options.checkpoint, ignore_errors=True)
    started = time.perf_counter()
    try:
        data = TextData(options.data, seq_len=options.seq_len, batch_size=options.batch_size, num_val_windows=64)
        (run_fabric if options.loop == "fabric" else run_trainer)(options, data)
    except (DataError, lightning_superscale.SuperScaleError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] == "0":
        print(f"Checkpoint: {options.checkpoint}, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
