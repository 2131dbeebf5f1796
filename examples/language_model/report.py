"""What a run leaves behind for people: progress lines where there is no terminal, and the loss plot."""

from __future__ import annotations

import csv
import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

Point = tuple[int, float]


class ProgressLines(Logger):
    """Prints a line every so many steps: a progress bar for log files.

    Args:
        max_steps: of the run.
        every_n_steps: one line of training in so many steps; validations always get theirs.
    """

    def __init__(self, max_steps: int, every_n_steps: int = 50) -> None:
        super().__init__()
        self.max_steps, self.every_n_steps = max_steps, every_n_steps
        self._num_lines_due = 0
        self._tokens_per_s = ""

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "tokens_per_s" in metrics:
            self._tokens_per_s = f"  {metrics['tokens_per_s']:,.0f} tokens/s"
        steps_done = int(step or 0)
        prefix = f"step {steps_done:>5} of {self.max_steps}"
        if "val_bits_per_byte" in metrics:
            print(f"{prefix}  validation  {metrics['val_bits_per_byte']:.3f} bits/byte", flush=True)
        elif "train_loss" in metrics and steps_done // self.every_n_steps > self._num_lines_due:
            self._num_lines_due = steps_done // self.every_n_steps
            bits = metrics["train_loss"] / math.log(2)
            print(f"{prefix}  training    {bits:.3f} bits/byte{self._tokens_per_s}", flush=True)


@dataclass
class History:
    """Bits per byte by step, over all runs that were resumed one from another."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)


def read_history(logs: Path) -> History:
    """Join the metrics.csv files that CSVLogger wrote below `logs`, one `version_N` per run."""
    history = History()
    files = sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for number, file in enumerate(files):
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        if not rows:
            continue
        start = min(int(float(row["step"])) for row in rows)
        if number > 0:
            history.resumed_at.append(max((point[0] for point in history.train if point[0] < start), default=start))
        # A run that was cut off after its last checkpoint has steps that its successor took again.
        history.train = [point for point in history.train if point[0] < start]
        history.validation = [point for point in history.validation if point[0] < start]
        for row in rows:
            if row.get("train_loss"):
                history.train.append((int(float(row["step"])), float(row["train_loss"]) / math.log(2)))
            if row.get("val_bits_per_byte"):
                history.validation.append((int(float(row["step"])), float(row["val_bits_per_byte"])))
    return history


def smooth(points: list[Point], reach: int = 8) -> list[Point]:
    """Mean over `reach` points to either side, fewer at both ends, so that the curve doesn't lag."""
    smoothed = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = [bits for _, bits in points[i - near : i + near + 1]]
        smoothed.append((step, sum(window) / len(window)))
    return smoothed


def plot_history(history: History, order0_bits: float, title: str, target: Path) -> None:
    """Training and validation bits per byte over steps, and the order-0 entropy to beat, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=130)
    axes.axhline(
        order0_bits, color="#8a8a8a", linestyle="--", linewidth=1.3, label=f"order-0 entropy: {order0_bits:.2f}"
    )
    if history.train:
        axes.plot(*zip(*history.train, strict=True), color="#9ec5e8", linewidth=0.9, label="training, per batch")
        axes.plot(*zip(*smooth(history.train), strict=True), color="#1f6fb4", linewidth=1.9, label="training, smoothed")
    if history.validation:
        steps, bits = zip(*history.validation, strict=True)
        label = f"validation: {bits[-1]:.2f} at the end"
        axes.plot(steps, bits, color="#d1495b", linewidth=1.6, marker="o", markersize=4.5, label=label)
    for number, step in enumerate(history.resumed_at):
        label = "resumed from last.ckpt" if number == 0 else None
        axes.axvline(step, color="#444444", linestyle=":", linewidth=1.1, label=label)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0, top=8.5)
    axes.set_xlim(left=0)
    save(figure, axes, target)


def save(figure: Any, axes: Any, target: Path) -> None:
    """Write a plot as a PNG, with a light grid and no frame, and let go of it."""
    from matplotlib import pyplot as plt

    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)
