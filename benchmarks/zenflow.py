"""What ZenFlow's staleness costs in quality: `python benchmarks/zenflow.py`.

The demo's language model, fp32, the same tokens in the same order for everybody, at several windows and learning rates
of deferred columns, beside plain AdamW: from scratch on the demo's text, and fine-tuned on this repository's
documentation from the weights that AdamW made of the demo's text. What counts is the validation loss at the end, in
nats per byte, as its distance from AdamW's with the same seed. The last line is JSON. Exits with 1 when the default's
mean distance is above the limit.
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
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.language_model import quiet_trainer  # noqa: E402
from benchmarks.step_cost import conclude, hardware  # noqa: E402

# None is plain AdamW.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "adamw": None,
    "default": {},
    "sync": {"overlap": False},
    "sqrt": {"deferred_lr": "sqrt"},
    "sqrt, 64 warm-up steps": {"deferred_lr": "sqrt", "warmup_steps": 64},
    "last rate": {"deferred_lr": 1.0},
    "no column": {"topk": 0.0},
}
TASKS = ("fine-tune", "scratch")
LIMITS = {"fine-tune": 0.01, "scratch": 0.1}  # nats, of the default and of "sqrt, 64 warm-up steps"
JUDGED = {"fine-tune": "default", "scratch": "sqrt, 64 warm-up steps"}
LEARNING_RATES = {"fine-tune": 3e-4, "scratch": 2e-3}


def train(task: str, options: dict[str, Any] | None, seed: int, steps: int, start: Path | None) -> tuple[float, Any]:
    """Validation loss at the end, in nats per byte, and the module."""
    import lightning as L
    import torch

    import lightning_superscale as lss
    from examples.language_model.data import TextData
    from examples.language_model.model import GPTConfig
    from examples.language_model.module import LanguageModel

    warnings.simplefilter("ignore")
    L.seed_everything(seed)
    module = LanguageModel(GPTConfig(num_layers=2, dim=96, num_heads=3, num_kv_heads=3), lr=LEARNING_RATES[task])
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
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="beside AdamW")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()

    import torch

    import lightning_superscale as lss

    torch.set_num_threads(options.threads)
    os.environ.setdefault("LSS_PROFILE", "off")
    variants = {name: VARIANTS[name] for name in ("adamw", *options.variants)}
    losses: dict[str, dict[str, list[float]]] = {task: {name: [] for name in variants} for task in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            start = Path(folder, f"{seed}.pt")
            _, pretrained = train("scratch", None, 100 + seed, options.steps, None)
            torch.save(pretrained.state_dict(), start)
            for task in TASKS:
                for name, zenflow in variants.items():
                    loss, _ = train(task, zenflow, seed, options.steps, start if task == "fine-tune" else None)
                    losses[task][name].append(loss)
                    print(f"{task}, {name}, seed {seed}: {loss:.4f} nats per byte", file=sys.stderr, flush=True)
    rows, checks = [], []
    print(f"{'task':<11}{'variant':<26}{'loss':>8}{'minus AdamW, by seed':>34}")
    for task in TASKS:
        for name in variants:
            deltas = [a - b for a, b in zip(losses[task][name], losses[task]["adamw"], strict=True)]
            mean = statistics.mean(losses[task][name])
            rows.append(
                {"task": task, "variant": name, "loss": round(mean, 4), "deltas": [round(d, 4) for d in deltas]}
            )
            print(f"{task:<11}{name:<26}{mean:>8.4f}{', '.join(f'{d:+.4f}' for d in deltas):>34}")
            if name == JUDGED[task]:
                measured = round(abs(statistics.mean(deltas)), 4)
                what = f"{task}: {name}, distance from AdamW in nats per byte"
                checks.append(
                    {"check": what, "measured": measured, "limit": LIMITS[task], "met": measured <= LIMITS[task]}
                )
    report = {
        "benchmark": "zenflow",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "lightning_superscale": lss.__version__},
        "steps": options.steps,
        "rows": rows,
        "checks": checks,
    }
    return conclude(report, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
