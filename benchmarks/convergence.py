"""What low-precision states cost in quality: `python benchmarks/convergence.py [--picture curves.png]`.

The demo's language model on the demo's text, the same tokens in the same order for everybody: bf16 weights with fp32
masters and states, and with everything in bf16, rounded stochastically, with Kahan's compensation, or to nearest as
DeepSpeed does it. Per seed all begin with the same weights; what counts is the validation loss at the end, as a ratio
to that of fp32 masters with the same seed. The last line is JSON. Exits with 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.language_model import quiet_trainer  # noqa: E402
from benchmarks.step_cost import conclude, hardware  # noqa: E402

LOW = {"master_weights": "bf16", "optimizer_states": "bf16"}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "stochastic": LOW,
    "kahan": {**LOW, "kahan": True},
    "nearest": {**LOW, "stochastic_rounding": False},
}
LABELS = {
    "fp32": "fp32 masters and states",
    "stochastic": "all bf16, rounded stochastically",
    "kahan": "all bf16, compensated (Kahan)",
    "nearest": "all bf16, rounded to nearest",
}
STATE_BYTES = {"fp32": 14, "stochastic": 6, "kahan": 8, "nearest": 6}  # weights, masters and moments, per parameter
MOST_WORSE = 1.005


def train(variant: str, seed: int, steps: int, every: int, rounding_seed: int) -> dict[str, Any]:
    """One run: (step, bits per byte of validation) at every `every` steps."""
    import lightning as L
    import torch

    import lightning_superscale as lss
    from examples.language_model.data import TextData
    from examples.language_model.model import GPTConfig
    from examples.language_model.module import LanguageModel

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    L.seed_everything(seed)

    class Curve(L.Callback):
        points: list[tuple[int, float]] = []

        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.points.append((trainer.global_step, float(trainer.callback_metrics["val_bits_per_byte"])))

    curve = Curve()
    module = LanguageModel(GPTConfig(num_layers=4, dim=192, num_heads=3, num_kv_heads=1))
    module.on_fit_start = lambda: None  # type: ignore[method-assign]  # prints the plan
    trainer = quiet_trainer(
        steps,
        every,
        strategy="superscale",
        plugins=[lss.SuperScalePrecision("bf16-true", seed=rounding_seed + seed, **VARIANTS[variant])],
        callbacks=[curve],
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=TextData(seq_len=256, batch_size=8, num_val_windows=128))
    return {"variant": variant, "seed": seed, "points": curve.points, "seconds": round(time.perf_counter() - start, 1)}


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", f"{variant}:{seed}", "--steps", str(options.steps)]
    done = subprocess.run(
        [*command, "--every", str(options.every), "--rounding_seed", str(options.rounding_seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{variant}, seed {seed}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{LABELS[variant]}, seed {seed}: {result['points'][-1][1]:.4f} bits per byte", file=sys.stderr, flush=True)
    return result


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Mean curves over seeds, and how far each is from fp32 masters with the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, ratios) = plt.subplots(1, 2, figsize=(11, 4.2))
    colors = {"fp32": "black", "stochastic": "tab:blue", "kahan": "tab:green", "nearest": "tab:red"}
    by_run = {(r["variant"], r["seed"]): dict(map(tuple, r["points"])) for r in results}
    seeds = sorted({seed for _, seed in by_run})
    for variant, label in LABELS.items():
        steps = sorted(by_run[variant, seeds[0]])
        mean = [statistics.mean(by_run[variant, seed][step] for seed in seeds) for step in steps]
        curves.plot(steps, mean, color=colors[variant], label=f"{label} ({STATE_BYTES[variant]} B/param)")
        for seed in seeds:
            ratio = [100 * (by_run[variant, seed][step] / by_run["fp32", seed][step] - 1) for step in steps]
            ratios.plot(steps, ratio, color=colors[variant], alpha=0.7)
    ratios.axhspan(-0.5, 0.5, color="0.9", zorder=0)
    curves.set(xlabel="step", ylabel="validation, bits per byte", title=f"mean of {len(seeds)} seeds")
    curves.legend(frameon=False)
    ratios.set(xlabel="step", ylabel="% above fp32 masters, same seed", title="each seed; the band is 0.5 %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    final = {(r["variant"], r["seed"]): r["points"][-1][1] for r in results}
    seeds = sorted({seed for _, seed in final})
    return [
        {
            "name": variant,
            "label": LABELS[variant],
            "bits_per_byte": [round(final[variant, seed], 4) for seed in seeds],
            "mean": round(statistics.mean(final[variant, seed] for seed in seeds), 4),
            "ratios": [round(final[variant, seed] / final["fp32", seed], 5) for seed in seeds],
            "mean_ratio": round(statistics.mean(final[variant, s] / final["fp32", s] for s in seeds), 5),
        }
        for variant in VARIANTS
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--rounding_seed", type=int, default=0, help="added to each seed, for the rounding alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--picture", type=Path, help="draw the curves here")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        variant, _, seed = options.one.partition(":")
        print(json.dumps(train(variant, int(seed), options.steps, options.every, options.rounding_seed)))
        return 0
    start = time.perf_counter()
    jobs = [(variant, int(seed)) for seed in options.seeds.split(",") for variant in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: run(*job, options), jobs))
    rows = rows_of(results)
    tokens = options.steps * 8 * 256
    print(f"\n{options.steps} steps, {tokens:,} bytes of text, bits per byte of validation at the end\n")
    print(f"{'':40}{'B/param':>9}{'mean':>9}{'/ fp32':>9}   by seed")
    for row in rows:
        by_seed = ", ".join(f"{ratio:.4f}" for ratio in row["ratios"])
        print(f"{row['label']:40}{STATE_BYTES[row['name']]:9}{row['mean']:9.4f}{row['mean_ratio']:9.4f}   {by_seed}")
    if options.picture:
        draw(results, options.picture)
    measured = next(row["mean_ratio"] for row in rows if row["name"] == "stochastic")
    check = {"check": f"{LABELS['stochastic']} / fp32 masters, loss at the end", "limit": MOST_WORSE}
    checks = [check | {"measured": measured, "met": measured <= MOST_WORSE}]
    report = {
        "hardware": hardware(),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "steps": options.steps,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "curves": results,
        "checks": checks,
    }
    return conclude(report, options.json)


if __name__ == "__main__":
    sys.exit(main())
