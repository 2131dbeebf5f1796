"""`benchmarks/zenflow.py` on two steps: what it prints, and that AdamW is its own measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_two_steps_print_rows_and_checks():
    command = [sys.executable, "benchmarks/zenflow.py", "--steps", "2", "--seeds", "1", "--variants", "default"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert [(row["task"], row["variant"]) for row in report["rows"]] == [
        ("fine-tune", "adamw"),
        ("fine-tune", "default"),
        ("scratch", "adamw"),
        ("scratch", "default"),
    ]
    assert report["rows"][0]["deltas"] == [0.0]
    assert all(0 < row["loss"] < 8 for row in report["rows"])
    assert [check["limit"] for check in report["checks"]] == [0.01]
    assert report["hardware"]["cores"] >= 1
