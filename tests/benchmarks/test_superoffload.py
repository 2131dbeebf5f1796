"""`benchmarks/superoffload.py` end to end on a tiny model: bytes, bits, the JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_superoffload_tiny_run_counts_its_bytes(tmp_path: Path) -> None:
    out = tmp_path / "superoffload.json"
    command = [sys.executable, "benchmarks/superoffload.py", "--sizes", "1M", "--rounds", "2", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr  # nothing in it is a matter of time without peers
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    [table] = report["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["passes", "superoffload", "cpu"]
    assert rows["passes"]["exposed_s"] == 0
    assert rows["superoffload"]["final_loss"] == rows["cpu"]["final_loss"]
    assert 4 <= rows["superoffload"]["link_bytes_per_param"] < 4.04
    assert 16 <= rows["superoffload"]["host_bytes_per_param"] < 16.16
    assert len(report["checks"]) == 3
