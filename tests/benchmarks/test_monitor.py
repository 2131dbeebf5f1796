"""`benchmarks/monitor.py`: a short run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.extent import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]


@only_in_test_all
def test_a_short_run_sums_the_hooks_up(tmp_path: Path) -> None:
    out = tmp_path / "monitor.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/monitor.py"),
        "--shape",
        "1M",
        "--steps",
        "12",
        "--json",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    # 1: hooks took too long, which is for who runs it to know; a step of this size takes a few milliseconds.
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert [row["every_n_steps"] for row in report["rows"]] == [10, 1]
    # Which of the two took longer is for a quiet machine to say: one wait for a core is longer than both.
    assert all(row["hooks_s_per_step"] > 0 for row in report["rows"])
