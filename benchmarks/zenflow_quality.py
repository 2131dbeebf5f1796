"""What ZenFlow's staleness costs in quality: `python benchmarks/zenflow_quality.py`.

The demo's language model, fp32, the same tokens in the same order for everybody, with each rule of ZenFlow on and off,
beside plain AdamW: from scratch on the demo's text, and fine-tuned on this repository's documentation from the weights
that AdamW made of the demo's text. AdamW and the defaults fine-tune at other peak rates too. With `--peers` DeepSpeed's
ZenFlow trains the same, each run in a process of its own (`zenflow_quality_peer.py`); make that environment with
`benchmarks/peers.sh VENV 0.19.6`, because later versions permute weights when they start.
What counts is the validation loss at the end, in nats per byte, as its distance from AdamW's with the same seed and
rate; "diverged" where it is not finite. The last line is JSON, with null for what diverged. Exits with 1 when the
judged variant's mean distance is above the limit.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.language_model import quiet_trainer  # noqa: E402
from benchmarks.step_cost import conclude, find_peers, hardware, peer_environment  # noqa: E402

DEEPSPEED = "0.19.6"
SEQ_LEN, BATCH_SIZE, NUM_VAL_WINDOWS = 128, 8, 128

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
# What differs from `zenflow_quality_peer.zenflow_of`, which has our defaults in DeepSpeed's words.
PEER_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "fine-tune": {
        f"DeepSpeed {DEEPSPEED}": {},
        f"DeepSpeed {DEEPSPEED}, overlap_step=False": {"overlap_step": False},
    },
    "scratch": {
        f"DeepSpeed {DEEPSPEED}, full_warm_up_rounds=200": {"full_warm_up_rounds": 200},
        f"DeepSpeed {DEEPSPEED}, full_warm_up_rounds=200, overlap_step=False": {
            "full_warm_up_rounds": 200,
            "overlap_step": False,
        },
    },
}
LIMITS = {"fine-tune": 0.01, "scratch": 0.05}  # nats, of the mean distance from AdamW
JUDGED = {"fine-tune": "default", "scratch": "warmup_steps=200"}
LEARNING_RATES = {"fine-tune": 1e-3, "scratch": 2e-3}
OTHER_RATES = {"fine-tune": (3e-4, 2e-3), "scratch": ()}


class Run(NamedTuple):
    """One training run of each seed.

    Attributes:
        options: of `ZenFlowConfig`, or of DeepSpeed's ZenFlow where `is_peer`; None for plain AdamW.
        lr: the peak learning rate.
    """

    task: str
    name: str
    options: dict[str, Any] | None
    lr: float
    is_peer: bool = False


def data_of(task: str, seed: int) -> Any:
    """The task's text, its training windows in the seed's order."""
    from examples.language_model.data import TextData

    folder = REPOSITORY / "docs" if task == "fine-tune" else None
    return TextData(folder, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, num_val_windows=NUM_VAL_WINDOWS, seed=seed)


def digest_of(data: Any) -> str:
    """Of the text that is trained on and validated with."""
    sha = hashlib.sha256()
    for part in (data.corpus.train, data.corpus.validation):
        sha.update(part.numpy().tobytes())
    return sha.hexdigest()


def build_module(seed: int, start: Path | None, lr: float) -> Any:
    """The demo's module with the seed's weights, or with those that were saved as `start`."""
    import lightning as L
    import torch

    from examples.language_model.model import GPTConfig
    from examples.language_model.module import LanguageModel

    warnings.simplefilter("ignore")
    L.seed_everything(seed)
    module = LanguageModel(GPTConfig(num_layers=2, dim=96, num_heads=3, num_kv_heads=3), lr=lr)
    if start is not None:
        module.load_state_dict(torch.load(start, weights_only=True))
    return module


def train(run: Run, seed: int, steps: int, start: Path | None) -> tuple[float, Any]:
    """Validation loss at the end, in nats per byte, and the module."""
    import lightning_superscale as lss

    module = build_module(seed, start, run.lr)
    module.on_fit_start = lambda: None  # prints the plan
    offload = None if run.options is None else {"engine": "zenflow", "gpu_fraction": 0, "zenflow": run.options}
    trainer = quiet_trainer(
        steps,
        steps,
        strategy=lss.SuperScaleStrategy(zero=0, offload=offload),
    )
    trainer.fit(module, datamodule=data_of(run.task, seed))
    return float(trainer.callback_metrics["val_bits_per_byte"]) * math.log(2), module


def train_peer(run: Run, seed: int, steps: int, start: Path | None, *, peers: Path, threads: int) -> float:
    """What `train` returns first, of DeepSpeed's ZenFlow; NaN where it diverged.

    Raises:
        RuntimeError: its process failed.
    """
    spec = {
        "task": run.task,
        "options": run.options,
        "text": digest_of(data_of(run.task, seed)),
        "seed": seed,
        "steps": steps,
        "start": None if start is None else str(start),
        "lr": run.lr,
        "threads": threads,
    }
    command = [str(peers / "bin" / "python"), "-W", "ignore", str(REPOSITORY / "benchmarks/zenflow_quality_peer.py")]
    done = subprocess.run(
        [*command, json.dumps(spec)],
        env={**os.environ, **peer_environment(peers), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{run.name} failed; its last words:\n{done.stderr[-3000:]}")
    loss = json.loads(done.stdout.splitlines()[-1])["loss"]
    return math.nan if loss is None else float(loss)


def check_version(parser: argparse.ArgumentParser, peers: Path) -> None:
    """Refuse an environment with another DeepSpeed than the one that the rows are named for."""
    ask = "import importlib.metadata as m; print(m.version('deepspeed'))"
    done = subprocess.run([str(peers / "bin" / "python"), "-c", ask], capture_output=True, text=True, check=False)
    found = done.stdout.strip() if done.returncode == 0 else "none"
    if found != DEEPSPEED:
        parser.error(
            f"--peers takes an environment with DeepSpeed {DEEPSPEED}, found {found} in {peers}: make one with "
            f"benchmarks/peers.sh VENV {DEEPSPEED}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 1500), help="of fine-tuning, and from scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="*", default=None, help="of ours beside AdamW; all if not given")
    parser.add_argument("--peers", default="none", help=f"environment with DeepSpeed {DEEPSPEED}, or none")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None, help="a PNG of the table; needs matplotlib")
    options = parser.parse_args()
    peers = find_peers(parser, options.peers)
    if peers is not None:
        check_version(parser, peers)

    import torch

    import lightning_superscale as lss

    torch.set_num_threads(options.threads)
    os.environ.setdefault("LSS_PROFILE", "off")
    steps = dict(zip(TASKS, options.steps, strict=True))
    losses: dict[str, dict[str, list[float]]] = {task: {} for task in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for run in runs(options.variants, with_peers=peers is not None):
                trained = Path(folder, f"{seed}.pt")
                start = trained if run.task == "fine-tune" else None
                if run.is_peer and peers is not None:
                    loss = train_peer(run, seed, steps[run.task], start, peers=peers, threads=options.threads)
                else:
                    loss, module = train(run, seed, steps[run.task], start)
                    if (run.task, run.name) == ("scratch", "adamw"):
                        torch.save(module.state_dict(), trained)
                losses[run.task].setdefault(run.name, []).append(loss)
                print(f"{run.task}, {run.name}, seed {seed}: {loss:.4f} nats per byte", file=sys.stderr, flush=True)
    rows, checks = table_of(losses)
    if options.picture is not None:
        draw(rows, options.picture)
    # Of Python, because the text from scratch is its standard library.
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning_superscale": lss.__version__,
    }
    report = {
        "benchmark": "zenflow_quality",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions if peers is None else {**versions, "deepspeed": DEEPSPEED},
        "steps": steps,
        "rows": rows,
        "checks": checks,
    }
    return conclude(report, options.json)


def runs(chosen: list[str] | None, *, with_peers: bool) -> Iterator[Run]:
    """All runs of a seed in order; AdamW from scratch first, whose weights are fine-tuned."""
    for task in reversed(TASKS):
        for name, options in VARIANTS[task].items():
            if options is None or chosen is None or name in chosen:
                yield Run(task, name, options, LEARNING_RATES[task])
        peers = PEER_VARIANTS[task] if with_peers else {}
        for name, peer_options in peers.items():
            yield Run(task, name, peer_options, LEARNING_RATES[task], is_peer=True)
        for lr in OTHER_RATES[task]:
            for name in ("adamw", JUDGED[task]):
                yield Run(task, f"{name}, lr={lr:g}", VARIANTS[task][name], lr)
            for name in list(peers)[:1]:
                yield Run(task, f"{name}, lr={lr:g}", peers[name], lr, is_peer=True)


def table_of(losses: dict[str, dict[str, list[float]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Print the table; returns its rows, in which None stands for what is not finite, and the checks."""
    rows, checks = [], []
    print(f"{'task':<11}{'variant':<68}{'loss':>9}{'minus AdamW, by seed':>34}")
    for task in TASKS:
        for name, by_seed in losses[task].items():
            _, _, rate = name.partition(", lr=")
            its_adamw = losses[task][f"adamw, lr={rate}" if rate else "adamw"]
            deltas = [a - b for a, b in zip(by_seed, its_adamw, strict=True)]
            mean = _finite(statistics.fmean(by_seed))
            rows.append({"task": task, "variant": name, "loss": mean, "deltas": list(map(_finite, deltas))})
            said = f"{mean:>9.4f}" if mean is not None else f"{'diverged':>9}"
            print(f"{task:<11}{name:<68}{said}{_by_seed(rows[-1]['deltas']):>34}")
            if name == JUDGED[task]:
                distance = abs(statistics.fmean(deltas))
                what = f"{task}: {name}, distance from AdamW in nats per byte"
                met = round(distance, 4) <= LIMITS[task]
                checks.append({"check": what, "measured": _finite(distance), "limit": LIMITS[task], "met": met})
    return rows, checks


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _by_seed(deltas: Sequence[float | None]) -> str:
    return ", ".join("diverged" if delta is None else f"{delta:+.4f}" for delta in deltas)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each variant's distance from AdamW, one dot per seed; seeds that diverged are crosses at the right edge."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = {task: [row for row in rows if row["task"] == task][::-1] for task in TASKS}
    heights = [1 + len(shown[task]) for task in TASKS]
    figure, axes = plt.subplots(
        len(TASKS), 1, figsize=(9, 0.3 * sum(heights)), layout="constrained", height_ratios=heights
    )
    for task, axis in zip(TASKS, axes, strict=True):
        axis.axvspan(-LIMITS[task], LIMITS[task], color="0.9", label=f"within {LIMITS[task]} nats")
        axis.axvline(0, color="0.5", linewidth=1)
        for at, row in enumerate(shown[task]):
            finite = [delta for delta in row["deltas"] if delta is not None]
            color = "C1" if row["variant"].startswith("DeepSpeed") else "C0"
            axis.plot(finite, [at] * len(finite), "o", color=color, alpha=0.6)
            if finite and len(finite) == len(row["deltas"]):
                axis.plot([statistics.fmean(finite)], [at], "|", color="C3", markersize=14, markeredgewidth=2)
            elif len(finite) < len(row["deltas"]):
                axis.plot([1], [at], "x", color="C3", transform=axis.get_yaxis_transform(), clip_on=False)
        axis.set_yticks(range(len(shown[task])), [row["variant"] for row in shown[task]])
        axis.set_title(task, fontsize=10)
        axis.legend(fontsize=8)
    figure.supxlabel("validation loss minus AdamW's, nats per byte (dots: seeds, bars: their means)", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())
