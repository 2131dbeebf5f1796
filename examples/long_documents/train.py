"""Train the demo's GPT on long documents, the tokens of each shared between two processes.

    python examples/long_documents/train.py

One line differs from training on one device: `strategy=SuperScaleStrategy(sequence=2)`. Model, loss, data and logging
are the demo's, and know nothing of it. The script trains both ways with one seed and draws both loss curves; they
lie on one another.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

# torch's threads spin while they wait, which on busy cores slows a step many times over. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout, installed or not

import lightning as L  # noqa: E402
import torch  # noqa: E402

from examples.language_model.data import DataError, TextData  # noqa: E402
from examples.language_model.model import GPTConfig  # noqa: E402
from examples.language_model.module import LanguageModel  # noqa: E402
from examples.language_model.report import save  # noqa: E402
from lightning_superscale import SuperScaleError, SuperScaleStrategy  # noqa: E402
from lightning_superscale.sequence.memory.saved_bytes import SavedBytes  # noqa: E402


class Recorder(L.Callback):
    """Notes every loss, and the bytes of activations that this process kept for the first backward."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.saved_bytes = 0
        self._counts: SavedBytes | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if not self.losses:
            self._counts = SavedBytes(apart_from=module.parameters())
            self._counts.__enter__()

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: torch.Tensor) -> None:
        if self._counts is not None:
            self._counts.__exit__(None, None, None)
            self.saved_bytes, self._counts = self._counts.nbytes, None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: dict, batch: object, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.is_global_zero and len(self.losses) % 10 == 0:
            print(f"  step {len(self.losses):>4}  loss {self.losses[-1]:.4f}", flush=True)


def train(options: argparse.Namespace) -> None:
    """One run; rank 0 writes what it recorded."""
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    data = TextData(options.data, seq_len=options.tokens, batch_size=options.batch_size, num_val_windows=4)
    module = LanguageModel(
        GPTConfig(context=options.tokens, num_layers=options.layers, dim=128, num_heads=4, num_kv_heads=2),
        warmup_steps=10,
    )
    recorder = Recorder()
    trainer = L.Trainer(
        strategy=SuperScaleStrategy(sequence=options.sequence),  # the line that differs
        accelerator="cpu",
        devices=options.sequence,
        gradient_clip_val=1.0,
        max_steps=options.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(module, data)
    if trainer.is_global_zero:
        reasons = [line for line in trainer.strategy.explain().splitlines() if "attend by" in line]
        found = {"losses": recorder.losses, "saved_bytes": recorder.saved_bytes, "reasons": reasons}
        options.write.write_text(json.dumps(found))


def run_of(size: int, options: argparse.Namespace) -> dict:
    """What a run over `size` processes recorded."""
    print(f"\n{'One process' if size == 1 else f'{size} processes share each sequence'}", flush=True)
    target = options.output / f"sequence-{size}.json"
    own = ["--sequence", str(size), "--write", str(target)]
    given = [f"--{name}={getattr(options, name)}" for name in ("tokens", "steps", "batch_size", "layers")]
    given += [] if options.data is None else [f"--data={options.data}"]
    subprocess.run([sys.executable, __file__, *own, *given], check=True)
    found: dict = json.loads(target.read_text())
    return found


def compare(options: argparse.Namespace) -> None:
    """Train on one process and on several, and draw both curves."""
    options.output.mkdir(parents=True, exist_ok=True)
    alone, shared = run_of(1, options), run_of(options.size, options)
    largest = max(abs(a - b) for a, b in zip(alone["losses"], shared["losses"], strict=True))
    target = options.output / "loss.png"
    draw(alone, shared, options, target)
    print(f"\nlargest difference between the losses of {options.steps} steps: {largest:.1e}")
    for name, found in (("one process", alone), (f"each of {options.size}", shared)):
        print(f"activations kept for backward by {name}: {found['saved_bytes'] / 2**20:.1f} MiB")
    print(*shared["reasons"], f"the curves: {target}", sep="\n")


def draw(alone: dict, shared: dict, options: argparse.Namespace, target: Path) -> None:
    """Both loss curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=130)
    axes.plot(alone["losses"], color="#9ec5e8", linewidth=5, label="one process")
    axes.plot(shared["losses"], color="#d1495b", linewidth=1.4, label=f"sequence={options.size}")
    axes.set_title(f"The demo's GPT on documents of {options.tokens} bytes", fontsize=11, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per byte")
    save(figure, axes, target)


def parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="text file or directory (default: the Python standard library)")
    parser.add_argument("--size", type=int, default=2, help="processes that share each sequence")
    parser.add_argument("--tokens", type=int, default=2048, help="bytes of each document")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/long_documents"))
    parser.add_argument("--sequence", type=int, default=None, help=argparse.SUPPRESS)  # this process is one run of two
    parser.add_argument("--write", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options = parse_args(args)
    try:
        if options.sequence is None:
            compare(options)
        else:
            train(options)
    except (DataError, SuperScaleError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
