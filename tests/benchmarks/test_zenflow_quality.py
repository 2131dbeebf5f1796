"""`benchmarks/zenflow_quality.py` on two steps: what it prints, and that AdamW is its own measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_two_steps_print_rows_and_checks():
    command = [sys.executable, "benchmarks/zenflow_quality.py", "--steps", "2", "2", "--seeds", "1"]
    command += ["--variants", "default", "warmup_steps=200"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert [(row["task"], row["variant"]) for row in report["rows"]] == [
        ("fine-tune", "adamw"),
        ("fine-tune", "default"),
        ("fine-tune", "adamw, lr=0.0003"),
        ("fine-tune", "default, lr=0.0003"),
        ("fine-tune", "adamw, lr=0.002"),
        ("fine-tune", "default, lr=0.002"),
        ("scratch", "adamw"),
        ("scratch", "warmup_steps=200"),
        ("scratch", "default"),
    ]
    assert report["rows"][0]["deltas"] == [0.0]
    assert all(0 < row["loss"] < 8 for row in report["rows"])
    assert [check["limit"] for check in report["checks"]] == [0.01, 0.05]
    assert report["hardware"]["cores"] >= 1
