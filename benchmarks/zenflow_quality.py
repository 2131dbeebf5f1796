"""What ZenFlow's staleness costs in quality: `python benchmarks/zenflow_quality.py`.

The demo's language model, fp32, the same tokens in the same order for everybody, with each rule of ZenFlow on and off,
beside plain AdamW: from scratch on the demo's text, and fine-tuned on this repository's documentation from the weights
that AdamW made of the demo's text. AdamW and the defaults fine-tune at other peak rates too.
What counts is the validation loss at the end, in nats per byte, as its distance from AdamW's with the same seed and
rate. The last line is JSON. Exits with 1 when the judged variant's mean distance is above the limit.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.language_model import quiet_trainer  # noqa: E402
from benchmarks.step_cost import conclude, hardware  # noqa: E402

WARM = {"warmup_steps": 200}
# By task; None is plain AdamW.
VARIANTS: dict[str, dict[str, dict[str, Any] | None]] = {
    "fine-tune": {
        "adamw": None,
        "default": {},
        "delay_correction=0": {"delay_correction": 0.0},
        "overlap=False": {"overlap": False},
        "deferred_lr='sqrt'": {"deferred_lr": "sqrt"},
        "deferred_lr=1.0": {"deferred_lr": 1.0},
        "topk=0": {"topk": 0.0},
        "update_interval=8": {"update_interval": 8},
        "update_interval=16": {"update_interval": 16},
    },
    "scratch": {
        "adamw": None,
        "warmup_steps=200": WARM,
        "warmup_steps=200, delay_correction=0": {**WARM, "delay_correction": 0.0},
        "warmup_steps=200, overlap=False": {**WARM, "overlap": False},
        "warmup_steps=200, deferred_lr='sqrt'": {**WARM, "deferred_lr": "sqrt"},
        "default": {},
    },
}
TASKS = tuple(VARIANTS)
LIMITS = {"fine-tune": 0.01, "scratch": 0.05}  # nats, of the mean distance from AdamW
JUDGED = {"fine-tune": "default", "scratch": "warmup_steps=200"}
LEARNING_RATES = {"fine-tune": 1e-3, "scratch": 2e-3}
OTHER_RATES = {"fine-tune": (3e-4, 2e-3), "scratch": ()}


def train(
    task: str, options: dict[str, Any] | None, seed: int, steps: int, start: Path | None, lr: float
) -> tuple[float, Any]:
    """Validation loss at the end, in nats per byte, and the module."""
    import lightning as L
    import torch

    import lightning_superscale as lss
    from examples.language_model.data import TextData
    from examples.language_model.model import GPTConfig
    from examples.language_model.module import LanguageModel

    warnings.simplefilter("ignore")
    L.seed_everything(seed)
    module = LanguageModel(GPTConfig(num_layers=2, dim=96, num_heads=3, num_kv_heads=3), lr=lr)
    module.on_fit_start = lambda: None  # type: ignore[method-assign]  # prints the plan
    if start is not None:
        module.load_state_dict(torch.load(start, weights_only=True))
    offload = None if options is None else {"engine": "zenflow", "gpu_fraction": 0, "zenflow": options}
    trainer = quiet_trainer(
        steps,
        steps,
        strategy=lss.SuperScaleStrategy(zero=0, offload=offload),
    )
    data = TextData(
        REPOSITORY / "docs" if task == "fine-tune" else None, seq_len=128, batch_size=8, num_val_windows=128, seed=seed
    )
    trainer.fit(module, datamodule=data)
    return float(trainer.callback_metrics["val_bits_per_byte"]) * math.log(2), module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 1500), help="of fine-tuning, and from scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="*", default=None, help="beside AdamW; all if not given")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None, help="a PNG of the table; needs matplotlib")
    options = parser.parse_args()

    import torch

    import lightning_superscale as lss

    torch.set_num_threads(options.threads)
    os.environ.setdefault("LSS_PROFILE", "off")
    steps = dict(zip(TASKS, options.steps, strict=True))
    losses: dict[str, dict[str, list[float]]] = {task: {} for task in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for task, name, zenflow, lr in runs(options.variants):
                start = Path(folder, f"{seed}.pt")
                loss, module = train(task, zenflow, seed, steps[task], start if task == "fine-tune" else None, lr)
                if (task, name) == ("scratch", "adamw"):
                    torch.save(module.state_dict(), start)
                losses[task].setdefault(name, []).append(loss)
                print(f"{task}, {name}, seed {seed}: {loss:.4f} nats per byte", file=sys.stderr, flush=True)
    rows, checks = table_of(losses)
    if options.picture is not None:
        draw(rows, options.picture)
    report = {
        "benchmark": "zenflow_quality",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "lightning_superscale": lss.__version__},
        "steps": steps,
        "rows": rows,
        "checks": checks,
    }
    return conclude(report, options.json)


def runs(chosen: list[str] | None) -> Iterator[tuple[str, str, dict[str, Any] | None, float]]:
    """Task, variant, its options and the peak learning rate; AdamW from scratch first, whose weights are fine-tuned."""
    for task in reversed(TASKS):
        for name, zenflow in VARIANTS[task].items():
            if zenflow is None or chosen is None or name in chosen:
                yield task, name, zenflow, LEARNING_RATES[task]
        for lr in OTHER_RATES[task]:
            for name in ("adamw", JUDGED[task]):
                yield task, f"{name}, lr={lr:g}", VARIANTS[task][name], lr


def table_of(losses: dict[str, dict[str, list[float]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Print the table; returns its rows, and the checks."""
    rows, checks = [], []
    print(f"{'task':<11}{'variant':<38}{'loss':>8}{'minus AdamW, by seed':>34}")
    for task in TASKS:
        for name, by_seed in losses[task].items():
            _, _, rate = name.partition(", lr=")
            its_adamw = losses[task][f"adamw, lr={rate}" if rate else "adamw"]
            deltas = [a - b for a, b in zip(by_seed, its_adamw, strict=True)]
            mean = statistics.mean(by_seed)
            rows.append(
                {"task": task, "variant": name, "loss": round(mean, 4), "deltas": [round(d, 4) for d in deltas]}
            )
            print(f"{task:<11}{name:<38}{mean:>8.4f}{', '.join(f'{d:+.4f}' for d in deltas):>34}")
            if name == JUDGED[task]:
                measured = round(abs(statistics.mean(deltas)), 4)
                what = f"{task}: {name}, distance from AdamW in nats per byte"
                checks.append(
                    {"check": what, "measured": measured, "limit": LIMITS[task], "met": measured <= LIMITS[task]}
                )
    return rows, checks


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each variant's distance from AdamW, one dot per seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(TASKS), 1, figsize=(8, 6), layout="constrained")
    for task, axis in zip(TASKS, axes, strict=True):
        shown = [row for row in rows if row["task"] == task][::-1]
        axis.axvspan(-LIMITS[task], LIMITS[task], color="0.9", label=f"within {LIMITS[task]} nats")
        axis.axvline(0, color="0.5", linewidth=1)
        for at, row in enumerate(shown):
            axis.plot(row["deltas"], [at] * len(row["deltas"]), "o", color="C0", alpha=0.6)
            axis.plot([statistics.mean(row["deltas"])], [at], "|", color="C3", markersize=14, markeredgewidth=2)
        axis.set_yticks(range(len(shown)), [row["variant"] for row in shown])
        axis.set_title(task, fontsize=10)
        axis.legend(fontsize=8)
    figure.supxlabel("validation loss minus AdamW's, nats per byte (dots: seeds, bars: their means)", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
