"""`benchmarks/precision.py` and `convergence.py` on tiny runs: bytes, the JSON, and how limits are judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import convergence, precision
from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


def last_line(*command: str) -> dict:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["kahan", *(pytest.param(name, marks=only_in_test_all) for name in ("all bf16", "32-true low states"))]
)
def test_counted_bytes_are_the_predicted_ones(name: str) -> None:
    facts = last_line("benchmarks/precision.py", "--one", name, "--size", "1M")
    assert facts["counted"] / facts["num_params"] == pytest.approx(precision.OURS[name][1], rel=0.02)
    assert facts["peak"] > 0


@pytest.mark.slow
@only_in_test_all
def test_a_curve_is_measured_where_it_was_asked_for() -> None:
    found = last_line("benchmarks/convergence.py", "--one", "nearest:1", "--steps", "4", "--every", "2")
    assert [step for step, _ in found["points"]] == [2, 4]
    assert all(0 < bits < 10 for _, bits in found["points"])


def test_predicted_bytes_of_stages() -> None:
    assert precision.predicted(1, {}, 2) == 10
    assert precision.predicted(3, {}, 2) == 8
    assert precision.predicted(2, precision.LOW, 4) == 2 + 0.5 + 1


def test_peaks_are_judged_beside_ddp_and_counts_beside_predictions() -> None:
    def row(name: str, peak: int, counted: float | None = None) -> dict:
        return {"name": name, "peak_mib": peak, "counted": counted, "predicted": 8.0}

    rows = [row("ddp-autocast", 100), row("all bf16", 59, 8.1), row("all bf16 autocast", 70, 8.0)]
    assert [check["met"] for check in precision.checks_of(rows)] == [True, True]
    rows = [row("ddp-autocast", 100), row("all bf16", 61, 8.0), row("all bf16 autocast", 70, 9.0)]
    assert [check["met"] for check in precision.checks_of([*rows, row("deepspeed-all-bf16", 69)])] == [False] * 3


def test_losses_are_compared_by_seed() -> None:
    results = [
        {"variant": variant, "seed": seed, "points": [[50, 3.0], [100, loss * (1 + seed)]]}
        for variant, loss in {"fp32": 2.0, "stochastic": 2.02, "kahan": 2.0, "nearest": 2.5}.items()
        for seed in (0, 1)
    ]
    ratios = {row["name"]: row["mean_ratio"] for row in convergence.rows_of(results)}
    assert ratios == {"fp32": 1.0, "stochastic": 1.01, "kahan": 1.0, "nearest": 1.25}
