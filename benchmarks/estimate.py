"""How far `estimate(device="this machine")` is from the clock: predicted and measured seconds of a training step.

    python benchmarks/estimate.py [--strategies resident,cpu,superoffload] [--precisions 32-true,bf16-true] [--json OUT]

Two models with two batch sizes each train under each strategy in this process. A prediction lies between two
measurements of the same case, so that a machine whose speed drifts is seen: their ratio is reported beside the error.
The last line of the output is JSON. Exits with 1 when the median error, or more than a fifth of the errors, is beyond
the limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning_superscale as lss
from benchmarks.models import SHAPES, Decoder

LIMIT = 0.10
STRATEGIES: dict[str, dict[str, Any]] = {
    "resident": {},
    "cpu": {"offload": {"engine": "cpu", "gpu_fraction": 0.0}},
    "superoffload": {"offload": {"engine": "superoffload", "gpu_fraction": 0.0}},
    "zenflow": {"offload": {"engine": "zenflow", "gpu_fraction": 0.0, "zenflow": {"topk": 0.1, "update_interval": 4}}},
    "flow": {"offload": {"engine": "superoffload", "weights": "flow"}},
}
_WARM_UP, _STEPS = 4, 12


class Model(L.LightningModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Language(Model):
    """A decoder of 25M parameters; batches are tokens [batch, 129]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Decoder(SHAPES["25M"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(batch)

    @staticmethod
    def batch(size: int) -> Tensor:
        return torch.randint(6144, (size, 129), generator=torch.Generator().manual_seed(1))


class Images(Model):
    """Residual convolutions with 10M parameters; batches are images [batch, 3, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 256, 8, stride=8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, 256), nn.Conv2d(256, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 256, 1))
            for _ in range(8)
        )
        self.head = nn.Linear(256, 1000)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.stem(batch.to(self.stem.weight.dtype))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3))).float().logsumexp(1).mean()

    @staticmethod
    def batch(size: int) -> Tensor:
        return torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[type[Any], tuple[int, int]]] = {"language": (Language, (2, 8)), "images": (Images, (4, 16))}


class Case(NamedTuple):
    model: str
    batch: int
    strategy: str
    precision: str


class Clock(L.Callback):
    """Seconds of each training batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def measure(case: Case) -> float:
    """Seconds of a training batch: the median of some after others that warm up."""
    make, _ = MODELS[case.model]
    clock, data = Clock(), make.batch(case.batch)
    trainer = L.Trainer(
        strategy=lss.SuperScaleStrategy(**STRATEGIES[case.strategy]),
        plugins=[lss.SuperScalePrecision(case.precision)],
        accelerator="cpu",
        devices=1,
        max_steps=_WARM_UP + _STEPS,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make(), DataLoader(data.repeat(_WARM_UP + _STEPS, *[1] * (data.ndim - 1)), case.batch))
    return statistics.median(clock.seconds[_WARM_UP:])


def predict(case: Case) -> dict[str, float]:
    """Predicted seconds of the parts of a step."""
    make, _ = MODELS[case.model]
    with torch.device("meta"):
        model = make()
    options = {"zero": 0, "offload": None} | STRATEGIES[case.strategy]
    found = lss.estimate(
        model, batch=make.batch(case.batch), device="this machine", precision=case.precision, **options
    )
    parts = found.strategies[0].time
    return {"forward": parts.forward, "backward": parts.backward, "optimizer": parts.optimizer, "total": parts.total}


def compare(case: Case) -> dict[str, Any]:
    before = measure(case)
    parts = predict(case)
    after = measure(case)
    measured = (before + after) / 2
    error = parts["total"] / measured - 1
    print(
        f"{case.model:9} batch {case.batch:3} {case.strategy:13} {case.precision:10} measured {measured * 1e3:8.1f} "
        f"ms, predicted {parts['total'] * 1e3:8.1f} ms: {error:+.1%} (the machine itself: {after / before - 1:+.1%})",
        flush=True,
    )
    return {
        **case._asdict(),
        "measured_s": measured,
        "drift": after / before - 1,
        "error": error,
        "predicted_s": {name: round(seconds, 6) for name, seconds in parts.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--precisions", default="32-true,bf16-true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads != torch.get_num_threads():
        torch.set_num_threads(options.threads)
    rows = [
        compare(Case(model, batch, strategy, precision))
        for model in options.models.split(",")
        for batch in MODELS[model][1]
        for precision in options.precisions.split(",")
        for strategy in options.strategies.split(",")
    ]
    errors = sorted(abs(row["error"]) for row in rows)
    num_beyond = sum(error > LIMIT for error in errors)
    report = {
        "hardware": {"machine": platform.platform(), "threads": options.threads, "torch": torch.__version__},
        "rows": rows,
        "median_error": statistics.median(errors),
        "largest_error": errors[-1],
        "beyond_limit": num_beyond,
    }
    print(
        f"{len(rows)} cases on {platform.platform()}, {options.threads} threads, torch {torch.__version__}: median "
        f"error {report['median_error']:.1%}, largest {report['largest_error']:.1%}, {num_beyond} beyond {LIMIT:.0%}"
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return int(report["median_error"] > LIMIT or num_beyond > len(rows) / 5)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
